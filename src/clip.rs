//! [`Clip`]: what to clip and how, checked when it is made.

use crate::Error;

/// Which norm is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NormType {
    /// The sum of the absolute values.
    L1,
    /// The square root of the sum of the squares.
    #[default]
    L2,
    /// The largest absolute value.
    Inf,
}

/// Which elements share one norm and one coefficient, that is: what a segment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// All elements of all tensors.
    #[default]
    Global,
}

/// What happens when a gradient is NaN or infinite. The report counts and locates them under every policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NonFinite {
    /// Write nothing and return [`Error::NonFinite`]. The default of every clip that measures a norm.
    Error,
    /// Compute with them as PyTorch does: a NaN makes every gradient NaN; an infinite norm makes the finite ones 0
    /// and the infinite ones NaN. A value clip keeps NaN and takes an infinity to its bound; there it is the default.
    Propagate,
    /// Write nothing, and let the report say so.
    Skip,
    /// Set the whole segment to 0.
    Zero,
    /// Set the non-finite elements to 0 and clip the rest by the norm of the rest.
    Drop,
}

/// What is compared with the threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    /// c = min(1, max_norm / (N + eps))
    Norm { max_norm: f64 },
    /// g = clamp(g, min, max)
    Value { min: f64, max: f64 },
}

/// What to clip and how: one description for every backend.
///
/// With N the norm of a segment's gradients divided by `grad_scale`, clipping by norm multiplies each gradient by
/// `c / grad_scale`, where
///
/// ```text
/// c = min(1, max_norm / (N + eps))
/// ```
///
/// (Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1; the `eps`
/// is PyTorch's). Clipping by value replaces each gradient g by `clamp(g / grad_scale, min, max)`.
///
/// ```
/// use gradclip::{Clip, NonFinite, NormType};
/// let clip = Clip::norm(1.0)?.norm_type(NormType::L2).grad_scale(65536.0)?.non_finite(NonFinite::Skip);
/// assert!(Clip::norm(-1.0).is_err());
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    pub(crate) mode: Mode,
    pub(crate) norm_type: NormType,
    pub(crate) scope: Scope,
    pub(crate) eps: f64,
    pub(crate) grad_scale: f64,
    pub(crate) non_finite: NonFinite,
}

impl Clip {
    /// Clips by norm. `max_norm` 0 sets every gradient to 0; infinity only measures and writes nothing at all.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `max_norm` is negative or NaN.
    pub fn norm(max_norm: f64) -> Result<Self, Error> {
        if max_norm.is_nan() || max_norm < 0.0 {
            return Err(Error::BadParameter { what: "max_norm", value: max_norm, must: "0 or more" });
        }
        Ok(Self::new(Mode::Norm { max_norm }, NonFinite::Error))
    }

    /// Clips each element to `-clip_value ..= clip_value`.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `clip_value` is negative or NaN.
    pub fn value(clip_value: f64) -> Result<Self, Error> {
        if clip_value.is_nan() || clip_value < 0.0 {
            return Err(Error::BadParameter { what: "clip_value", value: clip_value, must: "0 or more" });
        }
        Self::range(-clip_value, clip_value)
    }

    /// Clips each element to `min ..= max`; either may be infinite.
    ///
    /// # Errors
    /// [`Error::BadRange`] if `min > max` or one of them is NaN.
    pub fn range(min: f64, max: f64) -> Result<Self, Error> {
        if min.is_nan() || max.is_nan() || min > max {
            return Err(Error::BadRange { min, max });
        }
        Ok(Self::new(Mode::Value { min, max }, NonFinite::Propagate))
    }

    fn new(mode: Mode, non_finite: NonFinite) -> Self {
        Self { mode, norm_type: NormType::default(), scope: Scope::default(), eps: 1e-6, grad_scale: 1.0, non_finite }
    }

    /// Chooses the norm; L2 if not called. A value clip measures none and ignores it.
    #[must_use]
    pub fn norm_type(mut self, norm_type: NormType) -> Self {
        self.norm_type = norm_type;
        self
    }

    /// Chooses what shares a norm; everything if not called. A value clip ignores it.
    #[must_use]
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Sets what is added to the norm before dividing: 1e-6 if not called, as in PyTorch; 0 gives the arithmetic of
    /// Optax and TensorFlow, which clip only where N > `max_norm`. A value clip ignores it.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `eps` is negative, NaN or infinite.
    pub fn eps(mut self, eps: f64) -> Result<Self, Error> {
        if !(0.0..f64::INFINITY).contains(&eps) {
            return Err(Error::BadParameter { what: "eps", value: eps, must: "a finite number, 0 or more" });
        }
        self.eps = eps;
        Ok(self)
    }

    /// The loss scale that the gradients carry: they are divided by it, in the same pass.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `grad_scale` is not a finite number above 0.
    pub fn grad_scale(mut self, grad_scale: f64) -> Result<Self, Error> {
        if !(grad_scale.is_normal() && grad_scale > 0.0) {
            return Err(Error::BadParameter { what: "grad_scale", value: grad_scale, must: "a finite number above 0" });
        }
        self.grad_scale = grad_scale;
        Ok(self)
    }

    /// Chooses what happens when a gradient is NaN or infinite.
    #[must_use]
    pub fn non_finite(mut self, policy: NonFinite) -> Self {
        self.non_finite = policy;
        self
    }

    /// Whether nothing is ever written: no norm exceeds an infinite threshold.
    pub(crate) fn only_measures(&self) -> bool {
        self.mode == Mode::Norm { max_norm: f64::INFINITY }
    }

    /// Whether gradients must be read before the first may be written: always for a norm; for a value clip only if
    /// one non-finite element decides about the others.
    pub(crate) fn reads_first(&self) -> bool {
        matches!(self.mode, Mode::Norm { .. })
            || matches!(self.non_finite, NonFinite::Error | NonFinite::Skip | NonFinite::Zero)
    }
}

//! [`Clip`]: what to clip and how, checked when it is made.

use crate::Error;

/// Which norm is measured: (Σ |g|^p)^(1/p).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NormType {
    /// p = 1: the sum of the absolute values.
    L1,
    /// p = 2: the square root of the sum of the squares.
    #[default]
    L2,
    /// p = ∞: the largest absolute value.
    Inf,
    /// Any other p above 0. Made by [`NormType::p`].
    P(Power),
}

/// The p of a norm that has no name of its own: a finite number above 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Power(u64);

impl Power {
    /// The number.
    #[must_use]
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl NormType {
    /// The p-norm.
    ///
    /// On the CPU its relative error is at most 1e-7 for p of 1/1024 and more; on the GPU 1e-6 for p of 1 and more, and
    /// 1e-6 / p below, where the root magnifies what the sum has lost. Beyond 2^50 a larger p changes no norm, and is
    /// taken for 2^50; the GPU takes p for one from 2^-20 to 2^22, which puts up to 5e-6 on the norm of 2^30 equal elements.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if p is not above 0. (PyTorch's p = 0 counts the tensors, which no clip can use.)
    pub fn p(p: f64) -> Result<Self, Error> {
        match p {
            1.0 => Ok(Self::L1),
            2.0 => Ok(Self::L2),
            f64::INFINITY => Ok(Self::Inf),
            p if p > 0.0 => Ok(Self::P(Power(p.min(2f64.powi(50)).to_bits()))),
            _ => Err(Error::BadParameter { what: "norm_type", value: p, must: "above 0 (infinity for the largest)" }),
        }
    }

    /// The p.
    #[must_use]
    pub fn power(self) -> f64 {
        match self {
            Self::L1 => 1.0,
            Self::L2 => 2.0,
            Self::Inf => f64::INFINITY,
            Self::P(power) => power.get(),
        }
    }
}

/// Which elements share one norm and one coefficient, that is: what a segment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// All elements of all tensors. PyTorch's `clip_grad_norm_`, `clip_by_global_norm` of Optax and TensorFlow.
    #[default]
    Global,
    /// Each tensor by itself. TensorFlow's and Keras's `clip_by_norm`, burn's clipping.
    Tensor,
    /// Each unit of each tensor by itself: a row or a column, by [`Clip::unit_axis`]. A tensor with fewer than two
    /// dimensions is one unit.
    Unit,
    /// Each example by itself, over all tensors: dimension 0 of every tensor is the example, and all must agree on its
    /// size. With [`Clipper::sum_examples`](crate::Clipper::sum_examples) the clipping of DP-SGD (Abadi et al. 2016,
    /// "Deep learning with differential privacy").
    Example,
    /// Each example of each tensor by itself, with a share of the threshold by [`Clip::budget`].
    ExampleTensor,
}

/// Which axis of a tensor counts its units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UnitAxis {
    /// The first: units are rows, and everything behind the first axis belongs to one. PyTorch's layout of weights,
    /// and timm's units.
    #[default]
    First,
    /// The last: units are columns. The layout of JAX and burn, and Optax's units for matrices.
    Last,
}

/// How the threshold of [`Scope::ExampleTensor`] is shared out to K tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Budget {
    /// `max_norm` for each tensor.
    #[default]
    Each,
    /// `max_norm / sqrt(K)`: together they stay below `max_norm`. Optax's `per_example_layer_norm_clip`, uniform.
    Uniform,
    /// `max_norm * sqrt(n_i / n)` for the n_i elements that tensor i has of the n in an example. Optax's, not uniform.
    Sized,
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
    /// Set the segments that have one to 0.
    Zero,
    /// Set the non-finite elements to 0 and clip the rest by the norm of the rest.
    Drop,
}

/// What is compared with the threshold. All that a mode is, beside its formula in `Clip::weight` and `Clip::max_norm`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    /// c = min(1, max_norm / (N + eps))
    Norm { max_norm: f64 },
    /// c = min(1, max_rms / N), N = sqrt(mean g²)
    Rms { max_rms: f64 },
    /// c = min(1, max_average / N), N = L2 norm / number of elements
    AverageNorm { max_average: f64 },
    /// c = m / max(N, AGC_FLOOR) where N exceeds m = clip_factor · max(norm of the parameter, agc_eps)
    Agc { clip_factor: f64, agc_eps: f64 },
    /// g = clamp(g, min, max)
    Value { min: f64, max: f64 },
}

/// What AGC divides by at least.
pub(crate) const AGC_FLOOR: f64 = 1e-6;

/// What to clip and how: one description for every backend.
///
/// With N the norm of a segment's gradients divided by `grad_scale`, each of its gradients is multiplied by
/// `c / grad_scale`. [`Scope`] says what a segment is, and the mode what c is:
///
/// | mode | N | c | source |
/// |---|---|---|---|
/// | [`Clip::norm`] | the norm of [`Clip::norm_type`] | min(1, max_norm / (N + eps)) | Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1; the eps is PyTorch's |
/// | [`Clip::rms`] | sqrt(mean g²) | min(1, max_rms / N) | Optax, `clip_by_block_rms` (per tensor) |
/// | [`Clip::average_norm`] | L2 norm / number of elements | min(1, max_average / N) | TensorFlow 1, `clip_by_average_norm` |
/// | [`Clip::agc`] | L2 norm of a unit | m / max(N, 1e-6) where N > m = clip_factor · max(‖parameter‖, agc_eps), else 1 | Brock, De, Smith, Simonyan 2021, "High-performance large-scale image recognition without normalization", equation 3 |
/// | [`Clip::value`], [`Clip::range`] | none | none: g becomes clamp(g / grad_scale, min, max) | Mikolov 2012, "Statistical language models based on neural networks" |
///
/// # What a clip leaves
///
/// The norm afterwards is at most `max_norm (1 + r) + z`, where `max_norm` is what the mode has in its place, shared out by
/// [`Clip::budget`], and
///
/// - r is 1e-6 for float32 and float64: the error of the norm that was measured, and the rounding of the coefficient and of
///   each element. (For norms of any other p than 1, 2 and infinity it is what [`NormType::p`] tells and 1.2e-7 for these
///   roundings; under AGC, whose threshold has an error of its own, 2.2e-6.) Halves are rounded to 11 or 8 bits, to nearest:
///   r is 4.9e-4 (2^-11) more for float16 and 3.9e-3 (2^-8) more for bfloat16. A coefficient below the normal numbers of a
///   float64, 2.2e-308, has fewer digits, and for it no r is promised;
/// - z is half the smallest number of the dtype for each of the n elements, n^(1/p) times that together: 3.0e-8 n^(1/p) for
///   float16, 4.6e-41 n^(1/p) for bfloat16. It only matters where most elements are that small. It is divided as N is under
///   [`Clip::rms`] and [`Clip::average_norm`]; for p below 1 it is p-th powers that add up.
///
/// *Clipping twice.* A second clip by the same description (the loss scale is out by then) multiplies by no less than
/// `1 - eps (1 - c) / max_norm - r - z / max_norm - 1.1e-6`. With an `eps` of 0 that is rounding alone: where all elements are
/// float32, or all are of one half precision, and p is 1, 2 or infinity, the CPU moves none by more than two units in its
/// last place in any test, a GPU by three, and both mostly none at all; but that a second clip finds nothing to clip cannot
/// be promised. An `eps` pulls the norm to `max_norm - eps`, nearer with each clip, because that
/// is where PyTorch's formula comes to rest; so a `max_norm` near `eps` shrinks gradients every time. Likewise AGC with a
/// threshold below 1e-6, which is the least that it divides by. A value clip leaves bits that a second one does not touch (but for
/// a 0 outside its bounds, which [`NonFinite::Zero`] and [`NonFinite::Drop`] leave).
///
/// ```
/// use gradclip::{Clip, NonFinite, NormType, Scope};
/// let clip = Clip::norm(1.0)?.norm_type(NormType::p(3.0)?).scope(Scope::Tensor);
/// let amp = clip.grad_scale(65536.0)?.non_finite(NonFinite::Skip);
/// assert!(Clip::norm(-1.0).is_err());
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    pub(crate) mode: Mode,
    norm_type: NormType,
    pub(crate) scope: Scope,
    pub(crate) unit_axis: Option<UnitAxis>,
    pub(crate) budget: Budget,
    eps: f64,
    pub(crate) grad_scale: f64,
    pub(crate) non_finite: NonFinite,
}

/// A threshold that may be infinite.
fn threshold(what: &'static str, value: f64) -> Result<f64, Error> {
    if value >= 0.0 { Ok(value) } else { Err(Error::BadParameter { what, value, must: "0 or more" }) }
}

/// A finite number that is not negative.
fn finite(what: &'static str, value: f64) -> Result<f64, Error> {
    if (0.0..f64::INFINITY).contains(&value) {
        Ok(value)
    } else {
        Err(Error::BadParameter { what, value, must: "a finite number, 0 or more" })
    }
}

impl Clip {
    /// Clips by norm. `max_norm` 0 sets every gradient to 0; infinity only measures and writes nothing at all.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `max_norm` is negative or NaN.
    pub fn norm(max_norm: f64) -> Result<Self, Error> {
        let max_norm = threshold("max_norm", max_norm)?;
        Ok(Self::new(Mode::Norm { max_norm }, NonFinite::Error))
    }

    /// Clips by root mean square: sqrt(mean g²), of everything or, with [`Scope::Tensor`], of each tensor.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `max_rms` is negative or NaN.
    pub fn rms(max_rms: f64) -> Result<Self, Error> {
        let max_rms = threshold("max_rms", max_rms)?;
        Ok(Self::new(Mode::Rms { max_rms }, NonFinite::Error))
    }

    /// Clips by average norm: the L2 norm divided by the number of elements, of everything or, with [`Scope::Tensor`],
    /// of each tensor.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `max_average` is negative or NaN.
    pub fn average_norm(max_average: f64) -> Result<Self, Error> {
        let max_average = threshold("max_average_norm", max_average)?;
        Ok(Self::new(Mode::AverageNorm { max_average }, NonFinite::Error))
    }

    /// Adaptive gradient clipping: each unit's norm stays below `clip_factor` times the norm of the parameter's unit.
    /// The scope is [`Scope::Unit`] if not changed. Every gradient must be given its parameter
    /// ([`TensorMut::parameter`](crate::TensorMut::parameter)). A unit whose parameter is not finite is not clipped.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `clip_factor` is negative, NaN or infinite.
    pub fn agc(clip_factor: f64) -> Result<Self, Error> {
        let clip_factor = finite("clip_factor", clip_factor)?;
        Ok(Self::new(Mode::Agc { clip_factor, agc_eps: 1e-3 }, NonFinite::Error).scope(Scope::Unit))
    }

    /// Clips each element to `-clip_value ..= clip_value`.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `clip_value` is negative or NaN.
    pub fn value(clip_value: f64) -> Result<Self, Error> {
        let clip_value = threshold("clip_value", clip_value)?;
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
        Self {
            mode,
            norm_type: NormType::default(),
            scope: Scope::default(),
            unit_axis: None,
            budget: Budget::default(),
            eps: 1e-6,
            grad_scale: 1.0,
            non_finite,
        }
    }

    /// Chooses the norm of [`Clip::norm`]; L2 if not called. The other modes ignore it.
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

    /// Chooses the units of [`Scope::Unit`]: rows if not called. Once chosen, a scalar (no dimensions) is an error,
    /// because it has no axis; otherwise it is one unit. Other scopes ignore it.
    #[must_use]
    pub fn unit_axis(mut self, axis: UnitAxis) -> Self {
        self.unit_axis = Some(axis);
        self
    }

    /// Chooses how [`Scope::ExampleTensor`] shares the threshold out. Other scopes ignore it, and so does [`Clip::agc`],
    /// whose threshold is each unit's own.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// Sets what [`Clip::norm`] adds to the norm before dividing: 1e-6 if not called, as in PyTorch; 0 gives the
    /// arithmetic of Optax and TensorFlow, which clip only where N > `max_norm`. The other modes ignore it.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `eps` is negative, NaN or infinite.
    pub fn eps(mut self, eps: f64) -> Result<Self, Error> {
        self.eps = finite("eps", eps)?;
        Ok(self)
    }

    /// Sets what [`Clip::agc`] takes the norm of a parameter's unit for at least: 1e-3 if not called, so that units
    /// that start at 0 can move. The other modes ignore it.
    ///
    /// # Errors
    /// [`Error::BadParameter`] if `agc_eps` is negative, NaN or infinite.
    pub fn agc_eps(mut self, eps: f64) -> Result<Self, Error> {
        let eps = finite("agc_eps", eps)?;
        if let Mode::Agc { agc_eps, .. } = &mut self.mode {
            *agc_eps = eps;
        }
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

    /// The same with the p of a p-norm taken for one in this range.
    #[cfg(feature = "gpu")]
    pub(crate) fn with_power_in(mut self, range: std::ops::RangeInclusive<f64>) -> Self {
        if let NormType::P(power) = &mut self.norm_type {
            *power = Power(power.get().clamp(*range.start(), *range.end()).to_bits());
        }
        self
    }

    /// The norm that is measured; None for a value clip.
    pub(crate) fn measured(&self) -> Option<NormType> {
        match self.mode {
            Mode::Norm { .. } => Some(self.norm_type),
            Mode::Rms { .. } | Mode::AverageNorm { .. } | Mode::Agc { .. } => Some(NormType::L2),
            Mode::Value { .. } => None,
        }
    }

    /// What the measured norm of so many elements is multiplied by to be the mode's N.
    pub(crate) fn weight(&self, elements: u64) -> f64 {
        let elements = elements.max(1) as f64;
        match self.mode {
            Mode::Rms { .. } => 1.0 / elements.sqrt(),
            Mode::AverageNorm { .. } => 1.0 / elements,
            Mode::Norm { .. } | Mode::Agc { .. } | Mode::Value { .. } => 1.0,
        }
    }

    /// What the measured norm of a segment of so many elements is compared with. `share` is the segment's part of the
    /// threshold, `parameter` the norm of its parameter (0 if the mode asks for none).
    pub(crate) fn max_norm(&self, elements: u64, share: f64, parameter: f64) -> f64 {
        let elements = elements.max(1) as f64;
        match self.mode {
            Mode::Norm { max_norm } => share * max_norm,
            Mode::Rms { max_rms } => share * max_rms * elements.sqrt(),
            Mode::AverageNorm { max_average } => share * max_average * elements,
            Mode::Agc { .. } if parameter == f64::INFINITY => f64::INFINITY,
            Mode::Agc { clip_factor, agc_eps } => clip_factor * parameter.max(agc_eps),
            Mode::Value { .. } => f64::INFINITY,
        }
    }

    /// What is added to the measured norm before it is compared and divided by, and what it is taken for at least when
    /// it is divided by.
    pub(crate) fn eps_and_floor(&self) -> (f64, f64) {
        match self.mode {
            Mode::Norm { .. } => (self.eps, 0.0),
            Mode::Agc { .. } => (0.0, AGC_FLOOR),
            Mode::Rms { .. } | Mode::AverageNorm { .. } | Mode::Value { .. } => (0.0, 0.0),
        }
    }

    /// That norms decide, and nothing else does.
    ///
    /// # Errors
    /// [`Error::Unfit`]
    pub(crate) fn check_adaptive(&self) -> Result<(), Error> {
        if self.measured().is_none() || self.needs_parameters() {
            return Err(Error::Unfit(
                "only a clip by norm, RMS or average norm takes norms or thresholds from outside",
            ));
        }
        Ok(())
    }

    /// That there are examples to sum.
    ///
    /// # Errors
    /// [`Error::Unfit`]
    pub(crate) fn check_examples(&self) -> Result<(), Error> {
        if self.measured().is_none() || !matches!(self.scope, Scope::Example | Scope::ExampleTensor) {
            return Err(Error::Unfit("only examples are summed: the scope must be Example or ExampleTensor"));
        }
        Ok(())
    }

    /// Whether each gradient must be given its parameter: AGC goes by them.
    #[must_use]
    pub fn needs_parameters(&self) -> bool {
        matches!(self.mode, Mode::Agc { .. })
    }

    /// Whether nothing is ever written: no norm exceeds an infinite threshold.
    pub(crate) fn only_measures(&self) -> bool {
        let (Mode::Norm { max_norm: threshold }
        | Mode::Rms { max_rms: threshold }
        | Mode::AverageNorm { max_average: threshold }) = self.mode
        else {
            return false;
        };
        threshold == f64::INFINITY
    }

    /// Whether gradients must be read before the first may be written: always for a norm; for a value clip only if
    /// one non-finite element decides about the others.
    pub(crate) fn reads_first(&self) -> bool {
        self.measured().is_some() || matches!(self.non_finite, NonFinite::Error | NonFinite::Skip | NonFinite::Zero)
    }

    /// Whether a non-finite element anywhere keeps everything as it is.
    pub(crate) fn refuses_non_finite(&self) -> bool {
        matches!(self.non_finite, NonFinite::Error | NonFinite::Skip)
    }
}

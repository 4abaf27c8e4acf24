//! [`Clip`]: what to clip and how, as data. Every use checks it.

use std::fmt;

use crate::Error;
use crate::magnitude::Magnitude;

/// Which norm is measured: (Σ |g|^p)^(1/p).
///
/// On the CPU the relative error of a norm is at most 1e-7 for p from 1/1024 up. On the GPU it is 1e-6 for p from 1 up,
/// and 1e-6 / p below, where the root magnifies the sum's error. A p above 2^50 counts as 2^50, because a larger p
/// changes no norm. The GPU limits p to 2^-20 to 2^22, which puts up to 5e-6 on the norm of 2^30 equal elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum NormType {
    /// p = 1: the sum of the absolute values.
    L1,
    /// p = 2: the square root of the sum of the squares.
    #[default]
    L2,
    /// p = ∞: the largest absolute value.
    Inf,
    /// Any p above 0. (PyTorch's p = 0 counts the tensors, which no clip can use.)
    P(f64),
}

impl NormType {
    /// The p-norm, as the named variant if it has one.
    #[must_use]
    pub fn p(p: f64) -> Self {
        match p {
            1.0 => Self::L1,
            2.0 => Self::L2,
            f64::INFINITY => Self::Inf,
            p => Self::P(p),
        }
    }

    /// The p.
    #[must_use]
    pub fn power(self) -> f64 {
        match self {
            Self::L1 => 1.0,
            Self::L2 => 2.0,
            Self::Inf => f64::INFINITY,
            Self::P(p) => p,
        }
    }
}

/// Which elements share one norm and one coefficient: the definition of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// All elements of all tensors. PyTorch's `clip_grad_norm_`, `clip_by_global_norm` of Optax and TensorFlow.
    #[default]
    Global,
    /// Each tensor by itself. TensorFlow's and Keras's `clip_by_norm`, burn's clipping.
    Tensor,
    /// Each unit of each tensor by itself: a row, a column or what else [`Clip::unit_axis`] says. A scalar is one unit.
    Unit,
    /// Each example by itself, over all tensors: dimension 0 of every tensor is the example, and all must agree on its
    /// size. [`Clipper::sum_examples`](crate::Clipper::sum_examples) makes this the clipping of DP-SGD (Abadi et al.
    /// 2016, "Deep learning with differential privacy").
    Example,
    /// Each example of each tensor by itself, with a share of the threshold by [`Clip::budget`].
    ExampleTensor,
}

/// Which axes of a tensor number its units: one unit for each place along them, and the norm of a unit over all other
/// axes. Units are numbered in row-major order ([`SegmentReport::index`](crate::SegmentReport::index)). A tensor
/// without axes, a scalar, is one unit. An axis that a tensor does not have is [`Error::Tensor`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UnitAxis {
    /// The first: a unit is a row with everything behind the first axis. PyTorch's layout, and timm's units. A tensor
    /// with fewer than two dimensions is one unit.
    #[default]
    First,
    /// The last: a unit is a column. The layout of JAX and burn. A tensor with fewer than two dimensions is one unit.
    Last,
    /// Those of Optax's `adaptive_grad_clip`: all but the first in two or three dimensions, the last in four or five. A
    /// tensor of which at most one dimension is not 1 is one unit, and any other of more than five is an error. (Of three
    /// dimensions the page of Optax 0.2.8 says something else than its code does. This follows the code.)
    Optax,
    /// These: [`UnitAxis::axes`].
    Axes(Axes),
    /// All but these, which the norm goes over: [`UnitAxis::over`].
    Over(Axes),
}

impl UnitAxis {
    /// Units numbered by these axes. Negative numbers count from the end. Order and repetition do not matter.
    #[must_use]
    pub fn axes(axes: &[isize]) -> Self {
        Self::Axes(Axes::new(axes))
    }

    /// Units whose norm goes over these axes, as TensorFlow's `clip_by_norm(t, m, axes)` and Optax's `axis` say it.
    ///
    /// ```
    /// # use gradclip::{Clip, Clipper, Scope, TensorMut, UnitAxis};
    /// let mut t = [3.0f32, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.5];
    /// let clip = Clip::norm(1.0).eps(0.0).scope(Scope::Unit).unit_axis(UnitAxis::over(&[0, -1]));
    /// let report = Clipper::cpu().apply(&clip, &mut [TensorMut::new(&mut t).shape(&[2, 2, 2])?])?;
    /// assert_eq!([report.segments[0].norm, report.segments[1].norm], [5.0, 0.5]);
    /// assert_eq!(t, [0.6, 0.0, 0.0, 0.0, 0.8, 0.0, 0.0, 0.5]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    #[must_use]
    pub fn over(axes: &[isize]) -> Self {
        Self::Over(Axes::new(axes))
    }
}

/// A set of axes, from -31 to 30. Those beyond count as -32 or 31, and as missing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Axes(u64);

impl Axes {
    fn new(axes: &[isize]) -> Self {
        Self(axes.iter().fold(0, |bits, axis| bits | 1 << (axis.clamp(&-32, &31) + 32)))
    }

    fn iter(self) -> impl Iterator<Item = isize> {
        (0..32).chain(-32..0).filter(move |axis| self.0 >> (axis + 32) & 1 == 1)
    }

    /// Whether it holds axis `i` of a tensor of this many dimensions.
    pub(crate) fn has(self, i: usize, rank: usize) -> bool {
        let at = |axis: isize| axis == i as isize || axis + rank as isize == i as isize;
        self.iter().any(at)
    }

    /// An axis that a tensor of this many dimensions does not have.
    pub(crate) fn outside(self, rank: usize) -> Option<isize> {
        let rank = rank.min(31) as isize;
        self.iter().find(|axis| !(-rank..rank).contains(axis))
    }
}

/// How the threshold of [`Scope::ExampleTensor`] is divided among K tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Budget {
    /// `max_norm` for each tensor.
    #[default]
    Each,
    /// `max_norm / sqrt(K)`: together they stay below `max_norm`. Optax's `per_example_layer_norm_clip`, uniform.
    Uniform,
    /// `max_norm * sqrt(n_i / n)`, where tensor i has n_i of the n elements of an example. Optax's
    /// `per_example_layer_norm_clip`, not uniform.
    Sized,
}

/// What happens when a gradient is NaN or infinite. The report counts and locates them under every policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NonFinite {
    /// Write nothing and return [`Error::NonFinite`]. The default of every clip that measures a norm.
    Error,
    /// Compute with them as PyTorch does: a NaN makes every gradient NaN; an infinite norm makes the finite gradients 0
    /// and the infinite ones NaN. A value clip, whose default this is, keeps NaN and clamps infinity.
    Propagate,
    /// Write nothing, and let the report say so.
    Skip,
    /// Set every segment that holds a non-finite element to 0.
    Zero,
    /// Set the non-finite elements to 0 and clip the rest by the norm of the rest.
    Drop,
}

/// The quantity that is compared, with its threshold; [`Clip`] has the formulas. The rest is in `Clip::weight` and
/// `Clip::max_norm`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mode {
    /// The norm, with `max_norm`: [`Clip::norm`].
    Norm(f64),
    /// The root mean square, with `max_rms`: [`Clip::rms`].
    Rms(f64),
    /// The L2 norm divided by the number of elements, with `max_average_norm`: [`Clip::average_norm`].
    AverageNorm(f64),
    /// The norm of a unit, with `clip_factor` times that of its parameter: [`Clip::agc`].
    Agc(f64),
    /// Each element, with these bounds: [`Clip::value`] and [`Clip::range`].
    Value {
        /// The lower bound.
        min: f64,
        /// The upper bound.
        max: f64,
    },
}

/// The `eps` of PyTorch.
const EPS: f64 = 1e-6;

/// The `eps` of the paper on AGC.
pub(crate) const AGC_EPS: f64 = 1e-3;

/// The smallest divisor of AGC.
pub(crate) const AGC_FLOOR: f64 = 1e-6;

/// What to clip and how: one description for every backend.
///
/// N is the norm of a segment's gradients divided by `grad_scale`. Each gradient of the segment is multiplied by
/// `c / grad_scale`. [`Scope`] says what a segment is, and the mode gives c:
///
/// | mode | N | c | source |
/// |---|---|---|---|
/// | [`Clip::norm`] | the norm of [`Clip::norm_type`] | min(1, max_norm / (N + eps)) | Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1; the eps is PyTorch's |
/// | [`Clip::rms`] | sqrt(mean g²) | min(1, max_rms / N) | Optax, `clip_by_block_rms` (per tensor) |
/// | [`Clip::average_norm`] | L2 norm / number of elements | min(1, max_average / N) | TensorFlow 1, `clip_by_average_norm` |
/// | [`Clip::agc`] | the norm of a unit, by [`Clip::norm_type`] | m / max(N, 1e-6) where N > m = clip_factor · max(‖parameter‖, agc_eps), else 1 | Brock, De, Smith, Simonyan 2021, "High-performance large-scale image recognition without normalization", equation 3 |
/// | [`Clip::value`], [`Clip::range`] | none | none: g becomes clamp(g / grad_scale, min, max) | Mikolov 2012, "Statistical language models based on neural networks" |
///
/// # What a clip leaves
///
/// The norm afterwards is at most `max_norm (1 + r) + z`. `max_norm` is the mode's threshold, as [`Clip::budget`]
/// divides it.
///
/// - r is 1e-6 for float32 and float64. It covers the error of the measured norm and the rounding of the coefficient
///   and of each element. For p other than 1, 2 and infinity it is the error that [`NormType`] gives, and 1.2e-7 for
///   these roundings. Under AGC the threshold has an error too: r is 2.2e-6, and for these p twice as large. Half precision rounds to nearest,
///   to 11 or 8 bits: r is 4.9e-4 (2^-11) more for float16 and 3.9e-3 (2^-8) more for bfloat16. A coefficient below
///   2.2e-308, the smallest normal float64, has fewer digits, and no r is promised for it.
/// - z is n^(1/p) times half the smallest number of the dtype, because each of the n elements may be off by that half:
///   3.0e-8 n^(1/p) for float16, 4.6e-41 n^(1/p) for bfloat16. It only matters where most elements are that small.
///   Under [`Clip::rms`] and [`Clip::average_norm`] it is divided as N is; for p below 1 the p-th powers add up.
///
/// *Clipping twice.* A second clip by the same description (without the loss scale, which the first took out)
/// multiplies by at least `1 - eps (1 - c) / max_norm - r - z / max_norm - 1.1e-6`.
///
/// - With an `eps` of 0 only rounding is left. Where all elements are float32, or all are of one half precision, and p
///   is 1, 2 or infinity, the CPU moves no element by more than two units in its last place in any test, and a GPU by
///   no more than three. Mostly neither moves any. But it cannot be promised that a second clip finds nothing to clip.
/// - An `eps` pulls the norm to `max_norm - eps`, nearer with each clip, because PyTorch's formula comes to rest there.
///   So a `max_norm` near `eps` shrinks gradients every time, as does AGC with a threshold below its smallest divisor,
///   1e-6.
/// - A value clip leaves bits that a second one does not change, except for a 0 outside its bounds, which
///   [`NonFinite::Zero`] and [`NonFinite::Drop`] leave.
///
/// # Settings
///
/// A description is data: its fields can be read and printed, and it is not checked until it is used. Every use then
/// reports what is wrong ([`Error::Setting`]): an invalid number, or a setting that the mode or the scope does not use.
///
/// ```
/// use gradclip::{Clip, Clipper, Mode, NonFinite, NormType, Scope, Tensor};
/// let clip = Clip::norm(1.0).norm_type(NormType::p(3.0)).scope(Scope::Tensor);
/// let amp = clip.grad_scale(65536.0).non_finite(NonFinite::Skip);
/// assert_eq!((amp.mode, amp.scope), (Mode::Norm(1.0), Scope::Tensor));
/// assert_eq!(amp.to_string(), "norm 1 (L3), per tensor, grad_scale 65536, non-finite: skip");
/// let error = Clipper::cpu().measure(&Clip::rms(1.0).eps(0.0), &[Tensor::new(&[1.0f32])]).unwrap_err();
/// assert_eq!(error.to_string(), "eps is 0; only Clip::norm uses it");
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Clip {
    /// The quantity that is compared, with its threshold.
    pub mode: Mode,
    /// The norm of [`Clip::norm`]; L2 in every other mode.
    pub norm_type: NormType,
    /// Which elements share a norm.
    pub scope: Scope,
    /// The units of [`Scope::Unit`]. None: rows, and a scalar is one unit.
    pub unit_axis: Option<UnitAxis>,
    /// How [`Scope::ExampleTensor`] divides the threshold.
    pub budget: Budget,
    /// The number that [`Clip::norm`] adds to the norm; None in every other mode.
    pub eps: Option<f64>,
    /// The least norm that [`Clip::agc`] assumes for a parameter's unit; None in every other mode.
    pub agc_eps: Option<f64>,
    /// The loss scale that the gradients carry.
    pub grad_scale: f64,
    /// What happens when a gradient is NaN or infinite.
    pub non_finite: NonFinite,
    /// The total norm above which the step is skipped. Infinity skips none.
    pub skip_above: f64,
    /// Whether a value clip also reports the norm. Every other mode does so anyway, and does not take this setting.
    pub report_norm: bool,
}

impl Clip {
    /// Clips by norm. `max_norm` is 0 or more. With 0 every gradient becomes 0. With infinity nothing is clipped, but
    /// everything else that the description asks for still happens.
    #[must_use]
    pub fn norm(max_norm: f64) -> Self {
        Self { eps: Some(EPS), ..Self::new(Mode::Norm(max_norm), NonFinite::Error) }
    }

    /// Clips by root mean square: sqrt(mean g²) of everything or, by [`Scope::Tensor`], of each tensor. `max_rms` is 0
    /// or more.
    #[must_use]
    pub fn rms(max_rms: f64) -> Self {
        Self::new(Mode::Rms(max_rms), NonFinite::Error)
    }

    /// Clips by average norm: the L2 norm divided by the number of elements, over everything or, with
    /// [`Scope::Tensor`], over each tensor. `max_average_norm` is 0 or more.
    #[must_use]
    pub fn average_norm(max_average_norm: f64) -> Self {
        Self::new(Mode::AverageNorm(max_average_norm), NonFinite::Error)
    }

    /// Adaptive gradient clipping: each unit's norm stays below `clip_factor` (finite, 0 or more) times the norm of the
    /// parameter's unit. The default scope is [`Scope::Unit`]. Every gradient needs its parameter
    /// ([`TensorMut::parameter`](crate::TensorMut::parameter)). A unit whose parameter is not finite is not clipped.
    #[must_use]
    pub fn agc(clip_factor: f64) -> Self {
        let agc = Self::new(Mode::Agc(clip_factor), NonFinite::Error);
        Self { scope: Scope::Unit, agc_eps: Some(AGC_EPS), ..agc }
    }

    /// Clips each element to `-clip_value ..= clip_value`; `clip_value` is 0 or more.
    #[must_use]
    pub fn value(clip_value: f64) -> Self {
        Self::range(-clip_value, clip_value)
    }

    /// Clips each element to `min ..= max`; `min <= max`, and either may be infinite.
    #[must_use]
    pub fn range(min: f64, max: f64) -> Self {
        Self::new(Mode::Value { min, max }, NonFinite::Propagate)
    }

    fn new(mode: Mode, non_finite: NonFinite) -> Self {
        Self {
            mode,
            norm_type: NormType::default(),
            scope: Scope::default(),
            unit_axis: None,
            budget: Budget::default(),
            eps: None,
            agc_eps: None,
            grad_scale: 1.0,
            non_finite,
            skip_above: f64::INFINITY,
            report_norm: false,
        }
    }

    /// Chooses the norm of [`Clip::norm`] and [`Clip::agc`]; the default is L2.
    #[must_use]
    pub fn norm_type(mut self, norm_type: NormType) -> Self {
        self.norm_type = norm_type;
        self
    }

    /// Chooses which elements share a norm; the default is all, and for [`Clip::agc`] a unit. Value clips have no norm.
    #[must_use]
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Chooses the units of [`Scope::Unit`]; the default is rows.
    #[must_use]
    pub fn unit_axis(mut self, axis: UnitAxis) -> Self {
        self.unit_axis = Some(axis);
        self
    }

    /// Chooses how [`Scope::ExampleTensor`] divides the threshold. [`Clip::agc`] has one threshold for each unit.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// Sets the number that [`Clip::norm`] adds to the norm before dividing, finite and 0 or more. The default is 1e-6,
    /// as in PyTorch; 0 gives the arithmetic of Optax and TensorFlow, which clip only where N > `max_norm`.
    #[must_use]
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = Some(eps);
        self
    }

    /// Sets the least norm that [`Clip::agc`] assumes for a parameter's unit, finite and 0 or more. The default is
    /// 1e-3, so that units that start at 0 can move.
    #[must_use]
    pub fn agc_eps(mut self, eps: f64) -> Self {
        self.agc_eps = Some(eps);
        self
    }

    /// Sets the loss scale that the gradients carry, a normal float64 above 0. They are divided by it in the same pass.
    #[must_use]
    pub fn grad_scale(mut self, grad_scale: f64) -> Self {
        self.grad_scale = grad_scale;
        self
    }

    /// Chooses what happens when a gradient is NaN or infinite.
    #[must_use]
    pub fn non_finite(mut self, policy: NonFinite) -> Self {
        self.non_finite = policy;
        self
    }

    /// Sets the total norm above which a step is skipped, 0 or more: nothing is written, as under [`NonFinite::Skip`],
    /// and the report says so ([`ClipReport::skipped`](crate::ClipReport::skipped)). The default, infinity, skips none.
    ///
    /// It is compared with N over all gradients of this clip, whatever the scope
    /// ([`ClipReport::total_norm`](crate::ClipReport::total_norm)). An equal norm is not above. A norm that is not
    /// finite follows [`Clip::non_finite`] instead. If there are groups, one group above skips the step of all.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, Skipped, TensorMut};
    /// let clip = Clip::norm(1.0).skip_above(100.0);
    /// let mut spike = [300.0f32, 400.0];
    /// let report = Clipper::auto().apply(&clip, &mut [TensorMut::new(&mut spike)])?;
    /// assert_eq!((report.total_norm, report.skipped), (500.0, Some(Skipped::Above)));
    /// assert_eq!(spike, [300.0, 400.0]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    #[must_use]
    pub fn skip_above(mut self, norm: f64) -> Self {
        self.skip_above = norm;
        self
    }

    /// Lets a value clip also report the norm before it: the L2 norm of all gradients divided by `grad_scale`, as
    /// [`ClipReport::total_norm`](crate::ClipReport::total_norm). Gradients are then read once more, before any is written.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, TensorMut};
    /// let mut grad = [3.0f32, -4.0];
    /// let clip = Clip::value(1.0).report_norm(true);
    /// let report = Clipper::auto().apply(&clip, &mut [TensorMut::new(&mut grad)])?;
    /// assert_eq!((report.total_norm, grad), (5.0, [1.0, -1.0]));
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    #[must_use]
    pub fn report_norm(mut self, reports: bool) -> Self {
        self.report_norm = reports;
        self
    }

    /// Reports what is wrong with the description. Every use of a clip runs this check.
    ///
    /// # Errors
    /// [`Error::Setting`] if a setting has an invalid value, or if the mode or the scope does not use it.
    pub fn check(&self) -> Result<(), Error> {
        match self.mode {
            Mode::Norm(max_norm) => at_least_0("max_norm", max_norm)?,
            Mode::Rms(max_rms) => at_least_0("max_rms", max_rms)?,
            Mode::AverageNorm(max_average_norm) => at_least_0("max_average_norm", max_average_norm)?,
            Mode::Agc(clip_factor) => finite("clip_factor", clip_factor)?,
            // A negative clip_value is a range whose end comes before its start, and may have been given as one.
            Mode::Value { min, max } if min > max && -min == max => {
                let value = format!("{}, a range of {} to {}", Number(max), Number(min), Number(max));
                setting(false, "clip_value", value, "it must be 0 or more")?;
            }
            Mode::Value { min, max } if -min == max || (min.is_nan() && max.is_nan()) => at_least_0("clip_value", max)?,
            Mode::Value { min, max } => {
                let range = format_args!("{} to {}", Number(min), Number(max));
                setting(min <= max, "the clip range", range, "it needs min <= max, both of them numbers")?;
            }
        }
        let by_norm = matches!(self.mode, Mode::Norm(_));
        let by_agc = self.needs_parameters();
        let (norm_type, p) = (self.norm_type, self.norm_type.power());
        setting(by_norm || by_agc || p == 2.0, "norm_type", norm_type, "only Clip::norm and Clip::agc use it")?;
        setting(p > 0.0, "norm_type", Number(p), "it must be above 0 (infinity for the largest)")?;
        let measures = self.measured().is_some() || self.scope == Scope::Global;
        setting(measures, "scope", self.scope, "a value clip measures no norm that elements could share")?;
        if let Some(axis) = self.unit_axis {
            setting(self.scope == Scope::Unit, "unit_axis", axis, "only Scope::Unit uses it")?;
        }
        let shares = self.budget == Budget::Each || (self.scope == Scope::ExampleTensor && !by_agc);
        setting(shares, "budget", self.budget, "only Scope::ExampleTensor uses it, and Clip::agc does not")?;
        if let Some(eps) = self.eps {
            setting(by_norm, "eps", Number(eps), "only Clip::norm uses it")?;
            finite("eps", eps)?;
        }
        if let Some(eps) = self.agc_eps {
            setting(by_agc, "agc_eps", Number(eps), "only Clip::agc uses it")?;
            finite("agc_eps", eps)?;
        }
        let measures = self.measured().is_some() || self.skip_above == f64::INFINITY;
        setting(measures, "skip_above", Number(self.skip_above), "a value clip measures no norm to compare it with")?;
        at_least_0("skip_above", self.skip_above)?;
        let by_value = self.measured().is_none();
        setting(by_value || !self.report_norm, "report_norm", true, "only a value clip uses it; others report theirs")?;
        let scale = self.grad_scale;
        let valid = scale.is_normal() && scale > 0.0;
        setting(valid, "grad_scale", Number(scale), "it must be a normal number above 0, from 2.3e-308 to 1.7e308")
    }

    /// The same clip with another threshold, whatever the mode calls it.
    ///
    /// # Errors
    /// [`Error::Usage`] for a value clip.
    #[cfg(feature = "gpu")]
    pub(crate) fn with_threshold(mut self, threshold: f64) -> Result<Self, Error> {
        match &mut self.mode {
            Mode::Norm(own) | Mode::Rms(own) | Mode::AverageNorm(own) | Mode::Agc(own) => *own = threshold,
            Mode::Value { .. } => return Err(Error::usage("a value clip has bounds, and no threshold to set")),
        }
        Ok(self)
    }

    /// The same clip with the p of a p-norm limited to this range.
    #[cfg(feature = "gpu")]
    pub(crate) fn with_power_in(mut self, range: std::ops::RangeInclusive<f64>) -> Self {
        if let NormType::P(p) = &mut self.norm_type {
            *p = p.clamp(*range.start(), *range.end());
        }
        self
    }

    /// The norm that is measured; None for a value clip.
    pub(crate) fn measured(&self) -> Option<NormType> {
        match self.mode {
            // Beyond 2^50 a larger p changes no norm.
            Mode::Norm(_) | Mode::Agc(_) => Some(match NormType::p(self.norm_type.power()) {
                NormType::P(p) => NormType::P(p.min(2f64.powi(50))),
                named => named,
            }),
            Mode::Rms(_) | Mode::AverageNorm(_) => Some(NormType::L2),
            Mode::Value { .. } => None,
        }
    }

    /// The norm that is reported over everything, whether or not it decides.
    pub(crate) fn reported(&self) -> Option<NormType> {
        self.measured().or(self.report_norm.then_some(NormType::L2))
    }

    /// The measured norm of `elements` elements times this is the mode's N.
    pub(crate) fn weight(&self, elements: u64) -> f64 {
        let elements = elements.max(1) as f64;
        match self.mode {
            Mode::Rms(_) => 1.0 / elements.sqrt(),
            Mode::AverageNorm(_) => 1.0 / elements,
            Mode::Norm(_) | Mode::Agc(_) | Mode::Value { .. } => 1.0,
        }
    }

    /// The threshold on the measured norm of a segment of `elements` elements. `share` is the segment's part of the
    /// threshold, `parameter` the norm of its parameter (0 if the mode needs none).
    pub(crate) fn max_norm(&self, elements: u64, share: f64, parameter: Magnitude) -> Magnitude {
        let elements = elements.max(1) as f64;
        match self.mode {
            Mode::Norm(max_norm) => Magnitude::plain(share * max_norm),
            Mode::Rms(max_rms) => Magnitude::of(share * max_rms, |x| x * elements.sqrt()),
            Mode::AverageNorm(max_average_norm) => Magnitude::of(share * max_average_norm, |x| x * elements),
            Mode::Agc(_) if !parameter.is_finite() => Magnitude::plain(f64::INFINITY),
            Mode::Agc(clip_factor) => {
                parameter.max(Magnitude::plain(self.agc_eps.unwrap_or(AGC_EPS))).times(clip_factor)
            }
            Mode::Value { .. } => Magnitude::plain(f64::INFINITY),
        }
    }

    /// The number added to the measured norm for comparison and division, and the lower bound on the norm as the
    /// divisor.
    pub(crate) fn eps_and_floor(&self) -> (f64, f64) {
        match self.mode {
            Mode::Norm(_) => (self.eps.unwrap_or(EPS), 0.0),
            Mode::Agc(_) => (0.0, AGC_FLOOR),
            Mode::Rms(_) | Mode::AverageNorm(_) | Mode::Value { .. } => (0.0, 0.0),
        }
    }

    /// Checks that norms alone decide.
    ///
    /// # Errors
    /// [`Error::Usage`], and those of [`Clip::check`]
    pub(crate) fn check_adaptive(&self) -> Result<(), Error> {
        self.check()?;
        if self.measured().is_none() || self.needs_parameters() {
            return Err(Error::usage(
                "only a clip by norm, RMS or average norm takes norms or thresholds from outside",
            ));
        }
        Ok(())
    }

    /// Checks that the clip can go by norms that were measured elsewhere.
    ///
    /// # Errors
    /// [`Error::Usage`], and those of [`Clip::check`]
    pub(crate) fn check_given(&self) -> Result<(), Error> {
        self.check_adaptive()?;
        if self.may_skip() {
            return Err(Error::usage(
                "skip_above needs a norm that is measured here; compare the given norms yourself",
            ));
        }
        Ok(())
    }

    /// Whether each gradient needs its parameter, as AGC does.
    #[must_use]
    pub fn needs_parameters(&self) -> bool {
        matches!(self.mode, Mode::Agc(_))
    }

    /// Whether gradients must be read before the first is written, as a norm needs it. A value clip without one needs it only
    /// if one non-finite element decides about the others.
    pub(crate) fn reads_first(&self) -> bool {
        self.reported().is_some() || matches!(self.non_finite, NonFinite::Error | NonFinite::Skip | NonFinite::Zero)
    }

    /// Whether a finite norm may skip the step.
    pub(crate) fn may_skip(&self) -> bool {
        self.skip_above < f64::INFINITY
    }

    /// Whether a non-finite element anywhere leaves everything unchanged.
    pub(crate) fn refuses_non_finite(&self) -> bool {
        matches!(self.non_finite, NonFinite::Error | NonFinite::Skip)
    }
}

/// Checks a setting.
///
/// # Errors
/// [`Error::Setting`]
pub(crate) fn setting(
    valid: bool,
    name: &'static str,
    value: impl fmt::Display,
    reason: &'static str,
) -> Result<(), Error> {
    if valid { Ok(()) } else { Err(Error::Setting { name, value: value.to_string(), reason }) }
}

/// Checks a threshold, which may be infinite.
fn at_least_0(name: &'static str, value: f64) -> Result<(), Error> {
    setting(value >= 0.0, name, Number(value), "it must be 0 or more")
}

/// Checks that a number is finite and not negative.
fn finite(name: &'static str, value: f64) -> Result<(), Error> {
    let valid = (0.0..f64::INFINITY).contains(&value);
    setting(valid, name, Number(value), "it must be a finite number, 0 or more")
}

/// A number in plain notation, or with an exponent if it is very small or large. It becomes text where it is shown, because
/// each use of a clip checks all settings, and few are wrong.
pub(crate) struct Number(pub(crate) f64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let x = self.0;
        let plain = x == 0.0 || !x.is_finite() || (1e-4..1e16).contains(&x.abs());
        if plain { write!(f, "{x}") } else { write!(f, "{x:e}") }
    }
}

impl fmt::Display for NormType {
    /// `L1`, `L2`, `inf`, `L3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inf => f.write_str("inf"),
            other => write!(f, "L{}", Number(other.power())),
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Global => "global",
            Self::Tensor => "tensor",
            Self::Unit => "unit",
            Self::Example => "example",
            Self::ExampleTensor => "example-tensor",
        })
    }
}

impl fmt::Display for UnitAxis {
    /// `first`, `optax`, `0,-1`, `over:0,-1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => f.write_str("first"),
            Self::Last => f.write_str("last"),
            Self::Optax => f.write_str("optax"),
            Self::Axes(axes) => axes.fmt(f),
            Self::Over(axes) => write!(f, "over:{axes}"),
        }
    }
}

impl fmt::Display for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes: Vec<_> = self.iter().map(|axis| axis.to_string()).collect();
        f.write_str(&axes.join(","))
    }
}

impl fmt::Debug for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Each => "each",
            Self::Uniform => "uniform",
            Self::Sized => "sized",
        })
    }
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Propagate => "propagate",
            Self::Skip => "skip",
            Self::Zero => "zero",
            Self::Drop => "drop",
        })
    }
}

/// One line, without the settings that have their defaults:
/// `norm 1 (L2), per tensor, grad_scale 65536, non-finite: skip`. A precision, as in `{:.2}`, is the number of digits
/// of the threshold after its first.
impl fmt::Display for Clip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision();
        let rounded = |x: f64| digits.and_then(|digits| format!("{x:.digits$e}").parse().ok()).unwrap_or(x);
        let threshold = |x: f64| Number(rounded(x));
        match self.mode {
            Mode::Norm(x) => write!(f, "norm {} ({})", threshold(x), self.norm_type)?,
            Mode::Rms(x) => write!(f, "RMS {}", threshold(x))?,
            Mode::AverageNorm(x) => write!(f, "average norm {}", threshold(x))?,
            Mode::Agc(x) if self.norm_type == NormType::L2 => write!(f, "AGC {}", threshold(x))?,
            Mode::Agc(x) => write!(f, "AGC {} ({})", threshold(x), self.norm_type)?,
            Mode::Value { min, max } => write!(f, "value {} to {}", threshold(min), threshold(max))?,
        }
        if self.scope != Scope::Global {
            write!(f, ", per {}", self.scope)?;
        }
        if let Some(axis) = self.unit_axis {
            write!(f, ", unit_axis {axis}")?;
        }
        if self.budget != Budget::Each {
            write!(f, ", budget {}", self.budget)?;
        }
        for (name, eps, default) in [("eps", self.eps, EPS), ("agc_eps", self.agc_eps, AGC_EPS)] {
            if let Some(eps) = eps.filter(|eps| *eps != default) {
                write!(f, ", {name} {}", Number(eps))?;
            }
        }
        if self.grad_scale != 1.0 {
            write!(f, ", grad_scale {}", Number(self.grad_scale))?;
        }
        if self.skip_above != f64::INFINITY {
            write!(f, ", skip_above {}", Number(self.skip_above))?;
        }
        if self.report_norm {
            f.write_str(", report_norm")?;
        }
        let policy = if self.measured().is_some() { NonFinite::Error } else { NonFinite::Propagate };
        if self.non_finite == policy { Ok(()) } else { write!(f, ", non-finite: {}", self.non_finite) }
    }
}

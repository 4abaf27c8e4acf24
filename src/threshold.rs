//! Thresholds that follow the norms of a training run, as values whose state can be saved: [`ZClip`] and [`AutoClip`]
//! for a global norm, [`AdaGc`] for one norm a tensor.
//!
//! All three keep these habits:
//!
//! - A step with a norm that is NaN or infinite leaves the state as it was, and is not counted.
//! - Averages move by `mean += (1 - rate) * (norm - mean)`: norms that stay the same then keep the mean to the bit, so
//!   rounding alone never clips.
//! - A saved state carries a version and is checked when it is read. Floats are saved as text wherever the format is
//!   text, because JSON has no infinity and its readers may miss the last bit.

use std::collections::VecDeque;

use crate::Error;
use crate::clip::number;
use crate::error::tensor_label;

/// A threshold that follows the norms of a training run: [`ZClip`] and [`AutoClip`] follow the global norm, [`AdaGc`]
/// the norm of each tensor.
///
/// A threshold belongs to one run and is part of its checkpoint. With the feature `serde` it can be saved and loaded; a
/// loaded one goes on to the bit as the saved one would have. A state that is damaged, or of another version of the
/// saved form, fails to load.
pub trait Threshold: Send {
    /// Ties the state to the segments it will follow, before the first step and after every load. A label is
    /// `tensor "w"` or `tensor 3`; a global norm has one label.
    ///
    /// # Errors
    /// [`Error::ThresholdState`] if the state belongs to other segments than these.
    fn bind(&mut self, labels: &[String]) -> Result<(), Error>;

    /// The `max_norm` of each segment for the step with these norms (already divided by `grad_scale`), and takes the
    /// step into the state. `total_norm` is the norm over all segments together.
    ///
    /// If one of the norms is not finite, the step leaves the state as it was, and the thresholds are those that the
    /// state alone implies. A threshold is 0 or more, never NaN; infinity means that there is nothing to clip.
    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64>;
}

/// Clips a global norm that stands out from the mean of the norms before it.
///
/// With N the norm of step t, μ and σ the mean and the standard deviation after step t - 1, and z* = `z_threshold`:
///
/// ```text
/// z        = (N - μ) / σ
/// max_norm = μ + (z*² / z) σ     if z > z*, else infinity
/// N'       = min(N, max_norm)
/// μ        ← α μ + (1 - α) N'
/// σ²       ← α σ² + (1 - α) (N' - μ)²     with the new μ
/// ```
///
/// (Kumar, Owen, Chowdhury, Güra 2025, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv 2504.02507; the
/// adjustment z*² / z is its reciprocal one: the higher the spike, the nearer to the mean it is clipped.) The clipped
/// norm enters the statistics, so even the greatest spike counts for less than z* standard deviations.
///
/// Warm-up: the first `warm_up` steps are not clipped; μ and σ² are their plain mean and variance (divided by their
/// number).
///
/// Defaults: `alpha` 0.97, `z_threshold` 2.5, `warm_up` 25.
///
/// Two differences from the authors' program: it adds 1e-6 to σ, which would make z depend on the scale of the loss,
/// and unless told otherwise it also clips every step to a fixed norm of 1. Here, as long as σ is 0, nothing is
/// clipped: without a spread there is no z, and to clip to μ would keep σ at 0 for ever.
///
/// ```
/// use gradclip::ZClip;
/// let mut threshold = ZClip::new().warm_up(4)?;
/// for norm in [1.0, 3.0, 1.0, 3.0] {
///     assert_eq!(threshold.max_norm(norm), f64::INFINITY);
/// }
/// // The mean is 2 and the standard deviation 1, so z is 10.
/// assert_eq!(threshold.max_norm(12.0), 2.0 + 2.5 * 2.5 / 10.0);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(into = "saved::ZClip", try_from = "saved::ZClip")
)]
pub struct ZClip {
    pub(crate) alpha: f64,
    pub(crate) z_threshold: f64,
    pub(crate) warm_up: u32,
    /// μ
    pub(crate) mean: f64,
    /// σ²
    pub(crate) variance: f64,
    /// How many norms have entered.
    pub(crate) steps: u64,
}

impl Default for ZClip {
    fn default() -> Self {
        Self::new()
    }
}

impl ZClip {
    /// The paper's parameters, and no state.
    #[must_use]
    pub fn new() -> Self {
        Self { alpha: 0.97, z_threshold: 2.5, warm_up: 25, mean: 0.0, variance: 0.0, steps: 0 }
    }

    /// Sets how much of the mean and the variance a step keeps.
    ///
    /// # Errors
    /// [`Error::Setting`] if `alpha` is not in 0..1.
    pub fn alpha(mut self, alpha: f64) -> Result<Self, Error> {
        self.alpha = rate("alpha", alpha)?;
        Ok(self)
    }

    /// Sets how many standard deviations above the mean a norm may lie.
    ///
    /// # Errors
    /// [`Error::Setting`] if `z_threshold` is not a finite number above 0.
    pub fn z_threshold(mut self, z_threshold: f64) -> Result<Self, Error> {
        self.z_threshold = above_zero("z_threshold", z_threshold)?;
        Ok(self)
    }

    /// Sets how many steps are only measured.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is 0: a mean has to begin somewhere.
    pub fn warm_up(mut self, steps: u32) -> Result<Self, Error> {
        self.warm_up = at_least_one("warm_up", steps)?;
        Ok(self)
    }

    /// The `max_norm` for a step with this norm, which it takes into the state. For a norm that is not finite: the
    /// norm at which clipping begins, μ + z* σ.
    pub fn max_norm(&mut self, norm: f64) -> f64 {
        let warming_up = self.steps < u64::from(self.warm_up);
        let std = self.variance.sqrt();
        if !is_norm(norm) {
            let none = warming_up || std == 0.0;
            return if none { f64::INFINITY } else { self.mean + self.z_threshold * std };
        }
        self.steps = self.steps.saturating_add(1);
        if warming_up {
            // Welford's update, with the variance instead of the sum of squared deviations.
            let n = self.steps as f64;
            let deviation = norm - self.mean;
            self.mean += deviation / n;
            self.variance = (self.variance + deviation * deviation / n).min(f64::MAX) * ((n - 1.0) / n);
            return f64::INFINITY;
        }
        // 0 / 0 is not above the threshold; x / 0 would be.
        let z = (norm - self.mean) / std;
        let max_norm = if std > 0.0 && z > self.z_threshold {
            // In this order z_threshold² cannot overflow, and an infinite z gives the mean.
            self.mean + self.z_threshold * (self.z_threshold / z) * std
        } else {
            f64::INFINITY
        };
        let clipped = norm.min(max_norm);
        self.mean += (1.0 - self.alpha) * (clipped - self.mean);
        let deviation = clipped - self.mean;
        self.variance = (self.alpha * self.variance + (1.0 - self.alpha) * (deviation * deviation)).min(f64::MAX);
        max_norm
    }
}

impl Threshold for ZClip {
    fn bind(&mut self, labels: &[String]) -> Result<(), Error> {
        only_one("ZClip", labels)
    }

    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64> {
        vec![self.max_norm(norm_of_step(total_norm, norms)); norms.len()]
    }
}

/// Clips a global norm to a percentile of the norms so far.
///
/// With N the norm of step t:
///
/// ```text
/// max_norm = percentile(p, {N of step t and of up to history - 1 steps before it})
/// ```
///
/// (Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
/// arXiv 2007.14469). The norm enters as it was measured, not as it was clipped. Between two norms the percentile is
/// linear: it lies at place (n - 1) p / 100 of the n sorted ones, as NumPy has it.
///
/// The paper's history has no end. This one forgets: it holds the last `history` norms, so that memory and time a step
/// are bounded (80 kB each for the ring and its sorted copy) and norms of another phase of training lose their say.
///
/// Warm-up: the first `warm_up` steps are not clipped; their norms enter. The paper has none, and its first threshold
/// is the first norm itself.
///
/// Defaults: `percentile` 10, `history` 10 000 (the authors' TensorFlow program's), `warm_up` 1.
///
/// ```
/// use gradclip::AutoClip;
/// let mut threshold = AutoClip::new().percentile(50.0)?;
/// assert_eq!(threshold.max_norm(1.0), f64::INFINITY);
/// assert_eq!(threshold.max_norm(3.0), 2.0);
/// assert_eq!(threshold.max_norm(100.0), 3.0);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(into = "saved::AutoClip", try_from = "saved::AutoClip")
)]
pub struct AutoClip {
    pub(crate) percentile: f64,
    pub(crate) history: usize,
    pub(crate) warm_up: u32,
    /// The last norms, the oldest first.
    pub(crate) norms: VecDeque<f64>,
    /// The same, in order of size.
    sorted: Vec<f64>,
    /// How many norms have entered, the forgotten ones too.
    pub(crate) steps: u64,
}

impl Default for AutoClip {
    fn default() -> Self {
        Self::new()
    }
}

impl AutoClip {
    /// The default parameters, and no state.
    #[must_use]
    pub fn new() -> Self {
        Self { percentile: 10.0, history: 10_000, warm_up: 1, norms: VecDeque::new(), sorted: Vec::new(), steps: 0 }
    }

    /// Sets the percentile: 0 is the least norm of the history, 100 the greatest.
    ///
    /// # Errors
    /// [`Error::Setting`] if `percentile` is not in 0..=100.
    pub fn percentile(mut self, percentile: f64) -> Result<Self, Error> {
        if !(0.0..=100.0).contains(&percentile) {
            return Err(bad("percentile", percentile, "it must be from 0 to 100"));
        }
        self.percentile = percentile;
        Ok(self)
    }

    /// Sets how many norms are remembered, and forgets the oldest of those that are too many already.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is 0.
    pub fn history(mut self, length: usize) -> Result<Self, Error> {
        if length == 0 {
            return Err(bad("history", 0.0, "it must be 1 or more"));
        }
        self.history = length;
        self.forget(length);
        Ok(self)
    }

    /// Sets how many steps are only measured; 0 is the paper's rule.
    #[must_use]
    pub fn warm_up(mut self, steps: u32) -> Self {
        self.warm_up = steps;
        self
    }

    /// The `max_norm` for a step with this norm, which it takes into the state. For a norm that is not finite: the
    /// percentile of the norms before it.
    pub fn max_norm(&mut self, norm: f64) -> f64 {
        let warming_up = self.steps < u64::from(self.warm_up);
        if is_norm(norm) {
            self.forget(self.history - 1);
            self.norms.push_back(norm);
            self.sorted.insert(self.place(norm), norm);
            self.steps = self.steps.saturating_add(1);
        }
        if warming_up { f64::INFINITY } else { percentile_of(&self.sorted, self.percentile) }
    }

    /// Drops the oldest norms until no more than `keep` are left.
    fn forget(&mut self, keep: usize) {
        while self.norms.len() > keep
            && let Some(oldest) = self.norms.pop_front()
        {
            self.sorted.remove(self.place(oldest));
        }
    }

    /// Where this norm is, or belongs, among the sorted ones.
    fn place(&self, norm: f64) -> usize {
        self.sorted.partition_point(|other| other.total_cmp(&norm).is_lt())
    }
}

impl Threshold for AutoClip {
    fn bind(&mut self, labels: &[String]) -> Result<(), Error> {
        only_one("AutoClip", labels)
    }

    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64> {
        vec![self.max_norm(norm_of_step(total_norm, norms)); norms.len()]
    }
}

/// Clips each tensor to a multiple of the mean of its own norms.
///
/// With N the norm over all tensors at step t, Nᵢ that of tensor i, and γᵢ the mean of tensor i after step t - 1:
///
/// ```text
/// warm-up     h = min(1, λ_abs / N)          max_normᵢ = h Nᵢ if h < 1, else infinity
///             Nᵢ' = h Nᵢ                     γᵢ ← min(γᵢ, Nᵢ'), from infinity
/// afterwards                                 max_normᵢ = λ_rel γᵢ
///             Nᵢ' = min(Nᵢ, λ_rel γᵢ)        γᵢ ← β γᵢ + (1 - β) Nᵢ'
/// ```
///
/// (Wang, Li, Chen, Zeng, Yang, Yu, Ma, Shen 2025, "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
/// Clipping", arXiv 2502.11034). The first `warm_up` steps are thus clipped by the global norm: all tensors by the one
/// factor h. `warm_up` is the paper's `T_start`.
///
/// Defaults: `lambda_rel` 1.04, `beta` 0.99, `lambda_abs` 1, `warm_up` 100, those of the authors' program in
/// PaddlePaddle; other programs have `lambda_rel` 1.05 and `beta` 0.98.
///
/// Two differences. The authors' program takes the norms of the warm-up into γ as they were before clipping; here, as
/// in the formula above, the clipped ones. And a norm of exactly 0 leaves γ as it was: a tensor that got no gradient
/// at one step, such as an idle expert or the partner of a factor that starts at zero, would otherwise have all its
/// later gradients clipped to nothing. Until a tensor's first other norm its threshold is infinite.
///
/// Norms of single tensors may be small beside the `eps` of a [`Clip`](crate::Clip), 1e-6 by default; 0 serves better
/// here.
///
/// ```
/// use gradclip::{AdaGc, Threshold};
/// let mut threshold = AdaGc::new().warm_up(1)?.lambda_abs(2.5)?.lambda_rel(2.0)?;
/// threshold.bind(&["tensor \"w\"".into(), "tensor \"b\"".into()])?;
/// assert_eq!(threshold.max_norms(5.0, &[3.0, 4.0]), [1.5, 2.0]);
/// assert_eq!(threshold.max_norms(13.0, &[5.0, 12.0]), [3.0, 4.0]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(into = "saved::AdaGc", try_from = "saved::AdaGc")
)]
pub struct AdaGc {
    pub(crate) lambda_rel: f64,
    pub(crate) lambda_abs: f64,
    pub(crate) beta: f64,
    pub(crate) warm_up: u32,
    /// Whose the gammas are.
    pub(crate) labels: Vec<String>,
    /// γ of each tensor: above 0, and infinite until its first norm above 0.
    pub(crate) gammas: Vec<f64>,
    /// How many steps have entered.
    pub(crate) steps: u64,
}

impl Default for AdaGc {
    fn default() -> Self {
        Self::new()
    }
}

impl AdaGc {
    /// The default parameters, and no state.
    #[must_use]
    pub fn new() -> Self {
        Self {
            lambda_rel: 1.04,
            lambda_abs: 1.0,
            beta: 0.99,
            warm_up: 100,
            labels: Vec::new(),
            gammas: Vec::new(),
            steps: 0,
        }
    }

    /// Sets how many times its mean a tensor's norm may be, after the warm-up.
    ///
    /// # Errors
    /// [`Error::Setting`] if `lambda_rel` is not a finite number above 0.
    pub fn lambda_rel(mut self, lambda_rel: f64) -> Result<Self, Error> {
        self.lambda_rel = above_zero("lambda_rel", lambda_rel)?;
        Ok(self)
    }

    /// Sets the greatest global norm during the warm-up.
    ///
    /// # Errors
    /// [`Error::Setting`] if `lambda_abs` is not a finite number above 0.
    pub fn lambda_abs(mut self, lambda_abs: f64) -> Result<Self, Error> {
        self.lambda_abs = above_zero("lambda_abs", lambda_abs)?;
        Ok(self)
    }

    /// Sets how much of a mean a step keeps.
    ///
    /// # Errors
    /// [`Error::Setting`] if `beta` is not in 0..1.
    pub fn beta(mut self, beta: f64) -> Result<Self, Error> {
        self.beta = rate("beta", beta)?;
        Ok(self)
    }

    /// Sets how many steps are clipped by the global norm.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is 0: a mean has to begin somewhere.
    pub fn warm_up(mut self, steps: u32) -> Result<Self, Error> {
        self.warm_up = at_least_one("warm_up", steps)?;
        Ok(self)
    }

    /// Begins anew with these tensors.
    fn begin(&mut self, labels: Vec<String>) {
        self.gammas = vec![f64::INFINITY; labels.len()];
        self.labels = labels;
    }
}

impl Threshold for AdaGc {
    /// Before the first step any tensors will do, and these are remembered.
    fn bind(&mut self, labels: &[String]) -> Result<(), Error> {
        if self.steps == 0 {
            self.begin(labels.to_vec());
            return Ok(());
        }
        let place = self.labels.iter().zip(labels).take_while(|(ours, theirs)| ours == theirs).count();
        let what = match (self.labels.get(place), labels.get(place)) {
            (None, None) => return Ok(()),
            (Some(ours), Some(theirs)) => format!("where the state has {ours}, the gradients have {theirs}"),
            (Some(ours), None) => format!("the state has {ours}, which the gradients lack"),
            (None, Some(theirs)) => format!("the gradients have {theirs}, which the state lacks"),
        };
        let reason = format!("{what}; give the same tensors in the same order, or begin with AdaGc::new()");
        Err(Error::ThresholdState(reason))
    }

    /// The norms are those of the bound labels; without a call of `bind` the first step fixes how many there are. A
    /// step with another number of norms is not taken, and its thresholds are infinite.
    ///
    /// If a norm is not finite, the thresholds are `lambda_abs` during the warm-up and λ_rel γᵢ afterwards.
    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64> {
        let warming_up = self.steps < u64::from(self.warm_up);
        // No tensors are no step, and not what the next one is held to.
        let enters = !norms.is_empty() && is_norm(norm_of_step(total_norm, norms));
        if self.gammas.len() != norms.len() {
            if self.steps > 0 {
                return vec![f64::INFINITY; norms.len()];
            }
            if !enters {
                return vec![self.lambda_abs; norms.len()];
            }
            self.begin((0..norms.len()).map(|index| tensor_label(None, index)).collect());
        }
        if enters {
            self.steps = self.steps.saturating_add(1);
        }
        let h = if total_norm > self.lambda_abs { self.lambda_abs / total_norm } else { 1.0 };
        let one = |(gamma, &norm): (&mut f64, &f64)| {
            let max_norm = match (warming_up, enters) {
                (false, _) => self.lambda_rel * *gamma,
                (true, false) => self.lambda_abs,
                (true, true) if h < 1.0 => h * norm,
                (true, true) => f64::INFINITY,
            };
            let clipped = norm.min(max_norm);
            if enters && clipped > 0.0 {
                let next = if warming_up || gamma.is_infinite() {
                    gamma.min(clipped)
                } else {
                    *gamma + (1.0 - self.beta) * (clipped - *gamma)
                };
                // Not where the mean of the least floats rounds to 0.
                if next > 0.0 {
                    *gamma = next;
                }
            }
            max_norm
        };
        self.gammas.iter_mut().zip(norms).map(one).collect()
    }
}

/// Whether it can be a norm: a finite number, 0 or more.
fn is_norm(norm: f64) -> bool {
    (0.0..f64::INFINITY).contains(&norm)
}

/// The step's norm over all segments, or NaN if one of them has none.
fn norm_of_step(total_norm: f64, norms: &[f64]) -> f64 {
    if norms.iter().copied().all(is_norm) { total_norm } else { f64::NAN }
}

/// Linear between the two norms next to the place (n - 1) p / 100; infinity if there are none.
fn percentile_of(sorted: &[f64], percentile: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::INFINITY };
    let place = percentile / 100.0 * last as f64;
    let low = (place as usize).min(last);
    let high = (low + 1).min(last);
    sorted[low] + (place - low as f64) * (sorted[high] - sorted[low])
}

fn only_one(threshold: &str, labels: &[String]) -> Result<(), Error> {
    let found = match labels {
        [_] => return Ok(()),
        [] => "there is none".to_owned(),
        [first, second, ..] => format!("there are {}, of {first}, {second} and so on", labels.len()),
    };
    let reason =
        format!("{threshold} follows one norm and {found}; clip by the global norm, or follow each with AdaGc");
    Err(Error::ThresholdState(reason))
}

fn bad(name: &'static str, value: f64, reason: &'static str) -> Error {
    Error::Setting { name, value: number(value), reason }
}

fn rate(what: &'static str, value: f64) -> Result<f64, Error> {
    let valid = (0.0..1.0).contains(&value);
    if valid { Ok(value) } else { Err(bad(what, value, "it must be 0 or more and below 1")) }
}

fn above_zero(what: &'static str, value: f64) -> Result<f64, Error> {
    let valid = value > 0.0 && value.is_finite();
    if valid { Ok(value) } else { Err(bad(what, value, "it must be a finite number above 0")) }
}

fn at_least_one(what: &'static str, value: u32) -> Result<u32, Error> {
    if value > 0 { Ok(value) } else { Err(bad(what, 0.0, "it must be 1 or more")) }
}

/// The forms in which states are saved.
#[cfg(feature = "serde")]
mod saved {
    use serde::de::{Error as _, Visitor};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::is_norm;
    use crate::Error;

    /// Raised whenever a saved state would be misread by a program that knows the form before it.
    const VERSION: u32 = 1;

    /// The version of the form: reading another one fails.
    #[derive(Serialize)]
    #[serde(transparent)]
    struct Version(u32);

    impl<'de> Deserialize<'de> for Version {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            match u32::deserialize(deserializer)? {
                VERSION => Ok(Self(VERSION)),
                other => Err(D::Error::custom(format_args!(
                    "the threshold's state is of version {other} and this gradclip reads version {VERSION}; load it \
                     with the gradclip that saved it, or begin with a new threshold"
                ))),
            }
        }
    }

    /// A float that comes back as it was: as text where the format is text.
    struct Exact(f64);

    impl Serialize for Exact {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            if serializer.is_human_readable() {
                serializer.collect_str(&format_args!("{:?}", self.0))
            } else {
                serializer.serialize_f64(self.0)
            }
        }
    }

    impl<'de> Deserialize<'de> for Exact {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Text;
            impl Visitor<'_> for Text {
                type Value = Exact;

                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a number in quotes")
                }

                fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Exact, E> {
                    text.parse().map(Exact).map_err(|_| E::custom(format_args!("{text:?} is not a number")))
                }
            }
            if deserializer.is_human_readable() {
                deserializer.deserialize_str(Text)
            } else {
                f64::deserialize(deserializer).map(Exact)
            }
        }
    }

    fn check(valid: bool, reason: impl FnOnce() -> String) -> Result<(), Error> {
        if valid { Ok(()) } else { Err(Error::ThresholdState(reason() + "; it was damaged, load another")) }
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct ZClip {
        version: Version,
        alpha: Exact,
        z_threshold: Exact,
        warm_up: u32,
        mean: Exact,
        variance: Exact,
        steps: u64,
    }

    impl From<super::ZClip> for ZClip {
        fn from(from: super::ZClip) -> Self {
            let super::ZClip { alpha, z_threshold, warm_up, mean, variance, steps } = from;
            Self {
                version: Version(VERSION),
                alpha: Exact(alpha),
                z_threshold: Exact(z_threshold),
                warm_up,
                mean: Exact(mean),
                variance: Exact(variance),
                steps,
            }
        }
    }

    impl TryFrom<ZClip> for super::ZClip {
        type Error = Error;

        fn try_from(from: ZClip) -> Result<Self, Error> {
            let ZClip { alpha, z_threshold, warm_up, mean: Exact(mean), variance: Exact(variance), steps, .. } = from;
            for (what, value) in [("mean", mean), ("variance", variance)] {
                check(is_norm(value), || format!("its {what} is {value}"))?;
            }
            check(steps > 0 || (mean == 0.0 && variance == 0.0), || {
                format!("its mean is {mean} and its variance {variance} after 0 steps")
            })?;
            let new = Self::new().alpha(alpha.0)?.z_threshold(z_threshold.0)?.warm_up(warm_up)?;
            Ok(Self { mean, variance, steps, ..new })
        }
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct AutoClip {
        version: Version,
        percentile: Exact,
        history: usize,
        warm_up: u32,
        steps: u64,
        norms: Vec<Exact>,
    }

    impl From<super::AutoClip> for AutoClip {
        fn from(from: super::AutoClip) -> Self {
            let super::AutoClip { percentile, history, warm_up, norms, sorted: _, steps } = from;
            let norms = norms.into_iter().map(Exact).collect();
            Self { version: Version(VERSION), percentile: Exact(percentile), history, warm_up, steps, norms }
        }
    }

    impl TryFrom<AutoClip> for super::AutoClip {
        type Error = Error;

        fn try_from(from: AutoClip) -> Result<Self, Error> {
            let AutoClip { percentile, history, warm_up, steps, norms, .. } = from;
            let mut sorted: Vec<f64> = norms.into_iter().map(|norm| norm.0).collect();
            if let Some(bad) = sorted.iter().find(|&&norm| !is_norm(norm)) {
                check(false, || format!("it holds a norm of {bad}"))?;
            }
            let length = sorted.len();
            // Not always full: the history may have been made longer on the way.
            check(length <= history && length as u64 <= steps && (length > 0 || steps == 0), || {
                format!("it holds {length} norms after {steps} steps, of at most {history}")
            })?;
            let norms = sorted.iter().copied().collect();
            sorted.sort_unstable_by(f64::total_cmp);
            let new = Self::new().percentile(percentile.0)?.history(history)?.warm_up(warm_up);
            Ok(Self { norms, sorted, steps, ..new })
        }
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct AdaGc {
        version: Version,
        lambda_rel: Exact,
        lambda_abs: Exact,
        beta: Exact,
        warm_up: u32,
        steps: u64,
        labels: Vec<String>,
        gammas: Vec<Exact>,
    }

    impl From<super::AdaGc> for AdaGc {
        fn from(from: super::AdaGc) -> Self {
            let super::AdaGc { lambda_rel, lambda_abs, beta, warm_up, labels, gammas, steps } = from;
            Self {
                version: Version(VERSION),
                lambda_rel: Exact(lambda_rel),
                lambda_abs: Exact(lambda_abs),
                beta: Exact(beta),
                warm_up,
                steps,
                labels,
                gammas: gammas.into_iter().map(Exact).collect(),
            }
        }
    }

    impl TryFrom<AdaGc> for super::AdaGc {
        type Error = Error;

        fn try_from(from: AdaGc) -> Result<Self, Error> {
            let AdaGc { lambda_rel, lambda_abs, beta, warm_up, steps, labels, gammas, .. } = from;
            let gammas: Vec<f64> = gammas.into_iter().map(|gamma| gamma.0).collect();
            check(gammas.len() == labels.len(), || {
                format!("it holds {} gammas of {} tensors", gammas.len(), labels.len())
            })?;
            for (label, &gamma) in labels.iter().zip(&gammas) {
                let valid = gamma > 0.0 && (steps > 0 || gamma.is_infinite());
                check(valid, || format!("the gamma of {label} is {gamma} after {steps} steps"))?;
            }
            let new = Self::new().lambda_rel(lambda_rel.0)?.lambda_abs(lambda_abs.0)?.beta(beta.0)?.warm_up(warm_up)?;
            Ok(Self { labels, gammas, steps, ..new })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

    /// Numbers from 0.5 to 1.5, the same at each run.
    fn noise() -> impl Iterator<Item = f64> {
        let mut state = 1u64;
        std::iter::repeat_with(move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            0.5 + (state >> 11) as f64 / (1u64 << 53) as f64
        })
    }

    fn labels(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| tensor_label(Some(name), 0)).collect()
    }

    /// Mean 2, variance 1, z threshold 2.
    fn warm_zclip() -> ZClip {
        let mut threshold = zclip(2);
        assert_eq!([threshold.max_norm(1.0), threshold.max_norm(3.0)], [f64::INFINITY; 2]);
        threshold
    }

    fn zclip(warm_up: u32) -> ZClip {
        let new = || ZClip::new().alpha(0.5)?.z_threshold(2.0)?.warm_up(warm_up);
        new().expect("valid")
    }

    /// γ 0.75 and 1, at the end of the warm-up.
    fn warm_adagc() -> AdaGc {
        let new = || AdaGc::new().lambda_rel(1.5)?.lambda_abs(2.5)?.beta(0.5)?.warm_up(2);
        let mut threshold = new().expect("valid");
        threshold.bind(&labels(&["w", "b"])).expect("no state yet");
        assert_eq!(threshold.max_norms(5.0, &[3.0, 4.0]), [1.5, 2.0]);
        assert_eq!(threshold.gammas, [1.5, 2.0]);
        assert_eq!(threshold.max_norms(1.25, &[0.75, 1.0]), [f64::INFINITY; 2]);
        assert_eq!(threshold.gammas, [0.75, 1.0]);
        threshold
    }

    #[test]
    fn zclip_follows_the_formula() {
        let mut threshold = warm_zclip();
        assert_eq!((threshold.mean, threshold.variance), (2.0, 1.0));
        assert_eq!(threshold.max_norm(3.0), f64::INFINITY);
        assert_eq!((threshold.mean, threshold.variance, threshold.steps), (2.5, 0.625, 3));
        // z = 2 is not above 2.
        assert_eq!(warm_zclip().max_norm(4.0), f64::INFINITY);
    }

    #[test]
    fn zclip_takes_a_spike_in_as_it_was_clipped() {
        let (mut spiked, mut calm) = (warm_zclip(), warm_zclip());
        // z = 4, so it is clipped to 2 + 2² / 4.
        assert_eq!(spiked.max_norm(6.0), 3.0);
        calm.max_norm(3.0);
        assert_eq!(spiked, calm);
        let before = spiked.clone();
        let max_norm = spiked.max_norm(1e300);
        assert!((max_norm - before.mean).abs() < 1e-290 && spiked.variance < before.variance);
    }

    #[test]
    fn zclip_warms_up_with_the_plain_mean_and_variance() {
        let mut threshold = ZClip::new();
        let norms: Vec<f64> = noise().take(25).collect();
        assert!(norms.iter().all(|&norm| threshold.max_norm(norm) == f64::INFINITY));
        let mean = norms.iter().sum::<f64>() / 25.0;
        let variance = norms.iter().map(|norm| (norm - mean).powi(2)).sum::<f64>() / 25.0;
        assert!((threshold.mean - mean).abs() < 1e-15 && (threshold.variance - variance).abs() < 1e-15);
        assert!(threshold.max_norm(100.0) < mean + 2.5 * variance.sqrt());
    }

    #[test]
    fn zclip_follows_norms_that_drift() {
        let mut threshold = ZClip::new();
        let clipped = noise()
            .take(2000)
            .enumerate()
            .map(|(step, noise)| noise * (1.0 + step as f64 / 500.0))
            .filter(|&norm| threshold.max_norm(norm) < norm)
            .count();
        assert!(clipped < 20, "{clipped}");
        assert!((threshold.mean - 5.0).abs() < 0.5, "{}", threshold.mean);
    }

    #[test]
    fn constant_norms_are_not_clipped() {
        for norm in [0.0, 0.1, 1.0 / 3.0, 1e-300, 1e300] {
            let mut z = ZClip::new();
            let mut auto = AutoClip::new();
            let mut ada = AdaGc::new().lambda_abs(f64::MAX).expect("valid");
            for _ in 0..300 {
                assert!(z.max_norm(norm) >= norm && auto.max_norm(norm) >= norm);
                assert!(ada.max_norms(norm, &[norm])[0] >= norm);
            }
            assert_eq!((z.mean, z.variance), (norm, 0.0));
            assert_eq!(ada.gammas, [if norm == 0.0 { f64::INFINITY } else { norm }]);
        }
    }

    #[test]
    fn zclip_leaves_the_constant_behind() {
        let mut threshold = zclip(2);
        for _ in 0..10 {
            threshold.max_norm(0.0);
        }
        assert_eq!(threshold.max_norm(8.0), f64::INFINITY);
        assert_eq!((threshold.mean, threshold.variance), (4.0, 8.0));
    }

    #[test]
    fn thresholds_are_numbers_at_both_ends_of_the_range() {
        let ends = [0.0, f64::from_bits(1), 1e-300, 1.0, 1e160, f64::MAX, 0.0, f64::MAX, f64::from_bits(1), f64::MAX];
        for z_threshold in [1e-300, 2.5, f64::MAX] {
            let mut z = ZClip::new().warm_up(2).and_then(|z| z.z_threshold(z_threshold)).expect("valid");
            let mut auto = AutoClip::new();
            let mut ada = AdaGc::new().warm_up(2).expect("valid");
            for norm in ends.into_iter().cycle().take(100) {
                assert!(z.max_norm(norm) >= 0.0 && auto.max_norm(norm) >= 0.0);
                assert!(ada.max_norms(norm, &[norm, 0.0]).iter().all(|&max_norm| max_norm >= 0.0));
                assert!(is_norm(z.mean) && is_norm(z.variance), "{z:?}");
                assert!(ada.gammas[0] > 0.0 && ada.gammas[1] == f64::INFINITY, "{ada:?}");
            }
        }
    }

    #[test]
    fn steps_that_are_not_finite_leave_the_state() {
        let (mut z, mut ada) = (warm_zclip(), warm_adagc());
        let mut auto = AutoClip::new().warm_up(0);
        assert_eq!(auto.max_norm(f64::NAN), f64::INFINITY);
        auto.max_norm(7.0);
        for bad in BAD {
            let before = (z.clone(), auto.clone(), ada.clone());
            assert_eq!(z.max_norm(bad), 4.0);
            assert_eq!(auto.max_norm(bad), 7.0);
            assert_eq!(ada.max_norms(bad, &[1.0, 1.0]), [1.125, 1.5]);
            assert_eq!(ada.max_norms(1.0, &[1.0, bad]), [1.125, 1.5]);
            assert_eq!(z.max_norms(1.0, &[bad]), [4.0]);
            assert_eq!(auto.max_norms(bad, &[1.0]), [7.0]);
            assert_eq!((&z, &auto, &ada), (&before.0, &before.1, &before.2));
        }
        let mut cold = AdaGc::new();
        assert_eq!(cold.max_norms(f64::NAN, &[f64::NAN, 1.0]), [1.0; 2]);
        assert_eq!(cold, AdaGc::new());
        cold.bind(&labels(&["w", "b"])).expect("no state");
        let before = cold.clone();
        assert_eq!(cold.max_norms(f64::NAN, &[f64::NAN, 1.0]), [1.0; 2]);
        assert_eq!(cold, before);
        assert_eq!(ZClip::new().max_norm(f64::INFINITY), f64::INFINITY);
    }

    #[test]
    fn autoclip_is_the_percentile_of_the_last_norms() {
        for (percentile, history) in [(0.0, 1), (10.0, 7), (37.5, 16), (50.0, 5), (100.0, 12)] {
            let new = || AutoClip::new().percentile(percentile)?.history(history);
            let mut threshold = new().expect("valid").warm_up(3);
            let norms: Vec<f64> = noise().map(|norm| (norm * 16.0).round()).take(60).collect();
            for step in 0..norms.len() {
                let max_norm = threshold.max_norm(norms[step]);
                let mut last = norms[(step + 1).saturating_sub(history)..=step].to_vec();
                assert_eq!(threshold.norms, last);
                last.sort_by(f64::total_cmp);
                assert_eq!(threshold.sorted, last);
                let place = percentile * (last.len() - 1) as f64 / 100.0;
                let (low, high) = (last[place.floor() as usize], last[place.ceil() as usize]);
                let expected = if step < 3 { f64::INFINITY } else { low + place.fract() * (high - low) };
                assert!(max_norm == expected || (max_norm - expected).abs() < 1e-13, "{max_norm} {expected}");
            }
        }
    }

    #[test]
    fn autoclip_forgets_when_the_history_is_made_shorter() {
        let mut threshold = AutoClip::new().percentile(100.0).expect("valid");
        for norm in [9.0, 1.0, 3.0, 2.0] {
            threshold.max_norm(norm);
        }
        threshold = threshold.history(2).expect("valid");
        assert_eq!((&threshold.norms, &threshold.sorted), (&VecDeque::from([3.0, 2.0]), &vec![2.0, 3.0]));
        assert_eq!(threshold.max_norm(1.0), 2.0);
    }

    #[test]
    fn adagc_follows_the_formula() {
        let mut threshold = warm_adagc();
        assert_eq!(threshold.max_norms(17f64.sqrt(), &[1.0, 4.0]), [1.125, 1.5]);
        assert_eq!((threshold.gammas.as_slice(), threshold.steps), (&[0.875, 1.25][..], 3));
    }

    #[test]
    fn adagc_takes_a_spike_in_as_it_was_clipped() {
        let (mut spiked, mut calm) = (warm_adagc(), warm_adagc());
        spiked.max_norms(1e30, &[1.0, 1e30]);
        calm.max_norms(1.5, &[1.0, 1.5]);
        assert_eq!(spiked, calm);
    }

    #[test]
    fn adagc_learns_nothing_from_a_norm_of_zero() {
        let mut threshold = AdaGc::new().warm_up(2).expect("valid");
        for _ in 0..4 {
            assert_eq!(threshold.max_norms(0.5, &[0.0, 0.5])[0], f64::INFINITY);
        }
        assert_eq!(threshold.gammas, [f64::INFINITY, 0.5]);
        assert_eq!(threshold.max_norms(0.5, &[0.25, 0.0])[0], f64::INFINITY);
        assert_eq!(threshold.gammas, [0.25, 0.5]);
    }

    #[test]
    fn adagc_takes_no_step_without_tensors() {
        let mut threshold = AdaGc::new();
        threshold.bind(&[]).expect("nothing yet");
        assert!(threshold.max_norms(0.0, &[]).is_empty());
        threshold.bind(&["tensor 0".to_owned()]).expect("any tensors will do before the first step");
    }

    #[test]
    fn adagc_names_the_first_tensor_that_differs() {
        let mut threshold = warm_adagc();
        threshold.bind(&labels(&["w", "b"])).expect("its own tensors");
        for (names, message) in [
            (&["w", "v"][..], r#"where the state has tensor "b", the gradients have tensor "v""#),
            (&["b", "w"], r#"where the state has tensor "w", the gradients have tensor "b""#),
            (&["w"], r#"the state has tensor "b", which the gradients lack"#),
            (&["w", "b", "x"], r#"the gradients have tensor "x", which the state lacks"#),
        ] {
            let error = threshold.bind(&labels(names)).expect_err("other tensors").to_string();
            assert!(error.contains(message) && error.contains("AdaGc::new()"), "{error}");
        }
        assert_eq!(threshold, warm_adagc());
        let mut fresh = AdaGc::new();
        fresh.bind(&labels(&["a"])).expect("no state");
        fresh.bind(&labels(&["b", "c"])).expect("still no state");
        assert_eq!((fresh.labels.len(), fresh.gammas.len()), (2, 2));
    }

    #[test]
    fn adagc_does_not_take_a_step_of_another_size() {
        let mut threshold = warm_adagc();
        assert_eq!(threshold.max_norms(1.0, &[1.0]), [f64::INFINITY]);
        assert_eq!(threshold, warm_adagc());
        let mut unbound = AdaGc::new();
        unbound.max_norms(1.0, &[0.5, 0.5]);
        assert_eq!(unbound.labels, ["tensor 0", "tensor 1"]);
    }

    #[test]
    fn one_norm_is_all_that_a_global_threshold_follows() {
        for (threshold, name) in [
            (&mut ZClip::new() as &mut dyn Threshold, "ZClip follows one norm"),
            (&mut AutoClip::new(), "AutoClip follows one norm"),
        ] {
            threshold.bind(&labels(&["w"])).expect("one");
            for names in [&[][..], &["w", "b"], &["w", "b", "c"]] {
                let error = threshold.bind(&labels(names)).expect_err("not one").to_string();
                assert!(error.contains(name), "{error}");
            }
        }
    }

    #[test]
    fn the_trait_does_what_the_method_does() {
        let (mut a, mut b) = (warm_zclip(), warm_zclip());
        assert_eq!(a.max_norms(6.0, &[6.0]), [b.max_norm(6.0)]);
        assert_eq!(a, b);
        let (mut a, mut b) = (AutoClip::new(), AutoClip::new());
        for norm in noise().take(9) {
            assert_eq!(a.max_norms(norm, &[norm]), [b.max_norm(norm)]);
        }
        assert_eq!(a, b);
    }

    #[test]
    fn bad_parameters_are_refused() {
        for bad in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            assert!(ZClip::new().alpha(bad).is_err() && AdaGc::new().beta(bad).is_err());
        }
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(ZClip::new().z_threshold(bad).is_err());
            assert!(AdaGc::new().lambda_rel(bad).is_err() && AdaGc::new().lambda_abs(bad).is_err());
        }
        for bad in [-0.1, 100.1, f64::NAN] {
            assert!(AutoClip::new().percentile(bad).is_err());
        }
        assert!(AutoClip::new().history(0).is_err());
        let error = ZClip::new().warm_up(0).expect_err("no warm-up").to_string();
        assert_eq!(error, "warm_up is 0; it must be 1 or more");
        assert!(AdaGc::new().warm_up(0).is_err());
        assert!(ZClip::new().alpha(0.0).is_ok() && AutoClip::new().percentile(100.0).is_ok());
    }

    #[cfg(feature = "serde")]
    mod saved {
        use serde::Serialize;
        use serde::de::DeserializeOwned;

        use super::*;

        /// Steps both, saving and loading one of them before each step.
        fn keeps_on<T>(mut through: T, steps: u32)
        where
            T: Threshold + Clone + PartialEq + std::fmt::Debug + Serialize + DeserializeOwned,
        {
            let mut plain = through.clone();
            for norm in noise().take(steps as usize) {
                let text = serde_json::to_string(&through).expect("plain data");
                assert!(!text.contains("null"), "{text}");
                through = serde_json::from_str(&text).expect("just saved");
                assert_eq!(through, plain);
                // A tree of values keeps no order of fields.
                let tree = serde_json::to_value(&through).expect("plain data");
                assert_eq!(serde_json::from_value::<T>(tree).expect("just saved"), plain);
                let norm = norm * norm.powi(20);
                assert_eq!(through.max_norms(norm, &[norm]), plain.max_norms(norm, &[norm]));
            }
        }

        #[test]
        fn a_loaded_state_goes_on_as_the_saved_one() {
            keeps_on(ZClip::new().warm_up(9).expect("valid"), 60);
            keeps_on(AutoClip::new().history(16).expect("valid"), 60);
            let mut ada = AdaGc::new().warm_up(9).expect("valid");
            ada.bind(&["the norm".to_owned()]).expect("no state");
            keeps_on(ada, 60);
            keeps_on(AdaGc::new(), 3);
        }

        #[test]
        fn a_gamma_of_infinity_survives() {
            let mut threshold = AdaGc::new();
            threshold.max_norms(1.0, &[0.0, 1.0]);
            let text = serde_json::to_string(&threshold).expect("plain data");
            assert!(text.contains(r#""gammas":["inf","1.0"]"#), "{text}");
            assert_eq!(serde_json::from_str::<AdaGc>(&text).expect("just saved"), threshold);
        }

        /// The message of loading `state` with `from` replaced by `to`.
        fn refusal<T>(state: &T, from: &str, to: &str) -> String
        where
            T: Serialize + DeserializeOwned + std::fmt::Debug,
        {
            let text = serde_json::to_string(state).expect("plain data");
            assert!(text.contains(from), "{text}");
            serde_json::from_str::<T>(&text.replace(from, to)).expect_err("a bad state").to_string()
        }

        #[test]
        fn other_versions_are_refused() {
            for message in [
                refusal(&warm_zclip(), r#""version":1"#, r#""version":2"#),
                refusal(&AutoClip::new(), r#""version":1"#, r#""version":2"#),
                refusal(&warm_adagc(), r#""version":1"#, r#""version":2"#),
                // Whatever else such a version changed.
                refusal(&warm_zclip(), r#""version":1,"alpha""#, r#""version":2,"rate""#),
            ] {
                assert!(message.contains("version 2") && message.contains("reads version 1"), "{message}");
            }
            assert!(refusal(&warm_zclip(), r#""version":1,"#, "").contains("missing field `version`"));
        }

        #[test]
        fn states_that_make_no_sense_are_refused() {
            let (z, ada) = (warm_zclip(), warm_adagc());
            let mut auto = AutoClip::new().history(2).expect("valid");
            auto.max_norm(5.0);
            for (message, part) in [
                (refusal(&z, r#""variance":"1.0""#, r#""variance":"-1""#), "its variance is -1"),
                (refusal(&z, r#""mean":"2.0""#, r#""mean":"NaN""#), "its mean is NaN"),
                (refusal(&z, r#""mean":"2.0""#, r#""mean":"inf""#), "its mean is inf"),
                (refusal(&z, r#""mean":"2.0""#, r#""mean":2.0"#), "a number in quotes"),
                (refusal(&z, r#""mean":"2.0""#, r#""mean":"two""#), "is not a number"),
                (refusal(&z, r#""steps":2"#, r#""steps":0"#), "after 0 steps"),
                (refusal(&z, r#""alpha":"0.5""#, r#""alpha":"1.5""#), "alpha is 1.5; it must be"),
                (refusal(&z, r#""warm_up":2"#, r#""warm_up":0"#), "warm_up is 0; it must be"),
                (refusal(&auto, r#"["5.0"]"#, r#"["-5"]"#), "it holds a norm of -5"),
                (refusal(&auto, r#"["5.0"]"#, r#"["5","6"]"#), "2 norms after 1 steps"),
                (refusal(&auto, r#"["5.0"]"#, "[]"), "0 norms after 1 steps"),
                (refusal(&auto, r#""steps":1,"norms":["5.0"]"#, r#""steps":3,"norms":["5","5","5"]"#), "of at most 2"),
                (refusal(&auto, r#""history":2"#, r#""history":0"#), "of at most 0"),
                (refusal(&ada, r#"["0.75","1.0"]"#, r#"["0.75"]"#), "it holds 1 gammas of 2 tensors"),
                (refusal(&ada, r#"["0.75","1.0"]"#, r#"["0.75","0"]"#), r#"the gamma of tensor "b" is 0"#),
                (refusal(&ada, r#"["0.75","1.0"]"#, r#"["NaN","1"]"#), r#"the gamma of tensor "w" is NaN"#),
                (refusal(&ada, r#""steps":2"#, r#""steps":0"#), "after 0 steps"),
                (refusal(&ada, r#""beta":"0.5""#, r#""beta":"1""#), "beta is 1; it must be"),
            ] {
                assert!(message.contains(part), "{message}");
            }
        }

        #[test]
        fn a_loaded_state_is_still_bound() {
            let text = serde_json::to_string(&warm_adagc()).expect("plain data");
            let mut threshold: AdaGc = serde_json::from_str(&text).expect("just saved");
            threshold.bind(&labels(&["w", "b"])).expect("its own tensors");
            assert!(threshold.bind(&labels(&["w", "c"])).is_err());
        }
    }
}

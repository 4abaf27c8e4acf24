//! [`ZClip`].

use super::{Threshold, above_0, at_least_1, below_1, is_norm, norm_of_step, only_one};
use crate::Error;
use crate::clip::{Number, setting};

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
/// (Kumar, Owen, Chowdhury, Güra 2025, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv 2504.02507;
/// z*² / z is the paper's reciprocal adjustment: a higher spike is clipped nearer to the mean). The clipped norm enters
/// the statistics, so even the largest spike counts for less than z* standard deviations.
///
/// Warm-up: the first `warm_up` steps are not clipped; μ and σ² are their plain mean and variance (divided by their
/// number).
///
/// Defaults: `alpha` 0.97, `z_threshold` 2.5, `warm_up` 25.
///
/// Two differences from the authors' program: it adds 1e-6 to σ, which would make z depend on the scale of the loss,
/// and by default it also clips every step to a fixed norm of 1. Here nothing is clipped while σ is 0: without a spread
/// there is no z, and clipping to μ would keep σ at 0 for ever.
///
/// ```
/// use gradclip::ZClip;
/// let mut threshold = ZClip::new().warm_up(4);
/// for norm in [1.0, 3.0, 1.0, 3.0] {
///     assert_eq!(threshold.max_norm(norm), f64::INFINITY);
/// }
/// // The mean is 2 and the standard deviation 1, so z is 10.
/// assert_eq!(threshold.max_norm(12.0), 2.0 + 2.5 * 2.5 / 10.0);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(into = "super::saved::ZClip", try_from = "super::saved::ZClip")
)]
pub struct ZClip {
    pub(crate) alpha: f64,
    pub(crate) z_threshold: f64,
    pub(crate) warm_up: u32,
    pub(crate) skip_above_z: f64,
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
        let skip_above_z = f64::INFINITY;
        Self { alpha: 0.97, z_threshold: 2.5, warm_up: 25, skip_above_z, mean: 0.0, variance: 0.0, steps: 0 }
    }

    /// Sets the part of the mean and the variance that a step keeps: 0 or more, and below 1.
    #[must_use]
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets how many standard deviations above the mean a norm may lie: a finite number above 0.
    #[must_use]
    pub fn z_threshold(mut self, z_threshold: f64) -> Self {
        self.z_threshold = z_threshold;
        self
    }

    /// Sets how many steps are only measured: 1 or more, because a mean needs a first value.
    #[must_use]
    pub fn warm_up(mut self, steps: u32) -> Self {
        self.warm_up = steps;
        self
    }

    /// Sets how many standard deviations above the mean a norm may lie before its step is skipped, a number above 0:
    /// nothing is written, the report says so ([`ClipReport::skipped`](crate::ClipReport::skipped)), and the norm does
    /// not enter. The default, infinity, skips none. No step of the warm-up is skipped, and none while σ is 0.
    ///
    /// To skip by the running norms and clip to a fixed one, set a `z_threshold` of `f64::MAX`, and the fixed norm in
    /// the clip.
    #[must_use]
    pub fn skip_above_z(mut self, z: f64) -> Self {
        self.skip_above_z = z;
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        setting(self.skip_above_z > 0.0, "skip_above_z", Number(self.skip_above_z), "it must be above 0")?;
        below_1("alpha", self.alpha)?;
        above_0("z_threshold", self.z_threshold)?;
        at_least_1("warm_up", self.warm_up as usize)
    }

    /// The `max_norm` for a step with this norm, which enters the state. For a norm that is not finite it is the norm
    /// at which clipping begins, μ + z* σ. With an invalid setting it is infinity, and the state stays as it was.
    pub fn max_norm(&mut self, norm: f64) -> f64 {
        if self.check().is_err() {
            return f64::INFINITY;
        }
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
        // 0 / 0 is not above the threshold, but x / 0 would be.
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
        self.check()?;
        only_one("ZClip", labels)
    }

    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64> {
        vec![self.max_norm(norm_of_step(total_norm, norms)); norms.len()]
    }

    fn skip_above(&self) -> f64 {
        let std = self.variance.sqrt();
        let none = self.check().is_err() || self.steps < u64::from(self.warm_up) || std == 0.0;
        if none { f64::INFINITY } else { self.mean + self.skip_above_z * std }
    }
}

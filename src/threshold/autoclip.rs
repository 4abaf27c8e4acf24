//! [`AutoClip`].

use super::{Threshold, at_least_1, is_norm, norm_of_step, only_one};
use crate::Error;
use crate::clip::{Number, setting};

/// Clips a global norm to a percentile of the norms so far.
///
/// With N the norm of step t:
///
/// ```text
/// max_norm = percentile(p, {N of step t and of up to history - 1 steps before it})
/// ```
///
/// (Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
/// arXiv 2007.14469). The norm enters as measured, before clipping. The percentile is linear between two norms: it lies
/// at place (n - 1) p / 100 of the n sorted norms, as in NumPy.
///
/// The paper keeps every norm. This keeps only the last `history` norms, so memory and time per step are bounded (80 kB
/// each for the norms and their sorted copy) and norms from an earlier phase of training lose their influence.
///
/// Warm-up: the first `warm_up` steps are not clipped, but their norms enter. The paper has no warm-up: its first
/// threshold is the first norm itself.
///
/// Defaults: `percentile` 10, `history` 10 000 (the authors' TensorFlow program's), `warm_up` 1.
///
/// ```
/// use gradclip::AutoClip;
/// let mut threshold = AutoClip::new().percentile(50.0);
/// assert_eq!(threshold.max_norm(1.0), f64::INFINITY);
/// assert_eq!(threshold.max_norm(3.0), 2.0);
/// assert_eq!(threshold.max_norm(100.0), 3.0);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(into = "super::saved::AutoClip", try_from = "super::saved::AutoClip")
)]
pub struct AutoClip {
    pub(super) percentile: f64,
    pub(super) history: usize,
    pub(super) warm_up: u32,
    /// The last norms, the oldest first.
    pub(super) norms: Vec<f64>,
    /// The same, in order of size.
    pub(super) sorted: Vec<f64>,
    /// How many norms have entered, the forgotten ones too.
    pub(super) steps: u64,
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
        Self { percentile: 10.0, history: 10_000, warm_up: 1, norms: Vec::new(), sorted: Vec::new(), steps: 0 }
    }

    /// Sets the percentile, from 0 to 100: 0 is the least norm of the history, 100 the greatest.
    #[must_use]
    pub fn percentile(mut self, percentile: f64) -> Self {
        self.percentile = percentile;
        self
    }

    /// Sets how many norms are remembered: 1 or more. If more are held already, the next step forgets the oldest.
    #[must_use]
    pub fn history(mut self, length: usize) -> Self {
        self.history = length;
        self
    }

    /// Sets how many steps are only measured; 0 is the paper's rule.
    #[must_use]
    pub fn warm_up(mut self, steps: u32) -> Self {
        self.warm_up = steps;
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let valid = (0.0..=100.0).contains(&self.percentile);
        setting(valid, "percentile", Number(self.percentile), "it must be from 0 to 100")?;
        at_least_1("history", self.history)
    }

    /// The `max_norm` for a step with this norm, which enters the state. For a norm that is not finite it is the
    /// percentile of the earlier norms. With an invalid setting it is infinity, and the state stays as it was.
    pub fn max_norm(&mut self, norm: f64) -> f64 {
        if self.check().is_err() {
            return f64::INFINITY;
        }
        let warming_up = self.steps < u64::from(self.warm_up);
        if is_norm(norm) {
            let forgotten = (self.norms.len() + 1).saturating_sub(self.history);
            for oldest in self.norms.drain(..forgotten) {
                self.sorted.remove(place(&self.sorted, oldest));
            }
            self.norms.push(norm);
            self.sorted.insert(place(&self.sorted, norm), norm);
            self.steps = self.steps.saturating_add(1);
        }
        if warming_up { f64::INFINITY } else { percentile_of(&self.sorted, self.percentile) }
    }
}

impl Threshold for AutoClip {
    fn bind(&mut self, labels: &[String]) -> Result<(), Error> {
        self.check()?;
        only_one("AutoClip", labels)
    }

    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64> {
        vec![self.max_norm(norm_of_step(total_norm, norms)); norms.len()]
    }
}

/// The place of this norm among the sorted ones, or where it belongs.
fn place(sorted: &[f64], norm: f64) -> usize {
    sorted.partition_point(|other| other.total_cmp(&norm).is_lt())
}

/// Linear between the two norms next to the place (n - 1) p / 100; infinity if there are none.
fn percentile_of(sorted: &[f64], percentile: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::INFINITY };
    let place = percentile / 100.0 * last as f64;
    let low = (place as usize).min(last);
    let high = (low + 1).min(last);
    sorted[low] + (place - low as f64) * (sorted[high] - sorted[low])
}

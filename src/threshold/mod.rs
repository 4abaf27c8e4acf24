//! Thresholds that follow the norms of a training run, as values whose state can be saved: [`ZClip`] and [`AutoClip`]
//! for a global norm, [`AdaGc`] for one norm per tensor.
//!
//! All three work alike:
//!
//! - Settings are checked where the threshold is used. `bind` reports what is wrong. A step with an invalid setting
//!   clips nothing and leaves the state as it was.
//! - A step with a NaN or infinite norm leaves the state as it was, and does not count. Under
//!   [`NonFinite::Drop`](crate::NonFinite::Drop) the norm is that of the finite elements, so the step counts.
//! - Averages move by `mean += (1 - rate) * (norm - mean)`. Constant norms then leave the mean unchanged to the bit, so
//!   rounding alone never clips.
//! - A saved state carries a version and is checked when it is read.

mod adagc;
mod autoclip;
#[cfg(feature = "serde")]
mod saved;
#[cfg(test)]
mod tests;
mod zclip;

pub use adagc::AdaGc;
pub use autoclip::AutoClip;
pub use zclip::ZClip;

use crate::clip::{Number, setting};
use crate::{Clip, Error};

/// A threshold that follows the norms of a training run: [`ZClip`] and [`AutoClip`] follow the global norm, [`AdaGc`]
/// the norm of each tensor.
///
/// A threshold belongs to one run and is part of its checkpoint. With the feature `serde` it can be saved and loaded. A
/// loaded threshold continues exactly, to the bit, as the saved one would have. A state that is damaged, or of another
/// version of the saved form, fails to load.
///
/// Like a [`Clip`](crate::Clip), a threshold accepts any setting. Every use reports what is wrong.
pub trait Threshold: Send {
    /// Ties the state to the segments it will follow. Call it before the first step and after every load. A label is
    /// `tensor "w"` or `tensor 3`; a global norm has one label.
    ///
    /// # Errors
    /// [`Error::Setting`] if a setting has an invalid value; [`Error::ThresholdState`] if the state is of other
    /// segments.
    fn bind(&mut self, labels: &[String]) -> Result<(), Error>;

    /// Returns the `max_norm` of each segment for the step with these norms (already divided by `grad_scale`), and
    /// takes the step into the state. `total_norm` is the norm over all segments together.
    ///
    /// If a norm is not finite, the step leaves the state as it was, and the thresholds follow from the state alone. A
    /// threshold is 0 or more, never NaN; infinity means that nothing is clipped. With an invalid setting all are
    /// infinite, and the state stays as it was.
    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64>;

    /// The total norm above which the next step is skipped, by [`Clip::skip_above`](crate::Clip::skip_above) too;
    /// infinity skips none. It follows from the state alone. A step that is skipped leaves the state as it was.
    fn skip_above(&self) -> f64 {
        f64::INFINITY
    }
}

impl Clip {
    /// The same clip, with the limit of a threshold too.
    pub(crate) fn skipping(self, threshold: &dyn Threshold) -> Self {
        self.skip_above(self.skip_above.min(threshold.skip_above()))
    }
}

/// Whether a number can be a norm: it is finite, and 0 or more.
fn is_norm(norm: f64) -> bool {
    (0.0..f64::INFINITY).contains(&norm)
}

/// The step's norm over all segments, or NaN if a segment has no valid norm.
fn norm_of_step(total_norm: f64, norms: &[f64]) -> f64 {
    if norms.iter().copied().all(is_norm) { total_norm } else { f64::NAN }
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

fn below_1(name: &'static str, rate: f64) -> Result<(), Error> {
    setting((0.0..1.0).contains(&rate), name, Number(rate), "it must be 0 or more and below 1")
}

fn above_0(name: &'static str, value: f64) -> Result<(), Error> {
    setting(value > 0.0 && value.is_finite(), name, Number(value), "it must be a finite number above 0")
}

fn at_least_1(name: &'static str, value: usize) -> Result<(), Error> {
    setting(value > 0, name, value, "it must be 1 or more")
}

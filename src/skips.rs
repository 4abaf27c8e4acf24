//! [`ConsecutiveSkips`]: an end to a run that skips every step.

use crate::{ClipReport, Error};

/// Counts how many steps in a row were skipped ([`ClipReport::skipped`]), and turns one too many into an error. So a
/// run that has diverged ends, and does not skip for ever.
///
/// It takes the reports of any path. Give it the report of each step, because it counts no other steps.
///
/// ```
/// use gradclip::{Clip, Clipper, ConsecutiveSkips, TensorMut};
/// let (clip, mut skips) = (Clip::norm(1.0).skip_above(100.0), ConsecutiveSkips::new(2));
/// let mut step = |gradient: f32| {
///     let report = Clipper::auto().apply(&clip, &mut [TensorMut::new(&mut [gradient])])?;
///     skips.count(&report)
/// };
/// assert!(step(200.0).is_ok() && step(1.0).is_ok() && step(200.0).is_ok());
/// assert_eq!(step(300.0).unwrap_err().to_string().split(':').next(), Some("2 steps in a row were skipped"));
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsecutiveSkips {
    max_consecutive: u32,
    count: u32,
}

impl ConsecutiveSkips {
    /// The skip of this number in a row is an error; 0 counts as 1.
    #[must_use]
    pub fn new(max_consecutive: u32) -> Self {
        Self { max_consecutive: max_consecutive.max(1), count: 0 }
    }

    /// Takes in the report of a step.
    ///
    /// # Errors
    /// [`Error::SkippedInARow`] if this skip is one too many, and at each that follows it.
    pub fn count(&mut self, report: &ClipReport) -> Result<(), Error> {
        self.count = if report.skipped.is_some() { self.count.saturating_add(1) } else { 0 };
        if self.count < self.max_consecutive { Ok(()) } else { Err(Error::SkippedInARow { count: self.count }) }
    }
}

//! The cases of a benchmark: what each does, and how it is timed and checked.

use std::time::Instant;

use gradclip::{Clip, Dtype};
use gradclip_common::throughput::{CASES, Case, Row};
use indicatif::ProgressBar;

use super::gradients::{BOUND, Pattern, TensorSet};
use super::timer::{Bandwidth, PassTime, StepTimer, median};
use crate::failure::Failure;

/// The clip of a case, of gradients with this norm.
fn clip_of(case: Case, norm: f64) -> Clip {
    match case {
        Case::Norm => Clip::norm(f64::INFINITY),
        Case::Unclipped => Clip::norm(2.0 * norm),
        Case::Clipped => Clip::norm(norm / 2.0).eps(0.0),
        Case::Value => Clip::value(BOUND),
    }
}

const LEAST_RUNS: usize = 3;
const MOST_RUNS: usize = 1000;

/// Times cases on one set of gradients, and checks every result.
pub(super) struct Measurement<'a> {
    pub(super) pattern: &'a Pattern,
    pub(super) set: &'a TensorSet,
    pub(super) bandwidth: &'a Bandwidth,
    /// The device, for messages.
    pub(super) device: String,
    /// The relative error that a norm may have.
    pub(super) tolerance: f64,
    /// How long each case is repeated, in seconds.
    pub(super) seconds: f64,
}

impl Measurement<'_> {
    /// The clips of all cases, in their order.
    pub(super) fn clips(&self) -> Vec<Clip> {
        let norm = self.pattern.norm(self.set, false);
        CASES.iter().map(|case| clip_of(*case, norm)).collect()
    }

    /// Times every case; with `passes` also the passes of a clipped step.
    pub(super) fn run(
        &self,
        timer: &mut dyn StepTimer,
        passes: bool,
        bar: &ProgressBar,
    ) -> Result<(Vec<Row>, Vec<PassTime>), Failure> {
        let (dtype, set) = (self.pattern.dtype, self.set);
        timer.restore()?;
        let mut rows = Vec::new();
        for case in CASES {
            let mut seconds = self.time(timer, case)?;
            let median = median(&mut seconds);
            let bytes = case.bytes(dtype, set.elements) as f64;
            rows.push(Row {
                dtype,
                elements: set.elements,
                tensors: set.tensors.len(),
                case,
                seconds: median,
                seconds_min: seconds[0],
                runs: seconds.len(),
                gb_s: bytes / 1e9 / median,
                of_copy: bytes / median / self.bandwidth.copy,
            });
            bar.inc(1);
        }
        let passes = if passes { timer.passes(Case::Clipped as usize)? } else { Vec::new() };
        Ok((rows, passes))
    }

    /// The seconds of each run. Before a run the gradients are as they were generated.
    fn time(&self, timer: &mut dyn StepTimer, case: Case) -> Result<Vec<f64>, Failure> {
        let Self { pattern, set, tolerance, .. } = *self;
        let norm = pattern.norm(set, false);
        let mut start = Instant::now();
        let mut seconds = Vec::new();
        for run in 0..=MOST_RUNS {
            let (took, report) = if case == Case::Norm { timer.measure()? } else { timer.apply(case as usize)? };
            if took <= 0.0 {
                return Err(Failure::Setup("the clock of this device stands still: use --host-clock".into()));
            }
            if report.clipped != case.writes() {
                return Err(self.wrong(case, &format!("its report has clipped = {}", report.clipped)));
            }
            if case != Case::Value {
                self.check(case, "norm", report.total_norm, norm, tolerance)?;
            }
            if case.writes() {
                let left = timer.measure()?.1.total_norm;
                let expected = if case == Case::Value { pattern.norm(set, true) } else { norm / 2.0 };
                // Products are rounded once, to 24, 11 or 8 bits.
                let rounding = match pattern.dtype {
                    Dtype::F16 => 2f64.powi(-11),
                    Dtype::BF16 => 2f64.powi(-8),
                    _ => 2f64.powi(-20),
                };
                self.check(case, "norm of the result", left, expected, rounding + tolerance)?;
                timer.restore()?;
            }
            if run == 0 {
                // The first run warms up, and compiles.
                start = Instant::now();
            } else {
                seconds.push(took);
            }
            if seconds.len() >= LEAST_RUNS && start.elapsed().as_secs_f64() >= self.seconds {
                break;
            }
        }
        Ok(seconds)
    }

    fn check(&self, case: Case, what: &str, got: f64, expected: f64, tolerance: f64) -> Result<(), Failure> {
        // False for NaN.
        let within = (got / expected - 1.0).abs() <= tolerance;
        if within { Ok(()) } else { Err(self.wrong(case, &format!("the {what} is {got}, not {expected}"))) }
    }

    fn wrong(&self, case: Case, what: &str) -> Failure {
        let (device, case) = (&self.device, case.name());
        Failure::Setup(format!("wrong result of {device} in the case {case}: {what}; try gradclip verify"))
    }
}

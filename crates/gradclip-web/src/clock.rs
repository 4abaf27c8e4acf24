//! Time of a step, where a browser rounds the device's timestamps to 100 µs or gives none.
//!
//! Many steps are timed together, so that a rounded timestamp is off by little. They are timed by both clocks, in runs of
//! n and of 2 n steps. The difference of two runs is free of what a submission costs the host. The device's clock counts
//! only if it agrees with that difference: those of some drivers stand still, or tick in other units.

use serde::Serialize;

/// One submission of steps, timed by both clocks, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// How many steps were submitted together.
    pub steps: u32,
    /// From the submission to its end, by the host's clock.
    pub host: f64,
    /// From the first step to the last, by the device's clock if it has one.
    pub device: Option<f64>,
}

/// Whose clock a time is by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The device's timestamps.
    Device,
    /// The host's clock.
    Host,
}

/// The time of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Timing {
    /// The median, in seconds; 0 if no clock moved.
    pub seconds: f64,
    /// The shortest.
    pub seconds_min: f64,
    /// How many steps were timed.
    pub steps: u32,
    /// The clock that both are by.
    pub clock: Clock,
}

/// By how much the clocks may differ, in a busy browser.
const AGREE: f64 = 0.25;

/// The time of a step, from runs of n steps and runs of more.
#[must_use]
pub fn timing(short: &[Run], long: &[Run]) -> Timing {
    let host = |runs: &[Run]| median(runs.iter().map(|run| run.host));
    let steps = |runs: &[Run]| runs.first().map_or(0, |run| run.steps);
    let more = f64::from(steps(long).saturating_sub(steps(short)));
    let each = |run: &Run, seconds: f64| seconds / f64::from(run.steps.max(1));
    let by_host = (host(long) - host(short)) / more;
    // A busy host may take longer for less. What a submission costs then stays in.
    let whole = median(long.iter().map(|run| each(run, run.host)));
    let by_host = if by_host > 0.0 { by_host } else { whole };
    let all = || short.iter().chain(long);
    let count = all().map(|run| run.steps).sum();
    let by_device: Vec<_> = long.iter().filter_map(|run| Some(each(run, run.device?))).collect();
    let device = median(by_device.iter().copied());
    if by_device.len() == long.len() && (device / by_host - 1.0).abs() <= AGREE {
        return Timing { seconds: device, seconds_min: least(&by_device), steps: count, clock: Clock::Device };
    }
    let whole: Vec<_> = all().map(|run| each(run, run.host)).collect();
    Timing { seconds: by_host, seconds_min: by_host.min(least(&whole)), steps: count, clock: Clock::Host }
}

fn least(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}

/// The median; 0 of nothing.
fn median(seconds: impl Iterator<Item = f64>) -> f64 {
    let mut seconds: Vec<_> = seconds.collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or_default()
}

/// How many steps to time together, if `steps` took `seconds`: twice as many until they take long enough for a clock that
/// moves in steps of 100 µs. None if these are enough.
#[must_use]
pub fn more(steps: u32, seconds: f64) -> Option<u32> {
    (seconds < ENOUGH && steps < MOST_STEPS).then_some(2 * steps)
}

/// 300 times the step of a browser's timestamps, in seconds.
const ENOUGH: f64 = 0.03;

/// A browser records each step anew, in JavaScript.
const MOST_STEPS: u32 = 1024;

/// The step of a clock: the greatest common divisor of the differences of its readings, in its own unit.
#[must_use]
pub fn step_of(readings: &[u64]) -> Option<u64> {
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let step = readings.windows(2).map(|pair| pair[1].abs_diff(pair[0])).fold(0, gcd);
    (step > 0).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three runs of so many steps: each takes `step`, a submission costs the host 2 ms more, and the device's clock is
    /// rounded to 100 µs.
    fn runs(steps: u32, step: f64, device: impl Fn(f64) -> Option<f64>) -> Vec<Run> {
        let run = |noise: f64| {
            let seconds = f64::from(steps) * step;
            let device = device(seconds).map(|seconds| (seconds / 1e-4).round() * 1e-4);
            Run { steps, host: seconds + 2e-3 + noise, device }
        };
        [0.0, 5e-4, 1e-4].map(run).into()
    }

    #[test]
    fn rounded_timestamps_are_good_to_a_percent_over_many_steps() {
        for step in [3e-5, 2e-4, 1.7e-3, 4e-2] {
            let mut steps = 1;
            while let Some(more) = more(steps, f64::from(steps) * step) {
                steps = more;
            }
            let found = timing(&runs(steps, step, Some), &runs(2 * steps, step, Some));
            assert_eq!(found.clock, Clock::Device, "{step}");
            assert!((found.seconds / step - 1.0).abs() < 0.01, "{step}: {found:?}");
        }
    }

    #[test]
    fn without_timestamps_the_cost_of_a_submission_is_left_out() {
        let found = timing(&runs(32, 1e-3, |_| None), &runs(64, 1e-3, |_| None));
        assert_eq!((found.clock, found.steps), (Clock::Host, 3 * (32 + 64)));
        assert!((found.seconds / 1e-3 - 1.0).abs() < 0.03, "{found:?}");
    }

    #[test]
    fn a_device_clock_that_disagrees_with_the_host_does_not_count() {
        for wrong in [0.0, 0.5, 1.5, 1000.0] {
            let device = |seconds: f64| Some(seconds * wrong);
            let found = timing(&runs(32, 1e-3, device), &runs(64, 1e-3, device));
            assert_eq!(found.clock, Clock::Host, "{wrong}");
            assert!((found.seconds / 1e-3 - 1.0).abs() < 0.03, "{wrong}: {found:?}");
        }
    }

    #[test]
    fn a_host_that_stalls_in_the_short_runs_gives_no_negative_time() {
        let slow: Vec<_> = runs(32, 1e-3, |_| None).iter().map(|run| Run { host: 0.2, ..*run }).collect();
        let found = timing(&slow, &runs(64, 1e-3, |_| None));
        assert!(found.seconds > 1e-3 && found.seconds < 1.1e-3, "{found:?}");
        assert_eq!(timing(&[], &[]).seconds, 0.0);
    }

    #[test]
    fn the_step_of_a_clock_is_found() {
        assert_eq!(step_of(&[100_000, 100_000, 400_000, 500_000, 1_100_000]), Some(100_000));
        assert_eq!(step_of(&[5, 12, 10]), Some(1));
        assert_eq!((step_of(&[7, 7, 7]), step_of(&[]), step_of(&[3])), (None, None, None));
    }
}

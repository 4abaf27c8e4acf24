//! Tuning a device: no row is taken that is not faster, and none whose norms are wrong.

#![cfg(feature = "gpu")]

use std::time::Duration;

use crate::common::gpu::{adapter, clipper};
use gradclip::gpu::GpuClipper;
use gradclip::wgpu;

/// A device whose buffers hold 1 Mi elements, so that a row takes less than a second.
fn small() -> GpuClipper {
    clipper(wgpu::Limits { max_buffer_size: 4 << 20, ..adapter().limits() })
}

#[test]
fn the_own_row_is_compared_with_itself_first() {
    let gpu = small();
    let mut seen = Vec::new();
    let tuned = gpu.tune(Duration::ZERO, |trial| seen.push(trial.clone())).wait().expect("it can be tuned");
    let own = &tuned.trials[0];
    assert_eq!((tuned.trials.len(), tuned.complete, tuned.tuning), (1, false, own.tuning));
    assert_eq!(seen, tuned.trials);
    assert_eq!((own.rounds.len(), own.speeds.len(), own.taken), (1, 3, true));
    assert!(own.rounds[0] > 0.0 && own.speeds.iter().all(|speed| *speed > 0.0 && speed.is_finite()), "{own:?}");
}

#[test]
fn rows_are_taken_only_if_two_rounds_are_faster() {
    let gpu = small();
    let tuned = gpu.tune(Duration::from_secs(10), |_| ()).wait().expect("it can be tuned");
    assert!(tuned.trials.len() > 1, "{tuned:?}");
    for trial in &tuned.trials[1..] {
        let faster = trial.rounds.len() == 2 && trial.rounds.iter().all(|ratio| *ratio < 0.95);
        assert_eq!(trial.taken, faster, "{trial:?}");
        // Each row is a new one, and can be used.
        assert_eq!(tuned.trials.iter().filter(|other| other.tuning == trial.tuning).count(), 1);
        gpu.with_tuning(trial.tuning).expect("it is valid");
    }
    let last = tuned.trials.iter().rfind(|trial| trial.taken).expect("the own row");
    assert_eq!(tuned.tuning, last.tuning);
}

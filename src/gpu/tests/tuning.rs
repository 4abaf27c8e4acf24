//! Tests of `src/gpu/tuning.rs`.

use super::*;

/// Chunks that a large workgroup can walk are too long for the loops of a small one.
#[test]
fn tunings_that_are_narrowed_keep_their_bounds() {
    let long = Tuning { min_chunk_words: 1 << 20, merged_partials: 1 << 20, ..HARDWARE };
    for tuning in [HARDWARE, SOFTWARE, long] {
        for invocations in [8, 16, 100, 256, 1024] {
            let mut narrowed = tuning;
            narrowed.narrow(invocations);
            assert!(narrowed.workgroup <= invocations && narrowed.check().is_ok(), "{narrowed:?}");
        }
    }
}

/// A row that is tried and cannot be used would end the search.
#[test]
fn fitted_rows_keep_their_bounds() {
    for tuning in [HARDWARE, SOFTWARE] {
        for workgroup in [8, 16, 64, 256, 1024] {
            let fitted = Tuning { workgroup, ..tuning }.fitted();
            assert!(fitted.check().is_ok(), "{fitted:?}");
        }
    }
}

/// On a card with small bindings the sums of a plain read did not fit.
#[test]
fn plain_passes_fit_the_device() {
    for sweep in [HARDWARE_SWEEP, SOFTWARE_SWEEP] {
        for bindable in [1 << 16, 1 << 20, 1 << 31] {
            let limits = wgpu::Limits { max_compute_invocations_per_workgroup: 128, ..wgpu::Limits::default() };
            let fitted = sweep.fitted(&limits, bindable);
            let sums = SUM_BYTES * u64::from(fitted.workgroup) * u64::from(fitted.workgroups);
            assert!(fitted.workgroup <= 128 && fitted.workgroups > 0 && sums <= bindable, "{fitted:?}");
        }
    }
}

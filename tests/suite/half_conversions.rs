//! Guards against halves that are converted or rounded another way by the device's own arithmetic than in integers, and
//! against a clamp by bits that differs from one by numbers: for every float16 and every bfloat16, on each device.
#![cfg(feature = "gpu")]

use std::sync::OnceLock;

use crate::common::gpu::{clip_in_one_buffer, gpu};
use crate::common::{Data, Path, assert_same_bits};
use gradclip::gpu::GpuClipper;
use gradclip::gpu::tuning::Tuning;
use gradclip::{Clip, Dtype, NonFinite};

/// With the device's own arithmetic as far as it is right, without its conversions, and without its products.
fn ways() -> &'static [(&'static str, GpuClipper)] {
    static WAYS: OnceLock<Vec<(&'static str, GpuClipper)>> = OnceLock::new();
    WAYS.get_or_init(|| {
        let mut tuning = Tuning::of(&gpu().device().adapter_info());
        // Whole blocks of quads in every workgroup.
        tuning.min_chunk_words = 1 << 10;
        let mut way = |native_products, native_halves| {
            (tuning.native_products, tuning.native_halves) = (native_products, native_halves);
            gpu().with_tuning(tuning).expect("valid")
        };
        vec![("native", way(true, true)), ("integer halves", way(true, false)), ("integers", way(false, false))]
    })
}

/// Every bit pattern: all of them, or the finite ones.
fn all(dtype: Dtype, finite: bool) -> Data {
    let infinite = if dtype == Dtype::F16 { 0x7c00 } else { 0x7f80 };
    let patterns = (0..=u16::MAX).filter(|bits| !finite || bits & 0x7fff < infinite);
    Data::from_bytes(dtype, patterns.flat_map(u16::to_le_bytes).collect())
}

/// Clips copies on the CPU and each way; all must have the same bits.
#[track_caller]
fn check(clip: &Clip, set: &[Data], what: &str) {
    let (_, want) = Path::Cpu.clip(clip, set).ok();
    for (way, gpu) in ways() {
        let (_, after) = clip_in_one_buffer(gpu, clip, set).ok();
        assert_same_bits(&after, &want, &format!("{what}, {way}"));
    }
}

/// Products of all halves with factors that make many ties: halves of subnormal ones, 12 bits of others, all subnormal
/// ones, and some that overflow.
#[test]
fn products_of_every_half_are_rounded_alike() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let set = [all(dtype, true)];
        for factor in [1.0 / 3.0, 0.5, 0.75, 0.999, 1.5, 2f64.powi(-10), 1.25 * 2f64.powi(-14), 3.0 * 2f64.powi(15)] {
            check(&Clip::norm(f64::MAX).grad_scale(1.0 / factor), &set, &format!("{dtype} times {factor}"));
        }
    }
}

/// Beside elements that are not finite, which have to be found before the device converts them.
#[test]
fn every_pattern_is_read_alike() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let set = [all(dtype, false)];
        for clip in [Clip::norm(f64::MAX), Clip::value(f64::MAX), Clip::value(1.0)] {
            let clip = clip.grad_scale(2.0).non_finite(NonFinite::Drop);
            check(&clip, &set, &format!("{dtype} {clip:?}"));
        }
    }
}

/// Bounds on both sides of 0 are compared by bits, others by numbers.
#[test]
fn every_half_is_clamped_alike() {
    let inf = f64::INFINITY;
    let bounds = [
        (-1.0, 1.0),
        (-0.3, 7.0),
        (-1e-7, 1e-7),
        (-inf, 1.0),
        (-60000.0, inf),
        (0.0, 1.0),
        (-1.0, 0.0),
        (0.5, 2.0),
        (1e6, 1e7),
        (-1e7, -1e6),
    ];
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        let halves = all(if dtype == Dtype::F32 { Dtype::BF16 } else { dtype }, true);
        let set = [if dtype == Dtype::F32 { Data::rounded(dtype, halves.numbers()) } else { halves }];
        for (min, max) in bounds {
            for scale in [1.0, 3.0] {
                let clip = Clip::range(min, max).grad_scale(scale);
                check(&clip, &set, &format!("{dtype} from {min} to {max}, by {scale}"));
            }
        }
    }
}

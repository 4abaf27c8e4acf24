//! Guards against norms that overflow or vanish because squares do, and against factors and products that float32
//! cannot hold: gradients around 1e20, 1e38, 1e-25 and below the normal range.

use crate::common::numbers::{Random, exact_norm, multiplied_bits, ulp};
use crate::common::{Data, POLICIES, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::processes::thread_group;
use gradclip::{Clip, ClipReport, Clipper, Dtype, NormAccumulator, NormType, Scope, Tensor, TensorMut};

const POWERS: [f64; 13] = [1.0, 2.0, f64::INFINITY, 1.0 / 1024.0, 0.25, 0.5, 1.5, 3.0, 4.0, 7.5, 64.0, 1e6, f64::MAX];

fn norm_types() -> impl Iterator<Item = NormType> {
    POWERS.iter().map(|p| NormType::p(*p))
}

fn clip(max_norm: f64, norm_type: NormType) -> Clip {
    Clip::norm(max_norm).norm_type(norm_type).eps(0.0)
}

/// Numbers of both signs between half of `size` and all of it.
fn around(dtype: Dtype, size: f64, n: usize) -> Data {
    let mut random = Random(n as u64);
    let number = |_| size * (0.5 + random.uniform() / 2.0) * if random.below(2) == 0 { 1.0 } else { -1.0 };
    Data::rounded(dtype, (0..n).map(number))
}

fn sets() -> Vec<(&'static str, Vec<Data>)> {
    use Dtype::{BF16, F16, F32, F64};
    vec![
        ("1e20", vec![around(F32, 1e20, 5000), around(F32, 1e20, 3)]),
        ("1e38", vec![around(F32, 1e38, 5000), around(F32, 3.4e38, 77)]),
        ("1e-25", vec![around(F32, 1e-25, 5000)]),
        ("1e-38", vec![around(F32, 1.2e-38, 5000)]),
        ("subnormal 1e-40", vec![around(F32, 1e-40, 5000), around(F32, 1e-42, 10)]),
        ("the smallest subnormal", vec![Data::of(&[f32::from_bits(1)])]),
        ("many of the smallest subnormal", vec![Data::of(&[-f32::from_bits(1); 4097])]),
        ("1e20 and 1e-25", vec![around(F32, 1e-25, 3000), around(F32, 1e20, 100), around(F32, 1e-25, 3000)]),
        ("1e-25 and 1e-40", vec![around(F32, 1e-40, 3000), around(F32, 1e-25, 10), around(F32, 1e-40, 3000)]),
        ("every exponent of float32, upwards", vec![Data::rounded(F32, (-149..128).map(|e| 2f64.powi(e)))]),
        ("every exponent of float32, downwards", vec![Data::rounded(F32, (-149..128).rev().map(|e| -2f64.powi(e)))]),
        ("small exponents of float32, upwards", vec![Data::rounded(F32, (-149..-90).map(|e| 1.5 * 2f64.powi(e)))]),
        ("float16 at its largest", vec![around(F16, 65504.0, 9001)]),
        ("float16 subnormals", vec![around(F16, 6e-5, 5000), around(F16, 2f64.powi(-24), 9)]),
        ("bfloat16 3e38", vec![around(BF16, 3e38, 5000)]),
        ("bfloat16 1e-38", vec![around(BF16, 1.2e-38, 5000)]),
        ("bfloat16 subnormals", vec![around(BF16, 9e-41, 5000)]),
        ("bfloat16 of every size", vec![around(BF16, 1e-30, 999), around(BF16, 1e30, 999), around(BF16, 1.0, 999)]),
        ("float64 1e200", vec![around(F64, 1e200, 5000)]),
        ("float64 1e300", vec![around(F64, 1e300, 5000)]),
        ("float64 1e-200", vec![around(F64, 1e-200, 5000)]),
        ("float64 1e-300", vec![around(F64, 1e-300, 5000)]),
        ("float64 of both sizes", vec![around(F64, 1e-200, 5000), around(F64, 1e200, 5000), around(F32, 1.0, 10)]),
        ("float64 from 1e-170 to 1e-130", vec![around(F64, 1e-170, 5000), around(F64, 1e-130, 2)]),
    ]
}

/// Each set on each path that clips it, with each norm.
fn on_each(mut test: impl FnMut(Path, &str, &[Data], NormType, f64)) {
    for (name, set) in sets() {
        for norm_type in norm_types() {
            let norm = exact_norm(norm_type, numbers_of(&set));
            for path in Path::ALL {
                if set.iter().all(|t| path.dtypes().contains(&t.dtype)) {
                    test(*path, name, &set, norm_type, norm);
                }
            }
        }
    }
}

#[test]
fn norms_neither_overflow_nor_vanish() {
    on_each(|path, name, set, norm_type, norm| {
        let what = format!("{name}, {norm_type:?}, {path:?}");
        // With a small p some leave even the range of float64: to infinity then, not NaN.
        let (report, after) = path.clip(&clip(f64::INFINITY, norm_type), set).ok();
        assert_norm(report.total_norm, norm, path.tolerance_of(norm_type), &what);
        assert_same_bits(&after, set, &what);
    });
}

/// Float32 subnormals are scaled exactly on the GPU too, whatever the device flushes.
#[test]
fn clipped_gradients_are_scaled_rightly() {
    on_each(|path, name, set, norm_type, norm| {
        for coefficient in [0.37, 0.999, 1e-3, 1e-12] {
            let what = format!("{name}, {norm_type:?}, {path:?}, by {coefficient}");
            let max_norm = norm * coefficient;
            if max_norm < 1e-300 || max_norm == f64::INFINITY {
                continue;
            }
            let (report, after) = path.clip(&clip(max_norm, norm_type), set).ok();
            assert!(report.clipped, "{what}");
            let tolerance = path.tolerance_of(norm_type);
            assert_norm(report.clip_coef, coefficient, tolerance, &what);
            assert_scaled(set, &after, max_norm / norm, tolerance, &what);
        }
    });
}

/// The parameter's norm, 1e310, exceeds float64 with a p that small; so does the gradient's, which is half.
#[test]
fn norms_of_parameters_may_exceed_float64() {
    for path in Path::ALL {
        let set = [Data::of(&[5e9f32; 1000]).with_parameter(Data::of(&[1e10f32; 1000]))];
        let clip = Clip::agc(0.1).norm_type(NormType::p(0.01));
        let (report, after) = path.clip(&clip, &set).ok();
        let tolerance = 2.0 * path.tolerance_of(NormType::p(0.01));
        assert_norm(report.clip_coef, 0.2, tolerance, &format!("{path:?}"));
        assert_scaled(&set, &after, 0.2, tolerance, &format!("{path:?}"));
    }
    let set = [Data::of(&[1e308f64; 2]).with_parameter(Data::of(&[1.7e308f64; 2]))];
    assert_norm(Path::Cpu.clip(&Clip::agc(0.1), &set).ok().0.clip_coef, 0.17, 1e-12, "float64");
}

/// (gradients, max_norm, grad_scale): factors below and above the range of float32, with results inside it.
#[test]
fn factors_beyond_float32_are_applied_exactly() {
    let cases: [(Dtype, f64, f64, f64); 14] = [
        (Dtype::F32, 1e20, 1e-30, 1.0),
        (Dtype::F32, 1e20, 1e-30, 2f64.powi(100)),
        (Dtype::F32, 1e20, 1e-22, 2f64.powi(-100)),
        (Dtype::F32, 1e-25, 1e-27, 2f64.powi(-100)),
        (Dtype::F32, 1e-25, 1e6, 2f64.powi(-100)),
        (Dtype::F32, 1e38, 1e-37, 1.0),
        (Dtype::F32, 1e38, 1e-42, 1.0),
        (Dtype::F32, 1e30, 1e30, 2f64.powi(140)),
        (Dtype::F32, 1e-40, 1e30, 2f64.powi(-140)),
        (Dtype::F32, 1e-40, 1.0, 2f64.powi(-140)),
        (Dtype::F32, 1e-30, 1e-40, 1e10),
        (Dtype::BF16, 1e38, 1e-30, 3.0),
        (Dtype::BF16, 1e-38, 1e30, 2f64.powi(-130)),
        (Dtype::F16, 1e-7, 1e30, 2f64.powi(-20)),
    ];
    for path in Path::ALL {
        for (dtype, size, max_norm, grad_scale) in cases {
            let what = format!("{path:?}: {dtype} {size:e} to {max_norm:e}, grad_scale {grad_scale:e}");
            let set = [around(dtype, size, 1000), around(dtype, size / 1000.0, 1001)];
            let norm = exact_norm(NormType::L2, numbers_of(&set)) / grad_scale;
            let coefficient = (max_norm / norm).min(1.0);
            let clip = clip(max_norm, NormType::L2).grad_scale(grad_scale);
            let (report, after) = path.clip(&clip, &set).ok();
            assert_norm(report.total_norm, norm, path.norm_tolerance(), &what);
            assert_norm(report.clip_coef, coefficient, path.norm_tolerance(), &what);
            assert_scaled(&set, &after, coefficient / grad_scale, path.norm_tolerance(), &what);
            assert!(numbers_of(&after).any(|x| x != 0.0), "{what}: nothing is left");
        }
    }
}

/// Dividing by a power of two, down into the subnormals and up into infinity: exact, so every bit is known.
#[test]
fn loss_scales_reach_both_ends_of_the_range() {
    for path in Path::ALL {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let set = [
                around(dtype, 1.0, 501),
                around(dtype, 3.0 * ulp(dtype, 0.0), 64),
                around(dtype, if dtype == Dtype::F16 { 6e4 } else { 3e38 }, 77),
                Data::rounded(dtype, [0.0, -0.0, 1.5, -1.25]),
            ];
            for exponent in [-127, -126, -125, -60, -24, -14, -1, 1, 9, 24, 25, 60, 125, 126, 127, 130] {
                let grad_scale = 2f64.powi(exponent);
                let clip = clip(f64::INFINITY, NormType::Inf).grad_scale(grad_scale);
                let (report, after) = path.clip(&clip, &set).ok();
                assert!(!report.clipped);
                let mut want = set.to_vec();
                for t in &mut want {
                    for i in 0..t.len() {
                        let exact = t.get(i) / grad_scale;
                        t.set(i, exact);
                    }
                }
                assert_same_bits(&after, &want, &format!("{path:?} {dtype} 2^{exponent}"));
            }
        }
    }
}

/// Products that leave the normal range are rounded like all others: once, with the same factor.
#[test]
fn products_below_the_normal_range_are_rounded_once() {
    for path in Path::ALL {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let set = [around(dtype, 1e-36, 2000), around(dtype, 1e-38, 2000), around(dtype, 1e-40, 2000)];
            for grad_scale in [3.0, 1000.0, 7e-3, 12345.678] {
                let clip = clip(f64::MAX, NormType::L2).grad_scale(grad_scale);
                let (_, after) = path.clip(&clip, &set).ok();
                let mut want = set.to_vec();
                for t in &mut want {
                    for i in 0..t.len() {
                        let bits = multiplied_bits(dtype, t.get(i), 1.0 / grad_scale);
                        t.set_bits(i, bits);
                    }
                }
                assert_same_bits(&after, &want, &format!("{path:?} {dtype} / {grad_scale}"));
            }
        }
    }
}

/// The norm over `grad_scale` is a finite float64, although the norm before the division is not.
#[test]
fn a_loss_scale_brings_a_huge_norm_into_range() {
    let set = [Data::of(&[1.5e308; 4])];
    let clip = clip(1e303, NormType::L2).grad_scale(65536.0);
    let (report, after) = Path::Cpu.clip(&clip, &set).ok();
    let norm = 1.5e308 / 65536.0 * 2.0;
    assert_norm(report.total_norm, norm, 1e-7, "float64");
    assert_scaled(&set, &after, 1e303 / norm / 65536.0, 1e-7, "float64");
}

/// The norm before the division by `grad_scale` is a subnormal float64, which has few digits.
#[test]
fn a_loss_scale_keeps_the_digits_of_a_tiny_norm() {
    let set = [Data::of(&[f64::from_bits(3); 2])];
    let clip = clip(f64::INFINITY, NormType::L2).grad_scale(2f64.powi(-100));
    let (report, _) = Path::Cpu.clip(&clip, &set).ok();
    let norm = f64::from_bits(3) * 2f64.powi(100) * 2f64.sqrt();
    assert_norm(report.total_norm, norm, 1e-7, "float64");
}

/// Sums of a few elements that a float32 cannot hold, whatever a driver makes of the order of operations.
#[test]
fn a_few_of_the_largest_floats_add_up() {
    for path in Path::ALL {
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
            for n in [1, 2, 3, 4, 5, 16, 17, 64, 1000] {
                let set = [Data::of(&vec![f32::MAX; n]), Data::of(&vec![-f32::MAX; n])];
                let (report, _) = path.clip(&clip(f64::INFINITY, norm_type), &set).ok();
                let norm = exact_norm(norm_type, numbers_of(&set));
                assert_norm(report.total_norm, norm, path.norm_tolerance(), &format!("{path:?} {norm_type:?}, {n}"));
            }
        }
    }
}

/// Finite float64 gradients whose norm exceeds float64, on every path that takes float64.
#[test]
fn norms_that_exceed_float64() {
    let (two, eight) = ([1.7e308; 2], [f64::MAX; 8]);
    let l1 = Clip::norm(1.0).norm_type(NormType::L1);
    let cubic = Clip::norm(1e308).norm_type(NormType::P(3.0)).eps(0.0);
    for (clip, set, coef) in [
        (Clip::norm(1.0), &two[..], 1.0 / 1.7e308 * 0.5f64.sqrt()),
        (Clip::norm(1.5e308).scope(Scope::Tensor), &two, 1.5 / 1.7 * 0.5f64.sqrt()),
        (l1, &eight, 1.0 / f64::MAX / 8.0),
        (l1.grad_scale(0.25), &eight, 1.0 / f64::MAX / 32.0),
        (cubic, &eight, 1e308 / f64::MAX / 2.0),
        (Clip::rms(1.7e308), &two, 1.0),
        (Clip::rms(0.85e308), &two, 0.5),
        (Clip::average_norm(1e307), &eight, 1e307 / f64::MAX * 8f64.sqrt()),
    ] {
        for policy in POLICIES {
            let (clip, tensors) = (clip.non_finite(policy), [Tensor::new(set)]);
            let factor = coef / clip.grad_scale;
            let check = |report: &ClipReport, after: &[f64], what: &str| {
                let right = |x: f64, before: f64| (x / before / factor - 1.0).abs() < 1e-12;
                assert!(after.iter().zip(set).all(|(x, before)| right(*x, *before)), "{what}: {clip}: {after:?}");
                assert!(!report.has_non_finite(), "{what}: {clip}");
                assert!(report.clip_coef == 1.0 || (report.clip_coef / coef - 1.0).abs() < 1e-12, "{what}: {clip}");
            };
            let cpu = Clipper::cpu();
            let mut after = set.to_vec();
            let report = cpu.apply(&clip, &mut [TensorMut::new(&mut after)]).expect("finite");
            check(&report, &after, "apply");
            let decided = cpu.decide(&clip, &tensors).expect("finite");
            let mut after = set.to_vec();
            decided.apply(0, 0, &mut TensorMut::new(&mut after)).expect("a piece");
            check(&decided.report(), &after, "decide");
            if clip.scope == Scope::Global {
                let mut accumulator = NormAccumulator::new(&clip).expect("it measures a norm");
                cpu.accumulate(&mut accumulator, &tensors).expect("finite");
                let mut after = set.to_vec();
                let report = cpu.finish(&accumulator, &mut [TensorMut::new(&mut after)]).expect("finite");
                check(&report, &after, "accumulate");
            }
            let ranks = thread_group(2, None).into_iter().zip(set.chunks(set.len() / 2)).map(|(group, part)| {
                let mut after = part.to_vec();
                std::thread::spawn(move || {
                    let clipper = Clipper::cpu().processes(group);
                    let report = clipper.apply(&clip, &mut [TensorMut::new(&mut after)]).expect("finite");
                    (report, after)
                })
            });
            for rank in ranks.collect::<Vec<_>>() {
                let (report, after) = rank.join().expect("no panic");
                check(&report, &after, "two ranks");
            }
        }
    }
}

/// The device finds roots and quotients by floats, which drivers round in many ways, and mends them in integers.
#[cfg(feature = "gpu")]
#[test]
fn roots_and_quotients_are_those_of_integers() {
    let mut random = Random(31);
    let mut elements: Vec<f32> = (0..3000).map(|_| 2f64.powf(1.0 + 30.0 * random.uniform()) as f32).collect();
    elements.extend([1.0, 1.0f32.next_up(), 2.0, 2.0f32.next_up(), 2.0f32.next_down(), 4.0f32.next_down(), 3.0]);
    let set = Data::of(&elements).shaped(&[elements.len(), 1]);
    let clip = Clip::norm(0.75).eps(0.0).scope(Scope::Unit);
    let (report, _) = Path::GpuBuffers.clip(&clip, &[set]).ok();
    for (x, segment) in elements.iter().zip(&report.segments) {
        // Numbers have 32 bits and are truncated; x² is a float32.
        let (mut scaled, mut twos) = (f64::from(x * x), 0);
        while scaled < 2f64.powi(62) {
            (scaled, twos) = (4.0 * scaled, twos + 1);
        }
        let root = (scaled as u64).isqrt();
        assert_eq!(segment.norm, root as f64 * 2f64.powi(-twos), "the norm of {x:e}");
        let quotient = (58..).map(|power| (power, (3u128 << power) / u128::from(root))).find(|(_, q)| *q >= 1 << 31);
        let (power, quotient) = quotient.expect("powers grow");
        let factor = quotient as f64 * 2f64.powi(twos - power - 2);
        assert_eq!(segment.clip_coef, f64::from(factor as f32), "the coefficient of {x:e}");
    }
}

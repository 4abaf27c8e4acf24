//! Guards against formulas, defaults, roundings and reports that differ from the documentation.

use crate::common::numbers::{Random, exact_norm, multiplied_bits, rounded};
use crate::common::{Data, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::{Clip, ClipReport, Dtype, NonFinite, NormType};

fn norm(max_norm: f64) -> Clip {
    Clip::norm(max_norm)
}

fn eps(max_norm: f64, eps: f64) -> Clip {
    norm(max_norm).eps(eps)
}

fn set_of(dtype: Dtype, numbers: &[f64]) -> Vec<Data> {
    vec![Data::rounded(dtype, numbers.iter().copied())]
}

fn on_each(mut test: impl FnMut(Path, Dtype)) {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            test(*path, *dtype);
        }
    }
}

#[test]
fn the_coefficient_follows_the_formula() {
    let mut random = Random(11);
    let numbers = random.normals(1000, 1.0);
    on_each(|path, dtype| {
        let set = set_of(dtype, &numbers);
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
            for grad_scale in [1.0, 0.125, 3.0, 65536.0] {
                for eps in [0.0, 1e-6, 1.0, 100.0] {
                    for max_norm in [0.0, 1e-3, 1.0, 30.0, 1e5] {
                        let n = exact_norm(norm_type, numbers_of(&set)) / grad_scale;
                        let c = (max_norm / (n + eps)).min(1.0);
                        let what = format!("{path:?} {dtype} {norm_type:?} / {grad_scale}, eps {eps}, max {max_norm}");
                        let clip = norm(max_norm).norm_type(norm_type).eps(eps);
                        let clip = clip.grad_scale(grad_scale);
                        let (report, after) = path.clip(&clip, &set).ok();
                        assert_norm(report.total_norm, n, path.norm_tolerance(), &what);
                        assert_norm(report.clip_coef, c, path.norm_tolerance(), &what);
                        assert_eq!(report.clipped, c < 1.0, "{what}");
                        if c == 1.0 && grad_scale == 1.0 {
                            assert_same_bits(&after, &set, &what);
                        } else {
                            assert_scaled(&set, &after, c / grad_scale, path.norm_tolerance(), &what);
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn eps_is_pytorchs_unless_told_otherwise() {
    on_each(|path, dtype| {
        // N = 5, exactly.
        let set = set_of(dtype, &[3.0, 4.0]);
        let (report, _) = path.clip(&norm(5.0), &set).ok();
        assert!(report.clipped, "5 / (5 + 1e-6) is below 1");
        assert_norm(report.clip_coef, 5.0 / 5.000_001, 1e-7, "5 / (5 + 1e-6)");
        let (report, _) = path.clip(&norm(5.000_002), &set).ok();
        assert!(!report.clipped);
        // Optax and TensorFlow clip only above the threshold.
        let (report, after) = path.clip(&eps(5.0, 0.0), &set).ok();
        assert!(!report.clipped, "N = max_norm is not above it");
        assert_same_bits(&after, &set, "N = max_norm");
        let (report, _) = path.clip(&eps(4.999_99, 0.0), &set).ok();
        assert!(report.clipped);
        // With a loss scale the same, on gradients four times as large.
        let (report, after) = path.clip(&eps(5.0, 0.0).grad_scale(4.0), &set_of(dtype, &[12.0, 16.0])).ok();
        assert!(!report.clipped && report.total_norm == 5.0);
        assert_same_bits(&after, &set, "divided only");
    });
}

/// Just above the threshold the coefficient is just below 1, and never above it, whatever the loss scale rounds to.
#[test]
fn the_coefficient_is_never_above_1() {
    on_each(|path, dtype| {
        for grad_scale in [1.0, 3.0, 5.0, 7.0, 11.0, 1.0 / 3.0, 0.7, 1000.0] {
            for below in [1e-6, 1e-8, 1e-9] {
                let set = set_of(dtype, &[3.0, 4.0]);
                let clip = eps(5.0 / grad_scale * (1.0 - below), 0.0).grad_scale(grad_scale);
                let (report, after) = path.clip(&clip, &set).ok();
                let what = format!("{path:?} {dtype} / {grad_scale}, {below} below: {report:?}");
                assert!(report.clip_coef <= 1.0 && report.clip_coef > 0.999_99, "{what}");
                assert_scaled(&set, &after, (1.0 - below) / grad_scale, path.norm_tolerance(), &what);
            }
        }
    });
}

#[test]
fn thresholds_of_0() {
    on_each(|path, dtype| {
        for clip in [norm(0.0), eps(0.0, 0.0)] {
            let (report, after) = path.clip(&clip, &set_of(dtype, &[3.0, -4.0, 1e-3])).ok();
            assert!(report.clipped && report.clip_coef == 0.0 && report.total_norm > 5.0);
            assert!(numbers_of(&after).all(|x| x == 0.0));
            let (report, after) = path.clip(&clip.grad_scale(2f64.powi(-100)), &set_of(dtype, &[1.0, 2.0])).ok();
            assert!(report.clipped && numbers_of(&after).all(|x| x == 0.0));
        }
        // 0 / 0: nothing exceeds the threshold.
        let zeros = set_of(dtype, &[0.0, -0.0, 0.0]);
        let (report, after) = path.clip(&eps(0.0, 0.0), &zeros).ok();
        assert_eq!((report.total_norm, report.clip_coef, report.clipped), (0.0, 1.0, false));
        assert_same_bits(&after, &zeros, "zeros");
        // 0 / eps.
        let (report, _) = path.clip(&norm(0.0), &zeros).ok();
        assert_eq!((report.total_norm, report.clip_coef, report.clipped), (0.0, 0.0, true));
        let (report, _) = path.clip(&norm(0.1), &zeros).ok();
        assert_eq!((report.total_norm, report.clip_coef, report.clipped), (0.0, 1.0, false));
        // The value clip to nothing.
        let (report, after) = path.clip(&Clip::value(0.0), &set_of(dtype, &[3.0, -4.0, 0.0])).ok();
        assert!(report.clipped && numbers_of(&after).all(|x| x == 0.0));
    });
}

#[test]
fn value_bounds_of_every_kind() {
    let inf = f64::INFINITY;
    let ranges = [
        (-1.0, 1.0),
        (-0.25, 2.0),
        (0.5, 2.0),
        (-2.0, -0.5),
        (-inf, 1.0),
        (-1.0, inf),
        (-inf, inf),
        (0.0, 0.0),
        (0.0, 1.0),
        (-1.0, 0.0),
        (0.75, 0.75),
        (-0.1, 0.1),
        (-1e-3, 1.0 / 3.0),
        (inf, inf),
        (-1e-40, 1e-40),
    ];
    let mut random = Random(12);
    let mut numbers = random.normals(600, 1.0);
    for (min, max) in ranges {
        numbers.extend([min, max, -min, -max].into_iter().filter(|x| x.is_finite()));
    }
    on_each(|path, dtype| {
        let mut set = set_of(dtype, &numbers);
        set.push(Data::rounded(dtype, [-0.0, 0.0, f64::NAN, -0.0, inf, -inf, 1.0]).named("special"));
        for (min, max) in ranges {
            for grad_scale in [1.0, 4.0, 3.0] {
                let what = format!("{path:?} {dtype} {min}..={max} / {grad_scale}");
                let (low, high) = (rounded(dtype, min), rounded(dtype, max));
                let mut want = set.clone();
                let mut outside = false;
                for t in &mut want {
                    for i in 0..t.len() {
                        let bits = multiplied_bits(dtype, t.get(i), 1.0 / grad_scale);
                        let unscaled = if dtype == Dtype::F64 {
                            t.get(i) * (1.0 / grad_scale)
                        } else {
                            f64::from(t.get(i) as f32 * (1.0 / grad_scale) as f32)
                        };
                        if t.get(i).is_nan() {
                            continue;
                        }
                        if unscaled < low || unscaled > high {
                            outside = true;
                            t.set(i, if unscaled < low { low } else { high });
                        } else if grad_scale != 1.0 {
                            t.set_bits(i, bits);
                        }
                    }
                }
                let clip = Clip::range(min, max).grad_scale(grad_scale);
                let (report, mut after) = path.clip(&clip, &set).ok();
                assert!(after[1].get(2).is_nan(), "{what}");
                after[1].set_bits(2, set[1].bits(2));
                assert_same_bits(&after, &want, &what);
                assert_eq!(report.clipped, outside, "{what}");
                assert!(report.total_norm.is_nan() && report.clip_coef == 1.0, "{what}");
                assert_eq!(report.non_finite.as_ref().map(|found| (found.count, found.index)), Some((3, 2)), "{what}");
                // In two passes the same.
                let finite = &set[..1];
                let one_pass = path.clip(&clip, finite).ok().1;
                let two_passes = path.clip(&clip.non_finite(NonFinite::Error), finite).ok().1;
                assert_same_bits(&two_passes, &one_pass, &what);
            }
        }
    });
}

/// An element stored at the rounded bound counts as inside.
#[test]
fn bounds_are_rounded_to_the_stored_type() {
    on_each(|path, dtype| {
        for bound in [0.1, 1.0 / 3.0, 1.001, 3.000_1] {
            let stored = rounded(dtype, bound);
            let (report, after) = path.clip(&Clip::value(bound), &set_of(dtype, &[stored, -stored])).ok();
            assert!(!report.clipped, "{path:?} {dtype} {bound}");
            assert_eq!([after[0].get(0), after[0].get(1)], [stored, -stored]);
            let (report, after) = path.clip(&Clip::value(bound), &set_of(dtype, &[5.0, -5.0])).ok();
            assert!(report.clipped);
            assert_eq!([after[0].get(0), after[0].get(1)], [stored, -stored]);
        }
    });
    for path in Path::ALL {
        // Beyond the largest number of float16: rounded down to it, or up to infinity.
        let set = set_of(Dtype::F16, &[65504.0, f64::INFINITY]);
        let (_, after) = path.clip(&Clip::value(65510.0), &set).ok();
        assert_eq!([after[0].get(0), after[0].get(1)], [65504.0, 65504.0]);
        let (_, after) = path.clip(&Clip::value(1e6), &set).ok();
        assert_eq!([after[0].get(0), after[0].get(1)], [65504.0, f64::INFINITY]);
    }
}

/// Elements that reach the bound once they are divided by the loss scale, at the end of tensors of many lengths. They are
/// inside the bounds for every kernel that looks at them.
#[test]
fn an_element_at_the_bound_is_not_outside() {
    on_each(|path, dtype| {
        for n in [1, 2, 64, 65, 66, 129, 200, 257, 1000, 1025, 2049, 9001] {
            for at in [0, n / 2, n - 1] {
                for grad_scale in [1.0, 0.5, 2.0, 0.0625] {
                    let mut numbers = vec![0.5; n];
                    numbers[at] = if n % 2 == 0 { -2.0 } else { 2.0 };
                    let bound = 2.0 / grad_scale;
                    for (bound, outside) in [(bound, false), (bound * 0.75, true)] {
                        let clip = Clip::value(bound).grad_scale(grad_scale);
                        let (report, after) = path.clip(&clip, &set_of(dtype, &numbers)).ok();
                        let what = format!("{path:?}: element {at} of {n} {dtype}, / {grad_scale}, to {bound}");
                        assert_eq!(report.clipped, outside, "{what}");
                        assert_eq!(after[0].get(at).abs(), bound, "{what}");
                    }
                }
            }
        }
    });
}

/// All values of a half, multiplied in float32 and rounded once, to nearest even.
#[test]
fn every_half_times_every_kind_of_factor() {
    // What is divided by; the factor is the float32 next to its inverse.
    let scales =
        [3.0, 1.0 / 3.0, 0.7, 1.0 / 0.7, 2.0, 0.5, 1000.0, 1e-3, 65536.0, 1.0 / 65536.0, 1.000_01, 0.999_9, 4096.5];
    for path in Path::ALL {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let mut set = vec![Data::rounded(dtype, vec![0.0; 1 << 16])];
            for bits in 0..1 << 16 {
                set[0].set_bits(bits as usize, bits);
            }
            for scale in scales {
                let mut want = set.clone();
                for i in 0..1 << 16 {
                    let x = want[0].get(i);
                    let bits = if x.is_finite() { multiplied_bits(dtype, x, 1.0 / scale) } else { 0 };
                    want[0].set_bits(i, bits);
                }
                let clip = norm(f64::MAX).norm_type(NormType::Inf).grad_scale(scale);
                let (report, after) = path.clip(&clip.non_finite(NonFinite::Drop), &set).ok();
                assert!(!report.clipped);
                assert_same_bits(&after, &want, &format!("{path:?} {dtype} / {scale}"));
            }
        }
    }
}

/// All values of a half, clamped.
#[test]
fn every_half_within_bounds() {
    for path in Path::ALL {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let mut set = vec![Data::rounded(dtype, vec![0.0; 1 << 16])];
            for bits in 0..1 << 16 {
                set[0].set_bits(bits as usize, bits);
            }
            for (min, max) in [(-1.0, 1.0), (-0.1, 1e-6), (-65504.0, 3.0), (-1e-7, f64::INFINITY)] {
                let (_, after) = path.clip(&Clip::range(min, max), &set).ok();
                let (low, high) = (rounded(dtype, min), rounded(dtype, max));
                for i in 0..1 << 16 {
                    let (x, got) = (set[0].get(i), after[0].get(i));
                    if x.is_nan() {
                        assert!(got.is_nan(), "{path:?} {dtype} {i:#x}");
                    } else if x < low || x > high {
                        assert_eq!(got, x.clamp(low, high), "{path:?} {dtype} {i:#x}");
                    } else {
                        assert_eq!(after[0].bits(i), i as u64, "{path:?} {dtype} {i:#x}");
                    }
                }
            }
        }
    }
}

#[test]
fn zeros_keep_their_sign() {
    on_each(|path, dtype| {
        let zeros = set_of(dtype, &[-0.0, 0.0, 3.0, 4.0]);
        for clip in [norm(1.0), norm(1e9).grad_scale(3.0), Clip::range(-1.0, 1.0)] {
            let (_, after) = path.clip(&clip, &zeros).ok();
            assert_eq!([after[0].bits(0), after[0].bits(1)], [zeros[0].bits(0), 0], "{path:?} {dtype}");
        }
        for clip in [Clip::range(0.0, 1.0), Clip::range(-1.0, 0.0)] {
            let (_, after) = path.clip(&clip, &zeros).ok();
            assert_eq!([after[0].bits(0), after[0].bits(1)], [zeros[0].bits(0), 0], "{path:?} {dtype}");
        }
    });
}

/// One norm over all tensors, whatever they are made of.
#[test]
fn the_norm_is_global() {
    for path in Path::ALL {
        let mut random = Random(13);
        let set: Vec<_> = (0..40)
            .map(|i| {
                Data::rounded(path.dtypes()[i % path.dtypes().len()], random.normals(i * 37, 1.0 / (i + 1) as f64))
            })
            .collect();
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
            let n = exact_norm(norm_type, numbers_of(&set));
            let (report, after) = path.clip(&norm(n / 10.0).norm_type(norm_type), &set).ok();
            assert_norm(report.total_norm, n, path.norm_tolerance(), "global");
            assert_scaled(
                &set,
                &after,
                0.1 * n / (n + 1e-6),
                path.norm_tolerance(),
                &format!("{path:?} {norm_type:?}"),
            );
        }
    }
}

/// A value clip tells the norm before it if it is asked to, and clips as it does otherwise.
#[test]
fn a_value_clip_reports_the_norm_before_it() {
    on_each(|path, dtype| {
        let set = [set_of(dtype, &[6.0, 0.25]), set_of(dtype, &Random(15).normals(70_001, 0.1))].concat();
        let n = exact_norm(NormType::L2, numbers_of(&set));
        for clip in [Clip::value(1.0), Clip::range(-1.0, 7.0).grad_scale(2.0), Clip::value(9.0)] {
            let what = format!("{path:?} {dtype} {clip}");
            let (plain, after) = path.clip(&clip, &set).ok();
            let (report, with_norm) = path.clip(&clip.report_norm(true), &set).ok();
            assert_norm(report.total_norm, n / clip.grad_scale, path.norm_tolerance(), &what);
            assert_eq!((plain.total_norm.is_nan(), plain.clipped), (true, report.clipped), "{what}");
            assert_same_bits(&with_norm, &after, &what);
        }
        let bad = [set_of(dtype, &[3.0, f64::NAN, 4.0]), set_of(dtype, &[f64::INFINITY])].concat();
        for (policy, n) in [(NonFinite::Propagate, f64::NAN), (NonFinite::Skip, f64::NAN), (NonFinite::Drop, 5.0)] {
            let clip = Clip::value(1.0).report_norm(true).non_finite(policy);
            let (report, _) = path.clip(&clip, &bad).ok();
            assert_norm(report.total_norm, n, path.norm_tolerance(), &format!("{path:?} {dtype} {policy:?}"));
            assert_eq!(report.non_finite.map(|found| found.count), Some(2), "{path:?} {dtype} {policy:?}");
        }
    });
}

#[test]
fn the_one_line_functions_do_what_their_names_say() {
    let (mut w, mut b) = ([3.0f32, 0.0], [4.0f32]);
    let report: ClipReport = gradclip::clip_grad_norm(&mut [&mut w[..], &mut b[..]], 1.0).expect("valid");
    assert_eq!((report.total_norm, report.clipped, report.elements), (5.0, true, 3));
    assert!((w[0] - 0.6).abs() < 1e-6 && w[1] == 0.0 && (b[0] - 0.8).abs() < 1e-6);
    let mut halves = [half::f16::from_f32(3.0), half::f16::NAN];
    let report = gradclip::clip_grad_value(&mut [&mut halves[..]], 1.0).expect("valid");
    assert!(halves[0] == half::f16::ONE && halves[1].is_nan() && report.clipped);
    assert_eq!(report.non_finite.map(|found| (found.count, found.tensor, found.index)), Some((1, 0, 1)));
    let mut bad = [1.0f64, f64::INFINITY];
    assert!(gradclip::clip_grad_norm(&mut [&mut bad[..]], 1.0).is_err());
    assert_eq!(bad, [1.0, f64::INFINITY]);
    assert!(gradclip::clip_grad_norm(&mut [&mut bad[..]], -1.0).is_err());
    assert!(gradclip::clip_grad_value(&mut [&mut bad[..]], f64::NAN).is_err());
    let none: &mut [&mut [f32]] = &mut [];
    assert_eq!(gradclip::clip_grad_norm(none, 1.0).expect("valid").total_norm, 0.0);
}

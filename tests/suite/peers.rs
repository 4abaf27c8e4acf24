//! Guards the deliberate differences from a peer, one test a row:
//!
//! | peer | what it does | what this does |
//! |---|---|---|
//! | PyTorch | p = 0 counts the tensors | an error: no clip can use it |
//! | PyTorch | float32 gradients around 1e20 overflow its norm, and the clip zeroes them | they are scaled |
//! | PyTorch | a negative `max_norm` turns the gradients round | an error |
//! | PyTorch | p = ∞ raises on a tensor without elements | its norm is 0 |
//! | PyTorch | the norm of half-precision gradients is rounded to half precision | it is summed and reported in float64, in float32 on a GPU |
//! | Optax | N = `max_norm` = 0 gives NaN | zeros are left alone |
//! | TensorFlow | gradients below the threshold change in their last bits | they keep every bit |
//! | timm | a NaN in a parameter makes the gradients of its unit NaN | the unit is not clipped |
//! | timm | AGC clips a unit whose N equals the threshold, if that is below 1e-6: by N / 1e-6 | N is not above the threshold, and the unit is left alone |

use crate::common::numbers::{Random, exact_norm, rounded};
use crate::common::{Data, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::{Clip, Clipper, Dtype, NormType, Scope};

fn norm(max_norm: f64) -> Clip {
    Clip::norm(max_norm)
}

#[test]
fn p_of_0_is_an_error() {
    let clip = norm(1.0).norm_type(NormType::p(0.0));
    let message = Clipper::cpu().measure(&clip, &[]).expect_err("it counts tensors").to_string();
    assert!(message.contains("norm_type") && message.contains("above 0"), "{message}");
}

#[test]
fn norms_beyond_float32_do_not_zero_the_gradients() {
    for path in Path::ALL {
        let set = [Data::rounded(Dtype::F32, Random(111).normals(1000, 1e20))];
        let n = exact_norm(NormType::L2, numbers_of(&set));
        let squares = set[0].numbers().map(|x| (x * x) as f32);
        assert!(squares.sum::<f32>().is_infinite(), "a float32 sum of squares tells nothing here");
        let (report, after) = path.clip(&norm(1.0), &set).ok();
        assert_norm(report.total_norm, n, path.norm_tolerance(), "1e20");
        assert_scaled(&set, &after, 1.0 / n, path.norm_tolerance(), "1e20");
        assert!(after[0].numbers().any(|x| x != 0.0));
    }
}

#[test]
fn a_negative_threshold_is_an_error() {
    for clip in [Clip::norm(-1.0), Clip::rms(-1.0), Clip::average_norm(-1.0), Clip::agc(-1.0), Clip::value(-1.0)] {
        let error = Clipper::cpu().measure(&clip, &[]).expect_err("it would turn gradients round");
        assert!(error.to_string().contains("-1"), "{error}");
    }
}

#[test]
fn the_largest_of_no_elements_is_0() {
    for path in Path::ALL {
        let set = [Data::rounded(Dtype::F32, []).shaped(&[4, 0]), Data::rounded(Dtype::F32, [-3.0, 2.0])];
        for (scope, norms) in [(Scope::Global, &[][..]), (Scope::Tensor, &[0.0, 3.0])] {
            let (report, after) = path.clip(&norm(1.5).norm_type(NormType::Inf).eps(0.0).scope(scope), &set).ok();
            assert_eq!(report.total_norm, 3.0);
            assert_eq!(report.segments.iter().map(|s| s.norm).collect::<Vec<_>>(), norms);
            assert_scaled(&set, &after, 0.5, path.norm_tolerance(), "the rest is clipped");
        }
    }
}

#[test]
fn half_precision_gradients_have_a_wide_norm() {
    for path in Path::ALL {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let set = [Data::rounded(dtype, vec![0.1; 5000])];
            let n = exact_norm(NormType::L2, numbers_of(&set));
            assert!((rounded(dtype, n) / n - 1.0).abs() > 1e-4, "a norm in {dtype} tells nothing here");
            let (report, after) = path.clip(&norm(1.0), &set).ok();
            assert_norm(report.total_norm, n, path.norm_tolerance(), "half");
            assert_scaled(&set, &after, 1.0 / (n + 1e-6), path.norm_tolerance(), "half");
        }
    }
}

#[test]
fn zeros_at_a_threshold_of_0_are_left_alone() {
    for path in Path::ALL {
        let set = [Data::rounded(Dtype::F32, [0.0, -0.0, 0.0]).shaped(&[3, 1])];
        for scope in [Scope::Global, Scope::Tensor, Scope::Unit, Scope::Example] {
            let (report, after) = path.clip(&norm(0.0).eps(0.0).scope(scope), &set).ok();
            assert_eq!((report.total_norm, report.clip_coef, report.clipped), (0.0, 1.0, false), "{scope:?}");
            assert_same_bits(&after, &set, "zeros");
        }
        for clip in [Clip::rms(0.0), Clip::average_norm(0.0)] {
            let (report, after) = path.clip(&clip, &set).ok();
            assert_eq!((report.total_norm, report.clip_coef, report.clipped), (0.0, 1.0, false));
            assert_same_bits(&after, &set, "zeros");
        }
    }
}

#[test]
fn unclipped_gradients_keep_every_bit() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let numbers = Random(112).normals(3000, 1.0).into_iter().chain([-0.0, 1e-7, f64::from_bits(1)]);
            let set = [Data::rounded(*dtype, numbers)];
            // TensorFlow multiplies by max_norm and by 1 / max(N, max_norm); in float32 these do not cancel.
            for max_norm in [60.0, 77.7, 1e3 / 3.0] {
                let changed = |x: f64| (x as f32 * max_norm as f32) * (1.0 / max_norm as f32) != x as f32;
                assert!(*dtype != Dtype::F32 || set[0].numbers().any(changed), "{max_norm} tells nothing");
                for eps in [0.0, 1e-6] {
                    let (report, after) = path.clip(&norm(max_norm).eps(eps), &set).ok();
                    assert!(!report.clipped);
                    assert_same_bits(&after, &set, "unclipped");
                }
            }
        }
    }
}

#[test]
fn a_bad_parameter_leaves_its_unit_unclipped() {
    for path in Path::ALL {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let parameter = Data::rounded(Dtype::F32, [3.0, 4.0, 1.0, bad, 0.0, 0.0]).shaped(&[3, 2]);
            let set =
                [Data::rounded(Dtype::F32, [6.0, 8.0, 6.0, 8.0, 6.0, 8.0]).shaped(&[3, 2]).with_parameter(parameter)];
            let clip = Clip::agc(0.5).agc_eps(1.0);
            let (report, after) = path.clip(&clip, &set).ok();
            assert!(report.non_finite.is_none(), "the gradients are finite");
            assert_eq!(report.segments.len(), 3);
            for (segment, coefficient) in report.segments.iter().zip([0.25, 1.0, 0.05]) {
                assert_norm(segment.clip_coef, coefficient, path.norm_tolerance(), &format!("{path:?} {bad}"));
                assert_eq!(segment.clipped, coefficient < 1.0, "{path:?} {bad}");
            }
            assert_eq!((after[0].get(2), after[0].get(3)), (6.0, 8.0));
            assert_eq!((after[0].get(0), after[0].get(1)), (1.5, 2.0));
        }
    }
}

#[test]
fn a_unit_at_an_adaptive_threshold_is_not_above_it() {
    for path in Path::ALL {
        // The threshold is 2^-21, about 4.8e-7.
        let clip = Clip::agc(2f64.powi(-10)).agc_eps(2f64.powi(-11));
        let m = 2f64.powi(-21);
        let parameter = Data::rounded(Dtype::F32, [0.0; 3]).shaped(&[3, 1]);
        let set = [Data::rounded(Dtype::F32, [m, 1.5 * m, 0.5 * m]).shaped(&[3, 1]).with_parameter(parameter)];
        let (report, after) = path.clip(&clip, &set).ok();
        assert_eq!(report.segments.iter().map(|s| s.clipped).collect::<Vec<_>>(), [false, true, false], "{path:?}");
        assert_eq!((after[0].get(0), after[0].get(2)), (m, 0.5 * m));
        // Above the threshold the floor counts, as timm's does.
        assert_norm(after[0].get(1), 1.5 * m * (m / 1e-6), 1e-6, "below the floor");
    }
}

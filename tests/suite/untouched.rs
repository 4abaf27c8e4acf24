//! Guards against bytes that change although nothing is clipped: NaN payloads, signs of zero, neighbours.

use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, POLICIES, Path, as_measured, assert_same_bits, numbers_of};
use gradclip::{Clip, Dtype, Error, NonFinite, NormType, Scope, TensorMut};

/// (sign bit, bits of infinity)
fn format(dtype: Dtype) -> (u64, u64) {
    match dtype {
        Dtype::F16 => (1 << 15, 0x7c00),
        Dtype::BF16 => (1 << 15, 0x7f80),
        Dtype::F32 => (1 << 31, 0x7f80_0000),
        _ => (1 << 63, 0x7ff0_0000_0000_0000),
    }
}

/// Normal numbers, zeros of both signs, subnormals and powers of two, in tensors of odd lengths.
fn finite_set(dtype: Dtype) -> Vec<Data> {
    let mut random = Random(1);
    let (sign, _) = format(dtype);
    [1, 5, 3001, 0, 256]
        .map(|n| {
            let mut t = Data::rounded(dtype, random.normals(n, 1.0));
            for i in (0..n).step_by(3) {
                let bits = [0, sign, 1, sign | 1, 3][random.below(5)];
                t.set_bits(i, bits);
            }
            t
        })
        .to_vec()
}

/// The same with NaNs of many payloads, quiet and signalling, and infinities.
fn bad_set(dtype: Dtype) -> Vec<Data> {
    let (sign, infinity) = format(dtype);
    let mut set = finite_set(dtype);
    for t in &mut set {
        for i in (0..t.len()).step_by(7) {
            let bits = infinity + (i as u64 / 7 * 5) % (infinity & infinity.wrapping_neg());
            t.set_bits(i, if i % 2 == 0 { bits } else { bits | sign });
        }
    }
    set
}

#[test]
fn unclipped_norms_change_no_byte() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let set = finite_set(*dtype);
            for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
                let norm = exact_norm(norm_type, numbers_of(&set));
                for policy in POLICIES {
                    let clip = Clip::norm(norm * 1.00001).norm_type(norm_type).non_finite(policy);
                    let (report, after) = path.clip(&clip, &set).ok();
                    assert_same_bits(&after, &set, &format!("{path:?} {dtype} {norm_type:?} {policy:?}"));
                    assert!(!report.clipped);
                    assert_eq!((report.clip_coef, report.non_finite), (1.0, None));
                }
            }
        }
    }
}

#[test]
fn an_infinite_threshold_clips_nothing_and_does_all_else() {
    let clips = [Clip::norm(f64::INFINITY), Clip::rms(f64::INFINITY), Clip::average_norm(f64::INFINITY)];
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for clip in clips.into_iter().flat_map(|clip| [clip, clip.scope(Scope::Tensor)]) {
                let what = format!("{path:?} {dtype} {clip}");
                let run =
                    |clip: &Clip, numbers: &[f64]| path.clip(clip, &[Data::rounded(*dtype, numbers.to_vec())]).ok();
                let numbers = |after: &[Data]| -> Vec<_> { after[0].numbers().collect() };
                for policy in POLICIES {
                    let set = finite_set(*dtype);
                    let (report, after) = path.clip(&clip.non_finite(policy), &set).ok();
                    assert!(!report.clipped && report.clip_coef == 1.0, "{what}");
                    assert_same_bits(&after, &set, &what);
                    let (report, after) = run(&clip.non_finite(policy).grad_scale(8.0), &[3.0, 4.0]);
                    assert!(!report.clipped && report.clip_coef == 1.0, "{what}");
                    assert_eq!(numbers(&after), [0.375, 0.5], "{what} {policy}");
                }
                let bad = [1.0, f64::NAN, f64::INFINITY, 2.0];
                let (report, after) = run(&clip.non_finite(NonFinite::Drop), &bad);
                assert!(!report.clipped, "{what}");
                assert_eq!(numbers(&after), [1.0, 0.0, 0.0, 2.0], "{what}");
                let (report, after) = run(&clip.non_finite(NonFinite::Zero).grad_scale(8.0), &bad);
                assert!(report.clipped && report.clip_coef == 0.0, "{what}");
                assert_eq!(numbers(&after), [0.0; 4], "{what}");
            }
        }
    }
}

/// A group with an infinite threshold is divided by the loss scale like the others.
#[test]
fn an_infinite_threshold_of_one_group_unscales_it() {
    for path in Path::HOST {
        let (mut first, mut second) = ([32768.0f32], [32768.0f32]);
        let groups = &mut [
            (Clip::norm(1.0).grad_scale(65536.0), &mut [TensorMut::new(&mut first)][..]),
            (Clip::norm(f64::INFINITY).grad_scale(65536.0), &mut [TensorMut::new(&mut second)][..]),
        ];
        path.clipper().apply_groups(groups).expect("finite");
        assert_eq!((first, second), ([0.5], [0.5]), "{path:?}");
    }
}

#[test]
fn values_within_the_bounds_keep_every_bit() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for policy in POLICIES {
                let clip = Clip::value(100.0).non_finite(policy);
                let set = finite_set(*dtype);
                let (report, after) = path.clip(&clip, &set).ok();
                assert_same_bits(&after, &set, &format!("{path:?} {dtype} {policy:?}"));
                assert!(!report.clipped);
            }
            // NaN payloads, where no infinity lies outside the bounds.
            let set = bad_set(*dtype);
            let clip = Clip::range(f64::NEG_INFINITY, f64::INFINITY);
            let (report, after) = path.clip(&clip, &set).ok();
            assert_same_bits(&after, &set, &format!("{path:?} {dtype} with NaNs"));
            assert!(!report.clipped && report.non_finite.is_some());
        }
    }
}

#[test]
fn refused_and_skipped_gradients_keep_every_bit() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let set = bad_set(*dtype);
            for clip in [Clip::norm(0.1), Clip::value(0.1)] {
                let clip = clip.grad_scale(3.0);
                let done = path.clip(&clip.non_finite(NonFinite::Error), &set);
                assert!(matches!(done.report, Err(Error::NonFinite(_))));
                assert_same_bits(&done.after, &set, &format!("{path:?} {dtype} refused"));
                let (report, after) = path.clip(&clip.non_finite(NonFinite::Skip), &set).ok();
                assert!(!report.clipped && report.non_finite.is_some());
                assert_same_bits(&after, &set, &format!("{path:?} {dtype} skipped"));
            }
        }
    }
}

/// One element lies outside; the others must not notice.
#[test]
fn one_clamped_value_leaves_its_neighbours_alone() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let mut set = finite_set(*dtype);
            set[2].set(1000, 50.0);
            let mut want = set.clone();
            want[2].set(1000, 10.0);
            let (report, after) = path.clip(&Clip::value(10.0), &set).ok();
            assert!(report.clipped);
            assert_same_bits(&after, &want, &format!("{path:?} {dtype}"));
        }
    }
}

/// Quiet NaNs keep their payload; on a GPU, signalling ones may become quiet where elements around them are written.
#[test]
fn clamping_keeps_nans() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let (sign, infinity) = format(*dtype);
            let mut set = finite_set(*dtype);
            let quiet = (infinity & infinity.wrapping_neg()) >> 1;
            for (i, payload) in [quiet, quiet | 5, 1, 7].into_iter().enumerate() {
                set[2].set_bits(500 + i, infinity | payload);
                set[2].set_bits(600 + i, infinity | payload | sign);
            }
            set[2].set(1000, 50.0);
            let mut want = set.clone();
            want[2].set(1000, 10.0);
            let (_, mut after) = path.clip(&Clip::value(10.0), &set).ok();
            let signalling: &[usize] = if *path == Path::Cpu { &[] } else { &[502, 503, 602, 603] };
            for &i in signalling {
                assert!(after[2].get(i).is_nan(), "{path:?} {dtype}");
                after[2].set_bits(i, set[2].bits(i));
            }
            assert_same_bits(&after, &want, &format!("{path:?} {dtype}"));
        }
    }
}

#[test]
fn measuring_agrees_with_clipping() {
    let mut random = Random(5);
    let set =
        [Data::rounded(Dtype::F32, random.normals(3000, 1.0)), Data::rounded(Dtype::BF16, random.normals(99, 9.0))];
    let views: Vec<_> = set.iter().map(Data::view).collect();
    for clip in [Clip::norm(1.0), Clip::value(0.1), Clip::norm(1e9)] {
        let (report, _) = Path::Cpu.clip(&clip, &set).ok();
        assert_eq!(
            format!("{:?}", gradclip::Clipper::cpu().measure(&clip, &views).expect("valid")),
            format!("{:?}", as_measured(report))
        );
        #[cfg(feature = "gpu")]
        {
            let (report, _) = Path::GpuHost.clip(&clip, &set).ok();
            let gpu = gradclip::Clipper::gpu(crate::common::gpu::gpu().clone());
            assert_eq!(
                format!("{:?}", gpu.measure(&clip, &views).expect("valid")),
                format!("{:?}", as_measured(report))
            );
        }
    }
}

//! Guards against errors with lengths that fill no vector, block, word, workgroup or chunk: 0, 1, odd, and one off
//! each.

use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::{Clip, Dtype, NormType};

/// Clips a set by norm and by value, and checks every element.
#[track_caller]
fn check(path: Path, set: &[Data], norm_type: NormType, what: &str) {
    let norm = exact_norm(norm_type, numbers_of(set));
    let clip = Clip::norm(norm * 0.37).norm_type(norm_type).eps(0.0);
    let (report, after) = path.clip(&clip, set).ok();
    assert_norm(report.total_norm, norm, path.norm_tolerance(), what);
    assert_eq!(report.elements, set.iter().map(|t| t.len() as u64).sum::<u64>(), "{what}");
    assert_eq!(report.clipped, norm > 0.0, "{what}");
    assert_scaled(set, &after, 0.37, path.norm_tolerance(), what);
    let (report, after) = path.clip(&Clip::range(-0.5, 0.25), set).ok();
    let want: Vec<_> = set.iter().map(|t| t.clamped(-0.5, 0.25)).collect();
    assert_same_bits(&after, &want, what);
    assert_eq!(report.clipped, want != set, "{what}");
}

fn normals(dtype: Dtype, n: usize) -> Data {
    Data::rounded(dtype, Random(n as u64).normals(n, 1.0))
}

#[test]
fn every_short_length() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for n in (0..=70).chain([127, 128, 129, 255, 256, 257]) {
                let norm_type = [NormType::L2, NormType::L1, NormType::Inf][n % 3];
                check(*path, &[normals(*dtype, n)], norm_type, &format!("{path:?}: {n} of {dtype}"));
            }
        }
    }
}

/// Blocks of 1,024 elements and chunks of 131,072 on the CPU; chunks of 4,096 words, of two halves each, on the GPU.
#[test]
fn one_beside_every_boundary() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for boundary in [1024, 4096, 8192, 16_384, 32_768, 131_072, 262_144] {
                for n in [boundary - 1, boundary, boundary + 1] {
                    check(*path, &[normals(*dtype, n)], NormType::L2, &format!("{path:?}: {n} of {dtype}"));
                }
            }
        }
    }
}

#[test]
fn zero_sized_tensors_are_welcome_everywhere() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for lens in [&[0, 5, 0, 0, 257, 0][..], &[3, 0, 3], &[0, 1], &[1, 0], &[0, 0, 0], &[0]] {
                let set: Vec<_> = lens.iter().map(|n| normals(*dtype, *n)).collect();
                for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
                    check(*path, &set, norm_type, &format!("{path:?}: {lens:?} of {dtype}"));
                }
            }
        }
    }
}

#[test]
fn an_empty_list_has_norm_0() {
    for path in Path::ALL {
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
            for max_norm in [0.0, 1.0, f64::INFINITY] {
                let clip = Clip::norm(max_norm).norm_type(norm_type).grad_scale(3.0);
                let (report, _) = path.clip(&clip, &[]).ok();
                assert_eq!((report.total_norm, report.elements, &report.non_finite), (0.0, 0, &None));
                assert_eq!(report.clipped, max_norm == 0.0, "max_norm {max_norm}: 0 / (0 + eps) is 0");
            }
        }
        let (report, _) = path.clip(&Clip::value(1.0), &[]).ok();
        assert_eq!((report.clipped, report.elements), (false, 0));
    }
}

/// Views of no elements at the end of a buffer, and of a buffer of none.
#[cfg(feature = "gpu")]
#[test]
fn empty_views_of_any_buffer() {
    use crate::common::gpu::{clip_tensors, gpu, upload};
    use gradclip::gpu::GpuTensor;
    let buffer = upload(gpu(), &[0; 16]);
    let none = upload(gpu(), &[]);
    let views = [
        GpuTensor::f32(&buffer, 4..4).expect("at the end"),
        GpuTensor::f16(&buffer, 8..).expect("at the end"),
        GpuTensor::bf16(&none, ..).expect("all of nothing"),
    ];
    let report = clip_tensors(gpu(), &Clip::norm(1.0), &views).expect("nothing to clip");
    assert_eq!((report.total_norm, report.elements, report.clipped), (0.0, 0, false));
}

//! Guards against errors with elements that start inside a vector, word or binding, and against writes to their
//! neighbours.

use crate::common::numbers::{Random, exact_norm, multiplied_bits};
use crate::common::{Data, assert_norm, assert_same_bits};
use gradclip::{Clip, Clipper, Dtype, NonFinite, NormType, Tensor, TensorMut};

/// Divides by 3 whatever the norm is, so that every bit of the result is known.
fn scale() -> Clip {
    Clip::norm(f64::MAX).grad_scale(3.0)
}

const BOUND: f64 = 0.5;

type Expected = fn(&Data) -> Data;

/// The clips, each with what it makes of a tensor: a scaling, a clamp in one pass, and one that reads first.
fn clips() -> [(&'static str, Clip, Expected); 3] {
    fn scaled(t: &Data) -> Data {
        let mut after = t.clone();
        for i in 0..t.len() {
            after.set_bits(i, multiplied_bits(t.dtype, t.get(i), 1.0 / 3.0));
        }
        after
    }
    let clamped = |t: &Data| t.clamped(-BOUND, BOUND);
    let value = Clip::value(BOUND);
    [("scale", scale(), scaled), ("clamp", value, clamped), ("guarded", value.non_finite(NonFinite::Error), clamped)]
}

fn normals(dtype: Dtype, n: usize, seed: u64) -> Data {
    Data::rounded(dtype, Random(seed).normals(n, 1.0))
}

#[test]
fn host_bytes_at_any_address() {
    for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16] {
        for n in (0..=130).chain([1023, 2500]) {
            let t = normals(dtype, n, 1);
            for (name, clip, expected) in clips() {
                let want = expected(&t);
                for offset in 0..=16 {
                    // Aligned to 16 by construction: u128s are.
                    let mut store = vec![0x5555_5555_5555_5555_5555_5555_5555_5555_u128; n * dtype.size() / 16 + 4];
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut store);
                    let range = offset..offset + t.bytes.len();
                    bytes[range.clone()].copy_from_slice(&t.bytes);
                    let view = TensorMut::from_bytes(dtype, &mut bytes[range.clone()]).expect("whole elements");
                    Clipper::cpu().apply(&clip, &mut [view]).expect("finite");
                    let after = Data { bytes: bytes[range.clone()].to_vec(), ..t.clone() };
                    let what = format!("{name}: {n} of {dtype} at {offset}");
                    assert_same_bits(&[after], std::slice::from_ref(&want), &what);
                    assert!(bytes[..range.start].iter().chain(&bytes[range.end..]).all(|b| *b == 0x55), "{what}");
                }
            }
        }
    }
}

#[test]
fn misaligned_bytes_give_the_same_norm() {
    let norm_types = [1.0, 2.0, f64::INFINITY, 3.0, 1.5].map(NormType::p);
    for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16] {
        for n in (0..=130).chain([1023, 300_001]) {
            let t = normals(dtype, n, 2);
            let mut bytes = vec![0; t.bytes.len() + 8];
            for norm_type in norm_types {
                let clip = Clip::norm(f64::INFINITY).norm_type(norm_type);
                let norms: Vec<_> = (0..8)
                    .map(|offset| {
                        let bytes = &mut bytes[offset..offset + t.bytes.len()];
                        bytes.copy_from_slice(&t.bytes);
                        let view = Tensor::from_bytes(dtype, bytes).expect("whole elements");
                        Clipper::cpu().measure(&clip, &[view]).expect("finite").total_norm
                    })
                    .collect();
                let what = format!("{norm_type:?} of {n} of {dtype}");
                assert!(norms.iter().all(|norm| norm.to_bits() == norms[0].to_bits()), "{what}: {norms:?}");
                assert_norm(norms[0], exact_norm(norm_type, t.numbers()), 1e-7, &what);
            }
        }
    }
}

#[cfg(feature = "gpu")]
mod in_buffers {
    use super::*;
    use crate::common::gpu::{Layout, clip_laid_out, clip_tensors, download, gpu, gpu_tensor, step, upload, write};

    #[track_caller]
    fn check(set: &[Data], layout: &Layout, what: &str) {
        for (name, clip, expected) in clips() {
            let done = clip_laid_out(gpu(), &clip, set, layout);
            let want: Vec<_> = set.iter().map(expected).collect();
            let (report, after) = done.ok();
            assert_eq!(report.elements, set.iter().map(|t| t.len() as u64).sum::<u64>(), "{what} {name}");
            assert_same_bits(&after, &want, &format!("{what} {name}"));
        }
    }

    #[test]
    fn every_offset() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for offset in (0..=9).chain([63, 64, 65, 127, 128, 129]) {
                for n in [1, 2, 3, 4, 5, 6, 31, 257] {
                    let set = [normals(dtype, n, 3)];
                    let layout = Layout::with_gaps(&set, |_| offset);
                    check(&set, &layout, &format!("{n} of {dtype} at {offset}"));
                }
            }
        }
    }

    /// Chunks of 4,096 words begin and end in the middle of it, and are misaligned throughout.
    #[test]
    fn every_offset_of_a_tensor_of_several_chunks() {
        for (dtype, n) in [(Dtype::F32, 10_000), (Dtype::F16, 16_383), (Dtype::BF16, 16_384), (Dtype::F16, 16_385)] {
            for offset in [0, 1, 2, 3, 5, 4095, 4097] {
                let set = [normals(dtype, n, 4)];
                check(&set, &Layout::with_gaps(&set, |_| offset), &format!("{n} of {dtype} at {offset}"));
            }
        }
    }

    /// Halves back to back or with one stranger between: words with two owners, or one and a half.
    #[test]
    fn halves_that_share_words() {
        let dtypes = [Dtype::F16, Dtype::BF16];
        for which in 0..8usize {
            let of = |i: usize| dtypes[which >> i & 1];
            for lens in [[1, 1, 1], [1, 2, 1], [2, 1, 3], [3, 3, 3], [5, 4, 1], [1, 0, 1], [33, 1, 64]] {
                for gaps in [[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 2, 1], [3, 1, 0]] {
                    let set: Vec<_> = (0..3).map(|i| normals(of(i), lens[i], 5 + i as u64)).collect();
                    let layout = Layout::with_gaps(&set, |i| gaps[i]);
                    check(&set, &layout, &format!("{lens:?} of {which:#b} with gaps {gaps:?}"));
                    // The list need not be in the order of memory.
                    let reversed: Vec<_> = set.into_iter().rev().collect();
                    let starts = layout.starts.iter().rev().copied().collect();
                    check(&reversed, &Layout { starts, ..layout }, "reversed");
                }
            }
        }
    }

    #[test]
    fn float32_between_halves() {
        let set = [
            normals(Dtype::F16, 3, 1),
            normals(Dtype::F32, 5, 2),
            normals(Dtype::BF16, 1, 3),
            normals(Dtype::F16, 2, 4),
            normals(Dtype::F32, 1, 5),
        ];
        check(&set, &Layout::with_gaps(&set, |_| 0), "mixed");
        check(&set, &Layout::with_gaps(&set, |i| i), "mixed with gaps");
    }

    /// A word at the seam of two tensors that are as long as chunks.
    #[test]
    fn shared_words_between_long_tensors() {
        for n in [8191, 8193] {
            let set = [normals(Dtype::F16, n, 1), normals(Dtype::BF16, n, 2), normals(Dtype::F16, n + 1, 3)];
            check(&set, &Layout::with_gaps(&set, |_| 0), &format!("{n}"));
        }
    }

    /// A norm that clips, with a factor of its own, on both sides of a word.
    #[test]
    fn clipping_by_norm_meets_both_owners_of_a_word() {
        let set = [Data::rounded(Dtype::F16, [9.0, 3.0, 1.0]), Data::rounded(Dtype::BF16, [0.0, 4.0, 12.0])];
        let layout = Layout::with_gaps(&set, |_| 0);
        // 81 + 9 + 1 + 16 + 144 = 251
        let norm = 251f64.sqrt();
        let clip = Clip::norm(norm / 2.0).eps(0.0);
        let (report, after) = clip_laid_out(gpu(), &clip, &set, &layout).ok();
        assert!((report.total_norm - norm).abs() < 1e-6);
        let want = [Data::rounded(Dtype::F16, [4.5, 1.5, 0.5]), Data::rounded(Dtype::BF16, [0.0, 2.0, 6.0])];
        assert_same_bits(&after, &want, "halved");
    }

    /// Each of two plans owns half of a word, and leaves the other half to the other.
    #[test]
    fn two_plans_share_a_word() {
        let (left, right) = (normals(Dtype::F16, 3, 1), normals(Dtype::BF16, 3, 2));
        let mut bytes = left.bytes.clone();
        bytes.extend(&right.bytes);
        let buffer = upload(gpu(), &bytes);
        for (name, clip, expected) in clips() {
            write(gpu(), &buffer, 0, &bytes);
            let first = gpu().plan(&clip, &[gpu_tensor(&buffer, &left, 0)]).expect("valid");
            let second = gpu().plan(&clip, &[gpu_tensor(&buffer, &right, 3)]).expect("valid");
            step(gpu(), &second);
            let mut want = left.bytes.clone();
            want.extend(expected(&right).bytes);
            assert_eq!(download(gpu(), &buffer), want, "{name}: the second alone");
            step(gpu(), &first);
            let mut want = expected(&left).bytes;
            want.extend(expected(&right).bytes);
            assert_eq!(download(gpu(), &buffer), want, "{name}: both");
        }
    }

    /// What shares a word with a tensor does not count: a NaN or a large number beside it is nobody's business.
    #[test]
    fn neighbours_in_a_word_are_not_measured() {
        for dtype in [Dtype::F16, Dtype::BF16] {
            for n in [1, 2, 3, 4, 7, 8192] {
                for stranger in [f64::NAN, f64::INFINITY, 60_000.0] {
                    let mut all = Data::rounded(dtype, vec![0.25; n + 4]);
                    for i in [0, n + 1, n + 2, n + 3] {
                        all.set(i, stranger);
                    }
                    let buffer = upload(gpu(), &all.bytes);
                    let tensor = Data::rounded(dtype, vec![0.25; n]);
                    for clip in [Clip::norm(1e6), Clip::value(0.5)] {
                        let report =
                            clip_tensors(gpu(), &clip, &[gpu_tensor(&buffer, &tensor, 1)]).expect("all finite");
                        assert_eq!((report.clipped, report.non_finite), (false, None), "{n} of {dtype}, {stranger}");
                        let norm = 0.25 * (n as f64).sqrt();
                        assert!(report.total_norm.is_nan() || (report.total_norm / norm - 1.0).abs() < 1e-6);
                    }
                    assert_eq!(download(gpu(), &buffer)[..all.bytes.len()], all.bytes[..]);
                }
            }
        }
    }
}

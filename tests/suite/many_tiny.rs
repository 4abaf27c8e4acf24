//! Guards against wrong tables, merges and orders with thousands of tensors of a few elements.

use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::{Clip, Error, NormType};

/// So many tensors of 1 to 64 elements, named, of all dtypes of the path.
fn tiny(path: Path, n: usize) -> Vec<Data> {
    let mut random = Random(31);
    (0..n)
        .map(|i| {
            let len = 1 + random.below(64);
            let dtype = path.dtypes()[i % path.dtypes().len()];
            Data::rounded(dtype, random.normals(len, 1.0)).named(&format!("tiny.{i}"))
        })
        .collect()
}

#[track_caller]
fn check(set: &[Data], tolerance: f64, clip: impl Fn(&Clip, &[Data]) -> crate::common::Done) {
    for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
        let norm = exact_norm(norm_type, numbers_of(set));
        let by_norm = Clip::norm(norm / 8.0).eps(0.0).norm_type(norm_type);
        let (report, after) = clip(&by_norm, set).ok();
        assert_norm(report.total_norm, norm, tolerance, "tiny");
        assert_eq!(report.elements, set.iter().map(|t| t.len() as u64).sum::<u64>());
        assert_scaled(set, &after, 0.125, tolerance, &format!("{norm_type:?}"));
    }
    let (_, after) = clip(&Clip::value(0.5), set).ok();
    let want: Vec<_> = set.iter().map(|t| t.clamped(-0.5, 0.5)).collect();
    assert_same_bits(&after, &want, "clamped");
    // One bad element, in the last, in the first, and in one between.
    for (tensor, last) in [(set.len() - 1, true), (0, false), (set.len() / 2 + 1, true)] {
        let mut set = set.to_vec();
        let index = if last { set[tensor].len() - 1 } else { 0 };
        set[tensor].set(index, f64::NAN);
        let done = clip(&Clip::norm(1.0), &set);
        assert_same_bits(&done.after, &set, "refused");
        let Err(Error::NonFinite(found)) = done.report else { panic!("{:?}", done.report) };
        assert_eq!((found.count, found.tensor, found.index), (1, tensor, index as u64));
        assert_eq!(found.name, set[tensor].name);
    }
}

#[test]
fn three_thousand_tiny_tensors() {
    for path in Path::ALL {
        check(&tiny(*path, 3000), path.norm_tolerance(), |clip, set| path.clip(clip, set));
    }
}

/// Together long enough to be taken in parallel.
#[test]
fn thirty_thousand_tiny_tensors_on_the_cpu() {
    check(&tiny(Path::Cpu, 30_000), 1e-7, |clip, set| Path::Cpu.clip(clip, set));
}

#[cfg(feature = "gpu")]
#[test]
fn three_hundred_tensors_in_buffers_of_their_own() {
    use crate::common::gpu::{clip_tensors, download, gpu, gpu_tensor, upload};
    check(&tiny(Path::GpuBuffers, 300), 1e-6, |clip, set| {
        let buffers: Vec<_> = set.iter().map(|t| upload(gpu(), &t.bytes)).collect();
        let tensors: Vec<_> = buffers.iter().zip(set).map(|(buffer, t)| gpu_tensor(buffer, t, 0)).collect();
        let report = clip_tensors(gpu(), clip, &tensors);
        let after = buffers
            .iter()
            .zip(set)
            .map(|(buffer, t)| Data { bytes: download(gpu(), buffer)[..t.bytes.len()].to_vec(), ..t.clone() })
            .collect();
        crate::common::Done { report, after }
    });
}

/// Tensors of two buffers by turns: list order and memory order differ everywhere.
#[cfg(feature = "gpu")]
#[test]
fn tensors_that_alternate_between_two_buffers() {
    use crate::common::gpu::{Layout, clip_tensors, download, gpu, upload};
    let all = tiny(Path::GpuBuffers, 500);
    check(&all, 1e-6, |clip, set| {
        let halves: [Vec<Data>; 2] = [0, 1].map(|h| set.iter().skip(h).step_by(2).cloned().collect());
        let layouts = [0, 1].map(|h| Layout::with_gaps(&halves[h], |i| i % 3));
        let buffers = [0, 1].map(|h| upload(gpu(), &layouts[h].bytes(&halves[h])));
        let views = [0, 1].map(|h| layouts[h].tensors(&buffers[h], &halves[h]));
        let in_list_order: Vec<_> = (0..set.len()).map(|i| views[i % 2][i / 2].clone()).collect();
        let report = clip_tensors(gpu(), clip, &in_list_order);
        let after = [0, 1].map(|h| layouts[h].taken_from(&download(gpu(), &buffers[h]), &halves[h]));
        let after = (0..set.len()).map(|i| after[i % 2][i / 2].clone()).collect();
        crate::common::Done { report, after }
    });
}

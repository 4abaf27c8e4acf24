//! Guards against kernels whose results depend on how they are compiled: for any workgroup, by subgroups or by a tree,
//! next to each other or in stretches, with one window a dispatch or several. The norm must be the same to its last
//! promised digit, and every element must have the same bits.
#![cfg(feature = "gpu")]

use std::sync::OnceLock;

use crate::common::gpu::{Layout, clip_tensors, download, gpu, upload};
use crate::common::numbers::{Random, exact_norm, multiplied_bits};
use crate::common::{Data, assert_norm, assert_same_bits, numbers_of};
use gradclip::gpu::GpuClipper;
use gradclip::gpu::tuning::{HARDWARE, SOFTWARE, Tuning};
use gradclip::{Clip, ClipReport, Dtype, Error, NonFinite, NormType, Scope};

/// The variants with short chunks, which the tests share: each compiles its kernels anew.
fn short() -> &'static [(String, GpuClipper)] {
    static SHORT: OnceLock<Vec<(String, GpuClipper)>> = OnceLock::new();
    SHORT.get_or_init(|| variants(false))
}

/// What hardware gets, and each choice beside each other choice of another kind; with chunks that are short, or as long as may be.
fn variants(long: bool) -> Vec<(String, GpuClipper)> {
    let variant = |(workgroup, subgroups, contiguous, several)| {
        let mut tuning = if several { HARDWARE } else { SOFTWARE };
        (tuning.workgroup, tuning.subgroups, tuning.contiguous) = (workgroup, subgroups, contiguous);
        tuning.windows = if several { 40 } else { 1 };
        (tuning.min_chunk_words, tuning.max_chunk_words, tuning.merged_partials) = (1 << 9, 1 << 12, 20);
        if long {
            (tuning.chunks, tuning.max_chunk_words) = (1, workgroup << 14);
        }
        (format!("{tuning:?}"), gpu().with_tuning(tuning).expect("valid"))
    };
    let variants =
        [(256, true, false, true), (8, true, true, false), (256, false, true, true), (32, false, false, false)];
    variants.into_iter().map(variant).collect()
}

/// Tensors of all lengths around blocks, in 13 buffers by turns, at all offsets to a quad.
fn set(scale: f64) -> Vec<Data> {
    let mut random = Random(71);
    let lengths = (0..70).chain([127, 128, 129, 511, 512, 513, 1023, 2047, 2053, 4111, 9001]);
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::BF16];
    lengths.enumerate().map(|(i, len)| Data::rounded(dtypes[i % 3], random.normals(len, scale))).collect()
}

const BUFFERS: usize = 13;

/// Clips copies in this number of buffers.
fn clip(gpu: &GpuClipper, clip: &Clip, set: &[Data]) -> (Result<ClipReport, Error>, Vec<Data>) {
    let part = |b: usize| set.iter().skip(b).step_by(BUFFERS).cloned().collect::<Vec<_>>();
    let parts: Vec<_> = (0..BUFFERS).map(part).collect();
    let layouts: Vec<_> = parts.iter().map(|part| Layout::with_gaps(part, |i| (i * 5) % 11)).collect();
    let buffers: Vec<_> = layouts.iter().zip(&parts).map(|(layout, part)| upload(gpu, &layout.bytes(part))).collect();
    let mut views: Vec<_> = (0..BUFFERS).map(|b| layouts[b].tensors(&buffers[b], &parts[b]).into_iter()).collect();
    let in_order: Vec<_> = (0..set.len()).filter_map(|i| views[i % BUFFERS].next()).collect();
    let report = clip_tensors(gpu, clip, &in_order);
    let mut after: Vec<_> =
        (0..BUFFERS).map(|b| layouts[b].taken_from(&download(gpu, &buffers[b]), &parts[b]).into_iter()).collect();
    (report, (0..set.len()).filter_map(|i| after[i % BUFFERS].next()).collect())
}

#[test]
fn every_variant_gives_the_same() {
    let p3 = NormType::p(3.0);
    let small = set(1e-3);
    // Among others no square of which is a float32.
    let mut mixed = set(1e-3);
    for (i, scale) in [(3, 1e-25), (60, 1e-30), (72, 1e-12), (75, 1e20), (78, 1e-40)] {
        mixed[i] = Data::rounded(Dtype::F32, Random(i as u64).normals(mixed[i].len(), scale));
    }
    for (set, norm_types, what) in
        [(&small, [NormType::L2, NormType::Inf], "small"), (&mixed, [NormType::L2, p3], "mixed")]
    {
        for norm_type in norm_types {
            let norm = exact_norm(norm_type, numbers_of(set));
            // A power of two, so that no coefficient depends on the last bits of the norm.
            let by = Clip::norm(f64::MAX).norm_type(norm_type).grad_scale(4.0);
            let mut first: Option<(f64, Vec<Data>)> = None;
            for (name, gpu) in short() {
                let (report, after) = clip(gpu, &by, set);
                let total = report.expect("finite").total_norm;
                let what = format!("{what} {norm_type:?} {name}");
                assert_norm(total, norm / 4.0, 1e-6, &what);
                let (one, bits) = first.get_or_insert_with(|| (total, after.clone()));
                assert!((total / *one - 1.0).abs() < 1e-7, "{what}: {total} and {one}");
                assert_same_bits(&after, bits, &what);
            }
        }
    }
}

#[test]
fn every_variant_finds_the_same() {
    let mut set = set(1.0);
    // The first is neither in the first buffer nor at the lowest address; two are of one tensor.
    for (tensor, index) in [(79, 4001), (44, 40), (44, 43), (70, 0), (78, 2000)] {
        set[tensor].set(index, if index % 2 == 0 { f64::NAN } else { f64::INFINITY });
    }
    let clips =
        [Clip::norm(1.0), Clip::norm(1.0).norm_type(NormType::Inf), Clip::value(0.5).non_finite(NonFinite::Error)];
    for (name, gpu) in short() {
        for by in &clips {
            let (report, after) = clip(gpu, by, &set);
            let Err(Error::NonFinite(found)) = report else { panic!("{name}: {report:?}") };
            assert_eq!((found.count, found.tensor, found.index), (5, 44, 40), "{name} {by:?}");
            assert_same_bits(&after, &set, name);
        }
        // One in each tensor at most decides about its own norm only.
        let (report, _) = clip(gpu, &clips[0].scope(Scope::Tensor).non_finite(NonFinite::Drop), &set);
        let segments = report.expect("dropped").segments;
        for (segment, t) in segments.iter().zip(&set) {
            let norm = exact_norm(NormType::L2, t.numbers().filter(|x| x.is_finite()));
            assert_norm(segment.norm, norm, 1e-6, name);
        }
    }
}

/// llvmpipe ends loops silently after this number of iterations. The longest task of the slowest elements stays below.
#[test]
fn the_longest_chunks_are_taken_to_their_end() {
    for (name, gpu) in variants(true) {
        let len = 300_001;
        let mut set: Vec<_> = (0..4).map(|i| Data::rounded(Dtype::F16, Random(i).normals(len, 1.0))).collect();
        let by = Clip::norm(f64::MAX).grad_scale(3.0);
        let (report, after) = clip(&gpu, &by, &set);
        let norm = exact_norm(NormType::L2, numbers_of(&set));
        assert_norm(report.expect("finite").total_norm, norm / 3.0, 1e-6, &name);
        let mut want = set.clone();
        for t in &mut want {
            for i in 0..len {
                t.set_bits(i, multiplied_bits(Dtype::F16, t.get(i), 1.0 / 3.0));
            }
        }
        assert_same_bits(&after, &want, &name);
        // Every element is taken one by one, and applied one by one.
        for t in &mut set {
            t.bytes.fill(0xff);
        }
        for by in [by.non_finite(NonFinite::Zero), Clip::value(1.0).non_finite(NonFinite::Zero)] {
            let (report, after) = clip(&gpu, &by, &set);
            let found = report.expect("zeroed").non_finite.expect("all of them");
            assert_eq!((found.count, found.tensor, found.index), (4 * len as u64, 0, 0), "{name} {by:?}");
            assert!(after.iter().all(|t| t.bytes.iter().all(|byte| *byte == 0)), "{name} {by:?}");
        }
    }
}

#[test]
fn a_tuning_that_no_kernel_has_is_refused() {
    let wrong = |change: fn(&mut Tuning)| {
        let mut tuning = SOFTWARE;
        change(&mut tuning);
        assert!(matches!(gpu().with_tuning(tuning), Err(Error::Usage(_))), "{tuning:?}");
    };
    wrong(|t| t.workgroup = 24);
    wrong(|t| t.workgroup = 4);
    wrong(|t| t.chunks = 0);
    wrong(|t| t.merged_partials = 1);
    wrong(|t| t.min_chunk_words = 0);
    wrong(|t| t.max_chunk_words = t.min_chunk_words - 1);
    wrong(|t| t.max_chunk_words = (t.workgroup << 14) + 1);
}

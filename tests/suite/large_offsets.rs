//! Guards against offsets and lengths that exceed one binding, one dispatch dimension or 32 bits.
#![cfg(feature = "gpu")]

use crate::common::gpu::{
    Layout, clip_laid_out, clip_tensors, clipper, download, gpu, shared, small_limits, step, upload, write,
};
use crate::common::numbers::{Random, Sum, exact_norm, multiplied_bits};
use crate::common::{Data, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::gpu::{GpuClipper, GpuTensor};
use gradclip::{Clip, Dtype, Error, NonFinite, NormType, Scope};

/// The length of the pattern that long tensors repeat: a prime, so that it meets every seam differently.
const PERIOD: usize = 65_521;

/// A tensor of more than 128 MiB, at an odd offset in its buffer, which repeats a pattern.
struct Long {
    pattern: Data,
    len: usize,
    offset: usize,
}

impl Long {
    fn new(dtype: Dtype, bytes: usize, offset: usize) -> Self {
        let pattern = Data::rounded(dtype, Random(51).normals(PERIOD, 1.0));
        Self { pattern, len: bytes / dtype.size() + 1, offset }
    }

    fn size(&self) -> usize {
        self.pattern.dtype.size()
    }

    /// The whole buffer's bytes, with the pattern for the tensor.
    fn bytes(&self, pattern: &Data) -> Vec<u8> {
        let mut bytes = vec![crate::common::gpu::GUARD; self.offset * self.size()];
        let end = bytes.len() + self.len * self.size();
        while bytes.len() < end {
            let missing = end - bytes.len();
            bytes.extend_from_slice(&pattern.bytes[..missing.min(pattern.bytes.len())]);
        }
        bytes.resize((end + 6).next_multiple_of(4), crate::common::gpu::GUARD);
        bytes
    }

    fn changed(&self, bits: impl Fn(f64) -> u64) -> Data {
        let mut pattern = self.pattern.clone();
        for i in 0..PERIOD {
            pattern.set_bits(i, bits(self.pattern.get(i)));
        }
        pattern
    }

    fn norm(&self) -> f64 {
        let mut sum = Sum::default();
        let (times, rest) = (self.len / PERIOD, self.len % PERIOD);
        for (i, x) in self.pattern.numbers().enumerate() {
            sum.add(x * x * (times + usize::from(i < rest)) as f64);
        }
        sum.total().sqrt()
    }

    fn check(&self) {
        let dtype = self.pattern.dtype;
        let mut bytes = self.bytes(&self.pattern);
        // The default limits, so that a device that could bind more has to split as well.
        let gpu = &shared(wgpu::Limits::default());
        assert!(bytes.len() as u64 > gpu.device().limits().max_storage_buffer_binding_size);
        let buffer = upload(gpu, &bytes);
        let (start, end) = (self.offset as u64, (self.offset + self.len) as u64);
        let tensor = GpuTensor::new(&buffer, dtype, start..end).expect("it fits").named("long");

        // A NaN near the end: located, and nothing is written.
        let bad = self.len - 12_345;
        let word = ((self.offset + bad) * self.size()) & !3;
        write(gpu, &buffer, word as u64, &[0xff; 4]);
        let clip = Clip::norm(1.0);
        let Err(Error::NonFinite(found)) = clip_tensors(gpu, &clip, std::slice::from_ref(&tensor)) else {
            panic!("the NaN was missed")
        };
        let first = (word / self.size()) as u64 - start;
        assert_eq!((found.count, found.index), (4 / self.size() as u64, first));
        let kept = bytes[word..word + 4].to_vec();
        bytes[word..word + 4].fill(0xff);
        assert!(download(gpu, &buffer) == bytes, "refused, but written");
        write(gpu, &buffer, word as u64, &kept);

        // Divided by 3 in place, whatever window an element lies in.
        let clip = Clip::norm(f64::MAX).grad_scale(3.0);
        let plan = gpu.plan(&clip, std::slice::from_ref(&tensor)).expect("valid");
        step(gpu, &plan);
        let report = plan.report().wait().expect("finite");
        assert_norm(report.total_norm, self.norm() / 3.0, 1e-6, "long");
        assert_eq!(report.elements, self.len as u64);
        let want = self.bytes(&self.changed(|x| multiplied_bits(dtype, x, 1.0 / 3.0)));
        let got = download(gpu, &buffer);
        let wrong = got.iter().zip(&want).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the first wrong byte of the scaled ones");

        // Clamped in one pass.
        write(gpu, &buffer, 0, &self.bytes(&self.pattern));
        let report = clip_tensors(gpu, &Clip::value(0.5), &[tensor]).expect("finite");
        assert!(report.clipped);
        let clamped = |x: f64| crate::common::numbers::rounded_bits(dtype, x.clamp(-0.5, 0.5));
        let want = self.bytes(&self.changed(clamped));
        let got = download(gpu, &buffer);
        let wrong = got.iter().zip(&want).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the first wrong byte of the clamped ones");
    }
}

#[test]
fn float32_beyond_one_binding() {
    Long::new(Dtype::F32, 132 << 20, 12_347).check();
}

#[test]
fn float16_beyond_one_binding() {
    Long::new(Dtype::F16, 132 << 20, 12_347).check();
}

/// Tensors on both sides of where a binding must end, and one across.
#[test]
fn small_tensors_far_into_a_buffer() {
    let mib = 1 << 20;
    let set: Vec<_> = (0..12).map(|i| Data::rounded(Dtype::BF16, Random(i).normals(1001, 1.0))).collect();
    let starts = (0..12).map(|i| (i * 13 + 1) * mib + 2 * i).collect();
    let layout = Layout { starts, size: 160 * mib };
    let norm = exact_norm(NormType::L2, numbers_of(&set));
    let clip = Clip::norm(norm / 4.0).eps(0.0);
    let (report, after) = clip_laid_out(gpu(), &clip, &set, &layout).ok();
    assert_norm(report.total_norm, norm, 1e-6, "far apart");
    assert_scaled(&set, &after, 0.25, 1e-6, "far apart");
}

/// Host tensors are packed into buffers of at most what the device allows.
#[test]
fn host_tensors_beyond_one_buffer() {
    let limits = wgpu::Limits { max_buffer_size: 1 << 20, ..wgpu::Limits::downlevel_defaults() };
    let small = clipper(wgpu::Limits { max_storage_buffer_binding_size: 1 << 18, ..limits });
    let set = [(Dtype::F16, 700_001), (Dtype::F32, 5), (Dtype::F32, 300_000), (Dtype::BF16, 1_000_001)]
        .map(|(dtype, n)| Data::rounded(dtype, Random(n as u64).normals(n, 1.0)));
    let clipper = gradclip::Clipper::gpu(small);
    let norm = exact_norm(NormType::L2, numbers_of(&set));
    let clip = Clip::norm(norm / 4.0).eps(0.0);
    let (report, after) = crate::common::clip_host(&clipper, &clip, &set).ok();
    assert_norm(report.total_norm, norm, 1e-6, "in pieces");
    assert_scaled(&set, &after, 0.25, 1e-6, "in pieces");
    let mut bad = set.clone();
    bad[3].set(999_999, f64::NAN);
    let Err(Error::NonFinite(found)) = crate::common::clip_host(&clipper, &clip, &bad).report else { panic!("missed") };
    assert_eq!((found.tensor, found.index), (3, 999_999));
}

/// Every way of clipping that splits differently under small limits.
fn check_small(gpu: &GpuClipper) {
    let sets = [
        vec![Data::rounded(Dtype::F32, Random(1).normals(90_003, 1.0))],
        vec![Data::rounded(Dtype::F16, Random(2).normals(90_003, 1.0)), Data::rounded(Dtype::BF16, [1.0, 2.0, 3.0])],
        (0..200).map(|i| Data::rounded(Dtype::BF16, Random(i).normals(1 + i as usize % 9, 1.0))).collect(),
        (0..40).map(|i| Data::rounded(Dtype::F32, Random(i).normals(2003, 1.0))).collect(),
    ];
    for set in sets {
        for gap in [0, 1] {
            let layout = Layout::with_gaps(&set, |_| gap);
            let norm = exact_norm(NormType::L2, numbers_of(&set));
            let clip = Clip::norm(norm / 4.0).eps(0.0);
            let (report, after) = clip_laid_out(gpu, &clip, &set, &layout).ok();
            assert_norm(report.total_norm, norm, 1e-6, "small limits");
            assert_scaled(&set, &after, 0.25, 1e-6, "small limits");
            for policy in [NonFinite::Propagate, NonFinite::Error] {
                let clip = Clip::value(0.5).non_finite(policy);
                let (_, after) = clip_laid_out(gpu, &clip, &set, &layout).ok();
                let want: Vec<_> = set.iter().map(|t| t.clamped(-0.5, 0.5)).collect();
                assert_same_bits(&after, &want, "small limits");
            }
            let mut bad = set.clone();
            let (tensor, index) = (bad.len() - 1, bad[bad.len() - 1].len() - 1);
            bad[tensor].set(index, f64::INFINITY);
            let done = clip_laid_out(gpu, &clip, &bad, &layout);
            let Err(Error::NonFinite(found)) = done.report else { panic!("missed") };
            assert_eq!((found.tensor, found.index), (tensor, index as u64));
            assert_same_bits(&done.after, &bad, "refused");
        }
    }
}

#[test]
fn downlevel_limits_suffice() {
    check_small(&clipper(wgpu::Limits::downlevel_defaults()));
}

#[test]
fn bindings_of_64_kib() {
    check_small(&shared(small_limits()));
}

#[test]
fn dispatches_of_two_dimensions() {
    let limits = wgpu::Limits { max_compute_workgroups_per_dimension: 16, ..wgpu::Limits::downlevel_defaults() };
    check_small(&shared(limits));
    check_small(&shared(wgpu::Limits { max_compute_workgroups_per_dimension: 16, ..small_limits() }));
}

/// What cannot be done with too little is said when the clipper or the plan is made.
#[test]
fn limits_that_do_not_suffice_are_named() {
    let lowered = |limits: wgpu::Limits| {
        let (device, queue) = crate::common::gpu::device(limits);
        GpuClipper::new(&device, &queue).expect_err("too little").to_string()
    };
    let base = wgpu::Limits::downlevel_defaults();
    let error = lowered(wgpu::Limits { max_storage_buffers_per_shader_stage: 3, ..base.clone() });
    assert!(error.contains("max_storage_buffers_per_shader_stage is 3") && error.contains("at least 4"), "{error}");
    let error = lowered(wgpu::Limits { max_storage_buffer_binding_size: 1 << 15, ..base.clone() });
    assert!(error.contains("max_storage_buffer_binding_size is 32768"), "{error}");
    let error = lowered(wgpu::Limits { max_compute_invocations_per_workgroup: 4, ..base.clone() });
    assert!(error.contains("max_compute_invocations_per_workgroup is 4"), "{error}");
    let error = lowered(wgpu::Limits { max_compute_workgroup_storage_size: 128, ..base.clone() });
    assert!(error.contains("max_compute_workgroup_storage_size is 128"), "{error}");

    // More norms than a binding of partials holds: 2,048 of 32 bytes. One norm over as many tensors is no matter.
    let small = shared(small_limits());
    let buffer = upload(&small, &[0; 4 * 3000]);
    let tensors: Vec<_> = (0..3000).map(|i| GpuTensor::f32(&buffer, i..=i).expect("it fits")).collect();
    let clip = Clip::norm(1.0);
    assert!(small.plan(&clip, &tensors).is_ok());
    let error = small.plan(&clip.scope(Scope::Tensor), &tensors).expect_err("too many");
    assert!(matches!(error, Error::Limit(_)) && error.to_string().contains("2046"), "{error}");
}

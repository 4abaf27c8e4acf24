//! Guards against panics, hangs and silence on input that cannot be clipped: it must give one error that says what to
//! do.

use crate::common::{Data, Path, assert_says};
use gradclip::{Clip, Dtype, Tensor, TensorMut};

/// The least and the most that is accepted does what it says, or at least does no harm.
#[test]
fn extreme_parameters_do_not_panic() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for numbers in [vec![1.0, -2.0], vec![0.0], vec![6e4, -6e-5]] {
                let set = [Data::rounded(*dtype, numbers)];
                for max_norm in [0.0, f64::from_bits(1), f64::MIN_POSITIVE, 1.0, f64::MAX, f64::INFINITY] {
                    for eps in [0.0, f64::from_bits(1), f64::MAX] {
                        for grad_scale in [f64::MIN_POSITIVE, 1.0, f64::MAX] {
                            let clip = Clip::norm(max_norm).eps(eps);
                            let (report, _) = path.clip(&clip.grad_scale(grad_scale), &set).ok();
                            assert!(!report.total_norm.is_nan() && !report.clip_coef.is_nan());
                            assert!((0.0..=1.0).contains(&report.clip_coef), "{}", report.clip_coef);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bytes_that_are_no_whole_elements() {
    for (dtype, size) in [(Dtype::F16, 2), (Dtype::BF16, 2), (Dtype::F32, 4), (Dtype::F64, 8)] {
        let mut bytes = vec![0; 3 * size + 1];
        for n in 0..=3 * size {
            let whole = n % size == 0;
            assert_eq!(Tensor::from_bytes(dtype, &bytes[..n]).is_ok(), whole);
            assert_eq!(TensorMut::from_bytes(dtype, &mut bytes[..n]).is_ok(), whole);
        }
        let error = Tensor::from_bytes(dtype, &bytes).expect_err("one byte too many");
        assert_says(&error, &[&format!("{} bytes", 3 * size + 1), &dtype.to_string()]);
    }
}

#[cfg(feature = "gpu")]
mod on_gpu {
    use super::*;
    use crate::common::gpu::{clip_tensors, download, encoder, gpu, open, step, upload};
    use gradclip::gpu::{GpuClipper, GpuTensor};
    use gradclip::{Clipper, Error, verify};
    use std::ops::Bound;

    fn norm() -> Clip {
        Clip::norm(1.0)
    }

    fn buffer_of(gpu: &GpuClipper, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
        gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    }

    #[test]
    fn ranges_past_the_end() {
        let buffer = upload(gpu(), &[0; 40]);
        for (start, end) in [(0, 11), (10, 11), (11, 11), (0, u64::MAX), (u64::MAX, u64::MAX), (7, 3), (u64::MAX, 0)] {
            let error = GpuTensor::f32(&buffer, start..end).expect_err("past the end");
            assert!(matches!(error, Error::Tensor { .. }), "{error}");
            assert_says(&error, &["float32", &format!("{start}..{end}"), "holds 10"]);
        }
        assert!(GpuTensor::f32(&buffer, 0..=10).is_err());
        assert!(GpuTensor::f32(&buffer, 0..=u64::MAX).is_err());
        assert!(GpuTensor::f32(&buffer, (Bound::Excluded(u64::MAX), Bound::Unbounded)).is_err());
        assert!(GpuTensor::f16(&buffer, 0..21).is_err() && GpuTensor::bf16(&buffer, 21..).is_err());
        for (tensor, len) in [
            (GpuTensor::f32(&buffer, ..), 10),
            (GpuTensor::f32(&buffer, 0..=9), 10),
            (GpuTensor::f32(&buffer, (Bound::Excluded(3), Bound::Included(9))), 6),
            (GpuTensor::f16(&buffer, 1..), 19),
            (GpuTensor::bf16(&buffer, ..20), 20),
            (GpuTensor::f32(&buffer, 10..), 0),
        ] {
            tensor.and_then(|tensor| tensor.shape(&[len])).expect("it has so many elements");
        }
    }

    #[test]
    fn buffers_without_storage() {
        let buffer = buffer_of(gpu(), 16, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC);
        let error = GpuTensor::f32(&buffer, ..).expect_err("not bindable");
        assert!(matches!(error, Error::Tensor { .. }));
        assert_says(&error, &["STORAGE", "create it with"]);
    }

    #[test]
    fn float64_in_gpu_memory() {
        let buffer = upload(gpu(), &[0; 16]);
        let error = GpuTensor::new(&buffer, Dtype::F64, ..).expect_err("no float64 in WGSL");
        assert_says(&error, &["float64", "CPU"]);
        let values = [1.0f64];
        let (single, double) = (Tensor::new(&[1.0f32]), Tensor::new(&values).named("moment"));
        let error = gpu().measure(&norm(), &[single, double]).wait().expect_err("no float64 in WGSL");
        assert_says(&error, &["moment", "float64", "CPU"]);
        let error = verify(&norm(), &[double], gpu()).wait().expect_err("no float64 in WGSL");
        assert!(matches!(error, Error::UnsupportedDtype { .. }));
        let mut grads = [3.0f64, 4.0];
        let error = Clipper::gpu(gpu().clone()).apply(&norm(), &mut [TensorMut::new(&mut grads)]);
        assert_says(&error.expect_err("no float64 in WGSL"), &["tensor 0", "float64"]);
        assert_eq!(grads, [3.0, 4.0]);
    }

    /// A buffer of 6 bytes holds three halves, and one word.
    #[test]
    fn tails_that_no_shader_reaches() {
        for (size, dtype, reachable) in
            [(6, Dtype::F16, 2), (7, Dtype::BF16, 2), (10, Dtype::F16, 4), (2, Dtype::F16, 0)]
        {
            let buffer = buffer_of(gpu(), size, wgpu::BufferUsages::STORAGE);
            let error = GpuTensor::new(&buffer, dtype, ..).expect_err("the tail");
            assert_says(&error, &[&format!("last {} bytes", size % 4), "multiple of 4", "make the buffer larger"]);
            let tensor = GpuTensor::new(&buffer, dtype, ..reachable).expect("whole words");
            if reachable > 0 {
                let report = clip_tensors(gpu(), &norm(), &[tensor]).expect("zeros");
                assert_eq!((report.total_norm, report.elements), (0.0, reachable));
            }
        }
        // An odd size does not matter to what ends before it.
        let buffer = buffer_of(gpu(), 4099, wgpu::BufferUsages::STORAGE);
        clip_tensors(gpu(), &norm(), &[GpuTensor::f32(&buffer, ..).expect("1024 whole ones")]).expect("zeros");
    }

    #[test]
    fn overlapping_tensors() {
        let buffer = upload(gpu(), &[0; 400]);
        let f32 = |start, end| GpuTensor::f32(&buffer, start..end).expect("it fits");
        let f16 = |start, end| GpuTensor::f16(&buffer, start..end).expect("it fits");
        for tensors in [
            [f32(0, 10).named("a"), f32(9, 20).named("b")],
            [f32(9, 20).named("b"), f32(0, 10).named("a")],
            [f32(0, 100).named("a"), f32(50, 51).named("b")],
            [f32(5, 6).named("a"), f32(5, 6).named("b")],
            [f32(0, 10).named("a"), f16(19, 20).named("b")],
        ] {
            let error = gpu().plan(&norm(), &tensors).expect_err("they overlap");
            assert!(matches!(error, Error::Tensor { .. }));
            assert_says(&error, &["\"a\"", "\"b\"", "overlap"]);
        }
        let error = gpu().plan(&norm(), &[f32(20, 30), f32(0, 10), f32(25, 35)]).expect_err("they overlap");
        assert_says(&error, &["tensor 0", "tensor 2"]);
        // One that is long reaches past its next neighbour, which is empty or not.
        let error = gpu().plan(&norm(), &[f32(0, 30), f32(5, 5), f32(20, 21)]).expect_err("they overlap");
        assert_says(&error, &["tensor 0", "tensor 2"]);
        // Side by side, apart, or empty: fine.
        gpu().plan(&norm(), &[f32(0, 10), f32(10, 20), f16(40, 41), f16(41, 43), f32(5, 5)]).expect("no overlap");
        // The same place in another buffer too.
        let other = upload(gpu(), &[0; 400]);
        gpu().plan(&norm(), &[f32(0, 10), GpuTensor::f32(&other, 0..10).expect("it fits")]).expect("no overlap");
    }

    #[test]
    fn buffers_destroyed_before_the_plan() {
        let buffer = upload(gpu(), &[0; 64]);
        let tensor = GpuTensor::f32(&buffer, ..).expect("it fits");
        buffer.destroy();
        for clip in [norm(), Clip::value(1.0)] {
            let error = gpu().plan(&clip, std::slice::from_ref(&tensor)).expect_err("destroyed");
            assert!(matches!(error, Error::Device(_)), "{error}");
            assert_says(&error, &["destroyed"]);
        }
        // The device works on.
        clip_tensors(gpu(), &norm(), &[GpuTensor::f32(&upload(gpu(), &[0; 64]), ..).expect("it fits")]).expect("zeros");
    }

    #[test]
    fn buffers_of_another_device() {
        let adapter = crate::common::gpu::adapter();
        let open = || {
            let (device, queue) =
                crate::common::gpu::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))
                    .expect("the adapter gives a device");
            GpuClipper::new(&device, &queue).expect("default limits suffice")
        };
        let (one, two) = (open(), open());
        let buffer = upload(&one, &[0; 64]);
        let error = two.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect_err("not its own");
        assert!(matches!(error, Error::Device(_)), "{error}");
        assert_says(&error, &["refused"]);
    }

    /// The same between two devices that the library opened itself.
    #[test]
    fn buffers_of_another_clipper() {
        let (one, two) = (open(), open());
        let buffer = upload(&one, &[0; 64]);
        let error = two.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect_err("not its own");
        assert!(matches!(error, Error::Device(_)), "{error}");
    }

    /// More than any buffer may be: refused before anything is written.
    #[test]
    fn requests_for_too_much() {
        let buffer = upload(gpu(), &[0; 64]);
        for end in [1 << 40, u64::MAX / 4, u64::MAX / 2 + 1, u64::MAX - 1] {
            assert!(matches!(GpuTensor::f32(&buffer, ..end), Err(Error::Tensor { .. })));
            assert!(matches!(GpuTensor::f16(&buffer, ..end), Err(Error::Tensor { .. })));
        }
    }

    #[test]
    fn adapters_that_do_not_exist() {
        let error = GpuClipper::open_named("no such adapter").wait().expect_err("none");
        assert_says(&error, &["no GPU adapter found", "\"no such adapter\"", "mesa-vulkan-drivers"]);
        let name = gpu().device().adapter_info().name;
        let opened = GpuClipper::open_named(&name[..name.len() / 2].to_uppercase()).wait().expect("part of a name");
        assert!(opened.device().adapter_info().name.to_lowercase().contains(&name[..name.len() / 2].to_lowercase()));
    }

    /// The gradients, a plan of them, and a device that is gone.
    fn is_gone<T>(result: Result<T, Error>, when: &str) {
        match result {
            Err(Error::DeviceLost(_) | Error::Device(_) | Error::OutOfMemory(_)) => {}
            Err(error) => panic!("{when}: {error}"),
            Ok(_) => panic!("{when}: it should fail"),
        }
    }

    #[test]
    fn a_device_destroyed_before_the_plan() {
        let gpu = open();
        let buffer = upload(&gpu, &[1; 64]);
        gpu.device().destroy();
        is_gone(gpu.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]), "plan");
        let mut grads = [3.0f32, 4.0];
        is_gone(gpu.apply(&norm(), &mut [TensorMut::new(&mut grads)]).wait(), "apply");
        is_gone(gpu.measure(&norm(), &[Tensor::new(&grads)]).wait(), "measure");
        is_gone(verify(&norm(), &[Tensor::new(&grads)], &gpu).wait(), "verify");
        assert_eq!(grads, [3.0, 4.0]);
    }

    #[test]
    fn a_device_destroyed_before_encoding() {
        let gpu = open();
        let buffer = upload(&gpu, &[1; 64]);
        let plan = gpu.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect("good");
        gpu.device().destroy();
        let mut encoder = encoder(&gpu);
        // Whether it is known yet depends on who polled; what follows must not panic either way.
        let _ = plan.encode(&mut encoder);
        gpu.queue().submit([encoder.finish()]);
        is_gone(plan.report().wait(), "report");
        is_gone(crate::common::gpu::block_on(plan.report()), "awaited report");
    }

    #[test]
    fn a_device_destroyed_before_the_report() {
        let gpu = open();
        let buffer = upload(&gpu, &[1; 64]);
        let plan = gpu.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect("good");
        step(&gpu, &plan);
        plan.report().wait().expect("it works so far");
        step(&gpu, &plan);
        gpu.device().destroy();
        is_gone(crate::common::gpu::block_on(plan.report()), "awaited report");
        is_gone(plan.report().wait(), "report");
    }

    /// The caller's own device, whose errors the caller hears about.
    #[test]
    fn a_callers_device_destroyed() {
        let (device, queue) = crate::common::gpu::device(wgpu::Limits::default());
        device.on_uncaptured_error(std::sync::Arc::new(|_| {}));
        let gpu = GpuClipper::new(&device, &queue).expect("default limits suffice");
        let buffer = upload(&gpu, &[1; 64]);
        let plan = gpu.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect("good");
        device.destroy();
        let mut encoder = encoder(&gpu);
        let _ = plan.encode(&mut encoder);
        gpu.queue().submit([encoder.finish()]);
        is_gone(plan.report().wait(), "report");
        is_gone(gpu.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]), "plan");
    }

    /// A buffer destroyed after the plan: wgpu tells when the commands are submitted, and the plan has nothing to report.
    #[test]
    fn a_buffer_destroyed_before_the_submission() {
        let gpu = open();
        let buffer = upload(&gpu, &[1; 64]);
        let plan = gpu.plan(&norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect("good");
        buffer.destroy();
        step(&gpu, &plan);
        assert!(matches!(plan.report().wait(), Err(Error::NotSubmitted | Error::Device(_))));
        // The device works on.
        let buffer = upload(&gpu, bytemuck::cast_slice(&[3.0f32, 4.0]));
        clip_tensors(&gpu, &norm(), &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect("good");
        assert_eq!(download(&gpu, &buffer).len(), 8);
    }
}

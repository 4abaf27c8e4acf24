//! Guards against sizes that 32 bits do not hold, at their real size: gradients of more than 4 GiB on the device, and a
//! host tensor of more than 2 GiB, which is more than a buffer or a binding may be.
#![cfg(feature = "gpu")]

mod common;

use common::assert_norm;
use common::gpu::{clip_tensors, download, encoder, gpu, write};
use common::numbers::Random;
use gradclip::gpu::GpuTensor;
use gradclip::{Clip, Clipper, Error, TensorMut, wgpu};

/// The pattern that all of it repeats, 4 MiB, and the sum of its squares.
fn pattern() -> (Vec<f32>, f64) {
    let numbers: Vec<_> = Random(91).normals(1 << 20, 1e-3).into_iter().map(|x| x as f32).collect();
    let squares = numbers.iter().map(|x| f64::from(*x).powi(2)).sum();
    (numbers, squares)
}

/// How often a buffer repeats it: 1.5 GiB.
const TIMES: u64 = 384;

#[test]
fn four_and_a_half_gib_in_three_buffers() {
    let gpu = gpu();
    let (numbers, squares) = pattern();
    let bytes = numbers.len() as u64 * 4;
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let mut descriptor = wgpu::BufferDescriptor { label: None, size: bytes, usage, mapped_at_creation: false };
    let from = gpu.device().create_buffer(&descriptor);
    write(gpu, &from, 0, bytemuck::cast_slice(&numbers));
    descriptor.size = TIMES * bytes;
    let buffers = [(); 3].map(|()| gpu.device().create_buffer(&descriptor));
    for buffer in &buffers {
        let mut encoder = encoder(gpu);
        (0..TIMES).for_each(|i| encoder.copy_buffer_to_buffer(&from, 0, buffer, i * bytes, None));
        gpu.queue().submit([encoder.finish()]);
    }
    let tensors = buffers.each_ref().map(|buffer| GpuTensor::f32(buffer, ..).expect("it fits"));
    let norm = (squares * 3.0 * TIMES as f64).sqrt();
    let plan = gpu.plan(&Clip::norm(norm * 2.0), &tensors).expect("it fits");
    let step = || common::gpu::step(gpu, &plan);
    step();
    let report = plan.report().wait().expect("finite");
    assert_norm(report.total_norm, norm, 1e-6, "of 4.5 GiB");
    assert!(!report.clipped && report.elements == 3 * TIMES * numbers.len() as u64);

    // Near the end, more than 4 GiB behind the beginning.
    let bad = TIMES * numbers.len() as u64 - 77;
    write(gpu, &buffers[2], bad * 4, &f32::NAN.to_le_bytes());
    step();
    let Err(Error::NonFinite(found)) = plan.report().wait() else { panic!("the NaN was missed") };
    assert_eq!((found.count, found.tensor, found.index), (1, 2, bad));
    write(gpu, &buffers[2], bad * 4, &0f32.to_le_bytes());

    let halved = Clip::norm(f64::MAX).grad_scale(2.0);
    clip_tensors(gpu, &halved, &tensors).expect("finite");
    // All of it, by its norm, and its last bytes one by one.
    step();
    assert_norm(plan.report().wait().expect("finite").total_norm, norm / 2.0, 1e-6, "halved");
    let to = gpu.device().create_buffer(&wgpu::BufferDescriptor { size: bytes, ..descriptor });
    let mut encoder = encoder(gpu);
    encoder.copy_buffer_to_buffer(&buffers[2], (TIMES - 1) * bytes, &to, 0, Some(bytes));
    gpu.queue().submit([encoder.finish()]);
    let mut want: Vec<_> = numbers.iter().map(|x| x / 2.0).collect();
    want[numbers.len() - 77] = 0.0;
    assert!(download(gpu, &to) == bytemuck::cast_slice::<f32, u8>(&want), "the last 4 MiB");
}

#[test]
fn a_host_tensor_of_more_than_two_gib() {
    let (numbers, squares) = pattern();
    let times = 576;
    let mut data = numbers.repeat(times);
    assert!(data.len() as u64 * 4 > 1 << 31);
    let norm = (squares * times as f64).sqrt();
    let clipper = Clipper::gpu(gpu().clone());
    let mut clip = |max_norm: f64| {
        let clip = Clip::norm(max_norm).eps(0.0);
        clipper.apply(&clip, &mut [TensorMut::new(&mut data)])
    };
    let report = clip(2.0 * norm).expect("finite");
    assert_norm(report.total_norm, norm, 1e-6, "of a host tensor");
    assert!(!report.clipped && report.elements == (times * numbers.len()) as u64);
    assert!(clip(norm / 4.0).expect("finite").clipped);
    let off = |(i, x): (usize, &f32)| (x / (numbers[i % numbers.len()] / 4.0) - 1.0).abs() > 1e-6;
    assert_eq!(data.iter().enumerate().position(|(i, x)| *x != 0.0 && off((i, x))), None);
}

//! Clips gradients in the caller's own wgpu buffers, recorded into the caller's own encoder: `cargo run --example own_buffers`

use gradclip::Clip;
use gradclip::gpu::{GpuClipper, GpuTensor};
use gradclip::wgpu::{self, util::DeviceExt};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
    // Two float32 tensors in one buffer, as a memory pool places them.
    let contents: Vec<u8> = (0..4096 + 64).flat_map(|i| (i as f32 * 1e-3).to_ne_bytes()).collect();
    let usage = wgpu::BufferUsages::STORAGE;
    let buffer =
        device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents: &contents, usage });

    // Once. Ranges are in elements.
    let tensors = [GpuTensor::f32(&buffer, 0..4096)?.named("w"), GpuTensor::f32(&buffer, 4096..)?.named("b")];
    let mut plan = GpuClipper::new(&device, &queue)?.plan(&Clip::norm(1.0), &tensors)?;

    for max_norm in [10.0, 1.0] {
        plan.set_max_norm(max_norm)?;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        plan.encode(&mut encoder)?; // after the backward pass, before the optimizer
        queue.submit([encoder.finish()]);
        let report = plan.report().wait()?; // only if wanted
        println!("norm {}, scaled by {}", report.total_norm, report.clip_coef);
    }
    Ok(())
}

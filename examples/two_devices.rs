//! Clips one model whose gradients lie on two devices of one process: `cargo run --example two_devices`
//!
//! Each device has a thread. The threads are the ranks of a group: each measures what its device holds, they merge the norms,
//! and each scales its own by the norm of all. If there is one device only, both halves lie there.

use std::thread;
use std::time::Duration;

use gradclip::gpu::{GpuClipper, GpuTensor, adapters};
use gradclip::processes::{ProcessGroup, thread_group};
use gradclip::wgpu::{self, util::DeviceExt};
use gradclip::{Clip, ClipReport, Error};

fn main() -> Result<(), Error> {
    let mut adapters = adapters().wait();
    // A device is listed once for each graphics API.
    let first_api = adapters.first().map(|adapter| adapter.get_info().backend);
    adapters.retain(|adapter| Some(adapter.get_info().backend) == first_api);
    if adapters.is_empty() {
        return Err(Error::NoAdapter(String::new()));
    }
    let halves = [vec![0.003f32; 4096], vec![0.004f32; 4096]];
    let groups = thread_group(2, Some(Duration::from_secs(60)));
    let reports = thread::scope(|scope| {
        let ranks = groups.iter().zip(&halves).zip(adapters.iter().cycle());
        let threads: Vec<_> =
            ranks.map(|((group, half), adapter)| scope.spawn(move || clip(adapter, &**group, half))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect::<Result<Vec<_>, _>>()
    })?;
    for (rank, report) in reports.iter().enumerate() {
        println!("rank {rank}: norm {} of all, scaled by {}", report.total_norm, report.clip_coef);
    }
    Ok(())
}

/// One step of one rank.
fn clip(adapter: &wgpu::Adapter, group: &dyn ProcessGroup, gradients: &[f32]) -> Result<ClipReport, Error> {
    let gpu = GpuClipper::open_on(adapter).wait()?;
    let contents: Vec<u8> = gradients.iter().flat_map(|x| x.to_ne_bytes()).collect();
    let usage = wgpu::BufferUsages::STORAGE;
    let descriptor = wgpu::util::BufferInitDescriptor { label: None, contents: &contents, usage };
    let buffer = gpu.device().create_buffer_init(&descriptor);
    let plan = gpu.plan(&Clip::norm(0.16), &[GpuTensor::f32(&buffer, ..)?.named("half")])?;

    // Each step: after the backward pass, before the optimizer.
    let mut measure = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    plan.encode_measure(&mut measure)?;
    gpu.queue().submit([measure.finish()]);
    plan.merge_across(group).wait()?;
    let mut scale = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    plan.encode_scale(&mut scale)?;
    gpu.queue().submit([scale.finish()]);
    plan.report().wait()
}

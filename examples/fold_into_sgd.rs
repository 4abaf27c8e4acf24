//! Clipping without a scaling pass: an optimizer kernel multiplies each gradient by its factor when it reads the gradient.
//!
//! A usual clip reads every gradient to measure it, then reads and writes it to scale it. After that the optimizer reads it once
//! more. [`PlanOptions::measure_only`] leaves out the second step. The factors are in [`GpuPlan::coefficients`], for a kernel of
//! your own to bind. That saves 8 bytes of traffic for each float32.
//!
//! Here a linear model learns from 64 samples, wholly on the GPU. A step is one encoder, and only the log waits.
//!
//!     cargo run --example fold_into_sgd
//!
//! [`GpuPlan::coefficients`]: gradclip::gpu::GpuPlan::coefficients

use gradclip::gpu::{GpuClipper, GpuTensor, PlanOptions};
use gradclip::wgpu::{self, util::DeviceExt};
use gradclip::{Clip, NonFinite, Scope};

/// The optimizer. Parameters and gradients have one layout: 8 weights (segment 0 of the clip), then a bias (segment 1).
const SGD: &str = "
    struct Coefficients {
        skip: u32,            // 1 if the policy forbids the step
        factors: array<f32>,  // one for each segment, in the order of the plan's tensors
    }
    @group(0) @binding(0) var<storage, read_write> params: array<f32>;
    @group(0) @binding(1) var<storage, read> grads: array<f32>;
    @group(0) @binding(2) var<storage, read> coefficients: Coefficients;

    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3<u32>) {
        if id.x >= 9u || coefficients.skip == 1u {
            return;
        }
        let segment = select(0u, 1u, id.x >= 8u);
        params[id.x] -= 0.4 * (grads[id.x] * coefficients.factors[segment]);
    }";

/// The gradients of the mean squared error, and the error itself.
const BACKWARD: &str = "
    @group(0) @binding(0) var<storage, read_write> params: array<f32>;
    @group(0) @binding(1) var<storage, read_write> grads: array<f32>;
    @group(0) @binding(2) var<storage, read> samples: array<f32>;  // rows of 8 features and a target
    @group(0) @binding(3) var<storage, read_write> loss: array<f32>;

    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3<u32>) {
        if id.x >= 9u {
            return;
        }
        var grad = 0.0;
        var sum = 0.0;
        for (var row = 0u; row < 576u; row += 9u) {
            var error = params[8] - samples[row + 8u];
            for (var k = 0u; k < 8u; k += 1u) {
                error += params[k] * samples[row + k];
            }
            grad += 2.0 * error * select(samples[row + id.x], 1.0, id.x == 8u) / 64.0;
            sum += error * error / 64.0;
        }
        grads[id.x] = grad;
        if id.x == 0u {
            loss[0] = sum;
        }
    }";

/// A pipeline with its buffers bound. One workgroup is enough for this small model.
struct Kernel(wgpu::ComputePipeline, wgpu::BindGroup);

impl Kernel {
    fn new(device: &wgpu::Device, source: &str, buffers: &[&wgpu::Buffer]) -> Self {
        let source = wgpu::ShaderSource::Wgsl(source.into());
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let mut entries = Vec::new();
        for (binding, buffer) in (0..).zip(buffers) {
            entries.push(wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        }
        let layout = &pipeline.get_bind_group_layout(0);
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        Self(pipeline, group)
    }

    fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&self.0);
        pass.set_bind_group(0, &self.1, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
}

/// Rows of 8 features and a target, made by a true model. One target of one batch is NaN.
fn samples(step: usize) -> Vec<f32> {
    let feature = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
    let mut rows = Vec::new();
    for row in 0..64 {
        let features: Vec<_> = (0..8).map(|k| feature(row * 8 + k)).collect();
        let target: f32 = features.iter().zip(1..).map(|(x, k)| x * k as f32).sum();
        rows.extend(features);
        rows.push(if (step, row) == (5, 17) { f32::NAN } else { target + 10.0 });
    }
    rows
}

/// The floats in a buffer.
fn read(gpu: &GpuClipper, buffer: &wgpu::Buffer) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let descriptor = wgpu::BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
    let staging = gpu.device().create_buffer(&descriptor);
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, None);
    gpu.queue().submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |_| {});
    gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
    Ok(bytemuck::pod_collect_to_vec(&staging.get_mapped_range(..)?))
}

/// Trains, and returns the parameters and the loss of each step.
fn train(gpu: &GpuClipper, folded: bool) -> Result<(Vec<f32>, Vec<f32>), Box<dyn std::error::Error>> {
    let (device, queue) = (gpu.device(), gpu.queue());
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let buffer = |words: &[u32]| {
        let contents = bytemuck::cast_slice(words);
        device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents, usage })
    };
    let (params, grads, batch, loss) = (buffer(&[0; 9]), buffer(&[0; 9]), buffer(&[0; 576]), buffer(&[0]));
    let backward = Kernel::new(device, BACKWARD, &[&params, &grads, &batch, &loss]);

    // Once: what to clip and how. Each tensor by its own norm, and no step if a gradient is not finite.
    let clip = Clip::norm(4.0).scope(Scope::Tensor).non_finite(NonFinite::Skip);
    let tensors = [GpuTensor::f32(&grads, 0..8)?.named("weights"), GpuTensor::f32(&grads, 8..9)?.named("bias")];
    let (plan, sgd) = if folded {
        let plan = gpu.plan_with(&[(clip, &tensors)], PlanOptions::default().measure_only())?;
        let sgd = Kernel::new(device, SGD, &[&params, &grads, plan.coefficients()]);
        (plan, sgd)
    } else {
        // The usual way, to compare with: the plan scales in place, and the optimizer multiplies by 1.
        let ones = buffer(&[0, 1f32.to_bits(), 1f32.to_bits()]);
        (gpu.plan(&clip, &tensors)?, Kernel::new(device, SGD, &[&params, &grads, &ones]))
    };

    let mut losses = Vec::new();
    for step in 0..40 {
        queue.write_buffer(&batch, 0, bytemuck::cast_slice(&samples(step)));
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        backward.encode(&mut encoder);
        plan.encode(&mut encoder)?;
        if folded {
            // The kernel itself reads `skip`, so the host need not know.
            sgd.encode(&mut encoder);
        }
        queue.submit([encoder.finish()]);
        let report = plan.report().wait()?;
        if !folded && !report.has_non_finite() {
            // This optimizer does not read `skip`, so the host has to wait for the report first.
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            sgd.encode(&mut encoder);
            queue.submit([encoder.finish()]);
        }
        losses.push(read(gpu, &loss)?[0]);
        if folded && (step < 8 || step % 8 == 7) {
            let (norm, coef) = (report.total_norm, report.clip_coef);
            let what = if report.has_non_finite() { ", skipped" } else { "" };
            println!("step {step:2}: norm {norm:8.4}, coef {coef:.4}, loss {:9.4}{what}", losses[step]);
        }
    }
    Ok((read(gpu, &params)?, losses))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = GpuClipper::open().wait()?;
    let (folded, losses) = train(&gpu, true)?;
    assert!(losses[39] < losses[0] / 100.0, "the model learns: {losses:?}");
    assert!(losses[5].is_nan() && losses[6].is_finite(), "the bad step was skipped");
    let (in_two_passes, _) = train(&gpu, false)?;
    for (a, b) in folded.iter().zip(&in_two_passes) {
        assert!((a - b).abs() <= 1e-5 * b.abs(), "{folded:?} {in_two_passes:?}");
    }
    println!("the same parameters as by clipping first: {folded:.3?}");
    Ok(())
}

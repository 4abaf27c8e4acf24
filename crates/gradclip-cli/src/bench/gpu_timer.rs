//! Times steps on a GPU, and how fast it copies and reads.

use std::time::Instant;

use gradclip::gpu::{GpuClipper, GpuPlan, GpuTensor, PlanOptions, Speeds};
use gradclip::{Clip, ClipReport, wgpu};
use gradclip_common::text::number;

use super::gradients::{Pattern, TensorSet};
use super::timer::{Bandwidth, PassTime, StepTimer};
use crate::failure::Failure;

/// Measures by the library.
pub(super) fn gpu_speeds(gpu: &GpuClipper) -> Result<Speeds, Failure> {
    // A discrete GPU's last cache may hold 100 MB and more.
    let bytes = if gpu.device().adapter_info().device_type == wgpu::DeviceType::Cpu { 128 << 20 } else { 512 << 20 };
    let speeds = gpu.speeds(bytes).wait()?;
    if !(speeds.copy.is_finite() && speeds.read.is_finite()) {
        return Err(Failure::Setup(
            "the clock of this device stands still; try another driver or backend: WGPU_BACKEND".into(),
        ));
    }
    Ok(speeds)
}

impl Bandwidth {
    pub(super) fn of_gpu(speeds: &Speeds) -> Self {
        let gb_s = |speed: f64| number(speed / 1e9, 3);
        let copies = (gb_s(speeds.copy_by_command), gb_s(speeds.copy_by_kernel));
        let method = format!("{} MiB; copy_buffer_to_buffer {}, kernel {}", speeds.bytes >> 20, copies.0, copies.1);
        Self { copy: speeds.copy, read: speeds.read, method }
    }
}

/// How many steps are profiled.
const PROFILES: usize = 5;

/// Times steps on a GPU.
pub(super) struct GpuTimer<'a> {
    gpu: &'a GpuClipper,
    /// The pattern, repeated.
    source: wgpu::Buffer,
    gradients: wgpu::Buffer,
    measuring: GpuPlan,
    clipping: Vec<GpuPlan>,
    speeds: &'a Speeds,
    /// Whether steps are timed by the host's clock even if the device has one.
    host_clock: bool,
}

/// Gradients are restored by copies of at most this many bytes.
const SOURCE_BYTES: u64 = 64 << 20;

impl<'a> GpuTimer<'a> {
    pub(super) fn new(
        gpu: &'a GpuClipper,
        pattern: &Pattern,
        set: &TensorSet,
        clips: &[Clip],
        speeds: &'a Speeds,
        host_clock: bool,
    ) -> Result<Self, Failure> {
        let device = gpu.device();
        let size = (set.span * pattern.dtype.size() as u64).next_multiple_of(4);
        let block = pattern.bytes.len() as u64;
        let source_size = size.min(SOURCE_BYTES / block * block);
        let buffer = |size, usage| {
            let usage = usage | wgpu::BufferUsages::COPY_DST;
            let scope = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("gradients of a benchmark"),
                size,
                usage,
                mapped_at_creation: false,
            });
            match pollster::block_on(scope.pop()) {
                Some(error) => Err(gradclip::Error::OutOfMemory(error.to_string())),
                None => Ok(buffer),
            }
        };
        let gradients = buffer(size, wgpu::BufferUsages::STORAGE)?;
        let source = buffer(source_size, wgpu::BufferUsages::COPY_SRC)?;
        for at in (0..source_size).step_by(block as usize) {
            gpu.queue().write_buffer(&source, at, &pattern.bytes[..block.min(source_size - at) as usize]);
        }
        let tensor = |range: &std::ops::Range<u64>| GpuTensor::new(&gradients, pattern.dtype, range.clone());
        let tensors = set.tensors.iter().map(tensor).collect::<Result<Vec<_>, _>>()?;
        let measuring = gpu.plan_with(&[(clips[0], &tensors)], PlanOptions::default().measure_only())?;
        let clipping = clips.iter().map(|clip| gpu.plan(clip, &tensors)).collect::<Result<_, _>>()?;
        Ok(Self { gpu, source, gradients, measuring, clipping, speeds, host_clock })
    }

    fn wait(&self) -> Result<(), Failure> {
        let waited = self.gpu.device().poll(wgpu::PollType::wait_indefinitely());
        waited.map(|_| ()).map_err(|error| Failure::Setup(format!("the device does not respond: {error}")))
    }

    fn step(&self, plan: &GpuPlan) -> Result<(f64, ClipReport), Failure> {
        if !self.host_clock {
            let mut profile = plan.time().wait()?;
            return Ok((profile.seconds, profile.reports.swap_remove(0)));
        }
        let start = Instant::now();
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        plan.encode(&mut encoder)?;
        self.gpu.queue().submit([encoder.finish()]);
        self.wait()?;
        let seconds = start.elapsed().as_secs_f64();
        Ok((seconds, plan.report().wait()?))
    }
}

impl StepTimer for GpuTimer<'_> {
    fn restore(&mut self) -> Result<(), Failure> {
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let (size, step) = (self.gradients.size(), self.source.size());
        for at in (0..size).step_by(step as usize) {
            encoder.copy_buffer_to_buffer(&self.source, 0, &self.gradients, at, Some(step.min(size - at)));
        }
        self.gpu.queue().submit([encoder.finish()]);
        self.wait()
    }

    fn measure(&mut self) -> Result<(f64, ClipReport), Failure> {
        self.step(&self.measuring)
    }

    fn apply(&mut self, clip: usize) -> Result<(f64, ClipReport), Failure> {
        self.step(&self.clipping[clip])
    }

    fn passes(&mut self, clip: usize) -> Result<Vec<PassTime>, Failure> {
        let mut profiles = Vec::new();
        for _ in 0..PROFILES {
            self.restore()?;
            profiles.push(self.clipping[clip].profile().wait()?);
        }
        self.restore()?;
        profiles.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let profile = &profiles[PROFILES / 2];
        let slow = profile.held_back_by(self.speeds).map(|pass| pass.name);
        let times = profile.passes.iter().map(|pass| PassTime {
            name: pass.name,
            seconds: pass.seconds,
            bytes: pass.bytes,
            share: profile.share(pass),
            holds_back: slow == Some(pass.name),
        });
        Ok(times.collect())
    }
}

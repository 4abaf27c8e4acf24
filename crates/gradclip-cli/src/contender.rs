//! One set of gradients where it is clipped: puts them back as they were made, and times steps on them.

use std::time::Instant;

use gradclip::{Clip, ClipReport, Dtype, Tensor, TensorMut};
use memmap2::MmapMut;
use rayon::prelude::*;

use crate::backend::Backend;
use crate::failure::Failure;
use crate::subject::{Pattern, Set};

/// How fast the machine copies and reads, in bytes a second: medians.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) copy: f64,
    pub(crate) read: f64,
    /// How it was measured, for people.
    pub(crate) how: String,
}

/// Gradients and the clips of them, by number. The first only measures.
pub(crate) trait Contender {
    /// Puts the gradients back as they were made.
    fn restore(&mut self) -> Result<(), Failure>;
    /// Measures them by the first clip, and writes nothing; the seconds it took, and the report.
    fn measure(&mut self) -> Result<(f64, ClipReport), Failure>;
    /// Clips them likewise.
    fn apply(&mut self, clip: usize) -> Result<(f64, ClipReport), Failure>;
    /// What the parts of a step take, medians of a few; nothing where there is no profiler.
    fn parts(&mut self, _clip: usize) -> Result<Vec<Part>, Failure> {
        Ok(Vec::new())
    }
}

/// A part of a step.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) seconds: f64,
    /// What it must move; 0 for what only looks at tables.
    pub(crate) bytes: u64,
}

/// Bytes copied and read to learn the machine's limits: past the caches.
const LIMIT_BYTES: usize = 256 << 20;
/// The first run warms up.
const LIMIT_RUNS: usize = 10;
/// What a thread does at a time.
const PART: usize = 1 << 19;

/// Host memory that begins with a page, as large arrays of other libraries do.
fn memory(bytes: usize) -> Result<MmapMut, Failure> {
    MmapMut::map_anon(bytes).map_err(|error| {
        Failure::Setup(format!("no memory for {bytes} bytes of gradients ({error}); try smaller --sizes"))
    })
}

/// By plain loops on the backend's threads.
pub(crate) fn cpu_limits(backend: &Backend) -> Result<Limits, Failure> {
    let (mut from, mut to) = (memory(LIMIT_BYTES)?, memory(LIMIT_BYTES)?);
    backend.install(|| from.par_chunks_mut(PART).enumerate().for_each(|(i, part)| part.fill(i as u8 | 1)));
    let copy = |from: &[u8], to: &mut [u8]| {
        to.par_chunks_mut(PART).zip(from.par_chunks(PART)).for_each(|(to, from)| to.copy_from_slice(from));
    };
    let words = |part: &[u8]| part.as_chunks().0.iter().fold(0u64, |sum, w| sum.wrapping_add(u64::from_ne_bytes(*w)));
    let read = |of: &[u8]| of.par_chunks(PART).map(words).reduce(|| 0, u64::wrapping_add);
    let (mut copies, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..LIMIT_RUNS {
        let start = Instant::now();
        backend.install(|| copy(&from, &mut to));
        copies.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let sum = backend.install(|| read(&from));
        reads.push(start.elapsed().as_secs_f64());
        if sum != backend.install(|| read(&to)) {
            return Err(Failure::Setup("a plain copy of memory is not what was copied".into()));
        }
    }
    let bytes = LIMIT_BYTES as f64;
    let (copy, read) = (2.0 * bytes / median(&mut copies[1..]), bytes / median(&mut reads[1..]));
    Ok(Limits { copy, read, how: format!("{} MiB, plain loops", LIMIT_BYTES >> 20) })
}

/// Sorts, too.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}

/// In host memory, on the CPU.
pub(crate) struct OnCpu<'a> {
    backend: &'a Backend,
    pattern: &'a Pattern,
    set: &'a Set,
    memory: MmapMut,
    clips: Vec<Clip>,
}

impl<'a> OnCpu<'a> {
    pub(crate) fn new(
        backend: &'a Backend,
        pattern: &'a Pattern,
        set: &'a Set,
        clips: Vec<Clip>,
    ) -> Result<Self, Failure> {
        let memory = memory(set.span as usize * pattern.dtype.size())?;
        Ok(Self { backend, pattern, set, memory, clips })
    }
}

/// The tensors of a set in this memory.
fn tensors<'a>(set: &Set, dtype: Dtype, memory: &'a mut [u8]) -> Result<Vec<TensorMut<'a>>, Failure> {
    let (mut rest, mut at) = (memory, 0);
    let mut found = Vec::new();
    for tensor in &set.tensors {
        let [start, end] = [tensor.start, tensor.end].map(|element| element as usize * dtype.size());
        let (bytes, behind) = std::mem::take(&mut rest)[start - at..].split_at_mut(end - start);
        found.push(TensorMut::from_bytes(dtype, bytes)?);
        (rest, at) = (behind, end);
    }
    Ok(found)
}

impl Contender for OnCpu<'_> {
    fn restore(&mut self) -> Result<(), Failure> {
        let (memory, block) = (&mut self.memory, &self.pattern.bytes);
        self.backend.install(|| {
            memory.par_chunks_mut(block.len()).for_each(|part| part.copy_from_slice(&block[..part.len()]));
        });
        Ok(())
    }

    fn measure(&mut self) -> Result<(f64, ClipReport), Failure> {
        let tensors = tensors(self.set, self.pattern.dtype, &mut self.memory)?;
        let tensors: Vec<Tensor<'_>> = tensors.iter().map(TensorMut::as_tensor).collect();
        let start = Instant::now();
        let report = self.backend.measure(&self.clips[0], &tensors)?;
        Ok((start.elapsed().as_secs_f64(), report))
    }

    fn apply(&mut self, clip: usize) -> Result<(f64, ClipReport), Failure> {
        let mut tensors = tensors(self.set, self.pattern.dtype, &mut self.memory)?;
        let start = Instant::now();
        let report = self.backend.apply(&self.clips[clip], &mut tensors)?;
        Ok((start.elapsed().as_secs_f64(), report))
    }
}

#[cfg(feature = "gpu")]
pub(crate) use on_gpu::{OnGpu, gpu_limits};

#[cfg(feature = "gpu")]
mod on_gpu {
    use gradclip::gpu::{Clock, GpuClipper, GpuPlan, GpuTensor, Pass, PlanOptions};
    use gradclip::wgpu;

    use super::*;

    /// By the library's own measurement, and whether the device has a clock.
    pub(crate) fn gpu_limits(gpu: &GpuClipper) -> Result<(Limits, bool), Failure> {
        // A discrete GPU's last cache may hold 100 MB and more.
        let bytes = if gpu.adapter_info().device_type == wgpu::DeviceType::Cpu { 128 << 20 } else { 512 << 20 };
        let speeds = gpu.speeds(bytes).wait()?;
        let clock = speeds.clock == Clock::Device;
        if !(speeds.copy.best.is_finite() && speeds.read.best.is_finite()) {
            return Err(Failure::Setup(
                "the clock of this device stands still; try another driver or backend: WGPU_BACKEND".into(),
            ));
        }
        let how = format!("{} MiB, {} and {}", speeds.bytes >> 20, speeds.copy.by, speeds.read.by);
        Ok((Limits { copy: speeds.copy.median, read: speeds.read.median, how }, clock))
    }

    /// Steps whose parts are timed.
    const PROFILES: usize = 5;

    /// In device memory.
    pub(crate) struct OnGpu<'a> {
        gpu: &'a GpuClipper,
        /// The pattern, over and over again.
        source: wgpu::Buffer,
        gradients: wgpu::Buffer,
        measuring: GpuPlan,
        clipping: Vec<GpuPlan>,
        /// Whether the host's clock tells the time whatever the device has.
        host_clock: bool,
    }

    /// The pattern is put back by copies of so many bytes at most.
    const SOURCE_BYTES: u64 = 64 << 20;

    impl<'a> OnGpu<'a> {
        pub(crate) fn new(
            gpu: &'a GpuClipper,
            pattern: &Pattern,
            set: &Set,
            clips: &[Clip],
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
            Ok(Self { gpu, source, gradients, measuring, clipping, host_clock })
        }

        fn wait(&self) -> Result<(), Failure> {
            let waited = self.gpu.device().poll(wgpu::PollType::wait_indefinitely());
            waited.map(|_| ()).map_err(|error| Failure::Setup(format!("the device does not answer: {error}")))
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

    impl Contender for OnGpu<'_> {
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

        fn parts(&mut self, clip: usize) -> Result<Vec<Part>, Failure> {
            let mut profiles = Vec::new();
            for _ in 0..PROFILES {
                self.restore()?;
                profiles.push(self.clipping[clip].profile().wait()?.passes);
            }
            self.restore()?;
            let part = |(i, pass): (usize, &Pass)| {
                let mut seconds: Vec<_> = profiles.iter().map(|passes| passes[i].seconds).collect();
                Part { name: pass.name, seconds: median(&mut seconds), bytes: pass.bytes }
            };
            Ok(profiles[0].iter().enumerate().map(part).collect())
        }
    }
}

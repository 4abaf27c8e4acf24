//! Where the time of a step goes, and how fast the device could be at best.
//!
//! A profile runs one real step, and reads the device's clock at the beginning and end of its compute passes.
//! Throughput counts the bytes that a pass must move. The same clock times the device's own read and copy.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::clipper::GpuClipper;
use super::device::GpuDevice;
use super::dispatch::{Dispatch, Phase};
use super::gather::{Group, Job};
use super::kernels::{Access, Constants, Kernel, Shape, module};
use super::plan::GpuPlan;
use super::table::Piece;
use super::tuning::{SPEED_RUNS, SUM_BYTES, Sweep};
use crate::decision::Action;
use crate::{ClipReport, Error, Waiting};

/// What one step of a [`GpuPlan`] cost.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Profile {
    /// In the order in which they ran.
    pub passes: Vec<Pass>,
    /// Seconds from the beginning of the first pass to the end of the last, gaps included; by the host's clock, the sum
    /// of the passes. 0 for an empty step.
    pub seconds: f64,
    /// Whether times are the device's timestamps. If not, they are the host's, from submitting each pass to its end, which
    /// costs some 10 to 100 microseconds itself: the device was made without `Features::TIMESTAMP_QUERY`.
    pub device_clock: bool,
    /// The step's reports, one for each group.
    pub reports: Vec<ClipReport>,
}

/// A part of a step.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Pass {
    /// `measure`, `merge`, `decide` or `apply`; `step` if all of them were timed together.
    pub name: &'static str,
    /// The kernels that ran, by their files in `shaders/`; each once.
    pub kernels: Vec<&'static str>,
    /// Seconds; 0 if the device's clock went backwards or stood still.
    pub seconds: f64,
    /// The bytes of gradients, parameters, an optimizer's state and sums that the pass must move.
    ///
    /// Measuring reads each element once. Scaling reads and writes the elements of the segments that are scaled. A
    /// value clip reads and writes all elements if it changes any. An optimizer reads gradients, parameters and state, and
    /// writes parameters and state. Under a scope of several segments, mixed dtypes
    /// count by their average size. Tables and partials, some 80 bytes for each chunk, are left out: `merge` and
    /// `decide` move nothing else, and count as 0.
    pub bytes: u64,
}

/// How fast a device reads and copies at best, in bytes a second: the median of several runs. Infinite if the clock stood
/// still.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Speeds {
    /// A plain copy from one buffer to another, by the faster of the two ways below. Each byte counts twice, since it is
    /// read and written.
    pub copy: f64,
    /// What copied so fast: `shaders/copy.wgsl` or `copy_buffer_to_buffer`.
    pub copied_by: &'static str,
    /// The copy by `shaders/copy.wgsl`. It tells what kernels can reach; some drivers split their wide loads.
    pub copy_by_kernel: f64,
    /// The copy by `copy_buffer_to_buffer`.
    pub copy_by_command: f64,
    /// A plain sum that reads each byte once: `shaders/read.wgsl`.
    pub read: f64,
    /// How many bytes were read or copied.
    pub bytes: u64,
    /// As [`Profile::device_clock`].
    pub device_clock: bool,
}

impl Profile {
    /// The share of the step's time that a pass takes, from 0 to 1.
    #[must_use]
    pub fn share(&self, pass: &Pass) -> f64 {
        let all: f64 = self.passes.iter().map(|pass| pass.seconds).sum();
        if all > 0.0 { pass.seconds / all } else { 0.0 }
    }

    /// The pass that holds the step back: the one that takes the most time beyond that of moving its bytes at the speed
    /// of a copy. None if every pass is as fast as that.
    #[must_use]
    pub fn held_back_by(&self, speeds: &Speeds) -> Option<&Pass> {
        let beyond = |pass: &&Pass| pass.seconds - pass.bytes as f64 / speeds.copy;
        self.passes.iter().filter(|pass| beyond(pass) > 0.0).max_by(|a, b| beyond(a).total_cmp(&beyond(b)))
    }
}

impl GpuPlan {
    /// Runs one step, which clips the gradients as [`GpuPlan::encode`] does, and returns what each of its parts cost.
    /// Here each part is a compute pass; `encode` records one pass for all ([`GpuPlan::time`] times that).
    ///
    /// The step is submitted to the clipper's queue, behind what was submitted before, and waited for. Timestamps need
    /// `Features::TIMESTAMP_QUERY`, which [`GpuClipper::open`] asks for; without, the host's clock must do, and on the web there
    /// is none. Browsers round timestamps to 100 µs: there, time many steps that are submitted together.
    ///
    /// # Errors
    /// [`Error::Usage`] on the web, for a device without timestamps; those of [`GpuPlan::encode`] and
    /// [`GpuPlan::report`].
    pub fn profile(&self) -> Waiting<'_, Result<Profile, Error>> {
        Waiting::new(self.profiled(self.parts()))
    }

    /// Like [`GpuPlan::profile`], but with the whole step in one compute pass, as [`GpuPlan::encode`] records it.
    ///
    /// # Errors
    /// Those of [`GpuPlan::profile`].
    pub fn time(&self) -> Waiting<'_, Result<Profile, Error>> {
        Waiting::new(self.profiled(self.whole()))
    }

    /// The dispatches of each part of a step.
    fn parts(&self) -> Vec<(&'static str, Vec<&Dispatch>)> {
        let [measure, decide, apply] = &self.built.phases;
        let (merge, measure): (Vec<_>, Vec<_>) = measure.iter().partition(|d| d.kernel == Kernel::Merge);
        let (decide, apply) = (decide.iter().collect(), apply.iter().collect());
        let parts = [("measure", measure), ("merge", merge), ("decide", decide), ("apply", apply)];
        parts.into_iter().filter(|(_, dispatches)| !dispatches.is_empty()).collect()
    }

    fn whole(&self) -> Vec<(&'static str, Vec<&Dispatch>)> {
        vec![("step", self.built.phases.iter().flatten().collect())]
    }

    async fn profiled(&self, parts: Vec<(&'static str, Vec<&Dispatch>)>) -> Result<Profile, Error> {
        let device = &self.gpu.device;
        device.check_not_lost()?;
        self.encoded.fetch_add(1, Ordering::Relaxed);
        let (spans, device_clock) = timed(device, parts.len(), |i, encoder, timestamp_writes| {
            if i == 0 {
                self.begin(encoder, &[Phase::Measure, Phase::Decide, Phase::Apply]);
            }
            let descriptor = wgpu::ComputePassDescriptor { label: Some("gradclip profile"), timestamp_writes };
            let mut pass = encoder.begin_compute_pass(&descriptor);
            parts[i].1.iter().for_each(|dispatch| dispatch.record(&mut pass));
        })
        .await?;
        let (reports, outcomes) = self.reports_and_outcomes().await?;
        let wrote = outcomes.iter().flatten().any(|outcome| outcome.action != Action::Leave);
        let passes = parts.iter().zip(&spans).map(|((name, dispatches), span)| {
            let mut kernels: Vec<_> = dispatches.iter().map(|d| d.kernel.name()).collect();
            kernels.dedup();
            let mut seen = std::collections::HashSet::new();
            kernels.retain(|name| seen.insert(*name));
            let bytes = self.bytes(dispatches, &reports, wrote);
            Pass { name, kernels, seconds: span.end - span.start, bytes }
        });
        let passes = passes.collect();
        let seconds = match (spans.first(), spans.last()) {
            (Some(first), Some(last)) => (last.end - first.start).max(0.0),
            _ => 0.0,
        };
        Ok(Profile { passes, seconds, device_clock, reports })
    }

    /// The bytes that these dispatches had to move.
    fn bytes(&self, dispatches: &[&Dispatch], reports: &[ClipReport], wrote: bool) -> u64 {
        let any = |of: fn(Kernel) -> bool| dispatches.iter().any(|d| of(d.kernel));
        let measures = any(|k| matches!(k, Kernel::Norm { .. } | Kernel::NormEach { .. } | Kernel::Threshold { .. }));
        let looks = any(|k| matches!(k, Kernel::Clamp { guarded: false, writes: false, .. }));
        let clamps = any(|k| matches!(k, Kernel::Clamp { guarded: false, writes: true, .. }));
        let applies = any(|k| match k {
            Kernel::Scale { .. } | Kernel::ScaleEach { .. } => true,
            Kernel::Clamp { guarded, .. } | Kernel::Edges { guarded, .. } => guarded,
            _ => false,
        });
        let sums = any(|k| matches!(k, Kernel::Sum { .. }));
        let steps = any(|k| matches!(k, Kernel::Step(_)));
        let sums_bytes =
            if let Job::Sum(into) = &self.built.job { into.iter().map(|sum| 4 * sum.spec.len).sum() } else { 0 };
        let of_group = |(group, report): (&Group, &ClipReport)| {
            let by_value = group.clip.measured().is_none();
            let changed = if wrote { group.changed(report) } else { 0 };
            let mut bytes = 0;
            if if by_value { looks || clamps } else { measures && !group.given } {
                let beside = group.beside().map_or(&[][..], |(pieces, _)| pieces);
                let measured = group.pieces.iter().chain(beside);
                bytes += bytes_of(measured.filter(|piece| group.counted[piece.tensor]));
            }
            if by_value && clamps {
                bytes += changed;
            }
            if applies {
                bytes += 2 * changed;
            }
            if sums {
                bytes += bytes_of(&group.pieces) + sums_bytes;
            }
            if steps && report.skipped.is_none() {
                bytes += bytes_of(&group.pieces) + 2 * bytes_of(&group.parameters);
            }
            bytes
        };
        let of_groups: u64 = self.built.groups.iter().zip(reports).map(of_group).sum();
        let taken = steps && reports.iter().all(|report| report.skipped.is_none());
        of_groups + if taken { 8 * self.built.state.blocks.iter().sum::<u64>() } else { 0 }
    }
}

fn bytes_of<'p>(pieces: impl IntoIterator<Item = &'p Piece>) -> u64 {
    pieces.into_iter().map(|piece| piece.len * piece.dtype.size() as u64).sum()
}

impl Group {
    /// The bytes of the elements that a step had to write, if it wrote any.
    fn changed(&self, report: &ClipReport) -> u64 {
        let all = bytes_of(&self.pieces);
        if report.skipped.is_some() {
            return 0;
        }
        if self.clip.measured().is_none() {
            return if report.clipped || report.has_non_finite() || self.clip.grad_scale != 1.0 { all } else { 0 };
        }
        if self.clip.grad_scale != 1.0 || report.has_non_finite() {
            return all;
        }
        if report.segments.is_empty() {
            return if report.clip_coef == 1.0 { 0 } else { all };
        }
        let segments = self.segments.families().zip(&report.segments);
        let scaled: u64 = segments.filter(|(_, s)| s.clip_coef != 1.0).map(|(family, _)| family.elements).sum();
        (u128::from(all) * u128::from(scaled) / u128::from(self.segments.elements().max(1))) as u64
    }
}

impl GpuClipper {
    /// Measures how fast the device reads and copies `bytes` bytes, at most as many as it can bind: no clip can be
    /// faster. It allocates two buffers of that size, runs each pass several times, and checks the results. A few
    /// hundred MiB exceed the caches of most devices.
    ///
    /// There are two copies, a kernel and `copy_buffer_to_buffer`. The faster one counts.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the buffers do not fit; [`Error::Device`] if a result is wrong, and as
    /// [`GpuPlan::profile`].
    pub fn speeds(&self, bytes: u64) -> Waiting<'_, Result<Speeds, Error>> {
        Waiting::new(self.measured_speeds(bytes))
    }

    async fn measured_speeds(&self, bytes: u64) -> Result<Speeds, Error> {
        let device = &self.device;
        let limits = device.device.limits();
        let bindable = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(1 << 31);
        let sweep = Sweep::of(device.device.adapter_info().device_type).fitted(&limits, bindable);
        let bytes = (bytes.clamp(16, bindable)) & !15;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let from = device.storage("gradclip speeds, from", bytes, usage)?;
        let to = device.storage("gradclip speeds, to", bytes, usage)?;
        let invocations = u64::from(sweep.workgroup) * u64::from(sweep.workgroups);
        let sums = device.storage("gradclip speeds, sums", SUM_BYTES * invocations, usage)?;
        let total = fill_at_random(device, &from)?;
        let kernel = |label, first, second| {
            let source = source(sweep, label);
            device.scoped(|| PlainKernel::new(&device.device, label, source, [first, second], sweep.workgroups))
        };
        let read = kernel("read", &from, &sums)?;
        let read_back = kernel("read", &to, &sums)?;
        let copy = kernel("copy", &from, &to)?;
        // The sum of zeros is 0, so a copy that did not happen fails.
        let check = async |what: &'static str| {
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(&device.read(&[(&sums, 0, sums.size())]).await?);
            let right = words.iter().fold(0, |sum: u32, word| sum.wrapping_add(*word)) == total;
            if right { Ok(()) } else { Err(Error::Device(format!("{what} of {bytes} bytes is wrong on this device"))) }
        };

        let (spans, device_clock) =
            timed(device, SPEED_RUNS, |_, encoder, writes| read.record(encoder, writes)).await?;
        let read = median_speed(bytes, &spans);
        check("a plain read").await?;
        let (spans, _) = timed(device, SPEED_RUNS, |_, encoder, writes| copy.record(encoder, writes)).await?;
        let by_kernel = median_speed(2 * bytes, &spans);
        timed(device, 1, |_, encoder, writes| read_back.record(encoder, writes)).await?;
        check("a plain copy").await?;
        let clear = |encoder: &mut wgpu::CommandEncoder| encoder.clear_buffer(&to, 0, None);
        timed(device, 1, |_, encoder, writes| between_passes(encoder, writes.as_ref(), clear)).await?;
        let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&from, 0, &to, 0, None);
        let (spans, _) =
            timed(device, SPEED_RUNS, |_, encoder, writes| between_passes(encoder, writes.as_ref(), copy)).await?;
        let by_command = median_speed(2 * bytes, &spans);
        timed(device, 1, |_, encoder, writes| read_back.record(encoder, writes)).await?;
        check("a copy of buffers").await?;
        let (copy, copied_by) = if by_kernel > by_command {
            (by_kernel, "shaders/copy.wgsl")
        } else {
            (by_command, "copy_buffer_to_buffer")
        };
        Ok(Speeds {
            copy,
            copied_by,
            copy_by_kernel: by_kernel,
            copy_by_command: by_command,
            read,
            bytes,
            device_clock,
        })
    }
}

/// Of all runs but the first, which warms up.
fn median_speed(bytes: u64, spans: &[Range<f64>]) -> f64 {
    let mut speeds: Vec<_> = spans[1..].iter().map(|span| bytes as f64 / (span.end - span.start)).collect();
    speeds.sort_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}

/// The whole WGSL module of `read` or `copy`.
pub(super) fn source(sweep: Sweep, kernel: &str) -> String {
    let shape = Shape { workgroup: sweep.workgroup, contiguous: sweep.runs, ..Shape::PLAIN };
    module(kernel, &Constants::default(), Access::None, shape)
}

/// A plain kernel over two buffers.
pub(super) struct PlainKernel {
    pipeline: wgpu::ComputePipeline,
    buffers: wgpu::BindGroup,
    workgroups: u32,
}

impl PlainKernel {
    pub(super) fn new(
        device: &wgpu::Device,
        label: &str,
        source: String,
        buffers: [&wgpu::Buffer; 2],
        workgroups: u32,
    ) -> Self {
        let source = wgpu::ShaderSource::Wgsl(source.into());
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(label), source });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(label),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let [first, second] = buffers.map(wgpu::Buffer::as_entire_binding);
        let buffers = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(label),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[
                wgpu::BindGroupEntry { binding: 0, resource: first },
                wgpu::BindGroupEntry { binding: 1, resource: second },
            ],
        });
        Self { pipeline, buffers, workgroups }
    }

    pub(super) fn record(&self, encoder: &mut wgpu::CommandEncoder, timestamp_writes: Option<Timestamps<'_>>) {
        let descriptor = wgpu::ComputePassDescriptor { label: Some("gradclip speed"), timestamp_writes };
        let mut pass = encoder.begin_compute_pass(&descriptor);
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.buffers, &[]);
        pass.dispatch_workgroups(self.workgroups, 1, 1);
    }
}

/// Fills a buffer with words that look random, and returns their sum.
fn fill_at_random(device: &GpuDevice, buffer: &wgpu::Buffer) -> Result<u32, Error> {
    let words = buffer.size() / 4;
    let block: Vec<u32> = (0..words.min(1 << 20) as u32).map(|i| i.wrapping_mul(2_654_435_761) ^ i >> 7).collect();
    fill(device, buffer, bytemuck::cast_slice(&block))?;
    let sum = |words: &[u32]| words.iter().fold(0, |sum: u32, word| sum.wrapping_add(*word));
    let (whole, rest) = ((words / block.len() as u64) as u32, (words % block.len() as u64) as usize);
    Ok(whole.wrapping_mul(sum(&block)).wrapping_add(sum(&block[..rest])))
}

/// Fills a buffer with repetitions of a block.
pub(super) fn fill(device: &GpuDevice, buffer: &wgpu::Buffer, block: &[u8]) -> Result<(), Error> {
    let size = buffer.size();
    // wgpu does not copy within a buffer.
    let source = device.filled("gradclip block", block, wgpu::BufferUsages::COPY_SRC)?;
    device.scoped(|| {
        let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut at = 0;
        while at < size {
            let part = source.size().min(size - at);
            encoder.copy_buffer_to_buffer(&source, 0, buffer, at, Some(part));
            at += part;
        }
        device.queue.submit([encoder.finish()]);
    })
}

type Timestamps<'a> = wgpu::ComputePassTimestampWrites<'a>;

/// Times commands outside passes: from the end of one empty pass to the end of another.
fn between_passes(
    encoder: &mut wgpu::CommandEncoder,
    writes: Option<&Timestamps<'_>>,
    record: impl FnOnce(&mut wgpu::CommandEncoder),
) {
    let stamp = |encoder: &mut wgpu::CommandEncoder, which: fn(&Timestamps<'_>) -> Option<u32>| {
        let timestamp_writes = writes.map(|writes| Timestamps {
            query_set: writes.query_set,
            beginning_of_pass_write_index: None,
            end_of_pass_write_index: which(writes),
        });
        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
    };
    stamp(encoder, |writes| writes.beginning_of_pass_write_index);
    record(encoder);
    stamp(encoder, |writes| writes.end_of_pass_write_index);
}

/// Submits this number of passes, recorded by number, waits for them, and tells when each began and ended, in seconds from the
/// beginning of the first, and whether by the device's clock.
async fn timed(
    device: &GpuDevice,
    passes: usize,
    record: impl Fn(usize, &mut wgpu::CommandEncoder, Option<Timestamps<'_>>),
) -> Result<(Vec<Range<f64>>, bool), Error> {
    let encoder = || device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    if !device.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
        if cfg!(target_arch = "wasm32") {
            return Err(Error::usage("a profile needs a device with TIMESTAMP_QUERY here: the web has no other clock"));
        }
        let mut spans = Vec::new();
        let mut now = 0.0;
        for i in 0..passes {
            let commands = device.scoped(|| {
                let mut encoder = encoder();
                record(i, &mut encoder, None);
                encoder.finish()
            })?;
            device.run(None).await?;
            let start = std::time::Instant::now();
            device.run(Some(commands)).await?;
            let end = now + start.elapsed().as_secs_f64();
            spans.push(now..end);
            now = end;
        }
        return Ok((spans, false));
    }
    let count = 2 * passes as u32;
    let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
    let resolved = device.storage("gradclip timestamps", 8 * u64::from(count), usage)?;
    device.scoped(|| {
        let queries = device.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("gradclip profile"),
            ty: wgpu::QueryType::Timestamp,
            count,
        });
        let mut encoder = encoder();
        for i in 0..passes {
            let (begin, end) = (2 * i as u32, 2 * i as u32 + 1);
            let writes = Timestamps {
                query_set: &queries,
                beginning_of_pass_write_index: Some(begin),
                end_of_pass_write_index: Some(end),
            };
            record(i, &mut encoder, Some(writes));
        }
        encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
        device.queue.submit([encoder.finish()]);
    })?;
    let bytes = device.read(&[(&resolved, 0, resolved.size())]).await?;
    let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
    Ok((spans(&ticks, device.queue.get_timestamp_period()), true))
}

/// Seconds from pairs of ticks, counted from the first. The clocks of some drivers stand still or go backwards: a pass
/// that ends before it begins took no time.
fn spans(ticks: &[u64], nanoseconds_a_tick: f32) -> Vec<Range<f64>> {
    let first = ticks.first().copied().unwrap_or_default();
    let seconds = |tick: u64| tick.saturating_sub(first) as f64 * f64::from(nanoseconds_a_tick) * 1e-9;
    ticks.as_chunks::<2>().0.iter().map(|[begin, end]| seconds(*begin)..seconds(*end.max(begin))).collect()
}

#[cfg(test)]
#[path = "tests/profile.rs"]
mod tests;

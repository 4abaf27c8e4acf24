//! Host tensors through the GPU.
//!
//! The bytes of all tensors, followed by those of their parameters, are cut into *loads*. A load fills one buffer on the
//! device. There are as many buffers as memory allows, and loads take turns in them:
//!
//! ```text
//! for each load: host -> staging -> buffer, measure
//! merge, decide, report                                 a few dozen bytes come back, and no more if nothing was written
//! for each load of which something was written, from last to first:
//!     host -> staging -> buffer, unless it is still there; apply; buffer -> readback -> host
//! ```
//!
//! The order is from last to first, because the last measured loads are still on the device. The number of buffers does not
//! change where a load ends, so it changes no bit of the result.
//!
//! There is one staging buffer and one readback buffer. The host and the device take turns in each. Two of each, which
//! overlap, were no faster (`benches/records/2026-11-28-xeon-llvmpipe-host-tensors.md`).
//!
//! Once a byte of the caller's tensors is written, nothing may fail any more. If the device then fails, the CPU writes the
//! rest, by the same outcomes and with the same bits ([`WriteBack`]).

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::clipper::GpuClipper;
use super::device::{DOWNLOAD, GpuDevice, UPLOAD};
use super::dispatch::Phase;
use super::gather::{Gathered, Group, Job, OF_JOB};
use super::plan::{GpuPlan, locked};
use super::table::{Piece, dtype_code};
use super::tensor::GpuTensor;
use super::tuning::{COPIED_AT_ONCE, SMALLEST_LOAD, STAGING_BYTES};
use crate::context::{Context, Progress};
use crate::cpu::decide::{segments_of, views};
use crate::cpu::lost::lost;
use crate::cpu::pool::in_parallel;
use crate::cpu::write::write_piece;
use crate::decision::Outcome;
use crate::error::tensor_label;
use crate::examples::check_sums;
use crate::partial::Location;
use crate::processes::{GroupCall, merge};
use crate::report::LostElements;
use crate::segment::{Matrices, check_groups};
use crate::threshold::Threshold;
use crate::{Clip, ClipReport, Dtype, Error, Tensor, TensorMut, Waiting};

/// A run of bytes of a host tensor, and where it lies in its load.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    tensor: usize,
    /// In the tensor, in bytes.
    bytes: Range<usize>,
    /// In the load, in bytes.
    offset: usize,
}

/// The runs that one buffer on the device holds at a time, in the order of tensors, at most one of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Load {
    runs: Vec<Run>,
    size: usize,
}

/// The tensor that a run is of, or whose parameter it is of.
#[derive(Clone, Copy)]
struct Owner {
    group: usize,
    tensor: usize,
    is_parameter: bool,
}

/// Moves host tensors through the device.
struct Transfer<'a> {
    gpu: &'a GpuClipper,
    progress: &'a Progress,
    plan: GpuPlan,
    owners: Vec<Owner>,
    loads: Vec<Load>,
    /// Buffers on the device. Load number i uses buffer number i modulo their number.
    buffers: Vec<wgpu::Buffer>,
    /// The load that each buffer holds.
    held: Vec<Option<usize>>,
    staging: wgpu::Buffer,
    /// The submission that reads the staging buffer, if it is not mapped.
    staged: Option<wgpu::SubmissionIndex>,
    /// The phases that write a load: of a value clip in one pass, measuring writes already.
    applying: &'static [Phase],
    /// How many bytes went to the device, and how many came back.
    moved: (u64, u64),
}

impl GpuClipper {
    /// Clips host tensors in place through the GPU. They need not fit into device memory together
    /// ([`GpuClipper::with_memory_budget`]). When nothing is clipped, nothing but the report comes back.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for float64, [`Error::NonFinite`] under that policy, and the device's own errors.
    /// The gradients are then as they were. A device that fails when clipped gradients are already on their way back is no
    /// error: the CPU then writes the rest, with the same bits. It also does where the future is dropped just then.
    pub fn apply<'a, 't>(
        &'a self,
        clip: &'a Clip,
        tensors: &'a mut [TensorMut<'t>],
    ) -> Waiting<'a, Result<ClipReport, Error>> {
        Waiting::new(async move {
            let groups = &mut [(*clip, tensors)];
            Ok(self.applied(groups, Context::alone()).await?.swap_remove(0))
        })
    }

    /// Clips groups of host tensors, each by a clip of its own: see [`Clipper::apply_groups`](crate::Clipper::apply_groups).
    ///
    /// # Errors
    /// [`Error::Usage`] if the clips disagree, and those of [`GpuClipper::apply`].
    pub fn apply_groups<'a, 'g, 't>(
        &'a self,
        groups: &'a mut [(Clip, &'g mut [TensorMut<'t>])],
    ) -> Waiting<'a, Result<Vec<ClipReport>, Error>> {
        Waiting::new(self.applied(groups, Context::alone()))
    }

    /// Clips host tensors by a threshold that follows their norms: see
    /// [`Clipper::apply_adaptive`](crate::Clipper::apply_adaptive).
    ///
    /// # Errors
    /// [`Error::ThresholdState`] if the threshold belongs to other tensors, [`Error::Usage`] if the clip has no norm to
    /// follow, and those of [`GpuClipper::apply`].
    pub fn apply_adaptive<'a, 't>(
        &'a self,
        clip: &'a Clip,
        threshold: &'a mut dyn Threshold,
        tensors: &'a mut [TensorMut<'t>],
    ) -> Waiting<'a, Result<ClipReport, Error>> {
        Waiting::new(self.adapted(clip, threshold, tensors, Context::alone()))
    }

    /// Clips each example by itself and sums the clipped ones: see
    /// [`Clipper::sum_examples`](crate::Clipper::sum_examples).
    ///
    /// # Errors
    /// [`Error::Usage`] under a scope without examples, or unless there is one sum for each tensor; [`Error::Tensor`] if a
    /// sum has another length than an example; those of [`GpuClipper::apply`].
    pub fn sum_examples<'a, 't>(
        &'a self,
        clip: &'a Clip,
        tensors: &'a [Tensor<'a>],
        sums: &'a mut [TensorMut<'t>],
    ) -> Waiting<'a, Result<ClipReport, Error>> {
        Waiting::new(self.summed(clip, tensors, sums, Context::alone()))
    }

    pub(crate) async fn applied(
        &self,
        groups: &mut [(Clip, &mut [TensorMut<'_>])],
        context: Context<'_>,
    ) -> Result<Vec<ClipReport>, Error> {
        let call = GroupCall::begin(context.processes);
        check_groups(groups.iter().map(|(clip, _)| clip))?;
        if groups.is_empty() {
            merge(call, &mut [], |_, _| None).await?;
            return Ok(Vec::new());
        }
        let views: Vec<_> = groups.iter().map(|(clip, tensors)| (*clip, views(tensors))).collect();
        let mut transfer = Transfer::new(self, context.progress, &views, Job::Clip)?;
        transfer.measure(&views, call).await?;
        let (mut reports, outcomes) = transfer.plan.reports_and_outcomes().await?;
        let lost = transfer.write_back(groups, outcomes).await;
        reports.iter_mut().zip(lost).for_each(|(report, lost)| report.lost = Some(lost));
        Ok(reports)
    }

    pub(crate) async fn adapted(
        &self,
        clip: &Clip,
        threshold: &mut dyn Threshold,
        tensors: &mut [TensorMut<'_>],
        context: Context<'_>,
    ) -> Result<ClipReport, Error> {
        let call = GroupCall::begin(context.processes);
        clip.check_adaptive()?;
        let clip = clip.skipping(threshold);
        let views = [(clip, views(tensors))];
        let mut transfer = Transfer::new(self, context.progress, &views, Job::Clip)?;
        transfer.plan.bind(threshold)?;
        transfer.measure(&views, call).await?;
        transfer.plan.follow_norms(threshold).await?;
        transfer.decide()?;
        let (mut reports, outcomes) = transfer.plan.reports_and_outcomes().await?;
        let lost = transfer.write_back(&mut [(clip, tensors)], outcomes).await.pop();
        Ok(ClipReport { lost, ..reports.swap_remove(0) })
    }

    /// Measures what [`GpuClipper::apply`] would report, and writes nothing.
    ///
    /// # Errors
    /// The same.
    pub fn measure<'a>(&'a self, clip: &'a Clip, tensors: &'a [Tensor<'a>]) -> Waiting<'a, Result<ClipReport, Error>> {
        Waiting::new(self.measured(clip, tensors, Context::alone()))
    }

    pub(crate) async fn measured(
        &self,
        clip: &Clip,
        tensors: &[Tensor<'_>],
        context: Context<'_>,
    ) -> Result<ClipReport, Error> {
        let call = GroupCall::begin(context.processes);
        let views = [(*clip, tensors.to_vec())];
        let mut transfer = Transfer::new(self, context.progress, &views, Job::Measure)?;
        transfer.measure(&views, call).await?;
        Ok(transfer.plan.reports_and_outcomes().await?.0.swap_remove(0))
    }

    /// The sums stay on the device until all examples have passed.
    pub(crate) async fn summed(
        &self,
        clip: &Clip,
        tensors: &[Tensor<'_>],
        sums: &mut [TensorMut<'_>],
        context: Context<'_>,
    ) -> Result<ClipReport, Error> {
        let call = GroupCall::begin(context.processes);
        check_sums(clip, tensors.iter().map(|t| t.spec), sums.iter().map(|s| s.spec))?;
        let mut into = Vec::new();
        for sum in sums.iter() {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
            let buffer = self.device.storage("gradclip sums", (sum.data.len() as u64).max(4), usage)?;
            into.push(GpuTensor::f32(&buffer, 0..sum.len() as u64)?);
        }
        let views = [(*clip, tensors.to_vec())];
        let mut transfer = Transfer::new(self, context.progress, &views, Job::Sum(into.clone()))?;
        transfer.measure(&views, call).await?;
        let report = transfer.plan.reports_and_outcomes().await?.0.swap_remove(0);
        if report.skipped.is_none() {
            transfer.submit(|encoder| {
                transfer.plan.encode_for(encoder, Phase::Apply, None);
                Ok(())
            })?;
            // The plan adds examples from first to last.
            for load in 0..transfer.loads.len() {
                transfer.run(&[Phase::Apply], load, |i| tensors.get(i).map(|t| t.data), None).await?;
            }
            let mut read = Vec::new();
            for (of, sum) in into.iter().zip(sums.iter()) {
                read.push(self.read_all(&of.buffer, sum.data.len() as u64).await?);
            }
            for (sum, bytes) in sums.iter_mut().zip(read) {
                sum.data.copy_from_slice(&bytes);
            }
        }
        Ok(report)
    }

    async fn read_all(&self, buffer: &wgpu::Buffer, size: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size {
            let at = bytes.len() as u64;
            bytes.extend(self.device.read(&[(buffer, at, STAGING_BYTES.min(size - at))]).await?);
        }
        Ok(bytes)
    }

    /// The size of a load, and how many of them the device may hold at a time.
    fn room(&self) -> (usize, usize) {
        let limits = self.device.device.limits();
        let budget = self.memory_budget.max(SMALLEST_LOAD);
        // One binding, so that a load is one window.
        let largest = limits.max_buffer_size.min(limits.max_storage_buffer_binding_size);
        let load = STAGING_BYTES.min(largest).min(budget) / LOAD_ALIGNMENT * LOAD_ALIGNMENT;
        let narrow = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        (narrow(load), narrow(budget / load))
    }
}

/// Runs begin, and loads end, at multiples of this number of bytes, which a kernel reads at once.
const LOAD_ALIGNMENT: u64 = 16;

impl<'a> Transfer<'a> {
    /// Packs the tensors of groups into loads, and plans the job.
    fn new(
        gpu: &'a GpuClipper,
        progress: &'a Progress,
        groups: &[(Clip, Vec<Tensor<'_>>)],
        job: Job,
    ) -> Result<Self, Error> {
        let mut parts = Vec::new();
        let mut owners = Vec::new();
        for (group, (clip, tensors)) in groups.iter().enumerate() {
            let segments = segments_of(clip, tensors)?;
            let described = tensors.iter().map(|t| (t.name().map(Arc::from), t.spec.counted)).collect();
            parts.push(Group::new(clip, segments, described));
            owners.extend((0..tensors.len()).map(|tensor| Owner { group, tensor, is_parameter: false }));
        }
        for (group, (_, tensors)) in groups.iter().enumerate().filter(|(_, (clip, _))| clip.needs_parameters()) {
            owners.extend((0..tensors.len()).map(|tensor| Owner { group, tensor, is_parameter: true }));
        }
        let all = of_all(groups);
        for (t, owner) in all.iter().zip(&owners) {
            if dtype_code(t.dtype()).is_none() {
                return Err(Error::UnsupportedDtype { tensor: tensor_label(t.name(), owner.tensor), dtype: t.dtype() });
            }
        }
        let (longest, most) = gpu.room();
        let lens: Vec<_> = all.iter().map(|t| t.data.len()).collect();
        let loads = pack(&lens, longest);
        for (buffer, load) in loads.iter().enumerate() {
            for run in &load.runs {
                let Owner { group, tensor, is_parameter } = owners[run.tensor];
                let (of, dtype) = (&mut parts[group], all[run.tensor].dtype());
                let elements = |bytes: usize| (bytes / dtype.size()) as u64;
                let (first, end, start) = (elements(run.bytes.start), elements(run.bytes.end), elements(run.offset));
                let piece = |(layout, Range { start: first_element, end }): (_, Range<u64>)| {
                    let (start, len) = (start + first_element - first, end - first_element);
                    Piece { buffer, dtype, start, len, tensor, first_element, layout }
                };
                let pieces = of.segments.layouts[tensor].within(first..end).map(piece);
                if is_parameter { of.parameters.extend(pieces) } else { of.pieces.extend(pieces) }
            }
        }
        // A staging buffer has bytes even if no tensor has.
        let largest = (loads.iter().map(|load| load.size).max().unwrap_or(0) as u64).max(LOAD_ALIGNMENT);
        let staging = gpu.device.mapped_at_creation(largest, UPLOAD)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffers = as_many_as(loads.len().min(most), || gpu.device.storage("gradclip load", largest, usage))?;
        let mut bound: Vec<_> = (0..loads.len()).map(|load| buffers[load % buffers.len()].clone()).collect();
        let clips = matches!(job, Job::Clip);
        let mut job_pieces = Vec::new();
        if let Job::Sum(sums) = &job {
            for (tensor, sum) in sums.iter().enumerate() {
                job_pieces.push(sum.piece(bound.len(), tensor, (OF_JOB, 0..sum.spec.len)));
                bound.push(sum.buffer.clone());
            }
        }
        let plan =
            Gathered { buffers: bound, groups: parts, job, job_pieces, threshold: None, counts: false, in_turn: true };
        let plan = GpuPlan::new(gpu, plan)?;
        let measuring_writes = clips && plan.built.groups.iter().any(|group| !group.reads_first());
        let applying: &[_] = if measuring_writes { &[Phase::Measure, Phase::Apply] } else { &[Phase::Apply] };
        let (held, staged, moved) = (vec![None; buffers.len()], None, (0, 0));
        Ok(Self { gpu, progress, plan, owners, loads, buffers, held, staging, staged, applying, moved })
    }

    /// Brings all loads to the device, measures them, merges in the partials of other processes, and decides.
    async fn measure(&mut self, groups: &[(Clip, Vec<Tensor<'_>>)], call: GroupCall<'_>) -> Result<(), Error> {
        let all = of_all(groups);
        for load in 0..self.loads.len() {
            self.run(&[Phase::Measure], load, |i| Some(all[i].data), None).await?;
            let of_tensors = self.loads[load].runs.iter().filter(|run| !self.owners[run.tensor].is_parameter);
            of_tensors.for_each(|run| self.progress.measured(run.bytes.len()));
        }
        self.submit(|encoder| {
            self.plan.encode_for(encoder, Phase::Measure, None);
            self.plan.encode_phases(encoder, &[Phase::Decide])
        })?;
        if call.group().size() > 1 {
            self.plan.merged(call).await?;
            self.decide()?;
        }
        Ok(())
    }

    /// Writes the clipped tensors, given the outcomes by group, and returns what each group lost. From here on a failing
    /// device is no error.
    async fn write_back(
        self,
        groups: &mut [(Clip, &mut [TensorMut<'_>])],
        outcomes: Vec<Vec<Outcome>>,
    ) -> Vec<LostElements> {
        let lost = groups.iter().map(|_| Mutex::default()).collect();
        let tensors = groups.iter_mut().flat_map(|(_, tensors)| tensors.iter_mut()).collect();
        let mut back = WriteBack { due: Vec::new(), transfer: self, tensors, outcomes, lost, begun: false };
        for load in &back.transfer.loads {
            back.due.push(load.runs.iter().filter(|run| back.is_written(run)).cloned().collect());
        }
        if let Err(error) = back.read_back().await {
            log::warn!("the GPU failed while clipped gradients were read back ({error}); the CPU clips the rest");
            back.finish();
        }
        back.lost.iter().map(|lost| *locked(lost)).collect()
    }

    /// Submits phases over a load, and its copy to `readback`. A load that is not on the device is copied there first. One
    /// that is there is not measured again.
    async fn run<'s>(
        &mut self,
        phases: &[Phase],
        load: usize,
        data: impl Fn(usize) -> Option<&'s [u8]>,
        readback: Option<&wgpu::Buffer>,
    ) -> Result<wgpu::SubmissionIndex, Error> {
        let (at, size) = (load % self.buffers.len(), self.loads[load].size as u64);
        let is_held = self.held[at] == Some(load);
        if !is_held {
            self.stage(load, data).await?;
        }
        let after = self.submit(|encoder| {
            let buffer = &self.buffers[at];
            if !is_held {
                encoder.copy_buffer_to_buffer(&self.staging, 0, buffer, 0, Some(size));
            }
            for phase in phases.iter().filter(|phase| !(is_held && **phase == Phase::Measure)) {
                self.plan.encode_for(encoder, *phase, Some(load));
            }
            if let Some(readback) = readback {
                encoder.copy_buffer_to_buffer(buffer, 0, readback, 0, Some(size));
            }
            Ok(())
        })?;
        if !is_held {
            self.staged = Some(after.clone());
            self.held[at] = Some(load);
            self.moved.0 += size;
            log::trace!("load {load} has gone to the device");
        }
        Ok(after)
    }

    /// Copies a load to the staging buffer, once that is free. `data` gives the bytes of a tensor, or None to leave it out.
    async fn stage<'s>(&mut self, load: usize, data: impl Fn(usize) -> Option<&'s [u8]>) -> Result<(), Error> {
        let device = &self.gpu.device;
        if let Some(after) = self.staged.take() {
            device.mapped(device.map(&self.staging, wgpu::MapMode::Write, self.staging.size(), after)?).await?;
        }
        let mut view = self.staging.get_mapped_range_mut(..).map_err(|e| Error::Device(e.to_string()))?;
        let (mut rest, mut at) = (view.slice(..), 0);
        let mut work = Vec::new();
        for run in &self.loads[load].runs {
            let Some(data) = data(run.tensor) else { continue };
            let from = &data[run.bytes.clone()];
            let (to, behind) = rest.split_at(run.offset - at).1.split_at(from.len());
            (rest, at) = (behind, run.offset + from.len());
            // wgpu lets only slices of a constant length go to another thread.
            let (pieces, mut tail) = to.into_chunks::<COPIED_AT_ONCE>();
            let (whole, from) = from.as_chunks::<COPIED_AT_ONCE>();
            work.extend(pieces.into_iter().zip(whole));
            tail.copy_from_slice(from);
        }
        let (pieces, bytes) = (work.len(), work.len() * COPIED_AT_ONCE);
        in_parallel(work.into_iter(), pieces, bytes, |(to, from)| wgpu::WriteOnly::from(to).copy_from_slice(from));
        drop(view);
        self.staging.unmap();
        Ok(())
    }

    fn decide(&self) -> Result<(), Error> {
        self.submit(|encoder| self.plan.encode_phases(encoder, &[Phase::Decide]))?;
        Ok(())
    }

    fn submit(
        &self,
        record: impl FnOnce(&mut wgpu::CommandEncoder) -> Result<(), Error>,
    ) -> Result<wgpu::SubmissionIndex, Error> {
        let GpuDevice { device, queue, .. } = &self.gpu.device;
        self.gpu.device.scoped(|| {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            record(&mut encoder)?;
            Ok(queue.submit([encoder.finish()]))
        })?
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        let (there, back) = self.moved;
        log::debug!("host tensors: {there} bytes went to the device, {back} came back");
    }
}

/// What is done with a piece of a tensor: its clip, its dtype, its segments, and the outcomes of all.
type How<'a> = (&'a Clip, Dtype, (&'a Matrices, &'a [Outcome]));

/// The writing of clipped loads into the caller's tensors.
struct WriteBack<'a, 't, 'd> {
    transfer: Transfer<'a>,
    tensors: Vec<&'t mut TensorMut<'d>>,
    /// By group and segment.
    outcomes: Vec<Vec<Outcome>>,
    /// By group.
    lost: Vec<Mutex<LostElements>>,
    /// By load, the runs that are not written yet.
    due: Vec<Vec<Run>>,
    /// Whether anything is written.
    begun: bool,
}

impl WriteBack<'_, '_, '_> {
    fn is_written(&self, run: &Run) -> bool {
        let Owner { group, tensor, is_parameter } = self.transfer.owners[run.tensor];
        if is_parameter {
            return false;
        }
        let size = self.tensors[run.tensor].dtype().size();
        let elements = (run.bytes.start / size) as u64..(run.bytes.end / size) as u64;
        let layout = &self.transfer.plan.built.groups[group].segments.layouts[tensor];
        !layout.leaves(&self.outcomes[group], elements)
    }

    async fn read_back(&mut self) -> Result<(), Error> {
        let size = self.transfer.staging.size();
        let readback = self.transfer.gpu.device.storage("gradclip readback", size, DOWNLOAD)?;
        for load in (0..self.due.len()).rev().filter(|load| !self.due[*load].is_empty()).collect::<Vec<_>>() {
            let Self { transfer, tensors, .. } = self;
            let size = transfer.loads[load].size as u64;
            let data = |i: usize| tensors.get(i).map(|t| &*t.data);
            let after = transfer.run(transfer.applying, load, data, Some(&readback)).await?;
            let device = &transfer.gpu.device;
            device.mapped(device.map(&readback, wgpu::MapMode::Read, size, after)?).await?;
            transfer.moved.1 += size;
            let view = readback.get_mapped_range(..size).map_err(|e| Error::Device(e.to_string()))?;
            self.write(load, &view);
            drop(view);
            readback.unmap();
            log::trace!("load {load} has come back");
        }
        Ok(())
    }

    /// Writes the due runs of a load that has come back.
    fn write(&mut self, load: usize, bytes: &[u8]) {
        self.begun = true;
        let due = std::mem::take(&mut self.due[load]);
        self.write_by(&due, |run, (clip, dtype, own), (at, to)| {
            let lost = lost(clip, at.index, dtype, own, to);
            let start = run.offset + at.index as usize * dtype.size() - run.bytes.start;
            to.copy_from_slice(&bytes[start..][..to.len()]);
            lost
        });
    }

    /// Clips the due runs on the CPU, in the caller's own bytes, which nothing has changed yet.
    fn finish(&mut self) {
        self.begun = false;
        for due in std::mem::take(&mut self.due) {
            self.write_by(&due, |_, (clip, dtype, own), (at, data)| write_piece(clip, at, dtype, own, data).lost);
        }
    }

    /// Calls `write` with pieces of the caller's bytes, in parallel, and counts what it has lost.
    fn write_by(
        &mut self,
        due: &[Run],
        write: impl Fn(&Run, How<'_>, (Location, &mut [u8])) -> LostElements + Send + Sync,
    ) {
        let Self { transfer, tensors, outcomes, lost, .. } = self;
        let first = due.first().map_or(0, |run| run.tensor);
        let mut tensors = (first..).zip(&mut tensors[first..]);
        let (mut work, mut bytes) = (Vec::new(), 0);
        for run in due {
            // Runs are in the order of tensors, and at most one of each.
            let Some((_, tensor)) = tensors.find(|(i, _)| *i == run.tensor) else { continue };
            let TensorMut { spec, data, .. } = &mut **tensor;
            let Owner { group, tensor, .. } = transfer.owners[run.tensor];
            let of = &transfer.plan.built.groups[group];
            let own = (&of.segments.layouts[tensor], &outcomes[group][..]);
            let (dtype, lost) = (spec.dtype, &lost[group]);
            for (start, data) in
                run.bytes.clone().step_by(COPIED_AT_ONCE).zip(data[run.bytes.clone()].chunks_mut(COPIED_AT_ONCE))
            {
                let at = Location { tensor, index: (start / dtype.size()) as u64 };
                bytes += data.len();
                work.push((run, (&of.clip, dtype, own), (at, data), lost));
            }
        }
        let pieces = work.len();
        in_parallel(work.into_iter(), pieces, bytes, |(run, how, piece, all)| {
            let lost = write(run, how, piece);
            if lost != LostElements::default() {
                let mut all = locked(all);
                *all = all.and(lost);
            }
        });
    }
}

impl Drop for WriteBack<'_, '_, '_> {
    /// If the future is dropped halfway, the CPU finishes, so that no set is left half clipped.
    fn drop(&mut self) {
        if self.begun {
            self.finish();
        }
    }
}

/// The tensors of all groups, then their parameters where a group's clip needs them.
fn of_all<'t>(groups: &[(Clip, Vec<Tensor<'t>>)]) -> Vec<Tensor<'t>> {
    let tensors = groups.iter().flat_map(|(_, tensors)| tensors.iter().copied());
    let needing = groups.iter().filter(|(clip, _)| clip.needs_parameters());
    tensors.chain(needing.flat_map(|(_, tensors)| tensors.iter().filter_map(|t| t.parameter.copied()))).collect()
}

/// Makes `wanted` buffers, or as many as there is memory for.
fn as_many_as(wanted: usize, make: impl Fn() -> Result<wgpu::Buffer, Error>) -> Result<Vec<wgpu::Buffer>, Error> {
    let mut made = Vec::new();
    while made.len() < wanted {
        match make() {
            Ok(buffer) => made.push(buffer),
            Err(Error::OutOfMemory(_)) if !made.is_empty() => {
                // The clip needs room for other buffers too.
                made.truncate((made.len() - 1).max(1));
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(made)
}

/// Lays tensors of these lengths into loads of at most `longest` bytes. All loads but the last are full.
fn pack(lens: &[usize], longest: usize) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    for (tensor, len) in lens.iter().enumerate() {
        let mut at = 0;
        while at < *len {
            if loads.last().is_none_or(|load| load.size >= longest) {
                loads.push(Load::default());
            }
            let Some(load) = loads.last_mut() else { break };
            let end = (at + longest - load.size).min(*len);
            load.runs.push(Run { tensor, bytes: at..end, offset: load.size });
            load.size = (load.size + end - at).next_multiple_of(LOAD_ALIGNMENT as usize);
            at = end;
        }
    }
    loads
}

#[cfg(test)]
#[path = "tests/host.rs"]
mod tests;

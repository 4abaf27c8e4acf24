//! [`GpuPlan`]: everything that a clip needs, built once; each step is then a list of dispatches to record.

mod across;
mod optimizer;
mod report;
mod update;

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::build::Built;
use super::clipper::GpuClipper;
use super::dispatch::Phase;
use super::gather::Gathered;
use super::memory::Memory;
use super::options::PlanOptions;
use super::readback::{LossRow, Stamped};
use super::tensor::GpuTensor;
use crate::processes::GroupTotal;
use crate::segment::Segments;
use crate::{Clip, Error, Waiting};

/// A clip of certain tensors in GPU memory, ready to be recorded again and again.
///
/// Made by [`GpuClipper::plan`] or [`GpuClipper::plan_with`]. The plan keeps the tensors' buffers alive, and holds some
/// 90 bytes on the device for each chunk (a tensor, or 16 KiB to 4 MiB of one), and some 100 more for each segment
/// beyond the first. It is `Send + Sync`. Its steps share one set of partials and results, so they must run on the GPU
/// one after another, as everything on one queue does.
#[derive(Debug)]
pub struct GpuPlan {
    pub(super) gpu: GpuClipper,
    pub(super) built: Built,
    pub(super) encoded: AtomicU64,
    reported: Mutex<Reported>,
    /// For each group of tensors, its total over all processes.
    across: Mutex<Stamped<Vec<MergedGroup>>>,
    /// The thresholds of this process alone, if merging has set others: each recorded norm begins with them.
    own_thresholds: Mutex<Option<wgpu::Buffer>>,
}

/// The total of a group of tensors over all processes.
#[derive(Clone, Debug)]
struct MergedGroup {
    segments: Segments,
    total: GroupTotal,
}

/// At the last report: how many steps had been encoded, and how many had run by the device's own count.
#[derive(Clone, Copy, Debug, Default)]
struct Reported {
    encoded: u64,
    steps: u32,
}

impl GpuClipper {
    /// Plans a clip of tensors in GPU memory: [`GpuClipper::plan_with`] for one group, without options.
    ///
    /// # Errors
    /// Those of [`GpuClipper::plan_with`].
    pub fn plan(&self, clip: &Clip, tensors: &[GpuTensor]) -> Result<GpuPlan, Error> {
        self.plan_with(&[(*clip, tensors)], PlanOptions::default())
    }

    /// Plans a clip of groups of tensors, each with its own clip, in one compute pass. [`GpuPlan::reports`] returns
    /// their reports in order. Compiles the kernels it needs, if no earlier plan has.
    ///
    /// The clips must agree on `grad_scale` and on the policy for non-finite gradients, which holds for all groups
    /// together.
    ///
    /// The buffers must belong to this device. A buffer of another device is an error. wgpu cannot recognise a buffer
    /// of another `wgpu::Instance`: it panics, or takes another buffer for it.
    ///
    /// # Errors
    /// [`Error::Setting`] for an invalid clip, threshold or optimizer; [`Error::Usage`] if the clips disagree, there is
    /// no group, or the options do not fit each other, the clip or the tensors; [`Error::Tensor`] if a tensor does not
    /// fit the scope, its parameter or its sum, or two tensors share elements; [`Error::ThresholdState`] if the
    /// threshold belongs to other tensors or another scope; [`Error::Limit`], [`Error::OutOfMemory`] or
    /// [`Error::Device`] if the device cannot hold or bind what the plan needs. A browser tells the last two later
    /// ([`GpuPlan::ready`]). The tensors are not touched.
    pub fn plan_with(&self, groups: &[(Clip, &[GpuTensor])], options: PlanOptions) -> Result<GpuPlan, Error> {
        let sizes: Vec<_> = groups.iter().map(|(_, tensors)| tensors.len()).collect();
        let counts = options.count_lost;
        let (job, threshold) = options.into_job(&sizes)?;
        GpuPlan::new(self, Gathered::new(groups, job, threshold, counts)?)
    }
}

impl GpuPlan {
    pub(super) fn new(gpu: &GpuClipper, gathered: Gathered) -> Result<Self, Error> {
        let mut gpu = gpu.clone();
        gpu.device = gpu.device.apart();
        Ok(Self {
            built: Built::new(&gpu, gathered, None)?,
            gpu,
            encoded: AtomicU64::new(0),
            reported: Mutex::default(),
            across: Mutex::default(),
            own_thresholds: Mutex::default(),
        })
    }

    /// Waits until the device has taken the plan: its kernels are compiled, its buffers are there. A browser tells only
    /// then what was wrong with the plan; the first report tells it too. Elsewhere planning has told it already.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and [`Error::Device`] of [`GpuClipper::plan_with`].
    pub fn ready(&self) -> Waiting<'_, Result<(), Error>> {
        Waiting::new(self.gpu.device.told())
    }

    /// Records one step: the norm, the decision, and the scaling or clamping in place, in one compute pass. With an
    /// [optimizer](PlanOptions::optimizer) its step takes the place of the scaling. Neither waits nor allocates (wgpu's
    /// own recording aside); nothing happens before the encoder's commands are submitted.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] if the device was lost and [`GpuClipper::open`] made it. wgpu reports other faults of the
    /// encoder or the buffers (destroyed or mapped ones) when the encoder is finished or submitted.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        self.encode_phases(encoder, &[Phase::Measure, Phase::Decide, Phase::Apply])
    }

    /// Records the norm and the decision, and writes nothing but the report and the coefficients.
    ///
    /// # Errors
    /// As [`GpuPlan::encode`].
    pub fn encode_measure(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        self.encode_phases(encoder, &[Phase::Measure, Phase::Decide])
    }

    /// Records the decision, by the last norms and the thresholds at that time, and the scaling or the optimizer's step.
    ///
    /// # Errors
    /// As [`GpuPlan::encode`].
    pub fn encode_scale(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        self.encode_phases(encoder, &[Phase::Decide, Phase::Apply])
    }

    pub(super) fn encode_phases(&self, encoder: &mut wgpu::CommandEncoder, phases: &[Phase]) -> Result<(), Error> {
        self.gpu.device.check_not_lost()?;
        self.begin(encoder, phases);
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("gradclip"), timestamp_writes: None });
        for phase in phases {
            self.built.phases[*phase as usize].iter().for_each(|dispatch| dispatch.record(&mut pass));
        }
        if phases.contains(&Phase::Decide) {
            self.encoded.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Records what comes before these phases: before each norm this process's own thresholds hold again, and losses are
    /// counted from 0 where gradients are written.
    pub(super) fn begin(&self, encoder: &mut wgpu::CommandEncoder, phases: &[Phase]) {
        let Memory { thresholds, losses, .. } = &self.built.memory;
        if let (true, Some(own)) = (phases.contains(&Phase::Measure), &*locked(&self.own_thresholds)) {
            encoder.copy_buffer_to_buffer(own, 0, thresholds, 0, own.size());
        }
        let Some(losses) = losses else { return };
        for (i, group) in (0..).zip(&self.built.groups) {
            if phases.contains(if group.reads_first() { &Phase::Apply } else { &Phase::Measure }) {
                encoder.clear_buffer(losses, LossRow::at(i), Some(LossRow::BYTES));
            }
        }
    }

    /// Records the dispatches of a phase for one of the plan's buffers or, with None, those that merge and decide.
    pub(super) fn encode_for(&self, encoder: &mut wgpu::CommandEncoder, phase: Phase, buffer: Option<usize>) {
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("gradclip"), timestamp_writes: None });
        let dispatches = self.built.phases[phase as usize].iter();
        dispatches.filter(|dispatch| dispatch.buffer == buffer).for_each(|dispatch| dispatch.record(&mut pass));
    }

    /// The buffer in which each step leaves the factors of gradients, for the caller's kernels. An optimizer that
    /// multiplies each gradient as it reads it needs no scaling pass
    /// ([`PlanOptions::measure_only`](super::PlanOptions::measure_only) plans a clip without one). In WGSL:
    ///
    /// ```wgsl
    /// struct Coefficients {
    ///     skip: u32,           // 1 if the step is skipped, else 0
    ///     factors: array<f32>, // c / grad_scale for each segment
    /// }
    /// @group(0) @binding(0) var<storage, read> coefficients: Coefficients;
    /// ```
    ///
    /// Segments are in the order of the report, groups one after another. Where `skip` is 1 the factors are 1: the
    /// policy is error or skip and something is not finite, or a norm is above [`Clip::skip_above`]. Under
    /// the policy `drop` the caller's kernel must drop non-finite elements. A value clip leaves `1 / grad_scale`.
    #[must_use]
    pub fn coefficients(&self) -> &wgpu::Buffer {
        &self.built.memory.coefficients
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Merging again would count the other processes twice.
pub(super) const MERGED_ALREADY: Error =
    Error::Usage(Cow::Borrowed("this norm has merged across processes already; measure again before the next merge"));

//! A norm measured set by set on the device. Host side of `shaders/accumulate.wgsl`; twin: `src/accumulator.rs`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytemuck::Zeroable;

use super::clipper::GpuClipper;
use super::dispatch::{Dispatch, Phase, clip_group, whole};
use super::gather::{AccumulatorMemory, Gathered, Group, Job};
use super::kernels::{Access, Kernel, Norm};
use super::memory::{Kept, Memory};
use super::params::Params;
use super::plan::{GpuPlan, MERGED_ALREADY, locked};
use super::readback::{OutcomeRow, PARTIAL_BYTES, PartialRow, ResultsHead, Stamped};
use super::table::Origin;
use super::tensor::GpuTensor;
use super::threshold::{Formula, StateRow};
use crate::clip::Mode;
use crate::processes::{GroupCall, GroupPartials, GroupTotal, ProcessGroup, merge};
use crate::segment::Segments;
use crate::{Clip, ClipReport, Error, Scope, Waiting};

/// A global norm over sets of tensors that do not all exist at once: a layer's gradients as soon as backward has made
/// them, or one micro-batch after another.
///
/// [`GpuNormAccumulator::plan`] plans a set. In each step record, in this order, [`GpuAccumulatorPlan::accumulate`] for
/// every set, [`GpuNormAccumulator::finish`], and [`GpuAccumulatorPlan::scale`] for every set that is to be clipped.
/// `finish` also begins the next norm.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, wgpu};
/// # use wgpu::util::DeviceExt;
/// # let gpu = GpuClipper::open().wait()?;
/// # let (device, queue) = (gpu.device(), gpu.queue());
/// # let buffer = |x: f32| device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
/// #     label: None, contents: bytemuck::cast_slice(&[x]), usage: wgpu::BufferUsages::STORAGE });
/// # let (w, b) = (buffer(3.0), buffer(4.0));
/// let running = gpu.accumulator(&Clip::norm(1.0))?;
/// let sets = [running.plan(&[GpuTensor::f32(&w, ..)?])?, running.plan(&[GpuTensor::f32(&b, ..)?])?];
/// let mut encoder = device.create_command_encoder(&Default::default());
/// for set in &sets {
///     set.accumulate(&mut encoder)?;
/// }
/// running.finish(&mut encoder)?;
/// for set in &sets {
///     set.scale(&mut encoder)?;
/// }
/// queue.submit([encoder.finish()]);
/// assert!((running.report().wait()?.total_norm - 5.0).abs() < 1e-5);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GpuNormAccumulator {
    gpu: GpuClipper,
    /// The clip and its one segment.
    group: Group,
    /// Its one partial is the last finished one, for the report.
    memory: Memory,
    /// The running partial.
    partial: wgpu::Buffer,
    finish: Vec<Dispatch>,
    sets: Mutex<Sets>,
    /// Whether the running partial includes other processes' parts, until the next `finish`.
    is_merged: Arc<AtomicBool>,
}

/// The tensors of all sets so far, in the order in which they were planned.
#[derive(Debug, Default)]
struct Sets {
    origins: Vec<Origin>,
    names: Vec<Option<Arc<str>>>,
    elements: u64,
    /// The totals that merged across the processes of a group.
    across: Stamped<MergedTotal>,
}

/// A total, and its number of elements.
type MergedTotal = (GroupTotal, u64);

/// A set of tensors that belongs to a [`GpuNormAccumulator`].
#[derive(Debug)]
pub struct GpuAccumulatorPlan {
    plan: GpuPlan,
    is_merged: Arc<AtomicBool>,
}

impl GpuClipper {
    /// Begins to accumulate a norm.
    ///
    /// # Errors
    /// [`Error::Usage`] unless the clip is one by norm with [`Scope::Global`]; the device's own.
    pub fn accumulator(&self, clip: &Clip) -> Result<GpuNormAccumulator, Error> {
        clip.check()?;
        let (Mode::Norm(_), Scope::Global, Some(norm_type)) = (clip.mode, clip.scope, clip.measured()) else {
            return Err(Error::usage("an accumulator on the device needs a clip by norm with Scope::Global"));
        };
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let partial = self.device.filled("gradclip accumulator", bytemuck::bytes_of(&PartialRow::EMPTY), usage)?;
        let group = Group { limit: 1, ..Group::new(clip, Segments::new(clip, std::iter::empty())?, Vec::new()) };
        let groups = std::slice::from_ref(&group);
        let memory = Memory::new(&self.device, groups, 1, &[StateRow::zeroed()], Kept::Nothing)?;
        let params = Params::new(&group, &group.clip, 0, None).upload(&self.device)?;
        let clips = clip_group(self, &Memory { partials: partial.clone(), ..memory.clone() }, &params)?;
        let one = |kernel, bindings: &[_]| Dispatch::new(self, (kernel, Access::None), clips.of(kernel), bindings, 1);
        let norm = Norm::from(norm_type);
        let (skips, finalise) =
            (Kernel::Threshold { formula: Formula::Fixed, norm }, Kernel::Finalise { norm: Some(norm), given: false });
        let mut finish = Vec::new();
        if clip.may_skip() {
            finish.push(one(skips, &[whole(&memory.thresholds), whole(&memory.states)])?);
        }
        finish.push(one(finalise, &[whole(&memory.thresholds), whole(&memory.coefficients)])?);
        finish.push(one(Kernel::Accumulate { moves: true }, &[whole(&memory.partials)])?);
        let (gpu, sets, is_merged) = (self.clone(), Mutex::default(), Arc::default());
        Ok(GpuNormAccumulator { gpu, group, memory, partial, finish, sets, is_merged })
    }
}

impl GpuNormAccumulator {
    /// Plans a set of tensors. The report counts tensors in the order in which sets were planned.
    ///
    /// # Errors
    /// Those of [`GpuClipper::plan`].
    pub fn plan(&self, tensors: &[GpuTensor]) -> Result<GpuAccumulatorPlan, Error> {
        let mut sets = self.sets();
        let first_tensor = sets.names.len();
        let memory = AccumulatorMemory {
            partial: self.partial.clone(),
            results: self.memory.results.clone(),
            origins: u32::try_from(sets.origins.len()).unwrap_or(u32::MAX),
        };
        let gathered = Gathered::new(&[(self.group.clip, tensors)], Job::Accumulate(memory), None, false)?;
        let plan = GpuPlan::new(&self.gpu, gathered)?;
        let moved = |origin: &Origin| Origin { tensor: origin.tensor + first_tensor, ..*origin };
        sets.origins.extend(plan.built.origins.iter().map(moved));
        sets.names.extend(tensors.iter().map(|t| t.spec.name.clone()));
        sets.elements += plan.built.groups.iter().map(|group| group.segments.elements()).sum::<u64>();
        Ok(GpuAccumulatorPlan { plan, is_merged: self.is_merged.clone() })
    }

    /// Records the decision over everything accumulated since the last `finish`, and begins a new norm.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], as [`GpuPlan::encode`].
    pub fn finish(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        self.gpu.device.check_not_lost()?;
        self.is_merged.store(false, Ordering::Relaxed);
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("gradclip"), timestamp_writes: None });
        self.finish.iter().for_each(|dispatch| dispatch.record(&mut pass));
        Ok(())
    }

    /// Merges in what the other processes of a group have accumulated. Call it after submitting all of this step's
    /// accumulating and before [`GpuNormAccumulator::finish`], which then decides over the norm of all. Every process
    /// must make the call, for an accumulator like this one or for a [`NormAccumulator`](crate::NormAccumulator) of the
    /// same clip. See [`GpuPlan::merge_across`].
    ///
    /// # Errors
    /// [`Error::Usage`] if it has merged since the last `finish` already; [`Error::PeerFailed`],
    /// [`Error::Disagreement`] and [`Error::ProcessGroup`] ([`processes`](crate::processes)); the device's own. What
    /// was accumulated is then unchanged.
    pub fn merge_across<'a>(&'a self, processes: &'a dyn ProcessGroup) -> Waiting<'a, Result<(), Error>> {
        Waiting::new(self.merged(processes))
    }

    async fn merged(&self, processes: &dyn ProcessGroup) -> Result<(), Error> {
        let call = GroupCall::begin(processes);
        let bytes = self.gpu.device.read(&[(&self.partial, 0, PARTIAL_BYTES)]).await?;
        let row: PartialRow = bytemuck::pod_read_unaligned(&bytes);
        if row.stamp().is_some() {
            return Err(MERGED_ALREADY);
        }
        let (own, elements, name) = {
            let sets = self.sets();
            let own = row.to_partial(|i| sets.origins[i]);
            (own, sets.elements, own.first.and_then(|first| sets.names[first.tensor].clone()))
        };
        let mut part = [GroupPartials::of_one(&self.group.clip, self.group.segments.clone(), own, elements)];
        let total = merge(call, &mut part, |_, _| name.as_deref()).await?.swap_remove(0);
        let partial = total.partial;
        let stamp = self.sets().across.keep((total, part[0].segments.elements()));
        let (queue, up) = (&self.gpu.device.queue, PartialRow::of(&partial, stamp));
        self.gpu.device.scoped(|| queue.write_buffer(&self.partial, 0, bytemuck::bytes_of(&up)))?;
        self.is_merged.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The coefficients that each `finish` leaves for the caller's kernels: see [`GpuPlan::coefficients`].
    #[must_use]
    pub fn coefficients(&self) -> &wgpu::Buffer {
        &self.memory.coefficients
    }

    /// The report on the last submitted `finish`. Its `elements` counts all planned sets, each once.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy; [`Error::NotSubmitted`] if none has run; the device's own errors.
    pub fn report(&self) -> Waiting<'_, Result<ClipReport, Error>> {
        Waiting::new(self.reported())
    }

    async fn reported(&self) -> Result<ClipReport, Error> {
        let memory = &self.memory;
        let parts = [(&memory.partials, 0, PARTIAL_BYTES), (&memory.results, 0, memory.results.size())];
        let bytes = self.gpu.device.read(&parts).await?;
        let (total, results) = bytes.split_at(size_of::<PartialRow>());
        let (head, outcomes) = results.split_at(size_of::<ResultsHead>());
        let head: ResultsHead = bytemuck::pod_read_unaligned(head);
        if head.steps == 0 {
            return Err(Error::NotSubmitted);
        }
        let outcome: OutcomeRow = bytemuck::pod_read_unaligned(&outcomes[..size_of::<OutcomeRow>()]);
        let sets = self.sets();
        let row: PartialRow = bytemuck::pod_read_unaligned(total);
        let (GroupTotal { partial, non_finite }, elements) = sets.across.of(&row).cloned().unwrap_or_else(|| {
            let partial = row.to_partial(|i| sets.origins[i]);
            (GroupTotal::of(partial, |i| sets.names[i].as_deref()), sets.elements)
        });
        let Group { clip, segments, .. } = &self.group;
        let totals = (clip.known(&partial).norm.to_f64(), partial.outside);
        let outcomes = [outcome.to_outcome(clip, 1.0)];
        clip.report((segments, &outcomes), totals, elements, non_finite, head.skipped())
    }

    fn sets(&self) -> MutexGuard<'_, Sets> {
        // A panic elsewhere cannot leave the lists half changed.
        locked(&self.sets)
    }
}

impl GpuAccumulatorPlan {
    /// Records the measuring of these tensors, as they are when it runs, into the running norm.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], as [`GpuPlan::encode`]; [`Error::Usage`] between [`GpuNormAccumulator::merge_across`] and
    /// [`GpuNormAccumulator::finish`], because the running norm is then that of all processes.
    pub fn accumulate(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        if self.is_merged.load(Ordering::Relaxed) {
            return Err(Error::usage(
                "an accumulator that has merged across processes accepts no more before its finish",
            ));
        }
        self.plan.encode_measure(encoder)
    }

    /// Records the scaling of these tensors by the last [`GpuNormAccumulator::finish`].
    ///
    /// # Errors
    /// [`Error::DeviceLost`], as [`GpuPlan::encode`].
    pub fn scale(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        self.plan.encode_phases(encoder, &[Phase::Apply])
    }
}

//! [`GpuPlan`]: everything that a clip needs, built once; each step is then a list of dispatches to record.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::build::{Built, Follows, Group, GroupParts, PARTIAL_BYTES, Parts, Phase, thresholds};
use super::number::Number;
use super::readback::{OutcomeRow, PartialRow, ResultsHead, Stamped};
use super::table::Origin;
use super::threshold::{DeviceThreshold, StateRow, threshold_number};
use super::{GpuClipper, GpuTensor, Recipe};
use crate::decision::{Action, Outcome};
use crate::partial::Partial;
use crate::processes::{Part, ProcessGroup, Total, Turn, merge};
use crate::segment::Segments;
use crate::threshold::Threshold;
use crate::{Clip, ClipReport, Error, NonFinite, Scope, Waiting};

/// A clip of certain tensors in GPU memory, ready to be recorded again and again.
///
/// Made by [`GpuClipper::plan`] or [`GpuClipper::plan_with`]. The plan keeps the tensors' buffers alive, and holds some 90 bytes on the
/// device for each chunk (a tensor, or 16 KiB to 4 MiB of one), and some 100 more for each segment beyond the first. It is
/// `Send + Sync`. Its steps share one set of partials and results, so they must run on the GPU one after another, as
/// everything on one queue does.
#[derive(Debug)]
pub struct GpuPlan {
    pub(super) gpu: GpuClipper,
    pub(super) built: Built,
    /// None if it is for no tensors of the caller's.
    recipe: Option<Recipe>,
    pub(super) encoded: AtomicU64,
    reported: Mutex<Reported>,
    /// By group of tensors, what the processes of a group have measured.
    across: Mutex<Stamped<Vec<Across>>>,
    /// The thresholds of this process alone, if what has merged has set others: each norm that is recorded begins with them.
    own_thresholds: Mutex<Option<wgpu::Buffer>>,
    /// Whether a threshold on the host has set what norms are compared with.
    follows_host: AtomicBool,
}

/// What was measured of a group of tensors, of all processes together.
#[derive(Clone, Debug)]
struct Across {
    segments: Segments,
    total: Total,
}

/// At the last report: how many steps had been encoded, and how many had run by the device's own count.
#[derive(Clone, Copy, Debug, Default)]
struct Reported {
    encoded: u64,
    steps: u32,
}

impl GpuPlan {
    pub(super) fn new(gpu: &GpuClipper, parts: Parts, recipe: Option<Recipe>) -> Result<Self, Error> {
        let follows_host = AtomicBool::new(matches!(parts.follows, Follows::Host));
        let built = Built::new(gpu, parts, None)?;
        Ok(Self {
            gpu: gpu.clone(),
            built,
            recipe,
            encoded: AtomicU64::new(0),
            reported: Mutex::default(),
            across: Mutex::default(),
            own_thresholds: Mutex::default(),
            follows_host,
        })
    }

    /// Takes other tensors of the same dtypes and shapes in place of the plan's: in other buffers or at other offsets, as a
    /// pool hands them out anew. Compiles nothing. Adaptive thresholds, [`GpuPlan::coefficients`] and the count of steps go
    /// on; steps that were encoded before still do what they were encoded for.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, wgpu};
    /// # use wgpu::util::DeviceExt;
    /// # let gpu = GpuClipper::open().wait()?;
    /// # let buffer = |x: [f32; 2]| gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: bytemuck::cast_slice(&x), usage: wgpu::BufferUsages::STORAGE });
    /// # let (first, second) = (buffer([3.0, 4.0]), buffer([5.0, 12.0]));
    /// let mut plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&first, ..)?])?;
    /// plan.update(&[GpuTensor::f32(&second, ..)?])?;
    /// # let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// # plan.encode(&mut encoder)?;
    /// # gpu.queue().submit([encoder.finish()]);
    /// # assert!((plan.report().wait()?.total_norm - 13.0).abs() < 1e-5);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] if they are not as many, or of another dtype or shape, or not the same of them count; those of
    /// [`GpuClipper::plan_with`]. The plan is then as it was.
    pub fn update(&mut self, tensors: &[GpuTensor]) -> Result<(), Error> {
        self.update_groups(&[tensors])
    }

    /// [`GpuPlan::update`] for a plan of several groups.
    ///
    /// # Errors
    /// The same.
    pub fn update_groups(&mut self, groups: &[&[GpuTensor]]) -> Result<(), Error> {
        const UNFIT: Error =
            Error::Usage(Cow::Borrowed("a plan is updated with tensors of the dtypes and shapes that it was made for"));
        let built = &self.built;
        let (Some(recipe), true) = (&self.recipe, groups.len() == built.groups.len()) else { return Err(UNFIT) };
        if built.groups.iter().zip(groups).any(|(group, tensors)| group.shapes.len() != tensors.len()) {
            return Err(UNFIT);
        }
        let groups: Vec<_> = built.groups.iter().zip(groups).map(|(group, tensors)| (group.clip, *tensors)).collect();
        let follows = match &built.threshold {
            Some(threshold) => Follows::Device(threshold.clone()),
            None if *self.follows_host.get_mut() => Follows::Host,
            None => Follows::Clip,
        };
        let parts = recipe.parts(&groups, follows)?;
        // Tensors without elements may differ in how many segments they have, and counted ones in what their thresholds are.
        let same =
            |(group, parts): (&Group, &GroupParts)| group.shapes == parts.shapes() && group.segments == parts.segments;
        if !built.groups.iter().zip(&parts.groups).all(same) {
            return Err(UNFIT);
        }
        self.built = Built::new(&self.gpu, parts, Some(&built.memory))?;
        Ok(())
    }

    /// Writes another `max_norm`, or what the mode has in its place, for the steps that are submitted from now on, whenever they
    /// were encoded. Nothing is built anew, and what comes out has the bits that a new plan would give. Ask for the report on an
    /// earlier step before.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, wgpu};
    /// # use wgpu::util::DeviceExt;
    /// # let gpu = GpuClipper::open().wait()?;
    /// # let buffer = gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: bytemuck::cast_slice(&[3.0f32, 4.0]), usage: wgpu::BufferUsages::STORAGE });
    /// let mut plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&buffer, ..)?])?;
    /// for max_norm in [100.0, 10.0, 1.0] {
    ///     plan.set_max_norm(max_norm)?;
    ///     let mut encoder = gpu.device().create_command_encoder(&Default::default());
    ///     plan.encode(&mut encoder)?;
    ///     gpu.queue().submit([encoder.finish()]);
    ///     assert_eq!(plan.report().wait()?.clipped, max_norm == 1.0);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Setting`] if it cannot be; [`Error::Usage`] for a value clip; the device's own. The plan is then as it was.
    pub fn set_max_norm(&mut self, max_norm: f64) -> Result<(), Error> {
        self.set_max_norms(&vec![max_norm; self.built.groups.len()])
    }

    /// [`GpuPlan::set_max_norm`] for each group by itself.
    ///
    /// # Errors
    /// The same, and [`Error::Usage`] if they are not as many as groups.
    pub fn set_max_norms(&mut self, max_norms: &[f64]) -> Result<(), Error> {
        let (found, expected) = (max_norms.len(), self.built.groups.len());
        if found != expected {
            return Err(Error::usage(format!("max_norms by group: {found} given, {expected} needed")));
        }
        let mut clips = Vec::new();
        for (group, max_norm) in self.built.groups.iter().zip(max_norms) {
            clips.push(group.clip.with_threshold(*max_norm)?);
        }
        let groups = self.built.groups.iter().zip(&clips);
        let numbers = thresholds(groups.map(|(group, clip)| (clip, &group.segments, group.given)));
        self.set_clips(&clips, &numbers)?;
        *self.own_thresholds.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    /// Writes another `grad_scale`, as [`GpuPlan::set_max_norm`] does a threshold.
    ///
    /// # Errors
    /// [`Error::Setting`] if it cannot be; the device's own. The plan is then as it was.
    pub fn set_grad_scale(&mut self, grad_scale: f64) -> Result<(), Error> {
        let clips: Vec<_> = self.built.groups.iter().map(|group| group.clip.grad_scale(grad_scale)).collect();
        // An adaptive threshold goes on with what it has set.
        self.set_clips(&clips, &[])
    }

    /// Writes what groups are clipped by, and thresholds if there are any.
    fn set_clips(&mut self, clips: &[Clip], thresholds: &[Number]) -> Result<(), Error> {
        clips.iter().try_for_each(Clip::check)?;
        let may_only_measure = !*self.follows_host.get_mut() && self.may_only_measure();
        let is_adaptive = self.built.threshold.is_some();
        let params = self.built.params.iter().zip(clips);
        let params: Vec<_> = params
            .map(|((params, _), clip)| params.for_clip(clip, may_only_measure && clip.only_measures(), is_adaptive))
            .collect();
        let queue = &self.gpu.device.queue;
        self.gpu.device.scoped(|| {
            for ((_, buffer), params) in self.built.params.iter().zip(&params) {
                queue.write_buffer(buffer, 0, bytemuck::bytes_of(params));
            }
            if !thresholds.is_empty() {
                queue.write_buffer(&self.built.memory.thresholds, 0, bytemuck::cast_slice(thresholds));
            }
        })?;
        for ((kept, _), params) in self.built.params.iter_mut().zip(params) {
            *kept = params;
        }
        self.built.groups.iter_mut().zip(clips).for_each(|(group, clip)| group.clip = *clip);
        Ok(())
    }

    /// Whether an infinite threshold leaves everything as it is: not where another may take its place, nor in a sum.
    fn may_only_measure(&self) -> bool {
        self.built.threshold.is_none() && !matches!(self.recipe, Some(Recipe::Sum(_)))
    }

    /// Records one step: the norm, the decision, and the scaling or clamping in place, in one compute pass. Neither
    /// waits nor allocates (wgpu's own recording aside); nothing happens before the encoder's commands are submitted.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] on a device that [`GpuClipper::open`] made and that was lost. Whatever else is wrong with
    /// the encoder or the buffers (they were destroyed, or are mapped) wgpu tells when the encoder is finished or
    /// submitted.
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

    /// Records the decision, from the last norms and the thresholds as they are by then, and the scaling.
    ///
    /// # Errors
    /// As [`GpuPlan::encode`].
    pub fn encode_scale(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        self.encode_phases(encoder, &[Phase::Decide, Phase::Apply])
    }

    pub(super) fn encode_phases(&self, encoder: &mut wgpu::CommandEncoder, phases: &[Phase]) -> Result<(), Error> {
        self.gpu.device.check_not_lost()?;
        if phases.contains(&Phase::Measure) {
            self.begin_anew(encoder);
        }
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

    /// Records that what other processes have measured counts no more: before each norm.
    pub(super) fn begin_anew(&self, encoder: &mut wgpu::CommandEncoder) {
        if let Some(own) = &*locked(&self.own_thresholds) {
            encoder.copy_buffer_to_buffer(own, 0, &self.built.memory.thresholds, 0, own.size());
        }
    }

    /// That a step has run since the last report, given how many were encoded.
    fn check_ran(&self, encoded: u64, head: &ResultsHead) -> Result<MutexGuard<'_, Reported>, Error> {
        let reported = locked(&self.reported);
        // Where all that were encoded have run, another thread may have reported on them, by an older count of what was encoded.
        let idle = head.steps == reported.steps && encoded != reported.encoded && head.steps != encoded as u32;
        if head.steps == 0 || idle { Err(Error::NotSubmitted) } else { Ok(reported) }
    }

    /// Records what a phase does with one buffer of the plan's, or with none: what merges and decides.
    pub(super) fn encode_for(&self, encoder: &mut wgpu::CommandEncoder, phase: Phase, buffer: Option<usize>) {
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("gradclip"), timestamp_writes: None });
        let dispatches = self.built.phases[phase as usize].iter();
        dispatches.filter(|dispatch| dispatch.buffer == buffer).for_each(|dispatch| dispatch.record(&mut pass));
    }

    /// The buffer in which each step leaves what gradients are multiplied by, for a kernel of the caller's to read: an
    /// optimizer that multiplies each gradient as it reads it needs no scaling pass
    /// ([`PlanOptions::measure_only`](super::PlanOptions::measure_only) plans a clip without one). In WGSL:
    ///
    /// ```wgsl
    /// struct Coefficients {
    ///     skip: u32,           // 1 if a policy forbids the step: error or skip, and something is not finite; else 0
    ///     factors: array<f32>, // for each segment c / grad_scale
    /// }
    /// @group(0) @binding(0) var<storage, read> coefficients: Coefficients;
    /// ```
    ///
    /// Segments are in the order of the report, groups one after another; where `skip` is 1 the factors are 1. A clip that
    /// only measures, by an infinite threshold, leaves `1 / grad_scale`. Under the policy `drop` the caller's kernel has
    /// to drop the non-finite elements itself. A value clip leaves `1 / grad_scale`.
    #[must_use]
    pub fn coefficients(&self) -> &wgpu::Buffer {
        &self.built.memory.coefficients
    }

    /// The report on the last step that was submitted, of the first group if there are several. This is what waits: until
    /// the GPU has finished that step. It reads back 32 bytes for each segment.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy; [`Error::NotSubmitted`] if no step has run, or if steps were encoded since
    /// the last report and none of them has; the device's own errors.
    pub fn report(&self) -> Waiting<'_, Result<ClipReport, Error>> {
        Waiting::new(async { Ok(self.told().await?.0.swap_remove(0)) })
    }

    /// The reports of all groups.
    ///
    /// # Errors
    /// As [`GpuPlan::report`].
    pub fn reports(&self) -> Waiting<'_, Result<Vec<ClipReport>, Error>> {
        Waiting::new(async { self.told().await.map(|(reports, _)| reports) })
    }

    /// The reports, and by group what became of each segment.
    pub(super) async fn told(&self) -> Result<(Vec<ClipReport>, Vec<Vec<Outcome>>), Error> {
        let (mut reports, mut of_segments) = (Vec::new(), Vec::new());
        for (group, (all, outcomes)) in self.built.groups.iter().zip(self.last_step().await?) {
            let (report, outcomes) = group.report(&outcomes, all)?;
            reports.push(report);
            of_segments.push(outcomes);
        }
        Ok((reports, of_segments))
    }

    /// What the last step that has run has left of each group: what was measured, and what became of each segment.
    async fn last_step(&self) -> Result<Vec<(Across, Vec<OutcomeRow>)>, Error> {
        let encoded = self.encoded.load(Ordering::Relaxed);
        let totals = self
            .built
            .groups
            .iter()
            .map(|g| (&self.built.memory.partials, u64::from(g.total) * PARTIAL_BYTES, PARTIAL_BYTES));
        let results = (&self.built.memory.results, 0, self.built.memory.results.size());
        let parts: Vec<_> = totals.chain([results]).collect();
        let bytes = self.gpu.device.read(&parts).await?;
        let (totals, results) = bytes.split_at(self.built.groups.len() * size_of::<PartialRow>());
        let (head, outcomes) = results.split_at(size_of::<ResultsHead>());
        let head: ResultsHead = bytemuck::pod_read_unaligned(head);
        *self.check_ran(encoded, &head)? = Reported { encoded, steps: head.steps };
        let across = locked(&self.across);
        let each = self.built.groups.iter().zip(totals.chunks(size_of::<PartialRow>())).enumerate();
        let of_group = |(i, (group, total)): (usize, (&Group, &[u8]))| {
            let row: PartialRow = bytemuck::pod_read_unaligned(total);
            let own = || {
                let total = row.to_partial(|i| self.built.origins[i]);
                let name_of = |i: usize| group.names.get(i).map_or(Some("the given norms"), |name| name.as_deref());
                let total = Total { partial: total, non_finite: total.non_finite_elements(name_of) };
                Across { segments: group.segments.clone(), total }
            };
            let all = across.of(&row).and_then(|all| all.get(i).cloned()).unwrap_or_else(own);
            let [first, count] =
                [group.first_segment, group.segments.count].map(|n| n as usize * size_of::<OutcomeRow>());
            (all, bytemuck::pod_collect_to_vec(&outcomes[first..][..count]))
        };
        Ok(each.map(of_group).collect())
    }

    /// The adaptive threshold, with the state that the last step left on the device: what a checkpoint keeps, and a new
    /// plan goes on from. None for a plan without one.
    ///
    /// # Errors
    /// The device's own.
    pub fn threshold(&self) -> Waiting<'_, Result<Option<DeviceThreshold>, Error>> {
        Waiting::new(self.threshold_now())
    }

    async fn threshold_now(&self) -> Result<Option<DeviceThreshold>, Error> {
        let Some(threshold) = &self.built.threshold else { return Ok(None) };
        let states = &self.built.memory.states;
        let rows = self.built.groups[0].segments.count as usize;
        let mut bytes = self.gpu.device.read(&[(states, 0, states.size())]).await?;
        bytes.truncate(rows * size_of::<StateRow>());
        Ok(Some(threshold.clone().with(&bytemuck::pod_collect_to_vec::<u8, StateRow>(&bytes))))
    }

    /// Lets a threshold on the host follow the norms of the last step that was submitted, waiting for them, and sets what
    /// they are compared with: between [`GpuPlan::encode_measure`] and [`GpuPlan::encode_scale`]. The clip's own threshold
    /// stays an upper bound; infinity sets none. [`PlanOptions::threshold`](super::PlanOptions::threshold) needs no wait.
    ///
    /// # Errors
    /// [`Error::Usage`] for a plan of several groups, of a clip by value or AGC, by given norms, or with a threshold on the
    /// device; [`Error::ThresholdState`] if the threshold is that of other tensors; those of
    /// [`GpuPlan::report`]. If the device fails after it has told the norms, the threshold has followed them.
    pub fn follow<'a>(&'a self, threshold: &'a mut dyn Threshold) -> Waiting<'a, Result<(), Error>> {
        Waiting::new(self.adapted(threshold))
    }

    pub(super) async fn adapted(&self, threshold: &mut dyn Threshold) -> Result<(), Error> {
        let [group] = &self.built.groups[..] else {
            return Err(Error::usage("only a plan of one group follows a threshold on the host"));
        };
        if group.given || self.built.threshold.is_some() {
            return Err(Error::usage(
                "a plan by given norms, or with a threshold on the device, follows no threshold on the host",
            ));
        }
        let clip = &group.clip;
        clip.check_adaptive()?;
        self.bind(threshold)?;
        let (all, outcomes) = self.last_step().await?.swap_remove(0);
        // Of all processes, if they have merged.
        let segments = all.segments.clone();
        let (measured, _) = group.report(&outcomes, all)?;
        let total_norm = if measured.has_non_finite() { f64::NAN } else { measured.total_norm };
        let own = measured.segments.iter().map(|s| s.norm).collect();
        let norms = if clip.scope == Scope::Global { vec![measured.total_norm] } else { own };
        let max_norms = segments.max_norms(clip, &[], &threshold.max_norms(total_norm, &norms));
        let numbers: Vec<_> = max_norms.iter().map(|m| threshold_number(*m)).collect();
        let (queue, buffer) = (&self.gpu.device.queue, &self.built.memory.thresholds);
        // These are what later steps go by, until they are set anew.
        *locked(&self.own_thresholds) = None;
        self.follows_host.store(true, Ordering::Relaxed);
        let (params, of_device) = &self.built.params[0];
        let mut params = *params;
        params.only_measures = 0;
        self.gpu.device.scoped(|| {
            queue.write_buffer(of_device, 0, bytemuck::bytes_of(&params));
            queue.write_buffer(buffer, 0, bytemuck::cast_slice(&numbers));
        })
    }

    /// Takes in what the other processes of a group have measured: between [`GpuPlan::encode_measure`], once it is submitted, and
    /// [`GpuPlan::encode_scale`], which then clips by the norm of all. Every process makes the call, be it for a plan like this
    /// one or for a [`Clipper`](crate::Clipper) [with the group](crate::Clipper::processes), by the same clip.
    ///
    /// It reads 32 bytes back for each segment, exchanges some more with the others, and writes as many up again. Other work that
    /// was submitted goes on meanwhile.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, processes::thread_group, wgpu};
    /// # use wgpu::util::DeviceExt;
    /// # let gpu = GpuClipper::open().wait()?;
    /// # let buffer = gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: bytemuck::cast_slice(&[3.0f32, 4.0]), usage: wgpu::BufferUsages::STORAGE });
    /// # let group = thread_group(1, None).swap_remove(0); // of gradclip-mpi: MpiGroup::new(&universe.world())?
    /// let plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&buffer, ..)?])?;
    /// let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// plan.encode_measure(&mut encoder)?;
    /// gpu.queue().submit([encoder.finish()]);
    /// plan.merge_across(&*group).wait()?;
    /// let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// plan.encode_scale(&mut encoder)?;
    /// gpu.queue().submit([encoder.finish()]);
    /// assert!((plan.report().wait()?.total_norm - 5.0).abs() < 1e-5);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] for a plan that measures no norm of its own, or whose threshold is the device's, or if what was
    /// measured last has merged already;
    /// [`Error::NotSubmitted`] as [`GpuPlan::report`]; [`Error::PeerFailed`], [`Error::Disagreement`] and
    /// [`Error::ProcessGroup`] ([`processes`](crate::processes)); the device's own. Nothing is written then.
    pub fn merge_across<'a>(&'a self, processes: &'a dyn ProcessGroup) -> Waiting<'a, Result<(), Error>> {
        Waiting::new(self.merge_checked(processes))
    }

    async fn merge_checked(&self, processes: &dyn ProcessGroup) -> Result<(), Error> {
        let turn = Turn::begin(processes);
        let measures = |g: &Group| g.clip.measured().is_some() && !g.given;
        if self.built.threshold.is_some() || !self.built.groups.iter().all(measures) {
            const WHY: &str =
                "what merges across processes is a norm that the plan measures, without a threshold on the device";
            return Err(Error::usage(WHY));
        }
        self.merged(turn).await
    }

    /// Takes in the partials of the other processes, between measuring and deciding.
    pub(super) async fn merged(&self, turn: Turn<'_>) -> Result<(), Error> {
        let memory = &self.built.memory;
        let place = |first: u32| u64::from(first) * PARTIAL_BYTES;
        let mut reads = vec![(&memory.results, 0, size_of::<ResultsHead>() as u64)];
        for group in &self.built.groups {
            let places = [Some(group.first_partial), group.first_parameter].into_iter().flatten();
            reads.extend(places.map(|first| (&memory.partials, place(first), place(group.segments.count))));
        }
        reads.retain(|(_, _, size)| *size > 0);
        let bytes = self.gpu.device.read(&reads).await?;
        let (head, bytes) = bytes.split_at(size_of::<ResultsHead>());
        drop(self.check_ran(self.encoded.load(Ordering::Relaxed), &bytemuck::pod_read_unaligned(head))?);
        let rows = bytes.chunks_exact(size_of::<PartialRow>()).map(bytemuck::pod_read_unaligned::<PartialRow>);
        let rows: Vec<_> = rows.collect();
        if rows.iter().any(|row| row.stamp().is_some()) {
            return Err(MERGED_ALREADY);
        }
        let mut rows = rows.into_iter();
        let mut parts = Vec::new();
        for group in &self.built.groups {
            let mut next = || {
                let rows = rows.by_ref().take(group.segments.count as usize);
                rows.map(|row| row.to_partial(|i| self.built.origins[i])).collect::<Vec<_>>()
            };
            let mut part = Part::new(&group.clip, group.segments.clone(), next());
            if group.first_parameter.is_some() {
                part.parameters = next();
            }
            parts.push(part);
        }
        let name_of = |group: usize, tensor: usize| self.built.groups[group].names.get(tensor)?.as_deref();
        let totals = merge(turn, &mut parts, name_of).await?;

        let across = |(part, total): (&Part, &Total)| Across { segments: part.segments.clone(), total: total.clone() };
        let stamp = locked(&self.across).keep(parts.iter().zip(&totals).map(across).collect());
        let mut writes = Vec::new();
        let mut write = |first: u32, partials: &[Partial]| {
            let rows: Vec<_> = partials.iter().map(|partial| PartialRow::of(partial, stamp)).collect();
            writes.push((&memory.partials, place(first), bytemuck::cast_slice(&rows).to_vec()));
        };
        let mut own_thresholds = Vec::new();
        let mut thresholds = Vec::new();
        for ((group, part), total) in self.built.groups.iter().zip(&parts).zip(&totals) {
            write(group.first_partial, &part.partials);
            group.first_parameter.iter().for_each(|first| write(*first, &part.parameters));
            write(group.total, &[total.partial]);
            let of = |segments: &Segments| segments.max_norms(&group.clip, &[], &[]).into_iter().map(threshold_number);
            own_thresholds.extend(of(&group.segments));
            // Those that go by parameters the device computes itself, whatever stands there.
            thresholds.extend(of(&part.segments));
        }
        write(self.built.everything, &[totals.iter().fold(Partial::EMPTY, |all, total| all.merge(total.partial))]);
        if thresholds != own_thresholds {
            let mut own = locked(&self.own_thresholds);
            if own.is_none() {
                let (bytes, usage) = (bytemuck::cast_slice(&own_thresholds), wgpu::BufferUsages::COPY_SRC);
                *own = Some(self.gpu.device.filled("gradclip own thresholds", bytes, usage)?);
            }
            writes.push((&memory.thresholds, 0, bytemuck::cast_slice(&thresholds).to_vec()));
        }
        let queue = &self.gpu.device.queue;
        self.gpu.device.scoped(|| writes.iter().for_each(|(buffer, at, bytes)| queue.write_buffer(buffer, *at, bytes)))
    }

    /// Ties a threshold to the segments of the first group.
    pub(super) fn bind(&self, threshold: &mut dyn Threshold) -> Result<(), Error> {
        let group = &self.built.groups[0];
        threshold.bind(&group.segments.labels(|i| group.names[i].as_deref()))
    }

    pub(super) fn origins(&self) -> &[Origin] {
        &self.built.origins
    }

    pub(super) fn elements(&self) -> u64 {
        self.built.groups.iter().map(|g| g.segments.elements()).sum()
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What others have measured would count twice.
pub(super) const MERGED_ALREADY: Error = Error::Usage(Cow::Borrowed(
    "what was measured has merged across processes already; it merges once, and then another is measured",
));

impl Group {
    /// The report, and what became of each segment, given what was measured of all.
    fn report(&self, outcomes: &[OutcomeRow], all: Across) -> Result<(ClipReport, Vec<Outcome>), Error> {
        let (clip, Across { segments, total: Total { partial: total, non_finite } }) = (&self.clip, all);
        // Norms from outside are N already.
        let weight = |elements| if self.given { 1.0 } else { clip.weight(elements) };
        let each = segments.families().zip(outcomes);
        let mut outcomes: Vec<_> = each.map(|(family, row)| row.to_outcome(clip, weight(family.elements))).collect();
        let elements = segments.elements();
        let total_norm = match &outcomes[..] {
            [outcome] if self.given => outcome.norm,
            _ if self.given => f64::NAN,
            _ => clip.known(&total).norm * weight(elements),
        };
        let report = clip.report((&segments, &outcomes), (total_norm, total.outside), elements, non_finite)?;
        // A value clip looks at each element whatever is decided; only what it met tells whether it wrote.
        let drops = clip.non_finite == NonFinite::Drop && total.non_finite > 0;
        let met_nothing = clip.grad_scale == 1.0 && !total.outside && !drops;
        if clip.measured().is_none() && self.all_counted && met_nothing {
            let applied = |o: &&mut Outcome| o.action == Action::Apply;
            outcomes.iter_mut().filter(applied).for_each(|o| o.action = Action::Leave);
        }
        Ok((report, outcomes))
    }
}

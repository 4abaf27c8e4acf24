//! What a plan is built from, and its building: tables, buffers, and the dispatches of each phase.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::GpuClipper;
use super::kernels::{Access, ClipGroup, Kernel, Norm, PARAMS, PARTIALS, RESULTS};
use super::merge::MergeTree;
use super::number::Number;
use super::readback::{OutcomeRow, PartialRow, ResultsHead};
use super::table::{Batch, EdgeRow, Limits, Origin, Piece, SumWindow, Table, Tables, Use, Window, grid, sum_windows};
use super::threshold::{DeviceThreshold, Rule, StateRow, threshold_number};
use super::tuning::BUFFERS_OF_CHUNKS;
use crate::clip::Mode;
use crate::segment::{Layout, Segments};
use crate::{Clip, Dtype, Error, NonFinite, NormType};

/// What [`GpuPlan`](super::GpuPlan) is once it is built.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) groups: Vec<Group>,
    /// By [`Phase`].
    pub(super) phases: [Vec<Dispatch>; 3],
    pub(super) memory: Memory,
    pub(super) origins: Vec<Origin>,
    /// Where the partial of all groups is.
    pub(super) everything: u32,
    pub(super) threshold: Option<DeviceThreshold>,
    /// What each group is clipped by, and where the device has it.
    pub(super) params: Vec<(Params, wgpu::Buffer)>,
}

/// Tensors that one clip is for.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) clip: Clip,
    pub(super) segments: Segments,
    pub(super) first_segment: u32,
    /// Where the partial of all its segments is.
    pub(super) total: u32,
    /// Where the partials of its segments begin, and those of their parameters.
    pub(super) first_partial: u32,
    pub(super) first_parameter: Option<u32>,
    pub(super) names: Vec<Option<Arc<str>>>,
    /// Whether norms count all of its tensors.
    pub(super) all_counted: bool,
    pub(super) bytes: Bytes,
    pub(super) given: bool,
    /// See [`GroupParts::shapes`].
    pub(super) shapes: Vec<(Dtype, u64, Layout)>,
}

/// How many bytes the elements of a group are, what the profiler tells throughput from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes {
    pub(super) elements: u64,
    /// Of those that norms count.
    pub(super) counted: u64,
    pub(super) parameters: u64,
    pub(super) sums: u64,
}

impl Bytes {
    fn of(group: &GroupParts, job: &Job) -> Self {
        let bytes = |pieces: &mut dyn Iterator<Item = &Piece>| pieces.map(|p| p.len * p.dtype.size() as u64).sum();
        let sums = if let Job::Sum(pairs) = job { bytes(&mut pairs.iter().map(|(_, sum)| sum)) } else { 0 };
        let counted = |piece: &&Piece| group.counted[piece.tensor];
        Self {
            elements: bytes(&mut group.pieces.iter()),
            counted: bytes(&mut group.pieces.iter().filter(counted)),
            parameters: bytes(&mut group.parameters.iter().filter(counted)),
            sums,
        }
    }
}

impl Group {
    /// Whether elements are looked at before any is written.
    pub(super) fn reads_first(&self) -> bool {
        self.clip.reads_first() || !self.all_counted
    }

    /// What its kernels measure; norms from outside are measured as the largest of one element.
    fn norm(&self) -> Option<Norm> {
        if self.given { Some(Norm::Inf) } else { self.clip.measured().map(Norm::from) }
    }
}

/// A dispatch, with all that it binds.
#[derive(Debug)]
pub(super) struct Dispatch {
    pub(super) kernel: Kernel,
    pipeline: wgpu::ComputePipeline,
    clip_group: wgpu::BindGroup,
    subject: wgpu::BindGroup,
    workgroups: (u32, u32),
    /// The buffer of gradients that it binds, by its place in the plan's list.
    pub(super) buffer: Option<usize>,
}

/// The parts of a step, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Measure,
    Decide,
    Apply,
}

/// The buffers of a plan.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) partials: wgpu::Buffer,
    pub(super) results: wgpu::Buffer,
    pub(super) thresholds: wgpu::Buffer,
    pub(super) coefficients: wgpu::Buffer,
    /// What thresholds follow; a row without meaning if nothing does.
    pub(super) states: wgpu::Buffer,
}

/// What a plan is made of, once names and buffers have been sorted out.
pub(super) struct Parts {
    pub(super) buffers: Vec<wgpu::Buffer>,
    pub(super) groups: Vec<GroupParts>,
    pub(super) job: Job,
    pub(super) follows: Follows,
    /// Whether the buffers come one after another, so that each is as much work as there is at a time.
    pub(super) in_turn: bool,
}

/// The tensors of one clip.
pub(super) struct GroupParts {
    pub(super) clip: Clip,
    pub(super) segments: Segments,
    pub(super) names: Vec<Option<Arc<str>>>,
    /// Whether norms count each tensor.
    pub(super) counted: Vec<bool>,
    pub(super) pieces: Vec<Piece>,
    /// The parameters, if the clip needs them.
    pub(super) parameters: Vec<Piece>,
}

impl GroupParts {
    /// What tensors must have in common to take each other's place: dtypes, lengths, and which segments they are of.
    pub(super) fn shapes(&self) -> Vec<(Dtype, u64, Layout)> {
        self.pieces.iter().map(|piece| (piece.dtype, piece.len, piece.layout)).collect()
    }
}

/// What a plan does.
pub(super) enum Job {
    /// Measures, and writes nothing but reports and coefficients.
    Measure,
    Clip,
    /// Scales by norms from outside: one float32 for each segment.
    Scale(Piece),
    /// Adds up the clipped examples: pieces of the tensors with those of their sums.
    Sum(Vec<(Piece, Piece)>),
    /// Measures into a running partial, and scales by what is decided of it.
    Running(RunningMemory),
}

/// Whose thresholds a plan compares with.
pub(super) enum Follows {
    /// The clip's own.
    Clip,
    /// The host's, which writes them between measuring and deciding.
    Host,
    /// Those that the device makes of the norms.
    Device(DeviceThreshold),
}

/// What the plans of one running partial share.
#[derive(Clone, Debug)]
pub(super) struct RunningMemory {
    pub(super) partial: wgpu::Buffer,
    pub(super) results: wgpu::Buffer,
    /// The first origin that is free.
    pub(super) origins: u32,
}

/// Twin of `Params` in `shaders/shared/outcome.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Params {
    grad_scale: Number,
    eps_scaled: Number,
    floor_scaled: Number,
    power: Number,
    root: Number,
    unscale_exact: Number,
    unscale_value: f32,
    unscale_is_float: u32,
    policy: u32,
    pub(super) only_measures: u32,
    first_segment: u32,
    segments: u32,
    segment_partials: u32,
    group_partial: u32,
    total_partial: u32,
    parameter_partials: u32,
    warm_up: u32,
    padding: u32,
    threshold: [Number; 4],
    min: [f32; 4],
    max: [f32; 4],
}

impl Params {
    /// For one segment, whose partial is the first; the rest is for the caller to fill in.
    pub(super) fn new(clip: &Clip, only_measures: bool) -> Self {
        let scale = clip.grad_scale;
        let (min, max) = if let Mode::Value { min, max } = clip.mode { (min, max) } else { (0.0, 0.0) };
        let rounded = |bound: f64| {
            // By dtype code; through float32, like every element. See `Clamp::new` in src/cpu/clamp.rs.
            let bound = bound as f32;
            [bound, half::f16::from_f32(bound).to_f32(), half::bf16::from_f32(bound).to_f32(), 0.0]
        };
        let (eps, floor) = clip.eps_and_floor();
        let p = if let Some(NormType::P(power)) = clip.measured() { power } else { 1.0 };
        let unscale_value = (1.0 / scale) as f32;
        let unscale_is_float = unscale_value.is_normal();
        Self {
            grad_scale: Number::product(scale, 1.0),
            eps_scaled: Number::product(eps, scale),
            floor_scaled: Number::product(floor, scale),
            power: Number::product(p, 1.0),
            root: Number::reciprocal(p),
            unscale_exact: if unscale_is_float {
                Number::product(f64::from(unscale_value), 1.0)
            } else {
                Number::reciprocal(scale)
            },
            unscale_value: if unscale_is_float { unscale_value } else { 0.0 },
            unscale_is_float: unscale_is_float.into(),
            policy: match clip.non_finite {
                NonFinite::Error => 0,
                NonFinite::Propagate => 1,
                NonFinite::Skip => 2,
                NonFinite::Zero => 3,
                NonFinite::Drop => 4,
            },
            only_measures: only_measures.into(),
            first_segment: 0,
            segments: 1,
            segment_partials: 0,
            group_partial: 0,
            total_partial: 0,
            parameter_partials: 0,
            warm_up: 0,
            padding: 0,
            threshold: [Number::default(); 4],
            min: rounded(min),
            max: rounded(max),
        }
    }
}

impl Params {
    /// The same for another clip of the group, by this threshold on the device if there is one.
    pub(super) fn for_clip(self, clip: &Clip, only_measures: bool, is_adaptive: bool) -> Self {
        let Self { first_segment, segments, segment_partials, group_partial, total_partial, .. } = self;
        let Self { parameter_partials, warm_up, mut threshold, .. } = self;
        if let Some(rule) = Rule::of(clip) {
            threshold = rule.numbers;
        } else if let (true, Mode::Norm(max_norm)) = (is_adaptive, clip.mode) {
            threshold[3] = threshold_number(max_norm);
        }
        Self {
            first_segment,
            segments,
            segment_partials,
            group_partial,
            total_partial,
            parameter_partials,
            warm_up,
            threshold,
            ..Self::new(clip, only_measures)
        }
    }

    pub(super) fn upload(&self, gpu: &GpuClipper) -> Result<wgpu::Buffer, Error> {
        gpu.device.filled("gradclip params", bytemuck::bytes_of(self), wgpu::BufferUsages::UNIFORM)
    }
}

/// What norms of groups are compared with, given their clips, their segments, and whether their norms are given.
pub(super) fn thresholds<'a>(groups: impl Iterator<Item = (&'a Clip, &'a Segments, bool)>) -> Vec<Number> {
    let mut thresholds = Vec::new();
    for (clip, segments, given) in groups {
        let max_norms = segments.max_norms(clip, &[], &[]);
        for (max_norm, family) in max_norms.into_iter().zip(segments.families()) {
            // Norms from outside are N, not measured ones.
            let weight = if given { clip.weight(family.elements) } else { 1.0 };
            thresholds.push(threshold_number(max_norm * weight));
        }
    }
    thresholds
}

/// What `shaders/shared/power.wgsl` has room for. Beyond, p is taken for these: of 2^30 equal elements the norm is then
/// 5e-6 too large at most, and below 2^-20 the norm of two elements already exceeds every float64.
pub(super) const POWERS: std::ops::RangeInclusive<f64> = 1.0 / 1_048_576.0..=4_194_304.0;

/// The size of a `Partial` in `shaders/shared/partial.wgsl`.
pub(super) const PARTIAL_BYTES: u64 = size_of::<PartialRow>() as u64;

/// What a plan takes over.
#[derive(Clone, Copy)]
pub(super) enum Kept<'a> {
    Nothing,
    /// The results of the running norm that it belongs to.
    Results(&'a wgpu::Buffer),
    /// Everything of the same plan for other buffers; new partials where there is no room for them.
    All(&'a Memory),
}

impl Memory {
    /// For groups of a clip, its segments, and whether their norms are given.
    pub(super) fn new<'a>(
        gpu: &GpuClipper,
        groups: impl Iterator<Item = (&'a Clip, &'a Segments, bool)>,
        partials: u32,
        states: &[StateRow],
        kept: Kept<'_>,
    ) -> Result<Self, Error> {
        let device = &gpu.device;
        let read = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let bytes = u64::from(partials.max(1)) * PARTIAL_BYTES;
        let room = |kept: Option<&Self>| match kept {
            Some(memory) if memory.partials.size() >= bytes => Ok(memory.partials.clone()),
            _ => device.storage("gradclip partials", bytes, read | wgpu::BufferUsages::COPY_DST),
        };
        if let Kept::All(memory) = kept {
            return Ok(Self { partials: room(Some(memory))?, ..memory.clone() });
        }
        let mut thresholds = thresholds(groups);
        thresholds.push(threshold_number(f64::INFINITY));
        // One more than there are segments, so that no buffer is empty.
        let segments = thresholds.len() as u64;
        let storage = wgpu::BufferUsages::STORAGE;
        let results_bytes = size_of::<ResultsHead>() as u64 + segments * size_of::<OutcomeRow>() as u64;
        Ok(Self {
            partials: room(None)?,
            results: match kept {
                Kept::Results(results) => results.clone(),
                _ => device.storage("gradclip results", results_bytes, read)?,
            },
            thresholds: device.filled("gradclip thresholds", bytemuck::cast_slice(&thresholds), storage)?,
            coefficients: device.storage("gradclip coefficients", 4 + 4 * segments, read)?,
            states: device.filled("gradclip states", bytemuck::cast_slice(states), read)?,
        })
    }
}

impl Dispatch {
    pub(super) fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.clip_group, &[]);
        pass.set_bind_group(1, &self.subject, &[]);
        let (x, y) = self.workgroups;
        pass.dispatch_workgroups(x, y, 1);
    }
}

impl Built {
    /// With the memory of an earlier one for tensors of the same shapes, if there is one.
    pub(super) fn new(gpu: &GpuClipper, parts: Parts, earlier: Option<&Memory>) -> Result<Self, Error> {
        let Parts { buffers, groups, job, follows, in_turn } = parts;
        // A sum is one even of examples that nothing exceeds.
        let may_only_measure = matches!(follows, Follows::Clip) && !matches!(job, Job::Sum(_));
        let mut layout = PlanLayout::new(gpu, groups, &job, (may_only_measure, in_turn))?;
        let mut threshold = None;
        let mut states = vec![StateRow::zeroed()];
        let mut rules: Vec<_> = layout.groups.iter().map(|g| Rule::of(&g.clip)).collect();
        if let Follows::Device(mut wanted) = follows {
            let group = &layout.groups[0];
            let labels = group.segments.labels(|i| group.names[i].as_deref());
            let (rule, rows) = wanted.start(&group.clip, &labels)?;
            (threshold, rules[0]) = (Some(wanted), Some(rule));
            // No buffer may be empty, even if there are no tensors.
            states.splice(..usize::from(!rows.is_empty()), rows);
        }
        for (params, rule) in layout.params.iter_mut().zip(&rules) {
            if let Some(rule) = rule {
                (params.warm_up, params.threshold) = (rule.warm_up, rule.numbers);
            }
        }
        let kept = match (earlier, &job) {
            (Some(memory), _) => Kept::All(memory),
            (None, Job::Running(running)) => Kept::Results(&running.results),
            (None, _) => Kept::Nothing,
        };
        let of = layout.groups.iter().map(|g| (&g.clip, &g.segments, g.given));
        let memory = Memory::new(gpu, of, layout.tree.partials, &states, kept)?;
        let mut builder = Builder::new(gpu, &buffers, layout.limits);
        layout.measure(&mut builder);
        layout.decide(&mut builder, &job, &rules);
        layout.apply(&mut builder);
        let running = if let Job::Running(running) = &job { Some(&running.partial) } else { None };
        let everything = layout.params.first().map_or(0, |params| params.total_partial);
        let PlanLayout { groups, origins, params, .. } = layout;
        let params =
            params.into_iter().map(|params| Ok((params, params.upload(gpu)?))).collect::<Result<Vec<_>, Error>>()?;
        let phases = builder.build(&memory, running, &params)?;
        Ok(Self { groups, phases, memory, origins, everything, threshold, params })
    }
}

/// Everything about a plan that needs no device but its limits.
struct PlanLayout {
    groups: Vec<Group>,
    params: Vec<Params>,
    parts: Vec<GroupTables>,
    origins: Vec<Origin>,
    tree: MergeTree,
    limits: Limits,
    sums: Vec<SumWindow>,
}

/// The tables of a group.
struct GroupTables {
    measured: Tables,
    parameters: Option<Tables>,
    /// What is scaled, if that is not what is measured.
    applied: Option<Tables>,
    writes: bool,
}

impl PlanLayout {
    fn new(
        gpu: &GpuClipper,
        groups: Vec<GroupParts>,
        job: &Job,
        (may_only_measure, in_turn): (bool, bool),
    ) -> Result<Self, Error> {
        let device_limits = gpu.device.device.limits();
        let alignment = u64::from(device_limits.min_storage_buffer_offset_alignment);
        let pieces = || groups.iter().flat_map(|g| g.pieces.iter().chain(&g.parameters));
        let limits = Limits::new(
            &gpu.tuning,
            words_at_a_time(pieces(), in_turn),
            (device_limits.max_storage_buffer_binding_size, alignment),
            if in_turn { 1 } else { gpu.windows as usize },
        );
        // Outcomes are as long as partials, and have a head; thresholds have one more than there are segments.
        let limit = limits.binding_bytes / PARTIAL_BYTES;
        let segments = groups.iter().map(|g| u64::from(g.segments.count)).sum();
        if segments + 2 > limit {
            return Err(Error::too_large("the number of segments", segments, limit - 2));
        }
        let elements = pieces().map(|p| p.len).sum();
        let many = || Error::too_large("the number of chunks, for so many elements,", elements, limit);
        let sums = if let Job::Sum(pieces) = job { sum_windows(pieces, limits).ok_or_else(many)? } else { Vec::new() };
        let mut found = Self {
            groups: Vec::new(),
            params: Vec::new(),
            parts: Vec::new(),
            origins: Vec::new(),
            tree: MergeTree::new(limits.workgroup, gpu.tuning.merged_partials),
            limits,
            sums,
        };
        found.lay_out(groups, job, may_only_measure).ok_or_else(many)?;
        if u64::from(found.tree.partials) > limit {
            return Err(many());
        }
        Ok(found)
    }

    /// None if there is no room for so many rows.
    fn lay_out(&mut self, groups: Vec<GroupParts>, job: &Job, may_only_measure: bool) -> Option<()> {
        let limits = self.limits;
        let free_origin = if let Job::Running(running) = job { running.origins } else { 0 };
        let mut first_segment = 0;
        let mut slot = 0u32;
        // Where the slots of each group begin, and those of its parameters.
        let mut starts = Vec::new();
        for mut of in groups {
            of.clip = of.clip.with_power_in(POWERS);
            let shapes = of.shapes();
            let pieces = of.pieces.iter_mut().chain(&mut of.parameters);
            pieces.for_each(|piece| piece.layout.segment += first_segment);
            let segments = first_segment..first_segment + of.segments.count;
            let all_counted = of.counted.iter().all(|counted| *counted);
            let counted = |pieces: &[Piece]| -> Vec<_> {
                pieces.iter().filter(|piece| of.counted[piece.tensor]).copied().collect()
            };
            let mut tables = |pieces: &[Piece], measures_only| {
                let origin = free_origin.checked_add(u32::try_from(self.origins.len()).ok()?)?;
                let found = Tables::new(pieces, segments.clone(), (slot, origin), measures_only, limits)?;
                starts.push(slot);
                slot = found.slots.iter().try_fold(slot, |sum, n| sum.checked_add(*n))?;
                self.origins.extend_from_slice(&found.origins);
                Some(found)
            };
            let writes = !matches!(job, Job::Measure | Job::Sum(_));
            let (measured, applied) = if let Job::Scale(norms) = job {
                // What would be measured of the tensors themselves is of no use here.
                let applied = Tables::new(&of.pieces, segments.clone(), (0, 0), false, limits)?;
                (tables(&[*norms], true)?, Some(applied))
            } else if all_counted {
                (tables(&of.pieces, !writes)?, None)
            } else {
                let applied = Tables::new(&of.pieces, segments.clone(), (0, 0), !writes, limits)?;
                (tables(&counted(&of.pieces), true)?, Some(applied))
            };
            let parameters = counted(&of.parameters);
            let parameters = if of.clip.needs_parameters() { Some(tables(&parameters, true)?) } else { None };
            self.parts.push(GroupTables { measured, parameters, applied, writes });
            let mut params = Params::new(&of.clip, may_only_measure && of.clip.only_measures());
            (params.first_segment, params.segments) = (first_segment, of.segments.count);
            self.params.push(params);
            self.groups.push(Group {
                bytes: Bytes::of(&of, job),
                shapes,
                clip: of.clip,
                first_segment,
                total: 0,
                first_partial: 0,
                first_parameter: None,
                names: of.names,
                all_counted,
                given: matches!(job, Job::Scale(_)),
                segments: of.segments,
            });
            first_segment = segments.end;
        }
        self.tree.partials = slot;
        let mut starts = starts.into_iter();
        let mut level = 0;
        for (tables, params) in self.parts.iter().zip(&mut self.params) {
            let mut merged = |of: &Tables| {
                let (at, until) = self.tree.segments(starts.next()?, &of.slots)?;
                level = level.max(until);
                Some(at)
            };
            params.segment_partials = merged(&tables.measured)?;
            if let Some(parameters) = &tables.parameters {
                params.parameter_partials = merged(parameters)?;
            }
        }
        let mut totals = Vec::new();
        for (group, params) in self.groups.iter_mut().zip(&mut self.params) {
            group.first_partial = params.segment_partials;
            group.first_parameter = group.clip.needs_parameters().then_some(params.parameter_partials);
            group.total = self.tree.total(params.segment_partials, params.segments, level)?;
            params.group_partial = group.total;
            totals.push(group.total);
        }
        let everything = self.tree.everything(&totals)?;
        self.params.iter_mut().for_each(|params| params.total_partial = everything);
        Some(())
    }

    fn measure(&self, builder: &mut Builder<'_>) {
        for (i, (group, tables)) in self.groups.iter().zip(&self.parts).enumerate() {
            let norm = group.norm();
            let guarded = group.reads_first();
            for (batch, of, dtype, table) in tables.measured.each() {
                let kernel = match (of, norm) {
                    (Use::Mixed { .. }, _) => continue,
                    (of, Some(norm)) => norm_kernel(of, dtype, norm),
                    (_, None) => Kernel::Clamp { dtype, guarded: false, writes: tables.writes && !guarded },
                };
                builder.batch(Phase::Measure, kernel, i, batch, table);
            }
            if norm.is_none() && tables.writes && !guarded {
                builder.edges(Phase::Measure, i, &tables.measured, Kernel::Edges { value: true, guarded: false });
            }
            if let (Some(parameters), Some(norm)) = (&tables.parameters, norm) {
                for (batch, of, dtype, table) in parameters.each() {
                    builder.batch(Phase::Measure, norm_kernel(of, dtype, norm), i, batch, table);
                }
            }
        }
        for rows in &self.tree.levels {
            builder.rows(Phase::Measure, Kernel::Merge, rows);
        }
    }

    fn decide(&self, builder: &mut Builder<'_>, job: &Job, rules: &[Option<Rule>]) {
        if let Job::Running(_) = job {
            builder.push(Phase::Decide, Kernel::Accumulate { moves: false }, 0, Subject::Running, 1);
            return;
        }
        // The first that decides counts the step, and there must be one.
        let first = self.groups.iter().position(|group| group.segments.count > 0).unwrap_or(0);
        for (i, (group, rule)) in self.groups.iter().zip(rules).enumerate() {
            if group.segments.count == 0 && i != first {
                continue;
            }
            let (norm, given) = (group.norm(), group.given);
            let workgroups = group.segments.count.max(1).div_ceil(self.limits.workgroup);
            if let (Some(rule), Some(norm)) = (rule, norm) {
                let kernel = Kernel::Threshold { formula: rule.formula, norm };
                builder.push(Phase::Decide, kernel, i, Subject::Threshold, workgroups);
            }
            builder.push(Phase::Decide, Kernel::Finalise { norm, given }, i, Subject::Decide, workgroups);
        }
    }

    fn apply(&self, builder: &mut Builder<'_>) {
        for sum in &self.sums {
            builder.sum(Kernel::Sum { dtype: sum.dtype }, sum);
        }
        for (i, (group, tables)) in self.groups.iter().zip(&self.parts).enumerate() {
            let value = group.clip.measured().is_none();
            if !tables.writes || (value && !group.reads_first()) {
                continue;
            }
            let applied = tables.applied.as_ref().unwrap_or(&tables.measured);
            for (batch, of, dtype, table) in applied.each() {
                let kernel = match of {
                    Use::Run | Use::Each => continue,
                    Use::Whole if value => Kernel::Clamp { dtype, guarded: true, writes: true },
                    Use::Whole => Kernel::Scale { dtype },
                    Use::Mixed { columns } => Kernel::ScaleEach { dtype, columns },
                };
                builder.batch(Phase::Apply, kernel, i, batch, table);
            }
            builder.edges(Phase::Apply, i, applied, Kernel::Edges { value, guarded: true });
        }
    }
}

/// How many words there are to share out in chunks: all of them, or where buffers come in turn those of the largest. But of
/// very many buffers each gets fewer chunks, so that the partials of all of them have room.
fn words_at_a_time<'p>(pieces: impl Iterator<Item = &'p Piece>, in_turn: bool) -> u64 {
    let mut by_buffer = HashMap::<_, u64>::new();
    for piece in pieces {
        *by_buffer.entry(if in_turn { piece.buffer } else { 0 }).or_default() += piece.words();
    }
    let (largest, all) =
        by_buffer.into_values().fold((0, 0), |(largest, all), words| (words.max(largest), all + words));
    largest.max(all / BUFFERS_OF_CHUNKS)
}

/// The kernel that measures such rows.
fn norm_kernel(of: Use, dtype: Dtype, norm: Norm) -> Kernel {
    if of == Use::Each { Kernel::NormEach { dtype, norm } } else { Kernel::Norm { dtype, norm } }
}

/// What a dispatch binds as its group 1, until there are buffers.
enum Subject {
    /// Rows of the plan's tables.
    Rows(Range<u64>),
    /// Rows, and the windows that they are about.
    Windows(Range<u64>, Vec<Window>),
    /// A window of examples, if there are any, rows, and a window of sums.
    Sums(Range<u64>, Option<Window>, Window),
    Decide,
    Threshold,
    Running,
}

/// Gathers the dispatches of a plan, then makes them.
struct Builder<'a> {
    gpu: &'a GpuClipper,
    buffers: &'a [wgpu::Buffer],
    limits: Limits,
    /// All tables of the plan, each at an offset that can be bound.
    tables: Vec<u8>,
    /// Where each table is, by its address here: what is measured is often what is scaled.
    places: HashMap<usize, Range<u64>>,
    pending: Vec<(Phase, Kernel, usize, Subject, u32)>,
}

impl<'a> Builder<'a> {
    fn new(gpu: &'a GpuClipper, buffers: &'a [wgpu::Buffer], limits: Limits) -> Self {
        Self { gpu, buffers, limits, tables: Vec::new(), places: HashMap::new(), pending: Vec::new() }
    }

    fn push(&mut self, phase: Phase, kernel: Kernel, group: usize, subject: Subject, workgroups: u32) {
        self.pending.push((phase, kernel, group, subject, workgroups));
    }

    /// A table, with what stands before its rows.
    fn table<T: Pod>(&mut self, head: &[u32], rows: &[T]) -> Range<u64> {
        if let Some(place) = self.places.get(&(rows.as_ptr() as usize)) {
            return place.clone();
        }
        let alignment = self.gpu.device.device.limits().min_storage_buffer_offset_alignment as usize;
        self.tables.resize(self.tables.len().next_multiple_of(alignment), 0);
        let start = self.tables.len() as u64;
        self.tables.extend_from_slice(bytemuck::cast_slice(head));
        self.tables.extend_from_slice(bytemuck::cast_slice(rows));
        let place = start..self.tables.len() as u64;
        self.places.insert(rows.as_ptr() as usize, place.clone());
        place
    }

    fn rows<T: Pod>(&mut self, phase: Phase, kernel: Kernel, rows: &[T]) {
        let table = self.table(&[], rows);
        self.push(phase, kernel, 0, Subject::Rows(table), count(rows));
    }

    fn batch(&mut self, phase: Phase, kernel: Kernel, group: usize, batch: &Batch, table: &Table) {
        let rows = self.table(&[table.tasks], &table.chunks);
        self.push(phase, kernel, group, Subject::Windows(rows, batch.windows.clone()), table.tasks);
    }

    fn edges(&mut self, phase: Phase, group: usize, tables: &Tables, kernel: Kernel) {
        for batch in &tables.batches {
            for rows in batch.edges.chunks(self.limits.rows::<EdgeRow>()) {
                let table = self.table(&[], rows);
                let workgroups = count(rows).div_ceil(self.limits.workgroup);
                self.push(phase, kernel, group, Subject::Windows(table, batch.windows.clone()), workgroups);
            }
        }
    }

    fn sum(&mut self, kernel: Kernel, sum: &SumWindow) {
        let rows = self.table(&[sum.table.tasks], &sum.table.chunks);
        self.push(Phase::Apply, kernel, 0, Subject::Sums(rows, sum.examples, sum.sums), sum.table.tasks);
    }

    /// The dispatches of each phase.
    fn build(
        self,
        memory: &Memory,
        running: Option<&wgpu::Buffer>,
        params: &[(Params, wgpu::Buffer)],
    ) -> Result<[Vec<Dispatch>; 3], Error> {
        let Self { gpu, buffers, mut tables, pending, .. } = self;
        if tables.is_empty() {
            tables.resize(4, 0);
        }
        let tables = gpu.device.filled("gradclip tables", &tables, wgpu::BufferUsages::STORAGE)?;
        let mut clips = Vec::new();
        for (_, params) in params {
            clips.push(clip_group(gpu, memory, params)?);
        }
        let part = |buffer: &wgpu::Buffer, offset, size| (buffer.clone(), offset, size);
        let rows = |range: Range<u64>| part(&tables, range.start, range.end - range.start);
        let window = |of: &Window| part(&buffers[of.buffer], of.offset, of.size);
        let whole = |buffer: &wgpu::Buffer| part(buffer, 0, buffer.size());
        let mut phases = [const { Vec::new() }; 3];
        for (phase, kernel, group, subject, workgroups) in pending {
            let of = match &subject {
                Subject::Windows(_, windows) => windows.first().map(|window| window.buffer),
                Subject::Sums(_, examples, _) => examples.as_ref().map(|window| window.buffer),
                _ => None,
            };
            let mut access = Access::None;
            let mut parts = Vec::new();
            match subject {
                Subject::Rows(range) => parts.push(vec![rows(range)]),
                Subject::Windows(range, windows) => {
                    let words: Vec<_> = windows.iter().map(window).collect();
                    parts.push(vec![rows(range)]);
                    access = gpu.access(words.len());
                    bind_windows(gpu, access, words, &mut parts);
                }
                Subject::Sums(range, examples, sums) => {
                    access = Access::Words;
                    // Where there are no examples, nothing is read of what stands for them.
                    let examples = examples.as_ref().map_or_else(|| whole(&memory.thresholds), window);
                    parts.extend([vec![rows(range)], vec![examples], vec![window(&sums)]]);
                }
                Subject::Decide => parts.extend([vec![whole(&memory.thresholds)], vec![whole(&memory.coefficients)]]),
                Subject::Threshold => parts.extend([vec![whole(&memory.thresholds)], vec![whole(&memory.states)]]),
                Subject::Running => parts.extend(running.map(|running| vec![whole(running)])),
            }
            let group = clips[group].of(kernel);
            let made = dispatch(gpu, (kernel, access), group, &parts, workgroups)?;
            phases[phase as usize].push(Dispatch { buffer: of, ..made });
        }
        Ok(phases)
    }
}

/// Part of a buffer: offset and size in bytes.
pub(super) type Part = (wgpu::Buffer, u64, u64);

fn bound((buffer, offset, size): &Part) -> wgpu::BufferBinding<'_> {
    wgpu::BufferBinding { buffer, offset: *offset, size: wgpu::BufferSize::new(*size) }
}

/// Adds what each binding of windows holds.
fn bind_windows(gpu: &GpuClipper, access: Access, mut words: Vec<Part>, parts: &mut Vec<Vec<Part>>) {
    if let Access::Array(count) = access {
        // No chunk is in those that fill it up.
        words.resize(count as usize, words[0].clone());
    }
    // As quads, a binding must hold one at least.
    let blank = |part: &Part| if part.2 < 16 { (gpu.kernels.blank.clone(), 0, 16) } else { part.clone() };
    let quads = words.iter().map(blank).collect();
    match access {
        Access::None => {}
        Access::Words => parts.push(words),
        Access::Quads | Access::Array(_) => parts.extend([words, quads]),
    }
}

fn count<T>(rows: &[T]) -> u32 {
    // There are fewer rows than partials, whose number was checked.
    u32::try_from(rows.len()).unwrap_or(u32::MAX)
}

/// Group 0 of a group of tensors.
pub(super) fn clip_group(
    gpu: &GpuClipper,
    memory: &Memory,
    params: &wgpu::Buffer,
) -> Result<ClipGroup<wgpu::BindGroup>, Error> {
    let all = [(PARTIALS, &memory.partials), (PARAMS, params), (RESULTS, &memory.results)];
    let group = |layout, buffers: &[(u32, &wgpu::Buffer)]| {
        let mut entries = Vec::new();
        for (binding, buffer) in buffers {
            entries.push(wgpu::BindGroupEntry { binding: *binding, resource: buffer.as_entire_binding() });
        }
        gpu.device.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
    };
    let layouts = &gpu.kernels.layouts.clip;
    gpu.device.scoped(|| ClipGroup {
        measure: group(&layouts.measure, &all),
        finalise: group(&layouts.finalise, &all),
        apply: group(&layouts.apply, &all[1..]),
    })
}

/// A dispatch that binds parts of buffers as its group 1, several where a binding is an array.
pub(super) fn dispatch(
    gpu: &GpuClipper,
    (kernel, access): (Kernel, Access),
    clip_group: &wgpu::BindGroup,
    parts: &[Vec<Part>],
    workgroups: u32,
) -> Result<Dispatch, Error> {
    let widest = gpu.device.device.limits().max_compute_workgroups_per_dimension;
    let workgroups = grid(workgroups, widest).ok_or_else(|| {
        let limit = u64::from(widest) * u64::from(widest);
        Error::too_large("the number of workgroups", workgroups.into(), limit)
    })?;
    let pipeline = gpu.kernels.pipeline(&gpu.device, kernel, access)?;
    let bindings: Vec<Vec<_>> = parts.iter().map(|parts| parts.iter().map(bound).collect()).collect();
    let subject = gpu.device.scoped(|| {
        let mut entries = Vec::new();
        for (binding, of) in (0..).zip(&bindings) {
            let resource = match &of[..] {
                [one] if !(matches!(access, Access::Array(_)) && binding > 0) => {
                    wgpu::BindingResource::Buffer(one.clone())
                }
                array => wgpu::BindingResource::BufferArray(array),
            };
            entries.push(wgpu::BindGroupEntry { binding, resource });
        }
        let layout = &pipeline.get_bind_group_layout(1);
        gpu.device.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
    })?;
    Ok(Dispatch { kernel, pipeline, clip_group: clip_group.clone(), subject, workgroups, buffer: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tuning::{HARDWARE, SOFTWARE, STAGING_BYTES};
    use crate::segment::By;

    /// Half a terabyte in loads of 16 MiB, on paper: its partials have room in the smallest default binding.
    #[test]
    fn partials_of_any_number_of_buffers_have_room() {
        let len = STAGING_BYTES / 4;
        let piece = |buffer| {
            let layout = Layout { by: By::Whole, columns: len, segment: 0 };
            Piece { buffer, dtype: Dtype::F32, start: 0, len, tensor: 0, first_element: 0, layout }
        };
        for buffers in [1, 2, 255, 256, 257, 1 << 15] {
            let pieces: Vec<_> = (0..buffers).map(piece).collect();
            let words = words_at_a_time(pieces.iter(), true);
            for tuning in [SOFTWARE, HARDWARE] {
                let partials = len.div_ceil(tuning.chunk_words(words).into()) * buffers as u64;
                assert!(partials * PARTIAL_BYTES <= 128 << 20, "{partials} of {buffers} buffers");
                let alone = tuning.chunk_words(len);
                assert!(buffers > BUFFERS_OF_CHUNKS as usize || tuning.chunk_words(words) == alone);
            }
            assert_eq!(words_at_a_time(pieces.iter(), false), len * buffers as u64);
        }
    }
}

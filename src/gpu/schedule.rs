//! The dispatches of a plan, in order, and their tables. Pure arithmetic on sizes.

use std::collections::HashMap;

use super::clipper::GpuClipper;
use super::dispatch::{Bindings, Pending, Phase};
use super::gather::{Gathered, Group, Job};
use super::kernels::{Kernel, Norm, StepKernel, Update};
use super::merge::MergeTree;
use super::readback::PARTIAL_BYTES;
use super::step;
use super::table::{
    Limits, Origin, Piece, StateLayout, StepBatch, StepKey, SumWindow, Tables, Use, step_batches, sum_windows,
};
use super::threshold::{Formula, Rule};
use super::tuning::BUFFERS_OF_CHUNKS;
use crate::{Dtype, Error, Optimizer};

/// The tables of a plan.
pub(super) struct Schedule {
    groups: Vec<GroupTables>,
    /// Whether gradients are written, and whether to count what that loses.
    writes: bool,
    counts: bool,
    sums: Vec<SumWindow>,
    /// Of an optimizer, with where its state lies.
    steps: Vec<StepBatch>,
    pub(super) state: StateLayout,
    pub(super) tree: MergeTree,
    pub(super) origins: Vec<Origin>,
    /// The partial of all groups.
    pub(super) everything: u32,
    pub(super) limits: Limits,
}

/// How many storage buffers `clamp` binds if it counts.
const COUNTING_BUFFERS: u32 = 6;

/// The tables of a group.
struct GroupTables {
    measured: Tables,
    /// Those of the norm beside it.
    beside: Option<Tables>,
    /// The tables for scaling, if they differ from those for measuring.
    applied: Option<Tables>,
}

impl Schedule {
    /// Plans all tables, and sets the place of each group in the plan.
    ///
    /// # Errors
    /// [`Error::Limit`] if the device cannot bind or number what the plan needs.
    pub(super) fn new(gpu: &GpuClipper, gathered: &mut Gathered) -> Result<Self, Error> {
        let Gathered { groups, job, job_pieces, counts, in_turn, .. } = gathered;
        let may_skip = groups.iter().any(|group| group.may_skip);
        groups.iter_mut().for_each(|group| group.may_skip = may_skip);
        let device_limits = gpu.device.device.limits();
        let alignment = u64::from(device_limits.min_storage_buffer_offset_alignment);
        let measured = |g: &'_ Group| if g.clip.needs_parameters() { g.parameters.len() } else { 0 };
        let pieces = || groups.iter().flat_map(|g| g.pieces.iter().chain(&g.parameters[..measured(g)]));
        let limits = Limits::new(
            &gpu.tuning,
            words_at_a_time(pieces(), *in_turn),
            (device_limits.max_storage_buffer_binding_size, alignment),
            if *in_turn { 1 } else { gpu.windows as usize },
        );
        // An outcome is as long as a partial, and outcomes have a head. There is one threshold more than segments.
        let limit = limits.binding_bytes / PARTIAL_BYTES;
        let segments = groups.iter().map(|g| u64::from(g.segments.count)).sum();
        if segments + 2 > limit {
            return Err(Error::too_large("the number of segments", segments, limit - 2));
        }
        let mut schedule = Self {
            groups: Vec::new(),
            writes: !matches!(job, Job::Measure | Job::Sum(_) | Job::Step(_)),
            counts: *counts,
            sums: Vec::new(),
            steps: Vec::new(),
            state: StateLayout::default(),
            tree: MergeTree::new(limits.workgroup, gpu.tuning.merged_partials),
            origins: Vec::new(),
            everything: 0,
            limits,
        };
        let have = device_limits.max_storage_buffers_per_shader_stage;
        let too_few = |need: u32, what: &str| {
            let limit = "the device's limit max_storage_buffers_per_shader_stage";
            if have < need {
                Err(Error::Limit(format!("{limit} is {have}; {what} needs at least {need}")))
            } else {
                Ok(())
            }
        };
        if *counts {
            too_few(COUNTING_BUFFERS, "counting what rounding loses")?;
        }
        let placed = schedule.place(groups, job, job_pieces);
        // A count that exceeds 32 bits exceeds every limit.
        let partials = placed.map_or(1 << 32, |()| schedule.tree.partials.into());
        if partials > limit {
            return Err(Error::too_large("the number of partials", partials, limit));
        }
        if let Job::Step(optimizers) = job {
            too_few(step::STEP_BUFFERS, "an optimizer")?;
            let most = limits.binding_bytes.min(device_limits.max_buffer_size) / 4;
            schedule.state = step::layout(groups, optimizers, most);
            let steps = step_batches(&step::pieces(groups, optimizers, &schedule.state), limits);
            // A place that exceeds 32 bits exceeds every limit.
            schedule.steps =
                steps.ok_or_else(|| Error::too_large("an element's place", 1 << 32, limits.binding_bytes))?;
        }
        Ok(schedule)
    }

    /// None if there is no room for all rows.
    fn place(&mut self, groups: &mut [Group], job: &Job, job_pieces: &[Piece]) -> Option<()> {
        let limits = self.limits;
        let first_origin = if let Job::Accumulate(memory) = job { memory.origins } else { 0 };
        let mut first_segment = 0;
        let mut slot = 0u32;
        // The first slot of each group, and of the norm beside it.
        let mut starts = Vec::new();
        for group in &mut *groups {
            group.first_segment = first_segment;
            let segments = first_segment..first_segment + group.segments.count;
            first_segment = segments.end;
            let placed = |pieces: &[Piece], all: bool| -> Vec<_> {
                let mut pieces: Vec<_> = pieces.iter().filter(|p| all || group.counted[p.tensor]).copied().collect();
                pieces.iter_mut().for_each(|piece| piece.layout.segment += segments.start);
                pieces
            };
            let mut measure = |pieces: &[Piece], measures_only| {
                let origin = first_origin.checked_add(u32::try_from(self.origins.len()).ok()?)?;
                let tables = Tables::new(pieces, segments.clone(), (slot, origin), measures_only, limits)?;
                starts.push(slot);
                slot = tables.slots.iter().try_fold(slot, |sum, n| sum.checked_add(*n))?;
                self.origins.extend_from_slice(&tables.origins);
                Some(tables)
            };
            let all = placed(&group.pieces, true);
            let apply = || Tables::new(&all, segments.clone(), (0, 0), !self.writes, limits);
            let (measured, applied) = if group.given {
                // Norms are given, so the tensors themselves are not measured.
                (measure(job_pieces, true)?, Some(apply()?))
            } else if group.all_counted() {
                (measure(&all, !self.writes)?, None)
            } else {
                (measure(&placed(&group.pieces, false), true)?, Some(apply()?))
            };
            let beside = match group.beside() {
                None => None,
                Some((pieces, _)) => Some(measure(&placed(pieces, false), true)?),
            };
            self.groups.push(GroupTables { measured, beside, applied });
            if let Job::Sum(_) = job {
                let sum_of = |piece: Piece| (piece, job_pieces[piece.tensor]);
                self.sums = sum_windows(&all.into_iter().map(sum_of).collect::<Vec<_>>(), limits)?;
            }
        }
        self.tree.partials = slot;
        let mut starts = starts.into_iter();
        let mut level = 0;
        for (tables, group) in self.groups.iter().zip(&mut *groups) {
            let mut merged = |of: &Tables| {
                let (at, until) = self.tree.segments(starts.next()?, &of.slots)?;
                level = level.max(until);
                Some(at)
            };
            group.first_partial = merged(&tables.measured)?;
            if let Some(beside) = &tables.beside {
                group.first_beside = Some(merged(beside)?);
            }
        }
        let mut totals = Vec::new();
        // Limits stand behind the thresholds of all segments.
        for (limit, group) in (first_segment..).zip(groups) {
            group.limit = limit;
            group.total = self.tree.total(group.first_partial, group.segments.count, level)?;
            totals.push(group.total);
        }
        self.everything = self.tree.everything(&totals)?;
        Some(())
    }

    /// Adds all dispatches. The device computes the thresholds of a group that has a rule.
    pub(super) fn add_to(&self, pending: &mut Pending<'_>, groups: &[Group], job: &Job, rules: &[Option<Rule>]) {
        self.measure(pending, groups);
        self.decide(pending, groups, job, rules);
        self.apply(pending, groups);
        if let Job::Step(optimizers) = job {
            self.step(pending, groups, optimizers);
        }
    }

    fn measure(&self, pending: &mut Pending<'_>, groups: &[Group]) {
        for (i, (group, tables)) in groups.iter().zip(&self.groups).enumerate() {
            let norm = group.norm();
            let writes = self.writes && !group.reads_first();
            for (batch, of, dtype, table) in tables.measured.each() {
                let kernel = match (of, norm) {
                    (Use::Mixed { .. }, _) => continue,
                    (of, Some(norm)) => norm_kernel(of, dtype, norm),
                    (_, None) => Kernel::Clamp { dtype, guarded: false, writes, counts: self.counts && writes },
                };
                pending.batch(Phase::Measure, kernel, i, batch, table);
            }
            if norm.is_none() && writes {
                pending.edges(Phase::Measure, i, &tables.measured, Kernel::Edges { value: true, guarded: false });
            }
            if let (Some(beside), Some((_, norm))) = (&tables.beside, group.beside()) {
                for (batch, of, dtype, table) in beside.each() {
                    pending.batch(Phase::Measure, norm_kernel(of, dtype, norm), i, batch, table);
                }
            }
        }
        for rows in &self.tree.levels {
            pending.rows(Phase::Measure, Kernel::Merge, rows);
        }
    }

    fn decide(&self, pending: &mut Pending<'_>, groups: &[Group], job: &Job, rules: &[Option<Rule>]) {
        if let Job::Accumulate(memory) = job {
            let bindings = Bindings::Accumulator(memory.partial.clone());
            pending.push(Phase::Decide, Kernel::Accumulate { moves: false }, 0, bindings, 1);
            return;
        }
        // The first group that decides counts the step, and there must be one.
        let first = groups.iter().position(|group| group.segments.count > 0).unwrap_or(0);
        let decides = |(i, group): &(usize, &Group)| group.segments.count > 0 || *i == first;
        let workgroups = |group: &Group| group.segments.count.max(1).div_ceil(self.limits.workgroup);
        // All come before the first decision, because one group may skip the step of all.
        for (i, group) in groups.iter().enumerate().filter(decides) {
            let norm = group.norm().unwrap_or(Norm::Inf);
            let (formula, workgroups) = match rules[i] {
                Some(rule) => (rule.formula, workgroups(group)),
                None if group.may_skip => (Formula::Fixed, 1),
                None => continue,
            };
            let kernel = Kernel::Threshold { formula, norm };
            pending.push(Phase::Decide, kernel, i, Bindings::Threshold, workgroups);
        }
        for (i, group) in groups.iter().enumerate().filter(decides) {
            let kernel = Kernel::Finalise { norm: group.norm(), given: group.given };
            pending.push(Phase::Decide, kernel, i, Bindings::Decide, workgroups(group));
        }
    }

    fn apply(&self, pending: &mut Pending<'_>, groups: &[Group]) {
        let counts = self.counts;
        for sum in &self.sums {
            pending.sum(Kernel::Sum { dtype: sum.dtype }, sum);
        }
        for (i, (group, tables)) in groups.iter().zip(&self.groups).enumerate() {
            let value = group.clip.measured().is_none();
            if !self.writes || (value && !group.reads_first()) {
                continue;
            }
            let applied = tables.applied.as_ref().unwrap_or(&tables.measured);
            for (batch, of, dtype, table) in applied.each() {
                let kernel = match of {
                    Use::Run | Use::Each => continue,
                    Use::Whole if value => Kernel::Clamp { dtype, guarded: true, writes: true, counts },
                    Use::Whole => Kernel::Scale { dtype, counts },
                    Use::Mixed { columns } => Kernel::ScaleEach { dtype, columns, counts },
                };
                pending.batch(Phase::Apply, kernel, i, batch, table);
            }
            pending.edges(Phase::Apply, i, applied, Kernel::Edges { value, guarded: true });
        }
    }

    fn step(&self, pending: &mut Pending<'_>, groups: &[Group], optimizers: &[(Optimizer, usize)]) {
        // Counted here, and not with the decision, because a step may be decided twice: with the norm of this process, and
        // with that of all.
        pending.push(Phase::Apply, Kernel::Numbers, 0, Bindings::Numbers, 1);
        for batch in &self.steps {
            let StepKey { clip, optimizer, gradient, parameter, each, .. } = batch.key;
            let (update, value) = (Update::of(&optimizers[optimizer].0, parameter), groups[clip].norm().is_none());
            pending.step(Kernel::Step(StepKernel { gradient, parameter, update, value, each }), batch);
        }
    }
}

/// The number of words that are cut into chunks at a time: all of them or, if buffers come in turn, those of the
/// largest. With very many buffers each gets fewer chunks, so that the partials of all of them have room.
pub(super) fn words_at_a_time<'p>(pieces: impl Iterator<Item = &'p Piece>, in_turn: bool) -> u64 {
    let mut by_buffer = HashMap::<_, u64>::new();
    for piece in pieces {
        *by_buffer.entry(if in_turn { piece.buffer } else { 0 }).or_default() += piece.words();
    }
    let (largest, all) =
        by_buffer.into_values().fold((0, 0), |(largest, all), words| (words.max(largest), all + words));
    largest.max(all / BUFFERS_OF_CHUNKS)
}

/// The kernel that measures rows of this use.
fn norm_kernel(of: Use, dtype: Dtype, norm: Norm) -> Kernel {
    if of == Use::Each { Kernel::NormEach { dtype, norm } } else { Kernel::Norm { dtype, norm } }
}

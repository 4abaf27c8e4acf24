//! The dispatches that a plan records, and what each binds.

use std::collections::HashMap;
use std::ops::Range;

use bytemuck::Pod;
use wgpu::BufferBinding;

use super::clipper::GpuClipper;
use super::kernels::{Access, ClipGroup, Kernel, PARAMS, PARTIALS, RESULTS};
use super::memory::Memory;
use super::readback::LossRow;
use super::step::StepMemory;
use super::table::{Batch, EdgeRow, Limits, StepBatch, SumWindow, Table, Tables, Window, grid};
use crate::Error;

/// A dispatch with everything it binds.
#[derive(Debug)]
pub(super) struct Dispatch {
    pub(super) kernel: Kernel,
    pipeline: wgpu::ComputePipeline,
    /// Groups 0 and 1.
    bind_groups: [wgpu::BindGroup; 2],
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

impl Dispatch {
    /// Makes a dispatch that binds these as its group 1. A binding of several buffers is an array.
    pub(super) fn new(
        gpu: &GpuClipper,
        (kernel, access): (Kernel, Access),
        clip_group: &wgpu::BindGroup,
        bindings: &[Vec<BufferBinding<'_>>],
        workgroups: u32,
    ) -> Result<Self, Error> {
        let device = &gpu.device.device;
        let widest = device.limits().max_compute_workgroups_per_dimension;
        let workgroups = grid(workgroups, widest).ok_or_else(|| {
            let limit = u64::from(widest) * u64::from(widest);
            Error::too_large("the number of workgroups", workgroups.into(), limit)
        })?;
        let pipeline = gpu.kernels.pipeline(&gpu.device, kernel, access)?;
        let own_group = gpu.device.scoped(|| {
            let mut entries = Vec::new();
            for (binding, of) in (0..).zip(bindings) {
                let resource = match &of[..] {
                    [one] if !(matches!(access, Access::Array(_)) && binding > 0) => {
                        wgpu::BindingResource::Buffer(one.clone())
                    }
                    array => wgpu::BindingResource::BufferArray(array),
                };
                entries.push(wgpu::BindGroupEntry { binding, resource });
            }
            let layout = &pipeline.get_bind_group_layout(1);
            device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
        })?;
        Ok(Self { kernel, pipeline, bind_groups: [clip_group.clone(), own_group], workgroups, buffer: None })
    }

    pub(super) fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline);
        for (index, group) in (0..).zip(&self.bind_groups) {
            pass.set_bind_group(index, group, &[]);
        }
        let (x, y) = self.workgroups;
        pass.dispatch_workgroups(x, y, 1);
    }
}

/// What a dispatch binds as its group 1.
pub(super) enum Bindings {
    /// Rows of the plan's tables.
    Rows(Range<u64>),
    /// Rows, and the windows that they refer to.
    Windows(Range<u64>, Vec<Window>),
    /// Rows, a window of examples, if there are any, and a window of sums.
    Sums(Range<u64>, Option<Window>, Window),
    Decide,
    Threshold,
    Accumulator(wgpu::Buffer),
    Numbers,
    /// Rows, the windows of gradients and of parameters, and the places of the state's block and of the settings.
    Step(Range<u64>, Window, Window, usize, usize),
}

impl Bindings {
    /// How a kernel that binds these reaches gradients.
    fn access(&self, gpu: &GpuClipper) -> Access {
        match self {
            Self::Windows(_, windows) => gpu.access(windows.len()),
            Self::Sums(..) => Access::Words,
            Self::Rows(_) | Self::Decide | Self::Threshold | Self::Accumulator(_) | Self::Numbers | Self::Step(..) => {
                Access::None
            }
        }
    }
}

/// The dispatches of a plan before their buffers exist.
pub(super) struct Pending<'a> {
    gpu: &'a GpuClipper,
    limits: Limits,
    /// All tables of the plan, each at an offset that can be bound.
    tables: Vec<u8>,
    /// Where each table is, by the address of its rows: measuring and scaling often share tables.
    places: HashMap<usize, Range<u64>>,
    dispatches: Vec<(Phase, Kernel, usize, Bindings, u32)>,
}

impl<'a> Pending<'a> {
    pub(super) fn new(gpu: &'a GpuClipper, limits: Limits) -> Self {
        Self { gpu, limits, tables: Vec::new(), places: HashMap::new(), dispatches: Vec::new() }
    }

    /// Adds a dispatch of `workgroups` workgroups for a group of tensors.
    pub(super) fn push(&mut self, phase: Phase, kernel: Kernel, group: usize, bindings: Bindings, workgroups: u32) {
        self.dispatches.push((phase, kernel, group, bindings, workgroups));
    }

    /// Places a table, its head before its rows, unless it is placed already.
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

    pub(super) fn rows<T: Pod>(&mut self, phase: Phase, kernel: Kernel, rows: &[T]) {
        let table = self.table(&[], rows);
        self.push(phase, kernel, 0, Bindings::Rows(table), count(rows));
    }

    pub(super) fn batch(&mut self, phase: Phase, kernel: Kernel, group: usize, batch: &Batch, table: &Table) {
        let rows = self.table(&[table.tasks], &table.chunks);
        self.push(phase, kernel, group, Bindings::Windows(rows, batch.windows.clone()), table.tasks);
    }

    pub(super) fn edges(&mut self, phase: Phase, group: usize, tables: &Tables, kernel: Kernel) {
        for batch in &tables.batches {
            for rows in batch.edges.chunks(self.limits.rows::<EdgeRow>()) {
                let table = self.table(&[], rows);
                let workgroups = count(rows).div_ceil(self.limits.workgroup);
                self.push(phase, kernel, group, Bindings::Windows(table, batch.windows.clone()), workgroups);
            }
        }
    }

    pub(super) fn sum(&mut self, kernel: Kernel, sum: &SumWindow) {
        let rows = self.table(&[sum.table.tasks], &sum.table.chunks);
        self.push(Phase::Apply, kernel, 0, Bindings::Sums(rows, sum.examples, sum.sums), sum.table.tasks);
    }

    pub(super) fn step(&mut self, kernel: Kernel, batch: &StepBatch) {
        let rows = self.table(&[batch.tasks], &batch.rows);
        let bindings = Bindings::Step(rows, batch.gradient, batch.parameter, batch.key.block, batch.key.optimizer);
        self.push(Phase::Apply, kernel, batch.key.clip, bindings, batch.tasks);
    }

    /// The dispatches of each phase, given the buffers of gradients and of the plan, and each group's parameters.
    pub(super) fn build(
        self,
        buffers: &[wgpu::Buffer],
        memory: &Memory,
        params: &[wgpu::Buffer],
    ) -> Result<[Vec<Dispatch>; 3], Error> {
        let Self { gpu, mut tables, dispatches, .. } = self;
        if tables.is_empty() {
            tables.resize(4, 0);
        }
        let tables = gpu.device.filled("gradclip tables", &tables, wgpu::BufferUsages::STORAGE)?;
        let clips: Vec<_> = params.iter().map(|params| clip_group(gpu, memory, params)).collect::<Result<_, _>>()?;
        let rows = |range: Range<u64>| vec![part(&tables, range.start, range.end - range.start)];
        let window = |of: &Window| part(&buffers[of.buffer], of.offset, of.size);
        let wanted = dispatches.iter().map(|(_, kernel, _, bindings, _)| (*kernel, bindings.access(gpu)));
        gpu.kernels.compile(&gpu.device, &wanted.collect())?;
        let mut phases = [const { Vec::new() }; 3];
        for (phase, kernel, group, bindings, workgroups) in dispatches {
            let (access, mut buffer) = (bindings.access(gpu), None);
            let bound = match &bindings {
                Bindings::Rows(range) => vec![rows(range.clone())],
                Bindings::Windows(range, windows) => {
                    buffer = windows.first().map(|window| window.buffer);
                    let mut bound = vec![rows(range.clone())];
                    bound.extend(gradients(gpu, access, windows.iter().map(window).collect()));
                    let losses = memory.losses.iter().filter(|_| kernel.counts());
                    bound.extend(losses.map(|losses| vec![part(losses, LossRow::at(group as u64), LossRow::BYTES)]));
                    bound
                }
                Bindings::Sums(range, examples, sums) => {
                    buffer = examples.as_ref().map(|window| window.buffer);
                    // Without examples nothing is read of the buffer in their place.
                    let examples = examples.as_ref().map_or_else(|| whole(&memory.thresholds), |of| vec![window(of)]);
                    vec![rows(range.clone()), examples, vec![window(sums)]]
                }
                Bindings::Decide => vec![whole(&memory.thresholds), whole(&memory.coefficients)],
                Bindings::Threshold => vec![whole(&memory.thresholds), whole(&memory.states)],
                Bindings::Accumulator(partial) => vec![whole(partial)],
                Bindings::Numbers => memory.step.iter().flat_map(StepMemory::of_numbers).collect(),
                Bindings::Step(range, gradient, parameter, block, optimizer) => {
                    buffer = Some(gradient.buffer);
                    let windows = [rows(range.clone()), vec![window(gradient)], vec![window(parameter)]];
                    let own = memory.step.iter().flat_map(|step| step.of_step(*block, *optimizer));
                    windows.into_iter().chain(own).collect()
                }
            };
            let made = Dispatch::new(gpu, (kernel, access), clips[group].of(kernel), &bound, workgroups)?;
            phases[phase as usize].push(Dispatch { buffer, ..made });
        }
        Ok(phases)
    }
}

pub(super) fn whole(buffer: &wgpu::Buffer) -> Vec<BufferBinding<'_>> {
    vec![buffer.as_entire_buffer_binding()]
}

pub(super) fn part(buffer: &wgpu::Buffer, offset: u64, size: u64) -> BufferBinding<'_> {
    BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) }
}

/// The bindings of gradients.
fn gradients<'b>(
    gpu: &'b GpuClipper,
    access: Access,
    mut words: Vec<BufferBinding<'b>>,
) -> Vec<Vec<BufferBinding<'b>>> {
    if let Access::Array(count) = access {
        // The bindings that fill up the array hold no chunk.
        words.resize(count as usize, words[0].clone());
    }
    // A binding of quads must hold at least one.
    let mut quads = words.clone();
    for quad in quads.iter_mut().filter(|part| part.size.is_none_or(|size| size.get() < 16)) {
        *quad = part(&gpu.kernels.blank, 0, 16);
    }
    match access {
        Access::None => Vec::new(),
        Access::Words => vec![words],
        Access::Quads | Access::Array(_) => vec![words, quads],
    }
}

fn count<T>(rows: &[T]) -> u32 {
    // There are fewer rows than partials, and the number of partials was checked.
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
        let entry =
            |(binding, buffer)| wgpu::BindGroupEntry { binding, resource: wgpu::Buffer::as_entire_binding(buffer) };
        let entries: Vec<_> = buffers.iter().copied().map(entry).collect();
        gpu.device.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
    };
    let layouts = &gpu.kernels.layouts.clip;
    gpu.device.scoped(|| ClipGroup {
        measure: group(&layouts.measure, &all),
        finalise: group(&layouts.finalise, &all),
        apply: group(&layouts.apply, &all[1..]),
    })
}

//! [`GpuPlan`]: everything that a clip needs, built once; each step is then a list of dispatches to record.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};

use super::GpuClipper;
use super::device::Wait;
use super::kernels::{ClipGroup, Kernel, PARAMS, PARTIALS, RESULTS};
use super::number::Number;
use super::readback::{OutcomeRow, Results};
use super::table::{self, ChunkOrigin, Limits, MergeTree, Piece, Window};
use crate::clip::{Mode, Scope};
use crate::{Clip, ClipReport, Dtype, Error, NonFinite};

/// A clip of certain tensors in GPU memory, ready to be recorded again and again.
///
/// Made by [`GpuClipper::plan`]. The plan keeps the tensors' buffers alive, and holds some 64 bytes on the device and as
/// many on the host for each chunk: a tensor, or 16 KiB to 4 MiB of one. It is `Send + Sync`. Its steps share one set of
/// partials and results, so they must run on the GPU one after another, as everything on one queue does.
#[derive(Debug)]
pub struct GpuPlan {
    gpu: GpuClipper,
    clip: Clip,
    dispatches: Vec<Dispatch>,
    results: wgpu::Buffer,
    origins: Vec<ChunkOrigin>,
    names: Vec<Option<Arc<str>>>,
    elements: u64,
    encoded: AtomicU64,
    reported: Mutex<Reported>,
}

/// At the last report: how many steps had been encoded, and how many had run by the device's own count.
#[derive(Clone, Copy, Debug, Default)]
struct Reported {
    encoded: u64,
    steps: u32,
}

/// A dispatch, with all that it binds.
#[derive(Debug)]
struct Dispatch {
    pipeline: wgpu::ComputePipeline,
    clip_group: wgpu::BindGroup,
    row_group: Option<wgpu::BindGroup>,
    workgroups: (u32, u32),
}

/// What a plan is made of, once names and buffers have been sorted out.
pub(super) struct Parts {
    pub(super) buffers: Vec<wgpu::Buffer>,
    pub(super) pieces: Vec<Piece>,
    pub(super) names: Vec<Option<Arc<str>>>,
}

/// Twin of `Params` in `shaders/shared/outcome.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    max_norm: Number,
    max_norm_scaled: Number,
    eps_scaled: Number,
    unscale_exact: Number,
    unscale_value: f32,
    unscale_is_float: u32,
    policy: u32,
    only_measures: u32,
    segments: u32,
    segment_partials: u32,
    total_partial: u32,
    padding: u32,
    min: [f32; 4],
    max: [f32; 4],
}

impl Params {
    fn new(clip: &Clip, segments: u32, tree: &MergeTree) -> Self {
        let scale = clip.grad_scale;
        let (max_norm, (min, max)) = match clip.mode {
            // An infinite threshold is never compared: nothing is written then.
            Mode::Norm { max_norm } => (if max_norm.is_finite() { max_norm } else { 0.0 }, (0.0, 0.0)),
            Mode::Value { min, max } => (0.0, (min, max)),
        };
        let rounded = |bound: f64| {
            // By dtype code; through float32, like every element. See `Clamp::new` in src/cpu/clamp.rs.
            let bound = bound as f32;
            [bound, half::f16::from_f32(bound).to_f32(), half::bf16::from_f32(bound).to_f32(), 0.0]
        };
        let unscale_value = (1.0 / scale) as f32;
        let unscale_is_float = unscale_value.is_normal();
        Self {
            max_norm: Number::product(max_norm, 1.0),
            max_norm_scaled: Number::product(max_norm, scale),
            eps_scaled: Number::product(clip.eps, scale),
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
            only_measures: clip.only_measures().into(),
            segments,
            segment_partials: tree.segment_partials,
            total_partial: tree.total_partial,
            padding: 0,
            min: rounded(min),
            max: rounded(max),
        }
    }
}

/// The size of a `Partial` in `shaders/shared/partial.wgsl`.
const PARTIAL_BYTES: u64 = 32;

impl GpuPlan {
    /// `writes` is false for a plan that only measures what the clip would do.
    pub(super) fn new(gpu: &GpuClipper, clip: &Clip, parts: Parts, writes: bool) -> Result<Self, Error> {
        let limits = gpu.device.device.limits();
        let alignment = u64::from(limits.min_storage_buffer_offset_alignment);
        let binding_bytes = limits.max_storage_buffer_binding_size & !3;
        let words = parts.pieces.iter().map(|p| p.len.div_ceil(4 / p.dtype.size() as u64)).sum();
        // A chunk must fit into a binding wherever it starts.
        let fitting = (binding_bytes - alignment) / 4;
        let chunk_words = gpu.tuning.chunk_words(words).min(u32::try_from(fitting).unwrap_or(u32::MAX));
        let (windows, origins) = table::windows(&parts.pieces, Limits { chunk_words, binding_bytes, alignment });
        // A segment's chunks are consecutive because pieces are in list order.
        let mut segment_chunks = vec![
            0u32;
            match clip.scope {
                Scope::Global => 1,
            }
        ];
        for (_, rows) in windows.iter().flat_map(|w| &w.chunks) {
            for row in rows {
                segment_chunks[row.segment as usize] += 1;
            }
        }
        let too_many = || Error::TooLarge {
            what: "the number of chunks",
            value: origins.len() as u64,
            limit: binding_bytes / PARTIAL_BYTES,
        };
        let tree = table::merge_tree(&segment_chunks).ok_or_else(too_many)?;
        if u64::from(tree.partials) * PARTIAL_BYTES > binding_bytes {
            return Err(too_many());
        }
        let segments = u32::try_from(segment_chunks.len()).map_err(|_| too_many())?;
        let params = Params::new(clip, segments, &tree);
        let mut recorder = Recorder::new(gpu, &parts.buffers, &params, &tree, segments)?;
        recorder.record(clip, &windows, &tree, segments, writes)?;
        let elements = parts.pieces.iter().map(|p| p.len).sum();
        let (dispatches, results) = (recorder.dispatches, recorder.results);
        Ok(Self {
            gpu: gpu.clone(),
            clip: *clip,
            dispatches,
            results,
            origins,
            names: parts.names,
            elements,
            encoded: AtomicU64::new(0),
            reported: Mutex::default(),
        })
    }

    /// Records one step: the norm, the decision, and the scaling or clamping in place, in one compute pass. Neither
    /// waits nor allocates (wgpu's own recording aside); nothing happens before the encoder's commands are submitted.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] on a device that [`GpuClipper::open`] made and that was lost. Whatever else is wrong with
    /// the encoder or the buffers (they were destroyed, or are mapped) wgpu tells when the encoder is finished or
    /// submitted.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Error> {
        self.gpu.device.check_not_lost()?;
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("gradclip"), timestamp_writes: None });
        for dispatch in &self.dispatches {
            pass.set_pipeline(&dispatch.pipeline);
            pass.set_bind_group(0, &dispatch.clip_group, &[]);
            if let Some(group) = &dispatch.row_group {
                pass.set_bind_group(1, group, &[]);
            }
            let (x, y) = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, 1);
        }
        self.encoded.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The report on the last step that was submitted. This is what waits: until the GPU has finished that step.
    ///
    /// On native platforms the future polls the device whenever it is polled itself, so any executor moves it on.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy; [`Error::NotSubmitted`] if no step has run, or if steps were encoded since
    /// the last report and none of them has; the device's own errors.
    pub async fn report(&self) -> Result<ClipReport, Error> {
        self.report_by(Wait::Polling).await
    }

    pub(super) async fn report_by(&self, wait: Wait) -> Result<ClipReport, Error> {
        let encoded = self.encoded.load(Ordering::Relaxed);
        let bytes = self.gpu.device.read(&self.results, 0, size_of::<Results>() as u64, wait).await?;
        let results: Results = bytemuck::pod_read_unaligned(&bytes);
        {
            let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
            let idle = results.steps == reported.steps && encoded != reported.encoded;
            if results.steps == 0 || idle {
                return Err(Error::NotSubmitted);
            }
            *reported = Reported { encoded, steps: results.steps };
        }
        let total = results.total.to_partial(&self.origins);
        let outcome = results.outcome.to_outcome(&self.clip, results.norm_kind);
        self.clip.report(&outcome, &total, self.elements, |i| self.names[i].as_deref())
    }

    /// [`GpuPlan::report`], waiting for the answer.
    ///
    /// # Errors
    /// The same.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn report_blocking(&self) -> Result<ClipReport, Error> {
        pollster::block_on(self.report_by(Wait::Sleeping))
    }
}

/// Makes the buffers of a plan and its dispatches.
struct Recorder<'a> {
    gpu: &'a GpuClipper,
    buffers: &'a [wgpu::Buffer],
    results: wgpu::Buffer,
    clip: ClipGroup<wgpu::BindGroup>,
    dispatches: Vec<Dispatch>,
}

impl<'a> Recorder<'a> {
    fn new(
        gpu: &'a GpuClipper,
        buffers: &'a [wgpu::Buffer],
        params: &Params,
        tree: &MergeTree,
        segments: u32,
    ) -> Result<Self, Error> {
        let device = &gpu.device.device;
        let storage = |label, size, more| {
            let usage = wgpu::BufferUsages::STORAGE | more;
            device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        };
        let results_bytes = size_of::<Results>() + (segments as usize - 1) * size_of::<OutcomeRow>();
        let (partials, results) = gpu.device.scoped(|| {
            let partials =
                storage("gradclip partials", u64::from(tree.partials) * PARTIAL_BYTES, wgpu::BufferUsages::empty());
            (partials, storage("gradclip results", results_bytes as u64, wgpu::BufferUsages::COPY_SRC))
        })?;
        let params = gpu.device.filled("gradclip params", bytemuck::bytes_of(params), wgpu::BufferUsages::UNIFORM)?;
        let group = |layout, buffers: &[(u32, &wgpu::Buffer)]| {
            let mut entries = Vec::new();
            for (binding, buffer) in buffers {
                entries.push(wgpu::BindGroupEntry { binding: *binding, resource: buffer.as_entire_binding() });
            }
            device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
        };
        let all = [(PARTIALS, &partials), (PARAMS, &params), (RESULTS, &results)];
        let layouts = &gpu.kernels.layouts.clip;
        let clip = gpu.device.scoped(|| ClipGroup {
            measure: group(&layouts.measure, &all),
            finalise: group(&layouts.finalise, &all),
            apply: group(&layouts.apply, &all[1..]),
        })?;
        Ok(Self { gpu, buffers, results, clip, dispatches: Vec::new() })
    }

    /// Records the passes in the order in which they run.
    fn record(
        &mut self,
        clip: &Clip,
        windows: &[Window],
        tree: &MergeTree,
        segments: u32,
        writes: bool,
    ) -> Result<(), Error> {
        let guarded = clip.reads_first();
        let (chunks, edges, merges) = self.tables(windows, tree)?;
        let norm_type = match clip.mode {
            Mode::Norm { .. } => Some(clip.norm_type),
            Mode::Value { .. } => None,
        };
        for (dtype, table) in &chunks {
            let kernel = match norm_type {
                Some(norm_type) => Kernel::Norm { dtype: *dtype, norm_type },
                None => Kernel::Clamp { dtype: *dtype, guarded: false, writes: writes && !guarded },
            };
            self.dispatch(kernel, Some(table), table.rows)?;
        }
        let one_pass = norm_type.is_none() && !guarded;
        if writes && one_pass {
            self.edges(&edges, true, false)?;
        }
        for table in &merges {
            self.dispatch(Kernel::Merge, Some(table), table.rows)?;
        }
        self.dispatch(Kernel::Finalise { norm_type }, None, self.in_workgroups(segments))?;
        if !writes || one_pass || clip.only_measures() {
            return Ok(());
        }
        for (dtype, table) in &chunks {
            let kernel = match norm_type {
                Some(_) => Kernel::Scale { dtype: *dtype },
                None => Kernel::Clamp { dtype: *dtype, guarded: true, writes: true },
            };
            self.dispatch(kernel, Some(table), table.rows)?;
        }
        self.edges(&edges, norm_type.is_none(), true)
    }

    fn edges(&mut self, tables: &[Table], value: bool, guarded: bool) -> Result<(), Error> {
        for table in tables {
            self.dispatch(Kernel::Edges { value, guarded }, Some(table), self.in_workgroups(table.rows))?;
        }
        Ok(())
    }

    /// How many workgroups run so many invocations.
    fn in_workgroups(&self, invocations: u32) -> u32 {
        invocations.div_ceil(self.gpu.kernels.workgroup)
    }

    fn dispatch(&mut self, kernel: Kernel, table: Option<&Table>, workgroups: u32) -> Result<(), Error> {
        let widest = self.gpu.device.device.limits().max_compute_workgroups_per_dimension;
        let x = workgroups.min(widest);
        if workgroups.div_ceil(x) > widest {
            let limit = u64::from(widest) * u64::from(widest);
            return Err(Error::TooLarge { what: "the number of workgroups", value: workgroups.into(), limit });
        }
        self.dispatches.push(Dispatch {
            pipeline: self.gpu.kernels.pipeline(&self.gpu.device, kernel)?,
            clip_group: self.clip.of(kernel).clone(),
            row_group: table.map(|t| t.group.clone()),
            workgroups: (x, workgroups.div_ceil(x)),
        });
        Ok(())
    }

    /// Uploads all rows in one buffer and binds each table's part of it, beside its window if it has one.
    #[expect(clippy::type_complexity, reason = "three lists of tables, taken apart at once")]
    fn tables(
        &self,
        windows: &[Window],
        tree: &MergeTree,
    ) -> Result<(Vec<(Dtype, Table)>, Vec<Table>, Vec<Table>), Error> {
        let alignment = self.gpu.device.device.limits().min_storage_buffer_offset_alignment as usize;
        let mut bytes = Vec::new();
        let mut add = |rows: &[u8]| {
            bytes.resize(bytes.len().next_multiple_of(alignment), 0);
            let start = bytes.len() as u64;
            bytes.extend_from_slice(rows);
            start..bytes.len() as u64
        };
        let mut chunks = Vec::new();
        let mut edges = Vec::new();
        for window in windows {
            for (dtype, rows) in &window.chunks {
                chunks.push((*dtype, window, add(bytemuck::cast_slice(rows)), rows.len()));
            }
            if !window.edges.is_empty() {
                edges.push((window, add(bytemuck::cast_slice(&window.edges)), window.edges.len()));
            }
        }
        let merges: Vec<_> = tree.levels.iter().map(|rows| (add(bytemuck::cast_slice(rows)), rows.len())).collect();
        let rows_buffer = self.gpu.device.filled("gradclip tables", &bytes, wgpu::BufferUsages::STORAGE)?;
        let table = |window: Option<&Window>, range: Range<u64>, rows: usize| {
            let part = |buffer, offset, size| {
                wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) })
            };
            let mut resources = Vec::new();
            if let Some(window) = window {
                resources.push(part(&self.buffers[window.buffer], window.offset, window.size));
            }
            resources.push(part(&rows_buffer, range.start, range.end - range.start));
            let entry = |(binding, resource)| wgpu::BindGroupEntry { binding, resource };
            let entries: Vec<_> = (0..).zip(resources).map(entry).collect();
            let layouts = &self.gpu.kernels.layouts;
            let group = self.gpu.device.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: if window.is_some() { &layouts.window } else { &layouts.rows },
                entries: &entries,
            });
            // There are fewer rows than partials, whose number was checked.
            Table { group, rows: u32::try_from(rows).unwrap_or(u32::MAX) }
        };
        self.gpu.device.scoped(|| {
            (
                chunks.into_iter().map(|(dtype, w, range, rows)| (dtype, table(Some(w), range, rows))).collect(),
                edges.into_iter().map(|(w, range, rows)| table(Some(w), range, rows)).collect(),
                merges.into_iter().map(|(range, rows)| table(None, range, rows)).collect(),
            )
        })
    }
}

/// Rows of a table on the device, bound.
struct Table {
    group: wgpu::BindGroup,
    rows: u32,
}

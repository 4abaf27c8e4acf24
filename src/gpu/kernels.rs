//! The compute pipelines: each kernel of `shaders/`, specialised by constants, compiled once and shared by all plans.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};

use super::device::GpuDevice;
use super::table::dtype_code;
use super::threshold::Formula;
use crate::{Dtype, Error, NormType};

/// A kernel and the constants that it is compiled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    /// `norm.wgsl`
    Norm { dtype: Dtype, norm: Norm },
    /// `norm_each.wgsl`
    NormEach { dtype: Dtype, norm: Norm },
    /// `merge.wgsl`
    Merge,
    /// `threshold.wgsl`
    Threshold { formula: Formula, norm: Norm },
    /// `finalise.wgsl`; `norm` is None for a value clip. `given` if norms come from outside.
    Finalise { norm: Option<Norm>, given: bool },
    /// `scale.wgsl`
    Scale { dtype: Dtype },
    /// `scale_each.wgsl`
    ScaleEach { dtype: Dtype, columns: bool },
    /// `clamp.wgsl`: `guarded` if an outcome was decided before, `writes` if it does more than look.
    Clamp { dtype: Dtype, guarded: bool, writes: bool },
    /// `edges.wgsl`, after a kernel that scales or clamps.
    Edges { value: bool, guarded: bool },
    /// `sum.wgsl`
    Sum { dtype: Dtype },
    /// `accumulate.wgsl`
    Accumulate { moves: bool },
}

/// Which norm a kernel measures: its constants `NORM_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Norm {
    L1 = 0,
    L2 = 1,
    Inf = 2,
    P = 3,
}

impl From<NormType> for Norm {
    fn from(norm_type: NormType) -> Self {
        match norm_type {
            NormType::L1 => Self::L1,
            NormType::L2 => Self::L2,
            NormType::Inf => Self::Inf,
            NormType::P(_) => Self::P,
        }
    }
}

/// What all kernels of a device have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) workgroup: u32,
    /// Whether an invocation reads a stretch of its own; else what lies next to the others'.
    pub(super) contiguous: bool,
    /// Whether partials merge by operations of subgroups.
    pub(super) subgroups: bool,
}

/// How a kernel reaches gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Access {
    /// Not at all.
    None,
    /// One window, as words.
    Words,
    /// One window, as words and as quads. Both views are writable, which native platforms allow and browsers do not.
    Quads,
    /// So many windows in an array of bindings, as words and as quads.
    Array(u32),
}

impl Access {
    /// The variables and functions by which a kernel reads and writes words and quads.
    fn source(self) -> String {
        use shared::{QUADS, WINDOW_ARRAY, WORD_QUADS, WORDS};
        match self {
            Self::None => String::new(),
            Self::Words => [WORDS, WORD_QUADS].concat(),
            Self::Quads => [WORDS, QUADS].concat(),
            Self::Array(count) => WINDOW_ARRAY.replace("WINDOWS>", &format!("{count}>")),
        }
    }

    /// How many bindings, and how long an array each is.
    fn bindings(self) -> (u32, Option<NonZeroU32>) {
        match self {
            Self::None => (0, None),
            Self::Words => (1, None),
            Self::Quads => (2, None),
            Self::Array(count) => (2, NonZeroU32::new(count)),
        }
    }
}

/// The files of `shaders/shared`, each after those that it builds on.
mod shared {
    pub(super) const NUMBER: &str = include_str!("../../shaders/shared/number.wgsl");
    pub(super) const PARTIAL: &str = include_str!("../../shaders/shared/partial.wgsl");
    pub(super) const TREE: &str = include_str!("../../shaders/shared/tree.wgsl");
    pub(super) const SUBGROUP: &str = include_str!("../../shaders/shared/subgroup.wgsl");
    pub(super) const OUTCOME: &str = include_str!("../../shaders/shared/outcome.wgsl");
    pub(super) const WORDS: &str = include_str!("../../shaders/shared/words.wgsl");
    pub(super) const WORD_QUADS: &str = include_str!("../../shaders/shared/word_quads.wgsl");
    pub(super) const QUADS: &str = include_str!("../../shaders/shared/quads.wgsl");
    pub(super) const WINDOW_ARRAY: &str = include_str!("../../shaders/shared/window_array.wgsl");
    pub(super) const HALF: &str = include_str!("../../shaders/shared/half.wgsl");
    pub(super) const CHUNK: &str = include_str!("../../shaders/shared/chunk.wgsl");
    pub(super) const POWER: &str = include_str!("../../shaders/shared/power.wgsl");
    pub(super) const MEASURE: &str = include_str!("../../shaders/shared/measure.wgsl");
    pub(super) const MEASURED: &str = include_str!("../../shaders/shared/measured.wgsl");
    pub(super) const APPLY: &str = include_str!("../../shaders/shared/apply.wgsl");
    pub(super) const QUICK: &str = include_str!("../../shaders/shared/quick.wgsl");
    pub(super) const APPLY_CHUNK: &str = include_str!("../../shaders/shared/apply_chunk.wgsl");
}

/// The constants of a kernel, of which each uses some.
struct Constants {
    dtype: Dtype,
    norm: Norm,
    formula: Formula,
    value: bool,
    guarded: bool,
    writes: bool,
    columns: bool,
    given: bool,
    moves: bool,
}

impl Kernel {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Norm { .. } => "norm",
            Self::NormEach { .. } => "norm_each",
            Self::Merge => "merge",
            Self::Threshold { .. } => "threshold",
            Self::Finalise { .. } => "finalise",
            Self::Scale { .. } => "scale",
            Self::ScaleEach { .. } => "scale_each",
            Self::Clamp { .. } => "clamp",
            Self::Edges { .. } => "edges",
            Self::Sum { .. } => "sum",
            Self::Accumulate { .. } => "accumulate",
        }
    }

    /// The whole WGSL module.
    pub(super) fn source(self, access: Access, shape: Shape) -> String {
        use shared::*;
        let mut with = Constants {
            dtype: Dtype::F32,
            norm: Norm::Inf,
            formula: Formula::Agc,
            value: false,
            guarded: true,
            writes: true,
            columns: false,
            given: false,
            moves: false,
        };
        let (parts, main): (&[&str], _) = match self {
            Self::Norm { dtype, norm } => {
                (with.dtype, with.norm) = (dtype, norm);
                (&[OUTCOME, HALF, CHUNK, POWER, MEASURE], include_str!("../../shaders/norm.wgsl"))
            }
            Self::NormEach { dtype, norm } => {
                (with.dtype, with.norm) = (dtype, norm);
                (&[OUTCOME, HALF, CHUNK, POWER, MEASURE], include_str!("../../shaders/norm_each.wgsl"))
            }
            Self::Merge => (&[], include_str!("../../shaders/merge.wgsl")),
            Self::Threshold { formula, norm } => {
                (with.formula, with.norm) = (formula, norm);
                (&[OUTCOME, POWER, MEASURED], include_str!("../../shaders/threshold.wgsl"))
            }
            Self::Finalise { norm, given } => {
                (with.norm, with.value, with.given) = (norm.unwrap_or(Norm::Inf), norm.is_none(), given);
                (&[OUTCOME, POWER, MEASURED], include_str!("../../shaders/finalise.wgsl"))
            }
            Self::Scale { dtype } => {
                with.dtype = dtype;
                (&[OUTCOME, HALF, CHUNK, APPLY, QUICK, APPLY_CHUNK], include_str!("../../shaders/scale.wgsl"))
            }
            Self::ScaleEach { dtype, columns } => {
                (with.dtype, with.columns) = (dtype, columns);
                (&[OUTCOME, HALF, CHUNK, APPLY, QUICK], include_str!("../../shaders/scale_each.wgsl"))
            }
            Self::Clamp { dtype, guarded, writes } => {
                (with.dtype, with.value, with.guarded, with.writes) = (dtype, true, guarded, writes);
                (&[OUTCOME, HALF, CHUNK, APPLY, QUICK, APPLY_CHUNK], include_str!("../../shaders/clamp.wgsl"))
            }
            Self::Edges { value, guarded } => {
                (with.value, with.guarded) = (value, guarded);
                (&[OUTCOME, HALF, APPLY], include_str!("../../shaders/edges.wgsl"))
            }
            Self::Sum { dtype } => {
                with.dtype = dtype;
                (&[OUTCOME, HALF, CHUNK, APPLY], include_str!("../../shaders/sum.wgsl"))
            }
            Self::Accumulate { moves } => {
                with.moves = moves;
                (&[OUTCOME], include_str!("../../shaders/accumulate.wgsl"))
            }
        };
        let Constants { dtype, norm, formula, value, guarded, writes, columns, given, moves } = with;
        // A plan refuses dtypes without kernels before it asks for one.
        let code = dtype_code(dtype).expect("a plan holds dtypes with kernels only");
        let (per_word, norm, formula) = (4 / dtype.size(), norm as u32, formula as u32);
        let Shape { workgroup, contiguous, subgroups } = shape;
        let apart = if contiguous { 1 } else { workgroup };
        let constants = format!(
            "const WORKGROUP: u32 = {workgroup}u;\nconst APART: u32 = {apart}u;\nconst DTYPE: u32 = {code}u;\nconst PER_WORD: u32 = {per_word}u;\n\
             const NORM: u32 = {norm}u;\nconst NORM_L1: u32 = 0u;\nconst NORM_L2: u32 = 1u;\n\
             const NORM_INF: u32 = 2u;\nconst NORM_P: u32 = 3u;\nconst THRESHOLD: u32 = {formula}u;\n\
             const VALUE: bool = {value};\nconst GUARDED: bool = {guarded};\nconst WRITES: bool = {writes};\n\
             const COLUMNS: bool = {columns};\nconst GIVEN: bool = {given};\nconst MOVES: bool = {moves};\n"
        );
        let directive = if matches!(access, Access::Array(_)) { "enable wgpu_binding_array;\n" } else { "" };
        let windows = access.source();
        let merging = if subgroups { SUBGROUP } else { TREE };
        [&[directive, &constants, NUMBER, PARTIAL, merging, &windows], parts, &[main]].concat().join("\n")
    }
}

/// The pipelines of one device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) shape: Shape,
    pub(super) layouts: Layouts,
    /// What is bound as quads where a window is shorter than one.
    pub(super) blank: wgpu::Buffer,
    compiled: Mutex<HashMap<(Kernel, Access), wgpu::ComputePipeline>>,
}

/// What the kernels bind. Group 0 belongs to a group of tensors: partials, parameters, results. Group 1 is what one
/// dispatch is about: for kernels on gradients a table and windows, for the others one of these.
#[derive(Debug)]
pub(super) struct Layouts {
    pub(super) clip: ClipGroup<wgpu::BindGroupLayout>,
    /// One table, read: rows of partials to merge.
    pub(super) rows: wgpu::BindGroupLayout,
    /// Thresholds, read, and coefficients.
    pub(super) decide: wgpu::BindGroupLayout,
    /// Thresholds and the states that they follow.
    pub(super) threshold: wgpu::BindGroupLayout,
    /// A running partial.
    pub(super) running: wgpu::BindGroupLayout,
}

/// Group 0 in its three forms: the layouts of a device, or the groups of a plan.
#[derive(Debug)]
pub(super) struct ClipGroup<T> {
    /// What measures and merges: partials are written, results read.
    pub(super) measure: T,
    /// finalise: results are written.
    pub(super) finalise: T,
    /// What scales: no partials, so that nothing stands between the dispatches of one plan.
    pub(super) apply: T,
}

impl<T> ClipGroup<T> {
    /// The form that a kernel takes.
    pub(super) fn of(&self, kernel: Kernel) -> &T {
        match kernel {
            Kernel::Norm { .. }
            | Kernel::NormEach { .. }
            | Kernel::Merge
            | Kernel::Threshold { .. }
            | Kernel::Clamp { .. }
            | Kernel::Accumulate { .. } => &self.measure,
            Kernel::Finalise { .. } => &self.finalise,
            Kernel::Scale { .. } | Kernel::ScaleEach { .. } | Kernel::Edges { .. } | Kernel::Sum { .. } => &self.apply,
        }
    }
}

/// Bindings of group 0.
pub(super) const PARTIALS: u32 = 0;
pub(super) const PARAMS: u32 = 1;
pub(super) const RESULTS: u32 = 2;

impl Kernels {
    pub(super) fn new(gpu: &GpuDevice, shape: Shape) -> Result<Self, Error> {
        let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
        let uniform = wgpu::BufferBindingType::Uniform;
        let layout = |label, entries: &[(u32, wgpu::BufferBindingType)]| {
            let entries: Vec<_> = entries.iter().map(|&(binding, ty)| entry(binding, ty, None)).collect();
            gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries })
        };
        let layouts = gpu.scoped(|| Layouts {
            clip: ClipGroup {
                measure: layout(
                    Some("gradclip measure"),
                    &[(PARTIALS, storage(false)), (PARAMS, uniform), (RESULTS, storage(true))],
                ),
                finalise: layout(
                    Some("gradclip finalise"),
                    &[(PARTIALS, storage(false)), (PARAMS, uniform), (RESULTS, storage(false))],
                ),
                apply: layout(Some("gradclip apply"), &[(PARAMS, uniform), (RESULTS, storage(true))]),
            },
            rows: layout(Some("gradclip rows"), &[(0, storage(true))]),
            decide: layout(Some("gradclip decide"), &[(0, storage(true)), (1, storage(false))]),
            threshold: layout(Some("gradclip threshold"), &[(0, storage(false)), (1, storage(false))]),
            running: layout(Some("gradclip running"), &[(0, storage(false))]),
        })?;
        let blank = gpu.storage("gradclip blank", 16, wgpu::BufferUsages::STORAGE)?;
        Ok(Self { shape, layouts, blank, compiled: Mutex::default() })
    }

    /// The layout of group 1 for a kernel.
    fn subject(&self, gpu: &GpuDevice, kernel: Kernel, access: Access) -> wgpu::BindGroupLayout {
        match kernel {
            Kernel::Merge => self.layouts.rows.clone(),
            Kernel::Threshold { .. } => self.layouts.threshold.clone(),
            Kernel::Finalise { .. } => self.layouts.decide.clone(),
            Kernel::Accumulate { .. } => self.layouts.running.clone(),
            _ => {
                let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
                let mut entries = vec![entry(0, storage(true), None)];
                let (bindings, count) = access.bindings();
                entries.extend((1..=bindings).map(|binding| entry(binding, storage(false), count)));
                if matches!(kernel, Kernel::Sum { .. }) {
                    entries.push(entry(bindings + 1, storage(false), None));
                }
                let label = Some("gradclip windows");
                gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries })
            }
        }
    }

    /// The pipeline of a kernel, compiled at its first use.
    pub(super) fn pipeline(
        &self,
        gpu: &GpuDevice,
        kernel: Kernel,
        access: Access,
    ) -> Result<wgpu::ComputePipeline, Error> {
        // A panic elsewhere cannot leave the map half changed.
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = compiled.get(&(kernel, access)) {
            return Ok(pipeline.clone());
        }
        let pipeline = gpu.scoped(|| {
            let source = kernel.source(access, self.shape);
            let module = trusted(
                &gpu.device,
                wgpu::ShaderModuleDescriptor {
                    label: Some(kernel.name()),
                    source: wgpu::ShaderSource::Wgsl(source.into()),
                },
            );
            let subject = self.subject(gpu, kernel, access);
            let groups = [Some(self.layouts.clip.of(kernel)), Some(&subject)];
            let layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(kernel.name()),
                bind_group_layouts: &groups,
                immediate_size: 0,
            });
            gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(kernel.name()),
                layout: Some(&layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Every workgroup variable is written before it is read.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: None,
            })
        })?;
        compiled.insert((kernel, access), pipeline.clone());
        Ok(pipeline)
    }
}

fn entry(binding: u32, ty: wgpu::BufferBindingType, count: Option<NonZeroU32>) -> wgpu::BindGroupLayoutEntry {
    let ty = wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None };
    wgpu::BindGroupLayoutEntry { binding, visibility: wgpu::ShaderStages::COMPUTE, ty, count }
}

/// A module without checks of bounds and without counters in its loops: they cost a fifth of the time of a norm.
#[allow(unsafe_code)]
fn trusted(device: &wgpu::Device, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
    // SAFETY: no kernel reads or writes outside what is bound, and every loop ends. Nothing that indexes or bounds comes
    // from the caller's data, all of it from the tables of a plan, and those are tested without a device
    // (`src/gpu/tables_hold.rs`, by unit tests and fuzzing) against any limits:
    // - A workgroup or invocation beyond the table returns first (`table.tasks`, `arrayLength`, `params.segments`).
    // - Words and quads: every chunk lies in its window (`check_tables` there asserts it), a word or quad of a run in its chunk
    //   (`run_of`), and an edge in its window. Where a block of quads is not whole, indices are limited to the last quad.
    // - Partials: slots, and the rows of the merge tree, are below the number that the plan allocates.
    // - Outcomes, thresholds and coefficients: a segment of the plan or, behind the last element of a run over many
    //   segments, the one after it; the plan allocates one more than there are.
    // - Workgroup memory is indexed by invocation or subgroup, of which there are at most WORKGROUP.
    // - Loops count up to a length of a chunk or row, over the bits of a number, or along `next`, which only ever points
    //   further down a table.
    unsafe {
        device.create_shader_module_trusted(
            descriptor,
            wgpu::ShaderRuntimeChecks { bounds_checks: false, force_loop_bounding: false, ..Default::default() },
        )
    }
}

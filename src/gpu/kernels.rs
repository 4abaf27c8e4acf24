//! The compute pipelines: each kernel of `shaders/`, specialised by constants, compiled once and shared by all plans.

use std::collections::HashMap;
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

/// The files of `shaders/shared`, each after those that it builds on.
mod shared {
    pub(super) const NUMBER: &str = include_str!("../../shaders/shared/number.wgsl");
    pub(super) const PARTIAL: &str = include_str!("../../shaders/shared/partial.wgsl");
    pub(super) const OUTCOME: &str = include_str!("../../shaders/shared/outcome.wgsl");
    pub(super) const HALF: &str = include_str!("../../shaders/shared/half.wgsl");
    pub(super) const CHUNK: &str = include_str!("../../shaders/shared/chunk.wgsl");
    pub(super) const POWER: &str = include_str!("../../shaders/shared/power.wgsl");
    pub(super) const MEASURE: &str = include_str!("../../shaders/shared/measure.wgsl");
    pub(super) const MEASURED: &str = include_str!("../../shaders/shared/measured.wgsl");
    pub(super) const APPLY: &str = include_str!("../../shaders/shared/apply.wgsl");
    pub(super) const APPLY_BLOCK: &str = include_str!("../../shaders/shared/apply_block.wgsl");
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
    pub(super) fn source(self, workgroup: u32) -> String {
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
                (&[OUTCOME, HALF, CHUNK, APPLY, APPLY_BLOCK], include_str!("../../shaders/scale.wgsl"))
            }
            Self::ScaleEach { dtype, columns } => {
                (with.dtype, with.columns) = (dtype, columns);
                (&[OUTCOME, HALF, CHUNK, APPLY, APPLY_BLOCK], include_str!("../../shaders/scale_each.wgsl"))
            }
            Self::Clamp { dtype, guarded, writes } => {
                (with.dtype, with.value, with.guarded, with.writes) = (dtype, true, guarded, writes);
                (&[OUTCOME, HALF, CHUNK, APPLY, APPLY_BLOCK], include_str!("../../shaders/clamp.wgsl"))
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
        let constants = format!(
            "const WORKGROUP: u32 = {workgroup}u;\nconst DTYPE: u32 = {code}u;\nconst PER_WORD: u32 = {per_word}u;\n\
             const NORM: u32 = {norm}u;\nconst NORM_L1: u32 = 0u;\nconst NORM_L2: u32 = 1u;\n\
             const NORM_INF: u32 = 2u;\nconst NORM_P: u32 = 3u;\nconst THRESHOLD: u32 = {formula}u;\n\
             const VALUE: bool = {value};\nconst GUARDED: bool = {guarded};\nconst WRITES: bool = {writes};\n\
             const COLUMNS: bool = {columns};\nconst GIVEN: bool = {given};\nconst MOVES: bool = {moves};\n"
        );
        [&[constants.as_str(), NUMBER, PARTIAL], parts, &[main]].concat().join("\n")
    }
}

/// The pipelines of one device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) workgroup: u32,
    pub(super) layouts: Layouts,
    compiled: Mutex<HashMap<Kernel, wgpu::ComputePipeline>>,
}

/// What the kernels bind. Group 0 belongs to a group of tensors: partials, parameters, results. Group 1 is what one
/// dispatch is about.
#[derive(Debug)]
pub(super) struct Layouts {
    pub(super) clip: ClipGroup<wgpu::BindGroupLayout>,
    /// One table, read: rows of partials to merge.
    pub(super) rows: wgpu::BindGroupLayout,
    /// Gradients, and rows of chunks or edges in them.
    pub(super) window: wgpu::BindGroupLayout,
    /// The same, and sums.
    pub(super) sums: wgpu::BindGroupLayout,
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
    pub(super) fn new(gpu: &GpuDevice, workgroup: u32) -> Result<Self, Error> {
        let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
        let layout = |label, entries: &[(u32, wgpu::BufferBindingType)]| {
            let entries: Vec<_> = entries
                .iter()
                .map(|&(binding, ty)| wgpu::BindGroupLayoutEntry {
                    binding,
                    visibility: wgpu::ShaderStages::COMPUTE,
                    ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
                    count: None,
                })
                .collect();
            gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries })
        };
        let uniform = wgpu::BufferBindingType::Uniform;
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
            window: layout(Some("gradclip window"), &[(0, storage(false)), (1, storage(true))]),
            sums: layout(Some("gradclip sums"), &[(0, storage(false)), (1, storage(true)), (2, storage(false))]),
            decide: layout(Some("gradclip decide"), &[(0, storage(true)), (1, storage(false))]),
            threshold: layout(Some("gradclip threshold"), &[(0, storage(false)), (1, storage(false))]),
            running: layout(Some("gradclip running"), &[(0, storage(false))]),
        })?;
        Ok(Self { workgroup, layouts, compiled: Mutex::default() })
    }

    /// The layout of group 1 for a kernel.
    pub(super) fn subject(&self, kernel: Kernel) -> &wgpu::BindGroupLayout {
        match kernel {
            Kernel::Merge => &self.layouts.rows,
            Kernel::Threshold { .. } => &self.layouts.threshold,
            Kernel::Finalise { .. } => &self.layouts.decide,
            Kernel::Sum { .. } => &self.layouts.sums,
            Kernel::Accumulate { .. } => &self.layouts.running,
            _ => &self.layouts.window,
        }
    }

    /// The pipeline of a kernel, compiled at its first use.
    pub(super) fn pipeline(&self, gpu: &GpuDevice, kernel: Kernel) -> Result<wgpu::ComputePipeline, Error> {
        // A panic elsewhere cannot leave the map half changed.
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = compiled.get(&kernel) {
            return Ok(pipeline.clone());
        }
        let pipeline = gpu.scoped(|| {
            let module = gpu.device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(kernel.name()),
                source: wgpu::ShaderSource::Wgsl(kernel.source(self.workgroup).into()),
            });
            let groups = [Some(self.layouts.clip.of(kernel)), Some(self.subject(kernel))];
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
        compiled.insert(kernel, pipeline.clone());
        Ok(pipeline)
    }
}

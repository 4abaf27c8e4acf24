//! The compute pipelines: each kernel of `shaders/`, specialised by constants, compiled once and shared by all plans.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::device::GpuDevice;
use super::table::dtype_code;
use crate::{Dtype, Error, NormType};

/// A kernel and the constants that it is compiled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    /// `norm.wgsl`
    Norm { dtype: Dtype, norm_type: NormType },
    /// `merge.wgsl`
    Merge,
    /// `finalise.wgsl`; `norm_type` is None for a value clip.
    Finalise { norm_type: Option<NormType> },
    /// `scale.wgsl`
    Scale { dtype: Dtype },
    /// `clamp.wgsl`: `guarded` if an outcome was decided before, `writes` if it does more than look.
    Clamp { dtype: Dtype, guarded: bool, writes: bool },
    /// `edges.wgsl`, after `scale` or `clamp`.
    Edges { value: bool, guarded: bool },
}

const NUMBER: &str = include_str!("../../shaders/shared/number.wgsl");
const PARTIAL: &str = include_str!("../../shaders/shared/partial.wgsl");
const HALF: &str = include_str!("../../shaders/shared/half.wgsl");
const CHUNK: &str = include_str!("../../shaders/shared/chunk.wgsl");
const OUTCOME: &str = include_str!("../../shaders/shared/outcome.wgsl");
const APPLY: &str = include_str!("../../shaders/shared/apply.wgsl");
const APPLY_BLOCK: &str = include_str!("../../shaders/shared/apply_block.wgsl");

impl Kernel {
    fn name(self) -> &'static str {
        match self {
            Self::Norm { .. } => "norm",
            Self::Merge => "merge",
            Self::Finalise { .. } => "finalise",
            Self::Scale { .. } => "scale",
            Self::Clamp { .. } => "clamp",
            Self::Edges { .. } => "edges",
        }
    }

    /// The whole WGSL module.
    pub(super) fn source(self, workgroup: u32) -> String {
        let (mut dtype, mut norm, mut value, mut is_guarded, mut is_writing) = (0, 0, false, true, true);
        let parts: &[&str] = match self {
            Self::Norm { dtype: of, norm_type } => {
                (dtype, norm) = (code(of), norm_code(norm_type));
                &[NUMBER, PARTIAL, HALF, CHUNK, include_str!("../../shaders/norm.wgsl")]
            }
            Self::Merge => &[NUMBER, PARTIAL, include_str!("../../shaders/merge.wgsl")],
            Self::Finalise { norm_type } => {
                (norm, value) = (norm_type.map_or(0, norm_code), norm_type.is_none());
                &[NUMBER, PARTIAL, OUTCOME, include_str!("../../shaders/finalise.wgsl")]
            }
            Self::Scale { dtype: of } => {
                dtype = code(of);
                &[NUMBER, PARTIAL, HALF, CHUNK, OUTCOME, APPLY, APPLY_BLOCK, include_str!("../../shaders/scale.wgsl")]
            }
            Self::Clamp { dtype: of, guarded, writes } => {
                (dtype, value, is_guarded, is_writing) = (code(of), true, guarded, writes);
                &[NUMBER, PARTIAL, HALF, CHUNK, OUTCOME, APPLY, APPLY_BLOCK, include_str!("../../shaders/clamp.wgsl")]
            }
            Self::Edges { value: of, guarded } => {
                (value, is_guarded) = (of, guarded);
                &[NUMBER, PARTIAL, HALF, OUTCOME, APPLY, include_str!("../../shaders/edges.wgsl")]
            }
        };
        let constants = format!(
            "const WORKGROUP: u32 = {workgroup}u;\nconst DTYPE: u32 = {dtype}u;\nconst NORM: u32 = {norm}u;\n\
             const NORM_L1: u32 = 0u;\nconst NORM_L2: u32 = 1u;\nconst NORM_INF: u32 = 2u;\n\
             const VALUE: bool = {value};\nconst GUARDED: bool = {is_guarded};\nconst WRITES: bool = {is_writing};\n"
        );
        constants + &parts.join("\n")
    }
}

fn code(dtype: Dtype) -> u32 {
    // A plan refuses dtypes without kernels before it asks for one.
    dtype_code(dtype).expect("a plan holds dtypes with kernels only")
}

fn norm_code(norm_type: NormType) -> u32 {
    match norm_type {
        NormType::L1 => 0,
        NormType::L2 => 1,
        NormType::Inf => 2,
    }
}

/// The pipelines of one device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) workgroup: u32,
    pub(super) layouts: Layouts,
    compiled: Mutex<HashMap<Kernel, wgpu::ComputePipeline>>,
}

/// What the kernels bind. Group 0 belongs to the clip: partials, parameters, results. Group 1 is what one dispatch is
/// about: a window of gradients and the rows in it, or rows of partials to merge.
#[derive(Debug)]
pub(super) struct Layouts {
    pub(super) clip: ClipGroup<wgpu::BindGroupLayout>,
    /// Gradients and rows.
    pub(super) window: wgpu::BindGroupLayout,
    /// Rows alone.
    pub(super) rows: wgpu::BindGroupLayout,
}

/// Group 0 in its three forms: the layouts of a device, or the groups of a plan.
#[derive(Debug)]
pub(super) struct ClipGroup<T> {
    /// norm, clamp, merge: partials are written, results read.
    pub(super) measure: T,
    /// finalise: results are written.
    pub(super) finalise: T,
    /// scale, edges: no partials, so that nothing stands between the dispatches of one plan.
    pub(super) apply: T,
}

impl<T> ClipGroup<T> {
    /// The form that a kernel takes.
    pub(super) fn of(&self, kernel: Kernel) -> &T {
        match kernel {
            Kernel::Norm { .. } | Kernel::Merge | Kernel::Clamp { .. } => &self.measure,
            Kernel::Finalise { .. } => &self.finalise,
            Kernel::Scale { .. } | Kernel::Edges { .. } => &self.apply,
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
            window: layout(Some("gradclip window"), &[(0, storage(false)), (1, storage(true))]),
            rows: layout(Some("gradclip rows"), &[(0, storage(true))]),
        })?;
        Ok(Self { workgroup, layouts, compiled: Mutex::default() })
    }

    /// The layout of group 1 for a kernel.
    fn row_layout(&self, kernel: Kernel) -> Option<&wgpu::BindGroupLayout> {
        match kernel {
            Kernel::Finalise { .. } => None,
            Kernel::Merge => Some(&self.layouts.rows),
            _ => Some(&self.layouts.window),
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
            let groups = [Some(self.layouts.clip.of(kernel)), self.row_layout(kernel)];
            let layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(kernel.name()),
                bind_group_layouts: if groups[1].is_some() { &groups } else { &groups[..1] },
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

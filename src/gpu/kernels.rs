//! The compute pipelines: each kernel of `shaders/`, specialised by constants, compiled once and shared by all plans.
//!
//! A shader file lists its imports at its top: `#import name` puts `shaders/shared/name.wgsl` before it, once. Three
//! names stand for one of several files, by the device and the plan: `windows` (`word_quads`, `quads` or
//! `window_array`), `merging` (`tree` or `subgroup`) and `losses` (`counted_losses` or `no_losses`). `constants` makes the
//! variants of a kernel.
//!
//! Browsers refuse some WGSL that naga accepts: a NaN among constants, and barriers and subgroup operations in control
//! flow that is not provably the same for a whole workgroup. So no struct holds a workgroup's number beside an
//! invocation's own values (`shared/group.wgsl`). `scripts/kernels.sh` gives every variant to Chrome's compiler, but
//! those with arrays of buffers, which only native platforms have.
//!
//! On devices with arrays of buffers a dispatch binds up to 1,024 windows, so 2,000 tensors in as many buffers are two
//! dispatches of each kernel; SwiftShader takes 50 ms for 2,000 buffers and 46 for one. Elsewhere each window is a
//! dispatch, which costs 65 µs on llvmpipe, with or without a barrier after it. So all dispatches share one buffer of
//! partials.
//!
//! A pipeline takes a compiler 0.1 to 3 s on some platforms, so those of a plan are compiled side by side, and a cache
//! that the driver keeps can be saved ([`GpuClipper::pipeline_cache`](super::GpuClipper::pipeline_cache)). On lavapipe that
//! cache is empty, but Mesa keeps compiled shaders by itself: a first plan takes 3.3 s in a first process and 1.0 in a
//! second one (medians of 4 on two busy cores).

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
#[cfg(not(target_arch = "wasm32"))]
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::device::GpuDevice;
use super::table::dtype_code;
use super::threshold::Formula;
use crate::{Algorithm, Dtype, Error, Halves, NormType, Optimizer};

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
    /// `finalise.wgsl`; `norm` is None for a value clip. `given` if norms are given, not measured.
    Finalise { norm: Option<Norm>, given: bool },
    /// `scale.wgsl`; `counts` if it counts what rounding loses, here and below.
    Scale { dtype: Dtype, counts: bool },
    /// `scale_each.wgsl`
    ScaleEach { dtype: Dtype, columns: bool, counts: bool },
    /// `clamp.wgsl`: `guarded` if an outcome was decided before, `writes` if it does more than look.
    Clamp { dtype: Dtype, guarded: bool, writes: bool, counts: bool },
    /// `edges.wgsl`, after a kernel that scales or clamps.
    Edges { value: bool, guarded: bool },
    /// `sum.wgsl`
    Sum { dtype: Dtype },
    /// `accumulate.wgsl`
    Accumulate { moves: bool },
    /// `numbers.wgsl`
    Numbers,
    /// `step.wgsl`
    Step(StepKernel),
}

/// The constants of `step.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepKernel {
    pub(super) gradient: Dtype,
    pub(super) parameter: Dtype,
    pub(super) update: Update,
    /// Whether the clip is one by value.
    pub(super) value: bool,
    /// Whether elements of a row belong to several segments.
    pub(super) each: bool,
}

/// What an optimizer does with parameters of a dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Update {
    /// Adam for AdamW.
    pub(super) algorithm: Algorithm,
    /// Whether there is a buffer of momentum.
    pub(super) buffered: bool,
    /// Whether there is a third average.
    pub(super) third: bool,
    /// What is kept of the parameters.
    pub(super) halves: Halves,
}

impl Update {
    /// Of an optimizer and parameters of a dtype.
    pub(super) fn of(optimizer: &Optimizer, parameter: Dtype) -> Self {
        let adamw = optimizer.algorithm == Algorithm::AdamW;
        let has = |name| optimizer.state_tensors(parameter).iter().any(|tensor| tensor.name == name);
        Self {
            algorithm: if adamw { Algorithm::Adam } else { optimizer.algorithm },
            buffered: has("momentum_buffer"),
            third: optimizer.centered || optimizer.amsgrad,
            halves: match () {
                () if has("remainder") => Halves::Remainder,
                () if has("master") => Halves::Master,
                () => Halves::Rounded,
            },
        }
    }
}

/// The code of an algorithm in `shaders/shared/settings.wgsl`.
pub(super) fn algorithm_code(algorithm: Algorithm) -> u32 {
    match algorithm {
        Algorithm::Sgd => 0,
        Algorithm::Adagrad => 1,
        Algorithm::RmsProp => 2,
        Algorithm::Adam | Algorithm::AdamW => 3,
    }
}

/// The norm that a kernel measures. Twin of the constants `NORM_*`.
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
    /// Whether each invocation reads a contiguous stretch; otherwise neighbours read neighbouring quads.
    pub(super) contiguous: bool,
    /// The smallest subgroup that the device makes, if partials merge by subgroup operations.
    pub(super) subgroups: Option<u32>,
    /// Whether the device multiplies elements, and converts float16, by itself.
    pub(super) native_products: bool,
    pub(super) native_halves: bool,
}

impl Shape {
    /// One invocation, and nothing that is not there on every device.
    pub(super) const PLAIN: Self =
        Self { workgroup: 1, contiguous: true, subgroups: None, native_products: false, native_halves: false };

    /// The most subgroups in a workgroup.
    fn most_subgroups(self) -> u32 {
        self.subgroups.map_or(1, |smallest| self.workgroup.div_ceil(smallest.max(1)))
    }

    /// The partials that a workgroup keeps in its memory.
    pub(super) fn kept_partials(self) -> u32 {
        if self.subgroups.is_some() { self.most_subgroups() } else { self.workgroup }
    }
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
    /// An array of this many windows, as words and as quads.
    Array(u32),
}

impl Access {
    /// The number of bindings and, if they are arrays, the length of each.
    fn bindings(self) -> (u32, Option<NonZeroU32>) {
        match self {
            Self::None => (0, None),
            Self::Words => (1, None),
            Self::Quads => (2, None),
            Self::Array(count) => (2, NonZeroU32::new(count)),
        }
    }
}

/// The values in `shaders/shared/constants.wgsl` and `step_constants.wgsl` that make variants of kernels. Each kernel uses
/// some.
pub(super) struct Constants {
    dtype: Dtype,
    norm: Norm,
    formula: Formula,
    value: bool,
    guarded: bool,
    writes: bool,
    columns: bool,
    counts: bool,
    given: bool,
    moves: bool,
    gradient: Dtype,
    parameter: Dtype,
    update: Update,
    each: bool,
}

impl Default for Constants {
    fn default() -> Self {
        Self {
            dtype: Dtype::F32,
            norm: Norm::Inf,
            formula: Formula::Agc,
            value: false,
            guarded: true,
            writes: true,
            columns: false,
            counts: false,
            given: false,
            moves: false,
            gradient: Dtype::F32,
            parameter: Dtype::F32,
            update: Update { algorithm: Algorithm::Sgd, buffered: false, third: false, halves: Halves::Rounded },
            each: false,
        }
    }
}

impl Constants {
    pub(super) fn of(dtype: Dtype) -> Self {
        Self { dtype, ..Self::default() }
    }

    fn source(&self, access: Access, shape: Shape) -> String {
        format!(
            include_str!("../../shaders/shared/constants.wgsl"),
            workgroup = shape.workgroup,
            contiguous = shape.contiguous,
            subgroups = shape.most_subgroups(),
            native_products = shape.native_products,
            native_halves = shape.native_halves,
            windows = access.bindings().1.map_or(1, NonZeroU32::get),
            dtype = code(self.dtype),
            norm = self.norm as u32,
            threshold = self.formula as u32,
            value = self.value,
            guarded = self.guarded,
            writes = self.writes,
            columns = self.columns,
            counts = self.counts,
            losses = access.bindings().0 + 1,
            given = self.given,
            moves = self.moves,
        )
    }

    fn step_source(&self) -> String {
        format!(
            include_str!("../../shaders/shared/step_constants.wgsl"),
            gradient = code(self.gradient),
            parameter = code(self.parameter),
            halves = self.update.halves as u32,
            algorithm = algorithm_code(self.update.algorithm),
            buffered = self.update.buffered,
            third = self.update.third,
            each = self.each,
        )
    }
}

/// A plan refuses dtypes without kernels before it asks for one.
fn code(dtype: Dtype) -> u32 {
    dtype_code(dtype).expect("a plan holds dtypes with kernels only")
}

/// Files by their names.
macro_rules! files {
    ($folder:literal: $($name:literal)*) => { &[$(($name, include_str!(concat!($folder, $name, ".wgsl")))),*] };
}

const KERNELS: &[(&str, &str)] = files!("../../shaders/":
    "accumulate" "clamp" "copy" "edges" "finalise" "merge" "norm" "norm_each" "numbers" "probe" "read" "scale" "scale_each" "step"
    "sum" "threshold");

pub(super) const SHARED: &[(&str, &str)] = files!("../../shaders/shared/":
    "apply" "apply_chunk" "chunk" "clamp_words" "counted_losses" "group" "half" "look" "measure" "measured" "no_losses" "number"
    "outcome" "pair" "partial" "power" "quads" "quick" "settings" "share" "subgroup" "take_words" "tree" "update" "window_array" "word_quads" "words");

/// The WGSL of a kernel: its file behind all that it imports, each file once.
struct Module<'a> {
    constants: [(&'a str, &'a str); 2],
    windows: &'a str,
    merging: &'a str,
    losses: &'a str,
    added: Vec<&'a str>,
    text: String,
}

impl<'a> Module<'a> {
    fn add(&mut self, name: &'a str) {
        let name = match name {
            "windows" => self.windows,
            "merging" => self.merging,
            "losses" => self.losses,
            name => name,
        };
        if self.added.contains(&name) {
            return;
        }
        self.added.push(name);
        let known = [KERNELS, SHARED, &self.constants].concat();
        let (_, file) = known.iter().find(|(known, _)| *known == name).expect("a file of that name is in a list above");
        for line in file.lines() {
            match line.strip_prefix("#import ") {
                Some(import) => self.add(import),
                None => self.text.extend([line, "\n"]),
            }
        }
    }
}

/// The whole WGSL module of a file of `shaders/`.
pub(super) fn module(name: &str, constants: &Constants, access: Access, shape: Shape) -> String {
    let (windows, directive) = match access {
        Access::None | Access::Words => ("word_quads", ""),
        Access::Quads => ("quads", ""),
        Access::Array(_) => ("window_array", "enable wgpu_binding_array;\n"),
    };
    let merging = if shape.subgroups.is_some() { "subgroup" } else { "tree" };
    let losses = if constants.counts { "counted_losses" } else { "no_losses" };
    let (of_all, of_step) = (constants.source(access, shape), constants.step_source());
    let constants = [("constants", &of_all[..]), ("step_constants", &of_step[..])];
    let mut module = Module { constants, windows, merging, losses, added: Vec::new(), text: directive.into() };
    module.add(name);
    module.text
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
            Self::Numbers => "numbers",
            Self::Step(_) => "step",
        }
    }

    /// Whether it counts what rounding loses.
    pub(super) fn counts(self) -> bool {
        matches!(
            self,
            Self::Scale { counts: true, .. } | Self::ScaleEach { counts: true, .. } | Self::Clamp { counts: true, .. }
        )
    }

    /// The whole WGSL module.
    pub(super) fn source(self, access: Access, shape: Shape) -> String {
        let mut with = Constants::default();
        match self {
            Self::Norm { dtype, norm } | Self::NormEach { dtype, norm } => (with.dtype, with.norm) = (dtype, norm),
            Self::Merge | Self::Numbers => {}
            Self::Threshold { formula, norm } => (with.formula, with.norm) = (formula, norm),
            Self::Finalise { norm, given } => {
                (with.norm, with.value, with.given) = (norm.unwrap_or(Norm::Inf), norm.is_none(), given);
            }
            Self::Scale { dtype, counts } => (with.dtype, with.counts) = (dtype, counts),
            Self::Sum { dtype } => with.dtype = dtype,
            Self::ScaleEach { dtype, columns, counts } => {
                (with.dtype, with.columns, with.counts) = (dtype, columns, counts);
            }
            Self::Clamp { dtype, guarded, writes, counts } => {
                (with.dtype, with.counts) = (dtype, counts);
                (with.value, with.guarded, with.writes) = (true, guarded, writes);
            }
            Self::Edges { value, guarded } => (with.value, with.guarded) = (value, guarded),
            Self::Accumulate { moves } => with.moves = moves,
            Self::Step(StepKernel { gradient, parameter, update, value, each }) => {
                (with.gradient, with.parameter, with.update) = (gradient, parameter, update);
                (with.value, with.each) = (value, each);
            }
        }
        module(self.name(), &with, access, shape)
    }
}

#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) shape: Shape,
    pub(super) layouts: Layouts,
    /// Bound as quads if a window is shorter than one.
    pub(super) blank: wgpu::Buffer,
    compiled: Mutex<HashMap<(Kernel, Access), wgpu::ComputePipeline>>,
}

/// The layouts of what kernels bind. Bind group 0 belongs to a group of tensors: partials, parameters, results. Bind
/// group 1 belongs to one dispatch: a table and windows for kernels on gradients, else one of the layouts below.
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
    /// Settings, read, numbers, and the count of steps.
    pub(super) numbers: wgpu::BindGroupLayout,
}

/// Group 0 in its three forms: the layouts of a device, or the groups of a plan.
#[derive(Debug)]
pub(super) struct ClipGroup<T> {
    /// For kernels that measure and merge: they write partials and read results.
    pub(super) measure: T,
    /// For threshold and finalise: they write results.
    pub(super) finalise: T,
    /// For kernels that scale: without partials, so that nothing stands between the dispatches of one plan.
    pub(super) apply: T,
}

impl<T> ClipGroup<T> {
    /// The form that a kernel takes.
    pub(super) fn of(&self, kernel: Kernel) -> &T {
        match kernel {
            Kernel::Norm { .. }
            | Kernel::NormEach { .. }
            | Kernel::Merge
            | Kernel::Clamp { .. }
            | Kernel::Accumulate { .. } => &self.measure,
            Kernel::Threshold { .. } | Kernel::Finalise { .. } => &self.finalise,
            Kernel::Scale { .. }
            | Kernel::ScaleEach { .. }
            | Kernel::Edges { .. }
            | Kernel::Sum { .. }
            | Kernel::Numbers
            | Kernel::Step(_) => &self.apply,
        }
    }
}

/// Bindings of bind group 0.
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
            numbers: layout(Some("gradclip numbers"), &[(0, storage(true)), (1, storage(false)), (2, storage(false))]),
        })?;
        let blank = gpu.storage("gradclip blank", 16, wgpu::BufferUsages::STORAGE)?;
        Ok(Self { shape, layouts, blank, compiled: Mutex::default() })
    }

    /// The layout of bind group 1 for a kernel.
    fn own_layout(&self, gpu: &GpuDevice, kernel: Kernel, access: Access) -> wgpu::BindGroupLayout {
        match kernel {
            Kernel::Merge => self.layouts.rows.clone(),
            Kernel::Threshold { .. } => self.layouts.threshold.clone(),
            Kernel::Finalise { .. } => self.layouts.decide.clone(),
            Kernel::Accumulate { .. } => self.layouts.running.clone(),
            Kernel::Numbers => self.layouts.numbers.clone(),
            _ => {
                let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
                let mut entries = vec![entry(0, storage(true), None)];
                if matches!(kernel, Kernel::Step(_)) {
                    // Gradients, parameters and state; settings and numbers.
                    entries.extend((1..4).map(|binding| entry(binding, storage(false), None)));
                    entries.extend((4..6).map(|binding| entry(binding, wgpu::BufferBindingType::Uniform, None)));
                }
                let (bindings, count) = access.bindings();
                entries.extend((1..=bindings).map(|binding| entry(binding, storage(false), count)));
                // The sums, or the losses.
                if matches!(kernel, Kernel::Sum { .. }) || kernel.counts() {
                    entries.push(entry(bindings + 1, storage(false), None));
                }
                let label = Some("gradclip windows");
                gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries })
            }
        }
    }

    /// Compiles those of these kernels that are not compiled yet, side by side.
    pub(super) fn compile(&self, gpu: &GpuDevice, wanted: &HashSet<(Kernel, Access)>) -> Result<(), Error> {
        let missing: Vec<_> = wanted.iter().filter(|of| !self.compiled().contains_key(of)).copied().collect();
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), Error> {
            while let Some(&(kernel, access)) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.pipeline(gpu, kernel, access)?;
            }
            Ok(())
        };
        // On OpenGL, threads wait for one context: wgpu panics if one waits for long. Browsers have no threads here, and
        // compile in the background.
        #[cfg(not(target_arch = "wasm32"))]
        if missing.len() > 1 && gpu.device.adapter_info().backend != wgpu::Backend::Gl {
            let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
            let others = threads.min(missing.len()) - 1;
            return std::thread::scope(|scope| {
                // Without another thread this one does all.
                let start = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
                let started: Vec<_> = (0..others).map_while(start).collect();
                let own = work();
                // A panic in wgpu goes on here.
                let ended = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
                };
                started.into_iter().map(ended).fold(own, Result::and)
            });
        }
        work()
    }

    fn compiled(&self) -> MutexGuard<'_, HashMap<(Kernel, Access), wgpu::ComputePipeline>> {
        // A panic elsewhere cannot leave the map half changed.
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pipeline of a kernel, compiled at its first use.
    pub(super) fn pipeline(
        &self,
        gpu: &GpuDevice,
        kernel: Kernel,
        access: Access,
    ) -> Result<wgpu::ComputePipeline, Error> {
        if let Some(pipeline) = self.compiled().get(&(kernel, access)) {
            // A browser tells later whether it took a kernel. It tells each plan, because an invalid pipeline has no
            // layout.
            if cfg!(target_arch = "wasm32") {
                gpu.scoped(|| pipeline.get_bind_group_layout(0))?;
            }
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
            let own = self.own_layout(gpu, kernel, access);
            let groups = [Some(self.layouts.clip.of(kernel)), Some(&own)];
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
                cache: gpu.pipelines.as_ref(),
            })
        })?;
        self.compiled().insert((kernel, access), pipeline.clone());
        Ok(pipeline)
    }
}

fn entry(binding: u32, ty: wgpu::BufferBindingType, count: Option<NonZeroU32>) -> wgpu::BindGroupLayoutEntry {
    let ty = wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None };
    wgpu::BindGroupLayoutEntry { binding, visibility: wgpu::ShaderStages::COMPUTE, ty, count }
}

/// A module without bounds checks and without loop counters: they cost a fifth of the time of a norm.
#[allow(unsafe_code)]
fn trusted(device: &wgpu::Device, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
    // SAFETY: no kernel reads or writes outside what is bound, and every loop ends. All indices and bounds come from
    // the tables of a plan, none from the caller's data. Tests without a device check those tables against any limits
    // (`src/gpu/tests/tables_hold.rs`, by unit tests and fuzzing):
    // - A workgroup or invocation beyond the table returns first (`table.tasks`, `arrayLength`, `params.segments`).
    // - Words and quads: every chunk lies in its window (`check_tables` there asserts it), a word or quad of a run in
    //   its chunk (`run_of`), and an edge in its window. Where a block of quads is not whole, indices are limited to
    //   the last quad.
    // - Partials: slots, and the rows of the merge tree, are below the number that the plan allocates.
    // - Outcomes, thresholds and coefficients: the index is a segment of the plan or, behind the last element of a run
    //   over many segments, the one after it; the plan allocates one more than there are.
    // - Workgroup memory is indexed by invocation, of which there are WORKGROUP, or by a subgroup's number, which is limited
    //   to SUBGROUPS.
    // - Of a step, gradients, parameters and state: every row lies in its windows and in its block of state
    //   (`check_steps` there), and elements outside stand for the nearest inside. Settings and numbers: as many as groups.
    // - Loops count up to a length of a chunk or row, over the bits of a number, or along `next`, which only ever
    //   points further down a table.
    unsafe {
        device.create_shader_module_trusted(
            descriptor,
            wgpu::ShaderRuntimeChecks { bounds_checks: false, force_loop_bounding: false, ..Default::default() },
        )
    }
}

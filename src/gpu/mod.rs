//! The GPU path: gradients in wgpu buffers, clipped where they lie.
//!
//! ```text
//! for each window of each buffer: norm       partials of chunks         shaders/norm.wgsl, norm_each.wgsl
//! merge                                      partials, in list order    shaders/merge.wgsl
//! threshold, where it has to be computed     what norms may be          shaders/threshold.wgsl
//! finalise                                   norm, coefficient, counts  shaders/finalise.wgsl
//! for each window: scale or clamp, edges     in place                   shaders/scale.wgsl, scale_each.wgsl, clamp.wgsl,
//!                                                                       edges.wgsl
//! ```
//!
//! All of it is one compute pass without a wait. A value clip of which no element decides about another needs no norm:
//! `clamp` comes first and tells what it met.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, wgpu};
//!
//! let gpu = GpuClipper::open().wait()?; // or GpuClipper::new(&device, &queue)? on your own device
//! let (device, queue) = (gpu.device(), gpu.queue());
//! # use wgpu::util::DeviceExt;
//! # let usage = wgpu::BufferUsages::STORAGE;
//! # let contents = bytemuck::cast_slice(&[3.0f32, 4.0, 7.0]);
//! # let buffer = device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents, usage });
//! // Once: what is clipped, and where it lies. Ranges are in elements; the buffer needs BufferUsages::STORAGE.
//! let plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&buffer, 0..2)?.named("w")])?;
//! // Each step: recorded behind whatever made the gradients.
//! let mut encoder = device.create_command_encoder(&Default::default());
//! plan.encode(&mut encoder)?;
//! queue.submit([encoder.finish()]);
//! // If wanted:
//! let report = plan.report().wait()?;
//! assert!((report.total_norm - 5.0).abs() < 1e-5 && report.clipped);
//! # Ok(())
//! # }
//! ```

mod build;
mod device;
#[cfg(test)]
mod every_language;
mod host;
mod kernels;
mod merge;
mod number;
mod options;
mod plan;
mod profile;
mod readback;
mod running;
mod table;
#[cfg(any(test, fuzzing))]
pub(crate) mod tables_hold;
mod tensor;
mod threshold;
pub mod tuning;

use std::collections::HashMap;
use std::sync::Arc;

use build::{Follows, GroupParts, Job, PARTIAL_BYTES, Parts, RunningMemory};
use device::{ARRAYS_OF_BUFFERS, GpuDevice};
use kernels::{Access, Kernels, Shape};
use table::Piece;
use tuning::{Tuning, memory_budget};

use crate::error::tensor_label;
use crate::examples::check_sums;
use crate::segment::{By, Layout, Segments, check_groups, check_parameter};
use crate::{Clip, Dtype, Error, Waiting};

pub use device::adapters;
pub use options::PlanOptions;
pub use plan::GpuPlan;
pub use profile::{Clock, Pass, Profile, Speed, Speeds};
pub use running::{GpuAccumulatorPlan, GpuNormAccumulator};
pub use tensor::GpuTensor;
pub use threshold::DeviceThreshold;

/// Everything public may be sent to and used from any thread.
#[cfg(not(target_arch = "wasm32"))]
const _: () = {
    const fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<GpuClipper>();
    send_and_sync::<GpuPlan>();
    send_and_sync::<GpuTensor>();
    send_and_sync::<Error>();
};

/// Clips on one device. Cheap to clone: clones share the compiled kernels.
#[derive(Clone, Debug)]
pub struct GpuClipper {
    device: GpuDevice,
    kernels: Arc<Kernels>,
    tuning: Tuning,
    /// How many windows a dispatch can bind: more than one only in an array.
    windows: u32,
    /// Whether a window can be bound as words and as quads.
    quads: bool,
    /// How much device memory host tensors may take, in bytes.
    memory_budget: u64,
}

impl GpuClipper {
    /// Clips on the caller's device. Any limits and features will do from wgpu's downlevel defaults on.
    ///
    /// # Errors
    /// [`Error::Limit`] if the device cannot run compute shaders of 8 invocations with four storage buffers.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self, Error> {
        Self::on(GpuDevice::new(device, queue))
    }

    /// Opens a device of its own on the adapter with the highest performance, with all its limits.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none; [`Error::Device`] if it gives no device.
    pub fn open() -> Waiting<'static, Result<Self, Error>> {
        Waiting::new(async { Self::on(GpuDevice::open(&device::adapter(None).await?).await?) })
    }

    /// Opens a device on the first adapter whose name contains `name`, in any case of letters.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none, with the names there are; [`Error::Device`] if it gives no device.
    pub fn open_named(name: &str) -> Waiting<'_, Result<Self, Error>> {
        Waiting::new(async move { Self::on(GpuDevice::open(&device::adapter(Some(name)).await?).await?) })
    }

    fn on(device: GpuDevice) -> Result<Self, Error> {
        let tuning = Tuning::of(&device.device.adapter_info());
        Self::tuned(device, tuning)
    }

    /// Clips on the same device with other figures than [`Tuning::of`] has for it, which another table or a measurement
    /// says are better there. Compiles kernels of its own. Norms may differ in their last bits.
    ///
    /// What the device cannot do is left out: subgroups, arrays of bindings, more invocations than it allows.
    ///
    /// # Errors
    /// [`Error::Usage`] if a workgroup is not a power of two from 8 on, or chunks are too short or too long.
    pub fn with_tuning(&self, tuning: Tuning) -> Result<Self, Error> {
        tuning.check()?;
        Ok(Self { memory_budget: self.memory_budget, ..Self::tuned(self.device.clone(), tuning)? })
    }

    fn tuned(device: GpuDevice, mut tuning: Tuning) -> Result<Self, Error> {
        let (limits, features) = (device.device.limits(), device.device.features());
        let need = |limit, have: u64, need: u64| {
            let reason = || format!("the device's limit {limit} is {have}; gradclip needs at least {need}");
            if have < need { Err(Error::Limit(reason())) } else { Ok(()) }
        };
        let invocations = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
        need("max_compute_invocations_per_workgroup", invocations.into(), tuning::SMALLEST_WORKGROUP.into())?;
        need("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage.into(), 4)?;
        need("max_storage_buffer_binding_size", limits.max_storage_buffer_binding_size, 1 << 16)?;
        tuning.narrow(invocations);
        // What a workgroup merges, 32 bytes each, lies in its memory.
        let tree = u64::from(tuning.workgroup) * PARTIAL_BYTES;
        need("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into(), tree)?;
        tuning.subgroups &= features.contains(wgpu::Features::SUBGROUP);
        // Partials, results and a table are bound beside them.
        let bindings = limits.max_storage_buffers_per_shader_stage - 3;
        let windows = if features.contains(ARRAYS_OF_BUFFERS) {
            // Words and quads are an array each, whose length is a power of two.
            let fitting = (limits.max_binding_array_elements_per_shader_stage / 2).min(tuning.windows);
            if fitting > 1 { 1 << fitting.ilog2() } else { 1 }
        } else {
            1
        };
        let quads = bindings >= 2 && !cfg!(target_arch = "wasm32");
        let Tuning { workgroup, contiguous, subgroups, .. } = tuning;
        let kernels = Arc::new(Kernels::new(&device, Shape { workgroup, contiguous, subgroups })?);
        let memory_budget = memory_budget(device.device.adapter_info().device_type);
        Ok(Self { device, kernels, tuning, windows, quads, memory_budget })
    }

    /// Sets how much device memory host tensors may take at a time, in bytes: tensors that are larger together pass through
    /// that much, and those that are to be written and are no longer there pass twice. Tensors in GPU memory and plans do
    /// not count, nor do sums of examples, nor the staging buffers of either direction, 32 MiB each at most.
    ///
    /// Unless it is set, all of it is kept on the device if there is memory, and as much as there is memory for if not: wgpu
    /// does not tell how much there is before it runs out. A software device, whose memory is the host's, keeps 32 MiB
    /// at a time. The result has the same bits for every budget of 16 MiB and more;
    /// below, the norm may differ in its last bits. Less than 64 KiB counts as 64 KiB.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use gradclip::{Clip, Clipper, TensorMut, gpu::GpuClipper};
    /// let clipper = Clipper::gpu(GpuClipper::open().wait()?.with_memory_budget(1 << 30));
    /// # let mut offloaded = [3.0f32, 4.0];
    /// let report = clipper.apply(&Clip::norm(1.0), &mut [TensorMut::new(&mut offloaded)])?;
    /// # assert!(report.clipped);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_memory_budget(mut self, bytes: u64) -> Self {
        self.memory_budget = bytes;
        self
    }

    /// The device that this clips on.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.device.device
    }

    /// The queue that host tensors and reports are submitted to.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.device.queue
    }

    /// What the device runs on.
    #[must_use]
    pub fn adapter_info(&self) -> wgpu::AdapterInfo {
        self.device.device.adapter_info()
    }

    /// Plans a clip of tensors in GPU memory: [`GpuClipper::plan_with`] for one group, without options.
    ///
    /// # Errors
    /// Those of [`GpuClipper::plan_with`].
    pub fn plan(&self, clip: &Clip, tensors: &[GpuTensor]) -> Result<GpuPlan, Error> {
        self.plan_with(&[(*clip, tensors)], PlanOptions::default())
    }

    /// Plans a clip of groups of tensors, each by a clip of its own, in one compute pass. [`GpuPlan::reports`] are theirs,
    /// in order. Compiles the kernels it needs, if no earlier plan has.
    ///
    /// The clips must agree on `grad_scale` and on the policy for non-finite gradients, which holds for all groups
    /// together.
    ///
    /// The buffers must be of this device. One of another device is an error, but one of another `wgpu::Instance` wgpu
    /// itself cannot tell apart: it panics, or takes another buffer for it.
    ///
    /// # Errors
    /// [`Error::Setting`] for a clip that cannot be; [`Error::Usage`] if the clips disagree, there is no group, or the options
    /// do not fit each other, the clip or the tensors; [`Error::Tensor`] if a tensor does not fit the scope, its parameter or its sum, or two
    /// tensors share elements; [`Error::ThresholdState`] if the threshold is that of other tensors or another scope;
    /// [`Error::Limit`], [`Error::OutOfMemory`] or [`Error::Device`] if the device cannot hold or bind what the plan
    /// needs. The tensors are not touched.
    pub fn plan_with(&self, groups: &[(Clip, &[GpuTensor])], options: PlanOptions) -> Result<GpuPlan, Error> {
        check_groups(groups.iter().map(|(clip, _)| clip))?;
        let [(clip, tensors), ..] = groups else {
            return Err(Error::usage("a plan needs a group of tensors, be it an empty one"));
        };
        let recipe = options.recipe(groups.len())?;
        match &recipe {
            Recipe::Scale(norms) => {
                clip.check_adaptive()?;
                if norms.spec.dtype != Dtype::F32 {
                    return Err(Error::usage("norms from outside must be float32"));
                }
            }
            Recipe::Sum(sums) => {
                check_sums(clip, tensors.iter().map(GpuTensor::spec), sums.iter().map(GpuTensor::spec))?;
            }
            _ => {}
        }
        self.make(recipe, groups, options.threshold.map_or(Follows::Clip, Follows::Device))
    }

    /// How kernels reach so many windows.
    fn access(&self, windows: usize) -> Access {
        match (windows, self.quads) {
            (1, true) => Access::Quads,
            (1, false) => Access::Words,
            (count, _) => Access::Array(count.next_power_of_two() as u32),
        }
    }

    fn make(&self, recipe: Recipe, groups: &[(Clip, &[GpuTensor])], follows: Follows) -> Result<GpuPlan, Error> {
        let parts = recipe.parts(groups, follows)?;
        GpuPlan::new(self, parts, Some(recipe))
    }
}

/// What a plan makes of tensors, whichever they are.
#[derive(Clone, Debug)]
enum Recipe {
    Clip,
    Measure,
    /// Scales by these norms.
    Scale(GpuTensor),
    /// Adds up clipped examples to these.
    Sum(Vec<GpuTensor>),
    Running(RunningMemory),
}

impl Recipe {
    fn parts(&self, groups: &[(Clip, &[GpuTensor])], follows: Follows) -> Result<Parts, Error> {
        let mut gathered = Gathered::default();
        for (clip, tensors) in groups {
            gathered.add(clip, tensors)?;
        }
        let job = match self {
            Self::Clip => Job::Clip,
            Self::Measure => Job::Measure,
            Self::Scale(norms) => {
                let expected = u64::from(gathered.groups[0].segments.count);
                if norms.spec.len != expected {
                    return Err(Error::usage(format!("norms by segment: {} given, {expected} needed", norms.spec.len)));
                }
                let layout = Layout { by: By::Rows, columns: 1, segment: 0 };
                let tensor = gathered.groups[0].pieces.len();
                Job::Scale(Piece { tensor, ..gathered.piece(norms, layout) })
            }
            Self::Sum(sums) => {
                let mut pairs = Vec::new();
                for (i, sum) in sums.iter().enumerate() {
                    let of = gathered.groups[0].pieces[i];
                    let into = Piece { tensor: i, ..gathered.piece(sum, of.layout) };
                    gathered.written.push((into, tensor_label(sum.spec.name.as_deref(), i)));
                    pairs.push((of, into));
                }
                Job::Sum(pairs)
            }
            Self::Running(memory) => Job::Running(memory.clone()),
        };
        if !matches!(self, Self::Measure) {
            gathered.check_overlaps()?;
        }
        let Gathered { buffers, groups, .. } = gathered;
        Ok(Parts { buffers, groups, job, follows, in_turn: false })
    }
}

/// The tensors of a plan, with each buffer once.
#[derive(Default)]
struct Gathered {
    places: HashMap<wgpu::Buffer, usize>,
    buffers: Vec<wgpu::Buffer>,
    groups: Vec<GroupParts>,
    /// What is written, or stands where sums are read from, and how errors call it.
    written: Vec<(Piece, String)>,
}

impl Gathered {
    fn piece(&mut self, t: &GpuTensor, layout: Layout) -> Piece {
        let buffers = &mut self.buffers;
        let buffer = *self.places.entry(t.buffer.clone()).or_insert_with(|| {
            buffers.push(t.buffer.clone());
            buffers.len() - 1
        });
        Piece { buffer, dtype: t.spec.dtype, start: t.start, len: t.spec.len, tensor: 0, first_element: 0, layout }
    }

    /// Adds a group.
    fn add(&mut self, clip: &Clip, tensors: &[GpuTensor]) -> Result<(), Error> {
        let specs: Vec<_> = tensors.iter().map(GpuTensor::spec).collect();
        let segments = Segments::new(clip, &specs)?;
        let (mut pieces, mut parameters) = (Vec::new(), Vec::new());
        for (tensor, (t, layout)) in tensors.iter().zip(&segments.layouts).enumerate() {
            if clip.needs_parameters() {
                let parameter = t.parameter.as_deref();
                check_parameter(tensor, t.spec(), parameter.map(GpuTensor::spec))?;
                parameters.extend(parameter.map(|p| Piece { tensor, ..self.piece(p, *layout) }));
            }
            let piece = Piece { tensor, ..self.piece(t, *layout) };
            self.written.push((piece, tensor_label(t.spec().name, tensor)));
            pieces.push(piece);
        }
        let names = tensors.iter().map(|t| t.spec.name.clone()).collect();
        let counted = tensors.iter().map(|t| t.spec.counted).collect();
        self.groups.push(GroupParts { clip: *clip, segments, names, counted, pieces, parameters });
        Ok(())
    }

    /// That nothing is written twice.
    fn check_overlaps(&self) -> Result<(), Error> {
        let mut by_address: Vec<_> = self.written.iter().filter(|(p, _)| p.len > 0).collect();
        by_address.sort_by_key(|(p, _)| (p.buffer, p.bytes().start));
        for pair in by_address.windows(2) {
            let [(a, first), (b, second)] = pair else { continue };
            if a.buffer == b.buffer && b.bytes().start < a.bytes().end {
                let reason =
                    format!("overlaps {second} in the same buffer; each element may belong to one tensor only");
                return Err(Error::Tensor { tensor: first.clone(), reason });
            }
        }
        Ok(())
    }
}

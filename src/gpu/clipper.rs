//! [`GpuClipper`]: one device, its compiled kernels and its tuning.

use std::sync::Arc;

use super::device::{self, ARRAYS_OF_BUFFERS, GpuDevice};
use super::kernels::{Access, Kernels, Shape};
use super::readback::PARTIAL_BYTES;
use super::tuning::{self, Tuning, memory_budget};
use crate::{Error, Waiting};

/// Clips on one device. Cheap to clone: clones share the compiled kernels.
#[derive(Clone, Debug)]
pub struct GpuClipper {
    pub(super) device: GpuDevice,
    pub(super) kernels: Arc<Kernels>,
    pub(super) tuning: Tuning,
    /// How many windows a dispatch can bind: more than one only in an array.
    pub(super) windows: u32,
    /// Whether a window can be bound as words and as quads.
    quads: bool,
    /// How much device memory host tensors may take, in bytes.
    pub(super) memory_budget: u64,
}

impl GpuClipper {
    /// Clips on the caller's device. wgpu's downlevel default limits suffice, and no feature is needed.
    ///
    /// Natively, waits for a small dispatch that finds out how the device rounds.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]; [`Error::Limit`] if the device cannot run compute shaders of 8 invocations with four storage
    /// buffers.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self, Error> {
        Self::on(GpuDevice::new(device, queue)?)
    }

    /// Opens a device on the adapter with the highest performance, with all the adapter's limits.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none; [`Error::Device`] if it gives no device.
    pub fn open() -> Waiting<'static, Result<Self, Error>> {
        Waiting::new(async { Self::on(GpuDevice::open(&device::adapter(None).await?).await?) })
    }

    /// Opens a device on the first adapter that has `name` in its name, in upper or lower case.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none, with the names there are; [`Error::Device`] if it gives no device.
    pub fn open_named(name: &str) -> Waiting<'_, Result<Self, Error>> {
        Waiting::new(async move { Self::on(GpuDevice::open(&device::adapter(Some(name)).await?).await?) })
    }

    /// Opens a device on one of [`adapters`](super::adapters), with all its limits. For several GPUs, open one on each.
    ///
    /// # Errors
    /// [`Error::Device`] if the adapter gives no device.
    pub fn open_on(adapter: &wgpu::Adapter) -> Waiting<'_, Result<Self, Error>> {
        Waiting::new(async move { Self::on(GpuDevice::open(adapter).await?) })
    }

    pub(super) fn on(device: GpuDevice) -> Result<Self, Error> {
        let tuning = Tuning::of(&device.device.adapter_info());
        Self::tuned(device, tuning)
    }

    /// Clips on the same device with another tuning than [`Tuning::of`] gives, such as one that was measured there.
    /// Compiles its own kernels. Norms may differ in their last bits.
    ///
    /// Settings that the device does not support are reduced: subgroups, arrays of bindings, invocations.
    ///
    /// # Errors
    /// [`Error::Usage`] if a workgroup is not a power of two of at least 8, or chunks are too short or too long.
    pub fn with_tuning(&self, tuning: Tuning) -> Result<Self, Error> {
        tuning.check()?;
        Ok(Self { memory_budget: self.memory_budget, ..Self::tuned(self.device.clone(), tuning)? })
    }

    /// Clips on the same device with a cache of compiled pipelines, which [`GpuClipper::pipeline_cache`] returned in
    /// another process. Bytes of another device, driver or version count as none. Compiles its own kernels, with the help
    /// of the cache. Without `Features::PIPELINE_CACHE`, which [`GpuClipper::open`] asks for, this is the clipper as it is.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = std::env::temp_dir();
    /// let path = folder.join("pipelines");
    /// let gpu = gradclip::gpu::GpuClipper::open().wait()?;
    /// // SAFETY: only this program writes that file.
    /// let gpu = unsafe { gpu.with_pipeline_cache(&std::fs::read(&path).unwrap_or_default())? };
    /// // ... after the first plans:
    /// if let Some(bytes) = gpu.pipeline_cache() {
    ///     std::fs::write(&path, bytes)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Safety
    /// The bytes must have come from [`GpuClipper::pipeline_cache`], or be none: the driver may run what they hold.
    ///
    /// # Errors
    /// [`Error::Device`] if the device refuses it; [`Error::DeviceLost`].
    #[allow(unsafe_code)]
    pub unsafe fn with_pipeline_cache(&self, bytes: &[u8]) -> Result<Self, Error> {
        let Some(device) = self.device.caching(bytes)? else { return Ok(self.clone()) };
        Ok(Self { memory_budget: self.memory_budget, ..Self::tuned(device, self.tuning)? })
    }

    /// What the driver keeps of the pipelines compiled so far, for [`GpuClipper::with_pipeline_cache`] in a later process.
    /// None if this clipper has no such cache, or the driver keeps nothing.
    #[must_use]
    pub fn pipeline_cache(&self) -> Option<Vec<u8>> {
        self.device.pipelines.as_ref()?.get_data()
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
        tuning.subgroups &= features.contains(wgpu::Features::SUBGROUP);
        tuning.native_products &= device.native.products;
        tuning.native_halves &= device.native.halves;
        let Tuning { workgroup, contiguous, native_products, native_halves, .. } = tuning;
        let subgroups = tuning.subgroups.then(|| device.device.adapter_info().subgroup_min_size);
        let shape = Shape { workgroup, contiguous, subgroups, native_products, native_halves };
        // A workgroup keeps the partials that it merges, 32 bytes each, in its memory.
        let kept = u64::from(shape.kept_partials()) * PARTIAL_BYTES;
        need("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into(), kept)?;
        // Partials, results and a table take the other three bindings.
        let bindings = limits.max_storage_buffers_per_shader_stage - 3;
        let windows = if features.contains(ARRAYS_OF_BUFFERS) {
            // Words and quads have an array each, and its length is a power of two.
            let fitting = (limits.max_binding_array_elements_per_shader_stage / 2).min(tuning.windows);
            if fitting > 1 { 1 << fitting.ilog2() } else { 1 }
        } else {
            1
        };
        let quads = bindings >= 2 && !cfg!(target_arch = "wasm32");
        #[cfg_attr(target_arch = "wasm32", expect(clippy::arc_with_non_send_sync, reason = "a page has one thread"))]
        let kernels = Arc::new(Kernels::new(&device, shape)?);
        let memory_budget = memory_budget(device.device.adapter_info().device_type);
        Ok(Self { device, kernels, tuning, windows, quads, memory_budget })
    }

    /// Sets how many bytes of device memory host tensors may take at a time. A larger set passes through that much
    /// memory; tensors that are written and are no longer on the device pass twice. The budget does not count tensors
    /// in GPU memory, plans, sums of examples, or the staging buffers (at most 32 MiB for each direction).
    ///
    /// By default the device keeps the whole set, or as much as fits: wgpu does not tell how much there is before it
    /// runs out. A software device uses the host's memory and by default keeps 32 MiB at a time. The result has the
    /// same bits for every budget of at least 16 MiB; below, the norm may differ in its last bits. Less than 64 KiB
    /// counts as 64 KiB.
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

    /// The queue for host tensors and reports.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.device.queue
    }

    /// How kernels reach the given number of windows.
    pub(super) fn access(&self, windows: usize) -> Access {
        match (windows, self.quads) {
            (1, true) => Access::Quads,
            (1, false) => Access::Words,
            (count, _) => Access::Array(count.next_power_of_two() as u32),
        }
    }
}

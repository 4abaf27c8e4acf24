//! The GPU path: gradients in wgpu buffers, clipped where they lie.
//!
//! ```text
//! for each window of each buffer: norm       partials of chunks         shaders/norm.wgsl
//! merge                                      partials, in list order    shaders/merge.wgsl
//! finalise                                   norm, coefficient, counts  shaders/finalise.wgsl
//! for each window: scale or clamp, edges     in place                   shaders/scale.wgsl, clamp.wgsl, edges.wgsl
//! ```
//!
//! All of it is one compute pass without a wait. A value clip of which no element decides about another needs no norm:
//! `clamp` comes first and tells what it met.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, wgpu};
//!
//! let gpu = GpuClipper::open_blocking()?; // or GpuClipper::new(&device, &queue)? on your own device
//! let (device, queue) = (gpu.device(), gpu.queue());
//! # use wgpu::util::DeviceExt;
//! # let usage = wgpu::BufferUsages::STORAGE;
//! # let contents = bytemuck::cast_slice(&[3.0f32, 4.0, 7.0]);
//! # let buffer = device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents, usage });
//! // Once: what is clipped, and where it lies. Ranges are in elements; the buffer needs BufferUsages::STORAGE.
//! let plan = gpu.plan(&Clip::norm(1.0)?, &[GpuTensor::f32(&buffer, 0..2)?.named("w")])?;
//! // Each step: recorded behind whatever made the gradients.
//! let mut encoder = device.create_command_encoder(&Default::default());
//! plan.encode(&mut encoder)?;
//! queue.submit([encoder.finish()]);
//! // If wanted:
//! let report = plan.report_blocking()?;
//! assert!((report.total_norm - 5.0).abs() < 1e-5 && report.clipped);
//! # Ok(())
//! # }
//! ```

mod device;
mod host;
mod kernels;
mod number;
mod plan;
mod readback;
mod table;
pub mod tuning;

use std::collections::HashMap;
use std::sync::Arc;

use device::GpuDevice;
use kernels::Kernels;
use plan::Parts;
use table::Piece;
use tuning::Tuning;

use crate::error::tensor_label;
pub use crate::tensor::GpuTensor;
use crate::{Clip, Error};

pub(crate) use device::Wait;
pub use device::adapters;
#[cfg(not(target_arch = "wasm32"))]
pub use device::adapters_blocking;
pub use plan::GpuPlan;

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
}

impl GpuClipper {
    /// Clips on the caller's device. Any limits and features will do from wgpu's downlevel defaults on.
    ///
    /// # Errors
    /// [`Error::Limit`] if the device cannot run compute shaders of 64 invocations with four storage buffers.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self, Error> {
        Self::on(GpuDevice::new(device, queue))
    }

    /// Opens a device of its own on the adapter with the highest performance, with all its limits.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none; [`Error::Device`] if it gives no device.
    pub async fn open() -> Result<Self, Error> {
        Self::on(GpuDevice::open(&device::adapter(None).await?).await?)
    }

    /// Opens a device on the first adapter whose name contains `name`, in any case of letters.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none, with the names there are; [`Error::Device`] if it gives no device.
    pub async fn open_named(name: &str) -> Result<Self, Error> {
        Self::on(GpuDevice::open(&device::adapter(Some(name)).await?).await?)
    }

    /// [`GpuClipper::open`], waiting for the answer.
    ///
    /// # Errors
    /// The same.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open_blocking() -> Result<Self, Error> {
        pollster::block_on(Self::open())
    }

    /// [`GpuClipper::open_named`], waiting for the answer.
    ///
    /// # Errors
    /// The same.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open_named_blocking(name: &str) -> Result<Self, Error> {
        pollster::block_on(Self::open_named(name))
    }

    fn on(device: GpuDevice) -> Result<Self, Error> {
        let limits = device.device.limits();
        let need = |limit, have: u64, need: u64| {
            if have < need { Err(Error::Limit { limit, have, need }) } else { Ok(()) }
        };
        let invocations = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
        need("max_compute_invocations_per_workgroup", invocations.into(), 64)?;
        need("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage.into(), 4)?;
        need("max_storage_buffer_binding_size", limits.max_storage_buffer_binding_size, 1 << 16)?;
        let mut tuning = Tuning::of(device.device.adapter_info().device_type);
        if tuning.workgroup > invocations {
            tuning.workgroup = 64;
        }
        // The tree of partials, 32 bytes each, lies in workgroup memory.
        let tree = u64::from(tuning.workgroup) * 32;
        need("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into(), tree)?;
        let kernels = Arc::new(Kernels::new(&device, tuning.workgroup)?);
        Ok(Self { device, kernels, tuning })
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

    /// Plans a clip of tensors in GPU memory. Compiles the kernels it needs, if no earlier plan has.
    ///
    /// The buffers must be of this device. One of another device is an error, but one of another `wgpu::Instance` wgpu
    /// itself cannot tell apart: it panics, or takes another buffer for it.
    ///
    /// # Errors
    /// [`Error::Overlap`] if two tensors share elements; [`Error::TooLarge`], [`Error::OutOfMemory`] or
    /// [`Error::Device`] if the device cannot hold or bind what the plan needs. The tensors are not touched.
    pub fn plan(&self, clip: &Clip, tensors: &[GpuTensor]) -> Result<GpuPlan, Error> {
        #[expect(clippy::mutable_key_type, reason = "buffers compare and hash by identity, which never changes")]
        let mut places = HashMap::new();
        let mut buffers = Vec::new();
        let mut pieces = Vec::new();
        for (i, t) in tensors.iter().enumerate() {
            let buffer = *places.entry(t.buffer.clone()).or_insert_with(|| {
                buffers.push(t.buffer.clone());
                buffers.len() - 1
            });
            let (dtype, start, len) = (t.dtype, t.start, t.len());
            pieces.push(Piece { buffer, dtype, start, len, tensor: i, first_element: 0, segment: 0 });
        }
        let label = |piece: &Piece| tensor_label(tensors[piece.tensor].name.as_deref(), piece.tensor);
        let mut by_address: Vec<_> = pieces.iter().filter(|p| p.len > 0).collect();
        by_address.sort_by_key(|p| (p.buffer, p.bytes().start));
        let overlap =
            |pair: &&[&Piece]| pair[0].buffer == pair[1].buffer && pair[1].bytes().start < pair[0].bytes().end;
        if let Some(pair) = by_address.windows(2).find(overlap) {
            return Err(Error::Overlap { first: label(pair[0]), second: label(pair[1]) });
        }
        let names = tensors.iter().map(|t| t.name.clone()).collect();
        GpuPlan::new(self, clip, Parts { buffers, pieces, names }, true)
    }
}

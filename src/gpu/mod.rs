//! The GPU path: gradients in wgpu buffers, clipped where they lie.
//!
//! ```text
//! for each window of each buffer: norm       partials of chunks         shaders/norm.wgsl, norm_each.wgsl
//! merge                                      partials, in list order    shaders/merge.wgsl
//! threshold, if the device computes it       the limits of norms        shaders/threshold.wgsl
//! finalise                                   norm, coefficient, counts  shaders/finalise.wgsl
//! for each window: scale or clamp, edges     in place                   shaders/scale.wgsl, scale_each.wgsl, clamp.wgsl,
//!                                                                       edges.wgsl
//! or numbers, step                           an optimizer's step        shaders/numbers.wgsl, step.wgsl
//! ```
//!
//! All of it is one compute pass without a wait. A value clip measures no norm. Unless its policy lets a non-finite
//! element decide about others, `clamp` comes first and also reports what it found.
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
//! // Each step: recorded after the commands that make the gradients.
//! let mut encoder = device.create_command_encoder(&Default::default());
//! plan.encode(&mut encoder)?;
//! queue.submit([encoder.finish()]);
//! // If wanted:
//! let report = plan.report().wait()?;
//! assert!((report.total_norm - 5.0).abs() < 1e-5 && report.clipped);
//! # Ok(())
//! # }
//! ```

mod accumulator;
mod build;
mod clipper;
mod device;
mod dispatch;
mod gather;
mod host;
mod kernels;
mod memory;
mod merge;
mod number;
mod options;
mod params;
mod plan;
mod probe;
mod profile;
mod readback;
mod schedule;
mod step;
mod table;
mod tensor;
#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
mod threshold;
mod tune;
pub mod tuning;

pub use accumulator::{GpuAccumulatorPlan, GpuNormAccumulator};
pub use clipper::GpuClipper;
pub use device::adapters;
pub use options::PlanOptions;
pub use plan::GpuPlan;
pub use profile::{Pass, Profile, Speeds};
pub use tensor::GpuTensor;
pub use threshold::DeviceThreshold;
pub use tune::{Trial, Tuned};

/// Everything public may be sent to and used from any thread.
#[cfg(not(target_arch = "wasm32"))]
const _: () = {
    const fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<GpuClipper>();
    send_and_sync::<GpuPlan>();
    send_and_sync::<GpuTensor>();
    send_and_sync::<crate::Error>();
};

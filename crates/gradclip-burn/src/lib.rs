//! Gradient clipping for [burn](https://burn.dev) by the true global norm: in place, on burn's own GPU buffers, without a
//! wait; on the host for every other backend.
//!
//! burn's own clipping is per tensor. This goes between `GradientsParams::from_grads` and the optimizer's `step`:
//!
//! ```
//! # use burn::{module::Module, nn::{Linear, LinearConfig}, optim::{GradientsParams, SgdConfig}};
//! # use burn::tensor::{Device, Tensor};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let device = Device::flex().autodiff();
//! # let mut model: Linear = LinearConfig::new(8, 4).init(&device);
//! # let mut optimizer = SgdConfig::new().init();
//! # let loss = model.forward(Tensor::<2>::ones([2, 8], &device)).square().sum();
//! let mut grads = GradientsParams::from_grads(loss.backward(), &model);
//! gradclip_burn::clip_grad_norm(&mut grads, &model, 1.0)?;
//! model = optimizer.step(1e-3, model, grads);
//! # Ok(())
//! # }
//! ```
//!
//! Use [`GradClipper`] for every other clip, for the norm, and for thresholds that follow the run. [`GradOptimizer`] clips and takes
//! the step of an optimizer in one.
//!
//! With the feature `wgpu` of this crate and of burn, gradients on wgpu devices are clipped in place, if the device was opened by
//! [`open_wgpu`] (one line at the start of the program): burn gives a device and its queue only to the caller that opens it.
//! Gradients on other devices, or on several, are read, clipped on the host and written back. burn's CPU backend has them on the
//! host already.
//!
//! [`explained`] says what the clips do, and which to choose.

#![cfg_attr(not(feature = "wgpu"), doc = "")]
#![cfg_attr(not(feature = "wgpu"), doc = "[`open_wgpu`]: explained")]

mod clipper;
#[cfg(feature = "wgpu")]
mod device;
mod error;
mod gradients;
mod host;
mod optimizer;
mod threshold;

#[doc = include_str!("../docs/explained.md")]
pub mod explained {}

pub use clipper::{GradClipper, clip_grad_norm, clip_grad_value};
#[cfg(all(feature = "wgpu", not(target_arch = "wasm32")))]
pub use device::open_wgpu;
#[cfg(feature = "wgpu")]
pub use device::{open_wgpu_async, register_wgpu};
pub use error::Error;
pub use gradclip;
pub use optimizer::{GradOptimizer, StepFailed};
pub use threshold::AdaptiveThreshold;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

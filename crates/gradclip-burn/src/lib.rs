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
//! For every other clip, the norm, and thresholds that follow the run there is [`GradClipper`].
//!
//! With the feature `wgpu` of this crate (as of burn), the gradients on wgpu devices are clipped where they lie, if the device was
//! opened by [`open_wgpu`] (one line where the program begins): burn hands a device and its queue only to who opens it. On
//! others, and if gradients are spread over several devices, they are read, clipped on the host and written back; burn's CPU backend has them there already.
//!
//! [`explained`] tells what the clips do and which to choose.

#![cfg_attr(not(feature = "wgpu"), doc = "")]
#![cfg_attr(not(feature = "wgpu"), doc = "[`open_wgpu`]: explained")]

mod clipper;
#[cfg(feature = "wgpu")]
mod device;
mod error;
mod gradients;
mod host;

#[doc = include_str!("../docs/explained.md")]
pub mod explained {}

pub use clipper::{AdaptiveThreshold, GradClipper, clip_grad_norm, clip_grad_value};
#[cfg(all(feature = "wgpu", not(target_arch = "wasm32")))]
pub use device::open_wgpu;
#[cfg(feature = "wgpu")]
pub use device::{open_wgpu_async, share};
pub use error::Error;
pub use gradclip;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

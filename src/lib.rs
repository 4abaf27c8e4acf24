//! stub front page
mod clip;
mod clipper;
mod cpu;
mod error;
#[cfg(feature = "gpu")]
pub mod gpu;
mod partial;
mod report;
mod tensor;
#[cfg(feature = "gpu")]
mod verify;

pub use clip::{Clip, NonFinite, NormType, Scope};
pub use clipper::{Clipper, clip_grad_norm, clip_grad_value};
pub use error::Error;
pub use report::{ClipReport, NonFiniteElements};
pub use tensor::{Dtype, Element, Tensor, TensorMut};
#[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
pub use verify::verify_blocking;
#[cfg(feature = "gpu")]
pub use verify::{Mismatch, Tolerance, Verification, verify};
#[cfg(feature = "gpu")]
pub use wgpu;

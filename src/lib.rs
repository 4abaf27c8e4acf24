//! Gradient clipping at the speed of memory, with a norm that can be trusted: on any GPU that wgpu reaches, and on the
//! CPU.
//!
//! One description, [`Clip`], says what to clip and how; every backend follows it:
//!
//! - Slices in host memory: [`clip_grad_norm`] and [`clip_grad_value`], one line each.
//!
//!   ```
//!   let (mut w, mut b) = (vec![0.5f32; 4096], vec![0.25f32; 64]);
//!   let report = gradclip::clip_grad_norm(&mut [&mut w[..], &mut b[..]], 1.0)?;
//!   println!("norm {}, multiplied by {}", report.total_norm, report.clip_coef);
//!   # assert!(report.clipped && (report.total_norm - 32.0624).abs() < 1e-4);
//!   # Ok::<(), gradclip::Error>(())
//!   ```
//! - Host tensors of any mix of dtypes, by any clip: [`Clipper`].
//!
//!   ```
//!   use gradclip::{Clip, Clipper, NonFinite, TensorMut};
//!   let mut w = vec![half::bf16::from_f32(3.0), half::bf16::NAN];
//!   let clip = Clip::norm(1.0)?.grad_scale(1024.0)?.non_finite(NonFinite::Skip);
//!   let report = Clipper::auto().apply(&clip, &mut [TensorMut::new(&mut w).named("decoder.weight")])?;
//!   let bad = report.non_finite.expect("there is a NaN");
//!   assert_eq!((bad.count, bad.name.as_deref(), bad.index), (1, Some("decoder.weight"), 1));
//!   # Ok::<(), gradclip::Error>(())
//!   ```
//! - Gradients in wgpu buffers: [`gpu::GpuClipper`] plans once and records each step into the caller's own encoder,
//!   without a wait, a copy or an allocation. Its page has an example.
//! - Whether GPU and CPU agree on a clip: [`verify_blocking`].
//!
//! # What holds
//!
//! - When nothing is to be clipped, not one byte is written.
//! - The norm's relative error is at most 1e-7 on the CPU and 1e-6 on the GPU, at any length, and neither 1e20-sized nor
//!   1e-25-sized gradients overflow or underflow.
//! - The same input gives the same bits on the same adapter, run after run; on the CPU also for every number of threads.
//! - Non-finite gradients are counted and located, and by default nothing is written then ([`NonFinite`]).
//!
//! # Features
//!
//! - `gpu` (default): the wgpu path. Without it the library is the CPU path alone and builds no wgpu.
//! - `serde`: [`ZClip`], [`AutoClip`] and [`AdaGc`] can be saved and restored with a checkpoint.

#![forbid(unsafe_code)]

mod clip;
mod clipper;
mod cpu;
mod error;
#[cfg(feature = "gpu")]
pub mod gpu;
mod partial;
mod progress;
mod report;
mod running;
mod segment;
mod tensor;
mod threshold;
#[cfg(feature = "gpu")]
mod verify;

pub use clip::{Budget, Clip, NonFinite, NormType, Power, Scope, UnitAxis};
pub use clipper::{Clipper, clip_grad_norm, clip_grad_value};
pub use error::Error;
pub use report::{ClipReport, NonFiniteElements, SegmentReport};
pub use running::RunningPartial;
pub use tensor::{Dtype, Element, Tensor, TensorMut};
pub use threshold::{AdaGc, AutoClip, Threshold, ZClip};
#[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
pub use verify::verify_blocking;
#[cfg(feature = "gpu")]
pub use verify::{Mismatch, Tolerance, Verification, verify};
#[cfg(feature = "gpu")]
pub use wgpu;

/// The README's examples compile.
#[cfg(all(doctest, feature = "gpu"))]
#[doc = include_str!("../README.md")]
struct Readme;

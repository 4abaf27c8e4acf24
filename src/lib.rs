//! Gradient clipping at the speed of memory, with a norm that can be trusted, on the CPU and any GPU that wgpu reaches.
//!
//! One description, [`Clip`], says what to clip and how. Every backend follows it:
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
//!   let clip = Clip::norm(1.0).grad_scale(1024.0).non_finite(NonFinite::Skip);
//!   let report = Clipper::auto().apply(&clip, &mut [TensorMut::new(&mut w).named("decoder.weight")])?;
//!   let bad = report.non_finite.expect("there is a NaN");
//!   assert_eq!((bad.count, bad.name.as_deref(), bad.index), (1, Some("decoder.weight"), 1));
//!   # Ok::<(), gradclip::Error>(())
//!   ```
//! - The clip of another library, by its name there:
//!
//!   | there | here |
//!   |---|---|
//!   | PyTorch `clip_grad_norm_(parameters, m, norm_type=p)` | `Clip::norm(m).norm_type(NormType::p(p))` |
//!   | PyTorch `clip_grad_value_(parameters, v)` | `Clip::value(v)` |
//!   | PyTorch `GradScaler.unscale_`, its `found_inf`, then a clip | `.grad_scale(s).non_finite(NonFinite::Skip)`, [`ClipReport::has_non_finite`] |
//!   | Optax `clip_by_global_norm(m)`, TensorFlow `clip_by_global_norm`, Keras `global_clipnorm` | `Clip::norm(m).eps(0.0)` |
//!   | TensorFlow `clip_by_norm(t, m)`, Keras `clipnorm`, burn's norm clipping | the same with `.scope(Scope::Tensor)` |
//!   | TensorFlow `clip_by_norm(t, m, axes)` | the same with `.scope(Scope::Unit).unit_axis(UnitAxis::over(&axes))` |
//!   | TensorFlow 1 `clip_by_average_norm(t, m)` | `Clip::average_norm(m).scope(Scope::Tensor)` |
//!   | Optax `clip_by_block_rms(t)` | `Clip::rms(t).scope(Scope::Tensor)` |
//!   | Optax `clip(v)`, Keras `clipvalue`, burn's value clipping | `Clip::value(v)` |
//!   | timm `adaptive_clip_grad(parameters, f, norm_type=p)` | `Clip::agc(f).norm_type(NormType::p(p))` |
//!   | Optax `adaptive_grad_clip(f)` | `Clip::agc(f).unit_axis(UnitAxis::Optax)`; with its `axis`, [`UnitAxis::over`] |
//!   | Optax `per_example_global_norm_clip`, Opacus flat clipping | [`Clipper::sum_examples`] with `Scope::Example` |
//!   | Optax `per_example_layer_norm_clip`, Opacus per-layer clipping | the same with `Scope::ExampleTensor` and a [`Budget`] |
//!   | PyTorch `clip_grad_norm_`, then `torch.optim.AdamW(fused=True).step` | [`Optimizer::adamw`], [`Clipper::step`] |
//! - A threshold that follows the norms of a run: [`ZClip`], [`AutoClip`] and [`AdaGc`], with
//!   [`Clipper::apply_adaptive`] or, entirely on the device, [`gpu::PlanOptions::threshold`].
//! - Norm and scaling as separate steps: [`Clipper::measure`], [`Clipper::scale`], [`NormAccumulator`], and on the
//!   device [`gpu::PlanOptions`], [`gpu::GpuPlan::coefficients`] and [`gpu::GpuNormAccumulator`].
//! - Gradients larger than memory: [`Clipper::decide`] measures them where they lie, for example in a mapped file.
//!   [`DecidedClip`] then clips them piece by piece, from any thread.
//! - The step of an optimizer with the clip folded in: [`Optimizer`] describes it, [`Clipper::step`] takes it whole and
//!   [`DecidedStep`] piece by piece. Gradients are read, and never written.
//! - Gradients spread over processes, clipped by the one norm of all: [`processes`], with [`Clipper::processes`].
//! - Gradients in wgpu buffers: [`gpu::GpuClipper`] plans once and records each step into the caller's own encoder,
//!   without a wait, a copy or an allocation. Its page has an example.
//! - A check that GPU and CPU agree on a clip: [`verify`].
//!
//! # Promises
//!
//! - When nothing is to be clipped, not one byte is written.
//! - The norm's relative error is at most 1e-7 on the CPU and 1e-6 on the GPU, at any length. Gradients around 1e20 do
//!   not overflow, and gradients around 1e-25 do not underflow.
//! - The same input gives the same bits on the same adapter, run after run. On the CPU this holds for every number of
//!   threads and every instruction set (except for the payload of a NaN that is multiplied by a NaN).
//! - Non-finite gradients are counted and located. By default nothing is written then ([`NonFinite`]).
//!
//! # Deliberate differences from its peers
//!
//! | peer | what it does | what this does |
//! |---|---|---|
//! | PyTorch | p = 0 counts the tensors | an error: no clip can use it |
//! | PyTorch, timm | a negative p makes a norm of the smallest gradients, 0 if one is 0 | an error |
//! | timm | p = 0 counts a unit's elements that are not 0 | an error |
//! | PyTorch | float32 gradients around 1e20 overflow its norm, and the clip zeroes them | they are scaled |
//! | PyTorch | a negative `max_norm` turns the gradients round | an error |
//! | PyTorch | p = ∞ raises on a tensor without elements | its norm is 0 |
//! | PyTorch | the norm of half-precision gradients is rounded to half precision | it is summed in float32 or better, and reported in float64 |
//! | Optax | N = `max_norm` = 0 gives NaN | zeros are left alone |
//! | TensorFlow | gradients below the threshold change in their last bits | they keep every bit |
//! | TensorFlow | an infinite global norm makes every gradient NaN | by default an error; under `NonFinite::Propagate` finite gradients become 0, infinite ones NaN, as in PyTorch |
//! | timm | a NaN in a parameter makes the gradients of its unit NaN | the unit is not clipped |
//! | timm, Optax | AGC clips a unit whose N equals the threshold, if that is below 1e-6: by N / 1e-6 | N is not above the threshold, and the unit is left alone |
//!
//! # Features
//!
//! - `gpu` (default): the wgpu path. Without it the library is the CPU path alone and builds no wgpu.
//! - `vulkan`, `metal`, `dx12`, `gles`, `webgpu` (default): wgpu's backends. Without any of them wgpu finds no adapter.
//!   In browsers `webgpu` alone will do: `default-features = false, features = ["webgpu"]`. There nothing blocks, no thread
//!   is started, and everything that waits is awaited.
//! - `serde`: [`ZClip`], [`AutoClip`] and [`AdaGc`] can be saved and restored with a checkpoint.
//! - `safetensors`: an [`OptimizerState`] can be saved and restored as a safetensors file.
//!
//! The crate [`wgpu`] is part of this one's interface: its next major version is our next major version too.
//!
//! # Building
//!
//! The CPU's kernels are vectors in cargo's release profile. `lto = "off"` makes calls of small functions of the standard
//! library: clips of many small tensors take up to 1.5 times as long then, and maximum norms of columns 20 times.
// Without the feature, links to its items lead to the list of features.
#![cfg_attr(not(feature = "gpu"), doc = "")]
#![cfg_attr(not(feature = "gpu"), doc = "[`wgpu`]: #features")]
#![cfg_attr(not(feature = "gpu"), doc = "[`gpu::GpuClipper`]: #features")]
#![cfg_attr(not(feature = "gpu"), doc = "[`gpu::PlanOptions`]: #features")]
#![cfg_attr(not(feature = "gpu"), doc = "[`gpu::PlanOptions::threshold`]: #features")]
#![cfg_attr(not(feature = "gpu"), doc = "[`gpu::GpuPlan::coefficients`]: #features")]
#![cfg_attr(not(feature = "gpu"), doc = "[`gpu::GpuNormAccumulator`]: #features")]
#![cfg_attr(not(feature = "gpu"), doc = "[`verify`]: #features")]
#![deny(unsafe_code)]

mod accumulator;
mod clip;
mod clipper;
mod context;
mod cpu;
mod decision;
mod dtype;
mod error;
mod examples;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "gpu")]
pub mod gpu;
mod magnitude;
mod optimizer;
mod partial;
mod pieces;
pub mod processes;
mod report;
mod segment;
mod skips;
mod tensor;
mod threshold;
#[cfg(feature = "gpu")]
mod verify;
mod wait;

pub use accumulator::NormAccumulator;
pub use clip::{Axes, Budget, Clip, Mode, NonFinite, NormType, Scope, UnitAxis};
pub use clipper::{Clipper, clip_grad_norm, clip_grad_value};
pub use cpu::count::TensorCounts;
pub use cpu::histogram::Histogram;
pub use dtype::{Dtype, Element};
pub use error::{Error, NonFiniteElements};
pub use optimizer::{Algorithm, DecidedStep, Halves, Optimizer, OptimizerState, StateTensor};
pub use pieces::DecidedClip;
pub use report::{ClipReport, LostElements, SegmentReport, Skipped};
pub use skips::ConsecutiveSkips;
pub use tensor::{HostTensor, Tensor, TensorMut};
pub use threshold::{AdaGc, AutoClip, Threshold, ZClip};
#[cfg(feature = "gpu")]
pub use verify::{Mismatch, Tolerance, Verification, verify};
pub use wait::Waiting;
#[cfg(feature = "gpu")]
pub use wgpu;

/// The README's examples must compile.
#[cfg(all(doctest, feature = "gpu"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// So must those of the page on optimizers.
#[cfg(all(doctest, feature = "gpu"))]
#[doc = include_str!("../docs/OPTIMIZERS.md")]
struct Optimizers;

//! Clips the gradients of a [candle](candle_core) training step on the CPU, in one line between `backward` and `step`: by
//! global norm, by value, adaptively, per tensor, per unit or per example, with the norms and the promises of [`gradclip`].
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//!
//! let w = Var::zeros((3, 1), DType::F32, &Device::Cpu)?;
//! let b = Var::zeros(1, DType::F32, &Device::Cpu)?;
//! let x = Tensor::new(&[[1f32, 2., 3.], [30., 20., 10.]], &Device::Cpu)?;
//! let y = Tensor::new(&[[6f32], [60.]], &Device::Cpu)?;
//! let mut losses = Vec::new();
//! for _ in 0..50 {
//!     let loss = (x.matmul(&w)?.broadcast_add(&b)? - &y)?.sqr()?.mean_all()?;
//!     losses.push(loss.to_scalar::<f32>()?);
//!     let mut grads = loss.backward()?;
//!
//!     let report = gradclip_candle::clip_grad_norm(&mut grads, &[w.clone(), b.clone()], 1.0)?;
//!     assert!(report.total_norm > 1.0 && report.clipped);
//!
//!     // An optimizer's `step(&grads)`; here plain gradient descent.
//!     for var in [&w, &b] {
//!         let gradient = grads.get(var).expect("the loss depends on it");
//!         var.set(&(var.as_tensor() - (gradient * 0.02)?)?)?;
//!     }
//! }
//! assert!(losses[49] < losses[0] / 2.0);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! With candle-nn that is `clip_grad_norm(&mut grads, &varmap.all_vars(), 1.0)?`, or with the map's names, which reports
//! and errors then carry, `clip_grad_norm(&mut grads, &*varmap.data().lock().unwrap(), 1.0)?`.
//!
//! - [`clip_grad_norm`] and [`clip_grad_value`]: as in PyTorch.
//! - [`clip`]: any [`Clip`], with any norm, scope, loss scale and policy for NaN. Adaptive gradient clipping uses the value of each
//!   var as the parameter, and its rows as units: candle's linear layers are [out, in].
//! - [`clip_adaptive`]: by a threshold that follows the run, such as [`ZClip`](gradclip::ZClip).
//! - [`clip_in_place`]: the same in place, if you know that nobody else holds the gradients.
//! - [`step`]: clip and step in one, by an [`Optimizer`](gradclip::Optimizer) such as AdamW: the gradients are only read.
//!
//! # What is clipped
//!
//! The gradients of the [`Vars`] in the store: float16, bfloat16, float32 and float64, mixed, with any strides. A var without
//! a gradient is skipped. A var that is given twice counts once. If two vars have the same tensor as gradient, both count, as
//! in the optimizer. A gradient on CUDA or Metal, of another dtype, or of another shape than its var is an [`Error`], and
//! nothing is clipped then.
//!
//! # What is written
//!
//! Nothing, if nothing is to be clipped: the store keeps its tensors. Otherwise a clipped copy, contiguous and detached, replaces
//! the gradient in the store, one gradient after the other. Candle's tensors share their storage with clones and views, and
//! candle does not show whether one does. So the old tensor is never written to, and other holders of it (you, another var, a
//! view) see no change. Right after `backward` there is no other holder, and [`clip_in_place`] saves the copy.
//!
//! # The same every time
//!
//! The same gradients in the same order give the same bits, for every number of threads. `VarMap::all_vars` has another order in
//! each process, because a `HashMap` has, and the order may change the last bit of a norm. A map with names is sorted by them.
//! Give names too if a state depends on the order, as that of [`AdaGc`](gradclip::AdaGc) does.
//!
//! Work runs on rayon's current pool, as in candle.
#![deny(unsafe_code)]

mod error;
mod gradients;
mod step;
mod vars;
mod write;

use std::collections::HashMap;

use candle_core::Var;
use candle_core::backprop::GradStore;
use gradclip::{Clip, ClipReport, Clipper, Threshold};

pub use error::Error;
pub use gradclip;
pub use step::{optimizer_state, step};
pub use vars::Vars;

use gradients::{Gradient, gather, storage_address, with_views};
use write::Write;

/// Clips the gradients of these vars by their global L2 norm: PyTorch's `clip_grad_norm_`.
///
/// The vars are a list (`VarMap::all_vars`), or a list or map with names: see [`Vars`]. [The crate's page](crate) has an example.
///
/// # Errors
/// [`gradclip::Error::Setting`] for a negative or NaN `max_norm`, [`gradclip::Error::NonFinite`] if a gradient is NaN or
/// infinite (both as [`Error::Clip`]), and the others of [`Error`] for what cannot be clipped here. The gradients are then unchanged.
pub fn clip_grad_norm(grads: &mut GradStore, vars: &(impl Vars + ?Sized), max_norm: f64) -> Result<ClipReport, Error> {
    clip(grads, vars, &Clip::norm(max_norm))
}

/// Clips every element of the gradients of these vars to `-clip_value ..= clip_value`: PyTorch's `clip_grad_value_`.
///
/// # Errors
/// [`gradclip::Error::Setting`] for a negative or NaN `clip_value`, and those of [`Error`] for what cannot be clipped here.
/// NaN stays NaN and is counted in the report.
pub fn clip_grad_value(
    grads: &mut GradStore,
    vars: &(impl Vars + ?Sized),
    clip_value: f64,
) -> Result<ClipReport, Error> {
    clip(grads, vars, &Clip::value(clip_value))
}

/// Clips the gradients of these vars as described. In the report, and in errors, a tensor has the number of its var in
/// `vars`. A var without a name is called by its number: `vars[3]`.
///
/// ```
/// use candle_core::{Device, Var};
/// use gradclip_candle::gradclip::{Clip, NonFinite, Scope};
///
/// let vars = [("w", Var::new(&[3f32, 4.], &Device::Cpu)?), ("b", Var::new(&[0f32], &Device::Cpu)?)];
/// let loss = (vars[0].1.sqr()?.sum_all()? + vars[1].1.sum_all()?)?;
/// let mut grads = loss.backward()?;
/// let each = Clip::norm(5.0).eps(0.0).scope(Scope::Tensor).non_finite(NonFinite::Skip);
/// let report = gradclip_candle::clip(&mut grads, &vars, &each)?;
/// // The gradient of w was [6, 8], that of b is 1.
/// assert_eq!((report.segments[0].norm, report.segments[1].norm, report.num_clipped()), (10.0, 1.0, 1));
/// assert_eq!(grads.get(&vars[0].1).unwrap().to_vec1::<f32>()?, [3.0, 4.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Those of [`gradclip::Clipper::apply`] as [`Error::Clip`], and the others of [`Error`] for what cannot be clipped here. The
/// gradients are then unchanged.
pub fn clip(grads: &mut GradStore, vars: &(impl Vars + ?Sized), clip: &Clip) -> Result<ClipReport, Error> {
    run(grads, &vars.vars(), clip, None, Destination::Copy)
}

/// Clips by a threshold that follows the norms: [`ZClip`](gradclip::ZClip), [`AutoClip`](gradclip::AutoClip) or
/// [`AdaGc`](gradclip::AdaGc), which with the feature `serde` can be saved with a checkpoint. The clip's own threshold stays an
/// upper bound; infinity sets none. A call without any gradients leaves the threshold as it was.
///
/// ```
/// use candle_core::{Device, Var};
/// use gradclip_candle::gradclip::{Clip, ZClip};
///
/// let mut threshold = ZClip::new().warm_up(4);
/// let w = Var::new(&[0f32], &Device::Cpu)?;
/// for size in [1., 3., 1., 3., 12.] {
///     let mut grads = (w.as_tensor() * size)?.sum_all()?.backward()?;
///     let any = Clip::norm(f64::INFINITY).eps(0.0);
///     let report = gradclip_candle::clip_adaptive(&mut grads, &[w.clone()], &any, &mut threshold)?;
///     // The mean is 2 and the standard deviation 1 when the 12 comes: ten deviations above.
///     let expected = if size == 12. { 2.0 + 2.5 * 2.5 / 10.0 } else { size };
///     assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [expected as f32]);
///     assert_eq!(report.clipped, size == 12.);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Those of [`gradclip::Clipper::apply_adaptive`] as [`Error::Clip`], and the others of [`Error`] for what cannot be clipped
/// here. The gradients are then unchanged.
pub fn clip_adaptive(
    grads: &mut GradStore,
    vars: &(impl Vars + ?Sized),
    clip: &Clip,
    threshold: &mut dyn Threshold,
) -> Result<ClipReport, Error> {
    run(grads, &vars.vars(), clip, Some(threshold), Destination::Copy)
}

/// Clips in place, as described, and by a threshold that follows the norms if there is one. It allocates no memory, which takes
/// most of the time of a clip: 16 Mi float32 on two cores of a virtual machine 6.5 ms, by [`clip`] 52 ms, and by
/// candle's own `sqr`, `sum_all` and `affine` 80 ms. (If nothing is clipped, both take the 3 ms of the norm.)
///
/// **A clone or a view of a gradient that is kept elsewhere changes with it.** Right after `backward`, before anything was
/// taken out of the store, there is none. Other tensors of the store and the vars are checked: a gradient that shares its storage
/// with one of them, or is not contiguous, is replaced by a copy, as by [`clip`].
///
/// ```
/// use candle_core::{Device, Var};
/// use gradclip_candle::gradclip::Clip;
///
/// let w = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let mut grads = (w.sqr()?.sum_all()? * 0.5)?.backward()?;
/// let report = gradclip_candle::clip_in_place(&mut grads, &[w.clone()], &Clip::norm(1.0), None)?;
/// assert_eq!(report.total_norm, 5.0);
/// assert!((grads.get(&w).unwrap().to_vec1::<f32>()?[0] - 0.6).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Those of [`clip`] or [`clip_adaptive`]. The gradients are then unchanged.
pub fn clip_in_place(
    grads: &mut GradStore,
    vars: &(impl Vars + ?Sized),
    clip: &Clip,
    threshold: Option<&mut dyn Threshold>,
) -> Result<ClipReport, Error> {
    run(grads, &vars.vars(), clip, threshold, Destination::InPlace)
}

/// Where a clipped gradient is written.
#[derive(Clone, Copy, PartialEq)]
enum Destination {
    /// Into a new tensor.
    Copy,
    /// Into its own storage, if no other known tensor shares it.
    InPlace,
}

fn run(
    grads: &mut GradStore,
    vars: &[(Option<&str>, &Var)],
    clip: &Clip,
    threshold: Option<&mut dyn Threshold>,
    destination: Destination,
) -> Result<ClipReport, Error> {
    let gradients = gather(grads, vars)?;
    let clipper = Clipper::cpu();
    // Without gradients the threshold does not change.
    let threshold = threshold.filter(|_| !gradients.is_empty());
    let decided = with_views(&gradients, |views| match threshold {
        None => clipper.decide(clip, views),
        Some(threshold) => clipper.decide_adaptive(clip, threshold, views),
    })?;
    let decided = decided.map_err(|error| gradients::explain(error, clip, &gradients))?;
    let uses = if destination == Destination::InPlace { uses(grads, vars) } else { HashMap::new() };
    let numbers: Vec<_> = gradients.iter().map(|gradient| gradient.number).collect();
    // Nothing can fail from here on. A gradient is dropped as soon as it is clipped, so that its memory is free for the next.
    for (tensor, gradient) in gradients.into_iter().enumerate() {
        let Gradient { var, tensor: contiguous, .. } = gradient;
        if decided.is_unchanged(tensor, 0..contiguous.elem_count() as u64)? {
            continue;
        }
        let write = Write { decided: &decided, tensor };
        // A contiguous copy is not among them.
        if uses.get(&storage_address(&contiguous)) == Some(&1) {
            contiguous.inplace_op1(&write)?;
        } else if let Some(clipped) = write.copy(&contiguous)? {
            grads.insert(var, clipped);
        }
    }
    let mut report = decided.report();
    gradients::renumber(&mut report, &numbers);
    Ok(report)
}

/// How many of the tensors in the store and the vars use each storage, by its address.
fn uses(grads: &GradStore, vars: &[(Option<&str>, &Var)]) -> HashMap<usize, usize> {
    let mut uses = HashMap::new();
    let gradients = grads.get_ids().filter_map(|id| grads.get_id(*id));
    for tensor in gradients.chain(vars.iter().map(|(_, var)| var.as_tensor())) {
        *uses.entry(storage_address(tensor)).or_insert(0) += 1;
    }
    uses
}

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

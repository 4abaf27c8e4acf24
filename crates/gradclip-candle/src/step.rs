//! A step of an optimizer on vars, with the clip folded in.

use std::sync::{Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Var};
use gradclip::{Clip, ClipReport, Clipper, DecidedStep, Dtype, Element, Optimizer, OptimizerState, TensorMut};
use rayon::prelude::*;

use crate::error::{Error, check, replaced};
use crate::gradients::{self, Gradient, gather, label, storage_address, values, with_elements, with_views};
use crate::vars::Vars;
use crate::write::CHUNK;

/// The state of an optimizer of these vars, for [`step`]: settings, the tensors that it keeps beside each var, and the number
/// of steps. For groups with settings of their own, [`OptimizerState::new`] takes views of the vars' elements.
///
/// # Errors
/// [`gradclip::Error::Setting`] for a setting out of bounds, as [`Error::Clip`]; [`Error::Device`] and [`Error::Dtype`] for a
/// var that cannot be stepped here.
pub fn optimizer_state(vars: &(impl Vars + ?Sized), optimizer: &Optimizer) -> Result<OptimizerState<'static>, Error> {
    let vars = vars.vars();
    for (i, (name, var)) in vars.iter().enumerate() {
        check_var(&label(*name, i), var)?;
    }
    Ok(with_views(&values(&vars), |views| optimizer.state(views))??)
}

/// Clips the gradients of these vars as described, and steps the vars by an optimizer, in one pass after the norm. The
/// gradients are read only: the store keeps its tensors. [`gradclip`'s page on optimizers](gradclip::Optimizer) has the updates.
///
/// The vars change in place, as by [`Var::set`], so their clones and views change too. The state is that of the same vars in the
/// same order ([`optimizer_state`]), and each has a gradient. A step that the clip skips changes nothing and does not count.
///
/// ```
/// use candle_core::{Device, Var};
/// use gradclip_candle::gradclip::{Clip, Optimizer};
///
/// let vars = [("w", Var::new(&[3f32, 4.], &Device::Cpu)?), ("b", Var::new(&[0.5f32], &Device::Cpu)?)];
/// let mut state = gradclip_candle::optimizer_state(&vars, &Optimizer::adamw(0.1))?;
/// let loss = || vars[0].1.sqr()?.sum_all()? + vars[1].1.sqr()?.sum_all()?;
/// let first = loss()?.to_scalar::<f32>()?;
/// for _ in 0..50 {
///     let grads = loss()?.backward()?;
///     gradclip_candle::step(&grads, &vars, &Clip::norm(1.0), &mut state)?;
/// }
/// assert_eq!(state.steps(), 50);
/// assert!(loss()?.to_scalar::<f32>()? < 0.1 * first);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Those of [`clip`](crate::clip). [`gradclip::Error::Tensor`] and [`gradclip::Error::OptimizerState`], as [`Error::Clip`], for
/// a var without a gradient, a var that is given twice, and a state of other vars or whose tensors are elsewhere. Vars and state
/// are then unchanged.
pub fn step(
    grads: &GradStore,
    vars: &(impl Vars + ?Sized),
    clip: &Clip,
    state: &mut OptimizerState<'_>,
) -> Result<ClipReport, Error> {
    let vars = vars.vars();
    let mut gradients = gather(grads, &vars)?;
    for (i, (name, var)) in vars.iter().enumerate() {
        check_var(&label(*name, i), var)?;
        let wrong = |reason: &str| gradclip::Error::Tensor { tensor: label(*name, i), reason: reason.into() };
        match gradients.get_mut(i) {
            Some(gradient) if gradient.number == i => {
                // It is read while the var is written.
                if storage_address(&gradient.tensor) == storage_address(var) {
                    gradient.tensor = gradient.tensor.force_contiguous()?;
                }
            }
            _ if vars[..i].iter().any(|(_, other)| other.id() == var.id()) => {
                return Err(wrong("it is given twice").into());
            }
            _ => return Err(wrong("it has no gradient: leave it out, and out of the state").into()),
        }
    }
    let decided = with_views(&gradients, |views| Clipper::cpu().decide(clip, views))?;
    let decided = decided.map_err(|error| gradients::explain(error, clip, &gradients))?;
    let report = decided.report();
    let before = state.steps();
    let step = state.decided(vec![decided])?;
    if step.is_skipped() {
        return Ok(report);
    }
    for (i, gradient) in gradients.iter().enumerate() {
        if let Err(error) = check_state(&step, i, gradient, state) {
            state.set_steps(before);
            return Err(error);
        }
    }
    for (i, gradient) in gradients.iter().enumerate() {
        let (storage, layout) = gradient.tensor.storage_and_layout();
        let tensors = Mutex::new(state.tensors_mut(i));
        gradient.var.inplace_op1(&Write { step: &step, parameter: i, gradient: bytes(&storage, layout)?, tensors })?;
    }
    Ok(report)
}

fn check_var(name: &str, var: &Var) -> Result<(), Error> {
    check(|| format!("the var {name:?}"), var)?;
    if var.is_contiguous() {
        return Ok(());
    }
    Err(gradclip::Error::Tensor { tensor: name.into(), reason: "the var is not contiguous".into() }.into())
}

/// Whether a step can be taken on a var: by a piece without elements.
fn check_state(
    step: &DecidedStep,
    i: usize,
    gradient: &Gradient<'_>,
    state: &mut OptimizerState<'_>,
) -> Result<(), Error> {
    let elements = gradient.tensor.elem_count();
    let mut tensors = state.tensors_mut(i);
    if let Some(tensor) = tensors.iter().find(|tensor| elements > 0 && !tensor.len().is_multiple_of(elements)) {
        let bytes = tensor.len();
        let message = format!("a tensor of {bytes} bytes is not of {elements} elements");
        return Err(gradclip::Error::OptimizerState(message).into());
    }
    let nothing = tensors.iter_mut().map(|tensor| &mut tensor[..0]);
    let (storage, _) = gradient.var.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err(replaced()) };
    with_elements!(storage, own => {
        let mut piece = Vec::from(&own[..0]);
        let read = gradclip::Tensor::new(&own[..0]);
        Ok(step.apply(i, 0, &mut TensorMut::new(&mut piece), &read, nothing)?)
    }, Err(replaced()))
}

/// The elements of a contiguous tensor.
fn bytes<'s>(storage: &'s Storage, layout: &Layout) -> Result<(Dtype, &'s [u8]), Error> {
    let (Storage::Cpu(storage), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        return Err(replaced());
    };
    with_elements!(storage, elements => {
        let elements = elements.get(start..end).ok_or_else(replaced)?;
        Ok((gradclip::Tensor::new(elements).dtype(), bytemuck::cast_slice(elements)))
    }, Err(replaced()))
}

/// Takes the step on one var.
struct Write<'s> {
    step: &'s DecidedStep,
    parameter: usize,
    gradient: (Dtype, &'s [u8]),
    /// Of the state. Taken once.
    tensors: Mutex<Vec<&'s mut [u8]>>,
}

impl Write<'_> {
    fn take<T: Element>(&self, elements: &mut [T]) -> Result<(), Error> {
        let count = elements.len();
        let tensors = std::mem::take(&mut *self.tensors.lock().unwrap_or_else(PoisonError::into_inner));
        let mut tensors: Vec<_> = tensors
            .into_iter()
            .map(|tensor| {
                let size = tensor.len() / count.max(1);
                tensor.chunks_mut((CHUNK * size).max(1))
            })
            .collect();
        let (dtype, gradient) = self.gradient;
        let chunks = elements.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK * dtype.size()));
        let pieces: Vec<_> = chunks
            .enumerate()
            .map(|(i, (elements, gradient))| {
                let tensors: Vec<_> = tensors.iter_mut().filter_map(Iterator::next).collect();
                ((i * CHUNK) as u64, elements, gradient, tensors)
            })
            .collect();
        pieces.into_par_iter().try_for_each(|(first, elements, gradient, tensors)| {
            let gradient = gradclip::Tensor::from_bytes(dtype, gradient)?;
            Ok(self.step.apply(self.parameter, first, &mut TensorMut::new(elements), &gradient, tensors)?)
        })
    }
}

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "step"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (start, end) = layout.contiguous_offsets().ok_or_else(replaced)?;
        with_elements!(storage, elements => {
            Ok(self.take(elements.get_mut(start..end).ok_or_else(replaced)?)?)
        }, Err(replaced().into()))
    }
}

//! The gradients of a store: checked, and viewed as tensors of the library.

use std::collections::{BTreeMap, HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{Layout, Storage, Tensor, Var};
use gradclip::{Clip, ClipReport};

use crate::error::{Error, check, replaced};

/// Calls `$body` with `$elements` standing for the vector in a storage; `$other` for dtypes that cannot be clipped.
macro_rules! with_elements {
    ($storage:expr, $elements:ident => $body:expr, $other:expr) => {
        match $storage {
            candle_core::CpuStorage::F16($elements) => $body,
            candle_core::CpuStorage::BF16($elements) => $body,
            candle_core::CpuStorage::F32($elements) => $body,
            candle_core::CpuStorage::F64($elements) => $body,
            _ => $other,
        }
    };
}
pub(crate) use with_elements;

/// A gradient to clip.
pub(crate) struct Gradient<'a> {
    /// The number of its var in the list of the caller.
    pub(crate) number: usize,
    /// Its name in reports and errors.
    name: String,
    pub(crate) var: &'a Var,
    /// The gradient, checked; or a contiguous copy of it.
    pub(crate) tensor: Tensor,
    /// The value of the var, contiguous, if adaptive gradient clipping can use it.
    parameter: Option<Tensor>,
}

/// The gradients that the store has, in the order of the vars.
pub(crate) fn gather<'a>(grads: &GradStore, vars: &[(Option<&str>, &'a Var)]) -> Result<Vec<Gradient<'a>>, Error> {
    let mut seen = HashSet::new();
    let mut gradients = Vec::new();
    for (number, &(name, var)) in vars.iter().enumerate() {
        if !seen.insert(var.id()) {
            continue;
        }
        let Some(gradient) = grads.get(var) else { continue };
        let name = label(name, number);
        let label = || format!("the gradient of {name:?}");
        check(label, gradient)?;
        if gradient.shape() != var.shape() {
            return Err(Error::Shape { tensor: label(), gradient: gradient.shape().clone(), var: var.shape().clone() });
        }
        let parameter = if check_parameter(&name, var).is_ok() { Some(var.contiguous()?) } else { None };
        gradients.push(Gradient { number, name, var, tensor: gradient.contiguous()?, parameter });
    }
    Ok(gradients)
}

/// The values of vars, in the place of gradients.
pub(crate) fn values<'a>(vars: &[(Option<&str>, &'a Var)]) -> Vec<Gradient<'a>> {
    let value = |(number, &(name, var)): (usize, &(Option<&str>, &'a Var))| Gradient {
        number,
        name: label(name, number),
        var,
        tensor: var.as_tensor().clone(),
        parameter: None,
    };
    vars.iter().enumerate().map(value).collect()
}

/// What a var is called.
pub(crate) fn label(name: Option<&str>, number: usize) -> String {
    name.map_or_else(|| format!("vars[{number}]"), str::to_owned)
}

fn check_parameter(name: &str, var: &Var) -> Result<(), Error> {
    check(|| format!("the var {name:?}"), var)
}

/// The address of a tensor's storage. Tensors that share a storage have the same.
pub(crate) fn storage_address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref(&*storage).addr()
}

/// Calls `f` with the library's views of the gradients.
pub(crate) fn with_views<R>(
    gradients: &[Gradient<'_>],
    f: impl FnOnce(&[gradclip::Tensor<'_>]) -> R,
) -> Result<R, Error> {
    let tensors =
        || gradients.iter().flat_map(|gradient| [Some(&gradient.tensor), gradient.parameter.as_ref()]).flatten();
    let addresses: HashMap<_, _> = tensors().map(|tensor| (tensor.id(), storage_address(tensor))).collect();
    // One lock for each storage: a second lock would wait for a writer that waits for the first. In the order of addresses, as
    // candle locks several, so that two threads do not wait for each other.
    let one_each: BTreeMap<_, _> = tensors().map(|tensor| (addresses[&tensor.id()], tensor)).collect();
    let locked: BTreeMap<_, _> =
        one_each.into_iter().map(|(address, tensor)| (address, tensor.storage_and_layout().0)).collect();
    let storage = |tensor: &Tensor| &locked[&addresses[&tensor.id()]];

    let mut parameters = Vec::new();
    for gradient in gradients {
        parameters.push(gradient.parameter.as_ref().map(|var| view(storage(var), var.layout())).transpose()?);
    }
    let mut views = Vec::new();
    for (gradient, parameter) in gradients.iter().zip(&parameters) {
        let tensor = view(storage(&gradient.tensor), gradient.tensor.layout())?.named(&gradient.name);
        views.push(match parameter {
            Some(parameter) => tensor.parameter(parameter),
            None => tensor,
        });
    }
    Ok(f(&views))
}

fn view<'s>(storage: &'s Storage, layout: &'s Layout) -> Result<gradclip::Tensor<'s>, Error> {
    let elements = match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => {
            with_elements!(storage, elements => elements.get(start..end).map(gradclip::Tensor::new), None)
        }
        _ => None,
    };
    Ok(elements.ok_or_else(replaced)?.shape(layout.dims())?)
}

/// The error of the library; or why a parameter that it needs was not usable.
pub(crate) fn explain(mut error: gradclip::Error, clip: &Clip, gradients: &[Gradient<'_>]) -> Error {
    if let gradclip::Error::NonFinite(found) = &mut error {
        found.tensor = gradients[found.tensor].number;
    }
    let lacking = gradients.iter().find_map(|gradient| check_parameter(&gradient.name, gradient.var).err());
    match (&error, lacking) {
        (gradclip::Error::Tensor { .. }, Some(lacking)) if clip.needs_parameters() => lacking,
        _ => error.into(),
    }
}

/// Replaces the numbers of tensors in a report by those of the vars of the caller.
pub(crate) fn renumber(report: &mut ClipReport, numbers: &[usize]) {
    let tensors = report.segments.iter_mut().filter_map(|segment| segment.tensor.as_mut());
    for number in tensors.chain(report.non_finite.as_mut().map(|found| &mut found.tensor)) {
        *number = numbers[*number];
    }
}

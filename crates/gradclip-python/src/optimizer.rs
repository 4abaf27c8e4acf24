//! Optimizers: the step of `torch.optim`, with the clip on its way.

use gradclip::{
    Algorithm, Clip, ClipReport, Clipper, DecidedClip, DecidedStep, Dtype, Error, Mode, NonFinite, OptimizerState,
    Scope, Tensor, TensorMut,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::call::merged;
use crate::clip;
use crate::error::{exception, unknown};
use crate::memory::{Described, Memory};
use crate::report::{Raw, raw};

/// An update with its settings, checked.
#[pyclass(frozen, module = "gradclip._gradclip")]
pub(crate) struct Optimizer(gradclip::Optimizer);

#[pymethods]
impl Optimizer {
    /// `algorithm` is a class of `torch.optim`. Settings have its names.
    #[new]
    #[pyo3(signature = (algorithm, *, lr, weight_decay, maximize=false, momentum=None, dampening=None, nesterov=false,
        lr_decay=None, initial_accumulator_value=None, alpha=None, centered=false, betas=None, amsgrad=false, eps=None))]
    #[expect(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "each is a setting with a name")]
    fn new(
        py: Python<'_>,
        algorithm: &str,
        lr: f64,
        weight_decay: f64,
        maximize: bool,
        momentum: Option<f64>,
        dampening: Option<f64>,
        nesterov: bool,
        lr_decay: Option<f64>,
        initial_accumulator_value: Option<f64>,
        alpha: Option<f64>,
        centered: bool,
        betas: Option<[f64; 2]>,
        amsgrad: bool,
        eps: Option<f64>,
    ) -> PyResult<Self> {
        let mut optimizer = match algorithm {
            "SGD" => gradclip::Optimizer::sgd(lr),
            "Adagrad" => gradclip::Optimizer::adagrad(lr),
            "RMSprop" => gradclip::Optimizer::rmsprop(lr),
            "Adam" => gradclip::Optimizer::adam(lr),
            "AdamW" => gradclip::Optimizer::adamw(lr),
            other => return Err(unknown("algorithm", other, &["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])),
        };
        optimizer.weight_decay = weight_decay;
        optimizer.maximize = maximize;
        optimizer.momentum = momentum.or(optimizer.momentum);
        optimizer.dampening = dampening.or(optimizer.dampening);
        optimizer.nesterov = nesterov;
        optimizer.lr_decay = lr_decay.or(optimizer.lr_decay);
        optimizer.initial_accumulator_value = initial_accumulator_value.or(optimizer.initial_accumulator_value);
        optimizer.alpha = alpha.or(optimizer.alpha);
        optimizer.centered = centered;
        optimizer.betas = betas.or(optimizer.betas);
        optimizer.amsgrad = amsgrad;
        optimizer.eps = eps.or(optimizer.eps);
        optimizer.check().map_err(|error| exception(py, &error))?;
        Ok(Self(optimizer))
    }

    /// The names of the tensors that are kept beside a parameter, in order. They are float64 for float64, else float32.
    fn state_tensors(&self) -> Vec<&'static str> {
        self.0.state_tensors(Dtype::F32).iter().map(|tensor| tensor.name).collect()
    }

    /// One line, without the settings that have their defaults.
    fn __repr__(&self) -> String {
        self.0.to_string()
    }
}

/// Clips and takes a step in one. `groups` has for each parameter the number of its optimizer, rising. `tensors` are the
/// parameters, then the state of each in order, and then for each a count of the steps that it has taken, unless
/// `counts` has that. The step is added to the counts. Gradients are only read.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "Python's arguments come so")]
pub(crate) fn step<'py>(
    py: Python<'py>,
    clip: &clip::Clip,
    optimizers: Vec<PyRef<'py, Optimizer>>,
    groups: Vec<usize>,
    counts: Option<Vec<u64>>,
    tensors: Described<'py>,
    grads: Described<'py>,
) -> PyResult<Raw<'py>> {
    let clip = clip.0;
    let optimizers: Vec<_> = optimizers.iter().map(|optimizer| optimizer.0).collect();
    let (mut memory, grads) = (Memory::of(tensors)?, Memory::of(grads)?);
    let unfit = || PyValueError::new_err("the parameters, their gradients and their state do not fit together");
    let count = groups.len();
    let known = groups.is_sorted() && groups.last().is_none_or(|last| *last < optimizers.len());
    let given = counts.as_ref().map_or(count, Vec::len);
    let counted = if counts.is_some() { 0 } else { count };
    if !known || given != count || grads.len() != count || memory.len() < count + counted {
        return Err(unfit());
    }
    let dtypes: Vec<_> = (0..memory.len()).map(|i| memory.dtype(i)).collect();
    let of_counters = &dtypes[dtypes.len() - counted..];
    let gradients = grads.tensors(py)?;
    let (mut parameters, _) = memory.bytes_mut(&[&grads])?;
    let counters = parameters.split_off(parameters.len() - counted);
    let counts = match counts {
        Some(counts) => counts,
        None => {
            let counts = groups.iter().zip(counters.iter().zip(of_counters)).map(|(group, (counter, dtype))| {
                let count = count_of(*dtype, counter)?;
                Some(if depends_on_count(&optimizers[*group]) { count } else { 0 })
            });
            counts.collect::<Option<Vec<_>>>().ok_or_else(unfit)?
        }
    };
    let mut rest = parameters.split_off(count).into_iter();
    let mut states = Vec::with_capacity(count);
    for ((group, dtype), parameter) in groups.iter().zip(&dtypes).zip(&parameters) {
        let kept = optimizers[*group].state_tensors(*dtype);
        let own: Vec<_> = rest.by_ref().take(kept.len()).collect();
        let elements = parameter.len() / dtype.size();
        if own.len() != kept.len() || own.iter().zip(&kept).any(|(own, kept)| own.len() != elements * kept.element_size)
        {
            return Err(unfit());
        }
        states.push(own);
    }
    if rest.next().is_some() {
        return Err(unfit());
    }
    let by_group: Vec<_> = (0..optimizers.len())
        .map(|group| groups.partition_point(|of| *of < group)..groups.partition_point(|of| *of <= group))
        .collect();
    let report = py.detach(|| {
        let views = dtypes.iter().zip(&parameters).map(|(dtype, bytes)| Tensor::from_bytes(*dtype, bytes));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        let groups =
            optimizers.iter().zip(by_group).map(|(optimizer, own)| (*optimizer, &views[own])).collect::<Vec<_>>();
        let mut ages = counts.clone();
        ages.sort_unstable();
        ages.dedup();
        if ages.len() < 2 {
            let mut state = OptimizerState::over(&groups, states)?;
            state.set_steps(ages.first().copied().unwrap_or(0));
            let step = state.decided(vec![decide(&clip, None, &gradients)?])?;
            let view = |(dtype, bytes): (&Dtype, _)| TensorMut::from_bytes(*dtype, bytes);
            let mut parameters = dtypes.iter().zip(parameters).map(view).collect::<Result<Vec<_>, _>>()?;
            step.apply_all(&mut state, &mut parameters, &gradients)?;
            return Ok(report(&clip, &[step]));
        }
        let steps = steps(&clip, &groups, &ages, &gradients)?;
        let whole = parameters.into_iter().zip(states).enumerate();
        let pieces = whole.flat_map(|(i, (bytes, state))| pieces(i, dtypes[i], bytes, &gradients[i], state));
        // All has been checked, so none fails.
        pieces.collect::<Vec<_>>().into_par_iter().try_for_each(
            |Piece { of, first, parameter, gradient, state }| {
                let step = &steps[ages.partition_point(|age| *age < counts[of])];
                let gradient = Tensor::from_bytes(gradients[of].dtype(), gradient)?;
                step.apply(of, first, &mut TensorMut::from_bytes(dtypes[of], parameter)?, &gradient, state)
            },
        )?;
        Ok(report(&clip, &steps))
    });
    let report = report.map_err(|error| exception(py, &error))?;
    if report.skipped.is_none() {
        counters.into_iter().zip(of_counters).for_each(|(counter, dtype)| add_one(*dtype, counter));
    }
    Ok(raw(py, &report))
}

/// Whether the update of an optimizer depends on how many steps it has taken.
fn depends_on_count(optimizer: &gradclip::Optimizer) -> bool {
    match optimizer.algorithm {
        Algorithm::Adam | Algorithm::AdamW => true,
        Algorithm::Adagrad => optimizer.lr_decay.is_some_and(|decay| decay != 0.0),
        _ => false,
    }
}

/// A count that Python keeps as a float.
fn count_of(dtype: Dtype, bytes: &[u8]) -> Option<u64> {
    match dtype {
        Dtype::F32 => Some(f32::from_ne_bytes(bytes.try_into().ok()?) as u64),
        Dtype::F64 => Some(f64::from_ne_bytes(bytes.try_into().ok()?) as u64),
        _ => None,
    }
}

fn add_one(dtype: Dtype, bytes: &mut [u8]) {
    let count = count_of(dtype, bytes).unwrap_or(0).saturating_add(1);
    match dtype {
        Dtype::F32 => bytes.copy_from_slice(&(count as f32).to_ne_bytes()),
        _ => bytes.copy_from_slice(&(count as f64).to_ne_bytes()),
    }
}

/// Consecutive elements of parameter number `of`, as bytes.
struct Piece<'a> {
    of: usize,
    first: u64,
    parameter: &'a mut [u8],
    gradient: &'a [u8],
    state: Vec<&'a mut [u8]>,
}

/// The pieces of a parameter, each of so many elements that a thread has enough to do.
fn pieces<'a>(
    of: usize,
    dtype: Dtype,
    parameter: &'a mut [u8],
    gradient: &'a Tensor<'a>,
    state: Vec<&'a mut [u8]>,
) -> impl Iterator<Item = Piece<'a>> {
    const LEN: usize = 128 * 1024;
    let wide = dtype.size().max(Dtype::F32.size());
    let mut state: Vec<_> = state.into_iter().map(|bytes| bytes.chunks_mut(LEN * wide)).collect();
    let gradients = gradient.bytes().chunks(LEN * gradient.dtype().size());
    parameter.chunks_mut(LEN * dtype.size()).zip(gradients).zip(0..).map(move |((parameter, gradient), i)| {
        let state = state.iter_mut().filter_map(Iterator::next).collect();
        Piece { of, first: i * LEN as u64, parameter, gradient, state }
    })
}

/// The step of each age, which is how many steps a parameter has taken. All have the same clip.
fn steps(
    clip: &Clip,
    groups: &[(gradclip::Optimizer, &[Tensor<'_>])],
    ages: &[u64],
    gradients: &[Tensor<'_>],
) -> Result<Vec<DecidedStep>, Error> {
    let mut steps: Vec<DecidedStep> = Vec::new();
    for age in ages {
        let first = steps.first().map(|step| step.reports().swap_remove(0));
        let decided = decide(clip, first.as_ref(), gradients)?;
        let mut state = OptimizerState::elsewhere(groups)?;
        state.set_steps(*age);
        steps.push(state.decided(vec![decided])?);
    }
    Ok(steps)
}

/// Decides a clip. `first` is the report of the same decision, if it was made before. Gradients are not read again if its
/// norm says all.
fn decide(clip: &Clip, first: Option<&ClipReport>, gradients: &[Tensor<'_>]) -> Result<DecidedClip, Error> {
    let known = |first: &&ClipReport| !first.has_non_finite() && first.total_norm.is_finite();
    match first.filter(known) {
        Some(first) if clip.scope == Scope::Global && !matches!(clip.mode, Mode::Value { .. }) => {
            Clipper::cpu().decide_scale(clip, &[first.total_norm], gradients)
        }
        _ => Clipper::cpu().decide(clip, gradients),
    }
}

/// The report of steps that have been taken.
fn report(clip: &Clip, steps: &[DecidedStep]) -> ClipReport {
    let mut all = steps[0].reports().swap_remove(0);
    // Then each step has counted what it met itself.
    let counted = matches!(clip.mode, Mode::Value { .. })
        && matches!(clip.non_finite, NonFinite::Propagate | NonFinite::Drop)
        && !clip.report_norm;
    let others = if counted { &steps[1..] } else { &[] };
    for other in others.iter().flat_map(DecidedStep::reports) {
        all.clipped |= other.clipped;
        all.non_finite = merged(all.non_finite.take(), other.non_finite);
    }
    all
}

//! What fuzzing runs. Each function takes any bytes, makes a case of them, and panics if the library breaks a promise.
//! The targets in `fuzz/` call them, and so does a test for each case in `fuzz/corpus`.

use arbitrary::{Result, Unstructured};

use crate::{Budget, Clip, Clipper, Dtype, Error, Mode, NonFinite, NormType, Scope, Tensor, TensorMut, UnitAxis};
#[cfg(feature = "safetensors")]
use crate::{Halves, Optimizer, OptimizerState};

#[cfg(feature = "gpu")]
pub use crate::gpu::tests::tables_hold::fuzz as tables;

/// The library's builder and CPU path: any settings, on any tensors.
pub fn builder(data: &[u8]) {
    // It fails if the bytes are too few for a case.
    let _ = builder_case(&mut Unstructured::new(data));
}

/// A typical number, or any bits.
fn number(u: &mut Unstructured<'_>) -> Result<f64> {
    const SOME: [f64; 14] = [
        0.0,
        -0.0,
        1.0,
        2.0,
        0.5,
        -1.0,
        1e-6,
        65536.0,
        1e300,
        f64::MIN_POSITIVE,
        5e-324,
        f64::MAX,
        f64::INFINITY,
        f64::NAN,
    ];
    if u.arbitrary()? { Ok(*u.choose(&SOME)?) } else { Ok(f64::from_bits(u.arbitrary()?)) }
}

/// A clip, and whether each of its settings is valid and used. Only then is the clip accepted.
fn clip(u: &mut Unstructured<'_>) -> Result<(Clip, bool)> {
    let (a, b) = (number(u)?, number(u)?);
    let finite = |x: f64| x >= 0.0 && x.is_finite();
    let (mut made, mut valid) = match u.int_in_range(0..=5)? {
        0 => (Clip::norm(a), a >= 0.0),
        1 => (Clip::rms(a), a >= 0.0),
        2 => (Clip::average_norm(a), a >= 0.0),
        3 => (Clip::agc(a), finite(a)),
        4 => (Clip::value(a), a >= 0.0),
        _ => (Clip::range(a, b), a <= b),
    };
    let (by_norm, by_agc) = (matches!(made.mode, Mode::Norm(_)), made.needs_parameters());
    let by_value = matches!(made.mode, Mode::Value { .. });
    // Settings that are not used are seldom set.
    let sets = |u: &mut Unstructured<'_>, is_used| if is_used { u.arbitrary() } else { u.ratio(1, 16) };
    if sets(u, by_norm || by_agc)? {
        let p = number(u)?;
        made = made.norm_type(NormType::p(p));
        valid &= p > 0.0 && (by_norm || by_agc || p == 2.0);
    }
    if sets(u, !by_value)? {
        let scopes = [Scope::Global, Scope::Tensor, Scope::Unit, Scope::Example, Scope::ExampleTensor];
        made = made.scope(*u.choose(&scopes)?);
        valid &= !by_value || made.scope == Scope::Global;
    }
    if sets(u, made.scope == Scope::Unit)? {
        let some = [u.int_in_range(-4..=4)?, u.int_in_range(-1..=1)?];
        let (axes, over) = (UnitAxis::axes(&some), UnitAxis::over(&some));
        made = made.unit_axis(*u.choose(&[UnitAxis::First, UnitAxis::Last, UnitAxis::Optax, axes, over])?);
        valid &= made.scope == Scope::Unit;
    }
    let shares = made.scope == Scope::ExampleTensor && !by_agc;
    if sets(u, shares)? {
        made = made.budget(*u.choose(&[Budget::Each, Budget::Uniform, Budget::Sized])?);
        valid &= shares || made.budget == Budget::Each;
    }
    if sets(u, by_norm)? {
        let eps = number(u)?;
        made = made.eps(eps);
        valid &= by_norm && finite(eps);
    }
    if u.ratio(1, 8)? {
        let above = number(u)?;
        made = made.skip_above(above);
        valid &= above >= 0.0 && (!by_value || above == f64::INFINITY);
    }
    if sets(u, by_value)? {
        made = made.report_norm(true);
        valid &= by_value;
    }
    if sets(u, by_agc)? {
        let eps = number(u)?;
        made = made.agc_eps(eps);
        valid &= by_agc && finite(eps);
    }
    if u.arbitrary()? {
        let scale = number(u)?;
        made = made.grad_scale(scale);
        valid &= scale.is_normal() && scale > 0.0;
    }
    if u.arbitrary()? {
        let policies = [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];
        made = made.non_finite(*u.choose(&policies)?);
    }
    let told = made.to_string();
    assert!(!told.is_empty() && told.lines().count() == 1, "{told}");
    Ok((made, valid))
}

/// Bytes of a tensor at some alignment, and its shape.
struct Owned {
    dtype: Dtype,
    shape: Vec<usize>,
    back: usize,
    bytes: Vec<u8>,
}

impl Owned {
    fn new(u: &mut Unstructured<'_>, shape: Vec<usize>) -> Result<Self> {
        let dtype = *u.choose(&[Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16])?;
        let back = u.int_in_range(0..=9)?;
        let mut bytes = vec![0; back + shape.iter().product::<usize>() * dtype.size()];
        // A short pattern, so that few bytes fill a large tensor.
        let pattern = u.bytes(u.len().min(24))?;
        for (byte, from) in bytes[back..].iter_mut().zip(pattern.iter().cycle()) {
            *byte = *from;
        }
        Ok(Self { dtype, shape, back, bytes })
    }

    fn view(&self) -> Tensor<'_> {
        let tensor = Tensor::from_bytes(self.dtype, &self.bytes[self.back..]).expect("whole elements");
        tensor.shape(&self.shape).expect("fits").named("t")
    }

    fn view_mut(&mut self) -> TensorMut<'_> {
        let tensor = TensorMut::from_bytes(self.dtype, &mut self.bytes[self.back..]).expect("whole elements");
        tensor.shape(&self.shape).expect("fits").named("t")
    }

    /// The bytes of each element, without the payload of a NaN.
    fn elements(&self) -> Vec<Option<&[u8]>> {
        let tensor = Tensor::from_bytes(self.dtype, &self.bytes[self.back..]).expect("whole elements");
        let is_nan = |x: &[u8]| match (self.dtype, x) {
            (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).is_nan(),
            (Dtype::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).is_nan(),
            (Dtype::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).is_nan(),
            (_, x) => f64::from_le_bytes(x.try_into().expect("eight bytes")).is_nan(),
        };
        let elements = self.bytes[self.back..].chunks(tensor.dtype().size());
        elements.map(|x| if is_nan(x) { None } else { Some(x) }).collect()
    }
}

fn shape(u: &mut Unstructured<'_>) -> Result<Vec<usize>> {
    let rank = u.int_in_range(0..=4)?;
    let most = [1, 300, 20, 8, 5][rank];
    (0..rank).map(|_| u.int_in_range(0..=most)).collect()
}

fn builder_case(u: &mut Unstructured<'_>) -> Result<()> {
    let (clip, valid) = clip(u)?;
    let mut tensors = Vec::new();
    let mut parameters = Vec::new();
    // Scopes by example need the same number everywhere.
    let examples = if u.arbitrary()? { Some(u.int_in_range(0..=5)?) } else { None };
    for _ in 0..u.int_in_range(0..=4)? {
        let mut shape = shape(u)?;
        if let (Some(first), Some(examples)) = (shape.first_mut(), examples) {
            *first = examples;
        }
        let others = if u.ratio(1, 8)? { self::shape(u)? } else { shape.clone() };
        parameters.push(if u.ratio(7, 8)? { Some(Owned::new(u, others)?) } else { None });
        tensors.push(Owned::new(u, shape)?);
    }
    let parameters: Vec<_> = parameters.iter().map(|p| p.as_ref().map(Owned::view)).collect();
    let before: Vec<_> = tensors.iter().map(|t| t.bytes.clone()).collect();
    let clipper = Clipper::cpu();

    let mut views: Vec<_> = tensors.iter().map(Owned::view).collect();
    for (view, parameter) in views.iter_mut().zip(&parameters) {
        if let Some(parameter) = parameter {
            *view = view.parameter(parameter);
        }
    }
    let measured = clipper.measure(&clip, &views);
    let is_refused = matches!(measured, Err(Error::Setting { .. }));
    assert!(is_refused != valid, "{clip:?}: {measured:?}");
    let decided = clipper.decide(&clip, &views);
    sums(u, &clip, &views)?;
    let norms: Vec<_> = (0..u.int_in_range(0..=6)?).map(|_| number(u)).collect::<Result<_>>()?;

    let mut views: Vec<_> = tensors.iter_mut().map(Owned::view_mut).collect();
    for (view, parameter) in views.iter_mut().zip(&parameters) {
        if let Some(parameter) = parameter {
            *view = std::mem::replace(view, TensorMut::new::<f32>(&mut [])).parameter(parameter);
        }
    }
    let applied = clipper.apply(&clip, &mut views);
    drop(views);
    let changed = tensors.iter().zip(&before).any(|(t, before)| t.bytes != *before);
    match &applied {
        Ok(report) => {
            assert!(report.total_norm.is_nan() || report.total_norm >= 0.0, "{report:?}");
            assert!(report.clip_coef.is_nan() || (0.0..=1.0).contains(&report.clip_coef), "{report:?}");
            assert_eq!(report.elements, tensors.iter().map(|t| t.elements().len() as u64).sum::<u64>());
            // Elements that are neither clipped, scaled nor replaced keep every bit.
            let replaces = report.non_finite.is_some() && clip.non_finite != NonFinite::Skip;
            assert!(!changed || report.skipped.is_none(), "{clip:?}: {report:?}");
            assert!(!changed || report.clipped || clip.grad_scale != 1.0 || replaces, "{clip:?}: {report:?}");
            assert!(tensors.iter().zip(&before).all(|(t, before)| t.bytes[..t.back] == before[..t.back]));
            if let Ok(measured) = &measured {
                assert_eq!(measured.total_norm.to_bits(), report.total_norm.to_bits(), "{clip:?}");
            }
            let decided = decided.expect("what is applied is decided");
            for (i, (tensor, before)) in tensors.iter().zip(before).enumerate() {
                let mut copy = Owned { bytes: before, shape: tensor.shape.clone(), ..*tensor };
                let size = tensor.dtype.size();
                let step = size * u.int_in_range(1..=40)?;
                let pieces = copy.bytes[copy.back..].chunks_mut(step).zip((0..).step_by(step / size));
                for (piece, first) in pieces {
                    let mut piece = TensorMut::from_bytes(tensor.dtype, piece).expect("whole elements");
                    decided.apply(i, first, &mut piece).expect("it is a piece of it");
                }
                assert!(copy.elements() == tensor.elements(), "{clip:?} in pieces: {:?}", tensor.shape);
            }
            assert_eq!(format!("{:?}", decided.report()), format!("{report:?}"));
        }
        Err(error) => {
            assert!(!changed, "{error} after something was written");
            assert!(!error.to_string().is_empty() && error.to_string().lines().count() == 1);
        }
    }

    // Clips by any number of norms from outside.
    let now: Vec<_> = tensors.iter().map(|t| t.bytes.clone()).collect();
    let mut views: Vec<_> = tensors.iter_mut().map(Owned::view_mut).collect();
    if let Err(error) = clipper.scale(&clip, &norms, &mut views) {
        assert!(!error.to_string().is_empty());
        drop(views);
        assert!(tensors.iter().zip(&now).all(|(t, now)| t.bytes == *now), "{error} after something was written");
    }
    Ok(())
}

/// Sums examples into tensors that mostly fit.
fn sums(u: &mut Unstructured<'_>, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<()> {
    let mut sums = Vec::new();
    for tensor in tensors {
        let mut shape = tensor.spec.shape.unwrap_or_default().get(1..).unwrap_or_default().to_vec();
        if u.ratio(1, 16)? {
            shape.push(2);
        }
        let wide = if tensor.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        let bytes = vec![0x55; shape.iter().product::<usize>() * wide.size()];
        sums.push(Owned { dtype: wide, shape, back: 0, bytes });
    }
    let mut views: Vec<_> = sums.iter_mut().map(Owned::view_mut).collect();
    if let Err(error) = Clipper::cpu().sum_examples(clip, tensors, &mut views) {
        assert!(!error.to_string().is_empty());
        drop(views);
        assert!(sums.iter().all(|sum| sum.bytes.iter().all(|byte| *byte == 0x55)), "{error} after a sum was written");
    }
    Ok(())
}

/// Saved states of optimizers, with changes anywhere. What is restored is saved as it was read, and steps can follow.
#[cfg(feature = "safetensors")]
pub fn state(data: &[u8]) {
    let _ = state_case(&mut Unstructured::new(data));
}

#[cfg(feature = "safetensors")]
fn state_case(u: &mut Unstructured<'_>) -> Result<()> {
    let (a, b) = (number(u)?, number(u)?);
    let halves = *u.choose(&[Halves::Rounded, Halves::Remainder, Halves::Master])?;
    let optimizer = match u.int_in_range(0..=4)? {
        0 => Optimizer::sgd(a).momentum(b).nesterov(u.arbitrary()?),
        1 => Optimizer::adagrad(a).initial_accumulator_value(b),
        2 => Optimizer::rmsprop(a).momentum(b).centered(u.arbitrary()?),
        3 => Optimizer::adam(a).eps(b).amsgrad(u.arbitrary()?),
        _ => Optimizer::adamw(a).weight_decay(b).maximize(u.arbitrary()?),
    }
    .halves(halves);
    let mut tensors = Vec::new();
    for _ in 0..u.int_in_range(0..=3)? {
        let shape = shape(u)?;
        tensors.push(Owned::new(u, shape)?);
    }
    let names = ["a", "b", "c"];
    let views: Vec<_> = tensors.iter().zip(names).map(|(t, name)| t.view().named(name)).collect();
    let Ok(mut state) = OptimizerState::new(&[(optimizer, &views)]) else {
        let float16 = tensors.iter().any(|t| t.dtype == Dtype::F16);
        assert!(optimizer.check().is_err() || (float16 && halves == Halves::Remainder), "{optimizer}");
        return Ok(());
    };
    let mut bytes = state.to_safetensors().expect("names differ");
    for _ in 0..u.int_in_range(0..=4)? {
        let at = u.choose_index(bytes.len())?;
        match u.int_in_range(0..=3)? {
            0 => bytes.truncate(at.max(1)),
            1 => bytes.insert(at, u.arbitrary()?),
            _ => bytes[at] = u.arbitrary()?,
        }
    }
    let held = |state: &mut OptimizerState<'_>| {
        let mut kept = Vec::new();
        for i in 0..names.len() {
            kept.extend(state.tensors_mut(i).into_iter().map(|tensor| tensor.to_vec()));
        }
        (kept, state.steps(), state.optimizers().to_vec())
    };
    let before = held(&mut state);
    let result = state.restore_safetensors(&bytes);
    let after = held(&mut state);
    if let Err(error) = result {
        assert!(!error.to_string().is_empty() && error.to_string().lines().count() == 1);
        assert_eq!(before, after, "{error} after something was restored");
        return Ok(());
    }
    let again = state.to_safetensors().expect("it was saved before");
    state.restore_safetensors(&again).expect("just saved");
    assert_eq!(held(&mut state), after, "{optimizer}");
    let constant =
        |t: &Owned| Owned { shape: t.shape.clone(), back: 0, bytes: vec![0x3c; t.bytes.len() - t.back], ..*t };
    let gradients: Vec<_> = tensors.iter().map(constant).collect();
    let gradients: Vec<_> = gradients.iter().zip(names).map(|(t, name)| t.view().named(name)).collect();
    let mut views: Vec<_> = tensors.iter_mut().zip(names).map(|(t, name)| t.view_mut().named(name)).collect();
    Clipper::cpu().step(&Clip::norm(1.0), &mut state, &mut views, &gradients).expect("what is restored can be used");
    assert_eq!(state.steps(), after.1.saturating_add(1));
    Ok(())
}

#[cfg(test)]
#[path = "../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
#[path = "tests/fuzzing.rs"]
mod tests;

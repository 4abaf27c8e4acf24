//! What fuzzing runs: each function takes any bytes, makes a case of them, and panics if the library breaks a promise. The
//! targets in `fuzz/` call them, and so does a test, for each case in `fuzz/corpus`.

use arbitrary::{Result, Unstructured};

use crate::{Budget, Clip, Clipper, Dtype, Error, NonFinite, NormType, Scope, Tensor, TensorMut, UnitAxis};

#[cfg(feature = "gpu")]
pub use crate::gpu::tables_hold::fuzz as tables;

/// The library's builder and CPU path: any parameters, on any tensors.
pub fn builder(data: &[u8]) {
    // An error is that the bytes are too few for a case.
    let _ = builder_case(&mut Unstructured::new(data));
}

/// A number that means something, or any bits.
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

/// Checks that a parameter is taken exactly if it should be.
fn taken<T>(made: std::result::Result<T, Error>, value: f64, valid: bool) -> Option<T> {
    match made {
        Ok(made) => {
            assert!(valid, "{value} was taken");
            Some(made)
        }
        Err(error) => {
            assert!(!valid && matches!(error, Error::BadParameter { .. } | Error::BadRange { .. }), "{value}: {error}");
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// A clip; None if a parameter was refused, and rightly.
fn clip(u: &mut Unstructured<'_>) -> Result<Option<Clip>> {
    let (a, b) = (number(u)?, number(u)?);
    let threshold = a >= 0.0;
    let finite = |x: f64| x >= 0.0 && x.is_finite();
    let made = match u.int_in_range(0..=5)? {
        0 => taken(Clip::norm(a), a, threshold),
        1 => taken(Clip::rms(a), a, threshold),
        2 => taken(Clip::average_norm(a), a, threshold),
        3 => taken(Clip::agc(a), a, finite(a)),
        4 => taken(Clip::value(a), a, threshold),
        _ => taken(Clip::range(a, b), a, a <= b),
    };
    let Some(mut made) = made else { return Ok(None) };
    if u.arbitrary()? {
        let p = number(u)?;
        let Some(norm_type) = taken(NormType::p(p), p, p > 0.0) else { return Ok(None) };
        assert!(norm_type.power() > 0.0);
        made = made.norm_type(norm_type);
    }
    if u.arbitrary()? {
        let scopes = [Scope::Global, Scope::Tensor, Scope::Unit, Scope::Example, Scope::ExampleTensor];
        made = made.scope(*u.choose(&scopes)?);
    }
    if u.arbitrary()? {
        made = made.unit_axis(*u.choose(&[UnitAxis::First, UnitAxis::Last])?);
    }
    if u.arbitrary()? {
        made = made.budget(*u.choose(&[Budget::Each, Budget::Uniform, Budget::Sized])?);
    }
    if u.arbitrary()? {
        let eps = number(u)?;
        let Some(with) = taken(made.eps(eps), eps, finite(eps)) else { return Ok(None) };
        made = with;
    }
    if u.arbitrary()? {
        let eps = number(u)?;
        let Some(with) = taken(made.agc_eps(eps), eps, finite(eps)) else { return Ok(None) };
        made = with;
    }
    if u.arbitrary()? {
        let scale = number(u)?;
        let Some(with) = taken(made.grad_scale(scale), scale, scale.is_normal() && scale > 0.0) else {
            return Ok(None);
        };
        made = with;
    }
    if u.arbitrary()? {
        let policies = [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];
        made = made.non_finite(*u.choose(&policies)?);
    }
    Ok(Some(made))
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

    /// The bytes of each element, but for the payload of a NaN.
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
    let rank = u.int_in_range(0..=3)?;
    let most = [1, 300, 20, 8][rank];
    (0..rank).map(|_| u.int_in_range(0..=most)).collect()
}

fn builder_case(u: &mut Unstructured<'_>) -> Result<()> {
    let Some(clip) = clip(u)? else { return Ok(()) };
    let mut tensors = Vec::new();
    let mut parameters = Vec::new();
    // Scopes by example want the same number everywhere.
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
            // What is neither clipped, scaled nor replaced keeps every bit.
            let replaces = report.non_finite.is_some() && clip.non_finite != NonFinite::Skip;
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

    // By norms from outside, however many.
    let now: Vec<_> = tensors.iter().map(|t| t.bytes.clone()).collect();
    let mut views: Vec<_> = tensors.iter_mut().map(Owned::view_mut).collect();
    if let Err(error) = clipper.scale(&clip, &norms, &mut views) {
        assert!(!error.to_string().is_empty());
        drop(views);
        assert!(tensors.iter().zip(&now).all(|(t, now)| t.bytes == *now), "{error} after something was written");
    }
    Ok(())
}

/// Sums of examples, into tensors that fit more often than not.
fn sums(u: &mut Unstructured<'_>, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<()> {
    let mut sums = Vec::new();
    for tensor in tensors {
        let mut shape = tensor.shape.unwrap_or_default().get(1..).unwrap_or_default().to_vec();
        if u.ratio(1, 16)? {
            shape.push(2);
        }
        let wide = if tensor.dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
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

#[cfg(test)]
#[path = "../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    const ROOT: &str = env!("CARGO_MANIFEST_DIR");

    #[test]
    fn builder_holds_on_its_corpus() {
        replay(ROOT, "builder", super::builder);
    }

    #[test]
    #[cfg(feature = "gpu")]
    fn tables_hold_on_their_corpus() {
        replay(ROOT, "tables", super::tables);
    }
}

//! Made gradients for `gradclip verify`: sets of tensors with all that is awkward, from a seed.

use gradclip::gpu::GpuClipper;
use gradclip::{Budget, Clipper, Dtype, NonFinite, NormType, Scope, Tensor, UnitAxis, Verification};
use half::{bf16, f16};

use crate::failure::Failure;
use crate::input::with_parameters;
use crate::spec::{Mode, Spec};

/// Lengths at which kernels change their ways, and a few that need many workgroups.
const LENGTHS: [usize; 16] = [0, 1, 2, 3, 4, 5, 31, 255, 256, 257, 1023, 4096, 4097, 65_535, 65_537, 300_001];

/// Sizes of a dimension behind others.
const INNER: [usize; 8] = [1, 2, 3, 31, 64, 255, 257, 1000];

/// Gradients and how to clip them.
#[derive(Debug)]
pub(crate) struct Case {
    gradients: Vec<Made>,
    /// One for each gradient if the clip needs them.
    parameters: Vec<Made>,
    pub(crate) spec: Spec,
}

/// One made tensor.
#[derive(Debug)]
struct Made {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Case {
    /// The case of a number; the same for the same seed.
    pub(crate) fn new(seed: u64, number: u64) -> Result<Self, Failure> {
        let mut random = SplitMix64(seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(number));
        let mut spec = spec(&mut random)?;
        let examples = spec.by_example().then(|| random.choose(&[1, 2, 7, 32]));
        let non_finite = random.below(4) == 0;
        let shapes: Vec<_> = (0..random.below(9)).map(|_| shape(&mut random, examples)).collect();
        let mut made = |non_finite| -> Vec<_> {
            let each = shapes.iter().enumerate();
            each.map(|(i, shape)| Made::new(&mut random, i, shape, non_finite)).collect()
        };
        let gradients = made(non_finite);
        let parameters = if let Mode::Agc(_) = spec.mode { made(false) } else { Vec::new() };
        spec.mode = threshold(&mut random, &spec, &views(&gradients)?, &views(&parameters)?)?;
        Ok(Self { gradients, parameters, spec })
    }

    /// Clips on both.
    pub(crate) fn verify(&self, gpu: &GpuClipper) -> Result<Verification, Failure> {
        let parameters = views(&self.parameters)?;
        let gradients = with_parameters(views(&self.gradients)?, &parameters);
        Ok(gradclip::verify_blocking(&self.spec.clip()?, &gradients, gpu)?)
    }
}

fn views(tensors: &[Made]) -> Result<Vec<Tensor<'_>>, gradclip::Error> {
    tensors.iter().map(Made::view).collect()
}

/// Of one of the lengths, or somewhat less, with one to three dimensions; the first of so many examples.
fn shape(random: &mut SplitMix64, examples: Option<usize>) -> Vec<usize> {
    let inner: Vec<_> = (0..random.below(3)).map(|_| random.choose(&INNER)).collect();
    let length = random.choose(&LENGTHS);
    match examples {
        Some(examples) => [examples, length / examples].into_iter().chain(inner.first().map(|_| 1)).collect(),
        None => [length / inner.iter().product::<usize>()].into_iter().chain(inner).collect(),
    }
}

impl Made {
    fn view(&self) -> Result<Tensor<'_>, gradclip::Error> {
        Tensor::from_bytes(self.dtype, &self.bytes)?.named(&self.name).shape(&self.shape)
    }

    fn new(random: &mut SplitMix64, number: usize, shape: &[usize], non_finite: bool) -> Self {
        let dtype = random.choose(&[Dtype::F32, Dtype::F16, Dtype::BF16]);
        let magnitude = match dtype {
            Dtype::F16 => random.choose(&[1.0, 1e-3, 1e3]),
            _ => random.choose(&[1.0, 1e-3, 1e3, 1e20, 1e-25]),
        };
        let mut values: Vec<_> = (0..shape.iter().product()).map(|_| magnitude * random.signed()).collect();
        if non_finite && !values.is_empty() && random.below(2) == 0 {
            let place = random.below(values.len() as u64) as usize;
            values[place] = random.choose(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        }
        let bytes = match dtype {
            Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        Self { name: format!("made.{number}"), dtype, shape: shape.to_vec(), bytes }
    }
}

/// A clip of any kind, but for its threshold.
fn spec(random: &mut SplitMix64) -> Result<Spec, Failure> {
    let norm = Mode::Norm(0.0);
    let modes = [
        norm,
        norm,
        norm,
        Mode::Rms(0.0),
        Mode::AverageNorm(0.0),
        Mode::Agc(0.0),
        Mode::Value(0.0),
        Mode::Range((0.0, 0.0)),
    ];
    let mode = random.choose(&modes);
    let mut spec = Spec::new(mode);
    spec.scope = match mode {
        Mode::Value(_) | Mode::Range(_) => Scope::Global,
        Mode::Agc(_) => random.choose(&[Scope::Unit, Scope::Unit, Scope::Tensor, Scope::Global]),
        _ => random.choose(&[
            Scope::Global,
            Scope::Global,
            Scope::Tensor,
            Scope::Unit,
            Scope::Example,
            Scope::ExampleTensor,
        ]),
    };
    match spec.scope {
        Scope::Unit => spec.unit_axis = Some(random.choose(&[UnitAxis::First, UnitAxis::Last])),
        Scope::ExampleTensor => spec.budget = random.choose(&[Budget::Each, Budget::Uniform, Budget::Sized]),
        _ => {}
    }
    if let Mode::Norm(_) = mode {
        let (l2, l1) = (NormType::L2, NormType::L1);
        spec.norm_type = random.choose(&[l2, l2, l1, NormType::Inf, NormType::p(1.5)?, NormType::p(3.0)?]);
        spec.eps = (random.below(2) == 0).then_some(0.0);
    }
    spec.grad_scale = random.choose(&[1.0, 1.0, 65_536.0, 3.0]);
    let policies = [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];
    spec.non_finite = Some(random.choose(&policies));
    Ok(spec)
}

/// The mode with a threshold that lies somewhere around what these tensors hold.
fn threshold(
    random: &mut SplitMix64,
    spec: &Spec,
    gradients: &[Tensor<'_>],
    parameters: &[Tensor<'_>],
) -> Result<Mode, Failure> {
    let largest = || size(gradients, Spec { norm_type: NormType::Inf, mode: Mode::Norm(0.0), ..*spec });
    let part = random.choose(&[0.0, 1e-3, 0.1, 0.5, 0.9, 2.0]);
    // Of a norm of 0, infinity would be NaN.
    let norm = || Ok::<_, Failure>(size(gradients, *spec)?.max(f64::MIN_POSITIVE));
    let part_or_all = if random.below(7) == 0 { f64::INFINITY } else { part };
    Ok(match spec.mode {
        Mode::Norm(_) => Mode::Norm(part_or_all * norm()?),
        Mode::Rms(_) => Mode::Rms(part_or_all * norm()?),
        Mode::AverageNorm(_) => Mode::AverageNorm(part_or_all * norm()?),
        Mode::Agc(_) => Mode::Agc(part * norm()? / size(parameters, Spec { grad_scale: 1.0, ..*spec })?.max(1e-3)),
        Mode::Value(_) => Mode::Value(part * largest()?),
        Mode::Range(_) => Mode::Range((-part * largest()?, 0.1 * largest()?)),
    })
}

/// The largest norm that the finite elements have in any segment, on the CPU.
pub(crate) fn size(tensors: &[Tensor<'_>], spec: Spec) -> Result<f64, Failure> {
    let spec = Spec { non_finite: Some(NonFinite::Drop), ..spec.measuring() };
    let report = Clipper::cpu().measure(&spec.clip()?, tensors)?;
    let norms = report.segments.iter().map(|segment| segment.norm);
    Ok(if report.segments.is_empty() { report.total_norm } else { norms.fold(0.0, f64::max) })
}

/// Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..n`; the slight bias does not matter here.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Uniform in -1..1.
    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

//! Generated gradients, on which GPU and CPU are compared: sets of tensors with awkward shapes and values, from a seed.

use gradclip::{Budget, Clip, Clipper, Dtype, Error, Mode, NonFinite, NormType, Scope, Tensor, UnitAxis};
use half::{bf16, f16};

use crate::description::{by_example, measuring};

/// Lengths at which kernels take another path, and a few that need many workgroups.
const LENGTHS: [usize; 16] = [0, 1, 2, 3, 4, 5, 31, 255, 256, 257, 1023, 4096, 4097, 65_535, 65_537, 300_001];

/// Sizes of the dimensions after the first.
const INNER: [usize; 8] = [1, 2, 3, 31, 64, 255, 257, 1000];

/// Gradients and a clip of them.
#[derive(Debug)]
pub struct TestCase {
    gradients: Vec<GeneratedTensor>,
    /// One for each gradient if the clip needs them.
    parameters: Vec<GeneratedTensor>,
    /// The clip.
    pub clip: Clip,
}

/// One generated tensor.
#[derive(Debug)]
struct GeneratedTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl TestCase {
    /// The case with this number; it depends on seed and number alone.
    ///
    /// # Errors
    /// None: what is generated is valid.
    pub fn new(seed: u64, number: u64) -> Result<Self, Error> {
        let mut random = SplitMix64(seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(number));
        let mut clip = clip(&mut random);
        let examples = by_example(&clip).then(|| random.choose(&[1, 2, 7, 32]));
        let non_finite = random.below(4) == 0;
        let shapes: Vec<_> = (0..random.below(9)).map(|_| shape(&mut random, examples)).collect();
        let mut generate = |non_finite| -> Vec<_> {
            let each = shapes.iter().enumerate();
            each.map(|(i, shape)| GeneratedTensor::new(&mut random, i, shape, non_finite)).collect()
        };
        let gradients = generate(non_finite);
        let parameters = if clip.needs_parameters() { generate(false) } else { Vec::new() };
        clip.mode = threshold(&mut random, &clip, &views(&gradients)?, &views(&parameters)?)?;
        Ok(Self { gradients, parameters, clip })
    }

    /// The parameters of the gradients, if the clip needs them.
    ///
    /// # Errors
    /// None: what is generated is valid.
    pub fn parameters(&self) -> Result<Vec<Tensor<'_>>, Error> {
        views(&self.parameters)
    }

    /// The gradients, with their parameters.
    ///
    /// # Errors
    /// None: what is generated is valid.
    pub fn gradients<'a>(&'a self, parameters: &'a [Tensor<'a>]) -> Result<Vec<Tensor<'a>>, Error> {
        Ok(with_parameters(views(&self.gradients)?, parameters))
    }
}

/// Gives each gradient its parameter, if there are any.
#[must_use]
pub fn with_parameters<'a>(mut gradients: Vec<Tensor<'a>>, parameters: &'a [Tensor<'a>]) -> Vec<Tensor<'a>> {
    for (gradient, parameter) in gradients.iter_mut().zip(parameters) {
        *gradient = gradient.parameter(parameter);
    }
    gradients
}

fn views(tensors: &[GeneratedTensor]) -> Result<Vec<Tensor<'_>>, Error> {
    tensors.iter().map(GeneratedTensor::view).collect()
}

/// A shape of one to three dimensions with about one of the lengths; dimension 0 has the number of examples, if given.
fn shape(random: &mut SplitMix64, examples: Option<usize>) -> Vec<usize> {
    let inner: Vec<_> = (0..random.below(3)).map(|_| random.choose(&INNER)).collect();
    let length = random.choose(&LENGTHS);
    match examples {
        Some(examples) => [examples, length / examples].into_iter().chain(inner.first().map(|_| 1)).collect(),
        None => [length / inner.iter().product::<usize>()].into_iter().chain(inner).collect(),
    }
}

impl GeneratedTensor {
    fn view(&self) -> Result<Tensor<'_>, Error> {
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
        Self { name: format!("generated.{number}"), dtype, shape: shape.to_vec(), bytes }
    }
}

/// A clip of any kind, without its threshold.
fn clip(random: &mut SplitMix64) -> Clip {
    use Scope::{Example, ExampleTensor, Global, Unit};
    let (norm, rms, average, agc) = (Clip::norm(0.0), Clip::rms(0.0), Clip::average_norm(0.0), Clip::agc(0.0));
    let modes = [norm, norm, norm, rms, average, agc, Clip::value(0.0), Clip::range(-1.0, 0.0)];
    let mut clip = random.choose(&modes);
    clip.scope = match clip.mode {
        Mode::Value { .. } => Global,
        Mode::Agc(_) => random.choose(&[Unit, Unit, Scope::Tensor, Global]),
        _ => random.choose(&[Global, Global, Scope::Tensor, Unit, Example, ExampleTensor]),
    };
    match clip.scope {
        Unit => {
            let axes = [UnitAxis::First, UnitAxis::Last, UnitAxis::Optax, UnitAxis::axes(&[0, -1])];
            clip.unit_axis = Some(random.choose(&axes));
        }
        ExampleTensor => clip.budget = random.choose(&[Budget::Each, Budget::Uniform, Budget::Sized]),
        _ => {}
    }
    if let Mode::Norm(_) | Mode::Agc(_) = clip.mode {
        let (l2, l1) = (NormType::L2, NormType::L1);
        clip.norm_type = random.choose(&[l2, l2, l1, NormType::Inf, NormType::p(1.5), NormType::p(3.0)]);
    }
    if let (Mode::Norm(_), 0) = (clip.mode, random.below(2)) {
        clip = clip.eps(0.0);
    }
    let policies = [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];
    clip.grad_scale(random.choose(&[1.0, 1.0, 65_536.0, 3.0])).non_finite(random.choose(&policies))
}

/// The mode with a threshold near the norms of these tensors.
fn threshold(
    random: &mut SplitMix64,
    clip: &Clip,
    gradients: &[Tensor<'_>],
    parameters: &[Tensor<'_>],
) -> Result<Mode, Error> {
    let largest = || largest_norm(gradients, Clip::norm(0.0).norm_type(NormType::Inf).grad_scale(clip.grad_scale));
    let part = random.choose(&[0.0, 1e-3, 0.1, 0.5, 0.9, 2.0]);
    // Of a norm of 0, infinity would be NaN.
    let norm = || Ok::<_, Error>(largest_norm(gradients, *clip)?.max(f64::MIN_POSITIVE));
    let part_or_all = if random.below(7) == 0 { f64::INFINITY } else { part };
    Ok(match clip.mode {
        Mode::Rms(_) => Mode::Rms(part_or_all * norm()?),
        Mode::AverageNorm(_) => Mode::AverageNorm(part_or_all * norm()?),
        Mode::Agc(_) => Mode::Agc(part * norm()? / largest_norm(parameters, clip.grad_scale(1.0))?.max(1e-3)),
        Mode::Value { max: 0.0, min: -1.0 } => Mode::Value { min: -part * largest()?, max: 0.1 * largest()? },
        Mode::Value { .. } => Mode::Value { min: -part * largest()?, max: part * largest()? },
        _ => Mode::Norm(part_or_all * norm()?),
    })
}

/// The largest norm of any segment, of its finite elements, on the CPU.
///
/// # Errors
/// Those of [`Clipper::measure`].
pub fn largest_norm(tensors: &[Tensor<'_>], clip: Clip) -> Result<f64, Error> {
    let report = Clipper::cpu().measure(&measuring(clip).non_finite(NonFinite::Drop), tensors)?;
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

    /// A number in `0..n`; the slight bias does not matter here.
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

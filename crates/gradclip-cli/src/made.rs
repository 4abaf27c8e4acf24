//! Made gradients for `gradclip verify`: sets of tensors with all that is awkward, from a seed.

use gradclip::{Clipper, Dtype, NonFinite, NormType, Tensor};
use half::{bf16, f16};

use crate::failure::Failure;
use crate::spec::{Mode, Spec};

/// Lengths at which kernels change their ways, and a few that need many workgroups.
const LENGTHS: [u64; 16] = [0, 1, 2, 3, 4, 5, 31, 255, 256, 257, 1023, 4096, 4097, 65_535, 65_537, 300_001];

/// Gradients and how to clip them.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) tensors: Vec<Made>,
    pub(crate) spec: Spec,
}

/// One made tensor.
#[derive(Debug)]
pub(crate) struct Made {
    name: String,
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl Case {
    /// The case of a number; the same for the same seed.
    pub(crate) fn new(seed: u64, number: u64) -> Result<Self, Failure> {
        let mut random = SplitMix64(seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(number));
        let non_finite = random.below(4) == 0;
        let tensors: Vec<_> = (0..random.below(9)).map(|i| Made::new(&mut random, i, non_finite)).collect();
        let spec = spec(&mut random, &views(&tensors)?)?;
        Ok(Self { tensors, spec })
    }

    pub(crate) fn views(&self) -> Result<Vec<Tensor<'_>>, gradclip::Error> {
        views(&self.tensors)
    }
}

fn views(tensors: &[Made]) -> Result<Vec<Tensor<'_>>, gradclip::Error> {
    tensors.iter().map(|made| Ok(Tensor::from_bytes(made.dtype, &made.bytes)?.named(&made.name))).collect()
}

impl Made {
    fn new(random: &mut SplitMix64, number: u64, non_finite: bool) -> Self {
        let dtype = random.choose(&[Dtype::F32, Dtype::F16, Dtype::BF16]);
        let magnitude = match dtype {
            Dtype::F16 => random.choose(&[1.0, 1e-3, 1e3]),
            _ => random.choose(&[1.0, 1e-3, 1e3, 1e20, 1e-25]),
        };
        let mut values: Vec<_> = (0..random.choose(&LENGTHS)).map(|_| magnitude * random.signed()).collect();
        if non_finite && !values.is_empty() && random.below(2) == 0 {
            let place = random.below(values.len() as u64) as usize;
            values[place] = random.choose(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        }
        let bytes = match dtype {
            Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        Self { name: format!("made.{number}"), dtype, bytes }
    }
}

/// A clip whose threshold lies somewhere around what these tensors hold.
fn spec(random: &mut SplitMix64, tensors: &[Tensor<'_>]) -> Result<Spec, Failure> {
    let norm_type = random.choose(&[NormType::L2, NormType::L1, NormType::Inf]);
    let grad_scale = random.choose(&[1.0, 1.0, 65_536.0, 3.0]);
    let of_norm = random.choose(&[0.0, 1e-3, 0.1, 0.5, 0.9, 2.0, f64::INFINITY]);
    let size = |norm_type| size(tensors, norm_type, grad_scale);
    let mode = match random.below(4) {
        // Of a norm of 0, infinity would be NaN.
        0 | 1 => Mode::Norm(of_norm * size(norm_type)?.max(f64::MIN_POSITIVE)),
        2 => Mode::Value(random.choose(&[0.0, 0.1, 0.5, 2.0]) * size(NormType::Inf)?),
        _ => Mode::Range((-0.5 * size(NormType::Inf)?, 0.1 * size(NormType::Inf)?)),
    };
    let eps = (matches!(mode, Mode::Norm(_)) && random.below(2) == 0).then_some(0.0);
    let policy = [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];
    let non_finite = Some(random.choose(&policy));
    Ok(Spec { norm_type, eps, grad_scale, non_finite, ..Spec::new(mode) })
}

/// The norm of the finite elements, on the CPU.
pub(crate) fn size(tensors: &[Tensor<'_>], norm_type: NormType, grad_scale: f64) -> Result<f64, Failure> {
    let spec = Spec { non_finite: Some(NonFinite::Drop), ..Spec::measuring(norm_type, grad_scale) };
    Ok(Clipper::cpu().measure(&spec.clip()?, tensors)?.total_norm)
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

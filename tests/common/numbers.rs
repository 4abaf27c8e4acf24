//! Numbers: a generator, exact norms, and rounding written differently from the library's.

use gradclip::{Dtype, NormType};

/// SplitMix64: small, fast and the same everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in 0..1.
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normal, by Box and Muller.
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub(crate) fn normals(&mut self, n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|_| self.normal() * scale).collect()
    }
}

/// A sum with Neumaier's compensation. For terms of one sign it is right to the last bits at any length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    sum: f64,
    lost: f64,
}

impl Sum {
    pub(crate) fn add(&mut self, x: f64) {
        let sum = self.sum + x;
        self.lost += if self.sum.abs() >= x.abs() { (self.sum - sum) + x } else { (x - sum) + self.sum };
        self.sum = sum;
    }

    pub(crate) fn total(self) -> f64 {
        self.sum + self.lost
    }
}

/// The norm of the finite numbers among these.
pub(crate) fn exact_norm(norm_type: NormType, numbers: impl Iterator<Item = f64> + Clone) -> f64 {
    let finite = numbers.filter(|x| x.is_finite());
    let max = finite.clone().fold(0.0, |max: f64, x| max.max(x.abs()));
    if max == 0.0 || norm_type == NormType::Inf {
        return max;
    }
    let mut sum = Sum::default();
    if !matches!(norm_type, NormType::L1 | NormType::L2) {
        // Scales by the largest, so that no term exceeds 1 for any p.
        let p = norm_type.power();
        for x in finite {
            sum.add((x.abs() / max).powf(p));
        }
        // In two steps: the root alone may leave the range where the norm does not.
        let root = sum.total().powf(0.5 / p);
        return max * root * root;
    }
    // Scales by powers of two, in two steps, so that neither the scale nor a scaled number leaves the range.
    let exponent = exponent(max);
    let (half, rest) = (exponent / 2, exponent - exponent / 2);
    let (by_half, by_rest) = (power_of_two(-half), power_of_two(-rest));
    for x in finite {
        let x = x.abs() * by_half * by_rest;
        sum.add(if norm_type == NormType::L1 { x } else { x * x });
    }
    let norm = if norm_type == NormType::L1 { sum.total() } else { sum.total().sqrt() };
    norm * power_of_two(half) * power_of_two(rest)
}

/// 2 to a power within the normal range. It is much cheaper than `powi`, and most of the tests' arithmetic needs it.
fn power_of_two(exponent: i32) -> f64 {
    assert!((-1022..=1023).contains(&exponent), "2^{exponent} is no normal number");
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// floor(log2(|x|)) of a finite number that is not 0.
pub(crate) fn exponent(x: f64) -> i32 {
    let (x, lifted) = if x.abs() < f64::MIN_POSITIVE { (x * power_of_two(64), -64) } else { (x, 0) };
    ((x.abs().to_bits() >> 52) as i32) - 1023 + lifted
}

/// (bits of the fraction, exponent of the smallest normal number, largest finite number)
fn format(dtype: Dtype) -> (i32, i32, f64) {
    match dtype {
        Dtype::F16 => (10, -14, 65504.0),
        Dtype::BF16 => (7, -126, f64::from(f32::from_bits(0x7f7f_0000))),
        Dtype::F32 => (23, -126, f64::from(f32::MAX)),
        _ => (52, -1022, f64::MAX),
    }
}

/// The distance between two neighbours of a dtype at `x`.
pub(crate) fn ulp(dtype: Dtype, x: f64) -> f64 {
    let (fraction, smallest, _) = format(dtype);
    let at = if x == 0.0 || !x.is_finite() { smallest } else { exponent(x).max(smallest) };
    // In two steps: the smallest float64 is not a normal power of two.
    power_of_two(at) * power_of_two(-fraction)
}

pub(crate) fn smallest_normal(dtype: Dtype) -> f64 {
    power_of_two(format(dtype).1)
}

/// Rounds to nearest even.
pub(crate) fn rounded(dtype: Dtype, x: f64) -> f64 {
    if dtype == Dtype::F64 || x == 0.0 || !x.is_finite() {
        return x;
    }
    let (_, _, max) = format(dtype);
    let ulp = ulp(dtype, x);
    let rounded = (x / ulp).round_ties_even() * ulp;
    if rounded.abs() > max { f64::INFINITY.copysign(x) } else { rounded }
}

/// The bits of a number rounded to a dtype. NaN becomes the quiet NaN.
pub(crate) fn rounded_bits(dtype: Dtype, x: f64) -> u64 {
    if dtype == Dtype::F64 {
        return x.to_bits();
    }
    // The rest is exact: a rounded half is a float32, and a bfloat16 its upper half.
    let x = rounded(dtype, x);
    let single = (x as f32).to_bits();
    match dtype {
        Dtype::F32 => u64::from(single),
        Dtype::BF16 => u64::from(single >> 16),
        _ => {
            let sign = u64::from(single >> 31) << 15;
            let magnitude = x.abs();
            sign | if x.is_nan() {
                0x7e00
            } else if x.is_infinite() {
                0x7c00
            } else if magnitude < power_of_two(-14) {
                (magnitude * power_of_two(24)) as u64
            } else {
                let at = exponent(magnitude);
                ((at + 15) as u64) << 10 | ((magnitude * power_of_two(-at) - 1.0) * 1024.0) as u64
            }
        }
    }
}

/// The number with these bits.
pub(crate) fn from_bits(dtype: Dtype, bits: u64) -> f64 {
    match dtype {
        Dtype::F64 => f64::from_bits(bits),
        Dtype::F32 => f64::from(f32::from_bits(bits as u32)),
        Dtype::BF16 => f64::from(f32::from_bits((bits as u32) << 16)),
        _ => {
            let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
            let (biased, fraction) = ((bits >> 10 & 0x1f) as i32, (bits & 0x3ff) as f64);
            match biased {
                31 if fraction == 0.0 => sign * f64::INFINITY,
                31 => f64::NAN,
                0 => sign * fraction * power_of_two(-24),
                _ => sign * (1.0 + fraction / 1024.0) * power_of_two(biased - 15),
            }
        }
    }
}

/// The result of multiplying `x` of a dtype by `factor` in float32 (float64 for float64), rounded once.
pub(crate) fn multiplied_bits(dtype: Dtype, x: f64, factor: f64) -> u64 {
    let product = if dtype == Dtype::F64 { x * factor } else { f64::from(x as f32 * factor as f32) };
    rounded_bits(dtype, product)
}

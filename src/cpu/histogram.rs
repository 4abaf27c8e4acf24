//! Counts elements by magnitude: a histogram by powers of two, and what narrower formats would lose.
//!
//! Exponents and comparisons are those of float64, which holds every element exactly. So one loop serves all dtypes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::element::{Widen, elements};
use super::pool::in_parallel;
use super::tuning::CHUNK;
use crate::Tensor;
use crate::dtype::with_element;
use crate::report::LostElements;

/// The magnitudes of a tensor's elements: [`Tensor::histogram`](crate::Tensor::histogram).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Histogram {
    /// How many elements are 0 or -0.
    pub zeros: u64,
    /// How many are NaN or infinite. They count nowhere else.
    pub non_finite: u64,
    /// For each exponent e that occurs, how many magnitudes are at least 2^e and below 2^(e + 1).
    pub by_exponent: BTreeMap<i32, u64>,
    /// What rounding to float16 would lose. Rounding is to nearest, ties to even.
    pub float16: LostElements,
    /// What rounding to bfloat16 would lose.
    pub bfloat16: LostElements,
    /// What rounding to the 8-bit float E4M3 would lose, whose largest number is 448.
    pub float8_e4m3: LostElements,
    /// What rounding to the 8-bit float E5M2 would lose, whose largest number is 57344.
    pub float8_e5m2: LostElements,
}

/// For each format, in the order of [`Histogram::lost`]: half of its smallest number, and the least magnitude that rounds to more
/// than its largest number. A tie at the former goes to 0. A tie at the latter goes up, but in E4M3 down to 448.
const BOUNDS: [(f64, f64); 4] = [
    (power_of_two(-25), 65_520.0),
    (power_of_two(-134), power_of_two(128) - power_of_two(119)),
    (power_of_two(-10), 464f64.next_up()),
    (power_of_two(-17), 61_440.0),
];

const fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent) as u64) << 52)
}

impl Histogram {
    /// Adds the counts of another tensor.
    pub fn add(&mut self, other: &Self) {
        self.zeros += other.zeros;
        self.non_finite += other.non_finite;
        for (exponent, count) in &other.by_exponent {
            *self.by_exponent.entry(*exponent).or_default() += count;
        }
        let mut other = other.clone();
        for (own, more) in self.lost().into_iter().zip(other.lost()) {
            *own = own.and(*more);
        }
    }

    fn lost(&mut self) -> [&mut LostElements; 4] {
        [&mut self.float16, &mut self.bfloat16, &mut self.float8_e4m3, &mut self.float8_e5m2]
    }
}

impl Tensor<'_> {
    /// Counts elements by magnitude, and those that narrower formats would turn into 0 or cannot hold, in one sweep on
    /// rayon's current pool.
    ///
    /// ```
    /// let found = gradclip::Tensor::new(&[0.0f32, 0.75, -0.5, 1e-9, 1e5]).histogram();
    /// assert_eq!((found.zeros, found.by_exponent[&-1]), (1, 2));
    /// assert_eq!((found.float16.zero, found.float16.infinite, found.bfloat16.zero), (1, 1, 0));
    /// ```
    #[must_use]
    pub fn histogram(&self) -> Histogram {
        let all = Mutex::new(Histogram::default());
        let chunks = self.data.chunks(CHUNK * self.spec.dtype.size());
        in_parallel(chunks, self.len().div_ceil(CHUNK), self.data.len(), |chunk| {
            let counts = with_element!(self.spec.dtype, T => count::<T>(chunk));
            all.lock().unwrap_or_else(PoisonError::into_inner).add(&counts);
        });
        all.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The counts of a chunk.
fn count<T: Widen>(data: &[u8]) -> Histogram {
    let mut found = Histogram::default();
    // By the exponent's bits; a chunk has fewer than 2^32 elements.
    let mut exponents = [0u32; 2048];
    let (mut lost, mut infinite) = ([[0u64; 2]; 4], 0);
    for x in elements::<T>(data) {
        let magnitude = Into::<f64>::into(x.wide()).abs();
        let bits = magnitude.to_bits();
        exponents[(bits >> 52) as usize] += 1;
        if bits < 1 << 52 {
            match bits.checked_ilog2() {
                None => found.zeros += 1,
                // A subnormal number of float64.
                Some(power) => *found.by_exponent.entry(power as i32 - 1074).or_default() += 1,
            }
        }
        infinite += u64::from(magnitude == f64::INFINITY);
        for ([to_zero, overflow], (half, above)) in lost.iter_mut().zip(BOUNDS) {
            *to_zero += u64::from(magnitude <= half);
            *overflow += u64::from(magnitude >= above);
        }
    }
    found.non_finite = exponents[2047].into();
    let normal = (0..).zip(exponents).skip(1).take(2046).filter(|(_, count)| *count > 0);
    found.by_exponent.extend(normal.map(|(biased, count)| (biased - 1023, u64::from(count))));
    let zeros = found.zeros;
    for (found, [to_zero, overflow]) in found.lost().into_iter().zip(lost) {
        *found = LostElements { zero: to_zero - zeros, infinite: overflow - infinite };
    }
    found
}

#[cfg(test)]
#[path = "tests/histogram.rs"]
mod tests;

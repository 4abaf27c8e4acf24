//! The norm of a chunk, in one read.
//!
//! Elements are summed in float64 in 16 lanes, block by block. Squares of float32 values neither overflow nor underflow
//! in float64, so the sum of a block is finite exactly if every element is: NaN and infinity cost nothing to detect,
//! and only a block that has them is walked again to count and locate them. Float64 sums may overflow or underflow by
//! themselves; a block whose sum leaves 1e±270 is summed again, scaled by the power of two of its largest element.

use super::block::{Wide, Widen, for_blocks};
use crate::NormType;
use crate::partial::{Location, Partial, ldexp};

const LANES: usize = 16;

pub(super) fn norm<T: Widen>(norm_type: NormType, at: Location, data: &[u8]) -> Partial {
    let mut chunk = Partial::EMPTY;
    for_blocks::<T>(data, |index, block| {
        let partial = of_finite(norm_type, block).unwrap_or_else(|| {
            let at = Location { index: at.index + index, ..at };
            let finite: Vec<_> = block.iter().map(|x| if x.is_finite() { *x } else { Wide::ZERO }).collect();
            non_finite(at, block).merge(of_finite(norm_type, &finite).unwrap_or(Partial::EMPTY))
        });
        chunk = chunk.merge(partial);
    });
    chunk
}

/// The partial of a block, or None if an element is not finite.
fn of_finite<W: Wide>(norm_type: NormType, block: &[W]) -> Option<Partial> {
    if norm_type == NormType::Inf {
        return Some(Partial { max: W::max_abs(block)?, ..Partial::EMPTY });
    }
    let (sum, exponent) = if norm_type == NormType::L1 { W::sum_abs(block)? } else { W::sum_squares(block)? };
    Some(Partial { sum, exponent, ..Partial::EMPTY })
}

/// Counts and locates the non-finite elements of a block whose first element is at `at`.
pub(super) fn non_finite<W: Wide>(at: Location, block: &[W]) -> Partial {
    let bad = || block.iter().enumerate().filter(|(_, x)| !x.is_finite());
    Partial {
        non_finite: bad().count() as u64,
        nan: bad().any(|(_, x)| x.is_nan()),
        first: bad().next().map(|(i, _)| Location { index: at.index + i as u64, ..at }),
        ..Partial::EMPTY
    }
}

/// Σ term(x) in [`LANES`] lanes, which add up in a fixed order.
fn sum<W: Copy>(xs: &[W], term: impl Fn(W) -> f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let (groups, rest) = xs.as_chunks::<LANES>();
    for group in groups {
        for (lane, x) in lanes.iter_mut().zip(group) {
            *lane += term(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += term(*x);
    }
    lanes.iter().sum()
}

impl Wide for f32 {
    const ZERO: Self = 0.0;
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    fn is_nan(self) -> bool {
        self.is_nan()
    }
    fn scaled(self, factor: f32) -> f32 {
        self * factor
    }
    fn factor(factor: f64) -> Option<f32> {
        let narrow = factor as f32;
        (narrow.is_normal() || factor == 0.0 || factor.is_nan()).then_some(narrow)
    }
    fn scaled_by_any(self, factor: f64) -> f32 {
        (f64::from(self) * factor) as f32
    }
    fn sum_squares(xs: &[f32]) -> Option<(f64, i32)> {
        let sum = sum(xs, |x| f64::from(x) * f64::from(x));
        sum.is_finite().then_some((sum, 0))
    }
    fn sum_abs(xs: &[f32]) -> Option<(f64, i32)> {
        let sum = sum(xs, |x| f64::from(x.abs()));
        sum.is_finite().then_some((sum, 0))
    }
    fn max_abs(xs: &[f32]) -> Option<f64> {
        // Magnitudes order like their bits, and everything that is not finite comes after everything that is.
        let max = f32::from_bits(xs.iter().fold(0, |max, x| max.max(x.to_bits() & (u32::MAX >> 1))));
        max.is_finite().then_some(f64::from(max))
    }
}

/// Sums outside this range (and not 0) are taken again, scaled. Inside it, 2^64 of them add up without overflow, and
/// what underflowed is below 2^-100 of the sum.
const SAFE: std::ops::RangeInclusive<f64> = 1e-270..=1e270;

impl Wide for f64 {
    const ZERO: Self = 0.0;
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    fn is_nan(self) -> bool {
        self.is_nan()
    }
    fn scaled(self, factor: f64) -> f64 {
        self * factor
    }
    fn factor(factor: f64) -> Option<f64> {
        Some(factor)
    }
    fn scaled_by_any(self, factor: f64) -> f64 {
        self * factor
    }
    fn sum_squares(xs: &[f64]) -> Option<(f64, i32)> {
        let direct = sum(xs, |x| x * x);
        if SAFE.contains(&direct) {
            return Some((direct, 0));
        }
        let exponent = exponent_of(f64::max_abs(xs)?);
        let scaled = sum(xs, |x| {
            let x = ldexp(x, -exponent);
            x * x
        });
        Some((scaled, 2 * exponent))
    }
    fn sum_abs(xs: &[f64]) -> Option<(f64, i32)> {
        let direct = sum(xs, f64::abs);
        if SAFE.contains(&direct) {
            return Some((direct, 0));
        }
        let exponent = exponent_of(f64::max_abs(xs)?);
        Some((sum(xs, |x| ldexp(x.abs(), -exponent)), exponent))
    }
    fn max_abs(xs: &[f64]) -> Option<f64> {
        let max = f64::from_bits(xs.iter().fold(0, |max, x| max.max(x.to_bits() & (u64::MAX >> 1))));
        max.is_finite().then_some(max)
    }
}

/// The exponent of a finite magnitude; for subnormals that of the smallest normal.
fn exponent_of(x: f64) -> i32 {
    ((x.to_bits() >> 52) as i32 - 1023).max(-1022)
}

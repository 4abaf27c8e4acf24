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

/// Calls `$body` with `$term` standing for |x|^p, in a form that the compiler can make vectors of where there is one.
macro_rules! with_term {
    ($norm_type:expr, $term:ident => $body:expr) => {
        match $norm_type.power() {
            1.0 => {
                let $term = |x: f64| x.abs();
                $body
            }
            2.0 => {
                let $term = |x: f64| x * x;
                $body
            }
            3.0 => {
                let $term = |x: f64| x.abs() * (x * x);
                $body
            }
            4.0 => {
                let $term = |x: f64| (x * x) * (x * x);
                $body
            }
            0.5 => {
                let $term = |x: f64| x.abs().sqrt();
                $body
            }
            p => {
                let $term = |x: f64| x.abs().powf(p);
                $body
            }
        }
    };
}
pub(super) use with_term;

pub(super) fn norm<T: Widen>(norm_type: NormType, at: Location, data: &[u8]) -> Partial {
    let mut chunk = Partial::EMPTY;
    for_blocks::<T>(data, |index, block| {
        let place = |i: usize| Location { index: at.index + index + i as u64, ..at };
        chunk = chunk.merge(of_finite_or_not(norm_type, block, place));
    });
    chunk
}

/// The partial of elements, of which number i is at `place(i)`.
pub(super) fn of_finite_or_not<W: Wide>(
    norm_type: NormType,
    block: &[W],
    place: impl Fn(usize) -> Location,
) -> Partial {
    of_finite(norm_type, block).unwrap_or_else(|| {
        let finite: Vec<_> = block.iter().map(|x| if x.is_finite() { *x } else { Wide::ZERO }).collect();
        non_finite(block, place).merge(of_finite(norm_type, &finite).unwrap_or(Partial::EMPTY))
    })
}

/// The partial of a block, or None if an element is not finite.
fn of_finite<W: Wide>(norm_type: NormType, block: &[W]) -> Option<Partial> {
    if norm_type == NormType::Inf {
        return Some(Partial { max: W::max_abs(block)?, ..Partial::EMPTY });
    }
    let direct = with_term!(norm_type, term => sum(block, |x| term(x.into())));
    if W::trusts(norm_type, direct) {
        return Some(Partial { sum: direct, ..Partial::EMPTY });
    }
    let top = W::max_abs(block)?;
    let (sum, exponent) = if top == 0.0 {
        (0.0, 0)
    } else if let NormType::P(power) = norm_type {
        // By the largest element itself, so that its term is 1 whatever p is.
        let p = power.get();
        let scaled = sum(block, |x| (x.into().abs() / top).powf(p));
        let log2 = top.log2() * p;
        (scaled * (log2 - log2.floor()).exp2(), log2.floor() as i64)
    } else {
        let exponent = exponent_of(top);
        let scaled = with_term!(norm_type, term => sum(block, |x| term(ldexp(x.into(), -exponent))));
        (scaled, if norm_type == NormType::L2 { 2 * exponent } else { exponent })
    };
    Some(Partial { sum, exponent, ..Partial::EMPTY })
}

/// Counts and locates the non-finite elements among those of which number i is at `place(i)`.
pub(super) fn non_finite<W: Wide>(block: &[W], place: impl Fn(usize) -> Location) -> Partial {
    let bad = || block.iter().enumerate().filter(|(_, x)| !x.is_finite());
    Partial {
        non_finite: bad().count() as u64,
        nan: bad().any(|(_, x)| x.is_nan()),
        first: bad().next().map(|(i, _)| place(i)),
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

/// Sums of float64 or of powers outside this range (and 0) are taken again, scaled. Inside it, 2^64 of them add up
/// without overflow, and what underflowed is below 2^-100 of the sum.
const SAFE: std::ops::RangeInclusive<f64> = 1e-270..=1e270;

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
    fn trusts(norm_type: NormType, sum: f64) -> bool {
        // Neither squares nor absolute values of float32 leave the range of float64.
        if matches!(norm_type, NormType::P(_)) { SAFE.contains(&sum) } else { sum.is_finite() }
    }
    fn max_abs(xs: &[f32]) -> Option<f64> {
        // Magnitudes order like their bits, and everything that is not finite comes after everything that is.
        let max = f32::from_bits(xs.iter().fold(0, |max, x| max.max(x.to_bits() & (u32::MAX >> 1))));
        max.is_finite().then_some(f64::from(max))
    }
}

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
    fn trusts(norm_type: NormType, sum: f64) -> bool {
        if norm_type == NormType::Inf { sum.is_finite() } else { SAFE.contains(&sum) }
    }
    fn max_abs(xs: &[f64]) -> Option<f64> {
        let max = f64::from_bits(xs.iter().fold(0, |max, x| max.max(x.to_bits() & (u64::MAX >> 1))));
        max.is_finite().then_some(max)
    }
}

/// The exponent of a finite magnitude; for subnormals that of the smallest normal.
fn exponent_of(x: f64) -> i64 {
    ((x.to_bits() >> 52) as i64 - 1023).max(-1022)
}

//! |x|^p, term by term: in closed form if there is one, else without tables, branches and calls. Twin of
//! `shaders/shared/power.wgsl`.

use super::element::{Lanes, Wide, Widen};
use super::isa::{Isa, LANES};
use super::map::Map;

macro_rules! terms {
    ($($(#[$doc:meta])* $term:ident: |$self:ident, $isa:ident, $x:ident| $body:expr;)*) => {
        $(impl<T: Widen> Map<T> for $term {
            type To = f64;
            #[inline(always)]
            fn of<I: Isa>($self, $isa: I, x: Lanes<I, T>) -> I::D {
                let $x = T::Wide::to_f64($isa, x);
                $body
            }
        })*
    };
}

#[derive(Clone, Copy)]
pub(super) struct Magnitude;
#[derive(Clone, Copy)]
pub(super) struct Square;
#[derive(Clone, Copy)]
pub(super) struct Cube;
#[derive(Clone, Copy)]
pub(super) struct Fourth;
#[derive(Clone, Copy)]
pub(super) struct Root;

/// 2^(p (log2|x| - log2_top)): |x|^p relative to that of the largest |x|.
///
/// The logarithm is within 2^-50 of the truth absolutely, the power relatively. A p-norm divides both by p again, so
/// the norm loses 2^-50 (1 + 1/p).
#[derive(Clone, Copy)]
pub(super) struct Power {
    pub(super) p: f64,
    pub(super) log2_top: f64,
}

impl<T: Widen> Map<T> for Square {
    type To = T::Squares;
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, x: Lanes<I, T>) -> Lanes<I, T::Squares> {
        T::square(isa, x)
    }
}

terms! {
    Magnitude: |self, isa, x| isa.abs(x);
    Cube: |self, isa, x| isa.mul(isa.abs(x), isa.mul(x, x));
    Fourth: |self, isa, x| isa.mul(isa.mul(x, x), isa.mul(x, x));
    Root: |self, isa, x| isa.sqrt(isa.abs(x));
    Power: |self, isa, x| power(isa, isa.abs(x), self.p, self.log2_top);
}

#[inline(always)]
fn all<I: Isa>(isa: I, number: f64) -> I::D {
    isa.d([number; LANES])
}

#[inline(always)]
fn all_bits<I: Isa>(isa: I, bits: u64) -> I::D {
    all(isa, f64::from_bits(bits))
}

/// |x|^p relative to the top: 0 for 0, and NaN for what is not finite.
#[inline(always)]
fn power<I: Isa>(isa: I, x: I::D, p: f64, log2_top: f64) -> I::D {
    let exponent = isa.mul(all(isa, p), isa.sub(log2(isa, x), all(isa, log2_top)));
    let finite = isa.if_less(x, all(isa, f64::INFINITY), exp2(isa, exponent), all(isa, f64::NAN));
    // A NaN is neither above 0 nor below 1.
    isa.if_less(all(isa, 0.0), x, finite, isa.if_less(x, all(isa, 1.0), all(isa, 0.0), all(isa, f64::NAN)))
}

/// 2^52: added to it, smaller integers stand in the last bits.
const INTEGER: f64 = 4_503_599_627_370_496.0;

/// The logarithm of positive finite numbers.
#[inline(always)]
fn log2<I: Isa>(isa: I, x: I::D) -> I::D {
    // Subnormals are scaled up, so that their exponent is in its place.
    let smallest = all(isa, f64::MIN_POSITIVE);
    let lift = isa.if_less(x, smallest, all(isa, 54.0), all(isa, 0.0));
    let x = isa.if_less(x, smallest, isa.mul(x, all(isa, (1u64 << 54) as f64)), x);
    // x = 2^exponent m with m from sqrt(1/2) to sqrt(2). So bits count from those of sqrt(1/2), and the exponent is
    // 1024 more.
    const FROM: u64 = std::f64::consts::FRAC_1_SQRT_2.to_bits();
    let counted = isa.add_bits(x, all_bits(isa, (1u64 << 62).wrapping_sub(FROM)));
    let m = isa.add_bits(isa.and_bits(counted, all_bits(isa, (1 << 52) - 1)), all_bits(isa, FROM));
    let exponent = isa.sub(isa.or_bits(isa.down_52(counted), all(isa, INTEGER)), all(isa, INTEGER + 1024.0));
    // ln m = 2 artanh s = 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| < 0.1716.
    let s = isa.div(isa.sub(m, all(isa, 1.0)), isa.add(m, all(isa, 1.0)));
    let t = isa.mul(s, s);
    let mut series = all(isa, 1.0 / 19.0);
    for denominator in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = isa.add(isa.mul(series, t), all(isa, 1.0 / denominator));
    }
    let fraction = isa.mul(isa.mul(s, series), all(isa, 2.0 * std::f64::consts::LOG2_E));
    isa.add(isa.sub(exponent, lift), fraction)
}

/// 1/13! down to 1/0!.
const FACTORIALS: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// 2^x: 0 below the normal range, infinity above it.
#[inline(always)]
fn exp2<I: Isa>(isa: I, x: I::D) -> I::D {
    let (low, high) = (all(isa, -1023.0), all(isa, 1024.0));
    let x = isa.if_less(x, low, low, isa.if_less(high, x, high, x));
    // Adding 1.5 * 2^52 rounds to the nearest integer.
    const ROUND: f64 = 1.5 * INTEGER;
    let whole = isa.sub(isa.add(x, all(isa, ROUND)), all(isa, ROUND));
    // 2^fraction = e^(fraction ln 2), by its series: the 14th term is below 2^-60.
    let y = isa.mul(isa.sub(x, whole), all(isa, std::f64::consts::LN_2));
    let mut series = all(isa, FACTORIALS[0]);
    for one_over_factorial in &FACTORIALS[1..] {
        series = isa.add(isa.mul(series, y), all(isa, *one_over_factorial));
    }
    // A biased exponent from 0 to 2047: the ends make 0 and infinity.
    isa.mul(series, isa.up_52(isa.add(whole, all(isa, ROUND + 1023.0))))
}

#[cfg(test)]
#[path = "tests/power.rs"]
mod tests;

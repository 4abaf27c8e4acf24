//! Twin of `shaders/shared/number.wgsl`: numbers with a 32-bit mantissa and an exponent of their own.

use bytemuck::{Pod, Zeroable};

use crate::magnitude::ldexp;

/// `mantissa * 2^exponent`; the mantissa's top bit is set unless the number is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Number {
    pub(super) mantissa: u32,
    pub(super) exponent: i32,
}

impl Number {
    /// The product of two finite, non-negative numbers, rounded to 32 bits. It cannot overflow.
    pub(super) fn product(a: f64, b: f64) -> Self {
        let ((a, a_exponent), (b, b_exponent)) = (split(a), split(b));
        Self::of(a * b, a_exponent + b_exponent)
    }

    /// 1 / a for a finite number above 0.
    pub(super) fn reciprocal(a: f64) -> Self {
        let (a, exponent) = split(a);
        Self::of(1.0 / a, -exponent)
    }

    /// `x * 2^exponent` for a finite, non-negative x, rounded to 32 bits.
    pub(super) fn of(x: f64, exponent: i32) -> Self {
        let (mantissa, own_exponent) = split(x);
        if mantissa == 0.0 {
            return Self::default();
        }
        let scaled = (mantissa * 2f64.powi(31)).round_ties_even();
        // Rounding may carry into the 33rd bit.
        let (scaled, carry) = if scaled >= 2f64.powi(32) { (scaled / 2.0, 1) } else { (scaled, 0) };
        Self { mantissa: scaled as u32, exponent: exponent + own_exponent - 31 + carry }
    }

    pub(super) fn to_f64(self) -> f64 {
        ldexp(f64::from(self.mantissa), self.exponent.into())
    }
}

/// Splits a finite, non-negative number into a mantissa in 1..2 and an exponent.
fn split(x: f64) -> (f64, i32) {
    if x == 0.0 {
        return (0.0, 0);
    }
    let (x, lifted) = if x.is_normal() { (x, 0) } else { (x * 2f64.powi(64), -64) };
    let exponent = (x.to_bits() >> 52) as i32 - 1023;
    (ldexp(x, (-exponent).into()), exponent + lifted)
}

#[cfg(test)]
#[path = "tests/number.rs"]
mod tests;

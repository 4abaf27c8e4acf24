//! [`Partial`], the mergeable result of a piece of a segment, and the norm computed from it. The GPU's twin of the
//! merge is `shaders/shared/partial.wgsl`.

use crate::magnitude::{Magnitude, ldexp};
use crate::{NonFiniteElements, NormType};

/// Where an element is: the tensor's place in the list, and the element's index in the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Location {
    pub(crate) tensor: usize,
    pub(crate) index: u64,
}

impl Location {
    /// The location this many elements further on in the tensor.
    pub(crate) fn ahead(self, elements: usize) -> Self {
        Self { index: self.index + elements as u64, ..self }
    }
}

/// What was measured of some elements of a segment. Partials of disjoint pieces merge into the partial of their union.
///
/// The sum is kept as `sum * 2^exponent`, so that neither the square of 1e300 nor that of 1e-300 is lost. Merging is
/// commutative but, like floating-point addition, not associative to the last bit, so its order is fixed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Partial {
    /// Σ |g|^p over the finite elements, times 2^-exponent. Not used for the infinity norm.
    pub(crate) sum: f64,
    /// Even for L2, so that the square root stays exact in the exponent.
    pub(crate) exponent: i64,
    /// The largest finite |g|. Used for the infinity norm only.
    pub(crate) max: f64,
    /// How many elements are NaN or infinite.
    pub(crate) non_finite: u64,
    /// Whether one of them is a NaN.
    pub(crate) nan: bool,
    /// Where the first of them is.
    pub(crate) first: Option<Location>,
    /// Whether an element lies outside the bounds of a value clip.
    pub(crate) outside: bool,
}

impl Partial {
    /// The partial of no elements.
    pub(crate) const EMPTY: Self =
        Self { sum: 0.0, exponent: 0, max: 0.0, non_finite: 0, nan: false, first: None, outside: false };

    /// The partial of both pieces together.
    pub(crate) fn merge(self, other: Self) -> Self {
        let (sum, exponent) = add_scaled((self.sum, self.exponent), (other.sum, other.exponent));
        Self {
            sum,
            exponent,
            max: self.max.max(other.max),
            non_finite: self.non_finite.saturating_add(other.non_finite),
            nan: self.nan || other.nan,
            first: match (self.first, other.first) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            outside: self.outside || other.outside,
        }
    }

    /// With the norm that another partial has of the same elements.
    pub(crate) fn with_norm_of(self, other: Self) -> Self {
        Self { sum: other.sum, exponent: other.exponent, max: other.max, ..self }
    }

    /// What a report says about the elements that are not finite.
    pub(crate) fn non_finite_elements<'a>(
        &self,
        name_of: impl Fn(usize) -> Option<&'a str>,
    ) -> Option<NonFiniteElements> {
        self.first.map(|first| NonFiniteElements {
            count: self.non_finite,
            rank: None,
            tensor: first.tensor,
            name: name_of(first.tensor).map(str::to_owned),
            index: first.index,
        })
    }

    /// The norm of the finite elements divided by `scale`. The division comes before the exponent is applied, because
    /// the norm alone may overflow or lose digits where the quotient does not.
    pub(crate) fn finite_norm(&self, norm_type: NormType, scale: f64) -> Magnitude {
        debug_assert!(norm_type != NormType::L2 || self.exponent % 2 == 0);
        let (norm, exponent) = match norm_type {
            NormType::L1 => (self.sum, self.exponent),
            NormType::L2 => (self.sum.sqrt(), self.exponent / 2),
            NormType::P(power) => root(self.sum, self.exponent, power),
            NormType::Inf => (self.max, 0),
        };
        let plain = ldexp(norm / scale, exponent);
        if plain.is_finite() {
            return Magnitude::plain(plain);
        }
        // A loss scale is a normal number.
        let exponent_of_scale = (scale.to_bits() >> 52) as i64 - 1023;
        Magnitude::new(norm / ldexp(scale, -exponent_of_scale), exponent - exponent_of_scale)
    }
}

/// The p-th root of `sum * 2^exponent`, as a number and its own binary exponent: 2 to the power of the logarithm over p.
fn root(sum: f64, exponent: i64, p: f64) -> (f64, i64) {
    if sum == 0.0 {
        return (0.0, 0);
    }
    // Outside these bounds every norm is infinite or 0.
    let log2 = ((sum.log2() + exponent as f64) / p).clamp(-1e9, 1e9);
    let whole = log2.floor();
    ((log2 - whole).exp2(), whole as i64)
}

/// `a + b` where each is a value and a binary exponent.
fn add_scaled(a: (f64, i64), b: (f64, i64)) -> (f64, i64) {
    if a.1 == b.1 || b.0 == 0.0 {
        (a.0 + b.0, a.1)
    } else if a.0 == 0.0 {
        b
    } else {
        // To the larger exponent, so that nothing overflows. What underflows there is below the other's last bit,
        // because every stored sum lies between 2^-900 and 2^964.
        let (low, high) = if a.1 < b.1 { (a, b) } else { (b, a) };
        (ldexp(low.0, low.1 - high.1) + high.0, high.1)
    }
}

#[cfg(test)]
#[path = "tests/partial.rs"]
mod tests;

//! [`Magnitude`]: a norm or a threshold that may exceed every float64.

/// The number `value * 2^exponent`. A norm of float64 elements may exceed float64, and so may the threshold that it is
/// compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Magnitude {
    value: f64,
    exponent: i64,
}

impl Magnitude {
    pub(crate) const fn new(value: f64, exponent: i64) -> Self {
        Self { value, exponent }
    }

    pub(crate) const fn plain(value: f64) -> Self {
        Self { value, exponent: 0 }
    }

    /// `f(x)`, for an f that multiplies by at most 2^64.
    pub(crate) fn of(x: f64, f: impl Fn(f64) -> f64) -> Self {
        let plain = Self::plain(f(x));
        let exceeds = plain.value.is_infinite() && x.is_finite();
        if exceeds { Self { value: f(ldexp(x, -64)), exponent: 64 } } else { plain }
    }

    pub(crate) fn times(self, factor: f64) -> Self {
        let plain = Self { value: self.value * factor, ..self };
        let exceeds = plain.value.is_infinite() && self.is_finite() && factor.is_finite();
        let halved = || Self { value: ldexp(self.value, -512) * ldexp(factor, -512), exponent: self.exponent + 1024 };
        if exceeds { halved() } else { plain }
    }

    pub(crate) fn to_f64(self) -> f64 {
        ldexp(self.value, self.exponent)
    }

    /// Whether it is a number, which may exceed float64.
    pub(crate) fn is_finite(self) -> bool {
        self.value.is_finite()
    }

    /// Whether it is a number, and above this.
    pub(crate) fn exceeds(self, limit: f64) -> bool {
        let (x, limit, _) = self.aligned(Self::plain(limit));
        x.is_finite() && x > limit
    }

    /// Both in units of the same power of two, and its exponent.
    pub(crate) fn aligned(self, other: Self) -> (f64, f64, i64) {
        let exponent = self.exponent.max(other.exponent);
        let in_units = |x: Self| ldexp(x.value, x.exponent - exponent);
        (in_units(self), in_units(other), exponent)
    }

    pub(crate) fn min(self, other: Self) -> Self {
        let (a, b, _) = self.aligned(other);
        if b < a { other } else { self }
    }

    pub(crate) fn max(self, other: Self) -> Self {
        let (a, b, _) = self.aligned(other);
        if a < b { other } else { self }
    }
}

/// `x * 2^exponent`, in steps that neither overflow nor underflow before the result does.
pub(crate) fn ldexp(x: f64, exponent: i64) -> f64 {
    let mut left = exponent.clamp(-4400, 4400) as i32;
    let mut result = x;
    while left != 0 {
        let step = left.clamp(-1022, 1023);
        // A biased exponent between 1 and 2046 makes a normal power of two.
        result *= f64::from_bits(((1023 + step) as u64) << 52);
        left -= step;
    }
    result
}

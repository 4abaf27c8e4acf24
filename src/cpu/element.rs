//! Elements: how groups of [`LANES`] of them get from bytes at any alignment into registers, and back.

use half::{bf16, f16};

use super::isa::{Isa, LANES};
use crate::Element;

/// An element type.
pub(super) trait Widen: Element + Store {
    /// The type to compute in: float32 for everything up to 32 bits, float64 for itself.
    type Wide: Wide;
    /// The type to compute and add squares in: float32 if it holds the squares exactly, else float64.
    type Squares: Wide;
    /// An unsigned integer of the same size.
    type Bits: Bits;
    /// The bits of infinity. The bits of every finite magnitude are smaller, those of every NaN larger.
    const INFINITY: Self::Bits;
    /// Half precision: the smallest sum of squares in float32 that is right. A smaller sum may have underflowed. A sum
    /// above the range of float32 is infinite.
    const SQUARES_IN_F32_FROM: Option<f64>;

    /// Widens a group exactly.
    fn widen<I: Isa>(isa: I, group: [Self; LANES]) -> Lanes<I, Self>;

    /// Rounds to nearest, ties to even. A NaN becomes quiet and keeps its upper payload.
    fn narrow<I: Isa>(isa: I, wide: Lanes<I, Self>) -> [Self; LANES];

    fn square<I: Isa>(isa: I, wide: Lanes<I, Self>) -> Lanes<I, Self::Squares>;

    /// One element, widened.
    fn wide(self) -> Self::Wide;

    /// Rounds to this type, as a bound must be.
    fn round(x: f64) -> Self;

    fn is_finite(self) -> bool;

    /// Not 0 if it is NaN or infinite. Loops over elements gather bits in fewer instructions than truth values.
    fn not_finite(self) -> Self::Bits;

    /// Not 0 if it is below `min` or above `max`; -0 equals 0. A NaN may be either.
    fn outside(self, min: Self, max: Self) -> Self::Bits;

    /// What is nearest to it from `min` to `max`. A NaN, and what is not outside, keeps every bit.
    fn clamped(self, min: Self, max: Self) -> Self;

    fn bits(self) -> Self::Bits;
    fn of_bits(bits: Self::Bits) -> Self;
}

/// [`store`] for an element and for a group.
pub(super) trait Store: Sized {
    fn store(self, to: &mut [u8]);
    fn store_group(group: [Self; LANES], to: &mut [u8]);
}

macro_rules! stored {
    ($($t:ty)*) => {$(
        impl Store for $t {
            #[inline(always)]
            fn store(self, to: &mut [u8]) {
                store(self.to_ne_bytes(), to);
            }
            #[inline(always)]
            fn store_group(group: [Self; LANES], to: &mut [u8]) {
                store::<{ group_size::<$t>() }>(bytemuck::must_cast(group), to);
            }
        }
    )*};
}

stored!(f32 f64 f16 bf16);

/// A group in registers.
pub(super) type Lanes<I, T> = <<T as Widen>::Wide as Wide>::Lanes<I>;

/// The bits of an element. Magnitudes order like their bits without the sign.
pub(super) trait Bits: Copy + Ord + bytemuck::Pod {
    const ZERO: Self;
    /// The bits without the sign.
    fn magnitude(self) -> Self;
    /// The larger of two magnitudes. It compares them as signed integers, which takes fewer instructions.
    fn max_magnitude(self, other: Self) -> Self;
    /// 1 if it holds.
    fn count(holds: bool) -> Self;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn and(self, other: Self) -> Self;
    fn to_u64(self) -> u64;
    /// The lowest bits.
    fn of_u64(bits: u64) -> Self;
}

/// The types to compute in.
pub(super) trait Wide: Widen<Wide = Self> + PartialOrd + Into<f64> {
    type Lanes<I: Isa>: Copy;
    const ZERO: Self;
    const ONE: Self;
    /// The largest finite number.
    const MAX: Self;

    fn lanes<I: Isa>(isa: I, numbers: [Self; LANES]) -> Self::Lanes<I>;
    fn numbers<I: Isa>(isa: I, x: Self::Lanes<I>) -> [Self; LANES];
    fn add<I: Isa>(isa: I, a: Self::Lanes<I>, b: Self::Lanes<I>) -> Self::Lanes<I>;
    fn mul<I: Isa>(isa: I, a: Self::Lanes<I>, b: Self::Lanes<I>) -> Self::Lanes<I>;
    fn sub<I: Isa>(isa: I, a: Self::Lanes<I>, b: Self::Lanes<I>) -> Self::Lanes<I>;
    fn div<I: Isa>(isa: I, a: Self::Lanes<I>, b: Self::Lanes<I>) -> Self::Lanes<I>;
    fn sqrt<I: Isa>(isa: I, x: Self::Lanes<I>) -> Self::Lanes<I>;
    /// The smaller one, or `x` if it is NaN.
    fn at_most<I: Isa>(isa: I, x: Self::Lanes<I>, most: Self::Lanes<I>) -> Self::Lanes<I>;
    /// The larger one, or `x` if it is NaN.
    fn at_least<I: Isa>(isa: I, x: Self::Lanes<I>, least: Self::Lanes<I>) -> Self::Lanes<I>;
    fn finite_or_zero<I: Isa>(isa: I, x: Self::Lanes<I>) -> Self::Lanes<I>;
    fn to_f64<I: Isa>(isa: I, x: Self::Lanes<I>) -> I::D;

    /// x · factor in float64, rounded once.
    fn times(self, factor: f64) -> Self;
    /// The factor in this type, if it is neither too large nor too small for it. Otherwise use [`Wide::times`].
    fn factor(factor: f64) -> Option<Self>;
}

macro_rules! widen_self {
    ($t:ty, $bits:ty) => {
        impl Widen for $t {
            type Wide = $t;
            type Squares = f64;
            type Bits = $bits;
            const INFINITY: $bits = <$t>::INFINITY.to_bits();
            const SQUARES_IN_F32_FROM: Option<f64> = None;
            #[inline(always)]
            fn widen<I: Isa>(isa: I, group: [$t; LANES]) -> Lanes<I, $t> {
                Self::lanes(isa, group)
            }
            #[inline(always)]
            fn narrow<I: Isa>(isa: I, wide: Lanes<I, $t>) -> [$t; LANES] {
                Self::numbers(isa, wide)
            }
            #[inline(always)]
            fn square<I: Isa>(isa: I, wide: Lanes<I, $t>) -> I::D {
                let x = Self::to_f64(isa, wide);
                isa.mul(x, x)
            }
            #[inline]
            fn wide(self) -> $t {
                self
            }
            #[inline]
            fn round(x: f64) -> $t {
                x as $t
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                self.abs() < <$t>::INFINITY
            }
            #[inline(always)]
            #[allow(clippy::eq_op)]
            fn not_finite(self) -> $bits {
                // 0, or NaN.
                (self - self).to_bits()
            }
            #[inline(always)]
            fn outside(self, min: $t, max: $t) -> $bits {
                self.to_bits() ^ self.clamped(min, max).to_bits()
            }
            #[inline(always)]
            fn clamped(self, min: $t, max: $t) -> $t {
                // Two instructions, each of which returns its second operand if that is NaN or equals the first.
                let above = if max < self { max } else { self };
                if min > above { min } else { above }
            }
            #[inline(always)]
            fn bits(self) -> $bits {
                self.to_bits()
            }
            #[inline(always)]
            fn of_bits(bits: $bits) -> $t {
                <$t>::from_bits(bits)
            }
        }
    };
}
widen_self!(f32, u32);
widen_self!(f64, u64);

macro_rules! widen_half {
    ($t:ty, $widen:ident, $narrow:ident, $squares_from:expr) => {
        impl Widen for $t {
            type Wide = f32;
            type Squares = f32;
            type Bits = u16;
            const INFINITY: u16 = <$t>::INFINITY.to_bits();
            const SQUARES_IN_F32_FROM: Option<f64> = Some($squares_from);
            #[inline(always)]
            fn widen<I: Isa>(isa: I, group: [$t; LANES]) -> Lanes<I, $t> {
                isa.$widen(bytemuck::must_cast(group))
            }
            #[inline(always)]
            fn narrow<I: Isa>(isa: I, wide: Lanes<I, $t>) -> [$t; LANES] {
                bytemuck::must_cast(isa.$narrow(wide))
            }
            #[inline(always)]
            fn square<I: Isa>(isa: I, wide: I::F) -> I::F {
                isa.mul_f(wide, wide)
            }
            #[inline]
            fn wide(self) -> f32 {
                self.to_f32()
            }
            #[inline]
            fn round(x: f64) -> $t {
                // Through float32, like every other element of this type.
                <$t>::from_f32(x as f32)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                self.to_bits().magnitude() < <Self as Widen>::INFINITY
            }
            #[inline(always)]
            fn not_finite(self) -> u16 {
                self.to_bits().magnitude().saturating_sub(<Self as Widen>::INFINITY - 1)
            }
            #[inline(always)]
            fn outside(self, min: $t, max: $t) -> u16 {
                let [low, high] = ordered_bounds(min.to_bits(), max.to_bits());
                // What is below the lower bound wraps around, to above the upper one.
                let above_low = ordered(self.to_bits()).wrapping_sub(low) as u16;
                above_low.saturating_sub(high.wrapping_sub(low) as u16)
            }
            #[inline(always)]
            fn clamped(self, min: $t, max: $t) -> $t {
                let (bits, min, max) = (self.to_bits(), min.to_bits(), max.to_bits());
                let (x, [low, high]) = (ordered(bits), ordered_bounds(min, max));
                let above = if x > high { max } else { bits };
                let clamped = if x < low { min } else { above };
                <$t>::from_bits(if bits.magnitude() > <Self as Widen>::INFINITY { bits } else { clamped })
            }
            #[inline(always)]
            fn bits(self) -> u16 {
                self.to_bits()
            }
            #[inline(always)]
            fn of_bits(bits: u16) -> $t {
                <$t>::from_bits(bits)
            }
        }
    };
}
// The square of the smallest float16 is 2^-48.
widen_half!(f16, widen_f16, narrow_f16, 0.0);
// A square that is no normal float32 is off by up to 2^-150. A chunk has 2^17 of them: 2^-70 of this bound.
widen_half!(bf16, widen_bf16, narrow_bf16, 1.0 / (1u64 << 63) as f64);

/// Integers that order like halves of these bits; -0 comes just before 0.
#[inline(always)]
fn ordered(half: u16) -> i16 {
    // If the sign is set, all other bits are inverted.
    let sign = half as i16 >> 15;
    half as i16 ^ (sign & i16::MAX)
}

/// The smallest and the largest of what is within the bounds, in order. Both zeros are within a bound of 0.
#[inline(always)]
fn ordered_bounds(min: u16, max: u16) -> [i16; 2] {
    let low = if min.magnitude() == 0 { 0x8000 } else { min };
    let high = if max.magnitude() == 0 { 0 } else { max };
    [ordered(low), ordered(high)]
}

macro_rules! bits {
    ($t:ty, $signed:ty) => {
        impl Bits for $t {
            const ZERO: $t = 0;
            #[inline(always)]
            fn magnitude(self) -> $t {
                self & (<$t>::MAX >> 1)
            }
            #[inline(always)]
            fn max_magnitude(self, other: $t) -> $t {
                (self as $signed).max(other as $signed) as $t
            }
            #[inline(always)]
            fn count(holds: bool) -> $t {
                <$t>::from(holds)
            }
            #[inline(always)]
            fn plus(self, other: $t) -> $t {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn minus(self, other: $t) -> $t {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn or(self, other: $t) -> $t {
                self | other
            }
            #[inline(always)]
            fn and(self, other: $t) -> $t {
                self & other
            }
            #[inline]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline]
            fn of_u64(bits: u64) -> $t {
                bits as $t
            }
        }
    };
}
bits!(u16, i16);
bits!(u32, i32);
bits!(u64, i64);

impl Wide for f32 {
    type Lanes<I: Isa> = I::F;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const MAX: Self = f32::MAX;

    #[inline(always)]
    fn lanes<I: Isa>(isa: I, numbers: [f32; LANES]) -> I::F {
        isa.f(numbers)
    }
    #[inline(always)]
    fn numbers<I: Isa>(isa: I, x: I::F) -> [f32; LANES] {
        isa.floats(x)
    }
    #[inline(always)]
    fn add<I: Isa>(isa: I, a: I::F, b: I::F) -> I::F {
        isa.add_f(a, b)
    }
    #[inline(always)]
    fn mul<I: Isa>(isa: I, a: I::F, b: I::F) -> I::F {
        isa.mul_f(a, b)
    }
    #[inline(always)]
    fn sub<I: Isa>(isa: I, a: I::F, b: I::F) -> I::F {
        isa.sub_f(a, b)
    }
    #[inline(always)]
    fn div<I: Isa>(isa: I, a: I::F, b: I::F) -> I::F {
        isa.div_f(a, b)
    }
    #[inline(always)]
    fn sqrt<I: Isa>(isa: I, x: I::F) -> I::F {
        isa.sqrt_f(x)
    }
    #[inline(always)]
    fn at_most<I: Isa>(isa: I, x: I::F, most: I::F) -> I::F {
        isa.if_less_f(most, x, most, x)
    }
    #[inline(always)]
    fn at_least<I: Isa>(isa: I, x: I::F, least: I::F) -> I::F {
        isa.if_less_f(x, least, least, x)
    }
    #[inline(always)]
    fn finite_or_zero<I: Isa>(isa: I, x: I::F) -> I::F {
        isa.finite_or_zero_f(x)
    }
    #[inline(always)]
    fn to_f64<I: Isa>(isa: I, x: I::F) -> I::D {
        isa.widen(x)
    }

    #[inline]
    fn times(self, factor: f64) -> f32 {
        (f64::from(self) * factor) as f32
    }
    fn factor(factor: f64) -> Option<f32> {
        let narrow = factor as f32;
        (narrow.is_normal() || factor == 0.0 || factor.is_nan()).then_some(narrow)
    }
}

impl Wide for f64 {
    type Lanes<I: Isa> = I::D;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const MAX: Self = f64::MAX;

    #[inline(always)]
    fn lanes<I: Isa>(isa: I, numbers: [f64; LANES]) -> I::D {
        isa.d(numbers)
    }
    #[inline(always)]
    fn numbers<I: Isa>(isa: I, x: I::D) -> [f64; LANES] {
        isa.doubles(x)
    }
    #[inline(always)]
    fn add<I: Isa>(isa: I, a: I::D, b: I::D) -> I::D {
        isa.add(a, b)
    }
    #[inline(always)]
    fn mul<I: Isa>(isa: I, a: I::D, b: I::D) -> I::D {
        isa.mul(a, b)
    }
    #[inline(always)]
    fn sub<I: Isa>(isa: I, a: I::D, b: I::D) -> I::D {
        isa.sub(a, b)
    }
    #[inline(always)]
    fn div<I: Isa>(isa: I, a: I::D, b: I::D) -> I::D {
        isa.div(a, b)
    }
    #[inline(always)]
    fn sqrt<I: Isa>(isa: I, x: I::D) -> I::D {
        isa.sqrt(x)
    }
    #[inline(always)]
    fn at_most<I: Isa>(isa: I, x: I::D, most: I::D) -> I::D {
        isa.if_less(most, x, most, x)
    }
    #[inline(always)]
    fn at_least<I: Isa>(isa: I, x: I::D, least: I::D) -> I::D {
        isa.if_less(x, least, least, x)
    }
    #[inline(always)]
    fn finite_or_zero<I: Isa>(isa: I, x: I::D) -> I::D {
        isa.if_less(isa.abs(x), isa.d([f64::INFINITY; LANES]), x, isa.d([0.0; LANES]))
    }
    #[inline(always)]
    fn to_f64<I: Isa>(_: I, x: I::D) -> I::D {
        x
    }

    #[inline]
    fn times(self, factor: f64) -> f64 {
        self * factor
    }
    fn factor(factor: f64) -> Option<f64> {
        Some(factor)
    }
}

/// The bytes of a group.
pub(super) const fn group_size<T>() -> usize {
    LANES * size_of::<T>()
}

/// A group from its bytes.
#[inline(always)]
pub(super) fn load<T: Widen>(bytes: &[u8]) -> [T; LANES] {
    bytemuck::pod_read_unaligned(bytes)
}

/// Writes bytes to the start of `to`. `copy_from_slice` would be a call with `lto = "off"`, and clips by value 20 times
/// as slow.
#[inline(always)]
pub(super) fn store<const N: usize>(bytes: [u8; N], to: &mut [u8]) {
    if let Some(to) = to.first_chunk_mut() {
        *to = bytes;
    }
}

/// The elements one by one.
#[inline(always)]
pub(super) fn elements<T: bytemuck::Pod>(data: &[u8]) -> impl ExactSizeIterator<Item = T> {
    data.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned)
}

/// The largest magnitude, compared as integers: everything that is not finite comes after everything that is.
#[inline(always)]
pub(super) fn largest_magnitude<T: Widen>(data: &[u8]) -> T::Bits {
    elements::<T>(data).fold(T::Bits::ZERO, |max, x| max.max_magnitude(x.bits().magnitude()))
}

/// Calls `f` with the bytes of each group. Zeros fill up the last group.
#[inline(always)]
pub(super) fn for_groups<T: Widen>(data: &[u8], mut f: impl FnMut(&[u8])) {
    let size = const { group_size::<T>() };
    let (whole, rest) = data.split_at(data.len() - data.len() % size);
    let mut last = [0; group_size::<f64>()];
    last[..rest.len()].copy_from_slice(rest);
    let padded = if rest.is_empty() { 0 } else { size };
    // One call of `f`, so that it is inlined.
    for part in [whole, &last[..padded]] {
        for group in part.chunks_exact(size) {
            f(group);
        }
    }
}

/// Replaces each group by what `f` returns. Zeros fill up the last group; they are not written.
#[inline(always)]
pub(super) fn update_groups<T: Widen>(data: &mut [u8], mut f: impl FnMut([T; LANES]) -> [T; LANES]) {
    let size = const { group_size::<T>() };
    let (whole, rest) = data.split_at_mut(data.len() - data.len() % size);
    let mut last = [0; group_size::<f64>()];
    let mut padded = 0;
    if !rest.is_empty() {
        last[..rest.len()].copy_from_slice(rest);
        padded = size;
    }
    for part in [whole, &mut last[..padded]] {
        for group in part.chunks_exact_mut(size) {
            T::store_group(f(load(group)), group);
        }
    }
    if !rest.is_empty() {
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

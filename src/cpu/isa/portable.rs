//! Arrays, for every CPU: the compiler turns them into the vectors that it knows.

use super::{Isa, LANES};

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Portable;

/// The values of `f` for each lane. (`array::map` and `array::from_fn` are not always inlined.)
#[inline(always)]
fn lanes<A: Copy + Default>(f: impl Fn(usize) -> A) -> [A; LANES] {
    let mut all = [A::default(); LANES];
    let mut i = 0;
    while i < LANES {
        all[i] = f(i);
        i += 1;
    }
    all
}

impl Isa for Portable {
    type F = [f32; LANES];
    type D = [f64; LANES];
    // SSE2 has none.
    const COMPARES_64_BITS: bool = !cfg!(target_arch = "x86_64");

    #[inline(always)]
    fn f(self, numbers: [f32; LANES]) -> Self::F {
        numbers
    }
    #[inline(always)]
    fn d(self, numbers: [f64; LANES]) -> Self::D {
        numbers
    }
    #[inline(always)]
    fn floats(self, x: Self::F) -> [f32; LANES] {
        x
    }
    #[inline(always)]
    fn doubles(self, x: Self::D) -> [f64; LANES] {
        x
    }

    #[inline(always)]
    fn widen_f16(self, bits: [u16; LANES]) -> Self::F {
        lanes(|i| widen_half(bits[i]))
    }
    #[inline(always)]
    fn narrow_f16(self, x: Self::F) -> [u16; LANES] {
        lanes(|i| narrow_half(x[i]))
    }
    #[inline(always)]
    fn widen_bf16(self, bits: [u16; LANES]) -> Self::F {
        lanes(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }
    #[inline(always)]
    fn narrow_bf16(self, x: Self::F) -> [u16; LANES] {
        lanes(|i| {
            let bits = x[i].to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            select(bits & 0x7fff_ffff > 0x7f80_0000, bits >> 16 | 0x40, rounded) as u16
        })
    }
    #[inline(always)]
    fn widen(self, x: Self::F) -> Self::D {
        lanes(|i| f64::from(x[i]))
    }

    #[inline(always)]
    fn add_f(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub_f(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul_f(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div_f(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn sqrt_f(self, x: Self::F) -> Self::F {
        lanes(|i| x[i].sqrt())
    }
    #[inline(always)]
    fn if_less_f(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        lanes(|i| f32::from_bits(select(a[i] < b[i], x[i].to_bits(), y[i].to_bits())))
    }
    #[inline(always)]
    fn finite_or_zero_f(self, x: Self::F) -> Self::F {
        lanes(|i| f32::from_bits(select(x[i].is_finite(), x[i].to_bits(), 0)))
    }

    #[inline(always)]
    fn add(self, a: Self::D, b: Self::D) -> Self::D {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::D, b: Self::D) -> Self::D {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::D, b: Self::D) -> Self::D {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::D, b: Self::D) -> Self::D {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn sqrt(self, x: Self::D) -> Self::D {
        lanes(|i| x[i].sqrt())
    }
    #[inline(always)]
    fn abs(self, x: Self::D) -> Self::D {
        lanes(|i| x[i].abs())
    }
    #[inline(always)]
    fn if_less(self, a: Self::D, b: Self::D, x: Self::D, y: Self::D) -> Self::D {
        lanes(|i| {
            let mask = u64::from(a[i] < b[i]).wrapping_neg();
            f64::from_bits(x[i].to_bits() & mask | y[i].to_bits() & !mask)
        })
    }

    #[inline(always)]
    fn and_bits(self, a: Self::D, b: Self::D) -> Self::D {
        lanes(|i| f64::from_bits(a[i].to_bits() & b[i].to_bits()))
    }
    #[inline(always)]
    fn or_bits(self, a: Self::D, b: Self::D) -> Self::D {
        lanes(|i| f64::from_bits(a[i].to_bits() | b[i].to_bits()))
    }
    #[inline(always)]
    fn add_bits(self, a: Self::D, b: Self::D) -> Self::D {
        lanes(|i| f64::from_bits(a[i].to_bits().wrapping_add(b[i].to_bits())))
    }
    #[inline(always)]
    fn down_52(self, x: Self::D) -> Self::D {
        lanes(|i| f64::from_bits(x[i].to_bits() >> 52))
    }
    #[inline(always)]
    fn up_52(self, x: Self::D) -> Self::D {
        lanes(|i| f64::from_bits(x[i].to_bits() << 52))
    }
}

/// Selects by a mask, because the compiler does not vectorise a loop with a branch.
#[inline(always)]
fn select(first: bool, a: u32, b: u32) -> u32 {
    let mask = u32::from(first).wrapping_neg();
    a & mask | b & !mask
}

#[inline(always)]
fn widen_half(half: u16) -> f32 {
    let (sign, magnitude) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff));
    let normal = (magnitude << 13) + (112 << 23);
    // A multiple of 2^-24; the conversion and the product are exact.
    let subnormal = (magnitude as i32 as f32 * f32::from_bits(0x3380_0000)).to_bits();
    let special = (normal + (112 << 23)) | u32::from(magnitude > 0x7c00) << 22;
    let large = select(magnitude >= 0x7c00, special, normal);
    f32::from_bits(sign | select(magnitude < 0x400, subnormal, large))
}

#[inline(always)]
fn narrow_half(float: f32) -> u16 {
    let (sign, magnitude) = (float.to_bits() >> 16 & 0x8000, float.to_bits() & 0x7fff_ffff);
    // Half an ulp less one, and one more if the last bit that stays is odd. A sum that is too large becomes infinity.
    let normal = magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1)).wrapping_sub(112 << 23) >> 13;
    // Next to 0.5 the last bit of a float32 is 2^-24, like that of a subnormal, so the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = select(magnitude < 0x3880_0000, subnormal, normal.min(0x7c00));
    let quiet = 0x7e00 | magnitude >> 13 & 0x3ff;
    (sign | select(magnitude > 0x7f80_0000, quiet, finite)) as u16
}

//! Blocks: a few KiB of one tensor, widened to the type that is computed in.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::tuning::BLOCK;
use crate::{Element, NormType};

/// An element type, and how blocks of it become blocks of the type that is computed in.
pub(super) trait Widen: Element {
    type Wide: Wide;

    /// Calls `f` with the block's elements widened. Exact.
    fn read<R>(block: &[Self], f: impl FnOnce(&[Self::Wide]) -> R) -> R;

    /// Calls `f` with the block's elements widened, then rounds what it left there back to nearest even.
    fn update(block: &mut [Self], f: impl FnOnce(&mut [Self::Wide]));

    /// Rounds to this type and widens again: what a bound is once it is stored.
    fn round(x: f64) -> Self::Wide;
}

/// The types that are computed in: float32 for everything up to 32 bits, float64 for itself.
pub(super) trait Wide: Element + PartialOrd + Into<f64> {
    const ZERO: Self;
    fn is_finite(self) -> bool;
    fn is_nan(self) -> bool;
    fn scaled(self, factor: Self) -> Self;

    /// The factor in this type, if it is neither too large nor too small for it; else elements go through
    /// [`Wide::scaled_by_any`].
    fn factor(factor: f64) -> Option<Self>;
    fn scaled_by_any(self, factor: f64) -> Self;

    /// Whether a sum of |x|^p in plain float64 is right: nothing overflowed, and nothing that matters underflowed. For
    /// the infinity norm, whether this is a largest |x|.
    fn trusts(norm_type: NormType, sum: f64) -> bool;

    /// max |x|; None if an element is not finite.
    fn max_abs(xs: &[Self]) -> Option<f64>;
}

macro_rules! widen_self {
    ($t:ty) => {
        impl Widen for $t {
            type Wide = $t;
            fn read<R>(block: &[Self], f: impl FnOnce(&[$t]) -> R) -> R {
                f(block)
            }
            fn update(block: &mut [Self], f: impl FnOnce(&mut [$t])) {
                f(block);
            }
            fn round(x: f64) -> $t {
                x as $t
            }
        }
    };
}
widen_self!(f32);
widen_self!(f64);

macro_rules! widen_half {
    ($t:ty, $widen:expr, $narrow:expr) => {
        impl Widen for $t {
            type Wide = f32;
            fn read<R>(block: &[Self], f: impl FnOnce(&[f32]) -> R) -> R {
                let mut wide = [0f32; BLOCK];
                let wide = &mut wide[..block.len()];
                $widen(block, wide);
                f(wide)
            }
            fn update(block: &mut [Self], f: impl FnOnce(&mut [f32])) {
                let mut wide = [0f32; BLOCK];
                let wide = &mut wide[..block.len()];
                $widen(block, wide);
                f(wide);
                $narrow(block, wide);
            }
            fn round(x: f64) -> f32 {
                // Through float32, like every other element of this type.
                <$t>::from_f32(x as f32).to_f32()
            }
        }
    };
}
widen_half!(f16, <[f16]>::convert_to_f32_slice, <[f16]>::convert_from_f32_slice);
widen_half!(bf16, widen_bf16, narrow_bf16);

// The crate's conversions of bfloat16 go element by element; these two loops are vectors in every instruction set.

fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}

/// To nearest, ties to even; a NaN becomes quiet and keeps its upper payload.
fn narrow_bf16(to: &mut [bf16], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x40;
        *to = bf16::from_bits(if from.is_nan() { quiet } else { rounded });
    }
}

/// Calls `f` with the blocks of `data` in order and the index of the first element of each.
pub(super) fn for_blocks<T: Widen>(data: &[u8], mut f: impl FnMut(u64, &[T::Wide])) {
    for (i, bytes) in data.chunks(BLOCK * size_of::<T>()).enumerate() {
        let at = (i * BLOCK) as u64;
        if let Ok(block) = bytemuck::try_cast_slice::<u8, T>(bytes) {
            T::read(block, |wide| f(at, wide));
        } else {
            let mut aligned = [T::zeroed(); BLOCK];
            let block = &mut aligned[..bytes.len() / size_of::<T>()];
            bytemuck::cast_slice_mut::<T, u8>(block).copy_from_slice(bytes);
            T::read(block, |wide| f(at, wide));
        }
    }
}

/// Calls `read` with each block and, where it returns true, `update` with the same block, which is then written. Both are told
/// the index of its first element.
pub(super) fn update_blocks<T: Widen>(
    data: &mut [u8],
    mut read: impl FnMut(u64, &[T::Wide]) -> bool,
    mut update: impl FnMut(u64, &mut [T::Wide]),
) {
    for (i, bytes) in data.chunks_mut(BLOCK * size_of::<T>()).enumerate() {
        let at = (i * BLOCK) as u64;
        if let Ok(block) = bytemuck::try_cast_slice_mut::<u8, T>(bytes) {
            if T::read(block, |wide| read(at, wide)) {
                T::update(block, |wide| update(at, wide));
            }
        } else {
            let mut aligned = [T::zeroed(); BLOCK];
            let block = &mut aligned[..bytes.len() / size_of::<T>()];
            bytemuck::cast_slice_mut::<T, u8>(block).copy_from_slice(bytes);
            if T::read(block, |wide| read(at, wide)) {
                T::update(block, |wide| update(at, wide));
                bytes.copy_from_slice(bytemuck::cast_slice(block));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds a float32 to a type of `mantissa` bits and smallest exponent `min_exponent` in float64 arithmetic.
    fn nearest_even(x: f32, mantissa: i32, min_exponent: i32, max: f64) -> f64 {
        let x = f64::from(x);
        if x == 0.0 || !x.is_finite() {
            return x;
        }
        let exponent = ((x.abs().to_bits() >> 52) as i32 - 1023).max(min_exponent);
        let ulp = 2f64.powi(exponent - mantissa);
        let rounded = (x / ulp).round_ties_even() * ulp;
        if rounded.abs() > max { f64::INFINITY.copysign(x) } else { rounded }
    }

    /// Every half value, and the float32 values at, just below and just above the midpoint to the next one.
    fn around_every_half(to_f32: impl Fn(u16) -> f32) -> Vec<f32> {
        let mut values = Vec::new();
        for bits in 0..=u16::MAX {
            let (x, next) = (to_f32(bits), to_f32(bits.wrapping_add(1)));
            values.push(x);
            if x.is_finite() && next.is_finite() {
                let middle = ((f64::from(x) + f64::from(next)) / 2.0) as f32;
                values.extend([middle, middle.next_down(), middle.next_up()]);
            }
        }
        values.extend([65519.0, 65519.996, 65520.0, 65536.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45]);
        values
    }

    #[test]
    fn halves_are_rounded_to_nearest_even_and_kept_exactly() {
        for x in around_every_half(|b| f16::from_bits(b).to_f32()) {
            let mut block = [f16::ONE; 3];
            f16::update(&mut block, |wide| wide.fill(x));
            let want = nearest_even(x, 10, -14, 65504.0);
            assert!(block.iter().all(|h| h.to_f64() == want || (x.is_nan() && h.is_nan())), "{x:e} gave {block:?}");
        }
        for x in around_every_half(|b| bf16::from_bits(b).to_f32()) {
            let mut block = [bf16::ONE; 3];
            bf16::update(&mut block, |wide| wide.fill(x));
            let want = nearest_even(x, 7, -126, bf16::MAX.to_f64());
            assert!(block.iter().all(|h| h.to_f64() == want || (x.is_nan() && h.is_nan())), "{x:e} gave {block:?}");
        }
    }
}

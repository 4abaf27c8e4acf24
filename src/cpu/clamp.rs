//! Clamps each element of a chunk to the bounds of a value clip. Twin of `shaders/clamp.wgsl`.
//!
//! It looks at a group of elements, and writes it if anything changes. So where few elements lie outside the bounds, most
//! of the memory is only read. If one bound is the other's negative, a look is for the largest magnitude, as bits. Otherwise
//! floats are compared as they are, and halves as integers that order like them. What is not finite is counted before it
//! is written. An element that stays keeps every bit, and a NaN its payload. With a loss scale, all work on an unscaled copy
//! of a block in the type to compute in.

use super::count::count;
use super::element::{Bits, Wide, Widen, elements, largest_magnitude};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::{self, Product, write_exact_products};
use super::scale::Round;
use super::tuning::{BLOCK, CLAMPED_AT_ONCE};
use crate::clip::Mode;
use crate::partial::{Location, Partial};
use crate::{Clip, NonFinite};

/// Looks at a chunk, and writes nothing.
pub(super) fn scan<T: Widen>(clip: &Clip, at: Location, data: &[u8]) -> Partial {
    let (clamp, mut wide) = (Clamp::<T>::new(clip), [[T::Wide::ZERO; LANES]; BLOCK / LANES]);
    let blocks = data.chunks(BLOCK * size_of::<T>()).enumerate();
    blocks.fold(Partial::EMPTY, |chunk, (i, block)| chunk.merge(clamp.look(at.ahead(i * BLOCK), block, &mut wide)))
}

/// Clamps a chunk and returns what it found. Unless an element changes, nothing is written.
pub(super) fn clamp<T: Widen>(clip: &Clip, at: Location, data: &mut [u8]) -> Partial {
    let (clamp, mut wide) = (Clamp::<T>::new(clip), [[T::Wide::ZERO; LANES]; BLOCK / LANES]);
    let blocks = data.chunks_mut(BLOCK * size_of::<T>()).enumerate();
    blocks.fold(Partial::EMPTY, |chunk, (i, block)| chunk.merge(clamp.clamp(at.ahead(i * BLOCK), block, &mut wide)))
}

/// A block without its loss scale, in the type that is computed in.
type Unscaled<W> = [[W; LANES]; BLOCK / LANES];

/// What a value clip does to elements of a type.
#[derive(Clone, Copy)]
struct Clamp<T: Widen> {
    min: T,
    max: T,
    /// `1 / grad_scale`.
    factor: f64,
    drop: bool,
}

impl<T: Widen> Clamp<T> {
    /// Rounds the bounds to the stored type first. Rounding is monotonic, so clamping to rounded bounds is the same as
    /// clamping and then rounding, and an element stored at the bound counts as inside.
    fn new(clip: &Clip) -> Self {
        let (min, max) = match clip.mode {
            Mode::Value { min, max } => (min, max),
            _ => (f64::NEG_INFINITY, f64::INFINITY),
        };
        let (min, max) = (T::round(min), T::round(max));
        Self { min, max, factor: 1.0 / clip.grad_scale, drop: clip.non_finite == NonFinite::Drop }
    }

    /// Finds what is outside the bounds or not finite. With a loss scale, it leaves the unscaled block in `wide`.
    fn look(self, at: Location, block: &[u8], wide: &mut Unscaled<T::Wide>) -> Partial {
        let [mut outside, non_finite] = if self.factor == 1.0 {
            run(Look { min: self.min, max: self.max, block })
        } else {
            match T::Wide::factor(self.factor) {
                Some(factor) => map::write::<T, _>(Product::<_, false>(factor), block, wide),
                None => write_exact_products::<T>(self.factor, false, block, wide),
            }
            let block = bytemuck::cast_slice(&wide.as_flattened()[..block.len() / size_of::<T>()]);
            run(Look { min: self.min.wide(), max: self.max.wide(), block })
        };
        if !non_finite {
            return Partial { outside, ..Partial::EMPTY };
        }
        if outside {
            // The stored element decides: one that overflows only when unscaled is not dropped.
            let (min, max) = (self.min.wide(), self.max.wide());
            outside = elements::<T>(block).zip(wide.as_flattened()).any(|(x, unscaled)| {
                let wide = if self.factor == 1.0 { x.wide() } else { *unscaled };
                (wide < min || wide > max) && (x.is_finite() || !self.drop)
            });
        }
        Partial { outside, ..count::<T>(block).partial(|i| at.ahead(i)) }
    }

    /// Clamps a block. Without a loss scale, what comes before the first elements that are not finite is clamped as it is
    /// looked at.
    fn clamp(self, at: Location, block: &mut [u8], wide: &mut Unscaled<T::Wide>) -> Partial {
        let Self { min, max, factor, .. } = self;
        let (outside, clamped) = if factor == 1.0 { run(ClampFinite { min, max, block }) } else { (false, 0) };
        let found = Partial { outside, ..Partial::EMPTY };
        if clamped == block.len() {
            return found;
        }
        found.merge(self.look_and_write(at.ahead(clamped / size_of::<T>()), &mut block[clamped..], wide))
    }

    /// Looks at a block, and writes it if anything changes.
    fn look_and_write(self, at: Location, block: &mut [u8], wide: &mut Unscaled<T::Wide>) -> Partial {
        let found = self.look(at, block, wide);
        let (Self { min, max, .. }, drop) = (self, self.drop && found.non_finite > 0);
        if self.factor != 1.0 {
            self.write_unscaled(&found, block, wide);
        } else if drop || found.outside {
            run(Write { min, max, drop, block });
        }
        found
    }

    /// Clamps what `look` has left in `wide`, and rounds it into the block.
    fn write_unscaled(self, found: &Partial, block: &mut [u8], wide: &mut Unscaled<T::Wide>) {
        let unscaled = &mut wide.as_flattened_mut()[..block.len() / size_of::<T>()];
        if found.outside {
            let (min, max) = (self.min.wide(), self.max.wide());
            run(Write { min, max, drop: false, block: bytemuck::cast_slice_mut(unscaled) });
        }
        if self.drop && found.non_finite > 0 {
            // The stored element decides: an element may be infinite only because the loss scale is so small.
            let was = elements::<T>(block).zip(unscaled);
            was.filter(|(x, _)| !x.is_finite()).for_each(|(_, wide)| *wide = T::Wide::ZERO);
        }
        run(Round::<T> { wide, block });
    }
}

/// Finds whether anything is outside the bounds, and whether anything is not finite. The largest magnitude tells both, in a
/// third of the instructions, if one bound is the other's negative.
struct Look<'a, T> {
    min: T,
    max: T,
    block: &'a [u8],
}

impl<T: Widen> Kernel for Look<'_, T> {
    type Output = [bool; 2];
    #[inline(always)]
    fn on<I: Isa>(self, _: I) -> [bool; 2] {
        let Self { min, max, block } = self;
        let has_maximum = I::COMPARES_64_BITS || size_of::<T>() < size_of::<f64>();
        let (low, high) = (min.bits(), max.bits());
        let symmetric = low.magnitude() == high && (low != high || high == T::Bits::ZERO);
        if has_maximum && symmetric {
            let top = largest_magnitude::<T>(block);
            return [top > high, top >= T::INFINITY];
        }
        let (mut outside, mut non_finite) = (T::Bits::ZERO, T::Bits::ZERO);
        for x in elements::<T>(block) {
            outside = outside.or(x.outside(min, max));
            non_finite = non_finite.or(x.not_finite());
        }
        [outside != T::Bits::ZERO, non_finite != T::Bits::ZERO]
    }
}

/// Clamps a block up to a group of elements that are not all finite. Returns whether anything was outside, and how many
/// bytes are clamped.
struct ClampFinite<'a, T> {
    min: T,
    max: T,
    block: &'a mut [u8],
}

impl<T: Widen> Kernel for ClampFinite<'_, T> {
    type Output = (bool, usize);
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) -> (bool, usize) {
        let Self { min, max, block } = self;
        let (mut outside, mut clamped) = (false, 0);
        for block in block.chunks_mut(CLAMPED_AT_ONCE) {
            let [changes, non_finite] = Look { min, max, block }.on(isa);
            if non_finite {
                break;
            }
            clamped += block.len();
            if changes {
                outside = true;
                Write { min, max, drop: false, block }.on(isa);
            }
        }
        (outside, clamped)
    }
}

/// Clamps a block. With `drop`, a non-finite element becomes 0, even if 0 is outside the bounds.
struct Write<'a, T> {
    min: T,
    max: T,
    drop: bool,
    block: &'a mut [u8],
}

impl<T: Widen> Kernel for Write<'_, T> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, _: I) {
        for bytes in self.block.chunks_exact_mut(size_of::<T>()) {
            let x = bytemuck::pod_read_unaligned::<T>(bytes);
            let clamped = x.clamped(self.min, self.max);
            let new = if self.drop && !x.is_finite() { T::of_bits(T::Bits::ZERO) } else { clamped };
            new.store(bytes);
        }
    }
}

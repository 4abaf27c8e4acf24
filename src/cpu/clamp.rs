//! Clamps each element of a chunk to the bounds of a value clip. Twin of `shaders/clamp.wgsl`.
//!
//! It works block by block: a look at the block, and a write if anything changes. The write finds the block in the
//! first-level cache. Both compare bits as integers, which order like the numbers. So an element that stays keeps every
//! bit, and a NaN its payload. With a loss scale, both work on an unscaled copy of the block in the type to compute in.

use super::count::count;
use super::element::{Bits, Wide, Widen, elements};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::{self, Product, write_exact_products};
use super::scale::Round;
use super::tuning::BLOCK;
use crate::clip::Mode;
use crate::partial::{Location, Partial};
use crate::{Clip, NonFinite};

/// Looks at a chunk, and writes nothing.
pub(super) fn scan<T: Widen>(clip: &Clip, at: Location, data: &[u8]) -> Partial {
    let (clamp, mut wide) = (Clamp::<T>::new(clip), [[T::Wide::ZERO; LANES]; BLOCK / LANES]);
    let blocks = data.chunks(BLOCK * size_of::<T>()).enumerate();
    blocks.fold(Partial::EMPTY, |chunk, (i, block)| chunk.merge(clamp.look(at.ahead(i * BLOCK), block, &mut wide)))
}

/// Clamps a chunk and returns what it found. Blocks in which nothing changes are not written.
pub(super) fn clamp<T: Widen>(clip: &Clip, at: Location, data: &mut [u8]) -> Partial {
    let (clamp, mut wide) = (Clamp::<T>::new(clip), [[T::Wide::ZERO; LANES]; BLOCK / LANES]);
    let blocks = data.chunks_mut(BLOCK * size_of::<T>()).enumerate();
    blocks.fold(Partial::EMPTY, |chunk, (i, block)| {
        let partial = clamp.look(at.ahead(i * BLOCK), block, &mut wide);
        let drops = clamp.drop && partial.non_finite > 0;
        if clamp.factor != 1.0 {
            clamp.write_unscaled(drops, block, &mut wide);
        } else if partial.outside || drops {
            run(Write { bounds: Bounds::new(clamp.min, clamp.max), drop: clamp.drop, block });
        }
        chunk.merge(partial)
    })
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
        let [mut outside, non_finite] = run(Look { bounds: Bounds::new(self.min, self.max), drop: self.drop, block });
        if self.factor != 1.0 {
            match T::Wide::factor(self.factor) {
                Some(factor) => map::write::<T, _>(Product::<_, false>(factor), block, wide),
                None => write_exact_products::<T>(self.factor, false, block, wide),
            }
            let (bounds, unscaled) = (self.wide_bounds(), &wide.as_flattened()[..block.len() / size_of::<T>()]);
            outside = if self.drop && non_finite {
                // The stored element decides: one that overflows only when unscaled is not dropped.
                let mut was = elements::<T>(block).zip(unscaled);
                was.any(|(x, wide)| x.bits().magnitude() < T::INFINITY && bounds.exclude(*wide))
            } else {
                run(Look { bounds, drop: false, block: bytemuck::cast_slice(unscaled) })[0]
            };
        }
        let counted = if non_finite { count::<T>(block).partial(|i| at.ahead(i)) } else { Partial::EMPTY };
        Partial { outside, ..counted }
    }

    /// Clamps what `look` has left in `wide`, and rounds it into the block.
    fn write_unscaled(self, drops: bool, block: &mut [u8], wide: &mut Unscaled<T::Wide>) {
        let unscaled = &mut wide.as_flattened_mut()[..block.len() / size_of::<T>()];
        run(Write { bounds: self.wide_bounds(), drop: false, block: bytemuck::cast_slice_mut(unscaled) });
        if drops {
            // The stored element decides: an element may be infinite only because the loss scale is so small.
            let was = elements::<T>(block).zip(unscaled);
            was.filter(|(x, _)| x.bits().magnitude() >= T::INFINITY).for_each(|(_, wide)| *wide = T::Wide::ZERO);
        }
        run(Round::<T> { wide, block });
    }

    fn wide_bounds(self) -> Bounds<T::Wide> {
        Bounds::new(self.min.wide(), self.max.wide())
    }
}

/// The bounds, and the integers that stand for them in comparisons.
#[derive(Clone, Copy)]
struct Bounds<T: Widen> {
    min: T::Bits,
    max: T::Bits,
    low: <T::Bits as Bits>::Signed,
    high: <T::Bits as Bits>::Signed,
}

impl<T: Widen> Bounds<T> {
    fn new(min: T, max: T) -> Self {
        let (min, max) = (min.bits(), max.bits());
        // Both zeros are within a bound of 0, although 0 comes after -0.
        let zero = |bound: T::Bits| bound.magnitude() == T::Bits::ZERO;
        let low = if zero(min) { T::Bits::NEGATIVE_ZERO } else { min }.ordered();
        let high = if zero(max) { T::Bits::ZERO } else { max }.ordered();
        Self { min, max, low, high }
    }

    fn exclude(&self, x: T) -> bool {
        let ordered = x.bits().ordered();
        ordered < self.low || ordered > self.high
    }
}

/// Finds whether anything is outside the bounds, and whether anything is not finite.
struct Look<'a, T: Widen> {
    bounds: Bounds<T>,
    drop: bool,
    block: &'a [u8],
}

impl<T: Widen> Kernel for Look<'_, T> {
    type Output = [bool; 2];
    #[inline(always)]
    fn on<I: Isa>(self, _: I) -> [bool; 2] {
        let Bounds { low, high, .. } = self.bounds;
        // Neither a NaN nor an infinity that will be dropped counts as outside.
        let greatest = if self.drop { T::INFINITY.below() } else { T::INFINITY };
        let (mut outside, mut non_finite) = (T::Bits::ZERO, T::Bits::ZERO);
        for x in elements::<T>(self.block) {
            let (magnitude, ordered) = (x.bits().magnitude(), x.bits().ordered());
            outside = outside.or(T::Bits::count(((ordered < low) | (ordered > high)) & (magnitude <= greatest)));
            non_finite = non_finite.or(T::Bits::count(magnitude >= T::INFINITY));
        }
        [outside != T::Bits::ZERO, non_finite != T::Bits::ZERO]
    }
}

/// Clamps a block.
struct Write<'a, T: Widen> {
    bounds: Bounds<T>,
    drop: bool,
    block: &'a mut [u8],
}

impl<T: Widen> Kernel for Write<'_, T> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, _: I) {
        let Bounds { min, max, low, high } = self.bounds;
        // A dropped element becomes 0, even if 0 is outside the bounds.
        let dropped_from = if self.drop { T::INFINITY } else { T::Bits::MAX };
        for bytes in self.block.chunks_exact_mut(size_of::<T>()) {
            let bits = bytemuck::pod_read_unaligned::<T::Bits>(bytes);
            let ordered = bits.ordered();
            let above = if ordered > high { max } else { bits };
            let clamped = if ordered < low { min } else { above };
            let kept = if bits.magnitude() > T::INFINITY { bits } else { clamped };
            let new = if bits.magnitude() >= dropped_from { T::Bits::ZERO } else { kept };
            bytes.copy_from_slice(bytemuck::bytes_of(&new));
        }
    }
}

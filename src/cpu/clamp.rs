//! Takes each element of a chunk to the bounds of a value clip. Twin of `shaders/clamp.wgsl`.

use super::block::{Wide, Widen, for_blocks, update_blocks};
use super::norm::non_finite;
use super::scale::drop_from;
use crate::clip::Mode;
use crate::partial::{Location, Partial};
use crate::{Clip, NonFinite};

/// What a value clip does to elements that are computed in `W`.
#[derive(Clone, Copy)]
struct Clamp<W> {
    min: W,
    max: W,
    /// `1 / grad_scale`, and the same in `W` where it fits.
    factor: f64,
    narrow_factor: Option<W>,
    drop_non_finite: bool,
}

impl<W: Wide> Clamp<W> {
    /// Bounds are rounded to the stored type first: rounding is monotonic, so clamping to rounded bounds is the same
    /// as clamping and then rounding, and an element that is stored at the bound counts as inside.
    fn new<T: Widen<Wide = W>>(clip: &Clip) -> Self {
        let (min, max) = match clip.mode {
            Mode::Value { min, max } => (min, max),
            _ => (f64::NEG_INFINITY, f64::INFINITY),
        };
        let factor = 1.0 / clip.grad_scale;
        Self {
            min: T::round(min),
            max: T::round(max),
            factor,
            narrow_factor: W::factor(factor),
            drop_non_finite: clip.non_finite == NonFinite::Drop,
        }
    }

    fn unscaled(self, x: W) -> W {
        if self.factor == 1.0 {
            x
        } else {
            self.narrow_factor.map_or_else(|| x.scaled_by_any(self.factor), |factor| x.scaled(factor))
        }
    }

    /// Not `clamp`, which would panic on NaN bounds; NaN stays NaN and -0 within the bounds stays -0.
    fn clamped(self, x: W) -> W {
        if x < self.min {
            self.min
        } else if x > self.max {
            self.max
        } else {
            x
        }
    }

    /// Whether `x` lies outside the bounds. NaN does not; nor does an infinity that will be dropped.
    fn is_outside(self, x: W) -> bool {
        let x = self.unscaled(x);
        (x < self.min || x > self.max) && (x.is_finite() || !self.drop_non_finite)
    }

    fn partial(self, at: Location, block: &[W]) -> Partial {
        let outside = block.iter().fold(false, |any, x| any | self.is_outside(*x));
        let all_finite = block.iter().fold(true, |all, x| all & x.is_finite());
        let partial = if all_finite {
            Partial::EMPTY
        } else {
            non_finite(block, |i| Location { index: at.index + i as u64, ..at })
        };
        Partial { outside, ..partial }
    }
}

/// Looks, and writes nothing.
pub(super) fn scan<T: Widen>(clip: &Clip, at: Location, data: &[u8]) -> Partial {
    let clamp = Clamp::new::<T>(clip);
    let mut chunk = Partial::EMPTY;
    for_blocks::<T>(data, |index, block| {
        chunk = chunk.merge(clamp.partial(Location { index: at.index + index, ..at }, block));
    });
    chunk
}

/// Clamps and tells what it met. Blocks in which nothing changes are not written.
pub(super) fn clamp<T: Widen>(clip: &Clip, at: Location, data: &mut [u8]) -> Partial {
    let clamp = Clamp::new::<T>(clip);
    let mut chunk = Partial::EMPTY;
    update_blocks::<T>(
        data,
        |index, block| {
            let partial = clamp.partial(Location { index: at.index + index, ..at }, block);
            chunk = chunk.merge(partial);
            partial.outside || (clamp.drop_non_finite && partial.non_finite > 0) || clamp.factor != 1.0
        },
        |_, block| {
            if clamp.drop_non_finite {
                drop_from(block);
            }
            for x in block {
                *x = clamp.clamped(clamp.unscaled(*x));
            }
        },
    );
    chunk
}

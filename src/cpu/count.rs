//! Counts non-finite elements and zeros, in one sweep.

use std::marker::PhantomData;

use super::element::{Bits, Widen, elements};
use super::isa::{Isa, Kernel, run};
use super::pool::in_parallel;
use super::tuning::{BLOCK, CHUNK};
use crate::Tensor;
use crate::dtype::with_element;
use crate::partial::{Location, Partial};

/// The zeros and non-finite elements of a tensor: [`Tensor::counts`](crate::Tensor::counts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorCounts {
    /// How many elements are 0 or -0.
    pub zeros: u64,
    /// How many are NaN or infinite.
    pub non_finite: u64,
    /// The index of the first NaN or infinite element.
    pub first_non_finite: Option<u64>,
}

/// The counts of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    zeros: u64,
    pub(super) non_finite: u64,
    nan: bool,
    first: Option<usize>,
}

impl Counts {
    /// The partial, if element number i is at `place(i)`.
    pub(super) fn partial(&self, place: impl Fn(usize) -> Location) -> Partial {
        Partial { non_finite: self.non_finite, nan: self.nan, first: self.first.map(place), ..Partial::EMPTY }
    }
}

impl Tensor<'_> {
    /// Counts zeros and non-finite elements, in one sweep on rayon's current pool.
    ///
    /// ```
    /// let counts = gradclip::Tensor::new(&[0.0f32, 1.0, f32::NAN, -0.0]).counts();
    /// assert_eq!((counts.zeros, counts.non_finite, counts.first_non_finite), (2, 1, Some(2)));
    /// ```
    #[must_use]
    pub fn counts(&self) -> TensorCounts {
        let mut counts = vec![Counts::default(); self.len().div_ceil(CHUNK)];
        let pieces = counts.len();
        let chunks = self.data.chunks(CHUNK * self.spec.dtype.size()).zip(&mut counts);
        in_parallel(chunks, pieces, self.data.len(), |(chunk, counts)| {
            with_element!(self.spec.dtype, T => *counts = count::<T>(chunk));
        });
        let none = TensorCounts { zeros: 0, non_finite: 0, first_non_finite: None };
        counts.iter().enumerate().fold(none, |all, (i, chunk)| TensorCounts {
            zeros: all.zeros + chunk.zeros,
            non_finite: all.non_finite + chunk.non_finite,
            first_non_finite: all.first_non_finite.or(chunk.first.map(|k| (i * CHUNK + k) as u64)),
        })
    }
}

pub(super) fn count<T: Widen>(data: &[u8]) -> Counts {
    let blocks = data.chunks(BLOCK * size_of::<T>()).enumerate();
    blocks.fold(Counts::default(), |all, (i, block)| {
        let [zeros, non_finite, nans] = run(Count::<T> { block, of: PhantomData });
        let first = || elements::<T>(block).position(|x| x.bits().magnitude() >= T::INFINITY);
        Counts {
            zeros: all.zeros + zeros,
            non_finite: all.non_finite + non_finite,
            nan: all.nan || nans > 0,
            first: all.first.or_else(|| (non_finite > 0).then(first)?.map(|k| i * BLOCK + k)),
        }
    })
}

/// Counts the zeros, non-finite elements and NaNs of a block. Integers of an element's size suffice for a block.
struct Count<'a, T> {
    block: &'a [u8],
    of: PhantomData<T>,
}

impl<T: Widen> Kernel for Count<'_, T> {
    type Output = [u64; 3];
    #[inline(always)]
    fn on<I: Isa>(self, _: I) -> [u64; 3] {
        let (mut zeros, mut non_finite, mut nans) = (T::Bits::ZERO, T::Bits::ZERO, T::Bits::ZERO);
        for x in elements::<T>(self.block) {
            let magnitude = x.bits().magnitude();
            zeros = zeros.plus(T::Bits::count(magnitude == T::Bits::ZERO));
            non_finite = non_finite.plus(T::Bits::count(magnitude >= T::INFINITY));
            nans = nans.plus(T::Bits::count(magnitude > T::INFINITY));
        }
        [zeros, non_finite, nans].map(Bits::to_u64)
    }
}

//! [`Piece`]: a run of elements in a buffer, and of a tensor.

use std::ops::Range;

use crate::Dtype;
use crate::segment::{By, SegmentLayout};

/// A run of elements in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which buffer, by its place in the plan's list.
    pub(crate) buffer: usize,
    pub(crate) dtype: Dtype,
    /// The first element, counted from the start of the buffer.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// Which tensor the elements belong to, and the place of the first of them in it.
    pub(crate) tensor: usize,
    pub(crate) first_element: u64,
    /// The segments of the tensor.
    pub(crate) layout: SegmentLayout,
}

impl Piece {
    /// Elements in a quad: 16 bytes, which a chunk reads at once.
    pub(super) fn per_quad(&self) -> u64 {
        16 / self.dtype.size() as u64
    }

    /// How many words its elements fill.
    pub(crate) fn words(&self) -> u64 {
        self.len.div_ceil(4 / self.dtype.size() as u64)
    }

    pub(crate) fn bytes(&self) -> Range<u64> {
        let size = self.dtype.size() as u64;
        self.start * size..(self.start + self.len) * size
    }

    /// Where in the buffer an element of the tensor is.
    pub(crate) fn at(&self, element: u64) -> u64 {
        self.start + (element - self.first_element)
    }

    /// The column of an element of the tensor, and the length of a row. In rows longer than 2^31 a chunk meets the end of a
    /// row at most once, and only the distance to it counts.
    pub(super) fn column_of(&self, element: u64) -> (u32, u32) {
        let columns = self.layout.columns;
        let folded = columns.min(1 << 31);
        let column = match self.layout.by {
            By::Whole => 0,
            By::Rows | By::Columns => folded - (columns - element % columns).min(folded),
        };
        (column as u32, folded as u32)
    }

    /// Runs of at most `chunk_words` words, cut between quads, as elements of the tensor.
    pub(super) fn runs(&self, elements: Range<u64>, chunk_words: u32) -> impl Iterator<Item = Range<u64>> + use<> {
        let step = u64::from(chunk_words) / 4 * self.per_quad();
        // Elements of the first quad that come before.
        let back = self.at(elements.start) % self.per_quad();
        let len = elements.end - elements.start;
        (0..(back + len).div_ceil(step)).map(move |i| {
            let (from, to) = ((i * step).saturating_sub(back), ((i + 1) * step - back).min(len));
            elements.start + from..elements.start + to
        })
    }
}

/// The element of a tensor from which others are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) tensor: usize,
    pub(crate) first_element: u64,
}

//! The norms of columns, read row by row. Twin of `shaders/norm_each.wgsl`.
//!
//! Each column has its own float64 sum, of four rows at a time, by the same tree as a run. If a column holds a
//! non-finite element, or its sum cannot be trusted, it is gathered and walked like a run.

use super::element::{Bits, Widen, elements};
use super::isa::{Isa, Kernel, LANES, run};
use super::norm::{of_block, trusts};
use super::terms::{self, Matrix};
use super::tuning::COLUMNS;
use crate::NormType;
use crate::partial::{Location, Partial};

/// The norms of adjacent columns of a matrix, one for each slot. A row has `stride` elements, and `data` begins with
/// the first element of the first of these columns.
pub(super) fn norms<T: Widen>(norm_type: NormType, at: Location, data: &[u8], stride: usize, slots: &mut [Partial]) {
    let (size, width) = (size_of::<T>(), slots.len());
    let rows = data.len().div_ceil(stride * size);
    let row = |i: usize| &data[i * stride * size..][..width * size];
    if norm_type == NormType::Inf {
        let mut maxima = [T::Bits::ZERO; COLUMNS];
        let maxima = &mut maxima[..width];
        for i in 0..rows {
            run(RowMaxima { row: row(i), maxima });
        }
        for (max, slot) in maxima.iter().zip(&mut *slots) {
            *slot = Partial { max: T::of_bits(*max).wide().into(), ..Partial::EMPTY };
        }
    } else {
        // Whole groups of lanes, so that the last one needs no other code.
        let mut sums = [[0f64; LANES]; COLUMNS / LANES];
        terms::add::<T>(norm_type, Matrix { data, stride, width }, &mut sums);
        for (sum, slot) in sums.as_flattened().iter().zip(&mut *slots) {
            *slot = Partial { sum: *sum, ..Partial::EMPTY };
        }
    }
    for (c, slot) in slots.iter_mut().enumerate() {
        if !trusts::<T>(norm_type, slot) {
            let element = |i: usize| bytemuck::pod_read_unaligned::<T>(&row(i)[c * size..][..size]).wide();
            let column: Vec<_> = (0..rows).map(element).collect();
            *slot = of_block(norm_type, &column, |i| at.ahead(i * stride + c));
        }
    }
}

/// Updates the largest magnitudes of columns with a row.
struct RowMaxima<'a, B> {
    row: &'a [u8],
    maxima: &'a mut [B],
}

impl<B: Bits> Kernel for RowMaxima<'_, B> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, _: I) {
        for (max, x) in self.maxima.iter_mut().zip(elements::<B>(self.row)) {
            *max = max.max_magnitude(x.magnitude());
        }
    }
}

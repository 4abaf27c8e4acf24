//! The norms of columns, read row by row. Twin of `shaders/norm_each.wgsl`.
//!
//! Each column is summed in a float64 of its own, four rows at a time, by the same tree as a run. A column that this does
//! not suffice for, because it holds a non-finite element or its sum cannot be trusted, is gathered and walked like one.

use std::marker::PhantomData;

use super::element::{Bits, Widen, elements, group_size};
use super::isa::{Isa, Kernel, LANES, run};
use super::norm::{STEP, of_block, tree, trusts};
use super::power::{Cube, Fourth, Magnitude, Power, Root, Square, Term, with_term};
use super::tuning::COLUMNS;
use crate::NormType;
use crate::partial::{Location, Partial};

/// The norms of adjacent columns, as many as `slots`, of a matrix with `stride` elements to a row, of which `data` begins
/// with the first element of the first of these columns.
pub(super) fn norms<T: Widen>(norm_type: NormType, at: Location, data: &[u8], stride: usize, slots: &mut [Partial]) {
    let (size, width) = (size_of::<T>(), slots.len());
    let rows = data.len().div_ceil(stride * size);
    let row = |i: usize| &data[i * stride * size..][..width * size];
    if norm_type == NormType::Inf {
        let mut maxima = [T::Bits::ZERO; COLUMNS];
        let maxima = &mut maxima[..width];
        for i in 0..rows {
            run(RowMaxima::<T> { row: row(i), maxima });
        }
        for (max, slot) in maxima.iter().zip(&mut *slots) {
            *slot = Partial { max: T::of_bits(*max).wide().into(), ..Partial::EMPTY };
        }
    } else {
        // Whole groups of lanes, so that the last one needs no other code.
        let mut sums = [[0f64; LANES]; COLUMNS / LANES];
        let (stride, width) = (stride * size, width * size);
        with_term!(norm_type, term => {
            run(ColumnSums::<T, _> { data, stride, width, sums: &mut sums, term, of: PhantomData });
        });
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

/// Takes a row into the largest magnitudes of its columns.
struct RowMaxima<'a, T: Widen> {
    row: &'a [u8],
    maxima: &'a mut [T::Bits],
}

impl<T: Widen> Kernel for RowMaxima<'_, T> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, _: I) {
        for (max, x) in self.maxima.iter_mut().zip(elements::<T>(self.row)) {
            *max = (*max).max(x.bits().magnitude());
        }
    }
}

/// Sums the terms of adjacent columns: `width` bytes of each row, with a row every `stride` bytes.
struct ColumnSums<'a, T, M> {
    data: &'a [u8],
    stride: usize,
    width: usize,
    sums: &'a mut [[f64; LANES]],
    term: M,
    of: PhantomData<T>,
}

impl<T: Widen, M: Term<T>> Kernel for ColumnSums<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let Self { data, stride, width, sums, .. } = self;
        let size = const { group_size::<T>() };
        let mut padded = [0; STEP * group_size::<f64>()];
        for rows in data.chunks(STEP * stride) {
            let whole_rows = rows.len() >= (STEP - 1) * stride + width;
            for (sums, start) in sums.iter_mut().zip((0..width).step_by(size)) {
                let end = width.min(start + size);
                let (groups, stride) = if whole_rows && end - start == size {
                    (&rows[start..], stride)
                } else {
                    // Zeros where no elements are add nothing.
                    padded.fill(0);
                    for (row, group) in rows.chunks(stride).zip(padded.chunks_exact_mut(size)) {
                        group[..end - start].copy_from_slice(&row[start..end]);
                    }
                    (&padded[..], size)
                };
                let terms = tree::<T, I, M>(isa, groups, stride, self.term);
                *sums = isa.doubles(isa.add(isa.d(*sums), terms));
            }
        }
    }
}

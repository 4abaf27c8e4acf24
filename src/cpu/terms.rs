//! Sums of |x|^p over the rows of a matrix, column by column. A run is such a matrix too: its columns are the lanes.
//!
//! Terms other than |x| and x² are compiled for fewer dtypes: closed forms for float32 and float64, and any |x|^p for
//! float64. Elements of other dtypes are converted a block at a time. A sum has the same order and bits either way.

use std::marker::PhantomData;

use super::element::{Lanes, Wide, Widen, group_size, load};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::{self, Map, ToF64};
use super::power::{Cube, Fourth, Magnitude, Power, Root, Square};
use super::tuning::BLOCK;
use crate::NormType;

/// The rows, or groups of a run, whose terms are added before they go into the sums.
pub(super) const STEP: usize = 4;

/// The first `width` elements of every `stride`. The last row may end early.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [u8],
    pub(super) stride: usize,
    pub(super) width: usize,
}

/// The sums of columns, in groups of [`LANES`].
pub(super) type Sums<'a> = &'a mut [[f64; LANES]];

/// Adds |x|^p of each element to the sum of its column.
pub(super) fn add<T: Widen>(norm_type: NormType, matrix: Matrix<'_>, sums: Sums<'_>) {
    let wide = const { size_of::<T>() == size_of::<T::Wide>() };
    match norm_type.power() {
        1.0 => add_terms::<T, _>(Magnitude, matrix, sums),
        2.0 => add_terms::<T, _>(Square, matrix, sums),
        3.0 if wide => add_terms::<T::Wide, _>(Cube, matrix, sums),
        4.0 if wide => add_terms::<T::Wide, _>(Fourth, matrix, sums),
        0.5 if wide => add_terms::<T::Wide, _>(Root, matrix, sums),
        3.0 | 4.0 | 0.5 => in_blocks::<T>(matrix, sums, |block, sums| add::<f64>(norm_type, block, sums)),
        p => in_blocks::<T>(matrix, sums, |block, sums| add_terms::<f64, _>(Power { p, log2_top: 0.0 }, block, sums)),
    }
}

/// Calls `add` with blocks of elements in float64, of whole steps, and their columns' sums. Float64 is not copied.
pub(super) fn in_blocks<T: Widen>(matrix: Matrix<'_>, sums: Sums<'_>, add: impl Fn(Matrix<'_>, Sums<'_>)) {
    if const { size_of::<T>() == size_of::<f64>() } {
        return add(matrix, sums);
    }
    let Matrix { data, stride, width } = matrix;
    let size = size_of::<T>();
    let mut block = [[0f64; LANES]; BLOCK / LANES];
    let columns = width.min(BLOCK / STEP);
    let rows = BLOCK / columns.next_multiple_of(LANES) / STEP * STEP;
    for data in data.chunks(rows * stride * size) {
        for (left, sums) in (0..width).step_by(columns).zip(sums.chunks_mut(BLOCK / STEP / LANES)) {
            let columns = columns.min(width - left);
            let groups = columns.div_ceil(LANES);
            // Rows without gaps count as one.
            let at_once = if columns == stride && columns == groups * LANES { rows } else { 1 };
            let mut filled = 0;
            for row in data[left * size..].chunks(at_once * stride * size) {
                let row = &row[..row.len().min(at_once * columns * size)];
                let to = &mut block[filled..][..row.len().div_ceil(group_size::<T>())];
                filled += to.len();
                map::write::<T, _>(ToF64, row, to);
            }
            // Zeros add nothing.
            let steps = filled.next_multiple_of(STEP * groups);
            block[filled..steps].fill([0.0; LANES]);
            let data = bytemuck::cast_slice(block[..steps].as_flattened());
            add(Matrix { data, stride: groups * LANES, width: groups * LANES }, sums);
        }
    }
}

fn add_terms<T: Widen, M: Map<T>>(term: M, matrix: Matrix<'_>, sums: Sums<'_>) {
    run(Add::<T, M> { matrix, sums, term, of: PhantomData });
}

/// Adds the terms of a matrix to the sums of its columns.
struct Add<'a, T, M> {
    matrix: Matrix<'a>,
    sums: Sums<'a>,
    term: M,
    of: PhantomData<T>,
}

impl<T: Widen, M: Map<T>> Kernel for Add<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let Self { matrix: Matrix { data, stride, width }, sums, .. } = self;
        let (size, stride, width) = (const { group_size::<T>() }, stride * size_of::<T>(), width * size_of::<T>());
        let mut padded = [0; STEP * group_size::<f64>()];
        for rows in data.chunks(STEP * stride) {
            let whole_rows = rows.len() >= (STEP - 1) * stride + width;
            for (sums, start) in sums.iter_mut().zip((0..width).step_by(size)) {
                let end = width.min(start + size);
                let (groups, stride) = if whole_rows && end - start == size {
                    (&rows[start..], stride)
                } else {
                    // Zeros in place of missing elements add nothing.
                    padded.fill(0);
                    for (row, group) in rows.chunks(stride).zip(padded.chunks_exact_mut(size)) {
                        let row = &row[start.min(row.len())..end.min(row.len())];
                        group[..row.len()].copy_from_slice(row);
                    }
                    (&padded[..], size)
                };
                let terms = tree::<T, I, M>(isa, groups, stride, self.term);
                *sums = isa.doubles(isa.add(isa.d(*sums), terms));
            }
        }
    }
}

/// The sum of the terms of four groups, `stride` bytes apart, lane by lane.
#[inline(always)]
pub(super) fn tree<T: Widen, I: Isa, M: Map<T>>(isa: I, groups: &[u8], stride: usize, term: M) -> I::D {
    let first =
        M::To::add(isa, term_of::<T, I, M>(isa, groups, term), term_of::<T, I, M>(isa, &groups[stride..], term));
    let [third, fourth] = [&groups[2 * stride..], &groups[3 * stride..]];
    let second = M::To::add(isa, term_of::<T, I, M>(isa, third, term), term_of::<T, I, M>(isa, fourth, term));
    M::To::to_f64(isa, M::To::add(isa, first, second))
}

/// The terms of the first group.
#[inline(always)]
fn term_of<T: Widen, I: Isa, M: Map<T>>(isa: I, groups: &[u8], term: M) -> Lanes<I, M::To> {
    term.of(isa, T::widen(isa, load(&groups[..group_size::<T>()])))
}

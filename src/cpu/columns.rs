//! The norms of columns, read row by row. Twin of `shaders/norm_each.wgsl`.
//!
//! Each column is summed in a float64 of its own. A column that this does not suffice for, because it holds a non-finite
//! element or its sum leaves the safe range, is gathered and measured like any run.

use super::block::{Wide, Widen, for_blocks};
use super::norm::{of_finite_or_not, with_term};
use super::tuning::COLUMNS;
use crate::NormType;
use crate::partial::{Location, Partial};

/// The norms of adjacent columns, as many as `slots`, of a matrix with `stride` elements to a row, of which `data` begins
/// with the first element of the first of these columns.
pub(super) fn norms<T: Widen>(norm_type: NormType, at: Location, data: &[u8], stride: usize, slots: &mut [Partial]) {
    let (size, width) = (size_of::<T>(), slots.len());
    let rows = data.len().div_ceil(stride * size);
    let row = |i: usize| &data[i * stride * size..][..width * size];
    let mut sums = [0f64; COLUMNS];
    for i in 0..rows {
        for_blocks::<T>(row(i), |first, block| {
            let sums = &mut sums[first as usize..];
            if norm_type == NormType::Inf {
                // A NaN is lost in `max`, so it is taken for an infinity.
                for (sum, x) in sums.iter_mut().zip(block) {
                    let size = Into::<f64>::into(*x).abs();
                    *sum = if size.is_nan() { f64::INFINITY } else { sum.max(size) };
                }
            } else {
                with_term!(norm_type, term => {
                    for (sum, x) in sums.iter_mut().zip(block) {
                        *sum += term((*x).into());
                    }
                });
            }
        });
    }
    let mut column = Vec::new();
    for (c, (sum, slot)) in sums.into_iter().zip(slots).enumerate() {
        if T::Wide::trusts(norm_type, sum) {
            *slot = match norm_type {
                NormType::Inf => Partial { max: sum, ..Partial::EMPTY },
                _ => Partial { sum, ..Partial::EMPTY },
            };
            continue;
        }
        column.clear();
        for i in 0..rows {
            for_blocks::<T>(&row(i)[c * size..][..size], |_, x| column.extend_from_slice(x));
        }
        let place = |i: usize| Location { index: at.index + (i * stride + c) as u64, ..at };
        *slot = of_finite_or_not(norm_type, &column, place);
    }
}

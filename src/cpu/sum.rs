//! Sums scaled examples. Twin of `shaders/sum.wgsl`.

use super::block::{Widen, for_blocks};
use super::scale::scaled;
use super::tuning::COLUMNS;
use crate::Dtype;
use crate::partial::Outcome;

/// Writes the sums over the rows of `data` of the columns from `left` on, each element multiplied by its row's factor.
/// Products are rounded as a clip would round them in the type that is computed in, and summed in float64. `sums` holds
/// float64 for gradients of float64 and float32 for all others, at any alignment.
pub(super) fn sum<T: Widen>(
    outcomes: &[Outcome],
    drop: bool,
    data: &[u8],
    columns: usize,
    left: usize,
    sums: &mut [u8],
) {
    let wide = if T::DTYPE == Dtype::F64 { 8 } else { 4 };
    let width = sums.len() / wide;
    let mut totals = [0f64; COLUMNS];
    for (row, outcome) in outcomes.iter().enumerate() {
        let start = (row * columns + left) * size_of::<T>();
        for_blocks::<T>(&data[start..start + width * size_of::<T>()], |at, block| {
            for (total, x) in totals[at as usize..].iter_mut().zip(block) {
                *total += scaled(outcome, drop, *x).into();
            }
        });
    }
    for (sum, total) in sums.chunks_mut(wide).zip(totals) {
        if wide == 8 {
            sum.copy_from_slice(&total.to_ne_bytes());
        } else {
            sum.copy_from_slice(&(total as f32).to_ne_bytes());
        }
    }
}

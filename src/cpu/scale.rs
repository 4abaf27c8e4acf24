//! Multiplies a chunk by the factors of its segments. Twin of `shaders/scale.wgsl`.

use super::block::{Wide, Widen, update_blocks};
use crate::partial::{Action, Outcome};
use crate::segment::{By, Layout};

/// Scales the elements of a chunk, of which the first is number `first` of its tensor. `outcomes` are the tensor's.
pub(super) fn scale<T: Widen>(outcomes: &[Outcome], layout: Layout, first: u64, drop: bool, data: &mut [u8]) {
    let size = size_of::<T>() as u64;
    match layout.by {
        By::Whole => scale_run::<T>(&outcomes[0], drop, data),
        By::Rows => {
            let (mut rest, mut at) = (data, first);
            while !rest.is_empty() {
                let left = (layout.columns - at % layout.columns).min(rest.len() as u64 / size);
                let (run, others) = rest.split_at_mut((left * size) as usize);
                scale_run::<T>(&outcomes[layout.segment_of(at) as usize], drop, run);
                (rest, at) = (others, at + left);
            }
        }
        By::Columns => update_blocks::<T>(
            data,
            |_, _| true,
            |at, block| {
                let mut column = ((first + at) % layout.columns) as usize;
                for x in block {
                    *x = scaled(&outcomes[column], drop, *x);
                    column = if column + 1 == outcomes.len() { 0 } else { column + 1 };
                }
            },
        ),
    }
}

fn scale_run<T: Widen>(outcome: &Outcome, drop: bool, data: &mut [u8]) {
    match outcome.action {
        Action::Leave => {}
        Action::Zero => data.fill(0),
        Action::Apply => update_blocks::<T>(
            data,
            |_, _| true,
            |_, block| {
                if drop {
                    drop_from(block);
                }
                if let Some(factor) = Wide::factor(outcome.factor) {
                    for x in block {
                        *x = x.scaled(factor);
                    }
                } else {
                    for x in block {
                        *x = x.scaled_by_any(outcome.factor);
                    }
                }
            },
        ),
    }
}

/// What becomes of one element.
pub(super) fn scaled<W: Wide>(outcome: &Outcome, drop: bool, x: W) -> W {
    match outcome.action {
        Action::Leave => x,
        Action::Zero => W::ZERO,
        Action::Apply if drop && !x.is_finite() => W::ZERO,
        Action::Apply => W::factor(outcome.factor).map_or_else(|| x.scaled_by_any(outcome.factor), |f| x.scaled(f)),
    }
}

/// Sets NaN and infinite elements to 0.
pub(super) fn drop_from<W: Wide>(block: &mut [W]) {
    for x in block {
        if !x.is_finite() {
            *x = W::ZERO;
        }
    }
}

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
        By::Columns => {
            let factors: Option<Vec<_>> =
                outcomes.iter().map(|outcome| plain_factor::<T::Wide>(outcome, drop)).collect();
            update_blocks::<T>(
                data,
                |_, _| true,
                |at, block| {
                    let (mut rest, mut column) = (block, ((first + at) % layout.columns) as usize);
                    while !rest.is_empty() {
                        let (run, others) = rest.split_at_mut((outcomes.len() - column).min(rest.len()));
                        if let Some(factors) = &factors {
                            run.iter_mut().zip(&factors[column..]).for_each(|(x, factor)| *x = x.scaled(*factor));
                        } else {
                            run.iter_mut().zip(&outcomes[column..]).for_each(|(x, o)| *x = scaled(o, drop, *x));
                        }
                        (rest, column) = (others, 0);
                    }
                },
            );
        }
    }
}

/// What all elements of a segment are multiplied by, if that is all that is done with them.
fn plain_factor<W: Wide>(outcome: &Outcome, drop: bool) -> Option<W> {
    match outcome.action {
        // Where others are scaled, a segment that is left alone holds finite elements only.
        Action::Leave => W::factor(1.0),
        Action::Apply if !drop => W::factor(outcome.factor),
        _ => None,
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

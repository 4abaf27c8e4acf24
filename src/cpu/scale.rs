//! Multiplies a chunk by the factor of its segment. Twin of `shaders/scale.wgsl`.

use super::block::{Wide, Widen, update_blocks};
use crate::partial::Outcome;

pub(super) fn scale<T: Widen>(outcome: &Outcome, drop_non_finite: bool, data: &mut [u8]) {
    update_blocks::<T>(
        data,
        |_, _| true,
        |block| {
            if drop_non_finite {
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
    );
}

/// Sets NaN and infinite elements to 0.
pub(super) fn drop_from<W: Wide>(block: &mut [W]) {
    for x in block {
        if !x.is_finite() {
            *x = W::ZERO;
        }
    }
}

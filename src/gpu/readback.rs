//! What the device tells the host: the twins of `Results`, `Partial` and `Outcome` in `shaders/shared`.

use bytemuck::{Pod, Zeroable};

use super::number::Number;
use super::table::{ChunkOrigin, NOWHERE};
use crate::Clip;
use crate::clip::Mode;
use crate::partial::{Action, Location, Outcome, Partial};

/// The head of `Results`, with the first of its outcomes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Results {
    pub(super) steps: u32,
    pub(super) norm_kind: u32,
    padding: [u32; 6],
    pub(super) total: PartialRow,
    pub(super) outcome: OutcomeRow,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct PartialRow {
    sum: Number,
    max: f32,
    non_finite: u32,
    non_finite_high: u32,
    first_chunk: u32,
    first_element: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct OutcomeRow {
    action: u32,
    clipped: u32,
    norm: Number,
    factor_value: f32,
    factor_is_float: u32,
    factor_exact: Number,
}

impl PartialRow {
    /// The partial, with its location told in tensors. The norm is in the outcome.
    pub(super) fn to_partial(self, origins: &[ChunkOrigin]) -> Partial {
        let first = (self.first_chunk != NOWHERE).then(|| {
            let origin = origins[self.first_chunk as usize];
            Location { tensor: origin.tensor, index: origin.first_element + u64::from(self.first_element) }
        });
        Partial {
            non_finite: u64::from(self.non_finite_high) << 32 | u64::from(self.non_finite),
            nan: self.flags & 1 != 0,
            first,
            outside: self.flags & 2 != 0,
            ..Partial::EMPTY
        }
    }
}

impl OutcomeRow {
    pub(super) fn to_outcome(self, clip: &Clip, norm_kind: u32) -> Outcome {
        let norm = match (clip.mode, norm_kind) {
            (Mode::Value { .. }, _) => f64::NAN,
            (_, 0) => self.norm.to_f64() / clip.grad_scale,
            (_, 1) => f64::INFINITY,
            (..) => f64::NAN,
        };
        let factor = self.factor_exact.to_f64();
        // By the constants of shaders/shared/outcome.wgsl.
        let (action, clip_coef) = match self.action {
            0 => (Action::Leave, 1.0),
            1 => (Action::Zero, 0.0),
            2 if self.clipped == 0 => (Action::Apply, 1.0),
            // The rounded factor of a coefficient just below 1 may come out above.
            2 => (Action::Apply, (factor * clip.grad_scale).min(1.0)),
            3 => (Action::Apply, f64::NAN),
            _ => (Action::Apply, 0.0),
        };
        let clipped = clip_coef != 1.0 || (action == Action::Apply && self.clipped == 1);
        Outcome { norm, clip_coef, clipped, factor, action }
    }
}

//! A segment's norm and coefficient, and what is done with its elements. The GPU's twin is `shaders/finalise.wgsl`.

use crate::magnitude::{Magnitude, ldexp};
use crate::partial::Partial;
use crate::{Clip, NonFinite, NormType, Skipped};

/// What the apply pass does with a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Not one byte is written.
    Leave,
    /// Every element becomes 0.
    Zero,
    /// Elements are multiplied or clamped; under [`NonFinite::Drop`] the non-finite ones become 0.
    Apply,
}

/// What a clip does with one segment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// N: the norm over gradients divided by `grad_scale`; NaN for a value clip.
    pub(crate) norm: f64,
    /// Whether `norm` is NaN or infinite because an element is, and not because it exceeds float64.
    pub(crate) non_finite: bool,
    /// c, without `grad_scale`.
    pub(crate) clip_coef: f64,
    /// Whether c is below 1, or NaN, or the segment becomes 0.
    pub(crate) clipped: bool,
    /// `c / grad_scale`: the number that elements are multiplied by.
    pub(crate) factor: f64,
    pub(crate) action: Action,
}

/// What is known of a segment when its outcome is decided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Known {
    /// The measured norm, divided by `grad_scale`. NaN or infinite if an element is, except under [`NonFinite::Drop`].
    /// NaN if no norm is measured.
    pub(crate) norm: Magnitude,
    /// Whether there are non-finite elements.
    pub(crate) bad: bool,
}

impl Clip {
    /// What a merged partial says about its segment.
    pub(crate) fn known(&self, partial: &Partial) -> Known {
        Known { norm: self.norm_of(self.measured(), partial), bad: partial.non_finite > 0 }
    }

    /// N over everything, given its merged partial; NaN if none is measured.
    pub(crate) fn total_norm(&self, total: &Partial, elements: u64) -> f64 {
        self.norm_of(self.reported(), total).times(self.weight(elements)).to_f64()
    }

    /// A norm divided by `grad_scale`.
    fn norm_of(&self, norm_type: Option<NormType>, partial: &Partial) -> Magnitude {
        match norm_type {
            None => Magnitude::plain(f64::NAN),
            Some(norm_type) if partial.non_finite == 0 || self.non_finite == NonFinite::Drop => {
                partial.finite_norm(norm_type, self.grad_scale)
            }
            Some(_) if partial.nan => Magnitude::plain(f64::NAN),
            Some(_) => Magnitude::plain(f64::INFINITY),
        }
    }

    /// Why the step is skipped, given what is known of everything. Its measured norm multiplied by `weight` is N.
    pub(crate) fn skips(&self, everything: Known, weight: f64) -> Option<Skipped> {
        if everything.bad && self.refuses_non_finite() {
            return Some(Skipped::NonFinite);
        }
        everything.norm.times(weight).exceeds(self.skip_above).then_some(Skipped::Above)
    }

    /// Decides what to do with a segment. Its measured norm is compared with `max_norm`, and multiplied by `weight` it
    /// is N. `refused` says that the step is skipped.
    pub(crate) fn outcome(&self, known: Known, max_norm: Magnitude, weight: f64, refused: bool) -> Outcome {
        let Known { norm, bad } = known;
        let wanted_coef = match self.measured() {
            None => 1.0,
            // Infinity divided by infinity, as in PyTorch.
            Some(_) if bad && !max_norm.is_finite() && !norm.is_finite() => f64::NAN,
            Some(_) => coefficient(norm, max_norm, self.eps_and_floor()),
        };
        let action = if refused {
            Action::Leave
        } else if bad && self.non_finite == NonFinite::Zero {
            Action::Zero
        } else if self.measured().is_some()
            && wanted_coef == 1.0
            && self.grad_scale == 1.0
            && !(bad && self.non_finite == NonFinite::Drop)
        {
            Action::Leave
        } else {
            Action::Apply
        };
        let clip_coef = match action {
            Action::Leave => 1.0,
            Action::Zero => 0.0,
            Action::Apply => wanted_coef,
        };
        let clipped = clip_coef != 1.0;
        let (non_finite, factor) = (!norm.is_finite(), clip_coef / self.grad_scale);
        Outcome { norm: norm.times(weight).to_f64(), non_finite, clip_coef, clipped, factor, action }
    }
}

/// c = min(1, max_norm / (max(N, floor) + eps)), and 1 unless N + eps exceeds `max_norm`. A NaN norm gives NaN, as in
/// PyTorch. 0 / 0 (`max_norm`, `eps` and the norm all zero) gives 1, because nothing exceeds the threshold; Optax gives
/// NaN there.
fn coefficient(norm: Magnitude, max_norm: Magnitude, (eps, floor): (f64, f64)) -> f64 {
    let (norm, max_norm, exponent) = norm.aligned(max_norm);
    let (eps, floor) = (ldexp(eps, -exponent), ldexp(floor, -exponent));
    if norm.is_nan() {
        f64::NAN
    } else if norm + eps > max_norm {
        max_norm / (norm.max(floor) + eps)
    } else {
        1.0
    }
}

#[cfg(test)]
#[path = "tests/decision.rs"]
mod tests;

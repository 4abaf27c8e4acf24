//! [`ClipReport`]: what a clip reports.

use crate::decision::{Action, Outcome};
use crate::segment::Segments;
use crate::{Clip, Error, NonFinite, NonFiniteElements, Scope};

/// The outcome of one clip.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ClipReport {
    /// N over all gradients, whatever the scope, as the mode defines it ([`Clip`](crate::Clip) has the table). It is
    /// divided by `grad_scale`, and measured before anything is clipped. NaN or infinite if a gradient is, except under
    /// [`NonFinite::Drop`](crate::NonFinite::Drop), which measures the rest. NaN for a value clip without
    /// [`Clip::report_norm`](crate::Clip::report_norm). If finite
    /// gradients have a norm that exceeds float64, it is infinite here, and they are still clipped by their true norm.
    pub total_norm: f64,
    /// The factor c that gradients were multiplied by, beside `1 / grad_scale`. It is the smallest of all segments, and
    /// NaN if one is NaN. It is 1 when nothing was clipped, and for a value clip.
    pub clip_coef: f64,
    /// Whether there was anything to clip: the norm of a segment exceeded its threshold (if by less than a rounding,
    /// `clip_coef` may still be 1), a segment became 0 or NaN, or an element lay outside the bounds of a value clip.
    /// Dividing by `grad_scale` alone, or dropping non-finite elements, does not count.
    pub clipped: bool,
    /// How many elements were measured.
    pub elements: u64,
    /// The NaN and infinite elements, if there were any.
    pub non_finite: Option<NonFiniteElements>,
    /// What rounding to the stored dtype has lost of all tensors that this process has clipped, replicas included. None
    /// after a measurement, a sum of examples and a step, which store no clipped element, and for a plan on the device
    /// without [`PlanOptions::count_lost`](crate::gpu::PlanOptions::count_lost).
    pub lost: Option<LostElements>,
    /// Why the step must not be taken, if so: nothing was written, for every group of the call. None if the gradients
    /// are to be used, whether or not anything was clipped.
    pub skipped: Option<Skipped>,
    /// Each segment of a scope other than [`Scope::Global`](crate::Scope::Global), ordered by tensor, then by unit or
    /// example. Empty under `Global`, where the totals are complete.
    pub segments: Vec<SegmentReport>,
}

impl ClipReport {
    /// Whether a gradient was NaN or infinite. Mixed-precision training then skips the step and lowers the loss scale.
    /// PyTorch calls this `found_inf`.
    #[must_use]
    pub fn has_non_finite(&self) -> bool {
        self.non_finite.is_some()
    }

    /// How many segments were clipped.
    #[must_use]
    pub fn num_clipped(&self) -> usize {
        self.segments.iter().filter(|segment| segment.clipped).count()
    }
}

/// How many elements are lost because they are rounded: by a clip to the stored dtype ([`ClipReport::lost`]), or to a
/// narrower format ([`Histogram`](crate::Histogram)). It does not count what a clip makes 0 or infinite in exact
/// arithmetic too, as a threshold of 0 or a bound does. Nor does a clip count elements that were subnormal before it
/// (below 1.2e-38 in float32 and bfloat16), except in float16, where gradients are often so small (below 6.2e-5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LostElements {
    /// How many were not 0 and became 0.
    pub zero: u64,
    /// How many were finite and became infinite, or exceed the largest number of a format that has no infinity.
    pub infinite: u64,
}

impl LostElements {
    pub(crate) fn and(self, other: Self) -> Self {
        Self { zero: self.zero + other.zero, infinite: self.infinite + other.infinite }
    }
}

/// Why a step is skipped. If both are so, the first is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Skipped {
    /// A gradient is NaN or infinite, under [`NonFinite::Skip`](crate::NonFinite::Skip).
    NonFinite,
    /// The total norm is above [`Clip::skip_above`](crate::Clip::skip_above), or above the limit of a threshold
    /// ([`ZClip::skip_above_z`](crate::ZClip::skip_above_z)).
    Above,
}

/// The outcome of one segment.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SegmentReport {
    /// The place of its tensor in the list; None for an example over all tensors.
    pub tensor: Option<usize>,
    /// The number of the unit or example, in its tensor or over all tensors; None for a whole tensor. Units along several
    /// axes are numbered in row-major order.
    pub index: Option<u64>,
    /// N, as the mode defines it. Infinite also if finite gradients have a norm that exceeds float64.
    pub norm: f64,
    /// Whether `norm` is NaN or infinite because a gradient is.
    pub non_finite: bool,
    /// c.
    pub clip_coef: f64,
    /// Whether it was clipped.
    pub clipped: bool,
}

impl Clip {
    /// The report on a clip. It takes N over everything, whether an element lies outside a value clip's bounds, the
    /// number of elements, the non-finite elements, and why the step is skipped.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy.
    pub(crate) fn report(
        &self,
        (segments, outcomes): (&Segments, &[Outcome]),
        (total_norm, outside): (f64, bool),
        elements: u64,
        non_finite: Option<NonFiniteElements>,
        skipped: Option<Skipped>,
    ) -> Result<ClipReport, Error> {
        if let (Some(found), NonFinite::Error) = (&non_finite, self.non_finite) {
            return Err(Error::NonFinite(found.clone()));
        }
        let least = |least: f64, o: &Outcome| if least.is_nan() || o.clip_coef >= least { least } else { o.clip_coef };
        let applies = outcomes.iter().any(|o| o.action == Action::Apply);
        let each = segments.places().zip(outcomes).map(|((tensor, index), outcome)| {
            let Outcome { norm, non_finite, clip_coef, clipped, .. } = *outcome;
            SegmentReport { tensor, index, norm, non_finite, clip_coef, clipped }
        });
        Ok(ClipReport {
            total_norm,
            clip_coef: outcomes.iter().fold(1.0, least),
            clipped: outcomes.iter().any(|o| o.clipped) || (outside && applies),
            elements,
            non_finite,
            lost: None,
            skipped,
            segments: if self.scope == Scope::Global { Vec::new() } else { each.collect() },
        })
    }
}

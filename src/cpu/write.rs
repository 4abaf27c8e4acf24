//! Applies a decision: scales or clamps.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};

use super::lost::lost;
use super::pool::in_parallel;
use super::tuning::{CHUNK, WRITTEN_AT_ONCE};
use super::{clamp, scale};
use crate::context::Progress;
use crate::decision::{Action, Outcome};
use crate::dtype::with_element;
use crate::partial::{Location, Partial};
use crate::report::LostElements;
use crate::segment::{By, Matrices, Segments};
use crate::{Clip, Dtype, NonFinite, TensorMut};

/// What a write met.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Written {
    /// What clamps found in tensors that count.
    pub(crate) found: Partial,
    pub(crate) lost: LostElements,
}

impl Written {
    pub(crate) const NOTHING: Self = Self { found: Partial::EMPTY, lost: LostElements { zero: 0, infinite: 0 } };

    pub(crate) fn and(self, other: Self) -> Self {
        Self { found: self.found.merge(other.found), lost: self.lost.and(other.lost) }
    }
}

/// Writes what the outcomes say. `progress` counts elements that are read only here.
pub(super) fn write(
    clip: &Clip,
    (segments, outcomes): (&Segments, &[Outcome]),
    tensors: &mut [TensorMut<'_>],
    progress: Option<&Progress>,
) -> Written {
    let (pieces, bytes) = pieces(tensors);
    let work = tensors.iter_mut().zip(&segments.layouts).enumerate().flat_map(|(i, (tensor, layout))| {
        let (left, counted) = (layout.leaves(outcomes, 0..tensor.spec.len), tensor.spec.counted);
        chunks(i, tensor).filter(move |_| !left).map(move |chunk| (chunk, layout, counted))
    });
    let (total, panicked) = (Mutex::new(Written::NOTHING), Mutex::new(None));
    in_parallel(work, pieces, bytes, |((at, dtype, data), layout, counted)| {
        // A panic of the caller's function must not stop the writing halfway.
        if let Some(progress) = progress
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| progress.measured(data.len())))
        {
            panicked.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        let mut met = write_piece(clip, at, dtype, (layout, outcomes), data);
        if !counted {
            met.found = Partial::EMPTY;
        }
        if met != Written::NOTHING {
            // Nothing is summed: counts and the first location do not depend on the order.
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            *total = total.and(met);
        }
    });
    if let Some(panic) = panicked.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The chunks of tensor number `tensor`, each with its location and its bytes.
fn chunks<'t>(tensor: usize, t: &'t mut TensorMut<'_>) -> impl Iterator<Item = (Location, Dtype, &'t mut [u8])> {
    let dtype = t.dtype();
    let chunks = t.data.chunks_mut(CHUNK * dtype.size()).enumerate();
    chunks.map(move |(i, data)| (Location { tensor, index: (i * CHUNK) as u64 }, dtype, data))
}

/// About how many chunks there are, and how many bytes.
fn pieces(tensors: &[TensorMut<'_>]) -> (usize, usize) {
    let bytes: usize = tensors.iter().map(|t| t.data.len()).sum();
    (tensors.len() + bytes / (CHUNK * size_of::<f32>()), bytes)
}

/// Scales or clamps a piece of a tensor, given the outcomes of all segments.
pub(crate) fn write_piece(
    clip: &Clip,
    at: Location,
    dtype: Dtype,
    how @ (matrices, _): (&Matrices, &[Outcome]),
    data: &mut [u8],
) -> Written {
    // What rounding loses is looked for in every float16 clip, and seldom in others (`lost`). Each call looks at the
    // factors of all columns.
    let looked_for = dtype == Dtype::F16 && matrices.matrix.by != By::Columns;
    let step = if looked_for { WRITTEN_AT_ONCE * dtype.size() } else { data.len().max(1) };
    let blocks = data.chunks_mut(step).enumerate();
    blocks.fold(Written::NOTHING, |all, (i, data)| {
        all.and(write_block(clip, at.ahead(i * WRITTEN_AT_ONCE), dtype, how, data))
    })
}

fn write_block(clip: &Clip, at: Location, dtype: Dtype, how: (&Matrices, &[Outcome]), data: &mut [u8]) -> Written {
    let lost = lost(clip, at.index, dtype, how, data);
    Written { found: apply_block(clip, at, dtype, how, data), lost }
}

/// Scales or clamps elements without a look at what rounding loses, and returns what a clamp found.
pub(super) fn apply_block(
    clip: &Clip,
    at: Location,
    dtype: Dtype,
    (matrices, outcomes): (&Matrices, &[Outcome]),
    mut data: &mut [u8],
) -> Partial {
    if clip.measured().is_some() {
        let drop = clip.non_finite == NonFinite::Drop;
        let end = at.index + (data.len() / dtype.size()) as u64;
        for (layout, elements) in matrices.within(at.index..end) {
            let (own, rest) = data.split_at_mut((elements.end - elements.start) as usize * dtype.size());
            with_element!(dtype, T => scale::scale::<T>(outcomes, layout, elements.start, drop, own));
            data = rest;
        }
        Partial::EMPTY
    } else if outcomes[0].action == Action::Zero {
        data.fill(0);
        Partial::EMPTY
    } else {
        with_element!(dtype, T => clamp::clamp::<T>(clip, at, data))
    }
}

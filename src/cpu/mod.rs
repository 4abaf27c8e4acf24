//! The CPU path: the fallback, and the check on the GPU.
//!
//! ```text
//! partials = for each chunk of each tensor, in parallel: norm(chunk)      cpu/norm.rs
//! total    = partials merged from first to last                          partial.rs
//! outcome  = the coefficient that follows                                partial.rs
//! for each chunk of each tensor, in parallel: scale or clamp             cpu/scale.rs, cpu/clamp.rs
//! ```
//!
//! Chunks have a fixed length and their partials merge in list order, so the answer does not depend on the number of
//! threads. Work runs on rayon's current pool: the global one, or the caller's through `ThreadPool::install`.
//!
//! Within a chunk, elements are taken in blocks that fit the first-level cache. A block is widened once (half precision
//! to float32; a misaligned one is copied) so that each kernel is written for float32 and float64 only.

mod block;
mod clamp;
mod norm;
mod scale;
mod tuning;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::clip::Mode;
use crate::partial::{Action, Location, Outcome, Partial};
use crate::progress::Progress;
use crate::{Clip, ClipReport, Dtype, Error, NonFinite, Tensor, TensorMut};
use tuning::{CHUNK, PARALLEL_FROM};

/// Calls `$body` with `$T` standing for the Rust type of `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            Dtype::F32 => {
                type $T = f32;
                $body
            }
            Dtype::F64 => {
                type $T = f64;
                $body
            }
            Dtype::F16 => {
                type $T = f16;
                $body
            }
            Dtype::BF16 => {
                type $T = bf16;
                $body
            }
        }
    };
}

/// Measures what [`apply`] would do, and writes nothing.
pub(crate) fn measure(clip: &Clip, tensors: &[Tensor<'_>], progress: &Progress) -> Result<ClipReport, Error> {
    let (outcome, total) = outcome(clip, tensors, progress);
    clip.report(&outcome, &total, elements(tensors), |i| tensors[i].name)
}

/// Clips in place.
pub(crate) fn apply(clip: &Clip, tensors: &mut [TensorMut<'_>], progress: &Progress) -> Result<ClipReport, Error> {
    let views: Vec<_> = tensors.iter().map(TensorMut::as_tensor).collect();
    let count = elements(&views);
    let (outcome, total) = if clip.reads_first() {
        outcome(clip, &views, progress)
    } else {
        let total = merged(chunks_mut(tensors), count, |(at, dtype, data)| {
            progress.measured(data.len());
            with_element!(dtype, T => clamp::clamp::<T>(clip, at, data))
        });
        (clip.outcome(&total, &total), total)
    };
    // Before any write: the policy `Error` ends here.
    let report = clip.report(&outcome, &total, count, |i| tensors[i].name)?;
    if clip.reads_first() && outcome.action != Action::Leave {
        let drop = clip.non_finite == NonFinite::Drop;
        merged(chunks_mut(tensors), count, |(at, dtype, data)| {
            match (outcome.action, clip.mode) {
                (Action::Leave, _) => {}
                (Action::Zero, _) => data.fill(0),
                (Action::Apply, Mode::Norm { .. }) => {
                    with_element!(dtype, T => scale::scale::<T>(&outcome, drop, data));
                }
                (Action::Apply, Mode::Value { .. }) => {
                    with_element!(dtype, T => clamp::clamp::<T>(clip, at, data));
                }
            }
            Partial::EMPTY
        });
    }
    Ok(report)
}

fn outcome(clip: &Clip, tensors: &[Tensor<'_>], progress: &Progress) -> (Outcome, Partial) {
    let total = merged(chunks(tensors), elements(tensors), |(at, dtype, data)| {
        progress.measured(data.len());
        match clip.mode {
            Mode::Norm { .. } => with_element!(dtype, T => norm::norm::<T>(clip.norm_type, at, data)),
            Mode::Value { .. } => with_element!(dtype, T => clamp::scan::<T>(clip, at, data)),
        }
    });
    (clip.outcome(&total, &total), total)
}

/// Runs `task` on every chunk, in parallel if there are many, and merges the partials from first to last.
fn merged<C: Send>(chunks: Vec<C>, elements: u64, task: impl Fn(C) -> Partial + Send + Sync) -> Partial {
    let merge = |partials: &[Partial]| partials.iter().fold(Partial::EMPTY, |a, b| a.merge(*b));
    if elements < PARALLEL_FROM as u64 {
        return merge(&chunks.into_iter().map(task).collect::<Vec<_>>());
    }
    // Many tiny tensors make tiny chunks: a task takes as many as fill a chunk on average.
    let in_a_task = (chunks.len() * CHUNK / usize::try_from(elements).unwrap_or(usize::MAX)).clamp(1, CHUNK);
    let partials: Vec<_> = chunks.into_par_iter().with_min_len(in_a_task).map(task).collect();
    merge(&partials)
}

fn chunks<'a>(tensors: &[Tensor<'a>]) -> Vec<(Location, Dtype, &'a [u8])> {
    let pieces = |(tensor, t): (usize, &Tensor<'a>)| {
        let (dtype, pieces) = (t.dtype, t.data.chunks(CHUNK * t.dtype.size()));
        pieces.enumerate().map(move |(i, data)| (Location { tensor, index: (i * CHUNK) as u64 }, dtype, data))
    };
    tensors.iter().enumerate().flat_map(pieces).collect()
}

fn chunks_mut<'a>(tensors: &'a mut [TensorMut<'_>]) -> Vec<(Location, Dtype, &'a mut [u8])> {
    let pieces = |(tensor, t): (usize, &'a mut TensorMut<'_>)| {
        let (dtype, pieces) = (t.dtype, t.data.chunks_mut(CHUNK * t.dtype.size()));
        pieces.enumerate().map(move |(i, data)| (Location { tensor, index: (i * CHUNK) as u64 }, dtype, data))
    };
    tensors.iter_mut().enumerate().flat_map(pieces).collect()
}

fn elements(tensors: &[Tensor<'_>]) -> u64 {
    tensors.iter().map(|t| t.len() as u64).sum()
}

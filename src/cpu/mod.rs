//! The CPU path: the fallback, and the check on the GPU.
//!
//! ```text
//! partials = for each task of each tensor, in parallel: norm             cpu/norm.rs, cpu/columns.rs
//! segments = partials merged from first to last                          partial.rs
//! outcomes = the coefficients that follow                                decision.rs
//! for each chunk of each tensor, in parallel: scale or clamp             cpu/scale.rs, cpu/clamp.rs
//! ```
//!
//! Tasks have fixed shapes and their partials merge in list order, so the answer does not depend on the number of
//! threads. Work runs on rayon's current pool: the global one, or the caller's through `ThreadPool::install`.
//!
//! Within a task, elements are taken in blocks that fit the first-level cache. A block is widened once (half precision
//! to float32; a misaligned one is copied) so that each kernel is written for float32 and float64 only.

mod clamp;
mod columns;
pub(crate) mod count;
mod element;
// In a build with checks of overflow the compiler cannot make vectors of everything.
#[cfg(all(test, target_os = "linux", target_arch = "x86_64", not(debug_assertions)))]
mod instructions;
mod isa;
mod map;
mod norm;
// Hands borrowed work to threads of the pool, with the proof that it outlives them.
#[allow(unsafe_code)]
pub(crate) mod pool;
mod power;
mod scale;
#[cfg(all(test, target_arch = "x86_64"))]
mod sets_agree;
mod sum;
mod task;
mod terms;
mod tuning;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};

use crate::clip::{number, setting};
use crate::decision::{Action, Known, Outcome};
use crate::dtype::with_element;
use crate::examples::check_sums;
use crate::partial::{Location, Partial};
use crate::processes::{Part, ProcessGroup, Total, Turn, merge};
use crate::progress::Progress;
use crate::segment::{Family, Layout, Segments, check_groups, check_parameter};
use crate::threshold::Threshold;
use crate::wait::block_on;
use crate::{Clip, ClipReport, Dtype, Error, NonFinite, NonFiniteElements, Scope, Tensor, TensorMut};
use pool::in_parallel;
use task::merged;
use tuning::{CHUNK, COLUMNS};

/// What a clip is decided with, beside the tensors.
#[derive(Clone, Copy)]
pub(crate) struct Around<'a> {
    pub(crate) progress: &'a Progress,
    /// Whose parts of the gradients count too.
    pub(crate) processes: &'a dyn ProcessGroup,
}

impl Around<'_> {
    /// Nothing but the tensors.
    #[cfg(feature = "gpu")]
    pub(crate) fn alone() -> Self {
        use crate::processes::single_process;
        use std::sync::{Arc, LazyLock};
        static PROGRESS: LazyLock<Progress> = LazyLock::new(Progress::default);
        static ALONE: LazyLock<Arc<dyn ProcessGroup>> = LazyLock::new(single_process);
        Self { progress: &PROGRESS, processes: &**ALONE }
    }

    /// Whether the tensors are read before anything is written. Of many processes another may fail, and no one writes then.
    fn reads_first(self, clip: &Clip) -> bool {
        clip.reads_first() || self.processes.size() > 1
    }
}

/// Measures what [`apply`] would do, and writes nothing.
pub(crate) fn measure(clip: &Clip, tensors: &[Tensor<'_>], around: Around<'_>) -> Result<ClipReport, Error> {
    let found = measured(Turn::begin(around.processes), clip, tensors, around.progress)?;
    found.decide(clip, clip.only_measures() || found.refused(clip)).map(|(report, _)| report)
}

/// What [`apply`] would do, if it is known before anything is written: the segments, the outcomes and the report; and whether
/// the tensors were read. If not, the clip is told of as if there were no elements. A `threshold` follows the norms.
pub(crate) fn decide(
    clip: &Clip,
    tensors: &[Tensor<'_>],
    threshold: Option<&mut dyn Threshold>,
    around: Around<'_>,
) -> Result<(Segments, Vec<Outcome>, ClipReport, bool), Error> {
    let turn = Turn::begin(around.processes);
    if threshold.is_some() {
        clip.check_adaptive()?;
    }
    let segments = segments_of(clip, tensors)?;
    let threshold = threshold.map(|threshold| bound(threshold, &segments, tensors)).transpose()?;
    let reads_first = around.reads_first(clip);
    let part = if reads_first {
        part(clip, tensors, segments, around.progress)
    } else {
        Part::new(clip, segments, vec![Partial::EMPTY])
    };
    let mut found = together(turn, vec![part], |_, i| tensors[i].name())?.swap_remove(0);
    // A clip that only measures does not even unscale.
    let leaves = found.refused(clip) || clip.only_measures() && threshold.is_none();
    if let Some(threshold) = threshold {
        found.adapt(clip, threshold);
    }
    let (report, outcomes) = found.decide(clip, leaves)?;
    Ok((found.segments, outcomes, report, reads_first))
}

/// Some tensors and the clip that is theirs.
pub(crate) type Group<'a, 'b> = (Clip, &'a mut [TensorMut<'b>]);

/// Clips groups of tensors in place. The reports are theirs, in order. A `threshold` follows the norms of the one group.
pub(crate) fn apply(
    groups: &mut [Group<'_, '_>],
    threshold: Option<&mut dyn Threshold>,
    around: Around<'_>,
) -> Result<Vec<ClipReport>, Error> {
    let turn = Turn::begin(around.processes);
    check_groups(groups.iter().map(|(clip, _)| clip))?;
    if threshold.is_some() {
        groups.iter().try_for_each(|(clip, _)| clip.check_adaptive())?;
    }
    // All checks come before the first write, which a value clip may do while it measures.
    let mut segments = Vec::new();
    for (clip, tensors) in groups.iter() {
        segments.push(segments_of(clip, &views(tensors))?);
    }
    let threshold = match (threshold, &segments[..], &*groups) {
        (Some(threshold), [segments], [(_, tensors)]) => Some(bound(threshold, segments, &views(tensors))?),
        _ => None,
    };
    let mut parts = Vec::new();
    for ((clip, tensors), segments) in groups.iter_mut().zip(segments) {
        parts.push(if around.reads_first(clip) {
            part(clip, &views(tensors), segments, around.progress)
        } else {
            Part::new(clip, segments, vec![clamp_all(clip, tensors, around.progress)])
        });
    }
    let mut measured = together(turn, parts, |group, i| groups[group].1[i].name())?;
    let refused = groups.iter().zip(&measured).any(|((clip, _), found)| found.refused(clip));
    let follows = threshold.is_some();
    if let (Some(threshold), [found], [(clip, _)]) = (threshold, &mut measured[..], &*groups) {
        found.adapt(clip, threshold);
    }
    let mut decided = Vec::new();
    for ((clip, _), found) in groups.iter().zip(&measured) {
        // A clip that only measures does not even unscale.
        let leaves = refused || clip.only_measures() && !follows;
        decided.push(found.decide(clip, leaves)?);
    }
    let mut reports = Vec::new();
    for (((clip, tensors), found), (report, outcomes)) in groups.iter_mut().zip(&measured).zip(decided) {
        if around.reads_first(clip) {
            write(clip, &found.segments, &outcomes, tensors);
        }
        reports.push(report);
    }
    Ok(reports)
}

/// Clips in place by norms that were measured elsewhere.
pub(crate) fn scale(clip: &Clip, given: Given<'_>, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
    clip.check_adaptive()?;
    let segments = segments_of(clip, &views(tensors))?;
    let found = Measured::given(clip, segments, given)?;
    let leaves = clip.only_measures() || found.refused(clip);
    let (report, outcomes) = found.decide(clip, leaves)?;
    write(clip, &found.segments, &outcomes, tensors);
    Ok(report)
}

/// Measures examples, and writes the sum of the clipped ones: one sum for each tensor.
pub(crate) fn sum_examples(
    clip: &Clip,
    tensors: &[Tensor<'_>],
    sums: &mut [TensorMut<'_>],
    around: Around<'_>,
) -> Result<ClipReport, Error> {
    let turn = Turn::begin(around.processes);
    check_sums(clip, tensors.iter().map(|t| t.spec), sums.iter().map(|s| s.spec))?;
    let found = measured(turn, clip, tensors, around.progress)?;
    let refused = found.refused(clip);
    let (report, outcomes) = found.decide(clip, refused)?;
    if !refused {
        let drop = clip.non_finite == NonFinite::Drop;
        for ((tensor, layout), sum) in tensors.iter().zip(&found.segments.layouts).zip(sums) {
            // One example is a whole tensor; else every row is an example.
            let columns = usize::try_from(layout.columns).unwrap_or(usize::MAX);
            let rows = tensor.len().checked_div(columns).unwrap_or(0);
            let outcomes = &outcomes[layout.segment as usize..][..rows];
            let tile = COLUMNS * sum.spec.dtype.size();
            let (pieces, tiles) = (sum.data.len().div_ceil(tile), sum.data.chunks_mut(tile).enumerate());
            let task = |(i, sums): (usize, &mut [u8])| {
                with_element!(tensor.spec.dtype, T => sum::sum::<T>(outcomes, drop, tensor.data, columns, i * COLUMNS, sums));
            };
            in_parallel(tiles, pieces, tensor.data.len(), task);
        }
    }
    Ok(report)
}

/// The partial of everything.
pub(crate) fn partial(clip: &Clip, tensors: &[Tensor<'_>], progress: &Progress) -> Result<Partial, Error> {
    Ok(part(clip, tensors, segments_of(clip, tensors)?, progress).total(|_| None).partial)
}

pub(crate) fn views<'a>(tensors: &'a [TensorMut<'_>]) -> Vec<Tensor<'a>> {
    tensors.iter().map(TensorMut::as_tensor).collect()
}

pub(crate) fn segments_of(clip: &Clip, tensors: &[Tensor<'_>]) -> Result<Segments, Error> {
    let specs: Vec<_> = tensors.iter().map(|t| t.spec).collect();
    let segments = Segments::new(clip, &specs)?;
    if clip.needs_parameters() {
        for (i, t) in tensors.iter().enumerate() {
            check_parameter(i, t.spec, t.parameter.map(|p| p.spec))?;
        }
    }
    Ok(segments)
}

/// What the first pass measures here.
fn part(clip: &Clip, tensors: &[Tensor<'_>], segments: Segments, progress: &Progress) -> Part {
    let partials = merged(tensors, &segments, |task, slots| {
        progress.measured(task.bytes());
        match clip.measured() {
            Some(norm_type) => task.norm(norm_type, slots),
            None => with_element!(task.dtype, T => slots[0] = clamp::scan::<T>(clip, task.at, task.data)),
        }
    });
    let mut part = Part::new(clip, segments, partials);
    if let (true, Some(norm_type)) = (clip.needs_parameters(), clip.measured()) {
        let of: Vec<_> = tensors.iter().filter_map(|t| Some(t.parameter?.replica(!t.spec.counted))).collect();
        part.parameters = merged(&of, &part.segments, |task, slots| task.norm(norm_type, slots));
    }
    part
}

/// What the first pass found out, of all processes together.
struct Measured {
    segments: Segments,
    /// By segment.
    known: Vec<Known>,
    /// What the norms are compared with, by segment.
    max_norms: Vec<f64>,
    /// N of everything.
    total_norm: f64,
    elements: u64,
    /// Whether an element lies outside the bounds of a value clip.
    outside: bool,
    /// Whether anything is not finite.
    bad: bool,
    /// What is not, if it is known.
    non_finite: Option<NonFiniteElements>,
}

/// What one clip finds out.
fn measured(turn: Turn<'_>, clip: &Clip, tensors: &[Tensor<'_>], progress: &Progress) -> Result<Measured, Error> {
    let part = part(clip, tensors, segments_of(clip, tensors)?, progress);
    Ok(together(turn, vec![part], |_, i| tensors[i].name())?.swap_remove(0))
}

/// What all processes have measured of each group of tensors.
fn together<'a>(
    turn: Turn<'_>,
    mut parts: Vec<Part>,
    name_of: impl Fn(usize, usize) -> Option<&'a str>,
) -> Result<Vec<Measured>, Error> {
    let totals = if turn.group().size() > 1 {
        block_on(merge(turn, &mut parts, name_of))?
    } else {
        parts.iter().enumerate().map(|(group, part)| part.total(|i| name_of(group, i))).collect()
    };
    Ok(parts.into_iter().zip(totals).map(|(part, total)| Measured::new(part, total)).collect())
}

/// A threshold that is tied to its segments.
fn bound<'t>(
    threshold: &'t mut dyn Threshold,
    segments: &Segments,
    tensors: &[Tensor<'_>],
) -> Result<&'t mut dyn Threshold, Error> {
    threshold.bind(&segments.labels(|i| tensors[i].name()))?;
    Ok(threshold)
}

/// A decision that is not measured here.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Given<'a> {
    /// N by segment.
    Norms(&'a [f64]),
    /// The merged partial of so many elements of everything.
    Partial(&'a Partial, u64),
}

impl Measured {
    fn new(part: Part, Total { partial: total, non_finite }: Total) -> Self {
        let Part { clip, segments, partials, parameters } = part;
        let norm_of = |p: &Partial| match clip.measured() {
            Some(norm_type) if p.non_finite == 0 => p.finite_norm(norm_type, 1.0),
            _ => f64::INFINITY,
        };
        let parameters: Vec<_> = parameters.iter().map(norm_of).collect();
        let elements = segments.elements();
        Self {
            known: partials.iter().map(|p| clip.known(p)).collect(),
            max_norms: segments.max_norms(&clip, &parameters, &[]),
            total_norm: clip.known(&total).norm * clip.weight(elements),
            elements,
            outside: total.outside,
            bad: total.non_finite > 0,
            non_finite,
            segments,
        }
    }

    fn given(clip: &Clip, segments: Segments, given: Given<'_>) -> Result<Self, Error> {
        match given {
            Given::Partial(partial, elements) => {
                let total = Total { partial: *partial, non_finite: None };
                Ok(Self::new(Part::of_one(clip, segments, *partial, elements), total))
            }
            Given::Norms(norms) => {
                let expected = u64::from(segments.count);
                if norms.len() as u64 != expected {
                    return Err(Error::usage(format!("norms by segment: {} given, {expected} needed", norms.len())));
                }
                // These two policies cannot go by an infinity.
                let (greatest, reason) = match clip.non_finite {
                    NonFinite::Error | NonFinite::Drop => {
                        (f64::MAX, "it must be 0 or more, and finite under this policy")
                    }
                    _ => (f64::INFINITY, "it must be 0 or more"),
                };
                if let Some(norm) = norms.iter().find(|n| !(0.0..=greatest).contains(*n)) {
                    setting(false, "a given norm", number(*norm), reason)?;
                }
                let nothing = Total { partial: Partial::EMPTY, non_finite: None };
                let mut found = Self::new(Part::new(clip, segments, Vec::new()), nothing);
                // Nothing is known of single elements: a policy that drops some looks for them wherever it writes.
                let known = |(family, norm): (&Family, &f64)| Known {
                    norm: norm / clip.weight(family.elements),
                    bad: !norm.is_finite() || clip.non_finite == NonFinite::Drop,
                };
                found.known = found.segments.families().zip(norms).map(known).collect();
                found.bad = norms.iter().any(|n| !n.is_finite());
                found.total_norm = if let ([norm], Scope::Global) = (norms, clip.scope) { *norm } else { f64::NAN };
                Ok(found)
            }
        }
    }

    /// Lets an adaptive threshold follow the norms.
    fn adapt(&mut self, clip: &Clip, threshold: &mut dyn Threshold) {
        let norm = |(family, known): (&Family, &Known)| known.norm * clip.weight(family.elements);
        let norms: Vec<_> = self.segments.families().zip(&self.known).map(norm).collect();
        // A non-finite element counts as such even where the policy measures the rest.
        let total_norm = if self.bad { f64::NAN } else { self.total_norm };
        self.max_norms = self.segments.max_norms(clip, &[], &threshold.max_norms(total_norm, &norms));
    }

    /// Whether the policy keeps everything as it is.
    fn refused(&self, clip: &Clip) -> bool {
        self.bad && clip.refuses_non_finite()
    }

    /// The report and the outcomes; under a refusal every segment is left as it is.
    fn decide(&self, clip: &Clip, refused: bool) -> Result<(ClipReport, Vec<Outcome>), Error> {
        let outcomes = self.segments.outcomes(clip, &self.known, &self.max_norms, refused);
        let totals = (self.total_norm, self.outside);
        let report = clip.report((&self.segments, &outcomes), totals, self.elements, self.non_finite.clone())?;
        Ok((report, outcomes))
    }
}

/// Scales or clamps what the outcomes say.
fn write(clip: &Clip, segments: &Segments, outcomes: &[Outcome], tensors: &mut [TensorMut<'_>]) {
    let (pieces, bytes) = pieces(tensors);
    let work = tensors.iter_mut().zip(&segments.layouts).enumerate().flat_map(|(i, (tensor, layout))| {
        let own = layout.own(outcomes, tensor.len() as u64);
        let written = own.iter().any(|o| o.action != Action::Leave);
        let layout = layout.numbered_from_zero();
        chunks(i, tensor).filter(move |_| written).map(move |(at, dtype, data)| (at, dtype, layout, own, data))
    });
    in_parallel(work, pieces, bytes, |(at, dtype, layout, outcomes, data)| {
        write_piece(clip, at, dtype, (layout, outcomes), data);
    });
}

/// What is handed out of tensor number `tensor`: where it begins, and its bytes.
fn chunks<'t>(tensor: usize, t: &'t mut TensorMut<'_>) -> impl Iterator<Item = (Location, Dtype, &'t mut [u8])> {
    let dtype = t.spec.dtype;
    let chunks = t.data.chunks_mut(CHUNK * dtype.size()).enumerate();
    chunks.map(move |(i, data)| (Location { tensor, index: (i * CHUNK) as u64 }, dtype, data))
}

/// About how many chunks there are, and how many bytes.
fn pieces(tensors: &[TensorMut<'_>]) -> (usize, usize) {
    let bytes: usize = tensors.iter().map(|t| t.data.len()).sum();
    (tensors.len() + bytes / (CHUNK * size_of::<f32>()), bytes)
}

/// Scales or clamps a piece of a tensor, given the tensor's own segments. The partial is what a clamp met.
pub(crate) fn write_piece(
    clip: &Clip,
    at: Location,
    dtype: Dtype,
    (layout, outcomes): (Layout, &[Outcome]),
    data: &mut [u8],
) -> Partial {
    if clip.measured().is_some() {
        let drop = clip.non_finite == NonFinite::Drop;
        with_element!(dtype, T => scale::scale::<T>(outcomes, layout, at.index, drop, data));
        Partial::EMPTY
    } else if outcomes[0].action == Action::Zero {
        data.fill(0);
        Partial::EMPTY
    } else {
        with_element!(dtype, T => clamp::clamp::<T>(clip, at, data))
    }
}

/// A value clip in one pass.
fn clamp_all(clip: &Clip, tensors: &mut [TensorMut<'_>], progress: &Progress) -> Partial {
    let (pieces, bytes) = pieces(tensors);
    let total = Mutex::new(Partial::EMPTY);
    let work = tensors.iter_mut().enumerate().flat_map(|(i, tensor)| {
        let counted = tensor.spec.counted;
        chunks(i, tensor).map(move |chunk| (counted, chunk))
    });
    let panicked = Mutex::new(None);
    in_parallel(work, pieces, bytes, |(counted, (at, dtype, data))| {
        // What has begun to write goes through with it.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| progress.measured(data.len()))) {
            panicked.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        let partial = with_element!(dtype, T => clamp::clamp::<T>(clip, at, data));
        if !counted {
            return;
        }
        // Nothing is summed: what was counted, and the first location, do not depend on the order.
        let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
        *total = total.merge(partial);
    });
    if let Some(panic) = panicked.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

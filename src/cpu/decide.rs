//! What a clip does with host tensors: it measures, decides, and on the CPU applies.

use std::ops::Deref;

use super::pool::in_parallel;
use super::task::merged;
use super::tuning::COLUMNS;
use super::write::{Written, write};
use super::{clamp, sum};
use crate::clip::{Number, setting};
use crate::context::{Context, Progress};
use crate::decision::{Known, Outcome};
use crate::dtype::with_element;
use crate::examples::check_sums;
use crate::magnitude::Magnitude;
use crate::partial::Partial;
use crate::processes::{GroupCall, GroupPartials, GroupTotal, merge};
use crate::segment::{Family, Segments, check_groups, check_parameter};
use crate::threshold::Threshold;
use crate::wait::block_on;
use crate::{Clip, ClipReport, Error, HostTensor, NonFinite, NonFiniteElements, Scope, Skipped, Tensor, TensorMut};

/// What is decided about some tensors.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) clip: Clip,
    pub(crate) segments: Segments,
    /// By segment.
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) report: ClipReport,
    /// Whether the elements were read. If not, the report covers no elements until they are written.
    pub(crate) read: bool,
}

impl Decision {
    /// The report once the tensors are written, given what the writes met.
    pub(crate) fn report<'a>(&self, met: &Written, name_of: impl Fn(usize) -> Option<&'a str>) -> ClipReport {
        let mut report = self.report.clone();
        report.lost = Some(met.lost);
        // A wider dtype rounds the bounds less, so it may find more outside than what was read.
        report.clipped |= met.found.outside;
        if !self.read {
            report.non_finite = met.found.non_finite_elements(name_of);
        }
        report
    }

    /// Clips the tensors that the decision is about.
    fn apply(&self, tensors: &mut [TensorMut<'_>], progress: &Progress) -> ClipReport {
        let progress = if self.read { None } else { Some(progress) };
        let met = write(&self.clip, (&self.segments, &self.outcomes), tensors, progress);
        self.report(&met, |i| tensors[i].name())
    }
}

/// Decides about groups of tensors, each by a clip of its own. A `threshold` follows the norms of a single group.
pub(crate) fn decide<D: Deref<Target = [u8]>>(
    groups: &[(Clip, &[HostTensor<'_, D>])],
    threshold: Option<&mut dyn Threshold>,
    context: Context<'_>,
) -> Result<Vec<Decision>, Error> {
    let call = GroupCall::begin(context.processes);
    decide_by(groups, threshold, call, context.progress, |clip| context.reads_first(clip))
}

/// Clips groups of tensors in place, and reports on each in order. A `threshold` follows the norms of a single group.
pub(crate) fn apply(
    groups: &mut [(Clip, &mut [TensorMut<'_>])],
    threshold: Option<&mut dyn Threshold>,
    context: Context<'_>,
) -> Result<Vec<ClipReport>, Error> {
    let read: Vec<_> = groups.iter().map(|(clip, tensors)| (*clip, &**tensors)).collect();
    let decisions = decide(&read, threshold, context)?;
    let decided = groups.iter_mut().zip(decisions);
    Ok(decided.map(|((_, tensors), decision)| decision.apply(tensors, context.progress)).collect())
}

/// Measures what [`apply`] would do, and writes nothing.
pub(crate) fn measure(clip: &Clip, tensors: &[Tensor<'_>], context: Context<'_>) -> Result<ClipReport, Error> {
    let call = GroupCall::begin(context.processes);
    Ok(measured(clip, tensors, call, context.progress)?.report)
}

/// Decides like [`decide`], but always reads the elements.
fn measured(clip: &Clip, tensors: &[Tensor<'_>], call: GroupCall<'_>, progress: &Progress) -> Result<Decision, Error> {
    Ok(decide_by(&[(*clip, tensors)], None, call, progress, |_| true)?.swap_remove(0))
}

/// Decides, and first reads the groups whose clip `reads`. All checks come first.
fn decide_by<D: Deref<Target = [u8]>>(
    groups: &[(Clip, &[HostTensor<'_, D>])],
    mut threshold: Option<&mut dyn Threshold>,
    call: GroupCall<'_>,
    progress: &Progress,
    reads: impl Fn(&Clip) -> bool,
) -> Result<Vec<Decision>, Error> {
    check_groups(groups.iter().map(|(clip, _)| clip))?;
    // A norm that skips the step is known before anything is written.
    let may_skip = groups.iter().any(|(clip, _)| clip.may_skip());
    let reads = |clip: &Clip| may_skip || reads(clip);
    let mut segments = Vec::new();
    for (clip, tensors) in groups {
        if threshold.is_some() {
            clip.check_adaptive()?;
        }
        segments.push(segments_of(clip, tensors)?);
    }
    let name_of = |group: usize, tensor: usize| groups[group].1[tensor].name();
    if let (Some(threshold), [segments]) = (&mut threshold, &segments[..]) {
        threshold.bind(&segments.labels(|tensor| name_of(0, tensor)))?;
    }
    let mut parts = Vec::new();
    for ((clip, tensors), segments) in groups.iter().zip(segments) {
        parts.push(if reads(clip) {
            part(clip, tensors, segments, progress)
        } else {
            GroupPartials::new(clip, segments, vec![Partial::EMPTY])
        });
    }
    let totals = if call.group().size() > 1 {
        block_on(merge(call, &mut parts, name_of))?
    } else {
        parts.iter().enumerate().map(|(group, part)| part.total(|tensor| name_of(group, tensor))).collect()
    };
    let mut found: Vec<_> = parts.into_iter().zip(totals).map(|(part, total)| Measured::new(part, total)).collect();
    if let (Some(threshold), [found]) = (threshold, &mut found[..]) {
        found.follow(threshold);
    }
    let skipped = found.iter().filter_map(Measured::skips).min();
    let decide = |found: Measured| {
        let read = reads(&found.clip);
        found.decide(skipped, read)
    };
    found.into_iter().map(decide).collect()
}

/// Decides by norms that were measured elsewhere.
pub(crate) fn decide_scale<D>(clip: &Clip, given: Given<'_>, tensors: &[HostTensor<'_, D>]) -> Result<Decision, Error> {
    clip.check_adaptive()?;
    let found = Measured::given(clip, segments_of(clip, tensors)?, given)?;
    let skipped = found.skips();
    found.decide(skipped, true)
}

/// Clips in place by norms that were measured elsewhere.
pub(crate) fn scale(clip: &Clip, given: Given<'_>, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
    Ok(decide_scale(clip, given, tensors)?.apply(tensors, &Progress::default()))
}

/// Measures examples, and writes the sum of the clipped examples: one sum for each tensor.
pub(crate) fn sum_examples(
    clip: &Clip,
    tensors: &[Tensor<'_>],
    sums: &mut [TensorMut<'_>],
    context: Context<'_>,
) -> Result<ClipReport, Error> {
    let call = GroupCall::begin(context.processes);
    check_sums(clip, tensors.iter().map(|t| t.spec), sums.iter().map(|s| s.spec))?;
    let Decision { segments, outcomes, report, .. } = measured(clip, tensors, call, context.progress)?;
    if report.skipped.is_some() {
        return Ok(report);
    }
    let drop = clip.non_finite == NonFinite::Drop;
    for ((tensor, layout), sum) in tensors.iter().zip(&segments.layouts).zip(sums) {
        // A single example is a whole tensor; otherwise every row is an example.
        let columns = usize::try_from(layout.matrix.columns).unwrap_or(usize::MAX);
        let rows = tensor.len().checked_div(columns).unwrap_or(0);
        let outcomes = &outcomes[layout.matrix.segment as usize..][..rows];
        let tile = COLUMNS * sum.dtype().size();
        let (pieces, tiles) = (sum.data.len().div_ceil(tile), sum.data.chunks_mut(tile).enumerate());
        let task = |(i, sums): (usize, &mut [u8])| {
            with_element!(tensor.dtype(), T => sum::sum::<T>(outcomes, drop, tensor.data, columns, i * COLUMNS, sums));
        };
        in_parallel(tiles, pieces, tensor.data.len(), task);
    }
    Ok(report)
}

/// The partial of all tensors together.
pub(crate) fn partial(clip: &Clip, tensors: &[Tensor<'_>], progress: &Progress) -> Result<Partial, Error> {
    Ok(part(clip, tensors, segments_of(clip, tensors)?, progress).total(|_| None).partial)
}

pub(crate) fn views<'a>(tensors: &'a [TensorMut<'_>]) -> Vec<Tensor<'a>> {
    tensors.iter().map(TensorMut::as_tensor).collect()
}

pub(crate) fn segments_of<D>(clip: &Clip, tensors: &[HostTensor<'_, D>]) -> Result<Segments, Error> {
    let segments = Segments::new(clip, tensors.iter().map(|t| t.spec))?;
    if clip.needs_parameters() {
        for (i, t) in tensors.iter().enumerate() {
            check_parameter(i, t.spec, t.parameter.map(|p| p.spec))?;
        }
    }
    Ok(segments)
}

/// What the first pass of this process measures.
fn part<D: Deref<Target = [u8]>>(
    clip: &Clip,
    tensors: &[HostTensor<'_, D>],
    segments: Segments,
    progress: &Progress,
) -> GroupPartials {
    let partials = merged(tensors, &segments, |task, slots| {
        progress.measured(task.bytes());
        if let Some(norm_type) = clip.reported() {
            task.norm(norm_type, slots);
        }
        if clip.measured().is_none() {
            let looked = with_element!(task.dtype, T => clamp::scan::<T>(clip, task.at, task.data));
            slots[0] = looked.with_norm_of(slots[0]);
        }
    });
    let mut part = GroupPartials::new(clip, segments, partials);
    if let (true, Some(norm_type)) = (clip.needs_parameters(), clip.measured()) {
        let of: Vec<_> = tensors.iter().filter_map(|t| Some(t.parameter?.replica(!t.spec.counted))).collect();
        part.parameters = merged(&of, &part.segments, |task, slots| task.norm(norm_type, slots));
    }
    part
}

/// What the first pass found, over all processes.
struct Measured {
    clip: Clip,
    segments: Segments,
    /// By segment.
    known: Vec<Known>,
    /// The threshold on the measured norm, by segment.
    max_norms: Vec<Magnitude>,
    /// What is known of everything, and its N.
    total: Known,
    total_norm: f64,
    elements: u64,
    /// Whether an element lies outside the bounds of a value clip.
    outside: bool,
    /// The non-finite elements, if they are known.
    non_finite: Option<NonFiniteElements>,
}

/// Norms that come from elsewhere.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Given<'a> {
    /// N by segment.
    Norms(&'a [f64]),
    /// The merged partial of everything, and its number of elements.
    Partial(&'a Partial, u64),
}

impl Measured {
    fn new(part: GroupPartials, GroupTotal { partial: total, non_finite }: GroupTotal) -> Self {
        let GroupPartials { clip, segments, partials, parameters } = part;
        let norm_of = |p: &Partial| match clip.measured() {
            Some(norm_type) if p.non_finite == 0 => p.finite_norm(norm_type, 1.0),
            _ => Magnitude::plain(f64::INFINITY),
        };
        let parameters: Vec<_> = parameters.iter().map(norm_of).collect();
        let elements = segments.elements();
        let known = clip.known(&total);
        Self {
            clip,
            known: partials.iter().map(|p| clip.known(p)).collect(),
            max_norms: segments.max_norms(&clip, &parameters, &[]),
            total: known,
            total_norm: clip.total_norm(&total, elements),
            elements,
            outside: total.outside,
            non_finite,
            segments,
        }
    }

    fn given(clip: &Clip, segments: Segments, given: Given<'_>) -> Result<Self, Error> {
        match given {
            Given::Partial(partial, elements) => {
                let total = GroupTotal { partial: *partial, non_finite: None };
                Ok(Self::new(GroupPartials::of_one(clip, segments, *partial, elements), total))
            }
            Given::Norms(norms) => {
                clip.check_given()?;
                let expected = u64::from(segments.count);
                if norms.len() as u64 != expected {
                    return Err(Error::usage(format!("norms by segment: {} given, {expected} needed", norms.len())));
                }
                // These two policies cannot use an infinite norm.
                let (greatest, reason) = match clip.non_finite {
                    NonFinite::Error | NonFinite::Drop => {
                        (f64::MAX, "it must be 0 or more, and finite under this policy")
                    }
                    _ => (f64::INFINITY, "it must be 0 or more"),
                };
                if let Some(norm) = norms.iter().find(|n| !(0.0..=greatest).contains(*n)) {
                    setting(false, "a given norm", Number(*norm), reason)?;
                }
                let nothing = GroupTotal { partial: Partial::EMPTY, non_finite: None };
                let mut found = Self::new(GroupPartials::new(clip, segments, Vec::new()), nothing);
                // Single elements are unknown, so `Drop` must look for non-finite elements wherever it writes.
                let known = |(family, norm): (&Family, &f64)| Known {
                    norm: Magnitude::of(*norm, |norm| norm / clip.weight(family.elements)),
                    bad: !norm.is_finite() || clip.non_finite == NonFinite::Drop,
                };
                found.known = found.segments.families().zip(norms).map(known).collect();
                found.total.bad = norms.iter().any(|n| !n.is_finite());
                found.total_norm = if let ([norm], Scope::Global) = (norms, clip.scope) { *norm } else { f64::NAN };
                Ok(found)
            }
        }
    }

    /// Lets an adaptive threshold follow the norms, unless the step is skipped.
    fn follow(&mut self, threshold: &mut dyn Threshold) {
        self.clip = self.clip.skipping(threshold);
        if self.skips().is_some() {
            return;
        }
        let norm = |(family, known): (&Family, &Known)| known.norm.times(self.clip.weight(family.elements)).to_f64();
        let norms: Vec<_> = self.segments.families().zip(&self.known).map(norm).collect();
        self.max_norms = self.segments.max_norms(&self.clip, &[], &threshold.max_norms(self.total_norm, &norms));
    }

    fn skips(&self) -> Option<Skipped> {
        self.clip.skips(self.total, self.clip.weight(self.elements))
    }

    /// With `skipped`, every segment is left as it is.
    fn decide(self, skipped: Option<Skipped>, read: bool) -> Result<Decision, Error> {
        let Self { clip, segments, known, max_norms, total_norm, elements, outside, non_finite, .. } = self;
        let outcomes = segments.outcomes(&clip, &known, &max_norms, skipped.is_some());
        let report = clip.report((&segments, &outcomes), (total_norm, outside), elements, non_finite, skipped)?;
        Ok(Decision { clip, segments, outcomes, report, read })
    }
}

//! [`NormAccumulator`]: a norm that is measured in pieces.

use crate::cpu::decide::Given;
use crate::magnitude::Magnitude;
use crate::partial::{Location, Partial};
use crate::processes::{GroupCall, GroupPartials, GroupTotal, ProcessGroup, merge};
use crate::segment::Segments;
use crate::{Clip, ClipReport, Error, NonFiniteElements, Scope, Tensor, Waiting};

/// A running partial: the mergeable state of a global norm.
///
/// It takes a gradient as soon as backward has produced it, a chunk of a file, or a micro-batch. Two running partials
/// merge. Once everything is in, it gives the report, and [`Clipper::finish`](crate::Clipper::finish) clips by it.
///
/// ```
/// use gradclip::{Clip, Clipper, NormAccumulator, Tensor, TensorMut};
/// let (mut w, mut b) = ([3.0f32], [4.0f32]);
/// let clipper = Clipper::cpu();
/// let mut running = NormAccumulator::new(&Clip::norm(1.0))?;
/// clipper.accumulate(&mut running, &[Tensor::new(&w)])?;
/// clipper.accumulate(&mut running, &[Tensor::new(&b)])?;
/// assert_eq!(running.report()?.total_norm, 5.0);
/// clipper.finish(&running, &mut [TensorMut::new(&mut w)])?;
/// clipper.finish(&running, &mut [TensorMut::new(&mut b)])?;
/// assert!((w[0] - 0.6).abs() < 1e-6 && (b[0] - 0.8).abs() < 1e-6);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NormAccumulator {
    clip: Clip,
    partial: Partial,
    tensors: usize,
    elements: u64,
    /// The name of the tensor with the first non-finite element.
    bad_name: Option<String>,
    /// Some once the partials of all processes are in: the rank that holds that tensor, if there is one.
    across: Option<Option<u32>>,
}

impl NormAccumulator {
    /// An empty running partial.
    ///
    /// # Errors
    /// [`Error::Usage`] unless the clip measures one norm of everything: by norm, RMS or average norm, with
    /// [`Scope::Global`].
    pub fn new(clip: &Clip) -> Result<Self, Error> {
        clip.check()?;
        if clip.measured().is_none() || clip.needs_parameters() || clip.scope != Scope::Global {
            return Err(Error::usage("a running partial needs a clip by norm, RMS or average norm with Scope::Global"));
        }
        Ok(Self { clip: *clip, partial: Partial::EMPTY, tensors: 0, elements: 0, bad_name: None, across: None })
    }

    /// Merges another running partial, whose tensors come after these.
    ///
    /// # Errors
    /// [`Error::Usage`] if the clips differ, or after [`NormAccumulator::merge_across`].
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        self.check_open()?;
        other.check_open()?;
        if self.clip != other.clip {
            return Err(Error::usage("running partials merge only if their clips are the same"));
        }
        self.append(other.partial, other.tensors, other.elements, || other.bad_name.clone());
        Ok(())
    }

    /// Merges the running partials of all processes of a group. Each process then holds the same total, to the bit.
    /// Call it once, when everything is in: [`NormAccumulator::report`] and [`Clipper::finish`](crate::Clipper::finish)
    /// then use the norm of all processes.
    ///
    /// # Errors
    /// [`Error::Usage`] after an earlier call; [`Error::PeerFailed`], [`Error::Disagreement`] and
    /// [`Error::ProcessGroup`] ([`processes`](crate::processes)). The running partial is then unchanged.
    pub fn merge_across<'a>(&'a mut self, processes: &'a dyn ProcessGroup) -> Waiting<'a, Result<(), Error>> {
        Waiting::new(self.merged(processes))
    }

    async fn merged(&mut self, processes: &dyn ProcessGroup) -> Result<(), Error> {
        let call = GroupCall::begin(processes);
        self.check_open()?;
        let segments = Segments::new(&self.clip, &[])?;
        let mut part = [GroupPartials::of_one(&self.clip, segments, self.partial, self.elements)];
        let mut totals = merge(call, &mut part, |_, _| self.bad_name.as_deref()).await?;
        let GroupTotal { partial, non_finite: found } = totals.swap_remove(0);
        (self.partial, self.elements) = (partial, part[0].segments.elements());
        self.across = Some(found.as_ref().and_then(|found| found.rank));
        self.bad_name = found.and_then(|found| found.name);
        Ok(())
    }

    /// Checks that the parts of other processes are not in yet, because they would count twice.
    pub(crate) fn check_open(&self) -> Result<(), Error> {
        if self.across.is_some() {
            return Err(Error::usage(
                "a running partial that was merged across processes takes in no more: begin a new one",
            ));
        }
        Ok(())
    }

    /// The non-finite elements so far.
    fn non_finite(&self) -> Option<NonFiniteElements> {
        let found = self.partial.non_finite_elements(|_| self.bad_name.as_deref())?;
        Some(NonFiniteElements { rank: self.across.flatten(), ..found })
    }

    pub(crate) fn add(&mut self, partial: Partial, tensors: &[Tensor<'_>]) {
        let elements = tensors.iter().map(|t| t.spec.counted_len()).sum();
        let name = || partial.first.and_then(|first| tensors[first.tensor].name().map(str::to_owned));
        self.append(partial, tensors.len(), elements, name);
    }

    fn append(&mut self, partial: Partial, tensors: usize, elements: u64, name: impl FnOnce() -> Option<String>) {
        if self.partial.first.is_none() && partial.first.is_some() {
            self.bad_name = name();
        }
        let first = partial.first.map(|first| Location { tensor: first.tensor + self.tensors, ..first });
        self.partial = self.partial.merge(Partial { first, ..partial });
        self.tensors += tensors;
        self.elements += elements;
    }

    /// What a clip of everything accumulated so far reports. Tensors are numbered in the order in which they came.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy.
    pub fn report(&self) -> Result<ClipReport, Error> {
        let clip = &self.clip;
        let known = clip.known(&self.partial);
        let (weight, max_norm) = (clip.weight(self.elements), clip.max_norm(self.elements, 1.0, Magnitude::plain(0.0)));
        let refused = known.bad && clip.refuses_non_finite();
        let outcomes = [clip.outcome(known, max_norm, weight, refused)];
        let segments = Segments::new(clip, &[])?;
        let totals = (known.norm.times(weight).to_f64(), self.partial.outside);
        clip.report((&segments, &outcomes), totals, self.elements, self.non_finite())
    }

    pub(crate) fn clip(&self) -> &Clip {
        &self.clip
    }

    pub(crate) fn given(&self) -> Given<'_> {
        Given::Partial(&self.partial, self.elements)
    }
}

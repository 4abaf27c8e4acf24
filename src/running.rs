//! [`RunningPartial`]: a norm that is measured piece by piece.

use crate::cpu::Given;
use crate::partial::{Location, Partial};
use crate::segment::Segments;
use crate::{Clip, ClipReport, Error, Scope, Tensor};

/// What is known of the gradients so far: the mergeable part of a global norm.
///
/// It takes a gradient as soon as backward has produced it, a chunk of a file, or a micro-batch; two of them merge. Once
/// everything is in, it gives the report, and [`Clipper::finish`](crate::Clipper::finish) clips by it.
///
/// ```
/// use gradclip::{Clip, Clipper, RunningPartial, Tensor, TensorMut};
/// let (mut w, mut b) = ([3.0f32], [4.0f32]);
/// let clipper = Clipper::cpu();
/// let mut running = RunningPartial::new(&Clip::norm(1.0)?)?;
/// clipper.accumulate(&mut running, &[Tensor::new(&w)])?;
/// clipper.accumulate(&mut running, &[Tensor::new(&b)])?;
/// assert_eq!(running.report()?.total_norm, 5.0);
/// clipper.finish(&running, &mut [TensorMut::new(&mut w)])?;
/// clipper.finish(&running, &mut [TensorMut::new(&mut b)])?;
/// assert!((w[0] - 0.6).abs() < 1e-6 && (b[0] - 0.8).abs() < 1e-6);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RunningPartial {
    clip: Clip,
    partial: Partial,
    tensors: usize,
    elements: u64,
    /// The name of the tensor with the first non-finite element.
    bad_name: Option<String>,
}

impl RunningPartial {
    /// Knows nothing yet.
    ///
    /// # Errors
    /// [`Error::Unfit`] unless the clip measures a norm of everything: by norm, RMS or average norm, with
    /// [`Scope::Global`].
    pub fn new(clip: &Clip) -> Result<Self, Error> {
        if clip.measured().is_none() || clip.needs_parameters() || clip.scope != Scope::Global {
            return Err(Error::Unfit("a running partial needs a clip by norm, RMS or average norm with Scope::Global"));
        }
        Ok(Self { clip: *clip, partial: Partial::EMPTY, tensors: 0, elements: 0, bad_name: None })
    }

    /// Takes in another one, whose tensors come after these.
    ///
    /// # Errors
    /// [`Error::Unfit`] if the clips differ.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        if self.clip != other.clip {
            return Err(Error::Unfit("running partials merge only if their clips are the same"));
        }
        self.append(other.partial, other.tensors, other.elements, || other.bad_name.clone());
        Ok(())
    }

    pub(crate) fn add(&mut self, partial: Partial, tensors: &[Tensor<'_>]) {
        let elements = tensors.iter().map(|t| t.len() as u64).sum();
        let name = || partial.first.and_then(|first| tensors[first.tensor].name.map(str::to_owned));
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

    /// What a clip of everything accumulated so far reports. Tensors are counted in the order in which they came.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy.
    pub fn report(&self) -> Result<ClipReport, Error> {
        let clip = &self.clip;
        let known = clip.known(&self.partial);
        let (weight, max_norm) = (clip.weight(self.elements), clip.max_norm(self.elements, 1.0, 0.0));
        let refused = (known.bad && clip.refuses_non_finite()) || clip.only_measures();
        let outcomes = [clip.outcome(known, max_norm, weight, refused)];
        let segments = Segments::new(clip, &[], |_| None)?;
        let totals = (known.norm * weight, &self.partial);
        clip.report((&segments, &outcomes), totals, self.elements, |_| self.bad_name.as_deref())
    }

    pub(crate) fn clip(&self) -> &Clip {
        &self.clip
    }

    pub(crate) fn given(&self) -> Given<'_> {
        Given::Partial(&self.partial, self.elements)
    }
}

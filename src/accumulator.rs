//! [`NormAccumulator`]: a norm that is measured in pieces.

use crate::cpu::decide::Given;
use crate::magnitude::Magnitude;
use crate::partial::{Location, Partial};
use crate::processes::{GroupCall, GroupPartials, GroupTotal, ProcessGroup, join, merge, split};
use crate::segment::Segments;
use crate::{Clip, ClipReport, Error, NonFiniteElements, NormType, Scope, Tensor, Waiting};

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

/// The start of [`NormAccumulator::to_bytes`]: the name of the format and its version.
const FORMAT: [u8; 8] = *b"gradnrm\x01";

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

    /// The running partial as bytes, for a transport of your own: [`NormAccumulator::from_bytes`] of another process
    /// reads them, and [`NormAccumulator::merge`] merges them. If all processes merge in the same order, all get the
    /// same bits.
    ///
    /// Numbers are little-endian, of 8 bytes each, on every machine:
    ///
    /// | bytes | what |
    /// |---|---|
    /// | 0..8 | `gradnrm` and the version, 1 |
    /// | 8..24 | how many tensors and elements were accumulated |
    /// | 24..48 | Σ g^p as a float64 times 2 to the power of an int64; the largest g (float64, infinity norm only) |
    /// | 48..64 | how many elements are not finite, and whether one is a NaN (1) or none (0) |
    /// | 64..80 | the tensor and the index of the first of them, or 0 and 0 |
    /// | then | the clip as it is displayed, and the name of that tensor if it has one: the length, and the text |
    /// | the last 8 | the FNV-1a hash of 64 bits of everything before |
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, NormAccumulator, Tensor};
    /// let clip = Clip::norm(1.0);
    /// let sent = |gradient| {
    ///     let mut running = NormAccumulator::new(&clip)?;
    ///     Clipper::cpu().accumulate(&mut running, &[Tensor::new(&[gradient])])?;
    ///     running.to_bytes()
    /// };
    /// let mut all = NormAccumulator::new(&clip)?;
    /// for bytes in [sent(3.0f32)?, sent(4.0)?] {
    ///     all.merge(&NormAccumulator::from_bytes(&clip, &bytes)?)?;
    /// }
    /// assert_eq!(all.report()?.total_norm, 5.0);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] after [`NormAccumulator::merge_across`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        self.check_open()?;
        let Partial { sum, exponent, max, non_finite, nan, first, outside: _ } = self.partial;
        let (tensor, index) = first.map_or((0, 0), |first| (first.tensor as u64, first.index));
        let (tensors, sum, max) = (self.tensors as u64, sum.to_bits(), max.to_bits());
        let numbers =
            [tensors, self.elements, sum, exponent.cast_unsigned(), max, non_finite, nan.into(), tensor, index];
        let texts: Vec<_> = [self.clip.to_string()].into_iter().chain(self.bad_name.clone()).collect();
        let mut bytes = [&FORMAT, numbers.map(u64::to_le_bytes).as_flattened(), &join(&texts)].concat();
        bytes.extend(fnv1a(&bytes).to_le_bytes());
        Ok(bytes)
    }

    /// The running partial of [`NormAccumulator::to_bytes`], with the clip that it was made for.
    ///
    /// # Errors
    /// [`Error::Usage`] if the bytes are damaged, of another version or of another clip, and that of
    /// [`NormAccumulator::new`].
    pub fn from_bytes(clip: &Clip, bytes: &[u8]) -> Result<Self, Error> {
        let mut read = Self::new(clip)?;
        let damaged = || Error::usage("the bytes are damaged: they are not what NormAccumulator::to_bytes wrote");
        let Some((format, rest)) = bytes.split_first_chunk() else { return Err(damaged()) };
        if *format != FORMAT {
            return Err(Error::usage("the bytes are of no running partial, or of one of another version of gradclip"));
        }
        let Some((numbers, texts)) = rest.split_first_chunk::<72>() else { return Err(damaged()) };
        let mut numbers = numbers.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number));
        let mut number = || numbers.next().unwrap_or_default();
        let index_of = |number| usize::try_from(number).map_err(|_| damaged());
        (read.tensors, read.elements) = (index_of(number())?, number());
        let (sum, exponent) = (f64::from_bits(number()), number().cast_signed());
        let (max, non_finite, nan) = (f64::from_bits(number()), number(), number() == 1);
        let first = Location { tensor: index_of(number())?, index: number() };
        let first = (non_finite > 0).then_some(first);
        read.partial = Partial { sum, exponent, max, non_finite, nan, first, outside: false };
        let mut texts = split(texts).into_iter().map(|text| String::from_utf8_lossy(text).into_owned());
        let (of, own) = (texts.next(), clip.to_string());
        read.bad_name = texts.next();
        let is_number = |x: f64| (0.0..f64::INFINITY).contains(&x);
        // Sums of other exponents cannot be, and might overflow when they merge.
        let is_exponent =
            exponent.unsigned_abs() < 1 << 61 && (exponent % 2 == 0 || clip.measured() != Some(NormType::L2));
        let is_first = first.is_none_or(|first| first.tensor < read.tensors) && non_finite <= read.elements;
        match of {
            Some(of) if is_number(sum) && is_number(max) && is_exponent && is_first => {
                if of != own {
                    return Err(Error::usage(format!("the bytes are of another clip: {of}, where this is {own}")));
                }
            }
            _ => return Err(damaged()),
        }
        // What was lost on the way, it does not write either.
        if read.to_bytes()? == bytes { Ok(read) } else { Err(damaged()) }
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
        let segments = Segments::new(&self.clip, std::iter::empty())?;
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
        let tensor_of = |first: Location| first.tensor.saturating_add(self.tensors);
        let first = partial.first.map(|first| Location { tensor: tensor_of(first), ..first });
        self.partial = self.partial.merge(Partial { first, ..partial });
        self.tensors = self.tensors.saturating_add(tensors);
        self.elements = self.elements.saturating_add(elements);
    }

    /// What a clip of everything accumulated so far reports. Tensors are numbered in the order in which they came.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy.
    pub fn report(&self) -> Result<ClipReport, Error> {
        let clip = &self.clip;
        let known = clip.known(&self.partial);
        let (weight, max_norm) = (clip.weight(self.elements), clip.max_norm(self.elements, 1.0, Magnitude::plain(0.0)));
        let skipped = clip.skips(known, weight);
        let outcomes = [clip.outcome(known, max_norm, weight, skipped.is_some())];
        let segments = Segments::new(clip, std::iter::empty())?;
        let totals = (known.norm.times(weight).to_f64(), self.partial.outside);
        clip.report((&segments, &outcomes), totals, self.elements, self.non_finite(), skipped)
    }

    pub(crate) fn clip(&self) -> &Clip {
        &self.clip
    }

    pub(crate) fn given(&self) -> Given<'_> {
        Given::Partial(&self.partial, self.elements)
    }
}

/// The hash of Fowler, Noll and Vo, which differs if any one byte does.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

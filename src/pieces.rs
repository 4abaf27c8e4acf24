//! [`DecidedClip`]: a clip that is decided once and then applied piece by piece.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cpu::decide::Decision;
use crate::cpu::write::{Written, write_piece};
use crate::error::tensor_label;
use crate::partial::{Location, Partial};
use crate::tensor::Spec;
use crate::{ClipReport, Dtype, Error, Tensor, TensorMut};

/// A clip of some tensors that has been decided and not yet applied. It is applied piece by piece: in any order, from
/// any thread, to any copy of the elements. [`Clipper::decide`](crate::Clipper::decide) and
/// [`Clipper::decide_adaptive`](crate::Clipper::decide_adaptive) make one.
///
/// It holds the coefficients and not the tensors, so tensors larger than memory need only one piece in memory at a
/// time. Once each element was in one piece, the elements and the report are those of
/// [`Clipper::apply`](crate::Clipper::apply), bit for bit.
///
/// ```
/// use gradclip::{Clip, Clipper, Tensor, TensorMut};
/// let on_disk = [3.0f32, 0.0, 4.0, 0.0, 0.0];
/// let decided = Clipper::cpu().decide(&Clip::norm(1.0).eps(0.0), &[Tensor::new(&on_disk)])?;
/// let mut written = Vec::new();
/// for (i, piece) in on_disk.chunks(2).enumerate() {
///     let (mut piece, first) = (piece.to_vec(), 2 * i as u64);
///     if !decided.is_unchanged(0, first..first + piece.len() as u64)? {
///         decided.apply(0, first, &mut TensorMut::new(&mut piece))?;
///     }
///     written.append(&mut piece);
/// }
/// assert_eq!(written, [0.6, 0.0, 0.8, 0.0, 0.0]);
/// assert_eq!(decided.report().total_norm, 5.0);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Debug)]
pub struct DecidedClip {
    pub(crate) decision: Decision,
    pub(crate) tensors: Vec<Described>,
    /// What was met in the pieces written so far.
    met: Mutex<Written>,
}

/// The description of a tensor, without its elements.
#[derive(Debug)]
pub(crate) struct Described {
    name: Option<String>,
    dtype: Dtype,
    pub(crate) len: u64,
    pub(crate) counted: bool,
}

impl DecidedClip {
    pub(crate) fn new(decision: Decision, tensors: &[Tensor<'_>]) -> Self {
        let described = |t: &Tensor<'_>| {
            let Spec { name, dtype, len, counted, .. } = t.spec;
            Described { name: name.map(str::to_owned), dtype, len, counted }
        };
        let tensors = tensors.iter().map(described).collect();
        Self { decision, tensors, met: Mutex::new(Written::NOTHING) }
    }

    /// Clips a piece in place, on the calling thread. The piece holds elements of tensor number `tensor`, from element
    /// number `first` on, and may lie anywhere. Its name and shape do not matter. Its dtype is the tensor's, or a wider
    /// one that its elements were copied into ([`Tensor::widen_into`]): rounding then loses nothing that the wider dtype
    /// holds.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such tensor, if it ends before the piece does, or if the piece's dtype does not
    /// hold the tensor's elements. The piece is then unchanged.
    pub fn apply(&self, tensor: usize, first: u64, piece: &mut TensorMut<'_>) -> Result<(), Error> {
        let described = self.find(tensor, first, first.saturating_add(piece.len() as u64))?;
        if !described.dtype.fits_in(piece.dtype()) {
            let (piece, whole) = (piece.dtype(), described.dtype);
            return Err(self.fail(tensor, format!("the piece is {piece}, which does not hold the tensor's {whole}")));
        }
        if piece.is_empty() {
            return Ok(());
        }
        let Decision { clip, segments, outcomes, .. } = &self.decision;
        let layout = &segments.layouts[tensor];
        let at = Location { tensor, index: first };
        if !layout.leaves(outcomes, first..first + piece.spec.len) {
            let mut met = write_piece(clip, at, piece.dtype(), (layout, outcomes), piece.data);
            if !described.counted {
                met.found = Partial::EMPTY;
            }
            self.add(met);
        }
        Ok(())
    }

    /// Whether [`DecidedClip::apply`] would leave these elements of tensor number `tensor` unchanged, so that the
    /// caller can skip them. A value clip looks at each element: the answer is yes only if its policy leaves all.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such tensor, or if it ends before the elements do.
    pub fn is_unchanged(&self, tensor: usize, elements: Range<u64>) -> Result<bool, Error> {
        let Range { start, end } = elements;
        self.find(tensor, start, end)?;
        Ok(self.decision.segments.layouts[tensor].leaves(&self.decision.outcomes, start..end))
    }

    /// What [`Clipper::apply`](crate::Clipper::apply) would report. `lost` covers the pieces applied so far; so do
    /// `clipped` and `non_finite` for a clip that reads nothing first ([`Clipper::decide`](crate::Clipper::decide)). A
    /// piece that was applied twice counts twice.
    #[must_use]
    pub fn report(&self) -> ClipReport {
        self.decision.report(&self.met(), |i| self.tensors[i].name.as_deref())
    }

    /// Adds what was met in a piece.
    pub(crate) fn add(&self, met: Written) {
        let mut all = self.met();
        *all = all.and(met);
    }

    /// The size of all tensors in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.tensors.iter().map(|t| t.len as usize * t.dtype.size()).sum()
    }

    fn met(&self) -> MutexGuard<'_, Written> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tensor, if it has these elements.
    fn find(&self, tensor: usize, start: u64, end: u64) -> Result<&Described, Error> {
        let Some(described) = self.tensors.get(tensor) else {
            return Err(self.fail(tensor, format!("there are only {} tensors", self.tensors.len())));
        };
        if start > end || end > described.len {
            let len = described.len;
            return Err(self.fail(tensor, format!("elements {start}..{end} were asked for, it has {len}")));
        }
        Ok(described)
    }

    fn fail(&self, tensor: usize, reason: String) -> Error {
        let name = self.tensors.get(tensor).and_then(|t| t.name.as_deref());
        Error::Tensor { tensor: tensor_label(name, tensor), reason }
    }
}

//! The layout of an output file: a copy of an input file, or one with other tensors in place of the gradients.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::iter::{once, repeat_n};

use gradclip::{Dtype, TensorMut};
use gradclip_common::header::{self, Entry};

use crate::failure::Failure;
use crate::input::InputFile;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// How many bytes the sums of zero examples may have. With examples a sum is at most twice as long as its tensor; without, a
/// file of 80 bytes could describe a terabyte of zeros.
const MAX_EMPTY_SUMS: usize = 64 << 20;

/// What a file holds in place of the gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The clipped gradients.
    Same,
    /// The same, those of half precision as float32.
    Widened,
    /// The sums of clipped examples.
    Sums,
}

/// A header, and the tensors behind it.
#[derive(Debug)]
pub(crate) struct FileLayout<'a> {
    header: Cow<'a, [u8]>,
    /// In the order of the data.
    slots: Vec<TensorSlot<'a>>,
}

/// One tensor.
#[derive(Debug)]
struct TensorSlot<'a> {
    /// Its number among the gradients of the input file, if it is one.
    number: usize,
    entry: Entry,
    /// Its bytes before they are widened and clipped; zeros follow up to its length.
    content: &'a [u8],
    /// The dtype of these bytes, for a gradient.
    from: Option<Dtype>,
}

/// A piece of the file before it is clipped.
#[derive(Debug)]
pub(crate) struct Piece<'a> {
    /// Where it lies in the file.
    pub(crate) offset: u64,
    pub(crate) bytes: &'a [u8],
    pub(crate) gradient: Option<GradientPiece>,
}

/// Of which gradient a piece is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradientPiece {
    /// The gradient's number in the file.
    pub(crate) number: usize,
    /// The dtype of the piece, and the one to write it in.
    pub(crate) from: Dtype,
    pub(crate) to: Dtype,
    /// The piece's first element.
    pub(crate) first: u64,
}

impl<'a> FileLayout<'a> {
    /// The layout of a file with this content.
    pub(crate) fn new(file: &'a InputFile, content: Content) -> Result<Self, Failure> {
        match content {
            Content::Same => Ok(Self::copy(file)),
            Content::Widened => Self::widened(file),
            Content::Sums => Self::sums(file),
        }
    }

    /// A copy of the file.
    pub(crate) fn copy(file: &'a InputFile) -> Self {
        let bytes = file.bytes();
        // The tensors cover everything behind the header.
        let header = &bytes[..file.entries.first().map_or(bytes.len(), |entry| entry.range().start)];
        let mut gradients = 0..;
        let slot = |entry: &Entry| {
            let (entry, from) = (entry.clone(), entry.dtype);
            let number = from.and_then(|_| gradients.next()).unwrap_or_default();
            TensorSlot { number, content: &bytes[entry.range()], entry, from }
        };
        Self { header: header.into(), slots: file.entries.iter().map(slot).collect() }
    }

    /// Gradients of half precision as float32; metadata and other tensors stay.
    fn widened(file: &'a InputFile) -> Result<Self, Failure> {
        let mut copy = Self::copy(file);
        let is_half = |slot: &&mut TensorSlot<'_>| matches!(slot.from, Some(Dtype::F16 | Dtype::BF16));
        let mut halves = copy.slots.iter_mut().filter(is_half).peekable();
        if halves.peek().is_none() {
            return Ok(copy);
        }
        for TensorSlot { entry, .. } in halves {
            (entry.kind, entry.dtype) = (safetensors::Dtype::F32, Some(Dtype::F32));
            entry.bytes = 0..entry.size().saturating_mul(2);
        }
        Self::composed(file, copy.slots)
    }

    /// The sum over dimension 0 in place of each gradient, in float32 or float64; metadata and other tensors stay.
    pub(crate) fn sums(file: &'a InputFile) -> Result<Self, Failure> {
        let mut slots = Self::copy(file).slots;
        let mut empty_sums = 0usize;
        for slot in &mut slots {
            let Some(dtype) = slot.entry.dtype else { continue };
            let (dtype, kind) = match dtype {
                Dtype::F64 => (Dtype::F64, safetensors::Dtype::F64),
                _ => (Dtype::F32, safetensors::Dtype::F32),
            };
            // The library refuses tensors without dimension 0.
            let shape = slot.entry.shape.get(1..).unwrap_or_default().to_vec();
            let length = shape.iter().try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n));
            let too_large = || format!("tensor {:?}: the sum of its examples is too large", slot.entry.name);
            let length = length.ok_or_else(|| Failure::file(&file.path, too_large()))?;
            if slot.content.is_empty() {
                empty_sums = empty_sums.saturating_add(length);
            }
            if empty_sums > MAX_EMPTY_SUMS {
                let problem = format!("there are no examples, and their sums would be {empty_sums} bytes of zeros");
                return Err(Failure::file(&file.path, format!("tensor {:?}: {problem}", slot.entry.name)));
            }
            let name = std::mem::take(&mut slot.entry.name);
            slot.entry = Entry { name, kind, dtype: Some(dtype), shape, bytes: 0..length as u64, left_out: false };
            slot.content = &[];
        }
        Self::composed(file, slots)
    }

    /// Places tensors of these lengths behind a new header.
    fn composed(file: &'a InputFile, mut slots: Vec<TensorSlot<'a>>) -> Result<Self, Failure> {
        // Readers of the format need every tensor aligned to its elements.
        slots.sort_by_key(|slot| Reverse(slot.entry.kind.bitsize()));
        let mut start = 0u64;
        for TensorSlot { entry, .. } in &mut slots {
            let end = start.checked_add(entry.size());
            let end = end.ok_or_else(|| Failure::file(&file.path, "its tensors are too large"))?;
            entry.bytes = start..end;
            start = end;
        }
        let header = header::compose(slots.iter().map(|slot| &slot.entry), file.metadata.as_deref());
        Ok(Self { header: header.into(), slots })
    }

    /// The length of the file.
    pub(crate) fn len(&self) -> u64 {
        self.header.len() as u64 + self.data_len()
    }

    /// The length of its tensors together.
    pub(crate) fn data_len(&self) -> u64 {
        self.slots.iter().map(|slot| slot.entry.size()).sum()
    }

    /// The bytes of the file before it is clipped.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = &[u8]> {
        let tensors = self.slots.iter().flat_map(|slot| {
            let zeros = slot.entry.range().len() - slot.content.len();
            let whole = repeat_n(&ZEROS[..], zeros / ZEROS.len());
            once(slot.content).chain(whole).chain(once(&ZEROS[..zeros % ZEROS.len()]))
        });
        once(&self.header[..]).chain(tensors)
    }

    /// The same in pieces of at most `most` bytes: a multiple of 8, so that no element is cut.
    pub(crate) fn pieces(&self, most: usize) -> impl Iterator<Item = Piece<'_>> {
        let tensors = self.slots.iter().map(|slot| (slot.content, slot.entry.range().len(), Some(slot)));
        let mut end = 0;
        once((&self.header[..], self.header.len(), None)).chain(tensors).flat_map(move |(bytes, len, slot)| {
            let start = end;
            end += len as u64;
            // What is widened takes more room than it has content.
            let growth = len.checked_div(bytes.len()).unwrap_or(1) as u64;
            bytes.chunks(most).zip((0u64..).step_by(most)).map(move |(bytes, at)| {
                let gradient = slot.and_then(|slot| {
                    let (from, to) = (slot.from?, slot.entry.dtype?);
                    Some(GradientPiece { number: slot.number, from, to, first: at / from.size() as u64 })
                });
                Piece { offset: start + at * growth, bytes, gradient }
            })
        })
    }

    /// How many gradients it has.
    pub(crate) fn gradients(&self) -> usize {
        self.slots.iter().filter(|slot| slot.entry.dtype.is_some()).count()
    }

    /// The gradients in a file of this layout, or their sums, in the order of [`Input::tensors`](crate::input::Input::tensors).
    pub(crate) fn tensors_in<'f>(&'f self, file: &'f mut [u8]) -> Result<Vec<TensorMut<'f>>, gradclip::Error> {
        let mut tensors = Vec::new();
        let (_, mut data) = file.split_at_mut(self.header.len());
        for TensorSlot { number, entry, .. } in &self.slots {
            let (own, rest) = data.split_at_mut(entry.range().len());
            if let Some(dtype) = entry.dtype {
                let tensor = TensorMut::from_bytes(dtype, own)?.named(&entry.name).shape(&entry.shape)?;
                tensors.push((number, tensor));
            }
            data = rest;
        }
        tensors.sort_by_key(|(number, _)| *number);
        Ok(tensors.into_iter().map(|(_, tensor)| tensor).collect())
    }
}

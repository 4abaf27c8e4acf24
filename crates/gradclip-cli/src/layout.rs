//! The file that a part is written as: a copy of itself, or one with the sums of examples in place of its gradients.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::iter::{once, repeat_n};

use gradclip::{Dtype, TensorMut};

use crate::failure::Failure;
use crate::header::{self, Entry};
use crate::input::Part;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// How many bytes the sums of no examples may have. With examples a sum is at most twice as long as its tensor; without any, a
/// file of 80 bytes could ask for a terabyte of zeros.
const SUM_OF_NOTHING: usize = 64 << 20;

/// A file to be: its header, and behind it the tensors.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    header: Cow<'a, [u8]>,
    /// In the order of the data.
    slots: Vec<Slot<'a>>,
}

/// One tensor.
#[derive(Debug)]
struct Slot<'a> {
    /// Which entry of the part it is.
    place: usize,
    entry: Entry,
    /// What it holds before it is clipped; behind it come zeros.
    content: &'a [u8],
}

/// A piece of a file before anything is clipped.
#[derive(Debug)]
pub(crate) struct Piece<'a> {
    /// Where it lies in the file.
    pub(crate) offset: u64,
    pub(crate) bytes: &'a [u8],
    /// Of which of the file's gradients it is, their elements' type, and the first of its elements.
    pub(crate) gradient: Option<(usize, Dtype, u64)>,
}

impl<'a> Layout<'a> {
    /// The part, byte for byte.
    pub(crate) fn copy(part: &'a Part) -> Self {
        let bytes = part.bytes();
        // The tensors cover what the header leaves.
        let header = &bytes[..part.entries.first().map_or(bytes.len(), |entry| entry.bytes.start)];
        let slot = |(place, entry): (usize, &Entry)| {
            let entry = entry.clone();
            Slot { place, content: &bytes[entry.bytes.clone()], entry }
        };
        Self { header: header.into(), slots: part.entries.iter().enumerate().map(slot).collect() }
    }

    /// Each gradient makes room for the sum over its dimension 0, in float32 or float64; metadata and other tensors stay.
    pub(crate) fn sums(part: &'a Part) -> Result<Self, Failure> {
        let mut slots = Self::copy(part).slots;
        let mut of_nothing = 0usize;
        for slot in &mut slots {
            let Some(dtype) = slot.entry.dtype else { continue };
            let (dtype, kind) = match dtype {
                Dtype::F64 => (Dtype::F64, safetensors::Dtype::F64),
                _ => (Dtype::F32, safetensors::Dtype::F32),
            };
            // What has no dimension 0 is refused by the library.
            let shape = slot.entry.shape.get(1..).unwrap_or_default().to_vec();
            let length = shape.iter().try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n));
            let too_large = || format!("tensor {:?}: the sum of its examples is too large", slot.entry.name);
            let length = length.ok_or_else(|| Failure::file(&part.path, too_large()))?;
            if slot.content.is_empty() {
                of_nothing = of_nothing.saturating_add(length);
            }
            if of_nothing > SUM_OF_NOTHING {
                let problem = format!("there are no examples, and their sums would be {of_nothing} bytes of zeros");
                return Err(Failure::file(&part.path, format!("tensor {:?}: {problem}", slot.entry.name)));
            }
            let name = std::mem::take(&mut slot.entry.name);
            slot.entry = Entry { name, kind, dtype: Some(dtype), shape, bytes: 0..length };
            slot.content = &[];
        }
        // Readers of the format need every tensor aligned to its elements.
        slots.sort_by_key(|slot| Reverse(slot.entry.kind.bitsize()));
        let mut start = 0usize;
        for Slot { entry, .. } in &mut slots {
            let end = start.checked_add(entry.bytes.len());
            let end = end.ok_or_else(|| Failure::file(&part.path, "the sums of its examples are too large"))?;
            entry.bytes = start..end;
            start = end;
        }
        let header = header::compose(slots.iter().map(|slot| &slot.entry), part.metadata.as_deref());
        Ok(Self { header: header.into(), slots })
    }

    /// How long the file is.
    pub(crate) fn len(&self) -> u64 {
        self.header.len() as u64 + self.data_len()
    }

    /// How long its tensors are together.
    pub(crate) fn data_len(&self) -> u64 {
        self.slots.iter().map(|slot| slot.entry.bytes.len() as u64).sum()
    }

    /// The file before anything is clipped, in pieces.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = &[u8]> {
        let tensors = self.slots.iter().flat_map(|slot| {
            let zeros = slot.entry.bytes.len() - slot.content.len();
            let whole = repeat_n(&ZEROS[..], zeros / ZEROS.len());
            once(slot.content).chain(whole).chain(once(&ZEROS[..zeros % ZEROS.len()]))
        });
        once(&self.header[..]).chain(tensors)
    }

    /// The copy in pieces of at most so many bytes, a multiple of 8, so that no element is cut.
    pub(crate) fn pieces(&self, most: usize) -> impl Iterator<Item = Piece<'_>> {
        let mut gradients = 0..;
        let tensors = self.slots.iter().map(move |slot| {
            let gradient = slot.entry.dtype.and_then(|dtype| Some((gradients.next()?, dtype)));
            (slot.content, gradient)
        });
        let mut end = 0;
        once((&self.header[..], None)).chain(tensors).flat_map(move |(bytes, gradient)| {
            let start = end;
            end += bytes.len() as u64;
            bytes.chunks(most).zip((0u64..).step_by(most)).map(move |(bytes, from)| Piece {
                offset: start + from,
                bytes,
                gradient: gradient.map(|(number, dtype)| (number, dtype, from / dtype.size() as u64)),
            })
        })
    }

    /// How many gradients it has.
    pub(crate) fn gradients(&self) -> usize {
        self.slots.iter().filter(|slot| slot.entry.dtype.is_some()).count()
    }

    /// The gradients in such a file, or their sums, in the order of [`Input::tensors`](crate::input::Input::tensors).
    pub(crate) fn tensors_in<'f>(&'f self, file: &'f mut [u8]) -> Result<Vec<TensorMut<'f>>, gradclip::Error> {
        let mut tensors = Vec::new();
        let (_, mut data) = file.split_at_mut(self.header.len());
        for Slot { place, entry, .. } in &self.slots {
            let (own, rest) = data.split_at_mut(entry.bytes.len());
            if let Some(dtype) = entry.dtype {
                let tensor = TensorMut::from_bytes(dtype, own)?.named(&entry.name).shape(&entry.shape)?;
                tensors.push((place, tensor));
            }
            data = rest;
        }
        tensors.sort_by_key(|(place, _)| *place);
        Ok(tensors.into_iter().map(|(_, tensor)| tensor).collect())
    }
}

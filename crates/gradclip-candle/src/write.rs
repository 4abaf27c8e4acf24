//! Writes a clipped gradient: into a new tensor, or in place.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, Tensor, WithDType};
use gradclip::{DecidedClip, Element, TensorMut};
use rayon::prelude::*;

use crate::error::{Error, replaced};
use crate::gradients::with_elements;

/// Elements in a chunk, the unit of parallel work. The library uses the same.
pub(crate) const CHUNK: usize = 128 * 1024;

/// How one gradient is clipped.
pub(crate) struct Write<'d> {
    pub(crate) decided: &'d DecidedClip,
    /// Its number in the decision.
    pub(crate) tensor: usize,
}

/// The first pass over a chunk.
enum Chunk<T> {
    /// Not clipped yet, because another chunk has changed.
    Pending,
    Unchanged,
    /// The clipped elements.
    Clipped(Vec<T>),
}

impl Write<'_> {
    /// The clipped copy of a contiguous gradient; `None` if no bit differs.
    pub(crate) fn copy(&self, gradient: &Tensor) -> Result<Option<Tensor>, Error> {
        let (storage, layout) = gradient.storage_and_layout();
        let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(replaced());
        };
        with_elements!(storage, elements => {
            let elements = elements.get(start..end).ok_or_else(replaced)?;
            let Some(clipped) = self.copy_elements(elements)? else { return Ok(None) };
            Ok(Some(Tensor::from_vec(clipped, layout.shape(), &Device::Cpu)?))
        }, Err(replaced()))
    }

    /// Clips chunk after chunk until one changes, and only then allocates the copy. Under a norm the first chunk changes; under a
    /// value clip maybe none. Each chunk is clipped once, because a value clip counts non-finite elements.
    fn copy_elements<T: Element + WithDType>(&self, from: &[T]) -> Result<Option<Vec<T>>, Error> {
        if from.len() <= CHUNK {
            let mut copy = from.to_vec();
            self.apply(0, &mut copy)?;
            return Ok((!same_bits(from, &copy)).then_some(copy));
        }
        let changes = AtomicBool::new(false);
        let clip = |(i, chunk): (usize, &[T])| -> Result<_, Error> {
            if changes.load(Ordering::Relaxed) {
                return Ok(Chunk::Pending);
            }
            let mut copy = chunk.to_vec();
            self.apply(i, &mut copy)?;
            if same_bits(chunk, &copy) {
                return Ok(Chunk::Unchanged);
            }
            changes.store(true, Ordering::Relaxed);
            Ok(Chunk::Clipped(copy))
        };
        let first_pass: Vec<_> = from.par_chunks(CHUNK).enumerate().map(clip).collect::<Result<_, _>>()?;
        if !changes.into_inner() {
            return Ok(None);
        }
        // Not touched by this thread, so that each page is allocated by the thread that writes it.
        let mut to = bytemuck::zeroed_vec::<T>(from.len());
        let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).zip(first_pass).enumerate();
        chunks.try_for_each(|(i, ((to, from), chunk))| {
            match chunk {
                Chunk::Clipped(clipped) => to.copy_from_slice(&clipped),
                Chunk::Unchanged => to.copy_from_slice(from),
                Chunk::Pending => {
                    to.copy_from_slice(from);
                    self.apply(i, to)?;
                }
            }
            Ok::<_, Error>(())
        })?;
        Ok(Some(to))
    }

    fn in_place<T: Element>(&self, elements: &mut [T]) -> Result<(), Error> {
        if elements.len() <= CHUNK {
            return self.apply(0, elements);
        }
        elements.par_chunks_mut(CHUNK).enumerate().try_for_each(|(i, chunk)| self.apply(i, chunk))
    }

    /// Clips chunk number `i`.
    fn apply<T: Element>(&self, i: usize, chunk: &mut [T]) -> Result<(), Error> {
        Ok(self.decided.apply(self.tensor, (i * CHUNK) as u64, &mut TensorMut::new(chunk))?)
    }
}

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "clip"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (start, end) = layout.contiguous_offsets().ok_or_else(replaced)?;
        with_elements!(storage, elements => {
            Ok(self.in_place(elements.get_mut(start..end).ok_or_else(replaced)?)?)
        }, Err(replaced().into()))
    }
}

fn same_bits<T: Element>(a: &[T], b: &[T]) -> bool {
    bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b)
}

//! Copies elements into a wider dtype, exactly.

use super::element::Widen;
use super::isa::LANES;
use super::map::{self, Same, ToF64};
use super::pool::in_parallel;
use super::tuning::{BLOCK, CHUNK};
use crate::dtype::with_element;
use crate::error::tensor_label;
use crate::{Dtype, Error, Tensor, TensorMut};

impl Tensor<'_> {
    /// Copies the elements into a tensor of the same dtype or of one that holds them exactly: float16 and bfloat16 into
    /// float32, and all into float64. Works on rayon's current pool. A signalling NaN may become quiet.
    ///
    /// ```
    /// use gradclip::{Tensor, TensorMut};
    /// let mut wide = [0f32; 2];
    /// Tensor::new(&[half::f16::from_f32(0.1), half::f16::MAX]).widen_into(&mut TensorMut::new(&mut wide))?;
    /// assert_eq!(wide, [0.099975586, 65504.0]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Tensor`] if the lengths differ, or if the other dtype does not hold these elements.
    pub fn widen_into(&self, into: &mut TensorMut<'_>) -> Result<(), Error> {
        self.check_into(0, into)?;
        let (from, to) = (self.dtype(), into.dtype());
        if from == to {
            into.data.copy_from_slice(self.data);
            return Ok(());
        }
        self.widen(to, into.data);
        Ok(())
    }

    /// Widens the elements to float32 or float64.
    pub(crate) fn widen(&self, to: Dtype, into: &mut [u8]) {
        let from = self.dtype();
        let pieces = self.data.chunks(CHUNK * from.size()).zip(into.chunks_mut(CHUNK * to.size()));
        in_parallel(pieces, self.len().div_ceil(CHUNK), self.data.len(), |(data, into)| {
            with_element!(from, T => widen::<T>(data, to, into));
        });
    }

    /// Checks that this tensor, number `i` of a list, can be widened into another.
    pub(crate) fn check_into(&self, i: usize, into: &TensorMut<'_>) -> Result<(), Error> {
        let (from, to) = (self.dtype(), into.dtype());
        let reason = if self.len() != into.len() {
            format!("it has {} elements, its destination {}", self.len(), into.len())
        } else if !from.fits_in(to) {
            format!("it is {from}, which {to} does not hold exactly; its destination must be of a wider dtype")
        } else {
            return Ok(());
        };
        Err(Error::Tensor { tensor: tensor_label(self.name(), i), reason })
    }
}

fn widen<T: Widen>(data: &[u8], to: Dtype, into: &mut [u8]) {
    let mut buffer = [[0f64; LANES]; BLOCK / LANES];
    let blocks = data.chunks(BLOCK * size_of::<T>()).zip(into.chunks_mut(BLOCK * to.size()));
    for (block, into) in blocks {
        widen_block::<T>(block, to, &mut buffer);
        into.copy_from_slice(&bytemuck::cast_slice(&buffer)[..into.len()]);
    }
}

/// Widens elements to float32 or float64, which begin with the buffer.
pub(super) fn widen_block<T: Widen>(data: &[u8], to: Dtype, buffer: &mut [[f64; LANES]]) {
    if to == Dtype::F64 {
        map::write::<T, _>(ToF64, data, buffer);
    } else {
        map::write::<T, _>(Same, data, bytemuck::cast_slice_mut(buffer));
    }
}

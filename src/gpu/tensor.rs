//! [`GpuTensor`]: a view of a gradient in GPU memory.

use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use super::table::Piece;
use crate::segment::SegmentLayout;
use crate::tensor::{Spec, TensorSpec, settings};
use crate::{Dtype, Error, UnitAxis};

/// A gradient in GPU memory: a run of elements of one dtype, at any offset in a buffer with `BufferUsages::STORAGE`.
///
/// Ranges are in elements of the dtype, from the start of the buffer. Several tensors may lie in one buffer.
#[derive(Clone, Debug)]
pub struct GpuTensor {
    pub(super) buffer: wgpu::Buffer,
    pub(super) start: u64,
    pub(super) spec: TensorSpec<Arc<str>, Arc<[usize]>>,
    pub(super) parameter: Option<Arc<GpuTensor>>,
}

impl GpuTensor {
    /// Elements of `dtype`; `..` for as many as the buffer holds.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for float64; [`Error::Tensor`] if the range reaches past the end, the buffer has no
    /// `STORAGE` usage, or the tensor ends in the last bytes of a buffer whose size is not a multiple of 4.
    pub fn new(buffer: &wgpu::Buffer, dtype: Dtype, elements: impl RangeBounds<u64>) -> Result<Self, Error> {
        let tensor = || String::from("the tensor");
        let fail = |reason| Err(Error::Tensor { tensor: tensor(), reason });
        if dtype == Dtype::F64 {
            return Err(Error::UnsupportedDtype { tensor: tensor(), dtype });
        }
        let size = dtype.size() as u64;
        let capacity = buffer.size() / size;
        let start = match elements.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match elements.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => capacity,
        };
        if start > end || end > capacity {
            return fail(format!("elements {start}..{end} of {dtype} end past the buffer, which holds {capacity}"));
        }
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return fail("its buffer has no STORAGE usage; create it with wgpu::BufferUsages::STORAGE".into());
        }
        let trailing = buffer.size() % 4;
        if start < end && end * size > buffer.size() - trailing {
            return fail(format!(
                "it ends in the last {trailing} bytes of a buffer whose size is not a multiple of 4; make the buffer larger"
            ));
        }
        Ok(Self { buffer: buffer.clone(), start, spec: TensorSpec::new(dtype, end - start), parameter: None })
    }

    /// Elements of float32.
    ///
    /// # Errors
    /// As [`GpuTensor::new`].
    pub fn f32(buffer: &wgpu::Buffer, elements: impl RangeBounds<u64>) -> Result<Self, Error> {
        Self::new(buffer, Dtype::F32, elements)
    }

    /// Elements of float16.
    ///
    /// # Errors
    /// As [`GpuTensor::new`].
    pub fn f16(buffer: &wgpu::Buffer, elements: impl RangeBounds<u64>) -> Result<Self, Error> {
        Self::new(buffer, Dtype::F16, elements)
    }

    /// Elements of bfloat16.
    ///
    /// # Errors
    /// As [`GpuTensor::new`].
    pub fn bf16(buffer: &wgpu::Buffer, elements: impl RangeBounds<u64>) -> Result<Self, Error> {
        Self::new(buffer, Dtype::BF16, elements)
    }

    settings!(&str, &[usize], Self);

    pub(super) fn spec(&self) -> Spec<'_> {
        self.spec.as_ref()
    }

    /// Elements of one matrix as a piece of buffer number `buffer`.
    pub(super) fn piece(&self, buffer: usize, tensor: usize, (layout, elements): (SegmentLayout, Range<u64>)) -> Piece {
        let Range { start, end } = elements;
        let dtype = self.spec.dtype;
        Piece { buffer, dtype, start: self.start + start, len: end - start, tensor, first_element: start, layout }
    }
}

//! What a gradient is made of: its dtype, and views of it in host memory. Views of GPU memory are in [`crate::gpu`].

use half::{bf16, f16};

use crate::Error;

/// The element types that can be clipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary64; on the CPU only, because WGSL has no 64-bit floats.
    F64,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
}

impl Dtype {
    /// The size of one element in bytes.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A Rust type that holds one element: `f32`, `f64`, [`half::f16`] or [`half::bf16`]. Sealed.
pub trait Element: sealed::Sealed + bytemuck::Pod + Send + Sync {
    /// The dtype of this type.
    const DTYPE: Dtype;
}
impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}

/// A gradient in host memory, read only: `len` elements of one dtype, at any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub(crate) name: Option<&'a str>,
    pub(crate) dtype: Dtype,
    pub(crate) data: &'a [u8],
}

/// A gradient in host memory that may be written: `len` elements of one dtype, at any alignment.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) name: Option<&'a str>,
    pub(crate) dtype: Dtype,
    pub(crate) data: &'a mut [u8],
}

impl<'a> Tensor<'a> {
    /// A view of elements.
    #[must_use]
    pub fn new<T: Element>(data: &'a [T]) -> Self {
        Self { name: None, dtype: T::DTYPE, data: bytemuck::cast_slice(data) }
    }

    /// A view of native-endian elements in bytes, as a mapped file gives them. The bytes may be misaligned.
    ///
    /// # Errors
    /// [`Error::PartialElement`] if the length is not a multiple of the element's size.
    pub fn from_bytes(dtype: Dtype, data: &'a [u8]) -> Result<Self, Error> {
        whole_elements(dtype, data.len())?;
        Ok(Self { name: None, dtype, data })
    }
}

impl<'a> TensorMut<'a> {
    /// A view of elements.
    #[must_use]
    pub fn new<T: Element>(data: &'a mut [T]) -> Self {
        Self { name: None, dtype: T::DTYPE, data: bytemuck::cast_slice_mut(data) }
    }

    /// A view of native-endian elements in bytes, as a mapped file gives them. The bytes may be misaligned.
    ///
    /// # Errors
    /// [`Error::PartialElement`] if the length is not a multiple of the element's size.
    pub fn from_bytes(dtype: Dtype, data: &'a mut [u8]) -> Result<Self, Error> {
        whole_elements(dtype, data.len())?;
        Ok(Self { name: None, dtype, data })
    }

    /// The same elements, read only.
    #[must_use]
    pub fn as_tensor(&self) -> Tensor<'_> {
        Tensor { name: self.name, dtype: self.dtype, data: self.data }
    }
}

macro_rules! common {
    ($view:ident, $slice:ty) => {
        impl<'a> $view<'a> {
            /// Gives the tensor a name, which errors and reports then carry.
            #[must_use]
            pub fn named(mut self, name: &'a str) -> Self {
                self.name = Some(name);
                self
            }

            /// The number of elements.
            #[must_use]
            pub fn len(&self) -> usize {
                self.data.len() / self.dtype.size()
            }

            /// True for a tensor of no elements, which is welcome everywhere.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.data.is_empty()
            }

            /// The dtype of the elements.
            #[must_use]
            pub fn dtype(&self) -> Dtype {
                self.dtype
            }

            /// The name, if it was given one.
            #[must_use]
            pub fn name(&self) -> Option<&'a str> {
                self.name
            }

            /// The elements as bytes.
            #[must_use]
            pub fn bytes(&self) -> &[u8] {
                self.data
            }
        }

        impl<'a, T: Element> From<$slice> for $view<'a> {
            fn from(data: $slice) -> Self {
                Self::new(data)
            }
        }
    };
}
common!(Tensor, &'a [T]);
common!(TensorMut, &'a mut [T]);

fn whole_elements(dtype: Dtype, bytes: usize) -> Result<(), Error> {
    if bytes.is_multiple_of(dtype.size()) { Ok(()) } else { Err(Error::PartialElement { dtype, bytes }) }
}

/// A gradient in GPU memory: a run of elements of one dtype, at any offset in a buffer with `BufferUsages::STORAGE`.
///
/// Ranges are in elements of the dtype, from the start of the buffer. Several tensors may lie in one buffer.
#[cfg(feature = "gpu")]
#[derive(Clone, Debug)]
pub struct GpuTensor {
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) dtype: Dtype,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) name: Option<std::sync::Arc<str>>,
}

#[cfg(feature = "gpu")]
impl GpuTensor {
    /// Elements of `dtype`; `..` for as many as the buffer holds.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for float64, [`Error::OutOfBounds`], [`Error::NotStorage`], and
    /// [`Error::UnreachableTail`] for a tensor that ends in the odd bytes of a buffer.
    pub fn new(buffer: &wgpu::Buffer, dtype: Dtype, elements: impl std::ops::RangeBounds<u64>) -> Result<Self, Error> {
        use std::ops::Bound;
        let tensor = || String::from("the tensor");
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
            return Err(Error::OutOfBounds { tensor: tensor(), dtype, start, end, capacity });
        }
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::NotStorage { tensor: tensor() });
        }
        let trailing = buffer.size() % 4;
        if start < end && end * size > buffer.size() - trailing {
            return Err(Error::UnreachableTail { tensor: tensor(), trailing });
        }
        Ok(Self { buffer: buffer.clone(), dtype, start, end, name: None })
    }

    /// Elements of float32.
    ///
    /// # Errors
    /// As [`GpuTensor::new`].
    pub fn f32(buffer: &wgpu::Buffer, elements: impl std::ops::RangeBounds<u64>) -> Result<Self, Error> {
        Self::new(buffer, Dtype::F32, elements)
    }

    /// Elements of float16.
    ///
    /// # Errors
    /// As [`GpuTensor::new`].
    pub fn f16(buffer: &wgpu::Buffer, elements: impl std::ops::RangeBounds<u64>) -> Result<Self, Error> {
        Self::new(buffer, Dtype::F16, elements)
    }

    /// Elements of bfloat16.
    ///
    /// # Errors
    /// As [`GpuTensor::new`].
    pub fn bf16(buffer: &wgpu::Buffer, elements: impl std::ops::RangeBounds<u64>) -> Result<Self, Error> {
        Self::new(buffer, Dtype::BF16, elements)
    }

    /// Gives the tensor a name, which errors and reports then carry.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// True for a tensor of no elements, which is welcome everywhere.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

//! What a gradient is made of: its dtype, and views of it in host memory. Views of GPU memory are in [`crate::gpu`].

use half::{bf16, f16};

use crate::cpu::count::counts;
use crate::{Clip, Error, TensorCounts, UnitAxis};

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
    pub trait Sealed {
        /// The dtype of this type.
        const DTYPE: super::Dtype;
    }
    impl Sealed for f32 {
        const DTYPE: super::Dtype = super::Dtype::F32;
    }
    impl Sealed for f64 {
        const DTYPE: super::Dtype = super::Dtype::F64;
    }
    impl Sealed for half::f16 {
        const DTYPE: super::Dtype = super::Dtype::F16;
    }
    impl Sealed for half::bf16 {
        const DTYPE: super::Dtype = super::Dtype::BF16;
    }
}

/// A Rust type that holds one element: `f32`, `f64`, [`half::f16`] or [`half::bf16`]. Sealed.
pub trait Element: sealed::Sealed + bytemuck::Pod + Send + Sync {}
impl Element for f32 {}
impl Element for f64 {}
impl Element for f16 {}
impl Element for bf16 {}

/// A gradient in host memory, read only: `len` elements of one dtype, at any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub(crate) name: Option<&'a str>,
    pub(crate) dtype: Dtype,
    pub(crate) data: &'a [u8],
    pub(crate) shape: Option<&'a [usize]>,
    pub(crate) unit_axis: Option<UnitAxis>,
    /// Whether its norm is measured.
    pub(crate) counted: bool,
    pub(crate) parameter: Option<&'a Tensor<'a>>,
}

/// A gradient in host memory that may be written: `len` elements of one dtype, at any alignment.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) name: Option<&'a str>,
    pub(crate) dtype: Dtype,
    pub(crate) data: &'a mut [u8],
    pub(crate) shape: Option<&'a [usize]>,
    pub(crate) unit_axis: Option<UnitAxis>,
    /// Whether its norm is measured.
    pub(crate) counted: bool,
    pub(crate) parameter: Option<&'a Tensor<'a>>,
}

impl<'a> Tensor<'a> {
    /// A view of elements.
    #[must_use]
    pub fn new<T: Element>(data: &'a [T]) -> Self {
        Self {
            name: None,
            dtype: T::DTYPE,
            data: bytemuck::cast_slice(data),
            shape: None,
            unit_axis: None,
            counted: true,
            parameter: None,
        }
    }

    /// A view of native-endian elements in bytes, as a mapped file gives them. The bytes may be misaligned.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the length is not a multiple of the element's size.
    pub fn from_bytes(dtype: Dtype, data: &'a [u8]) -> Result<Self, Error> {
        whole_elements(dtype, data.len())?;
        Ok(Self { name: None, dtype, data, shape: None, unit_axis: None, counted: true, parameter: None })
    }
}

impl Tensor<'_> {
    /// Counts what is zero and what is not finite, in one sweep on rayon's current pool.
    ///
    /// ```
    /// let counts = gradclip::Tensor::new(&[0.0f32, 1.0, f32::NAN, -0.0]).counts();
    /// assert_eq!((counts.zeros, counts.non_finite, counts.first_non_finite), (2, 1, Some(2)));
    /// ```
    #[must_use]
    pub fn counts(&self) -> TensorCounts {
        counts(self)
    }
}

impl<'a> TensorMut<'a> {
    /// A view of elements.
    #[must_use]
    pub fn new<T: Element>(data: &'a mut [T]) -> Self {
        Self {
            name: None,
            dtype: T::DTYPE,
            data: bytemuck::cast_slice_mut(data),
            shape: None,
            unit_axis: None,
            counted: true,
            parameter: None,
        }
    }

    /// A view of native-endian elements in bytes, as a mapped file gives them. The bytes may be misaligned.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the length is not a multiple of the element's size.
    pub fn from_bytes(dtype: Dtype, data: &'a mut [u8]) -> Result<Self, Error> {
        whole_elements(dtype, data.len())?;
        Ok(Self { name: None, dtype, data, shape: None, unit_axis: None, counted: true, parameter: None })
    }

    /// The same elements, read only.
    #[must_use]
    pub fn as_tensor(&self) -> Tensor<'_> {
        let Self { name, dtype, ref data, shape, unit_axis, counted, parameter } = *self;
        Tensor { name, dtype, data, shape, unit_axis, counted, parameter }
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

            /// Gives the tensor its shape, in row-major order, which scopes by unit or example need; without one it is
            /// one-dimensional. `&[]` is a scalar.
            ///
            /// # Errors
            /// [`Error::Tensor`] if the shape holds another number of elements.
            pub fn shape(mut self, shape: &'a [usize]) -> Result<Self, Error> {
                check_shape(self.name, shape, self.len() as u64)?;
                self.shape = Some(shape);
                Ok(self)
            }

            /// Chooses this tensor's units under [`Scope::Unit`](crate::Scope::Unit), in place of the clip's
            /// [`unit_axis`](crate::Clip::unit_axis): layers of one model differ in where they keep their outputs. Other scopes
            /// ignore it.
            #[must_use]
            pub fn unit_axis(mut self, axis: UnitAxis) -> Self {
                self.unit_axis = Some(axis);
                self
            }

            /// Says whether the tensor is a replica of what another process of a group counts ([`processes`](crate::processes)): it is
            /// scaled and not measured, and its non-finite elements go unnoticed.
            #[must_use]
            pub fn replica(mut self, replica: bool) -> Self {
                self.counted = !replica;
                self
            }

            /// Says which parameter the gradient belongs to, for [`Clip::agc`](crate::Clip::agc). Its shape must be the
            /// gradient's, and so must its name if it has one; its dtype may differ.
            #[must_use]
            pub fn parameter(mut self, parameter: &'a Tensor<'a>) -> Self {
                self.parameter = Some(parameter);
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

/// What scopes need to know of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims<'a> {
    /// None for a tensor of one dimension whose shape was not told.
    pub(crate) shape: Option<&'a [usize]>,
    /// In place of the clip's, if there is one.
    pub(crate) unit_axis: Option<UnitAxis>,
    pub(crate) len: u64,
    pub(crate) counted: bool,
}

impl Dims<'_> {
    /// How many elements norms count.
    pub(crate) fn counted_len(self) -> u64 {
        if self.counted { self.len } else { 0 }
    }

    pub(crate) fn rank(self) -> usize {
        self.shape.map_or(1, <[usize]>::len)
    }

    /// The size of dimension 0; None for a scalar.
    pub(crate) fn first(self) -> Option<u64> {
        self.shape.map_or(Some(self.len), |shape| shape.first().map(|n| *n as u64))
    }

    /// The size of the last dimension; None for a scalar.
    pub(crate) fn last(self) -> Option<u64> {
        self.shape.map_or(Some(self.len), |shape| shape.last().map(|n| *n as u64))
    }

    /// Whether both are the same shape, a telling one or not.
    pub(crate) fn same_as(self, other: Self) -> bool {
        self.len == other.len && self.rank() == other.rank() && (self.rank() < 2 || self.shape == other.shape)
    }
}

impl std::fmt::Display for Dims<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.shape {
            Some(shape) => write!(f, "{shape:?}"),
            None => write!(f, "[{}]", self.len),
        }
    }
}

impl Tensor<'_> {
    pub(crate) fn dims(&self) -> Dims<'_> {
        Dims { shape: self.shape, unit_axis: self.unit_axis, len: self.len() as u64, counted: self.counted }
    }
}

/// That a clip sums examples, and that there is a sum for each tensor.
pub(crate) fn check_summed(clip: &Clip, tensors: &[Tensor<'_>], sums: &[TensorMut<'_>]) -> Result<(), Error> {
    clip.check_examples()?;
    let given: Vec<_> = sums.iter().map(|sum| (sum.dtype, sum.len() as u64)).collect();
    check_sums(tensors.iter().map(|t| (t.dims(), t.dtype, t.name)), &given)
}

/// That sums, by dtype and length, are as many as the tensors, and each as long as one example, in the wider type.
pub(crate) fn check_sums<'a, N: std::ops::Deref<Target = str>>(
    tensors: impl ExactSizeIterator<Item = (Dims<'a>, Dtype, Option<N>)>,
    sums: &[(Dtype, u64)],
) -> Result<(), Error> {
    if tensors.len() != sums.len() {
        let (expected, found) = (tensors.len() as u64, sums.len() as u64);
        return Err(Error::usage(format!("sums of examples: {found} given, {expected} needed")));
    }
    for (i, ((dims, dtype, name), (sum_dtype, sum_len))) in tensors.zip(sums).enumerate() {
        let fail = |reason| Err(Error::Tensor { tensor: crate::error::tensor_label(name.as_deref(), i), reason });
        let wide = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        if *sum_dtype != wide {
            return fail(format!("its sum must be {wide}, not {sum_dtype}"));
        }
        if dims.rank() == 0 {
            return fail("it is a scalar, and has no dimension 0 to take examples along".into());
        }
        // How long an example is, nobody can tell where there is none.
        let elements = dims.first().and_then(|examples| dims.len.checked_div(examples));
        if let Some(elements) = elements.filter(|elements| elements != sum_len) {
            return fail(format!("an example has {elements} elements, its sum {sum_len}"));
        }
    }
    Ok(())
}

fn check_shape(name: Option<&str>, shape: &[usize], len: u64) -> Result<(), Error> {
    let product = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n as u64));
    // A zero anywhere makes the product 0, even if the others overflow.
    if product == Some(len) || (len == 0 && shape.contains(&0)) {
        return Ok(());
    }
    let tensor = name.map_or_else(|| String::from("the tensor"), |name| format!("tensor {name:?}"));
    Err(Error::Tensor { tensor, reason: format!("the shape {shape:?} does not hold its {len} elements") })
}

fn whole_elements(dtype: Dtype, bytes: usize) -> Result<(), Error> {
    if bytes.is_multiple_of(dtype.size()) {
        Ok(())
    } else {
        let reason = format!("{bytes} bytes do not hold a whole number of {dtype} elements");
        Err(Error::Tensor { tensor: "the tensor".into(), reason })
    }
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
    pub(crate) shape: Option<std::sync::Arc<[usize]>>,
    pub(crate) unit_axis: Option<UnitAxis>,
    /// Whether its norm is measured.
    pub(crate) counted: bool,
    pub(crate) parameter: Option<std::sync::Arc<GpuTensor>>,
}

#[cfg(feature = "gpu")]
impl GpuTensor {
    /// Elements of `dtype`; `..` for as many as the buffer holds.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for float64; [`Error::Tensor`] if the range reaches past the end, the buffer has no
    /// `STORAGE` usage, or the tensor ends in the odd bytes of a buffer.
    pub fn new(buffer: &wgpu::Buffer, dtype: Dtype, elements: impl std::ops::RangeBounds<u64>) -> Result<Self, Error> {
        use std::ops::Bound;
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
        Ok(Self {
            buffer: buffer.clone(),
            dtype,
            start,
            end,
            name: None,
            shape: None,
            unit_axis: None,
            counted: true,
            parameter: None,
        })
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

    /// Gives the tensor its shape, in row-major order, which scopes by unit or example need; without one it is
    /// one-dimensional. `&[]` is a scalar.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the shape holds another number of elements.
    pub fn shape(mut self, shape: &[usize]) -> Result<Self, Error> {
        check_shape(self.name.as_deref(), shape, self.len())?;
        self.shape = Some(shape.into());
        Ok(self)
    }

    /// Chooses this tensor's units under [`Scope::Unit`](crate::Scope::Unit), in place of the clip's
    /// [`unit_axis`](crate::Clip::unit_axis): layers of one model differ in where they keep their outputs. Other scopes
    /// ignore it.
    #[must_use]
    pub fn unit_axis(mut self, axis: UnitAxis) -> Self {
        self.unit_axis = Some(axis);
        self
    }

    /// Says whether the tensor is a replica of what another process of a group counts ([`processes`](crate::processes)): it is
    /// scaled and not measured, and its non-finite elements go unnoticed.
    #[must_use]
    pub fn replica(mut self, replica: bool) -> Self {
        self.counted = !replica;
        self
    }

    /// Says which parameter the gradient belongs to, for [`Clip::agc`](crate::Clip::agc). Its shape must be the
    /// gradient's, and so must its name if it has one; its dtype may differ.
    #[must_use]
    pub fn parameter(mut self, parameter: Self) -> Self {
        self.parameter = Some(std::sync::Arc::new(parameter));
        self
    }

    pub(crate) fn dims(&self) -> Dims<'_> {
        Dims { shape: self.shape.as_deref(), unit_axis: self.unit_axis, len: self.len(), counted: self.counted }
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

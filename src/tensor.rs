//! Views of gradients in host memory, and [`TensorSpec`], which describes a tensor in any memory.

use std::ops::Deref;

use crate::{Dtype, Element, Error, UnitAxis};

/// The description of a tensor, without its elements. Host tensors borrow names and shapes, other tensors own them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TensorSpec<N, S> {
    pub(crate) name: Option<N>,
    pub(crate) dtype: Dtype,
    pub(crate) len: u64,
    /// None for a one-dimensional tensor that was given no shape.
    pub(crate) shape: Option<S>,
    /// Replaces the clip's `unit_axis`, if there is one.
    pub(crate) unit_axis: Option<UnitAxis>,
    /// Whether its norm is measured.
    pub(crate) counted: bool,
}

/// The description of a tensor, borrowed.
pub(crate) type Spec<'a> = TensorSpec<&'a str, &'a [usize]>;

impl<N: Deref<Target = str>, S: Deref<Target = [usize]>> TensorSpec<N, S> {
    pub(crate) fn new(dtype: Dtype, len: u64) -> Self {
        Self { name: None, dtype, len, shape: None, unit_axis: None, counted: true }
    }

    pub(crate) fn as_ref(&self) -> Spec<'_> {
        let Self { ref name, dtype, len, ref shape, unit_axis, counted } = *self;
        TensorSpec { name: name.as_deref(), dtype, len, shape: shape.as_deref(), unit_axis, counted }
    }

    /// Checks that the shape holds all elements.
    pub(crate) fn check_shape(&self) -> Result<(), Error> {
        let (shape, len) = (self.shape.as_deref().unwrap_or_default(), self.len);
        let product = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n as u64));
        // A zero anywhere makes the product 0, even if the others overflow.
        if product == Some(len) || (len == 0 && shape.contains(&0)) {
            return Ok(());
        }
        let name = self.name.as_deref();
        let tensor = name.map_or_else(|| String::from("the tensor"), |name| format!("tensor {name:?}"));
        Err(Error::Tensor { tensor, reason: format!("the shape {shape:?} does not hold its {len} elements") })
    }
}

impl Spec<'_> {
    /// The same description, which borrows nothing.
    pub(crate) fn to_owned(self) -> TensorSpec<String, Vec<usize>> {
        let Self { name, dtype, len, shape, unit_axis, counted } = self;
        TensorSpec {
            name: name.map(str::to_owned),
            dtype,
            len,
            shape: shape.map(<[usize]>::to_vec),
            unit_axis,
            counted,
        }
    }

    /// The number of elements that norms count.
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

    /// The size of each dimension.
    pub(crate) fn sizes(self) -> Vec<u64> {
        self.shape.map_or_else(|| vec![self.len], |shape| shape.iter().map(|n| *n as u64).collect())
    }

    pub(crate) fn has_shape_of(self, other: Self) -> bool {
        self.len == other.len && self.rank() == other.rank() && (self.rank() < 2 || self.shape == other.shape)
    }

    /// The shape as messages show it.
    pub(crate) fn shape_text(self) -> String {
        self.shape.map_or_else(|| format!("[{}]", self.len), |shape| format!("{shape:?}"))
    }
}

/// A gradient in host memory: a [`Tensor`], which is only read, or a [`TensorMut`], which may be written. Its elements
/// have one dtype and any alignment.
#[derive(Clone, Copy, Debug)]
pub struct HostTensor<'a, D> {
    pub(crate) spec: Spec<'a>,
    pub(crate) data: D,
    pub(crate) parameter: Option<&'a Tensor<'a>>,
}

/// A gradient in host memory, read only.
pub type Tensor<'a> = HostTensor<'a, &'a [u8]>;

/// A gradient in host memory that may be written.
pub type TensorMut<'a> = HostTensor<'a, &'a mut [u8]>;

impl<'a> Tensor<'a> {
    /// A view of elements.
    #[must_use]
    pub fn new<T: Element>(data: &'a [T]) -> Self {
        Self::of(T::DTYPE, bytemuck::cast_slice(data))
    }

    /// A view of native-endian elements in bytes, as a mapped file gives them. The bytes may be misaligned.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the length is not a multiple of the element's size.
    pub fn from_bytes(dtype: Dtype, data: &'a [u8]) -> Result<Self, Error> {
        Self::of(dtype, data).whole()
    }
}

impl<'a> TensorMut<'a> {
    /// A view of elements.
    #[must_use]
    pub fn new<T: Element>(data: &'a mut [T]) -> Self {
        Self::of(T::DTYPE, bytemuck::cast_slice_mut(data))
    }

    /// A view of native-endian elements in bytes, as a mapped file gives them. The bytes may be misaligned.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the length is not a multiple of the element's size.
    pub fn from_bytes(dtype: Dtype, data: &'a mut [u8]) -> Result<Self, Error> {
        Self::of(dtype, data).whole()
    }

    /// The same elements, read only.
    #[must_use]
    pub fn as_tensor(&self) -> Tensor<'_> {
        HostTensor { spec: self.spec, data: self.data, parameter: self.parameter }
    }
}

impl<'a, D: Deref<Target = [u8]>> HostTensor<'a, D> {
    fn of(dtype: Dtype, data: D) -> Self {
        Self { spec: TensorSpec::new(dtype, (data.len() / dtype.size()) as u64), data, parameter: None }
    }

    fn whole(self) -> Result<Self, Error> {
        let (bytes, dtype) = (self.data.len(), self.spec.dtype);
        if bytes.is_multiple_of(dtype.size()) {
            Ok(self)
        } else {
            let reason = format!("{bytes} bytes do not hold a whole number of {dtype} elements");
            Err(Error::Tensor { tensor: "the tensor".into(), reason })
        }
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.data.len() / self.spec.dtype.size()
    }

    /// Whether the tensor has no elements, which is allowed everywhere.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The dtype of the elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.spec.dtype
    }

    /// The name, if it was given one.
    #[must_use]
    pub fn name(&self) -> Option<&'a str> {
        self.spec.name
    }

    /// The elements as bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }
}

/// The settings of a tensor, for a type with a `spec` and a `parameter`.
macro_rules! settings {
    ($name:ty, $shape:ty, $parameter:ty) => {
        /// Gives the tensor a name, which errors and reports use.
        #[must_use]
        pub fn named(mut self, name: $name) -> Self {
            self.spec.name = Some(From::from(name));
            self
        }

        /// Gives the tensor its shape, in row-major order. Scopes by unit or example need it. Without it the tensor is
        /// one-dimensional. `&[]` is a scalar.
        ///
        /// # Errors
        /// [`Error::Tensor`] if the shape holds another number of elements.
        pub fn shape(mut self, shape: $shape) -> Result<Self, Error> {
            self.spec.shape = Some(From::from(shape));
            self.spec.check_shape().map(|()| self)
        }

        /// Chooses this tensor's units under [`Scope::Unit`](crate::Scope::Unit), in place of the clip's
        /// [`unit_axis`](crate::Clip::unit_axis), because layers of one model differ in which axis holds their outputs.
        /// Other scopes ignore it.
        #[must_use]
        pub fn unit_axis(mut self, axis: UnitAxis) -> Self {
            self.spec.unit_axis = Some(axis);
            self
        }

        /// Says whether the tensor is a replica of one that another process of a group counts
        /// ([`processes`](crate::processes)). A replica is scaled but not measured, and its non-finite elements go
        /// unnoticed.
        #[must_use]
        pub fn replica(mut self, replica: bool) -> Self {
            self.spec.counted = !replica;
            self
        }

        /// Sets the parameter that the gradient belongs to, for [`Clip::agc`](crate::Clip::agc) and for an optimizer in
        /// GPU memory. The two must have the same shape, and the same name if both have one. Their dtypes may differ.
        #[must_use]
        pub fn parameter(mut self, parameter: $parameter) -> Self {
            self.parameter = Some(From::from(parameter));
            self
        }
    };
}
#[cfg(feature = "gpu")]
pub(crate) use settings;

impl<'a, D> HostTensor<'a, D> {
    settings!(&'a str, &'a [usize], &'a Tensor<'a>);
}

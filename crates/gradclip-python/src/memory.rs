//! Views of the memory of tensors and arrays that Python owns.

use gradclip::{Dtype, Tensor, TensorMut};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::exception;

/// A list of tensors as the Python part describes them: addresses and numbers of elements as native 64-bit integers,
/// dtypes as bytes (0 to 3: float32, float64, float16, bfloat16), and shapes and names if they are wanted.
///
/// The Python part promises, for the time of the call that takes it:
/// - each address is that of so many elements of the dtype, in one allocation that is not freed, because the caller
///   holds the tensor;
/// - those that a call writes may be written.
///
/// As for PyTorch's own operations, no other thread may write to them meanwhile.
#[derive(FromPyObject)]
pub(crate) struct Described<'py>(
    Bound<'py, PyBytes>,
    Bound<'py, PyBytes>,
    Bound<'py, PyBytes>,
    Option<Vec<Vec<usize>>>,
    Option<Vec<String>>,
);

/// A list of tensors, each of which lies within the address space.
pub(crate) struct Memory {
    places: Vec<Place>,
    shapes: Option<Vec<Vec<usize>>>,
    names: Option<Vec<String>>,
}

#[derive(Clone, Copy)]
struct Place {
    address: usize,
    bytes: usize,
    dtype: Dtype,
}

pub(crate) const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];

impl Memory {
    /// The tensors, not yet compared with each other.
    pub(crate) fn of(described: Described<'_>) -> PyResult<Self> {
        let Described(addresses, lengths, dtypes, shapes, names) = described;
        let number = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().ok()?).try_into().ok();
        let numbers = |bytes: &[u8]| bytes.chunks(size_of::<u64>()).map(number).collect::<Option<Vec<usize>>>();
        let unfit = || PyValueError::new_err("the description of the tensors does not fit together");
        let addresses = numbers(addresses.as_bytes()).ok_or_else(unfit)?;
        let lengths = numbers(lengths.as_bytes()).ok_or_else(unfit)?;
        let dtypes = dtypes.as_bytes();
        let count = addresses.len();
        let fits = lengths.len() == count
            && dtypes.len() == count
            && shapes.as_ref().is_none_or(|shapes| shapes.len() == count)
            && names.as_ref().is_none_or(|names| names.len() == count);
        let place = |((address, length), dtype): ((usize, usize), &u8)| {
            let dtype = *DTYPES.get(usize::from(*dtype))?;
            let bytes = length.checked_mul(dtype.size()).filter(|bytes| isize::try_from(*bytes).is_ok())?;
            address.checked_add(bytes)?;
            (bytes == 0 || address != 0).then_some(Place { address, bytes, dtype })
        };
        let places: Option<Vec<_>> = addresses.into_iter().zip(lengths).zip(dtypes).map(place).collect();
        Ok(Self { places: places.filter(|_| fits).ok_or_else(unfit)?, shapes, names })
    }

    /// Checks that none overlaps another, or one of `others`, which may overlap each other.
    fn check_apart(&self, others: &[&Self]) -> PyResult<()> {
        let mut ranges: Vec<_> = self.places.iter().enumerate().map(|(i, place)| (*place, Some(i))).collect();
        ranges.extend(others.iter().flat_map(|memory| &memory.places).map(|place| (*place, None)));
        ranges.retain(|(place, _)| place.bytes > 0);
        ranges.sort_unstable_by_key(|(place, _)| place.address);
        // The range of each kind that ends last, of those that begin before.
        let (mut written, mut read) = ((0, 0), 0);
        for (Place { address, bytes, .. }, own) in ranges {
            let end = address + bytes;
            if written.0 > address {
                let (other, this) = (self.label(written.1), own.map_or("what is only read".into(), |i| self.label(i)));
                return Err(overlap(&other, &this));
            }
            match own {
                Some(i) if read > address => return Err(overlap(&self.label(i), "what is only read")),
                // It ends after every one before, none of which it overlaps.
                Some(i) => written = (end, i),
                None => read = read.max(end),
            }
        }
        Ok(())
    }

    fn label(&self, i: usize) -> String {
        self.names.as_ref().map_or_else(|| format!("tensor {i}"), |names| format!("tensor {:?}", names[i]))
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// How many elements tensor number `i` has.
    pub(crate) fn elements(&self, i: usize) -> usize {
        self.places[i].bytes / self.places[i].dtype.size()
    }

    /// Views that only read.
    pub(crate) fn tensors<'a>(&'a self, py: Python<'_>) -> PyResult<Vec<Tensor<'a>>> {
        let view = |i: usize| {
            let Place { address, bytes, dtype } = self.places[i];
            // SAFETY: by the promise of `Described`:
            // - The range is readable memory of one allocation, of at most isize::MAX bytes and not null (`of`); or
            //   it is empty, and the pointer is dangling and not null.
            // - Any bytes are initialised bytes, which need no alignment.
            // - Nothing writes to it meanwhile: not this call, since what it writes overlaps nothing that it reads
            //   (`tensors_mut`), and no other thread.
            // - It lives for as long as the call, which `self` does not outlive.
            let data = unsafe { std::slice::from_raw_parts(pointer(address, bytes).cast_const(), bytes) };
            self.described(i, Tensor::from_bytes(dtype, data)?, Tensor::named, Tensor::shape)
        };
        (0..self.len()).map(view).collect::<Result<_, _>>().map_err(|error| exception(py, &error))
    }

    pub(crate) fn dtype(&self, i: usize) -> Dtype {
        self.places[i].dtype
    }

    /// Views that may write, beside views of `others` that only read.
    ///
    /// # Errors
    /// `ValueError` if any two share elements.
    pub(crate) fn tensors_mut<'a>(&'a mut self, py: Python<'_>, others: &[&Self]) -> PyResult<Vec<TensorMut<'a>>> {
        let (bytes, this) = self.bytes_mut(others)?;
        let view = |(i, data)| {
            this.described(i, TensorMut::from_bytes(this.places[i].dtype, data)?, TensorMut::named, TensorMut::shape)
        };
        bytes.into_iter().enumerate().map(view).collect::<Result<_, _>>().map_err(|error| exception(py, &error))
    }

    /// The same as bytes, beside the description.
    ///
    /// # Errors
    /// `ValueError` if any two share elements.
    pub(crate) fn bytes_mut<'a>(&'a mut self, others: &[&Self]) -> PyResult<(Vec<&'a mut [u8]>, &'a Self)> {
        self.check_apart(others)?;
        let view = |Place { address, bytes, .. }: &Place| {
            // SAFETY: as above, and:
            // - It may be written, by the promise of `Described`.
            // - It overlaps no other view: `check_apart` has compared all, and `&mut self` allows one set of views at a
            //   time. What is returned beside them reads the description alone.
            unsafe { std::slice::from_raw_parts_mut(pointer(*address, *bytes), *bytes) }
        };
        Ok((self.places.iter().map(view).collect(), self))
    }

    fn described<'a, T>(
        &'a self,
        i: usize,
        mut tensor: T,
        named: impl FnOnce(T, &'a str) -> T,
        shape: impl FnOnce(T, &'a [usize]) -> Result<T, gradclip::Error>,
    ) -> Result<T, gradclip::Error> {
        if let Some(names) = &self.names {
            tensor = named(tensor, &names[i]);
        }
        match &self.shapes {
            Some(shapes) => shape(tensor, &shapes[i]),
            None => Ok(tensor),
        }
    }
}

fn pointer(address: usize, bytes: usize) -> *mut u8 {
    let empty = std::ptr::NonNull::dangling().as_ptr();
    if bytes == 0 { empty } else { std::ptr::with_exposed_provenance_mut(address) }
}

fn overlap(a: &str, b: &str) -> PyErr {
    PyValueError::new_err(format!("{b} shares elements with {a}; nothing was written: give each element once"))
}

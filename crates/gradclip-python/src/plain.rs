//! Describes plain tensors of PyTorch fast, by the table of C functions that DLPack 1.2 defines (`DLPackExchangeAPI`,
//! dlpack.h). Asking each tensor for its properties from Python takes eight times as long, which is most of what a call
//! on many small tensors costs.

use std::ffi::{c_int, c_void};

use gradclip::Dtype;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule, PyList, PyTuple};

use crate::memory::DTYPES;

/// The beginning of `DLPackExchangeAPI`, which is the same in every version 1.
#[repr(C)]
struct Exchange {
    major: u32,
    minor: u32,
    older: *const c_void,
    /// An allocator, and two functions that hand tensors over.
    others: [*const c_void; 3],
    /// Describes a tensor that its caller goes on to hold. Returns 0, or sets an exception.
    describe: Option<unsafe extern "C" fn(*mut c_void, *mut Described) -> c_int>,
}

/// `DLTensor`.
#[repr(C)]
struct Described {
    data: *mut c_void,
    device: (i32, i32),
    dimensions: i32,
    kind: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    /// In elements; null if the elements stand in row-major order.
    strides: *const i64,
    byte_offset: u64,
}

/// `kDLCPU`.
const CPU: i32 = 1;
/// `kDLFloat` and `kDLBfloat`.
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// Addresses, numbers of elements and dtypes, as [`crate::memory::Described`] has them.
type Flat<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// Describes tensors that are all of one of these classes, on the CPU, in row-major order and of a known dtype. None if one
/// is not. Each of the first `alike` must have the shape of the one that stands `alike` places behind it. `exchange` is the
/// table of these classes.
#[pyfunction]
pub(crate) fn plain<'py>(
    py: Python<'py>,
    tensors: &Bound<'py, PyList>,
    classes: &Bound<'py, PyTuple>,
    exchange: &Bound<'py, PyCapsule>,
    alike: usize,
) -> PyResult<Option<Flat<'py>>> {
    let table = exchange.pointer_checked(Some(c"dlpack_exchange_api"))?.cast::<Exchange>();
    // SAFETY: the capsule has the name of DLPack's table, which lives as long as the process. Its header is the same in
    // every version, and in version 1, which `filter` asks for, so are the fields that are read.
    let table = unsafe { table.as_ref() };
    let Some(describe) = table.describe.filter(|_| table.major == 1) else { return Ok(None) };
    let classes: Vec<_> = classes.iter().map(|class| class.as_ptr()).collect();
    let (mut addresses, mut lengths, mut dtypes) = (Vec::new(), Vec::new(), Vec::new());
    // The number of dimensions and then the sizes, one tensor after another.
    let (mut shapes, mut compared) = (Vec::<i64>::new(), 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if !classes.contains(&tensor.get_type().as_ptr()) {
            return Ok(None);
        }
        let mut described = Described {
            data: std::ptr::null_mut(),
            device: (0, 0),
            dimensions: 0,
            kind: 0,
            bits: 0,
            lanes: 0,
            shape: std::ptr::null(),
            strides: std::ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: the tensor is of a class whose table this is, and the interpreter is attached. `described` has room for
        // a `DLTensor`.
        if unsafe { describe(tensor.as_ptr().cast(), &raw mut described) } != 0 {
            // Sparse, or of a dtype that DLPack does not know.
            PyErr::take(py);
            return Ok(None);
        }
        let (Some(dtype), Some(length)) = (described.dtype(), described.contiguous_length()) else { return Ok(None) };
        if i < alike {
            shapes.push(described.dimensions.into());
            shapes.extend(described.shape());
        } else if i - alike < alike {
            let own = described.shape();
            let (dimensions, others) = (shapes[compared], &shapes[compared + 1..]);
            if dimensions != i64::from(described.dimensions) || !others.starts_with(own) {
                return Ok(None);
            }
            compared += 1 + own.len();
        }
        // A view that negates what is stored, as that of an imaginary part can; of more elements it has gaps.
        if length == 1 && tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            return Ok(None);
        }
        let code = DTYPES.iter().position(|known| *known == dtype).unwrap_or_default();
        addresses.extend((described.data.expose_provenance() as u64 + described.byte_offset).to_ne_bytes());
        lengths.extend(length.to_ne_bytes());
        dtypes.push(code as u8);
    }
    Ok(Some((PyBytes::new(py, &addresses), PyBytes::new(py, &lengths), PyBytes::new(py, &dtypes))))
}

impl Described {
    fn dtype(&self) -> Option<Dtype> {
        match (self.kind, self.bits, self.lanes) {
            _ if self.device.0 != CPU => None,
            (FLOAT, 16, 1) => Some(Dtype::F16),
            (FLOAT, 32, 1) => Some(Dtype::F32),
            (FLOAT, 64, 1) => Some(Dtype::F64),
            (BFLOAT, 16, 1) => Some(Dtype::BF16),
            _ => None,
        }
    }

    fn shape(&self) -> &[i64] {
        self.numbers(self.shape)
    }

    /// As many numbers as there are dimensions; none where there is no pointer.
    fn numbers(&self, first: *const i64) -> &[i64] {
        let count = if first.is_null() { 0 } else { usize::try_from(self.dimensions).unwrap_or(0) };
        // SAFETY: the shape, and the strides unless they are null, have so many numbers, which belong to the tensor that
        // the caller holds. A slice of none needs a pointer that is not null, too.
        unsafe { std::slice::from_raw_parts(if count == 0 { std::ptr::dangling() } else { first }, count) }
    }

    /// The number of elements, if they stand in row-major order without gaps.
    fn contiguous_length(&self) -> Option<u64> {
        let (mut length, mut gap) = (1_i64, false);
        let (shape, strides) = (self.shape(), self.numbers(self.strides));
        for (i, size) in shape.iter().enumerate().rev() {
            gap |= *size != 1 && strides.get(i).is_some_and(|stride| *stride != length);
            length = length.checked_mul(*size)?;
        }
        if gap && length != 0 { None } else { u64::try_from(length).ok() }
    }
}

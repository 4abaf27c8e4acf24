//! The library's errors as Python's exceptions.

use gradclip::{Error, NonFiniteElements};
use pyo3::create_exception;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    gradclip,
    NonFiniteError,
    PyRuntimeError,
    "Gradients are NaN or infinite, under the policy \"error\". Nothing was written.\n\n`non_finite` says how many, and \
     where the first is."
);
create_exception!(gradclip, SkippedError, PyRuntimeError, "Too many steps in a row were skipped. Nothing was written.");
create_exception!(
    gradclip,
    DeviceError,
    PyRuntimeError,
    "The device cannot do this: a GPU that is missing, lost or too small. The gradients are as they were."
);

/// What the library calls its settings, and what they are called here.
const NAMES: [(&str, &str); 9] = [
    ("clip_factor", "agc"),
    ("the clip range", "clip_range"),
    ("Clip::norm and Clip::agc", "max_norm and agc"),
    ("Clip::norm", "max_norm"),
    ("Clip::agc", "agc"),
    ("Scope::Unit", "scope=\"unit\""),
    ("Scope::ExampleTensor", "scope=\"example-tensor\""),
    (" (another non-finite policy would go on: propagate, skip, zero or drop)", ""),
    ("(Clipper::cpu, --backend cpu)", "(backend=\"cpu\")"),
];

/// The exception for an error.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let mut message = error.to_string();
    for (theirs, ours) in NAMES {
        message = message.replace(theirs, ours);
    }
    match error {
        Error::NonFinite(found) => non_finite(py, found, message),
        Error::SkippedInARow { .. } => SkippedError::new_err(message),
        Error::OutOfMemory(_) => PyMemoryError::new_err(message),
        Error::NoAdapter(_) | Error::Limit(_) | Error::Device(_) | Error::DeviceLost(_) => {
            DeviceError::new_err(message)
        }
        _ => PyValueError::new_err(message),
    }
}

/// The attribute `raw` holds what the Python part makes `non_finite` of.
fn non_finite(py: Python<'_>, found: &NonFiniteElements, message: String) -> PyErr {
    let error = NonFiniteError::new_err(
        message + "; another policy goes on: non_finite=\"propagate\", \"skip\", \"zero\" or \"drop\"",
    );
    let raw = (found.count, found.tensor, found.index, found.name.clone());
    match error.value(py).setattr("raw", raw) {
        Ok(()) => error,
        Err(other) => other,
    }
}

/// The error of an argument with a value that is none of these.
pub(crate) fn unknown(argument: &str, value: &str, known: &[&str]) -> PyErr {
    PyValueError::new_err(format!("{argument} is {value:?}; it must be one of {}", known.join(", ")))
}

//! The Rust part of the Python package `gradclip`, which imports it as `gradclip._gradclip`.
//!
//! The Python part (`python/gradclip/`) looks at tensors and arrays, and hands their addresses, lengths and dtypes over
//! in one call. [`plain`] does the same for plain tensors of PyTorch. [`memory`] makes views of what is handed over, [`clip`] has the descriptions, [`call`] the calls, [`sharded`] those of
//! several processes, [`optimizer`] the steps, [`thresholds`] the adaptive thresholds, [`report`] what is told, and
//! [`error`] the exceptions. All work is done without the GIL.

mod call;
mod clip;
#[cfg(feature = "gpu")]
mod device;
mod error;
mod memory;
mod optimizer;
mod plain;
mod report;
mod sharded;
mod thresholds;

use std::ffi::OsString;

use pyo3::prelude::*;

/// What the package is made of.
#[pymodule(gil_used = false)]
mod _gradclip {
    use super::*;

    #[pymodule_export]
    use super::call::{apply, measure, sum_examples, verify};
    #[pymodule_export]
    use super::clip::Clip;
    #[pymodule_export]
    use super::error::{DeviceError, NonFiniteError, SkippedError};
    #[pymodule_export]
    use super::optimizer::{Optimizer, step};
    #[pymodule_export]
    use super::plain::plain;
    #[pymodule_export]
    use super::sharded::{finish, partial};
    #[pymodule_export]
    use super::thresholds::{AdaGC, AutoClip, ZClip};

    /// The program with these arguments, the first of them its own name. Returns its exit code.
    #[pyfunction]
    fn main(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
        py.detach(|| gradclip_cli::main_with(arguments))
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.py().get_type::<NonFiniteError>().setattr("non_finite", module.py().None())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

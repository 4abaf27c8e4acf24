//! Adaptive thresholds, with their states.

use std::sync::{Mutex, MutexGuard, PoisonError};

use gradclip::Threshold;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::exception;

/// A threshold that calls may use without the GIL. Such a call holds the lock.
pub(crate) trait Shared: Sync {
    fn with(&self, use_it: &mut dyn FnMut(&mut dyn Threshold));
}

/// Calls `use_it` with the threshold, without the GIL.
pub(crate) fn with_threshold<R: Send>(
    py: Python<'_>,
    threshold: &Bound<'_, PyAny>,
    use_it: impl FnOnce(&mut dyn Threshold) -> R + Send,
) -> PyResult<R> {
    let shared: &dyn Shared = if let Ok(threshold) = threshold.cast::<ZClip>() {
        threshold.get()
    } else if let Ok(threshold) = threshold.cast::<AutoClip>() {
        threshold.get()
    } else if let Ok(threshold) = threshold.cast::<AdaGC>() {
        threshold.get()
    } else {
        return Err(PyTypeError::new_err("threshold must be a ZClip, an AutoClip or an AdaGC"));
    };
    let result = py.detach(|| {
        let (mut use_it, mut result) = (Some(use_it), None);
        shared.with(&mut |threshold| result = use_it.take().map(|use_it| use_it(threshold)));
        result
    });
    result.ok_or_else(|| PyValueError::new_err("the threshold was not used"))
}

/// A class for a threshold: its settings, with their types and defaults, and its page.
macro_rules! threshold {
    ($name:ident: $of:ty { $($setting:ident: $type:ty),* } $(#[$page:meta])*) => {
        $(#[$page])*
        #[pyclass(frozen, module = "gradclip")]
        pub(crate) struct $name(Mutex<$of>);

        impl $name {
            fn lock(&self) -> MutexGuard<'_, $of> {
                self.0.lock().unwrap_or_else(PoisonError::into_inner)
            }

            fn saved(&self) -> PyResult<String> {
                serde_json::to_string(&*self.lock()).map_err(|error| PyValueError::new_err(error.to_string()))
            }

            fn restored(state: &str) -> PyResult<$of> {
                let damaged = |error: serde_json::Error| PyValueError::new_err(format!("the state of {}: {error}", stringify!($name)));
                serde_json::from_str(state).map_err(damaged)
            }
        }

        impl Shared for $name {
            fn with(&self, use_it: &mut dyn FnMut(&mut dyn Threshold)) {
                use_it(&mut *self.lock());
            }
        }

        #[pymethods]
        impl $name {
            #[new]
            #[pyo3(signature = (*, $($setting=None),*))]
            fn new(py: Python<'_>, $($setting: Option<$type>),*) -> PyResult<Self> {
                let mut threshold = <$of>::new();
                $(if let Some(value) = $setting { threshold = threshold.$setting(value); })*
                threshold.clone().bind(&["the norm".into()]).map_err(|error| exception(py, &error))?;
                Ok(Self(Mutex::new(threshold)))
            }

            /// The settings and the state, as JSON that any later version of this form reads.
            fn state_dict(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
                Ok(py.import("json")?.call_method1("loads", (self.saved()?,))?.unbind())
            }

            /// Takes settings and state from `state_dict()`. Damaged ones are a ValueError, and change nothing.
            fn load_state_dict(&self, state: &Bound<'_, PyAny>) -> PyResult<()> {
                let text: String = state.py().import("json")?.call_method1("dumps", (state,))?.extract()?;
                *self.lock() = Self::restored(&text)?;
                Ok(())
            }

            fn __getstate__(&self) -> PyResult<String> {
                self.saved()
            }

            fn __setstate__(&self, state: &str) -> PyResult<()> {
                *self.lock() = Self::restored(state)?;
                Ok(())
            }

            fn __repr__(&self) -> String {
                let fields = format!("{:?}", *self.lock());
                let fields = fields.split_once(" { ").map_or("", |(_, fields)| fields.trim_end_matches(" }"));
                format!("{}({})", stringify!($name), fields.replace(": ", "="))
            }

            fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
                let Ok(other) = other.cast::<Self>() else { return false };
                let other = other.get();
                // One lock at a time.
                let copy = other.lock().clone();
                *self.lock() == copy
            }
        }
    };
}

threshold! {
    ZClip: gradclip::ZClip { alpha: f64, z_threshold: f64, warm_up: u32, skip_above_z: f64 }
    /// Clips a global norm that stands out from the mean of the norms before it, and optionally skips the step (Kumar,
    /// Owen, Chowdhury, Gura 2025, "ZClip", arXiv 2504.02507).
    ///
    /// alpha (0.97): the part of mean and variance that a step keeps. z_threshold (2.5): how many standard deviations
    /// above the mean a norm may lie. warm_up (25): how many steps are only measured. skip_above_z (infinity): how many
    /// standard deviations above the mean a norm may lie before its step is skipped.
}

threshold! {
    AutoClip: gradclip::AutoClip { percentile: f64, history: usize, warm_up: u32 }
    /// Clips to a percentile of the norms before (Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip").
    ///
    /// percentile (10): which. history: how many norms are kept. warm_up: how many steps are only measured.
}

threshold! {
    AdaGC: gradclip::AdaGc { lambda_rel: f64, lambda_abs: f64, beta: f64, warm_up: u32 }
    /// Clips each tensor by the running mean of its own clipped norms (arXiv 2502.11034). It needs scope="tensor".
    ///
    /// lambda_rel: how many times the mean a norm may be. lambda_abs: the threshold of the global norm during the warm-up.
    /// beta: the part of a mean that a step keeps. warm_up: how many steps that is.
}

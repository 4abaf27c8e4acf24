//! Descriptions of clips.

use gradclip::{Budget, NonFinite, NormType, Scope, UnitAxis};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::error::{exception, unknown};

/// A description of a clip, checked.
#[pyclass(frozen, module = "gradclip._gradclip")]
pub(crate) struct Clip(pub(crate) gradclip::Clip);

#[pymethods]
impl Clip {
    /// `mode` is one of `norm`, `rms`, `average_norm`, `agc` and `value`; only `value` uses `least`.
    #[new]
    #[pyo3(signature = (mode, threshold, least=0.0, *, norm_type=None, scope=None, unit_axis=None, budget=None, eps=None,
        agc_eps=None, grad_scale=1.0, non_finite=None, skip_above=None, report_norm=false))]
    #[expect(clippy::too_many_arguments, reason = "each is a setting with a name")]
    fn new(
        py: Python<'_>,
        mode: &str,
        threshold: f64,
        least: f64,
        norm_type: Option<f64>,
        scope: Option<&str>,
        unit_axis: Option<&Bound<'_, PyAny>>,
        budget: Option<&str>,
        eps: Option<f64>,
        agc_eps: Option<f64>,
        grad_scale: f64,
        non_finite: Option<&str>,
        skip_above: Option<f64>,
        report_norm: bool,
    ) -> PyResult<Self> {
        let mut clip = match mode {
            "norm" => gradclip::Clip::norm(threshold),
            "rms" => gradclip::Clip::rms(threshold),
            "average_norm" => gradclip::Clip::average_norm(threshold),
            "agc" => gradclip::Clip::agc(threshold),
            "value" => gradclip::Clip::range(least, threshold),
            other => return Err(unknown("mode", other, &["norm", "rms", "average_norm", "agc", "value"])),
        };
        clip.norm_type = norm_type.map_or(clip.norm_type, NormType::p);
        if let Some(text) = scope {
            clip.scope = one_of("scope", text, &SCOPES)?;
        }
        clip.unit_axis = unit_axis.map(axes).transpose()?;
        if let Some(text) = budget {
            clip.budget = one_of("budget", text, &BUDGETS)?;
        }
        clip.eps = eps.or(clip.eps);
        clip.agc_eps = agc_eps.or(clip.agc_eps);
        clip.grad_scale = grad_scale;
        if let Some(text) = non_finite {
            clip.non_finite = one_of("non_finite", text, &POLICIES)?;
        }
        clip.skip_above = skip_above.unwrap_or(clip.skip_above);
        clip.report_norm = report_norm;
        clip.check().map_err(|error| exception(py, &error))?;
        Ok(Self(clip))
    }

    /// One line, without the settings that have their defaults.
    fn __repr__(&self) -> String {
        self.0.to_string()
    }
}

const SCOPES: [Scope; 5] = [Scope::Global, Scope::Tensor, Scope::Unit, Scope::Example, Scope::ExampleTensor];
const BUDGETS: [Budget; 3] = [Budget::Each, Budget::Uniform, Budget::Sized];
const POLICIES: [NonFinite; 5] =
    [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];

fn one_of<T: Copy + ToString>(argument: &str, text: &str, values: &[T]) -> PyResult<T> {
    let names: Vec<_> = values.iter().map(ToString::to_string).collect();
    match names.iter().position(|name| name == text) {
        Some(i) => Ok(values[i]),
        None => Err(unknown(argument, text, &names.iter().map(String::as_str).collect::<Vec<_>>())),
    }
}

/// `"first"`, `"last"`, `"optax"`, an axis, several axes, or `("over", axes)`.
fn axes(given: &Bound<'_, PyAny>) -> PyResult<UnitAxis> {
    if let Ok(text) = given.extract::<String>() {
        return match &*text {
            "first" => Ok(UnitAxis::First),
            "last" => Ok(UnitAxis::Last),
            "optax" => Ok(UnitAxis::Optax),
            other => Err(unknown("unit_axis", other, &["first", "last", "optax", "an axis", "axes"])),
        };
    }
    let list = |given: &Bound<'_, PyAny>| match given.extract::<isize>() {
        Ok(axis) => Ok(vec![axis]),
        Err(_) => given.extract::<Vec<isize>>(),
    };
    if let Ok((over, given)) = given.extract::<(String, Bound<'_, PyAny>)>()
        && over == "over"
    {
        return Ok(UnitAxis::over(&list(&given)?));
    }
    let message = "unit_axis must be \"first\", \"last\", \"optax\", an axis, axes, or (\"over\", axes)";
    list(given).map(|axes| UnitAxis::axes(&axes)).map_err(|_| PyTypeError::new_err(message))
}

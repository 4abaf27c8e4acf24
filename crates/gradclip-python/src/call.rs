//! The calls: apply, measure, verify, sum.

use gradclip::{Clip, ClipReport, Clipper, Error, Mode, NonFinite, NonFiniteElements, Scope, Tensor, TensorMut};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::clip;
use crate::error::{exception, unknown};
use crate::memory::{Described, Memory};
use crate::report::{Raw, raw};
use crate::thresholds::with_threshold;

/// A backend, by its name.
enum Backend {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu(Option<String>),
}

impl Backend {
    fn named(backend: &str, adapter: Option<&str>) -> PyResult<Self> {
        match (backend, adapter) {
            ("cpu" | "auto", None) => Ok(Self::Cpu),
            ("cpu" | "auto", Some(_)) => Err(PyValueError::new_err("adapter names a GPU; it needs backend=\"gpu\"")),
            #[cfg(feature = "gpu")]
            ("gpu", _) => Ok(Self::Gpu(adapter.map(str::to_owned))),
            (other, _) => Err(unknown("backend", other, &["auto", "cpu", "gpu"])),
        }
    }

    fn clipper(&self) -> Result<Clipper, Error> {
        match self {
            Self::Cpu => Ok(Clipper::cpu()),
            #[cfg(feature = "gpu")]
            Self::Gpu(name) => Ok(Clipper::gpu(crate::device::gpu(name.as_deref())?)),
        }
    }
}

/// Clips in place, each tensor by the clip of its group. Returns a report for each group, and which tensors were
/// written: their numbers, or None for all.
#[pyfunction]
#[pyo3(signature = (clips, tensors, *, groups=None, params=None, threshold=None, norm=None, backend="cpu", adapter=None))]
#[expect(clippy::too_many_arguments, reason = "each has a name")]
pub(crate) fn apply<'py>(
    py: Python<'py>,
    clips: Vec<PyRef<'py, clip::Clip>>,
    tensors: Described<'py>,
    groups: Option<Vec<usize>>,
    params: Option<Described<'py>>,
    threshold: Option<&Bound<'py, PyAny>>,
    norm: Option<f64>,
    backend: &str,
    adapter: Option<&str>,
) -> PyResult<(Vec<Raw<'py>>, Option<Vec<usize>>)> {
    let clips: Vec<_> = clips.into_iter().map(|clip| clip.0).collect();
    let backend = Backend::named(backend, adapter)?;
    let params = params.map(Memory::of).transpose()?;
    let mut memory = Memory::of(tensors)?;
    let empty: Vec<_> = (0..memory.len()).map(|i| memory.elements(i) == 0).collect();
    if groups.as_ref().is_some_and(|groups| groups.len() != empty.len() || groups.iter().any(|i| *i >= clips.len())) {
        return Err(PyValueError::new_err("the groups do not fit the tensors"));
    }
    let parameters = params.as_ref().map(|params| params.tensors(py)).transpose()?;
    let mut tensors = memory.tensors_mut(py, &params.iter().collect::<Vec<_>>())?;
    if let Some(parameters) = &parameters {
        tensors = tensors.into_iter().zip(parameters).map(|(tensor, parameter)| tensor.parameter(parameter)).collect();
    }
    let result = match threshold {
        Some(threshold) => with_threshold(py, threshold, |threshold| {
            let report = backend.clipper()?.apply_adaptive(&clips[0], threshold, &mut tensors)?;
            Ok(Clipped::of_group(&clips[0], report, &(0..tensors.len()).collect::<Vec<_>>()))
        })?,
        None => py.detach(|| run(&backend.clipper()?, &clips, groups, norm, tensors)),
    };
    let Clipped { reports, mut written } = result.map_err(|error| exception(py, &error))?;
    written.retain(|i| !empty[*i]);
    let all = written.len() == empty.iter().filter(|empty| !**empty).count();
    Ok((reports.iter().map(|report| raw(py, report)).collect(), (!all).then_some(written)))
}

/// What was done: a report for each group, and the numbers of the tensors that were written.
struct Clipped {
    reports: Vec<ClipReport>,
    written: Vec<usize>,
}

impl Clipped {
    /// Of one group, which holds the tensors of these numbers.
    fn of_group(clip: &Clip, mut report: ClipReport, numbers: &[usize]) -> Self {
        let written =
            numbers.iter().enumerate().filter(|(of, _)| writes(clip, &report, *of)).map(|(_, i)| *i).collect();
        let places = report.segments.iter_mut().filter_map(|segment| segment.tensor.as_mut());
        let found = report.non_finite.iter_mut().map(|found| &mut found.tensor);
        places.chain(found).for_each(|tensor| *tensor = numbers[*tensor]);
        Self { reports: vec![report], written }
    }
}

/// Clips tensors, each by the clip of its group; without groups there is one clip, of all.
fn run(
    clipper: &Clipper,
    clips: &[Clip],
    groups: Option<Vec<usize>>,
    norm: Option<f64>,
    mut tensors: Vec<TensorMut<'_>>,
) -> Result<Clipped, Error> {
    if let ([clip], Some(norm)) = (clips, norm) {
        let report = clipper.scale(clip, &[norm], &mut tensors)?;
        return Ok(Clipped::of_group(clip, report, &(0..tensors.len()).collect::<Vec<_>>()));
    }
    // Each tensor of a value clip is a group by itself, so that its report tells whether it was written.
    let apart = tensors.len() > 1 && groups.is_none() && matches!(clips, [Clip { mode: Mode::Value { .. }, .. }]);
    let mut clip = clips[0];
    if apart && matches!(clip.non_finite, NonFinite::Error | NonFinite::Skip | NonFinite::Zero) {
        // One bad element decides about all tensors.
        let views: Vec<_> = tensors.iter().map(TensorMut::as_tensor).collect();
        if clipper.measure(&clip, &views)?.has_non_finite() {
            let report = clipper.apply(&clip, &mut tensors)?;
            return Ok(Clipped::of_group(&clip, report, &(0..tensors.len()).collect::<Vec<_>>()));
        }
        clip = clip.non_finite(NonFinite::Propagate);
    }
    let (clips, groups) = if apart {
        (vec![clip; tensors.len()], (0..tensors.len()).collect())
    } else {
        (clips.to_vec(), groups.unwrap_or_else(|| vec![0; tensors.len()]))
    };
    let mut divided: Vec<_> = clips.iter().map(|clip| (*clip, Vec::new())).collect();
    let mut numbers = vec![Vec::new(); clips.len()];
    for (i, (tensor, group)) in tensors.into_iter().zip(groups).enumerate() {
        divided[group].1.push(tensor);
        numbers[group].push(i);
    }
    let mut views: Vec<_> = divided.iter_mut().map(|(clip, group)| (*clip, &mut group[..])).collect();
    let reports = clipper.apply_groups(&mut views)?;
    let mut all = Clipped { reports: Vec::new(), written: Vec::new() };
    for ((clip, report), numbers) in clips.iter().zip(reports).zip(&numbers) {
        let Clipped { reports, written } = Clipped::of_group(clip, report, numbers);
        all.reports.extend(reports);
        all.written.extend(written);
    }
    if apart {
        all.reports = together(all.reports).into_iter().collect();
    }
    Ok(all)
}

/// Whether tensor number `of` of a group was written.
pub(crate) fn writes(clip: &Clip, report: &ClipReport, of: usize) -> bool {
    if report.skipped.is_some() {
        return false;
    }
    // Under these policies an element may have become 0 while the coefficient stayed 1.
    let cleaned = report.has_non_finite() && matches!(clip.non_finite, NonFinite::Zero | NonFinite::Drop);
    if clip.grad_scale != 1.0 || cleaned {
        return true;
    }
    match clip.scope {
        Scope::Global => report.clipped,
        Scope::Example => report.segments.iter().any(|segment| segment.clipped),
        _ => {
            let from = report.segments.partition_point(|segment| segment.tensor.is_some_and(|tensor| tensor < of));
            let own = report.segments[from..].iter().take_while(|segment| segment.tensor == Some(of));
            own.into_iter().any(|segment| segment.clipped)
        }
    }
}

/// The report on all tensors, from one for each.
fn together(reports: Vec<ClipReport>) -> Option<ClipReport> {
    reports.into_iter().reduce(|mut all, report| {
        // Beside a value clip it is L2, or NaN.
        let bad = all.total_norm.is_nan() || report.total_norm.is_nan();
        all.total_norm = if bad { f64::NAN } else { all.total_norm.hypot(report.total_norm) };
        all.clipped |= report.clipped;
        all.elements += report.elements;
        if let (Some(all), Some(lost)) = (&mut all.lost, report.lost) {
            all.zero += lost.zero;
            all.infinite += lost.infinite;
        }
        all.non_finite = merged(all.non_finite.take(), report.non_finite);
        all
    })
}

/// The non-finite elements of two sets of tensors, with the first of both.
pub(crate) fn merged(a: Option<NonFiniteElements>, b: Option<NonFiniteElements>) -> Option<NonFiniteElements> {
    match (a, b) {
        (Some(a), Some(b)) => {
            let count = a.count + b.count;
            let mut first = if (a.tensor, a.index) <= (b.tensor, b.index) { a } else { b };
            first.count = count;
            Some(first)
        }
        (a, b) => a.or(b),
    }
}

/// Measures, and writes nothing.
#[pyfunction]
#[pyo3(signature = (clip, tensors, *, params=None, backend="cpu", adapter=None))]
pub(crate) fn measure<'py>(
    py: Python<'py>,
    clip: &clip::Clip,
    tensors: Described<'py>,
    params: Option<Described<'py>>,
    backend: &str,
    adapter: Option<&str>,
) -> PyResult<Raw<'py>> {
    let (clip, backend) = (clip.0, Backend::named(backend, adapter)?);
    let (memory, params) = (Memory::of(tensors)?, params.map(Memory::of).transpose()?);
    let parameters = params.as_ref().map(|params| params.tensors(py)).transpose()?;
    let tensors = with_parameters(memory.tensors(py)?, parameters.as_deref());
    let report = py.detach(|| backend.clipper()?.measure(&clip, &tensors));
    Ok(raw(py, &report.map_err(|error| exception(py, &error))?))
}

/// The tensors, each with its parameter if there are any.
fn with_parameters<'a>(tensors: Vec<Tensor<'a>>, parameters: Option<&'a [Tensor<'a>]>) -> Vec<Tensor<'a>> {
    match parameters {
        Some(parameters) => tensors.into_iter().zip(parameters).map(|(tensor, of)| tensor.parameter(of)).collect(),
        None => tensors,
    }
}

/// Writes the sums over examples, each clipped.
#[pyfunction]
#[pyo3(signature = (clip, tensors, sums, *, backend="cpu", adapter=None))]
pub(crate) fn sum_examples<'py>(
    py: Python<'py>,
    clip: &clip::Clip,
    tensors: Described<'py>,
    sums: Described<'py>,
    backend: &str,
    adapter: Option<&str>,
) -> PyResult<Raw<'py>> {
    let (clip, backend) = (clip.0, Backend::named(backend, adapter)?);
    let memory = Memory::of(tensors)?;
    let mut sums = Memory::of(sums)?;
    let (tensors, mut sums) = (memory.tensors(py)?, sums.tensors_mut(py, &[&memory])?);
    let report = py.detach(|| backend.clipper()?.sum_examples(&clip, &tensors, &mut sums));
    Ok(raw(py, &report.map_err(|error| exception(py, &error))?))
}

/// How a clip on the GPU compares with the same on the CPU: whether they agree, the norm's error and what is tolerated,
/// whether they decide alike, the worst distance in units of the last place, the first mismatch (tensor, index, CPU's
/// value, GPU's value, distance), and how many elements were compared.
type Compared = (bool, f64, f64, bool, u64, Option<(usize, u64, f64, f64, u64)>, u64);

/// Clips copies on the GPU and on the CPU, and compares.
#[pyfunction]
#[pyo3(signature = (clip, tensors, *, params=None, adapter=None))]
#[cfg_attr(not(feature = "gpu"), expect(unused_variables, clippy::needless_pass_by_value))]
pub(crate) fn verify(
    py: Python<'_>,
    clip: &clip::Clip,
    tensors: Described<'_>,
    params: Option<Described<'_>>,
    adapter: Option<&str>,
) -> PyResult<Compared> {
    #[cfg(not(feature = "gpu"))]
    return Err(crate::error::DeviceError::new_err("this package was built without GPU support"));
    #[cfg(feature = "gpu")]
    {
        let clip = clip.0;
        let (memory, params) = (Memory::of(tensors)?, params.map(Memory::of).transpose()?);
        let parameters = params.as_ref().map(|params| params.tensors(py)).transpose()?;
        let tensors = with_parameters(memory.tensors(py)?, parameters.as_deref());
        let found = py.detach(|| gradclip::verify(&clip, &tensors, &crate::device::gpu(adapter)?).wait());
        let found = found.map_err(|error| exception(py, &error))?;
        let mismatch = found.first_mismatch.as_ref().map(|m| (m.tensor, m.index, m.cpu, m.gpu, m.ulps));
        let gradclip::Verification { norm_error, norm_tolerance, same_decision, worst_ulps, elements, .. } = found;
        Ok((found.agrees(), norm_error, norm_tolerance, same_decision, worst_ulps, mismatch, elements))
    }
}

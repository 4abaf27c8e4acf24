//! One norm of tensors that are spread over processes. The Python part sends the partials, each to every process.

use gradclip::{Clip, Clipper, Error, NonFinite, NonFiniteElements, NormAccumulator};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::call::writes;
use crate::clip;
use crate::error::exception;
use crate::memory::{Described, Memory};
use crate::report::{Raw, raw};

/// Measures the tensors of this process. Those that are not `counted` are replicas of another's.
#[pyfunction]
pub(crate) fn partial<'py>(
    py: Python<'py>,
    clip: &clip::Clip,
    tensors: Described<'py>,
    counted: Vec<bool>,
) -> PyResult<Bound<'py, PyBytes>> {
    let (clip, memory) = (clip.0, Memory::of(tensors)?);
    if counted.len() != memory.len() {
        return Err(PyValueError::new_err("counted does not fit the tensors"));
    }
    let tensors = memory.tensors(py)?.into_iter().zip(counted).map(|(tensor, counted)| tensor.replica(!counted));
    let tensors: Vec<_> = tensors.collect();
    let bytes = py.detach(|| {
        let mut running = NormAccumulator::new(&clip)?;
        Clipper::cpu().accumulate(&mut running, &tensors)?;
        running.to_bytes()
    });
    Ok(PyBytes::new(py, &bytes.map_err(|error| exception(py, &error))?))
}

/// What [`finish`] returns: the report, which tensors were written (None for all), and the rank and the name of the first
/// tensor that is not finite.
type Finished<'py> = (Raw<'py>, Option<Vec<usize>>, Option<usize>, Option<String>);

/// Clips the tensors of this process by the partials of all, in the order of their ranks; or only reports, without
/// tensors.
#[pyfunction]
pub(crate) fn finish<'py>(
    py: Python<'py>,
    clip: &clip::Clip,
    partials: Vec<Vec<u8>>,
    tensors: Option<Described<'py>>,
) -> PyResult<Finished<'py>> {
    let clip = clip.0;
    let fail = |error: &Error| exception(py, error);
    let mut all = NormAccumulator::new(&clip).map_err(|error| fail(&error))?;
    let mut bad = None;
    for (rank, bytes) in partials.into_iter().enumerate() {
        let of_rank = |error: Error| PyValueError::new_err(format!("rank {rank} of the group: {error}"));
        let one = NormAccumulator::from_bytes(&clip, &bytes).map_err(of_rank)?;
        bad = bad.or_else(|| non_finite(&clip, &one).map(|found| (rank, found)));
        all.merge(&one).map_err(|error| fail(&error))?;
    }
    let mut memory = tensors.map(Memory::of).transpose()?;
    let empty: Vec<_> = memory.iter().flat_map(|memory| (0..memory.len()).map(|i| memory.elements(i) == 0)).collect();
    let mut views = memory.as_mut().map(|memory| memory.tensors_mut(py, &[])).transpose()?;
    let result = py.detach(|| match &mut views {
        Some(views) => Clipper::cpu().finish(&all, views),
        None => all.report(),
    });
    let mut report = match (result, &bad) {
        (Ok(report), _) => report,
        (Err(Error::NonFinite(found)), Some((rank, first))) => {
            let error = fail(&Error::NonFinite(found.clone()));
            error.value(py).setattr("raw", (found.count, first.tensor, first.index, first.name.clone(), *rank))?;
            return Err(error);
        }
        (Err(error), _) => return Err(fail(&error)),
    };
    if let (Some(found), Some((_, first))) = (&mut report.non_finite, &bad) {
        found.tensor = first.tensor;
    }
    // All tensors share one coefficient.
    let written = match writes(&clip, &report, 0) {
        false => Some(Vec::new()),
        true => empty.contains(&true).then(|| (0..empty.len()).filter(|i| !empty[*i]).collect()),
    };
    let (rank, name) = bad.map_or((None, None), |(rank, first)| (Some(rank), first.name));
    Ok((raw(py, &report), written, rank, name))
}

/// The non-finite elements of a partial.
fn non_finite(clip: &Clip, partial: &NormAccumulator) -> Option<NonFiniteElements> {
    match partial.report() {
        Ok(report) => report.non_finite,
        Err(Error::NonFinite(found)) if clip.non_finite == NonFinite::Error => Some(found),
        Err(_) => None,
    }
}

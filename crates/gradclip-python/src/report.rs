//! What a clip reports, as plain values. `python/gradclip/_report.py` makes the reports of them.

use gradclip::{ClipReport, Skipped};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Of all segments: tensors and indices as native signed 64-bit integers (-1: none), norms and coefficients as native
/// float64, and a byte that says whether it was clipped.
pub(crate) type RawSegments<'py> =
    (Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// Norm, coefficient, whether it clipped, number of elements; count, tensor and index of non-finite elements; how many
/// became 0 and infinite by rounding; why the step is skipped; segments.
pub(crate) type Raw<'py> = (
    f64,
    f64,
    bool,
    u64,
    Option<(u64, usize, u64)>,
    Option<(u64, u64)>,
    Option<&'static str>,
    Option<RawSegments<'py>>,
);

pub(crate) fn raw<'py>(py: Python<'py>, report: &ClipReport) -> Raw<'py> {
    let found = report.non_finite.as_ref().map(|found| (found.count, found.tensor, found.index));
    let skipped = report.skipped.map(|why| match why {
        Skipped::Above => "above",
        _ => "non-finite",
    });
    let segments = &report.segments;
    let integers = |values: &mut dyn Iterator<Item = i64>| {
        PyBytes::new(py, &values.flat_map(i64::to_ne_bytes).collect::<Vec<_>>())
    };
    let floats = |values: &mut dyn Iterator<Item = f64>| {
        PyBytes::new(py, &values.flat_map(f64::to_ne_bytes).collect::<Vec<_>>())
    };
    let number = |value: Option<u64>| value.and_then(|value| i64::try_from(value).ok()).unwrap_or(-1);
    let segments = (!segments.is_empty()).then(|| {
        (
            integers(&mut segments.iter().map(|s| number(s.tensor.map(|tensor| tensor as u64)))),
            integers(&mut segments.iter().map(|s| number(s.index))),
            floats(&mut segments.iter().map(|s| s.norm)),
            floats(&mut segments.iter().map(|s| s.clip_coef)),
            PyBytes::new(py, &segments.iter().map(|s| u8::from(s.clipped)).collect::<Vec<_>>()),
        )
    });
    (
        report.total_norm,
        report.clip_coef,
        report.clipped,
        report.elements,
        found,
        report.lost.map(|lost| (lost.zero, lost.infinite)),
        skipped,
        segments,
    )
}

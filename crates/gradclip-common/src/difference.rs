//! How a clip on the GPU differs from the same clip on the CPU, in words.

use gradclip::{ClipReport, NonFiniteElements, Verification};

use crate::text::number;

/// The first disagreement, in words; `None` if both agree.
#[must_use]
pub fn disagreement(v: &Verification) -> Option<String> {
    if v.agrees() {
        None
    } else if let Some(m) = &v.first_mismatch {
        let tensor = m.name.clone().unwrap_or_else(|| m.tensor.to_string());
        let (cpu, gpu) = (number(m.cpu, 9), number(m.gpu, 9));
        Some(format!("element {} of {tensor:?}: CPU {cpu}, GPU {gpu}, {} ulps", m.index, ulps(m.ulps)))
    } else if v.norm_error > v.norm_tolerance {
        Some(format!("norm: CPU {}, GPU {}", norm(&v.cpu), norm(&v.gpu)))
    } else if !v.same_decision {
        Some(format!(
            "only the {} clipped",
            if v.cpu.as_ref().is_ok_and(|report| report.clipped) { "CPU" } else { "GPU" }
        ))
    } else {
        Some(format!("non-finite elements: CPU {}, GPU {}", found(&v.cpu), found(&v.gpu)))
    }
}

fn norm(side: &Result<ClipReport, NonFiniteElements>) -> String {
    side.as_ref().map_or_else(|_| "refused".into(), |report| number(report.total_norm, 9))
}

fn found(side: &Result<ClipReport, NonFiniteElements>) -> String {
    let found = side.as_ref().map_or_else(Some, |report| report.non_finite.as_ref());
    found.map_or_else(|| "none".into(), ToString::to_string)
}

/// A distance in units of the last place; `u64::MAX` is the distance between a number and NaN.
#[must_use]
pub fn ulps(ulps: u64) -> String {
    if ulps == u64::MAX { "NaN".into() } else { ulps.to_string() }
}

//! Questions about the description of a clip.

use gradclip::{Clip, Mode, NonFinite, NormType, Scope};

/// A clip that measures the same norm and changes nothing, under a value that is not finite too.
#[must_use]
pub fn measuring(mut clip: Clip) -> Clip {
    clip.mode = match clip.mode {
        Mode::Rms(_) => Mode::Rms(f64::INFINITY),
        Mode::AverageNorm(_) => Mode::AverageNorm(f64::INFINITY),
        _ => Mode::Norm(f64::INFINITY),
    };
    clip.agc_eps = None;
    clip.non_finite(NonFinite::Skip)
}

/// Whether the clip measures no norm.
#[must_use]
pub fn clamps(clip: &Clip) -> bool {
    matches!(clip.mode, Mode::Value { .. })
}

/// Whether dimension 0 counts examples.
#[must_use]
pub fn by_example(clip: &Clip) -> bool {
    matches!(clip.scope, Scope::Example | Scope::ExampleTensor)
}

/// The name of the norm.
#[must_use]
pub fn norm_name(clip: &Clip) -> String {
    match clip.mode {
        Mode::Rms(_) => "RMS".into(),
        Mode::AverageNorm(_) => "average".into(),
        _ => clip.norm_type.to_string(),
    }
}

/// The share of a segment in the sum under the root of the total norm; for the infinity norm, in the maximum.
#[must_use]
pub fn share_of(norm: f64, total: f64, norm_type: NormType) -> f64 {
    let of = norm / total;
    if norm_type == NormType::Inf { of } else { of.powf(norm_type.power()) }
}

//! What settings are called on the command line and in what the program prints.

use gradclip::{Budget, Clip, Mode, NonFinite, Scope, UnitAxis};

/// The names of values on the command line, and what they stand for.
pub(crate) type Names<T> = [(&'static str, T, &'static str)];

pub(crate) const SCOPES: &Names<Scope> = &[
    ("global", Scope::Global, "All gradients together"),
    ("tensor", Scope::Tensor, "Each tensor by itself"),
    ("unit", Scope::Unit, "Each unit of each tensor by itself: a row, or what --unit-axis says"),
    ("example", Scope::Example, "Each example by itself, over all tensors, whose dimension 0 counts examples"),
    ("example-tensor", Scope::ExampleTensor, "Each example of each tensor by itself"),
];

pub(crate) const AXES: &Names<UnitAxis> = &[
    ("first", UnitAxis::First, "Rows, as in PyTorch's weights"),
    ("last", UnitAxis::Last, "Columns, as in JAX's and burn's"),
];

pub(crate) const BUDGETS: &Names<Budget> = &[
    ("each", Budget::Each, "All of it to each"),
    ("uniform", Budget::Uniform, "A part of 1 / sqrt(tensors) to each"),
    ("sized", Budget::Sized, "A part of sqrt(its elements / all elements) to each"),
];

pub(crate) const POLICIES: &Names<NonFinite> = &[
    ("error", NonFinite::Error, "Stop with exit code 3"),
    ("propagate", NonFinite::Propagate, "Compute with them, as PyTorch does"),
    ("skip", NonFinite::Skip, "Leave all gradients as they are"),
    ("zero", NonFinite::Zero, "Set all gradients that share a norm with them to 0"),
    ("drop", NonFinite::Drop, "Set these elements to 0 and clip the rest"),
];

/// The same, and nothing changed, whatever the gradients hold.
pub(crate) fn measuring(mut clip: Clip) -> Clip {
    clip.mode = match clip.mode {
        Mode::Rms(_) => Mode::Rms(f64::INFINITY),
        Mode::AverageNorm(_) => Mode::AverageNorm(f64::INFINITY),
        _ => Mode::Norm(f64::INFINITY),
    };
    clip.agc_eps = None;
    clip.non_finite(NonFinite::Propagate)
}

/// Whether it measures no norm.
pub(crate) fn clamps(clip: &Clip) -> bool {
    matches!(clip.mode, Mode::Value { .. })
}

/// Whether dimension 0 counts examples.
pub(crate) fn by_example(clip: &Clip) -> bool {
    matches!(clip.scope, Scope::Example | Scope::ExampleTensor)
}

/// What its norm is called.
pub(crate) fn norm_name(clip: &Clip) -> String {
    match clip.mode {
        Mode::Rms(_) => "RMS".into(),
        Mode::AverageNorm(_) => "average".into(),
        _ => clip.norm_type.to_string(),
    }
}

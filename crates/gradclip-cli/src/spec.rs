//! A clip as it was asked for: its numbers before they are checked, and how it reads.

use std::fmt;

use gradclip::{Budget, Clip, NonFinite, NormType, Scope, UnitAxis};

use crate::failure::Failure;
use crate::report::number;

/// What is compared with what.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    /// `max_norm`
    Norm(f64),
    /// `max_rms`
    Rms(f64),
    /// `max_average`
    AverageNorm(f64),
    /// `clip_factor`
    Agc(f64),
    /// `clip_value`
    Value(f64),
    /// The least and the greatest value.
    Range((f64, f64)),
}

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

/// What a value is called on the command line.
fn name_of<T: Copy + PartialEq>(names: &Names<T>, value: T) -> &'static str {
    names.iter().find(|(_, known, _)| *known == value).map_or("", |(name, ..)| name)
}

/// Everything that makes a [`Clip`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) mode: Mode,
    pub(crate) norm_type: NormType,
    pub(crate) scope: Scope,
    /// The library's default where `None`, here and below.
    pub(crate) unit_axis: Option<UnitAxis>,
    pub(crate) budget: Budget,
    pub(crate) eps: Option<f64>,
    pub(crate) agc_eps: Option<f64>,
    pub(crate) grad_scale: f64,
    pub(crate) non_finite: Option<NonFinite>,
}

impl Spec {
    pub(crate) fn new(mode: Mode) -> Self {
        Self {
            mode,
            norm_type: NormType::default(),
            scope: if let Mode::Agc(_) = mode { Scope::Unit } else { Scope::Global },
            unit_axis: None,
            budget: Budget::default(),
            eps: None,
            agc_eps: None,
            grad_scale: 1.0,
            non_finite: None,
        }
    }

    /// The same with another mode, and nothing changed, whatever the gradients hold.
    pub(crate) fn measuring(self) -> Self {
        let mode = match self.mode {
            Mode::Rms(_) => Mode::Rms(f64::INFINITY),
            Mode::AverageNorm(_) => Mode::AverageNorm(f64::INFINITY),
            _ => Mode::Norm(f64::INFINITY),
        };
        Self { mode, non_finite: Some(NonFinite::Propagate), ..self }
    }

    /// Checks the numbers.
    pub(crate) fn clip(&self) -> Result<Clip, Failure> {
        let mut clip = match self.mode {
            Mode::Norm(max_norm) => Clip::norm(max_norm)?,
            Mode::Rms(max_rms) => Clip::rms(max_rms)?,
            Mode::AverageNorm(max_average) => Clip::average_norm(max_average)?,
            Mode::Agc(clip_factor) => Clip::agc(clip_factor)?,
            Mode::Value(clip_value) => Clip::value(clip_value)?,
            Mode::Range((min, max)) => Clip::range(min, max)?,
        };
        clip = clip.norm_type(self.norm_type).scope(self.scope).budget(self.budget).grad_scale(self.grad_scale)?;
        if let Some(axis) = self.unit_axis {
            clip = clip.unit_axis(axis);
        }
        if let Some(eps) = self.eps {
            clip = clip.eps(eps)?;
        }
        if let Some(agc_eps) = self.agc_eps {
            clip = clip.agc_eps(agc_eps)?;
        }
        Ok(self.non_finite.map_or(clip, |policy| clip.non_finite(policy)))
    }

    /// Whether it measures no norm.
    pub(crate) fn clamps(&self) -> bool {
        matches!(self.mode, Mode::Value(_) | Mode::Range(_))
    }

    /// Whether dimension 0 counts examples.
    pub(crate) fn by_example(&self) -> bool {
        matches!(self.scope, Scope::Example | Scope::ExampleTensor)
    }

    /// What its norm is called.
    pub(crate) fn norm_name(&self) -> String {
        match (self.mode, self.norm_type) {
            (Mode::Rms(_), _) => "RMS".into(),
            (Mode::AverageNorm(_), _) => "average".into(),
            (_, NormType::Inf) => "inf".into(),
            (_, norm_type) => format!("L{}", norm_type.power()),
        }
    }
}

/// For example `L2 norm to 0.25 per unit (last), eps 0, scale 65536, drop`.
impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Norm(to) => write!(f, "{} norm to {}", self.norm_name(), number(to, 3))?,
            Mode::Rms(to) => write!(f, "RMS to {}", number(to, 3))?,
            Mode::AverageNorm(to) => write!(f, "average norm to {}", number(to, 3))?,
            Mode::Agc(factor) => write!(f, "AGC by {}", number(factor, 3))?,
            Mode::Value(bound) => write!(f, "clamp to {} .. {}", number(-bound, 3), number(bound, 3))?,
            Mode::Range((min, max)) => write!(f, "clamp to {} .. {}", number(min, 3), number(max, 3))?,
        }
        if self.scope != Scope::Global {
            write!(f, " per {}", name_of(SCOPES, self.scope))?;
        }
        if let Some(axis) = self.unit_axis {
            write!(f, " ({})", name_of(AXES, axis))?;
        }
        if self.budget != Budget::Each {
            write!(f, " ({})", name_of(BUDGETS, self.budget))?;
        }
        for (what, eps) in [("eps", self.eps), ("agc-eps", self.agc_eps)] {
            if let Some(eps) = eps {
                write!(f, ", {what} {}", number(eps, 3))?;
            }
        }
        if self.grad_scale != 1.0 {
            write!(f, ", scale {}", self.grad_scale)?;
        }
        self.non_finite.map_or(Ok(()), |policy| write!(f, ", {}", name_of(POLICIES, policy)))
    }
}

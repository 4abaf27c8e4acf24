//! A clip as it was asked for: its numbers before they are checked, and how it reads.

use std::fmt;

use gradclip::{Clip, NonFinite, NormType};

use crate::failure::Failure;
use crate::report::number;

/// What is compared with what.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    /// `max_norm`
    Norm(f64),
    /// `clip_value`
    Value(f64),
    /// The least and the greatest value.
    Range((f64, f64)),
}

/// Everything that makes a [`Clip`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) mode: Mode,
    pub(crate) norm_type: NormType,
    /// The library's default where `None`.
    pub(crate) eps: Option<f64>,
    pub(crate) grad_scale: f64,
    /// The library's default for the mode where `None`.
    pub(crate) non_finite: Option<NonFinite>,
}

impl Spec {
    pub(crate) fn new(mode: Mode) -> Self {
        Self { mode, norm_type: NormType::default(), eps: None, grad_scale: 1.0, non_finite: None }
    }

    /// Measures and changes nothing, whatever the gradients hold.
    pub(crate) fn measuring(norm_type: NormType, grad_scale: f64) -> Self {
        let non_finite = Some(NonFinite::Propagate);
        Self { norm_type, grad_scale, non_finite, ..Self::new(Mode::Norm(f64::INFINITY)) }
    }

    /// Checks the numbers.
    pub(crate) fn clip(&self) -> Result<Clip, Failure> {
        let mut clip = match self.mode {
            Mode::Norm(max_norm) => Clip::norm(max_norm)?,
            Mode::Value(clip_value) => Clip::value(clip_value)?,
            Mode::Range((min, max)) => Clip::range(min, max)?,
        };
        clip = clip.norm_type(self.norm_type).grad_scale(self.grad_scale)?;
        if let Some(eps) = self.eps {
            clip = clip.eps(eps)?;
        }
        Ok(self.non_finite.map_or(clip, |policy| clip.non_finite(policy)))
    }
}

/// For example `L2 norm to 0.25, eps 0, scale 65536, drop`.
impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Norm(max_norm) => write!(f, "{} norm to {}", norm_name(self.norm_type), number(max_norm, 3))?,
            Mode::Value(bound) => write!(f, "clamp to {} .. {}", number(-bound, 3), number(bound, 3))?,
            Mode::Range((min, max)) => write!(f, "clamp to {} .. {}", number(min, 3), number(max, 3))?,
        }
        if let Some(eps) = self.eps {
            write!(f, ", eps {}", number(eps, 3))?;
        }
        if self.grad_scale != 1.0 {
            write!(f, ", scale {}", self.grad_scale)?;
        }
        match self.non_finite {
            None => Ok(()),
            Some(NonFinite::Error) => f.write_str(", error"),
            Some(NonFinite::Propagate) => f.write_str(", propagate"),
            Some(NonFinite::Skip) => f.write_str(", skip"),
            Some(NonFinite::Zero) => f.write_str(", zero"),
            Some(NonFinite::Drop) => f.write_str(", drop"),
        }
    }
}

/// How people write the norm.
pub(crate) fn norm_name(norm_type: NormType) -> String {
    match norm_type {
        NormType::Inf => "inf".into(),
        named => format!("{named:?}"),
    }
}

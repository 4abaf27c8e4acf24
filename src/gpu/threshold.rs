//! Thresholds computed on the device, between norm and decision. Host side of `shaders/threshold.wgsl`.

use bytemuck::{Pod, Zeroable};

use super::number::Number;
use crate::clip::AGC_EPS;
use crate::threshold::Threshold;
use crate::{AdaGc, Clip, Error, Mode, ZClip};

/// An adaptive threshold with its state on the device: no step waits for the host.
///
/// [`AutoClip`](crate::AutoClip) needs a history, and stays on the host.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum DeviceThreshold {
    /// For the scope `Global`.
    ZClip(ZClip),
    /// For scopes with a norm for each segment, usually `Tensor`.
    AdaGc(AdaGc),
}

/// Twin of `State` in `shaders/threshold.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct StateRow {
    mean: Number,
    variance: Number,
    steps: u32,
    padding: [u32; 3],
}

/// The formula that a kernel follows. Twin of the constants in `shaders/shared/constants.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Formula {
    Agc = 0,
    ZClip = 1,
    AdaGc = 2,
    /// The thresholds are known, and only whether the step is skipped is not.
    Fixed = 3,
}

/// `UNBOUNDED` of `shaders/shared/number.wgsl`.
const UNBOUNDED: Number = Number { mantissa: u32::MAX, exponent: 0x2000_0000 };

/// A threshold that may be infinite.
pub(super) fn threshold_number(x: f64) -> Number {
    if x == f64::INFINITY { UNBOUNDED } else { Number::product(x, 1.0) }
}

/// The parameters of the threshold kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) formula: Formula,
    pub(super) warm_up: u32,
    pub(super) numbers: [Number; 5],
}

impl Rule {
    /// The rule of a clip, or of a threshold on the device. None if the thresholds are known before the step.
    pub(super) fn of(clip: &Clip, threshold: Option<&DeviceThreshold>) -> Option<Self> {
        let (formula, warm_up, numbers) = match (clip.mode, threshold) {
            (Mode::Agc(clip_factor), _) => {
                (Formula::Agc, 0, [clip_factor, clip.agc_eps.unwrap_or(AGC_EPS), 0.0, 0.0, 0.0])
            }
            (Mode::Norm(max_norm), Some(DeviceThreshold::ZClip(z))) => {
                (Formula::ZClip, z.warm_up, [1.0 - z.alpha, z.alpha, z.z_threshold, max_norm, z.skip_above_z])
            }
            (Mode::Norm(max_norm), Some(DeviceThreshold::AdaGc(a))) => {
                (Formula::AdaGc, a.warm_up, [1.0 - a.beta, a.lambda_rel, a.lambda_abs, max_norm, 0.0])
            }
            _ => return None,
        };
        Some(Self { formula, warm_up, numbers: numbers.map(threshold_number) })
    }
}

impl DeviceThreshold {
    fn as_threshold(&mut self) -> &mut dyn Threshold {
        match self {
            Self::ZClip(zclip) => zclip,
            Self::AdaGc(adagc) => adagc,
        }
    }

    /// Ties the state to its segments, and converts it to the device's form: a row for each segment.
    pub(super) fn start(&mut self, clip: &Clip, labels: &[String]) -> Result<Vec<StateRow>, Error> {
        if !matches!(clip.mode, Mode::Norm(_)) {
            return Err(Error::usage("a threshold on the device needs a clip by norm"));
        }
        self.as_threshold().bind(labels)?;
        let row = |mean: f64, variance: f64, steps: u64| StateRow {
            mean: threshold_number(mean),
            variance: Number::product(variance, 1.0),
            steps: u32::try_from(steps).unwrap_or(u32::MAX),
            padding: [0; 3],
        };
        Ok(match self {
            Self::ZClip(z) => vec![row(z.mean, z.variance, z.steps)],
            Self::AdaGc(a) => {
                let gamma = |i| a.gammas.get(i).copied().unwrap_or(f64::INFINITY);
                (0..labels.len()).map(|i| row(gamma(i), 0.0, a.steps)).collect()
            }
        })
    }

    /// The same threshold with the state of the device.
    pub(super) fn with(mut self, rows: &[StateRow]) -> Self {
        let steps = rows.first().map_or(0, |row| u64::from(row.steps));
        match &mut self {
            Self::ZClip(z) => {
                if let [row] = rows {
                    (z.mean, z.variance, z.steps) = (row.mean.to_f64(), row.variance.to_f64(), steps);
                }
            }
            Self::AdaGc(a) => {
                // `UNBOUNDED` exceeds every float64.
                a.gammas = rows.iter().map(|row| row.mean.to_f64()).collect();
                a.steps = steps;
            }
        }
        self
    }
}

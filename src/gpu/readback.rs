//! What the host reads from the device: twins of `Results`, `Partial` and `Outcome` in `shaders/shared`.

use bytemuck::{Pod, Zeroable};

use super::device::GpuDevice;
use super::number::Number;
use super::step::GROUP_BYTES;
use super::table::{NOWHERE, Origin};
use crate::decision::{Action, Outcome};
use crate::partial::{Location, Partial};
use crate::report::LostElements;
use crate::{Clip, Error, Skipped};

/// The head of `Results`; its outcomes follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct ResultsHead {
    pub(super) steps: u32,
    refused: u32,
    padding: [u32; 6],
}

impl ResultsHead {
    /// Why the last step was skipped.
    pub(super) fn skipped(&self) -> Option<Skipped> {
        // The constants of shaders/shared/outcome.wgsl.
        match self.refused {
            0 => None,
            1 => Some(Skipped::NonFinite),
            _ => Some(Skipped::Above),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct PartialRow {
    sum: Number,
    max: f32,
    non_finite: u32,
    non_finite_high: u32,
    first_origin: u32,
    first_element: u32,
    flags: u32,
}

/// Twin of `losses` in `shaders/shared/counted_losses.wgsl`: each count as low and high word.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct LossRow {
    zero: [u32; 2],
    infinite: [u32; 2],
}

impl LossRow {
    pub(super) const BYTES: u64 = size_of::<Self>() as u64;

    /// Where the row of a group lies: apart from the others, so that each can be bound by itself.
    pub(super) fn at(group: u64) -> u64 {
        GROUP_BYTES * group
    }

    /// Room for the rows of so many groups.
    pub(super) fn buffer(device: &GpuDevice, groups: usize) -> Result<wgpu::Buffer, Error> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        device.storage("gradclip losses", Self::at(groups as u64), usage)
    }

    pub(super) fn to_lost(self) -> LostElements {
        let count = |[low, high]: [u32; 2]| u64::from(high) << 32 | u64::from(low);
        LostElements { zero: count(self.zero), infinite: count(self.infinite) }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct OutcomeRow {
    action: u32,
    flags: u32,
    norm: Number,
    factor_value: f32,
    factor_is_float: u32,
    factor_exact: Number,
}

/// The size of a `Partial` in `shaders/shared/partial.wgsl`.
pub(super) const PARTIAL_BYTES: u64 = size_of::<PartialRow>() as u64;

impl PartialRow {
    /// `EMPTY_PARTIAL`.
    pub(super) const EMPTY: Self = Self {
        sum: Number { mantissa: 0, exponent: 0 },
        max: 0.0,
        non_finite: 0,
        non_finite_high: 0,
        first_origin: NOWHERE,
        first_element: NOWHERE,
        flags: 0,
    };

    /// The partial in the device's form. It has a stamp in place of its location, which may be in another process.
    pub(super) fn of(partial: &Partial, stamp: u32) -> Self {
        let exponent = partial.exponent.clamp(i64::from(i32::MIN / 2), i64::from(i32::MAX / 2));
        Self {
            // Between these bounds the cast is exact.
            sum: Number::of(partial.sum, exponent as i32),
            // A float64 of another process may be larger than any number here.
            max: (partial.max as f32).min(f32::MAX),
            non_finite: partial.non_finite as u32,
            non_finite_high: (partial.non_finite >> 32) as u32,
            flags: u32::from(partial.nan) | u32::from(partial.outside) << 1,
            first_element: stamp,
            ..Self::EMPTY
        }
    }

    /// The stamp of a partial that merged across processes. A partial that the device measured has none.
    pub(super) fn stamp(&self) -> Option<u32> {
        (self.first_origin == NOWHERE && self.first_element != NOWHERE).then_some(self.first_element)
    }

    /// The partial, with its location as tensor and index.
    pub(super) fn to_partial(self, origin: impl Fn(usize) -> Origin) -> Partial {
        let first = (self.first_origin != NOWHERE).then(|| {
            let origin = origin(self.first_origin as usize);
            Location { tensor: origin.tensor, index: origin.first_element + u64::from(self.first_element) }
        });
        let Number { mantissa, exponent } = self.sum;
        // L2 needs an even exponent.
        let odd = exponent & 1;
        Partial {
            sum: f64::from(mantissa) * f64::from(1 + odd),
            exponent: i64::from(exponent - odd),
            max: f64::from(self.max),
            non_finite: u64::from(self.non_finite_high) << 32 | u64::from(self.non_finite),
            nan: self.flags & 1 != 0,
            first,
            outside: self.flags & 2 != 0,
        }
    }
}

/// The last two totals of the processes of a group, each with the stamp that its rows bear on the device. So the device
/// tells which of them its last step used, whatever was recorded since.
#[derive(Debug)]
pub(super) struct Stamped<T> {
    last: Vec<(u32, T)>,
}

impl<T> Default for Stamped<T> {
    fn default() -> Self {
        Self { last: Vec::new() }
    }
}

impl<T> Stamped<T> {
    /// Keeps a merged total. Returns its stamp.
    pub(super) fn keep(&mut self, merged: T) -> u32 {
        let stamp = self.last.last().map_or(0, |(stamp, _)| (stamp + 1) % NOWHERE);
        if self.last.len() == 2 {
            self.last.remove(0);
        }
        self.last.push((stamp, merged));
        stamp
    }

    /// The merged total that a row is part of, if there is one.
    pub(super) fn of(&self, row: &PartialRow) -> Option<&T> {
        let stamp = row.stamp()?;
        self.last.iter().find(|(of, _)| *of == stamp).map(|(_, merged)| merged)
    }
}

impl OutcomeRow {
    /// The outcome. N is its measured norm times `weight`.
    pub(super) fn to_outcome(self, clip: &Clip, weight: f64) -> Outcome {
        let norm = match (clip.measured(), self.flags & 6) {
            (None, _) => f64::NAN,
            (_, 0) => self.norm.to_f64() / clip.grad_scale * weight,
            (_, 2) => f64::INFINITY,
            (..) => f64::NAN,
        };
        let exceeds = self.flags & 1 != 0;
        let factor = self.factor_exact.to_f64();
        // The constants of shaders/shared/outcome.wgsl.
        let (action, clip_coef) = match self.action {
            0 => (Action::Leave, 1.0),
            1 => (Action::Zero, 0.0),
            2 if !exceeds => (Action::Apply, 1.0),
            // The rounded factor of a coefficient just below 1 may give more than 1.
            2 => (Action::Apply, (factor * clip.grad_scale).min(1.0)),
            3 => (Action::Apply, f64::NAN),
            _ => (Action::Apply, 0.0),
        };
        // The device needs no factor for these.
        let factor = match self.action {
            0..=2 => factor,
            3 => f64::NAN,
            _ => 0.0,
        };
        let clipped = clip_coef != 1.0 || (action == Action::Apply && exceeds);
        Outcome { norm, non_finite: self.flags & 6 != 0, clip_coef, clipped, factor, action }
    }
}

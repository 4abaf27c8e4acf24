//! The parameters of a clip for the kernels.

use bytemuck::{Pod, Zeroable};

use super::device::GpuDevice;
use super::gather::Group;
use super::number::Number;
use super::threshold::{Rule, threshold_number};
use crate::segment::Segments;
use crate::{Clip, Error, Mode, NonFinite, NormType};

/// Twin of `Params` in `shaders/shared/outcome.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Params {
    grad_scale: Number,
    eps_scaled: Number,
    floor_scaled: Number,
    power: Number,
    root: Number,
    unscale_exact: Number,
    unscale_value: f32,
    unscale_is_float: u32,
    policy: u32,
    first_segment: u32,
    segments: u32,
    segment_partials: u32,
    group_partial: u32,
    total_partial: u32,
    parameter_partials: u32,
    warm_up: u32,
    limit: u32,
    padding: u32,
    threshold: [Number; 5],
    padding_2: Number,
    min: [f32; 4],
    max: [f32; 4],
}

impl Params {
    /// The parameters of a group, with a rule if the device computes its thresholds. `everything` is the partial of all
    /// groups.
    pub(super) fn new(group: &Group, clip: &Clip, everything: u32, rule: Option<Rule>) -> Self {
        let scale = clip.grad_scale;
        let (min, max) = if let Mode::Value { min, max } = clip.mode { (min, max) } else { (0.0, 0.0) };
        let rounded = |bound: f64| {
            // By dtype code; through float32, like every element. See `Clamp::new` in src/cpu/clamp.rs.
            let bound = bound as f32;
            [bound, half::f16::from_f32(bound).to_f32(), half::bf16::from_f32(bound).to_f32(), 0.0]
        };
        let (eps, floor) = clip.eps_and_floor();
        let p = if let Some(NormType::P(power)) = clip.measured() { power } else { 1.0 };
        let unscale_value = (1.0 / scale) as f32;
        let unscale_is_float = unscale_value.is_normal();
        Self {
            grad_scale: Number::product(scale, 1.0),
            eps_scaled: Number::product(eps, scale),
            floor_scaled: Number::product(floor, scale),
            power: Number::product(p, 1.0),
            root: Number::reciprocal(p),
            unscale_exact: if unscale_is_float {
                Number::product(f64::from(unscale_value), 1.0)
            } else {
                Number::reciprocal(scale)
            },
            unscale_value: if unscale_is_float { unscale_value } else { 0.0 },
            unscale_is_float: unscale_is_float.into(),
            policy: match clip.non_finite {
                NonFinite::Error => 0,
                NonFinite::Propagate => 1,
                NonFinite::Skip => 2,
                NonFinite::Zero => 3,
                NonFinite::Drop => 4,
            },
            first_segment: group.first_segment,
            segments: group.segments.count,
            segment_partials: group.first_partial,
            group_partial: group.total,
            total_partial: everything,
            parameter_partials: group.first_beside.unwrap_or(0),
            warm_up: rule.map_or(0, |rule| rule.warm_up),
            limit: group.limit,
            padding: 0,
            threshold: rule.map_or([Number::default(); 5], |rule| rule.numbers),
            padding_2: Number::default(),
            min: rounded(min),
            max: rounded(max),
        }
    }

    pub(super) fn upload(&self, device: &GpuDevice) -> Result<wgpu::Buffer, Error> {
        device.filled("gradclip params", bytemuck::bytes_of(self), wgpu::BufferUsages::UNIFORM)
    }
}

/// The thresholds of all segments, then each group's limit, given its segments and clip. Given norms are N, and not
/// measured.
pub(super) fn thresholds<'a>(
    groups: impl Iterator<Item = (&'a Segments, &'a Clip)> + Clone,
    given: bool,
) -> Vec<Number> {
    let mut thresholds = Vec::new();
    for (segments, clip) in groups.clone() {
        for (max_norm, family) in segments.max_norms(clip, &[], &[]).into_iter().zip(segments.families()) {
            let weight = if given { clip.weight(family.elements) } else { 1.0 };
            thresholds.push(threshold_number(max_norm.to_f64() * weight));
        }
    }
    thresholds.extend(groups.map(|(segments, clip)| threshold_number(segments.skip_above(clip).to_f64())));
    thresholds
}

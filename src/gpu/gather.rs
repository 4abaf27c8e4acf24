//! The input of a plan: groups of tensors as pieces of buffers, and the job to do with them.

use std::collections::HashMap;
use std::sync::Arc;

use super::kernels::Norm;
use super::step;
use super::table::Piece;
use super::tensor::GpuTensor;
use super::threshold::DeviceThreshold;
use crate::error::tensor_label;
use crate::examples::check_sums;
use crate::optimizer::check_halves;
use crate::segment::{By, SegmentLayout, Segments, check_groups, check_parameter};
use crate::{Clip, Dtype, Error, Optimizer};

/// The range of p in `shaders/shared/power.wgsl`; a p outside is taken as the nearer bound. Above, the norm of 2^30
/// equal elements is then at most 5e-6 too large. Below 2^-20 the norm of two elements already exceeds every float64.
const POWERS: std::ops::RangeInclusive<f64> = 1.0 / 1_048_576.0..=4_194_304.0;

/// The segments of a job's own tensors: each given norm has one, and a sum needs none.
pub(super) const OF_JOB: SegmentLayout = SegmentLayout { by: By::Rows, columns: 1, segment: 0, first: 0 };

#[derive(Clone, Debug)]
pub(super) enum Job {
    Clip,
    /// Writes nothing but reports and coefficients.
    Measure,
    /// Scales by given norms: one float32 for each segment.
    Scale(GpuTensor),
    /// Sums the clipped examples of each tensor.
    Sum(Vec<GpuTensor>),
    /// Measures into an accumulator, and scales by its decision.
    Accumulate(AccumulatorMemory),
    /// Takes the step of an optimizer: settings, each with the number of its tensors, which follow one another.
    Step(Vec<(Optimizer, usize)>),
}

/// What the plans of one accumulator share.
#[derive(Clone, Debug)]
pub(super) struct AccumulatorMemory {
    pub(super) partial: wgpu::Buffer,
    pub(super) results: wgpu::Buffer,
    /// The first origin that is free.
    pub(super) origins: u32,
}

/// The groups of a plan, with each buffer once.
pub(super) struct Gathered {
    pub(super) buffers: Vec<wgpu::Buffer>,
    pub(super) groups: Vec<Group>,
    pub(super) job: Job,
    /// The job's own tensors: the given norms, or the sums.
    pub(super) job_pieces: Vec<Piece>,
    /// The threshold that follows the norms on the device.
    pub(super) threshold: Option<DeviceThreshold>,
    /// Whether to count what rounding loses.
    pub(super) counts: bool,
    /// Whether the device gets one buffer after another, so that a single buffer is all its work at a time.
    pub(super) in_turn: bool,
}

/// Tensors with one clip.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) clip: Clip,
    pub(super) segments: Segments,
    pub(super) names: Vec<Option<Arc<str>>>,
    /// For each tensor, whether norms count it.
    pub(super) counted: Vec<bool>,
    pub(super) pieces: Vec<Piece>,
    /// The parameters, if the clip or an optimizer needs them.
    pub(super) parameters: Vec<Piece>,
    /// The same as the caller gave them, each with a name if its gradient has one.
    pub(super) of_parameters: Vec<GpuTensor>,
    /// Whether norms are given, not measured.
    pub(super) given: bool,
    /// Whether a finite norm of any group may skip the step.
    pub(super) may_skip: bool,
    /// Its limit among the thresholds.
    pub(super) limit: u32,
    /// Its first segment among those of the plan.
    pub(super) first_segment: u32,
    /// The first partial of its segments, the first of the norms beside them, and the partial of the whole group.
    pub(super) first_partial: u32,
    pub(super) first_beside: Option<u32>,
    pub(super) total: u32,
}

impl Group {
    /// A group without pieces. A `Schedule` places it in the plan.
    pub(super) fn new(clip: &Clip, segments: Segments, tensors: Vec<(Option<Arc<str>>, bool)>) -> Self {
        let (names, counted) = tensors.into_iter().unzip();
        Self {
            clip: clip.with_power_in(POWERS),
            segments,
            names,
            counted,
            pieces: Vec::new(),
            parameters: Vec::new(),
            of_parameters: Vec::new(),
            given: false,
            may_skip: clip.may_skip(),
            limit: 0,
            first_segment: 0,
            first_partial: 0,
            first_beside: None,
            total: 0,
        }
    }

    pub(super) fn all_counted(&self) -> bool {
        self.counted.iter().all(|counted| *counted)
    }

    /// Whether all elements are read before any is written.
    pub(super) fn reads_first(&self) -> bool {
        self.clip.reads_first() || self.may_skip || !self.all_counted()
    }

    /// The norm that its kernels measure. A given norm is measured as the largest of one element.
    pub(super) fn norm(&self) -> Option<Norm> {
        if self.given { Some(Norm::Inf) } else { self.clip.measured().map(Norm::from) }
    }

    /// What is measured beside what decides, and its norm: the parameters, or the gradients of a value clip.
    pub(super) fn beside(&self) -> Option<(&[Piece], Norm)> {
        if self.clip.needs_parameters() {
            Some((&self.parameters, self.norm()?))
        } else {
            self.clip.report_norm.then_some((&self.pieces, Norm::L2))
        }
    }

    /// Whether the other group's tensors can replace these. Segments are compared too, because tensors without elements
    /// may differ in their number of segments.
    pub(super) fn has_shapes_of(&self, other: &Self) -> bool {
        let shape = |piece: &Piece| (piece.dtype, piece.len, piece.layout);
        self.pieces.iter().map(shape).eq(other.pieces.iter().map(shape))
            && self.parameters.iter().map(shape).eq(other.parameters.iter().map(shape))
            && (&self.segments, &self.counted) == (&other.segments, &other.counted)
    }
}

impl Gathered {
    /// # Errors
    /// The errors of a plan that need no device.
    pub(super) fn new(
        groups: &[(Clip, &[GpuTensor])],
        job: Job,
        threshold: Option<DeviceThreshold>,
        counts: bool,
    ) -> Result<Self, Error> {
        check_groups(groups.iter().map(|(clip, _)| clip))?;
        check_job(groups, &job)?;
        let (mut places, mut buffers) = (HashMap::new(), Vec::new());
        let mut number = |t: &GpuTensor| {
            *places.entry(t.buffer.clone()).or_insert_with(|| {
                buffers.push(t.buffer.clone());
                buffers.len() - 1
            })
        };
        let mut gathered = Vec::new();
        for (clip, tensors) in groups {
            let segments = Segments::new(clip, tensors.iter().map(GpuTensor::spec))?;
            let described = tensors.iter().map(|t| (t.spec.name.clone(), t.spec.counted)).collect();
            let mut group = Group { given: matches!(job, Job::Scale(_)), ..Group::new(clip, segments, described) };
            for (i, (t, layout)) in tensors.iter().zip(&group.segments.layouts).enumerate() {
                let mut add = |to: &mut Vec<Piece>, t: &GpuTensor| {
                    let buffer = number(t);
                    to.extend(layout.within(0..t.spec.len).map(|elements| t.piece(buffer, i, elements)));
                };
                if clip.needs_parameters() || matches!(job, Job::Step(_)) {
                    let parameter = t.parameter.as_deref();
                    check_parameter(i, t.spec(), parameter.map(GpuTensor::spec))?;
                    if let Some(p) = parameter {
                        add(&mut group.parameters, p);
                        let mut named = p.clone();
                        named.spec.name = named.spec.name.or_else(|| t.spec.name.clone());
                        group.of_parameters.push(named);
                    }
                }
                add(&mut group.pieces, t);
            }
            gathered.push(group);
        }
        let mut piece = |t: &GpuTensor, i| t.piece(number(t), i, (OF_JOB, 0..t.spec.len));
        let job_pieces = match &job {
            Job::Scale(norms) => {
                let expected = u64::from(gathered[0].segments.count);
                if norms.spec.len != expected {
                    return Err(Error::usage(format!("norms by segment: {} given, {expected} needed", norms.spec.len)));
                }
                // Counted behind all tensors, so that reports can name it.
                vec![piece(norms, gathered[0].names.len())]
            }
            Job::Sum(sums) => sums.iter().enumerate().map(|(i, sum)| piece(sum, i)).collect(),
            _ => Vec::new(),
        };
        if let Job::Step(optimizers) = &job {
            for (i, (parameter, place)) in step::parameters(&gathered, optimizers).enumerate() {
                check_halves(&optimizers[place].0, parameter.spec(), i)?;
            }
        }
        let gathered = Self { buffers, groups: gathered, job, job_pieces, threshold, counts, in_turn: false };
        gathered.check_overlaps()?;
        Ok(gathered)
    }

    /// Checks that nothing is written twice, and that no sum overlaps a tensor.
    fn check_overlaps(&self) -> Result<(), Error> {
        if matches!(self.job, Job::Measure) {
            return Ok(());
        }
        let mut pieces: Vec<(&Piece, Option<&str>)> = Vec::new();
        for group in &self.groups {
            pieces.extend(group.pieces.iter().map(|piece| (piece, group.names[piece.tensor].as_deref())));
        }
        if let Job::Step(_) = &self.job {
            for group in &self.groups {
                pieces.extend(group.parameters.iter().map(|p| (p, group.of_parameters[p.tensor].spec().name)));
            }
        }
        if let Job::Sum(sums) = &self.job {
            pieces.extend(self.job_pieces.iter().zip(sums).map(|(piece, sum)| (piece, sum.spec().name)));
        }
        pieces.retain(|(piece, _)| piece.len > 0);
        pieces.sort_by_key(|(piece, _)| (piece.buffer, piece.bytes().start));
        let label = |(piece, name): &(&Piece, Option<&str>)| tensor_label(*name, piece.tensor);
        let overlap = |pair: &&[(&Piece, _)]| {
            pair[0].0.buffer == pair[1].0.buffer && pair[1].0.bytes().start < pair[0].0.bytes().end
        };
        pieces.windows(2).find(overlap).map_or(Ok(()), |pair| {
            let second = label(&pair[1]);
            let reason = format!("overlaps {second} in the same buffer; each element may belong to one tensor only");
            Err(Error::Tensor { tensor: label(&pair[0]), reason })
        })
    }
}

/// Checks that the clip can do the job.
fn check_job(groups: &[(Clip, &[GpuTensor])], job: &Job) -> Result<(), Error> {
    let [(clip, tensors), ..] = groups else {
        return Err(Error::usage("a plan needs a group of tensors; it may be empty"));
    };
    match job {
        Job::Scale(norms) => {
            clip.check_given()?;
            if norms.spec.dtype == Dtype::F32 { Ok(()) } else { Err(Error::usage("given norms must be float32")) }
        }
        Job::Sum(sums) => check_sums(clip, tensors.iter().map(GpuTensor::spec), sums.iter().map(GpuTensor::spec)),
        Job::Step(optimizers) => check_optimizers(groups, optimizers),
        _ => Ok(()),
    }
}

/// Checks that there are settings for all tensors.
fn check_optimizers(groups: &[(Clip, &[GpuTensor])], optimizers: &[(Optimizer, usize)]) -> Result<(), Error> {
    optimizers.iter().try_for_each(|(optimizer, _)| optimizer.check())?;
    let tensors: usize = groups.iter().map(|(_, tensors)| tensors.len()).sum();
    let set: usize = optimizers.iter().map(|(_, count)| count).sum();
    if set == tensors {
        return Ok(());
    }
    Err(Error::usage(format!("optimizers are set for {set} tensors, and there are {tensors}")))
}

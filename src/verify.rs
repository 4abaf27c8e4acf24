//! Checks that the GPU and the CPU agree on a clip.

use half::{bf16, f16};

use crate::context::Context;
use crate::cpu::decide as cpu;
use crate::gpu::GpuClipper;
use crate::{Clip, ClipReport, Dtype, Error, NonFiniteElements, SegmentReport, Tensor, TensorMut, Waiting};

/// The tolerated relative difference of the norms: the sum of the errors that GPU and CPU promise
/// ([`NormType`](crate::NormType)).
fn norm_tolerance(clip: &Clip) -> f64 {
    1e-6 / clip.measured().map_or(1.0, |norm_type| norm_type.power().min(1.0)) + 1e-7
}

/// How a clip on the GPU compares with the same clip on the CPU.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Verification {
    /// What the CPU reported: a report, or the non-finite elements that it refused.
    pub cpu: Result<ClipReport, NonFiniteElements>,
    /// What the GPU reported.
    pub gpu: Result<ClipReport, NonFiniteElements>,
    /// |GPU's norm - CPU's| / CPU's, the largest over the total and all segments; 0 where both are NaN, infinite or 0.
    pub norm_error: f64,
    /// The largest `norm_error` that is tolerated.
    pub norm_tolerance: f64,
    /// Whether, in each segment, both clipped or neither did. The decisions may differ where the norms fall on either
    /// side of the threshold but within `norm_tolerance` of each other.
    pub same_decision: bool,
    /// The largest distance between two corresponding elements, in units of the last place of their dtype.
    pub worst_ulps: u64,
    /// The distance that is tolerated in each dtype, and why.
    pub tolerated: Vec<Tolerance>,
    /// The first element that lies outside the tolerance.
    pub first_mismatch: Option<Mismatch>,
    /// How many elements were compared.
    pub elements: u64,
}

/// How many units of the last place two elements of a dtype may be apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tolerance {
    /// The dtype it is for.
    pub dtype: Dtype,
    /// The tolerated distance.
    pub ulps: u64,
    /// Why.
    pub why: &'static str,
}

/// An element on which the backends disagree.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The tensor's place in the list.
    pub tensor: usize,
    /// The tensor's name, if it has one.
    pub name: Option<String>,
    /// The element's index in the tensor.
    pub index: u64,
    /// The CPU's value.
    pub cpu: f64,
    /// The GPU's value.
    pub gpu: f64,
    /// Their distance in units of the last place.
    pub ulps: u64,
}

impl Verification {
    /// Whether everything agrees within the tolerances: norm, elements, decision, and the non-finite elements found.
    #[must_use]
    pub fn agrees(&self) -> bool {
        let found = |side: &Result<ClipReport, NonFiniteElements>| match side {
            Ok(report) => (true, report.non_finite.clone()),
            Err(found) => (false, Some(found.clone())),
        };
        self.norm_error <= self.norm_tolerance
            && self.same_decision
            && self.first_mismatch.is_none()
            && found(&self.cpu) == found(&self.gpu)
    }
}

/// Runs the same clip on copies of the tensors, on the GPU and on the CPU, and compares the reports and every element.
///
/// # Errors
/// [`Error::UnsupportedDtype`] for float64 tensors, and the device's own errors. If the clip refuses non-finite
/// elements, that is a result to compare and not an error.
pub fn verify<'a>(
    clip: &'a Clip,
    tensors: &'a [Tensor<'a>],
    gpu: &'a GpuClipper,
) -> Waiting<'a, Result<Verification, Error>> {
    Waiting::new(verified(clip, tensors, gpu))
}

async fn verified(clip: &Clip, tensors: &[Tensor<'_>], gpu: &GpuClipper) -> Result<Verification, Error> {
    let copies = || tensors.iter().map(|t| t.data.to_vec()).collect::<Vec<_>>();
    let (mut on_cpu, mut on_gpu) = (copies(), copies());
    let cpu = found(cpu::apply(&mut [(*clip, &mut views(&mut on_cpu, tensors))], None, Context::alone()))?;
    let gpu = found(gpu.applied(&mut [(*clip, &mut views(&mut on_gpu, tensors))], Context::alone()).await)?;
    // Under AGC the threshold comes from a parameter's norm, so the coefficient has the errors of both norms.
    let coef_tolerance = norm_tolerance(clip) * if clip.needs_parameters() { 2.0 } else { 1.0 };
    let (norm_error, same_decision) = match (&cpu, &gpu) {
        (Ok(cpu), Ok(gpu)) => {
            let whole = |r: &ClipReport| (r.total_norm, r.clip_coef, r.clipped);
            let mut found = compare_decisions(whole(cpu), whole(gpu), coef_tolerance);
            for (cpu, gpu) in cpu.segments.iter().zip(&gpu.segments) {
                let segment = |s: &SegmentReport| (s.norm, s.clip_coef, s.clipped);
                let (error, same) = compare_decisions(segment(cpu), segment(gpu), coef_tolerance);
                found = (found.0.max(error), found.1 && same);
            }
            found
        }
        _ => (0.0, true),
    };
    let mut verification = Verification {
        cpu,
        gpu,
        norm_error,
        norm_tolerance: norm_tolerance(clip),
        same_decision,
        worst_ulps: 0,
        tolerated: Vec::new(),
        first_mismatch: None,
        elements: 0,
    };
    for (i, ((cpu, gpu), tensor)) in on_cpu.iter().zip(&on_gpu).zip(tensors).enumerate() {
        let tolerance = tolerance(tensor.dtype(), coef_tolerance);
        if !verification.tolerated.contains(&tolerance) {
            verification.tolerated.push(tolerance);
        }
        verification.elements += tensor.len() as u64;
        compare(&mut verification, tolerance, (i, tensor), cpu, gpu);
    }
    Ok(verification)
}

/// The relative error of the norm, and whether the decision is the same, from each norm, coefficient and decision.
fn compare_decisions(cpu: (f64, f64, bool), gpu: (f64, f64, bool), tolerance: f64) -> (f64, bool) {
    // A value clip measures no norm. Its coefficients are both 1, so they must not excuse a different decision.
    let tie = !cpu.0.is_nan() && (cpu.1 - gpu.1).abs() <= tolerance;
    (relative_error(gpu.0, cpu.0), cpu.2 == gpu.2 || tie)
}

fn views<'a>(copies: &'a mut [Vec<u8>], tensors: &[Tensor<'a>]) -> Vec<TensorMut<'a>> {
    let view = |(data, t): (&'a mut Vec<u8>, &Tensor<'a>)| TensorMut { spec: t.spec, data, parameter: t.parameter };
    copies.iter_mut().zip(tensors).map(view).collect()
}

fn found(result: Result<Vec<ClipReport>, Error>) -> Result<Result<ClipReport, NonFiniteElements>, Error> {
    match result {
        Ok(mut reports) => Ok(Ok(reports.swap_remove(0))),
        Err(Error::NonFinite(found)) => Ok(Err(found)),
        Err(other) => Err(other),
    }
}

/// |a - b| / |b|, 0 where both are the same infinity, NaN or 0.
fn relative_error(a: f64, b: f64) -> f64 {
    if a == b || (a.is_nan() && b.is_nan()) {
        0.0
    } else {
        let error = ((a - b) / b).abs();
        if error.is_nan() { f64::INFINITY } else { error }
    }
}

/// For elements multiplied by coefficients that have this relative tolerance.
fn tolerance(dtype: Dtype, coefficient: f64) -> Tolerance {
    match dtype {
        Dtype::F16 | Dtype::BF16 => {
            let epsilon = if dtype == Dtype::F16 { f64::from(f16::EPSILON) } else { f64::from(bf16::EPSILON) };
            Tolerance {
                dtype,
                ulps: (coefficient / epsilon).ceil() as u64,
                why: "the coefficients differ by the norms' tolerance, which can tip a rounding",
            }
        }
        Dtype::F32 | Dtype::F64 => Tolerance {
            dtype,
            // A unit of the last place is 2^-23 to 2^-24 of an element.
            ulps: (coefficient * 2f64.powi(24)).ceil() as u64 + 1,
            why: "the norms' tolerance in units of the last place, and one more for the rounding",
        },
    }
}

fn compare(v: &mut Verification, tolerance: Tolerance, (i, tensor): (usize, &Tensor<'_>), cpu: &[u8], gpu: &[u8]) {
    let size = tensor.dtype().size();
    for (index, (cpu, gpu)) in cpu.chunks_exact(size).zip(gpu.chunks_exact(size)).enumerate() {
        if cpu == gpu {
            continue;
        }
        let (a, b) = (value(tensor.dtype(), cpu), value(tensor.dtype(), gpu));
        if a.is_nan() && b.is_nan() {
            continue;
        }
        let ulps = position(tensor.dtype(), cpu).abs_diff(position(tensor.dtype(), gpu));
        let ulps = if a.is_nan() || b.is_nan() { u64::MAX } else { ulps };
        v.worst_ulps = v.worst_ulps.max(ulps);
        if ulps > tolerance.ulps && v.first_mismatch.is_none() {
            let name = tensor.name().map(str::to_owned);
            v.first_mismatch = Some(Mismatch { tensor: i, name, index: index as u64, cpu: a, gpu: b, ulps });
        }
    }
}

fn value(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::F32 => bytemuck::pod_read_unaligned::<f32>(bytes).into(),
        Dtype::F64 => bytemuck::pod_read_unaligned(bytes),
        Dtype::F16 => bytemuck::pod_read_unaligned::<f16>(bytes).into(),
        Dtype::BF16 => bytemuck::pod_read_unaligned::<bf16>(bytes).into(),
    }
}

/// The place of a value among all values of its dtype, in order; both zeros are at 0.
fn position(dtype: Dtype, bytes: &[u8]) -> i64 {
    let (magnitude, negative) = match dtype {
        Dtype::F16 | Dtype::BF16 => {
            let bits: u16 = bytemuck::pod_read_unaligned(bytes);
            (i64::from(bits & 0x7fff), bits >> 15 == 1)
        }
        Dtype::F32 => {
            let bits: u32 = bytemuck::pod_read_unaligned(bytes);
            (i64::from(bits & 0x7fff_ffff), bits >> 31 == 1)
        }
        Dtype::F64 => {
            let bits: u64 = bytemuck::pod_read_unaligned(bytes);
            ((bits & (u64::MAX >> 1)) as i64, bits >> 63 == 1)
        }
    };
    if negative { -magnitude } else { magnitude }
}

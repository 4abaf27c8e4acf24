//! [`PlanOptions`]: what a plan does beside clipping as its description says.

use super::gather::Job;
use super::tensor::GpuTensor;
use super::threshold::DeviceThreshold;
use crate::Error;

/// What a plan does beside clipping as its description says: for [`GpuClipper::plan_with`](super::GpuClipper::plan_with).
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use gradclip::wgpu::util::DeviceExt;
/// use gradclip::{Clip, ZClip, gpu::{DeviceThreshold, GpuClipper, GpuTensor, PlanOptions}, wgpu};
/// let gpu = GpuClipper::open().wait()?;
/// # let contents = bytemuck::cast_slice(&[3.0f32, 4.0]);
/// # let usage = wgpu::BufferUsages::STORAGE;
/// # let buffer = gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents, usage });
/// let tensors = [GpuTensor::f32(&buffer, ..)?];
/// let threshold = PlanOptions::default().threshold(DeviceThreshold::ZClip(ZClip::new()));
/// let adaptive = gpu.plan_with(&[(Clip::norm(f64::INFINITY), &tensors)], threshold)?;
/// let for_an_optimizer = gpu.plan_with(&[(Clip::norm(1.0), &tensors)], PlanOptions::default().measure_only())?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    pub(super) threshold: Option<DeviceThreshold>,
    measure_only: bool,
    norms: Option<GpuTensor>,
    sums: Option<Vec<GpuTensor>>,
}

impl PlanOptions {
    /// Clips by a threshold that follows the norms on the device: no step waits for the host. The clip's own `max_norm` stays
    /// an upper bound; infinity sets none. [`GpuPlan::threshold`](super::GpuPlan::threshold) reads the state back.
    #[must_use]
    pub fn threshold(mut self, threshold: DeviceThreshold) -> Self {
        self.threshold = Some(threshold);
        self
    }

    /// Writes nothing but the report and [`GpuPlan::coefficients`](super::GpuPlan::coefficients), for an optimizer to fold in.
    #[must_use]
    pub fn measure_only(mut self) -> Self {
        self.measure_only = true;
        self
    }

    /// Clips by norms that something else has put into GPU memory: one float32 N for each segment, in the order of
    /// the report and, like the report's, divided by `grad_scale` already. The host can write it too
    /// (`queue.write_buffer`).
    ///
    /// Gradients are read only where they are written, so that non-finite ones go uncounted. What a norm that is not
    /// finite leads to is the policy's choice; `Error`, `Skip` and `Drop` leave what it is the norm of as it is. The sign
    /// of a norm is ignored.
    #[must_use]
    pub fn norms(mut self, norms: &GpuTensor) -> Self {
        self.norms = Some(norms.clone());
        self
    }

    /// Clips each example by itself and sums the clipped ones: `sums[i]`, float32, becomes the sum over dimension 0 of the
    /// clipped tensor `i`, which stays as it is. The scope must be [`Scope::Example`](crate::Scope::Example) or
    /// [`Scope::ExampleTensor`](crate::Scope::ExampleTensor).
    ///
    /// On the web the sums must lie in buffers of their own, because WebGPU allows no two writable views of one.
    ///
    /// A sum is off by at most (32 + examples / 256) · 2^-24 of the sum of the sizes of what it adds, and by 2^-126 for each
    /// example: drivers may flush what is smaller to 0. Under the policies
    /// `Error` and `Skip` sums stay as they were if anything is not finite.
    #[must_use]
    pub fn sums(mut self, sums: &[GpuTensor]) -> Self {
        self.sums = Some(sums.to_vec());
        self
    }

    /// What the plan makes of its tensors.
    ///
    /// # Errors
    /// [`Error::Usage`] if these options do not go together.
    pub(super) fn job(&self, groups: usize) -> Result<Job, Error> {
        let Self { threshold, measure_only, norms, sums } = self;
        let job = match (measure_only, norms, sums) {
            (false, None, None) => Job::Clip,
            (true, None, None) => Job::Measure,
            (false, Some(norms), None) => Job::Scale(norms.clone()),
            (false, None, Some(sums)) => Job::Sum(sums.clone()),
            _ => {
                return Err(Error::usage("a plan measures only, or goes by given norms, or sums examples: choose one"));
            }
        };
        let measures = matches!(job, Job::Clip | Job::Measure);
        if threshold.is_some() && !measures {
            return Err(Error::usage("a threshold follows norms that the plan measures: leave norms and sums out"));
        }
        if groups != 1 && (threshold.is_some() || !measures) {
            return Err(Error::usage("a threshold, given norms and sums are for one group of tensors"));
        }
        Ok(job)
    }
}

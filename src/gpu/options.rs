//! [`PlanOptions`]: options of a plan beyond its clip.

use super::gather::Job;
use super::tensor::GpuTensor;
use super::threshold::DeviceThreshold;
use crate::Error;

/// Options of a plan beyond its clip, for [`GpuClipper::plan_with`](super::GpuClipper::plan_with).
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
    /// Clips by a threshold that follows the norms on the device: no step waits for the host. The clip's own `max_norm`
    /// stays an upper bound; infinity sets none. [`GpuPlan::threshold`](super::GpuPlan::threshold) reads its state.
    #[must_use]
    pub fn threshold(mut self, threshold: DeviceThreshold) -> Self {
        self.threshold = Some(threshold);
        self
    }

    /// Writes nothing but the report and [`GpuPlan::coefficients`](super::GpuPlan::coefficients), for an optimizer.
    #[must_use]
    pub fn measure_only(mut self) -> Self {
        self.measure_only = true;
        self
    }

    /// Clips by given norms in GPU memory: one float32 N for each segment, in the order of the report, already divided
    /// by `grad_scale` as in the report. A kernel or the host (`queue.write_buffer`) writes them.
    ///
    /// The plan reads only the gradients that it writes, so it does not count non-finite ones. The policy decides what
    /// a non-finite norm does; under `Error`, `Skip` and `Drop` the elements that it is the norm of stay unchanged. A
    /// norm's sign is ignored.
    #[must_use]
    pub fn norms(mut self, norms: &GpuTensor) -> Self {
        self.norms = Some(norms.clone());
        self
    }

    /// Clips each example by itself and sums the clipped examples: `sums[i]` (float32) becomes the sum of the clipped
    /// tensor `i` over dimension 0. Tensor `i` itself stays unchanged. The scope must be
    /// [`Scope::Example`](crate::Scope::Example) or [`Scope::ExampleTensor`](crate::Scope::ExampleTensor).
    ///
    /// On the web the sums must lie in buffers of their own, because WebGPU allows no two writable views of one.
    ///
    /// The error of a sum is at most (32 + examples / 256) · 2^-24 of the sum of the magnitudes that it adds, plus
    /// 2^-126 for each example, because drivers may flush smaller values to 0. Under the policies `Error` and `Skip`
    /// sums stay unchanged if anything is not finite.
    #[must_use]
    pub fn sums(mut self, sums: &[GpuTensor]) -> Self {
        self.sums = Some(sums.to_vec());
        self
    }

    /// The job and the threshold of a plan with these options and this number of groups.
    ///
    /// # Errors
    /// [`Error::Usage`] if these options do not go together.
    pub(super) fn into_job(self, groups: usize) -> Result<(Job, Option<DeviceThreshold>), Error> {
        let Self { threshold, measure_only, norms, sums } = self;
        let job = match (measure_only, norms, sums) {
            (false, None, None) => Job::Clip,
            (true, None, None) => Job::Measure,
            (false, Some(norms), None) => Job::Scale(norms),
            (false, None, Some(sums)) => Job::Sum(sums),
            _ => {
                return Err(Error::usage("a plan only measures, or takes given norms, or sums examples: choose one"));
            }
        };
        let measures = matches!(job, Job::Clip | Job::Measure);
        if threshold.is_some() && !measures {
            return Err(Error::usage("a threshold follows norms that the plan measures: leave norms and sums out"));
        }
        if groups != 1 && (threshold.is_some() || !measures) {
            return Err(Error::usage("a threshold, given norms and sums are for one group of tensors"));
        }
        Ok((job, threshold))
    }
}

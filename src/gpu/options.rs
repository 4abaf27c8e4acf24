//! [`PlanOptions`]: options of a plan beyond its clip.

use super::gather::Job;
use super::tensor::GpuTensor;
use super::threshold::DeviceThreshold;
use crate::{Error, Optimizer};

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
/// let for_own_kernels = gpu.plan_with(&[(Clip::norm(1.0), &tensors)], PlanOptions::default().measure_only())?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    pub(super) threshold: Option<DeviceThreshold>,
    measure_only: bool,
    norms: Option<GpuTensor>,
    sums: Option<Vec<GpuTensor>>,
    optimizers: Option<Optimizers>,
    pub(super) count_lost: bool,
}

/// The settings of all tensors, or of so many each, which follow one another.
#[derive(Clone, Debug)]
enum Optimizers {
    One(Optimizer),
    Each(Vec<(Optimizer, usize)>),
}

impl PlanOptions {
    /// Clips by a threshold that follows the norms on the device: no step waits for the host. The clip's own `max_norm`
    /// stays an upper bound; infinity sets none. [`GpuPlan::threshold`](super::GpuPlan::threshold) reads its state.
    #[must_use]
    pub fn threshold(mut self, threshold: DeviceThreshold) -> Self {
        self.threshold = Some(threshold);
        self
    }

    /// Writes nothing but the report and [`GpuPlan::coefficients`](super::GpuPlan::coefficients), for kernels of the
    /// caller's. [`PlanOptions::optimizer`] has this library's.
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

    /// Counts the elements that become 0 or infinite only because they are rounded: [`ClipReport::lost`], which is None
    /// for other plans. float16 loses them easily. Elements that a plain product may lose are taken one by one, and each
    /// invocation that has lost some adds their number to a count. The device needs six storage buffers for each stage.
    ///
    /// [`ClipReport::lost`]: crate::ClipReport::lost
    #[must_use]
    pub fn count_lost(mut self) -> Self {
        self.count_lost = true;
        self
    }

    /// Takes the step of an optimizer by the clipped gradients, in one pass: it reads each gradient, parameter and state
    /// once, and writes parameters and state. Gradients are never written. Each gradient brings its parameter along
    /// ([`GpuTensor::parameter`]): of the same shape, of any dtype here, in any buffer, at any offset. None may overlap.
    /// On the web parameters must lie in other buffers than gradients, because WebGPU allows no two writable views of one.
    /// The device needs five storage buffers for each stage.
    ///
    /// The plan keeps the state on the device, and counts the steps there. A step that the clip skips changes neither
    /// parameters nor state, and does not count. The state begins with the first step: master copies are those of the
    /// parameters at that time. [`GpuPlan::set_optimizers`](super::GpuPlan::set_optimizers) changes the learning rate from
    /// step to step, [`GpuPlan::optimizer_state`](super::GpuPlan::optimizer_state) reads the state, and
    /// [`GpuPlan::set_optimizer_state`](super::GpuPlan::set_optimizer_state) restores it.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::wgpu::util::DeviceExt;
    /// use gradclip::{Clip, Optimizer, gpu::{GpuClipper, GpuTensor, PlanOptions}, wgpu};
    /// let gpu = GpuClipper::open().wait()?;
    /// # let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    /// # let buffer = |x: [f32; 2]| gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: bytemuck::cast_slice(&x), usage });
    /// # let (weights, gradients) = (buffer([1.0, -1.0]), buffer([30.0, 40.0]));
    /// let gradient = GpuTensor::f32(&gradients, ..)?.named("w").parameter(GpuTensor::f32(&weights, ..)?);
    /// let adamw = PlanOptions::default().optimizer(Optimizer::adamw(1e-3));
    /// let plan = gpu.plan_with(&[(Clip::norm(1.0), &[gradient])], adamw)?;
    /// // Each step:
    /// let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// plan.encode(&mut encoder)?;
    /// gpu.queue().submit([encoder.finish()]);
    /// // If wanted:
    /// assert_eq!(plan.optimizer_state().wait()?.steps(), 1);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn optimizer(mut self, optimizer: Optimizer) -> Self {
        self.optimizers = Some(Optimizers::One(optimizer));
        self
    }

    /// [`PlanOptions::optimizer`] with settings for so many tensors each, which follow one another through all groups: a
    /// weight decay for the first twelve, say, and none for the others. They need not be the groups of clips. Together
    /// they must be for all tensors.
    #[must_use]
    pub fn optimizers(mut self, optimizers: &[(Optimizer, usize)]) -> Self {
        self.optimizers = Some(Optimizers::Each(optimizers.to_vec()));
        self
    }

    /// The job and the threshold of a plan with these options and groups of so many tensors.
    ///
    /// # Errors
    /// [`Error::Usage`] if these options do not go together.
    pub(super) fn into_job(self, groups: &[usize]) -> Result<(Job, Option<DeviceThreshold>), Error> {
        let Self { threshold, measure_only, norms, sums, optimizers, count_lost } = self;
        let job = match (measure_only, norms, sums, optimizers) {
            (false, None, None, None) => Job::Clip,
            (true, None, None, None) => Job::Measure,
            (false, Some(norms), None, None) => Job::Scale(norms),
            (false, None, Some(sums), None) => Job::Sum(sums),
            (false, None, None, Some(Optimizers::One(optimizer))) => Job::Step(vec![(optimizer, groups.iter().sum())]),
            (false, None, None, Some(Optimizers::Each(each))) => Job::Step(each),
            _ => {
                return Err(Error::usage(
                    "a plan only measures, or takes given norms, or sums examples, or has an optimizer: choose one",
                ));
            }
        };
        if count_lost && !matches!(job, Job::Clip | Job::Scale(_)) {
            return Err(Error::usage("count_lost is for plans that write clipped gradients"));
        }
        let (groups, measures) = (groups.len(), matches!(job, Job::Clip | Job::Measure | Job::Step(_)));
        if threshold.is_some() && !measures {
            return Err(Error::usage("a threshold follows norms that the plan measures: leave norms and sums out"));
        }
        if groups != 1 && (threshold.is_some() || !measures) {
            return Err(Error::usage("a threshold, given norms and sums are for one group of tensors"));
        }
        Ok((job, threshold))
    }
}

//! What may change from step to step without a new plan.

use std::sync::PoisonError;

use super::super::build::Built;
use super::super::gather::{Gathered, Group, Job};
use super::super::number::Number;
use super::super::params::thresholds;
use super::super::step::is_placed_as;
use super::super::tensor::GpuTensor;
use super::GpuPlan;
use crate::{Clip, Error};

impl GpuPlan {
    /// Replaces the plan's tensors, group by group, by others of the same dtypes and shapes, in other buffers or at other
    /// offsets, as a pool hands them out, with their parameters if the plan has some. Compiles nothing. Adaptive
    /// thresholds, an optimizer's state, [`GpuPlan::coefficients`] and the count of steps go on. Steps that were encoded
    /// before still clip the tensors that they were encoded for.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, wgpu};
    /// # use wgpu::util::DeviceExt;
    /// # let gpu = GpuClipper::open().wait()?;
    /// # let buffer = |x: [f32; 2]| gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: bytemuck::cast_slice(&x), usage: wgpu::BufferUsages::STORAGE });
    /// # let (first, second) = (buffer([3.0, 4.0]), buffer([5.0, 12.0]));
    /// let mut plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&first, ..)?])?;
    /// plan.update(&[&[GpuTensor::f32(&second, ..)?]])?;
    /// # let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// # plan.encode(&mut encoder)?;
    /// # gpu.queue().submit([encoder.finish()]);
    /// # assert!((plan.report().wait()?.total_norm - 13.0).abs() < 1e-5);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] if the number of tensors, their dtypes, their shapes or which of them count differ, or if a
    /// parameter with [remainders](crate::Halves::Remainder) moves from one half of a 32-bit word to the other; those of
    /// [`GpuClipper::plan_with`](crate::gpu::GpuClipper::plan_with). The plan is then unchanged.
    pub fn update(&mut self, groups: &[&[GpuTensor]]) -> Result<(), Error> {
        let of_plan = self.built.groups.iter();
        let shapes_differ =
            || Error::usage("a plan is updated with tensors of the dtypes and shapes that it was made for");
        let same_number = |(group, tensors): (&Group, &&[GpuTensor])| group.names.len() == tensors.len();
        if groups.len() != of_plan.len() || !of_plan.clone().zip(groups).all(same_number) {
            return Err(shapes_differ());
        }
        let groups: Vec<_> = of_plan.clone().zip(groups).map(|(group, tensors)| (group.clip, *tensors)).collect();
        let counts = self.built.memory.losses.is_some();
        let gathered = Gathered::new(&groups, self.built.job.clone(), self.built.threshold.clone(), counts)?;
        if !of_plan.zip(&gathered.groups).all(|(group, other)| group.has_shapes_of(other)) {
            return Err(shapes_differ());
        }
        if let Job::Step(optimizers) = &self.built.job
            && !is_placed_as(optimizers, &self.built.groups, &gathered.groups)
        {
            return Err(Error::usage("a parameter with remainders moves by a multiple of 4 bytes only"));
        }
        self.built = Built::new(&self.gpu, gathered, Some(&self.built.memory))?;
        Ok(())
    }

    /// Sets another `max_norm`, or the mode's own threshold, for the steps that are submitted from now on, even if they
    /// were encoded before. Builds nothing anew, and gives the bits of a new plan. Ask for the report on an earlier
    /// step first.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, wgpu};
    /// # use wgpu::util::DeviceExt;
    /// # let gpu = GpuClipper::open().wait()?;
    /// # let buffer = gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: bytemuck::cast_slice(&[3.0f32, 4.0]), usage: wgpu::BufferUsages::STORAGE });
    /// let mut plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&buffer, ..)?])?;
    /// for max_norm in [100.0, 10.0, 1.0] {
    ///     plan.set_max_norm(max_norm)?;
    ///     let mut encoder = gpu.device().create_command_encoder(&Default::default());
    ///     plan.encode(&mut encoder)?;
    ///     gpu.queue().submit([encoder.finish()]);
    ///     assert_eq!(plan.report().wait()?.clipped, max_norm == 1.0);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Setting`] if it is invalid; [`Error::Usage`] for a value clip; the device's own. The plan is then
    /// unchanged.
    pub fn set_max_norm(&mut self, max_norm: f64) -> Result<(), Error> {
        self.set_max_norms(&vec![max_norm; self.built.groups.len()])
    }

    /// [`GpuPlan::set_max_norm`] for each group by itself.
    ///
    /// # Errors
    /// The same, and [`Error::Usage`] unless there is one for each group.
    pub fn set_max_norms(&mut self, max_norms: &[f64]) -> Result<(), Error> {
        let (found, expected) = (max_norms.len(), self.built.groups.len());
        if found != expected {
            return Err(Error::usage(format!("max_norms by group: {found} given, {expected} needed")));
        }
        let mut clips = Vec::new();
        for (group, max_norm) in self.built.groups.iter().zip(max_norms) {
            clips.push(group.clip.with_threshold(*max_norm)?);
        }
        let given = self.built.groups.iter().any(|group| group.given);
        let numbers = thresholds(self.built.groups.iter().map(|group| &group.segments).zip(&clips), given);
        self.set_clips(&clips, &numbers)?;
        *self.own_thresholds.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    /// Sets another `grad_scale`, as [`GpuPlan::set_max_norm`] does a threshold.
    ///
    /// # Errors
    /// [`Error::Setting`] for an invalid value; the device's own. The plan is then unchanged.
    pub fn set_grad_scale(&mut self, grad_scale: f64) -> Result<(), Error> {
        let clips: Vec<_> = self.built.groups.iter().map(|group| group.clip.grad_scale(grad_scale)).collect();
        // An adaptive threshold keeps what it has set.
        self.set_clips(&clips, &[])
    }

    /// Writes the groups' new clips, and thresholds if there are any.
    fn set_clips(&mut self, clips: &[Clip], thresholds: &[Number]) -> Result<(), Error> {
        clips.iter().try_for_each(Clip::check)?;
        let queue = &self.gpu.device.queue;
        self.gpu.device.scoped(|| {
            self.built.write_params(queue, clips);
            if !thresholds.is_empty() {
                queue.write_buffer(&self.built.memory.thresholds, 0, bytemuck::cast_slice(thresholds));
            }
        })?;
        self.built.groups.iter_mut().zip(clips).for_each(|(group, clip)| group.clip = *clip);
        Ok(())
    }
}

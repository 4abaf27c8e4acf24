//! The optimizer of a plan: its settings, and its state as a copy on the host.

use super::super::gather::Job;
use super::super::step::{CountRow, StepMemory, parameters};
use super::super::table::Portion;
use super::super::tensor::GpuTensor;
use super::super::tuning::STAGING_BYTES;
use super::GpuPlan;
use crate::error::tensor_label;
use crate::tensor::Spec;
use crate::{Error, Optimizer, OptimizerState, Tensor, Waiting};

/// Part of a buffer: offset and size in bytes.
type Part<'b> = (&'b wgpu::Buffer, u64, u64);

impl GpuPlan {
    /// The settings of the optimizer, one for each group that
    /// [`PlanOptions::optimizers`](crate::gpu::PlanOptions::optimizers) made; none for a plan without one.
    #[must_use]
    pub fn optimizers(&self) -> Vec<Optimizer> {
        let Job::Step(optimizers) = &self.built.job else { return Vec::new() };
        optimizers.iter().map(|(optimizer, _)| *optimizer).collect()
    }

    /// Sets other settings for the steps that are submitted from now on, even if they were encoded before: the learning
    /// rate, the weight decay or any other number or switch. What decides which tensors the state keeps must stay: the
    /// algorithm, whether there is momentum, `centered`, `amsgrad` and `halves`. Builds nothing anew.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::wgpu::util::DeviceExt;
    /// # use gradclip::{Clip, Optimizer, gpu::{GpuClipper, GpuTensor, PlanOptions}, wgpu};
    /// # let gpu = GpuClipper::open().wait()?;
    /// # let buffer = || gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: &[0; 8], usage: wgpu::BufferUsages::STORAGE });
    /// # let (weights, gradients) = (buffer(), buffer());
    /// # let tensors = [GpuTensor::f32(&gradients, ..)?.parameter(GpuTensor::f32(&weights, ..)?)];
    /// let adamw = PlanOptions::default().optimizer(Optimizer::adamw(1e-3));
    /// let mut plan = gpu.plan_with(&[(Clip::norm(1.0), &tensors)], adamw)?;
    /// for step in 0..3 {
    ///     let warm: Vec<_> = plan.optimizers().iter().map(|own| own.lr(1e-3 * f64::from(step + 1) / 3.0)).collect();
    ///     plan.set_optimizers(&warm)?;
    ///     // encode and submit
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] unless there is one for each group; [`Error::Setting`] for an invalid one;
    /// [`Error::OptimizerState`] if it needs another state; the device's own. The plan is then unchanged.
    pub fn set_optimizers(&mut self, optimizers: &[Optimizer]) -> Result<(), Error> {
        let Job::Step(own) = &self.built.job else { return Err(without_optimizer()) };
        if own.len() != optimizers.len() {
            let (found, expected) = (optimizers.len(), own.len());
            return Err(Error::usage(format!("optimizers by group: {found} given, {expected} needed")));
        }
        let new: Vec<_> = optimizers.iter().zip(own).map(|(optimizer, (_, count))| (*optimizer, *count)).collect();
        described(&new, &[])?.check_kinds(&described(own, &[])?)?;
        self.write_optimizers(new)
    }

    fn write_optimizers(&mut self, optimizers: Vec<(Optimizer, usize)>) -> Result<(), Error> {
        self.step_memory()?.write_settings(&self.gpu.device, &optimizers)?;
        self.built.job = Job::Step(optimizers);
        Ok(())
    }

    /// Begins a run anew: no step is taken yet, and the state is as a new plan has it. Steps that were submitted before
    /// are not changed.
    ///
    /// # Errors
    /// [`Error::Usage`] for a plan without an optimizer; the device's own.
    pub fn restart_optimizer(&self) -> Result<(), Error> {
        self.write_count(bytemuck::Zeroable::zeroed())
    }

    fn write_count(&self, count: CountRow) -> Result<(), Error> {
        let (device, memory) = (&self.gpu.device, self.step_memory()?);
        device.scoped(|| device.queue.write_buffer(&memory.count, 0, bytemuck::bytes_of(&count)))
    }

    /// A copy of the optimizer's state after the last submitted step, with the number of steps taken. Waits for that
    /// step. The copy can be saved (`OptimizerState::to_safetensors`, with the feature `safetensors`), or go on on the
    /// CPU. Parameters have their own names or those of their gradients, and are numbered through all groups.
    ///
    /// # Errors
    /// [`Error::Usage`] for a plan without an optimizer, or if a master copy is asked for before the first step of a
    /// parameter whose buffer has no `COPY_SRC` usage; the device's own.
    pub fn optimizer_state(&self) -> Waiting<'_, Result<OptimizerState<'static>, Error>> {
        Waiting::new(self.read_state())
    }

    async fn read_state(&self) -> Result<OptimizerState<'static>, Error> {
        let memory = self.step_memory()?;
        let optimizers = self.settings()?;
        let all: Vec<_> = parameters(&self.built.groups, optimizers).map(|(parameter, _)| parameter).collect();
        let mut state = described(optimizers, &all)?.with_own_memory();
        let device = &self.gpu.device;
        let count: CountRow =
            bytemuck::pod_read_unaligned(&device.read(&[(&memory.count, 0, size_of::<CountRow>() as u64)]).await?);
        if !count.has_begun() {
            let copies = self.read_masters(&all, &state).await?;
            let views = all.iter().zip(&copies).map(|(t, bytes)| Tensor::from_bytes(t.spec.dtype, bytes));
            state.begin(&views.collect::<Result<Vec<_>, _>>()?);
            return Ok(state);
        }
        let mut places = Vec::new();
        for i in 0..all.len() {
            let tensors = state.tensors_mut(i).len();
            for portion in self.built.state.of(i) {
                places.extend((0..tensors).map(|tensor| (i, tensor, portion, place(portion, tensor))));
            }
        }
        let mut rest = &places[..];
        while !rest.is_empty() {
            // At least one, and no more than fit.
            let mut sum = 0;
            let fitting = rest.iter().take_while(|(.., place)| {
                sum += place.bytes;
                sum <= STAGING_BYTES
            });
            let (own, others) = rest.split_at(fitting.count().max(1));
            let parts: Vec<Part<'_>> =
                own.iter().map(|(.., portion, at)| (&memory.blocks[portion.block], at.offset, at.bytes)).collect();
            let bytes = device.read(&parts).await?;
            let mut read = &bytes[..];
            for (parameter, tensor, portion, at) in own {
                let (words, others) = read.split_at(at.bytes as usize);
                read = others;
                let elements = at.elements(portion);
                state.tensors_mut(*parameter)[*tensor][elements.clone()]
                    .copy_from_slice(&words[at.skipped..][..elements.len()]);
            }
            rest = others;
        }
        state.set_steps(count.steps());
        Ok(state)
    }

    /// The bytes of each parameter that keeps a master copy; none of the others.
    async fn read_masters(&self, all: &[&GpuTensor], state: &OptimizerState<'static>) -> Result<Vec<Vec<u8>>, Error> {
        let mut copies = Vec::new();
        for (i, parameter) in all.iter().enumerate() {
            if state.bytes(i, "master").is_none_or(<[u8]>::is_empty) {
                copies.push(Vec::new());
                continue;
            }
            if !parameter.buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
                let tensor = tensor_label(parameter.spec().name, i);
                return Err(Error::usage(format!(
                    "the state begins with a copy of {tensor}, whose buffer has no COPY_SRC usage: take a step first"
                )));
            }
            let size = parameter.spec.dtype.size() as u64;
            let (start, end) = (parameter.start * size, (parameter.start + parameter.spec.len) * size);
            let from = start / 4 * 4;
            let words = self.gpu.device.read(&[(&parameter.buffer, from, end.next_multiple_of(4) - from)]).await?;
            copies.push(words[(start - from) as usize..][..(end - start) as usize].to_vec());
        }
        Ok(copies)
    }

    /// Takes over a state: settings, tensors and the number of steps. Steps that are submitted from now on go on from it,
    /// and give the bits of a run that was never stopped, on the same device. A state of the CPU's fits too.
    ///
    /// # Errors
    /// [`Error::Usage`] for a plan without an optimizer; [`Error::OptimizerState`] or [`Error::Tensor`] if the state is of
    /// another optimizer or of other parameters, or its tensors are elsewhere; the device's own. The plan is then
    /// unchanged.
    pub fn set_optimizer_state(&mut self, state: &OptimizerState<'_>) -> Result<(), Error> {
        let memory = self.step_memory()?;
        let optimizers = self.settings()?;
        let all: Vec<_> = parameters(&self.built.groups, optimizers).map(|(parameter, _)| parameter).collect();
        state.check_replaces(&described(optimizers, &all)?)?;
        let device = &self.gpu.device;
        for i in 0..all.len() {
            let tensors = state.tensors(i);
            for portion in self.built.state.of(i) {
                for (tensor, bytes) in tensors.iter().enumerate() {
                    let at = place(portion, tensor);
                    let own = &bytes[at.elements(portion)];
                    let block = &memory.blocks[portion.block];
                    device.scoped(|| {
                        if own.len() as u64 == at.bytes {
                            device.queue.write_buffer(block, at.offset, own);
                        } else {
                            let mut words = vec![0; at.bytes as usize];
                            words[at.skipped..][..own.len()].copy_from_slice(own);
                            device.queue.write_buffer(block, at.offset, &words);
                        }
                    })?;
                }
            }
        }
        self.write_count(CountRow::of(state.steps()))?;
        let counts = optimizers.iter().map(|(_, count)| *count);
        self.write_optimizers(state.optimizers().iter().copied().zip(counts).collect())
    }

    fn step_memory(&self) -> Result<&StepMemory, Error> {
        self.built.memory.step.as_ref().ok_or_else(without_optimizer)
    }

    fn settings(&self) -> Result<&[(Optimizer, usize)], Error> {
        if let Job::Step(optimizers) = &self.built.job { Ok(optimizers) } else { Err(without_optimizer()) }
    }
}

fn without_optimizer() -> Error {
    Error::usage("the plan has no optimizer: PlanOptions::optimizer plans one")
}

/// A state without tensors, of these parameters.
fn described(optimizers: &[(Optimizer, usize)], all: &[&GpuTensor]) -> Result<OptimizerState<'static>, Error> {
    let mut rest = all.iter().copied();
    let groups: Vec<(Optimizer, Vec<Spec<'_>>)> = optimizers
        .iter()
        .map(|(optimizer, count)| (*optimizer, rest.by_ref().take(*count).map(GpuTensor::spec).collect()))
        .collect();
    OptimizerState::described(groups.into_iter().map(|(optimizer, specs)| (optimizer, specs.into_iter())))
}

/// Where a portion of a tensor of state lies in its block, in bytes.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    bytes: u64,
    /// The bytes before the first element, and the size of an element.
    skipped: usize,
    size: usize,
}

impl Place {
    /// The bytes of the portion's elements in the whole tensor.
    fn elements(&self, portion: &Portion) -> std::ops::Range<usize> {
        portion.elements.start as usize * self.size..portion.elements.end as usize * self.size
    }
}

/// The place of tensor number `tensor` of a portion.
fn place(portion: &Portion, tensor: usize) -> Place {
    if tensor as u64 == portion.kept.floats {
        let (word, words) = (portion.remainder_word(), portion.remainder_words());
        return Place { offset: 4 * word, bytes: 4 * words, skipped: 2 * usize::from(portion.kept.upper), size: 2 };
    }
    let word = portion.word + tensor as u64 * portion.len();
    Place { offset: 4 * word, bytes: 4 * portion.len(), skipped: 0, size: 4 }
}

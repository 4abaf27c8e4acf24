//! A built plan: its buffers, and the dispatches of each phase.

use bytemuck::Zeroable;

use super::clipper::GpuClipper;
use super::dispatch::{Dispatch, Pending};
use super::gather::{Gathered, Group, Job};
use super::memory::{Kept, Memory};
use super::params::Params;
use super::readback::LossRow;
use super::schedule::Schedule;
use super::step::StepMemory;
use super::table::{Origin, StateLayout};
use super::threshold::{DeviceThreshold, Rule, StateRow};
use crate::{Clip, Error};

#[derive(Debug)]
pub(super) struct Built {
    pub(super) groups: Vec<Group>,
    pub(super) job: Job,
    /// By [`Phase`](super::dispatch::Phase).
    pub(super) phases: [Vec<Dispatch>; 3],
    pub(super) memory: Memory,
    pub(super) origins: Vec<Origin>,
    /// The index of the partial of all groups.
    pub(super) everything: u32,
    pub(super) threshold: Option<DeviceThreshold>,
    /// The parameters of each group.
    params: Vec<wgpu::Buffer>,
    /// Where the state of an optimizer lies.
    pub(super) state: StateLayout,
}

impl Built {
    /// Builds a plan, in the memory of an earlier plan for tensors of the same shapes if there is one.
    pub(super) fn new(gpu: &GpuClipper, mut gathered: Gathered, earlier: Option<&Memory>) -> Result<Self, Error> {
        let schedule = Schedule::new(gpu, &mut gathered)?;
        let Gathered { buffers, groups, job, mut threshold, counts, .. } = gathered;
        let mut states = vec![StateRow::zeroed()];
        if let Some(threshold) = &mut threshold {
            let labels = groups[0].segments.labels(|i| groups[0].names[i].as_deref());
            let rows = threshold.start(&groups[0].clip, &labels)?;
            // No buffer may be empty, even if there are no tensors.
            states.splice(..usize::from(!rows.is_empty()), rows);
        }
        let kept = match (earlier, &job) {
            (Some(memory), _) => Kept::All(memory),
            (None, Job::Accumulate(accumulator)) => Kept::Results(&accumulator.results),
            (None, _) => Kept::Nothing,
        };
        let mut memory = Memory::new(&gpu.device, &groups, schedule.tree.partials, &states, kept)?;
        if let (Job::Step(optimizers), None) = (&job, &memory.step) {
            memory.step = Some(StepMemory::new(&gpu.device, optimizers, &schedule.state)?);
        }
        if counts && memory.losses.is_none() {
            memory.losses = Some(LossRow::buffer(&gpu.device, groups.len())?);
        }
        let rules: Vec<_> = groups.iter().map(|group| Rule::of(&group.clip, threshold.as_ref())).collect();
        let mut params = Vec::new();
        for (group, rule) in groups.iter().zip(&rules) {
            params.push(Params::new(group, &group.clip, schedule.everything, *rule).upload(&gpu.device)?);
        }
        let mut pending = Pending::new(gpu, schedule.limits);
        schedule.add_to(&mut pending, &groups, &job, &rules);
        let phases = pending.build(&buffers, &memory, &params)?;
        let Schedule { origins, everything, state, .. } = schedule;
        Ok(Self { groups, job, phases, memory, origins, everything, threshold, params, state })
    }

    /// Writes the groups' parameters for new clips.
    pub(super) fn write_params(&self, queue: &wgpu::Queue, clips: &[Clip]) {
        for ((group, clip), buffer) in self.groups.iter().zip(clips).zip(&self.params) {
            let rule = Rule::of(clip, self.threshold.as_ref());
            let params = Params::new(group, clip, self.everything, rule);
            queue.write_buffer(buffer, 0, bytemuck::bytes_of(&params));
        }
    }
}

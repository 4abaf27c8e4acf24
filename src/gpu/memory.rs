//! [`Memory`]: the buffers of a plan.

use super::device::GpuDevice;
use super::gather::Group;
use super::params::thresholds;
use super::readback::{OutcomeRow, PARTIAL_BYTES, ResultsHead};
use super::step::StepMemory;
use super::threshold::StateRow;
use crate::Error;

#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) partials: wgpu::Buffer,
    pub(super) results: wgpu::Buffer,
    pub(super) thresholds: wgpu::Buffer,
    pub(super) coefficients: wgpu::Buffer,
    /// The states of adaptive thresholds; one unused row if there are none.
    pub(super) states: wgpu::Buffer,
    /// What rounding loses in each group, if that is counted: a [`LossRow`](super::readback::LossRow) each.
    pub(super) losses: Option<wgpu::Buffer>,
    /// Of an optimizer.
    pub(super) step: Option<StepMemory>,
}

/// The buffers that a plan takes over.
#[derive(Clone, Copy)]
pub(super) enum Kept<'a> {
    Nothing,
    /// The results of the accumulator that it belongs to.
    Results(&'a wgpu::Buffer),
    /// All buffers of the same plan for other tensors, but new partials if these do not fit.
    All(&'a Memory),
}

impl Memory {
    pub(super) fn new(
        device: &GpuDevice,
        groups: &[Group],
        partials: u32,
        states: &[StateRow],
        kept: Kept<'_>,
    ) -> Result<Self, Error> {
        let read = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let bytes = u64::from(partials.max(1)) * PARTIAL_BYTES;
        let room = |kept: Option<&Self>| match kept {
            Some(memory) if memory.partials.size() >= bytes => Ok(memory.partials.clone()),
            _ => device.storage("gradclip partials", bytes, read | wgpu::BufferUsages::COPY_DST),
        };
        if let Kept::All(memory) = kept {
            return Ok(Self { partials: room(Some(memory))?, ..memory.clone() });
        }
        let given = groups.iter().any(|group| group.given);
        let thresholds = thresholds(groups.iter().map(|group| (&group.segments, &group.clip)), given);
        // One more than there are segments, so that no buffer is empty.
        let segments = 1 + groups.iter().map(|group| u64::from(group.segments.count)).sum::<u64>();
        let storage = wgpu::BufferUsages::STORAGE;
        let results_bytes = size_of::<ResultsHead>() as u64 + segments * size_of::<OutcomeRow>() as u64;
        Ok(Self {
            partials: room(None)?,
            results: match kept {
                Kept::Results(results) => results.clone(),
                _ => device.storage("gradclip results", results_bytes, read)?,
            },
            thresholds: device.filled("gradclip thresholds", bytemuck::cast_slice(&thresholds), storage)?,
            coefficients: device.storage("gradclip coefficients", 4 + 4 * segments, read)?,
            states: device.filled("gradclip states", bytemuck::cast_slice(states), read)?,
            losses: None,
            step: None,
        })
    }
}

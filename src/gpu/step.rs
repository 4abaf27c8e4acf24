//! The step of an optimizer on the device. Host side of `shaders/numbers.wgsl` and `shaders/step.wgsl`.

use bytemuck::{Pod, Zeroable};

use super::device::GpuDevice;
use super::dispatch::{part, whole};
use super::gather::Group;
use super::kernels::algorithm_code;
use super::number::Number;
use super::table::{Kept, Piece, StateLayout, StepPiece};
use super::tensor::GpuTensor;
use crate::optimizer::{Numbers, Rule};
use crate::{Error, Halves, Optimizer};

/// What groups bind one by one (settings, numbers, losses) lies so many bytes apart: every device can bind a buffer there.
pub(super) const GROUP_BYTES: u64 = 256;

/// The storage buffers that `step` binds.
pub(super) const STEP_BUFFERS: u32 = 5;

/// Twin of `Settings` in `shaders/shared/settings.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Settings {
    lr: Number,
    lr_decay: Number,
    mean_beta: [u32; 2],
    square_beta: [u32; 2],
    algorithm: u32,
    sign: f32,
    coupled_decay: f32,
    decay: f32,
    eps: f32,
    momentum: f32,
    undampened: f32,
    nesterov: u32,
    mean_part: f32,
    mean_of_old: u32,
    square_part: f32,
    square_of_old: u32,
    initial: f32,
    padding: [u32; 43],
}

const _: () = assert!(size_of::<Settings>() as u64 == GROUP_BYTES);

impl Settings {
    pub(super) fn new(optimizer: &Optimizer) -> Self {
        // What depends on the number of steps is computed on the device.
        let Numbers { sign, coupled_decay, rule, .. } = optimizer.numbers(1);
        let mut own = Self {
            lr: Number::product(optimizer.lr, 1.0),
            lr_decay: Number::product(optimizer.lr_decay.unwrap_or(0.0), 1.0),
            algorithm: algorithm_code(optimizer.algorithm),
            sign: sign as f32,
            coupled_decay: coupled_decay as f32,
            eps: optimizer.eps.unwrap_or(0.0) as f32,
            momentum: optimizer.momentum.unwrap_or(0.0) as f32,
            initial: optimizer.initial_accumulator_value.unwrap_or(0.0) as f32,
            ..Self::zeroed()
        };
        match rule {
            Rule::Sgd { undampened, nesterov, .. } => {
                (own.undampened, own.nesterov) = (undampened as f32, nesterov.into());
            }
            Rule::Adagrad { .. } => {}
            Rule::RmsProp { square, .. } => {
                // The averages of gradients and of their squares move alike.
                (own.mean_part, own.mean_of_old) = average(square);
                (own.square_part, own.square_of_old) = average(square);
            }
            Rule::Adam { decay, mean, square, .. } => {
                own.decay = decay as f32;
                (own.mean_part, own.mean_of_old) = average(mean);
                (own.square_part, own.square_of_old) = average(square);
                (own.mean_beta, own.square_beta) = (fraction(mean), fraction(square));
            }
        }
        own
    }
}

/// How far an average moves, and whether from the new value to the old. See `Average` in src/cpu/update.rs.
fn average(of: f64) -> (f32, u32) {
    (of.min(1.0 - of) as f32, u32::from(of < 0.5))
}

/// A number from 0 to below 1 in units of 2^-64, low word first.
fn fraction(x: f64) -> [u32; 2] {
    let units = (x * 2f64.powi(64)) as u64;
    [units as u32, (units >> 32) as u32]
}

/// Twin of `Count` in `shaders/numbers.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct CountRow {
    low: u32,
    high: u32,
    begun: u32,
    padding: u32,
}

impl CountRow {
    /// Of a state that holds what so many steps have left.
    pub(super) fn of(steps: u64) -> Self {
        Self { low: steps as u32, high: (steps >> 32) as u32, begun: 1, padding: 0 }
    }

    pub(super) fn steps(&self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }

    /// Whether the state holds anything.
    pub(super) fn has_begun(&self) -> bool {
        self.begun != 0
    }
}

/// The buffers of an optimizer.
#[derive(Clone, Debug)]
pub(super) struct StepMemory {
    pub(super) count: wgpu::Buffer,
    /// By group of settings.
    pub(super) settings: wgpu::Buffer,
    pub(super) numbers: wgpu::Buffer,
    /// The state.
    pub(super) blocks: Vec<wgpu::Buffer>,
}

impl StepMemory {
    pub(super) fn new(
        device: &GpuDevice,
        optimizers: &[(Optimizer, usize)],
        layout: &StateLayout,
    ) -> Result<Self, Error> {
        let (storage, read) = (wgpu::BufferUsages::STORAGE, wgpu::BufferUsages::COPY_SRC);
        let (uniform, write) = (wgpu::BufferUsages::UNIFORM, wgpu::BufferUsages::COPY_DST);
        let groups = optimizers.len().max(1) as u64;
        let block = |words: &u64| device.storage("gradclip state", (4 * words).max(4), storage | read | write);
        let memory = Self {
            count: device.storage("gradclip count", size_of::<CountRow>() as u64, storage | read | write)?,
            settings: device.storage("gradclip settings", groups * GROUP_BYTES, storage | uniform | write)?,
            numbers: device.storage("gradclip numbers", groups * GROUP_BYTES, storage | uniform)?,
            blocks: layout.blocks.iter().map(block).collect::<Result<_, _>>()?,
        };
        memory.write_settings(device, optimizers)?;
        Ok(memory)
    }

    /// What `numbers` binds.
    pub(super) fn of_numbers(&self) -> [Vec<wgpu::BufferBinding<'_>>; 3] {
        [whole(&self.settings), whole(&self.numbers), whole(&self.count)]
    }

    /// What `step` binds behind its windows.
    pub(super) fn of_step(&self, block: usize, group: usize) -> [Vec<wgpu::BufferBinding<'_>>; 3] {
        let place = group as u64 * GROUP_BYTES;
        let [settings, numbers] = [&self.settings, &self.numbers].map(|buffer| vec![part(buffer, place, GROUP_BYTES)]);
        [whole(&self.blocks[block]), settings, numbers]
    }

    pub(super) fn write_settings(&self, device: &GpuDevice, optimizers: &[(Optimizer, usize)]) -> Result<(), Error> {
        let settings: Vec<_> = optimizers.iter().map(|(optimizer, _)| Settings::new(optimizer)).collect();
        device.scoped(|| device.queue.write_buffer(&self.settings, 0, bytemuck::cast_slice(&settings)))
    }
}

/// The parameters of all groups, in order, each with the place of its settings.
pub(super) fn parameters<'g>(
    groups: &'g [Group],
    optimizers: &'g [(Optimizer, usize)],
) -> impl Iterator<Item = (&'g GpuTensor, usize)> {
    let places = optimizers.iter().enumerate().flat_map(|(place, (_, count))| std::iter::repeat_n(place, *count));
    groups.iter().flat_map(|group| &group.of_parameters).zip(places)
}

/// What an optimizer keeps of a parameter.
pub(super) fn kept(optimizer: &Optimizer, parameter: &GpuTensor) -> Kept {
    let sizes = optimizer.state_tensors(parameter.spec.dtype).into_iter().map(|tensor| tensor.element_size);
    let (floats, remainders): (Vec<_>, Vec<_>) = sizes.partition(|size| *size == 4);
    let remainders = !remainders.is_empty();
    Kept { floats: floats.len() as u64, remainders, upper: remainders && parameter.start % 2 == 1 }
}

/// Where the state of all parameters lies, in blocks of at most so many words.
pub(super) fn layout(groups: &[Group], optimizers: &[(Optimizer, usize)], most: u64) -> StateLayout {
    let of = |(t, place): (&GpuTensor, usize)| (t.spec.len, kept(&optimizers[place].0, t));
    StateLayout::new(&parameters(groups, optimizers).map(of).collect::<Vec<_>>(), most)
}

/// Every piece of a parameter with its gradients and its state.
pub(super) fn pieces<'l>(
    groups: &[Group],
    optimizers: &[(Optimizer, usize)],
    layout: &'l StateLayout,
) -> Vec<StepPiece<'l>> {
    let places: Vec<_> = parameters(groups, optimizers).map(|(_, place)| place).collect();
    let (mut found, mut first) = (Vec::new(), 0);
    for (clip, group) in groups.iter().enumerate() {
        for (gradient, parameter) in group.pieces.iter().zip(&group.parameters) {
            let number = first + gradient.tensor;
            for state in layout.of(number) {
                let from = state.elements.start.max(gradient.first_element);
                let to = state.elements.end.min(gradient.first_element + gradient.len);
                if from >= to {
                    continue;
                }
                let part = |of: &Piece| Piece { start: of.at(from), len: to - from, first_element: from, ..*of };
                let mut gradient = part(gradient);
                gradient.layout.segment += group.first_segment;
                let (parameter, optimizer) = (part(parameter), places[number]);
                found.push(StepPiece { gradient, parameter, state, clip, optimizer });
            }
        }
        first += group.names.len();
    }
    found
}

/// Whether the state of one fits the other: remainders stay in the halves of words that they are of.
pub(super) fn is_placed_as(optimizers: &[(Optimizer, usize)], groups: &[Group], others: &[Group]) -> bool {
    let halves = |groups: &[Group]| {
        let of = |(t, place): (&GpuTensor, usize)| (optimizers[place].0.halves == Halves::Remainder, t.start % 2);
        parameters(groups, optimizers).map(of).filter(|(remainder, _)| *remainder).collect::<Vec<_>>()
    };
    halves(groups) == halves(others)
}

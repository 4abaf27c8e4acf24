//! What is learned: prose, character by character, or a sum over a long sequence.

use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::settings::{Settings, Task};

/// "Emma" by Jane Austen, 1815; `emma.md` says more.
const TEXT: &str = include_str!("emma.txt");

/// Sequences, time first: inputs of shape [unroll, batch, inputs].
pub(crate) struct Batch {
    pub(crate) inputs: Tensor<3>,
    pub(crate) targets: Targets,
}

pub(crate) enum Targets {
    /// The next character at every place, shape [unroll · batch].
    Characters(Tensor<1, Int>),
    /// One number a sequence, shape [batch, 1].
    Numbers(Tensor<2>),
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Split {
    Training,
    HeldOut,
}

/// Where batches come from.
pub(crate) struct Data {
    task: Task,
    batch_size: usize,
    unroll: usize,
    /// The text, as places in `alphabet`.
    text: Vec<usize>,
    alphabet: Vec<u8>,
}

impl Data {
    pub(crate) fn new(settings: &Settings) -> Self {
        let mut alphabet = TEXT.as_bytes().to_vec();
        alphabet.sort_unstable();
        alphabet.dedup();
        let text = TEXT.bytes().filter_map(|byte| alphabet.binary_search(&byte).ok()).collect();
        Self { task: settings.task, batch_size: settings.batch_size, unroll: settings.unroll, text, alphabet }
    }

    /// The longest sequence that each part of the text holds.
    pub(crate) fn longest() -> usize {
        TEXT.len() - held_out() - 1
    }

    /// How many inputs and outputs the network has.
    pub(crate) fn widths(&self) -> (usize, usize) {
        match self.task {
            Task::Text => (self.alphabet.len(), self.alphabet.len()),
            Task::Regression => (2, 1),
        }
    }

    /// The next batch. All that it depends on is the state of `random`, which is thus the run's place in the data.
    pub(crate) fn batch(&self, random: &mut Random, split: Split, device: &Device) -> Batch {
        match self.task {
            Task::Text => self.characters(random, split, device),
            Task::Regression => self.adding(random, device),
        }
    }

    /// Pieces of the text from random places.
    fn characters(&self, random: &mut Random, split: Split, device: &Device) -> Batch {
        let (first, end) = match split {
            Split::Training => (0, held_out()),
            Split::HeldOut => (held_out(), self.text.len()),
        };
        let (batch, unroll, characters) = (self.batch_size, self.unroll, self.alphabet.len());
        let mut inputs = vec![0.0_f32; unroll * batch * characters];
        let mut targets = vec![0_i32; unroll * batch];
        for sequence in 0..batch {
            let start = first + random.below(end - first - unroll);
            for time in 0..unroll {
                let place = time * batch + sequence;
                inputs[place * characters + self.text[start + time]] = 1.0;
                targets[place] = self.text[start + time + 1] as i32;
            }
        }
        Batch {
            inputs: Tensor::from_data(TensorData::new(inputs, [unroll, batch, characters]), device),
            targets: Targets::Characters(Tensor::from_data(TensorData::new(targets, [unroll * batch]), device)),
        }
    }

    /// The adding problem (Hochreiter, Schmidhuber 1997, "Long Short-Term Memory"): numbers in 0..1, of which one in
    /// each half of the sequence is marked; the target is the sum of the two.
    fn adding(&self, random: &mut Random, device: &Device) -> Batch {
        let (batch, unroll) = (self.batch_size, self.unroll);
        let mut inputs = vec![0.0_f32; unroll * batch * 2];
        let mut targets = vec![0.0_f32; batch];
        for (sequence, target) in targets.iter_mut().enumerate() {
            let half = unroll / 2;
            let marked = [random.below(half), half + random.below(unroll - half)];
            for time in 0..unroll {
                let at = 2 * (time * batch + sequence);
                inputs[at] = random.unit();
                if marked.contains(&time) {
                    inputs[at + 1] = 1.0;
                    *target += inputs[at];
                }
            }
        }
        Batch {
            inputs: Tensor::from_data(TensorData::new(inputs, [unroll, batch, 2]), device),
            targets: Targets::Numbers(Tensor::from_data(TensorData::new(targets, [batch, 1]), device)),
        }
    }
}

/// Where the held-out tenth of the text begins.
fn held_out() -> usize {
    TEXT.len() / 10 * 9
}

/// SplitMix64 (Steele, Lea, Flood 2014): a state that a checkpoint holds as one number.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// A number in 0..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }
}

//! What a device and its tuning ask of the tables.

use super::super::tuning::{LANE_COLUMN, LANE_ROW, Tuning};

/// What a device and its tuning ask of the tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) chunk_words: u32,
    /// The largest binding, in bytes, and what offsets of bindings must be multiples of.
    pub(crate) binding_bytes: u64,
    pub(crate) alignment: u64,
    /// Invocations in a workgroup, and so segments in a chunk at most.
    pub(crate) workgroup: u32,
    /// Rows of so many elements and fewer are measured by one invocation each.
    pub(crate) lane_row: u32,
    /// So many elements of a column are measured by one invocation.
    pub(crate) lane_column: u32,
    /// How many windows can be bound at once.
    pub(crate) windows: usize,
}

impl Limits {
    /// What follows for a set of so many words from a tuning, a device's largest binding and alignment, and how many windows
    /// it binds at once.
    pub(crate) fn new(tuning: &Tuning, words: u64, (largest_binding, alignment): (u64, u64), windows: usize) -> Self {
        let binding_bytes = largest_binding & !3;
        // A chunk must fit into a binding wherever it starts.
        let fitting = (binding_bytes - alignment) / 4;
        Self {
            chunk_words: tuning.chunk_words(words).min(u32::try_from(fitting).unwrap_or(u32::MAX)) & !3,
            binding_bytes,
            alignment,
            workgroup: tuning.workgroup,
            lane_row: LANE_ROW,
            lane_column: LANE_COLUMN,
            windows,
        }
    }

    /// How many rows of a table can be bound.
    pub(crate) fn rows<T>(&self) -> usize {
        usize::try_from((self.binding_bytes - 4) / size_of::<T>() as u64).unwrap_or(usize::MAX)
    }
}

/// So many workgroups in two dimensions, of which a device allows so many in each. None if it cannot hold them.
pub(crate) fn grid(workgroups: u32, widest: u32) -> Option<(u32, u32)> {
    let x = workgroups.clamp(1, widest);
    let y = workgroups.div_ceil(x);
    (y <= widest).then_some((x, y))
}

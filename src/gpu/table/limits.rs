//! [`Limits`] of tables.

use super::super::tuning::{LANE_COLUMN, LANE_ROW, LONG_ROW, Tuning};

/// What a device and its tuning demand of tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) chunk_words: u32,
    /// The largest binding, in bytes, and what offsets of bindings must be multiples of.
    pub(crate) binding_bytes: u64,
    pub(crate) alignment: u64,
    /// Invocations in a workgroup: the most segments in a chunk.
    pub(crate) workgroup: u32,
    /// Rows of at most this many elements are measured by one invocation each.
    pub(crate) lane_row: u32,
    /// Rows of at least this many words are scaled by workgroups of their own.
    pub(crate) long_row: u32,
    /// One invocation measures this many elements of a column.
    pub(crate) lane_column: u32,
    /// How many windows can be bound at once.
    pub(crate) windows: usize,
}

impl Limits {
    /// The limits for a set of `words` words, given a device's largest binding and alignment, and the windows that it
    /// binds.
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
            long_row: LONG_ROW * tuning.workgroup,
            lane_column: LANE_COLUMN,
            windows,
        }
    }

    /// How many rows of a table can be bound.
    pub(crate) fn rows<T>(&self) -> usize {
        usize::try_from((self.binding_bytes - 4) / size_of::<T>() as u64).unwrap_or(usize::MAX)
    }
}

/// Arranges workgroups in two dimensions of at most `widest` each. None if they do not fit.
pub(crate) fn grid(workgroups: u32, widest: u32) -> Option<(u32, u32)> {
    let x = workgroups.clamp(1, widest);
    let y = workgroups.div_ceil(x);
    (y <= widest).then_some((x, y))
}

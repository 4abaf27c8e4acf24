//! The rows that kernels read, and their uses.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::Dtype;

/// Twin of `Chunk` in `shaders/shared/chunk.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct ChunkRow {
    pub(crate) window: u32,
    pub(crate) first: u32,
    pub(crate) elements: u32,
    pub(crate) segment: u32,
    pub(crate) column: u32,
    pub(crate) columns: u32,
    pub(crate) origin: u32,
    pub(crate) origin_element: u32,
    pub(crate) slot: u32,
    pub(crate) count: u32,
    pub(crate) segment_stride: u32,
    pub(crate) element_stride: u32,
    pub(crate) slot_stride: u32,
    pub(crate) next: u32,
}

/// Twin of `Row` in `shaders/step.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct StepRow {
    pub(crate) gradient: u32,
    pub(crate) parameter: u32,
    pub(crate) elements: u32,
    pub(crate) state: u32,
    pub(crate) stride: u32,
    pub(crate) kept: u32,
    pub(crate) segment: u32,
    pub(crate) column: u32,
    pub(crate) columns: u32,
    pub(crate) by_column: u32,
    pub(crate) next: u32,
}

/// Twin of `Edge` in `shaders/edges.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct EdgeRow {
    pub(crate) word: u32,
    pub(crate) low: u32,
    pub(crate) high: u32,
    pub(crate) dtypes: u32,
    pub(crate) window: u32,
}

/// `NOWHERE` of the shaders.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// Twin of the `DTYPE_*` constants in `shaders/shared/half.wgsl`. None for dtypes without a kernel.
pub(crate) fn dtype_code(dtype: Dtype) -> Option<u32> {
    match dtype {
        Dtype::F32 => Some(0),
        Dtype::F16 => Some(1),
        Dtype::BF16 => Some(2),
        Dtype::F64 => None,
    }
}

/// What the rows of a table are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Use {
    /// Runs of one segment, to be measured and scaled.
    Whole,
    /// Runs of one segment, to be measured.
    Run,
    /// Rows or columns, to be measured by an invocation each.
    Each,
    /// Runs over many segments, rows or columns, to be scaled.
    Mixed { columns: bool },
}

impl Use {
    pub(crate) fn is_mixed(self) -> bool {
        matches!(self, Self::Mixed { .. })
    }
}

/// The part of a buffer that is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) buffer: usize,
    /// In bytes from the start of the buffer.
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

impl Window {
    /// The smallest window of these bytes that can be bound, given the alignment of offsets.
    pub(super) fn of(buffer: usize, bytes: &Range<u64>, alignment: u64) -> Self {
        let offset = bytes.start - bytes.start % alignment;
        Self { buffer, offset, size: bytes.end - offset }
    }
}

/// The bytes of the 32-bit words that elements of a buffer touch.
pub(super) fn bytes_of_words(elements: Range<u64>, dtype: Dtype) -> Range<u64> {
    let size = dtype.size() as u64;
    elements.start * size / 4 * 4..(elements.end * size).next_multiple_of(4)
}

/// Windows that are bound together, and the tables of their chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) windows: Vec<Window>,
    /// A table for each use and dtype that occurs, or several if one is too large to bind. Each is a dispatch.
    pub(crate) tables: Vec<((Use, Dtype), Table)>,
    pub(crate) edges: Vec<EdgeRow>,
}

/// Twin of `Table` in `shaders/shared/chunk.wgsl`: the first chunk of each task, then all others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) tasks: u32,
    pub(crate) chunks: Vec<ChunkRow>,
}

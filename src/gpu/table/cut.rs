//! Cuts pieces into chunks.

use std::ops::Range;

use super::limits::Limits;
use super::piece::{Origin, Piece};
use super::rows::{ChunkRow, NOWHERE, Use};
use crate::Dtype;
use crate::segment::{By, SegmentLayout};

/// Elements from one origin to the next; a chunk that begins before the next may end behind it.
const ORIGIN_SPAN: u64 = 1 << 31;

/// A chunk. Its place in a window is set once there are windows.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    pub(super) buffer: usize,
    pub(super) dtype: Dtype,
    pub(super) use_: Use,
    /// The first element and one past the last, counted from the start of the buffer.
    pub(super) first: u64,
    pub(super) end: u64,
    pub(super) batch: usize,
    pub(super) row: ChunkRow,
}

impl Cut {
    /// Gives each segment of the chunk the next of its slots. A chunk knows the first slot and the distance to the next
    /// segment's, so it is cut where that distance changes.
    pub(super) fn placed(self, next: &mut [u32]) -> Vec<Self> {
        let mut placed = Vec::new();
        let mut from = 0;
        while from < next.len() {
            let stride = next.get(from + 1).map_or(0, |second| second - next[from]);
            let even = next[from..].windows(2).take_while(|pair| pair[1] - pair[0] == stride).count();
            let count = even + 1;
            // Offsets within a window fit into 32 bits.
            let skipped = from as u32 * self.row.segment_stride;
            let row = ChunkRow {
                first: self.row.first + skipped,
                segment: self.row.segment + from as u32,
                origin_element: self.row.origin_element + skipped,
                slot: next[from],
                count: count as u32,
                slot_stride: stride,
                ..self.row
            };
            placed.push(Self { row, ..self });
            from += count;
        }
        for slot in next {
            *slot += 1;
        }
        placed
    }
}

pub(super) struct Cutter {
    pub(super) limits: Limits,
    pub(super) cuts: Vec<Cut>,
    pub(super) origins: Vec<Origin>,
    pub(super) first_origin: u32,
}

impl Cutter {
    pub(super) fn cut(&mut self, piece: &Piece, measures_only: bool) -> Option<()> {
        let all = piece.first_element..piece.first_element + piece.len;
        let mut from = all.start;
        while from < all.end {
            self.origins.push(Origin { tensor: piece.tensor, first_element: from });
            // At the beginning of a quad, so that no word has two writers.
            let to = all.end.min(from + ORIGIN_SPAN - piece.at(from) % piece.per_quad());
            self.cut_from_origin(piece, from..to, measures_only)?;
            from = to;
        }
        Some(())
    }

    /// Cuts elements of a piece's tensor that are counted from one origin.
    fn cut_from_origin(&mut self, piece: &Piece, elements: Range<u64>, measures_only: bool) -> Option<()> {
        let SegmentLayout { by, columns, .. } = piece.layout;
        let origin = elements.start;
        let chunk_words = self.limits.chunk_words;
        if by == By::Whole {
            for run in piece.runs(elements, chunk_words) {
                self.run(piece, Use::Whole, origin, run)?;
            }
            return Some(());
        }
        let long = by == By::Rows && self.is_long(piece);
        let of_row = if long { Use::Whole } else { Use::Run };
        if !measures_only && !long {
            for run in piece.runs(elements.clone(), chunk_words) {
                self.run(piece, Use::Mixed { columns: by == By::Columns }, origin, run)?;
            }
        }
        // Whole rows, and parts of rows before and behind them.
        let first_row = elements.start.next_multiple_of(columns).min(elements.end);
        let last_row = (elements.end / columns * columns).max(first_row);
        self.row(piece, of_row, origin, elements.start..first_row)?;
        if by == By::Columns {
            self.columns(piece, origin, first_row..last_row)?;
        } else if long || columns > u64::from(self.limits.lane_row) {
            for row in (first_row..last_row).step_by(columns as usize) {
                self.row(piece, of_row, origin, row..row + columns)?;
            }
        } else {
            let rows = (last_row - first_row) / columns;
            let fitting = (self.limits.binding_bytes - self.limits.alignment) / (columns * piece.dtype.size() as u64);
            let rows_at_once = fitting.clamp(1, self.limits.workgroup.into());
            for row in (0..rows).step_by(rows_at_once as usize) {
                let count = (rows - row).min(rows_at_once);
                self.each(piece, origin, first_row + row * columns, (count, columns), (columns, 1))?;
            }
        }
        self.row(piece, of_row, origin, last_row..elements.end)
    }

    /// Whether rows are worth a workgroup each, and no word holds elements of two rows.
    fn is_long(&self, piece: &Piece) -> bool {
        let in_word = 4 / piece.dtype.size() as u64;
        let columns = piece.layout.columns;
        let first_row = piece.first_element.next_multiple_of(columns);
        columns / in_word >= self.limits.long_row.into()
            && columns.is_multiple_of(in_word)
            && (first_row - piece.first_element + piece.start).is_multiple_of(in_word)
    }

    /// A row, or part of one.
    fn row(&mut self, piece: &Piece, use_: Use, origin: u64, elements: Range<u64>) -> Option<()> {
        if piece.layout.by == By::Columns {
            for first in elements.clone().step_by(self.limits.workgroup as usize) {
                let count = (elements.end - first).min(self.limits.workgroup.into());
                self.each(piece, origin, first, (count, 1), (1, 1))?;
            }
        } else if !elements.is_empty() {
            for run in piece.runs(elements, self.limits.chunk_words) {
                self.run(piece, use_, origin, run)?;
            }
        }
        Some(())
    }

    /// Whole rows, column by column.
    fn columns(&mut self, piece: &Piece, origin: u64, elements: Range<u64>) -> Option<()> {
        let columns = piece.layout.columns;
        // From its first element to its last, a chunk must fit into a window, wherever it begins.
        let fitting = (self.limits.binding_bytes - self.limits.alignment) / (columns * piece.dtype.size() as u64);
        let rows_at_once = fitting.clamp(1, self.limits.lane_column.into());
        for top in elements.clone().step_by((rows_at_once * columns) as usize) {
            let rows = rows_at_once.min((elements.end - top) / columns);
            for left in (0..columns).step_by(self.limits.workgroup as usize) {
                let count = (columns - left).min(self.limits.workgroup.into());
                self.each(piece, origin, top + left, (count, rows), (1, columns))?;
            }
        }
        Some(())
    }

    fn run(&mut self, piece: &Piece, use_: Use, origin: u64, run: Range<u64>) -> Option<()> {
        let SegmentLayout { by, segment, .. } = piece.layout;
        let (column, columns) = piece.column_of(run.start);
        let segment = if by == By::Rows { piece.layout.segment_of(run.start) } else { segment };
        let narrow = |x: u64| u32::try_from(x).ok();
        let row = ChunkRow {
            elements: narrow(run.end - run.start)?,
            segment,
            column,
            columns,
            origin: self.origin()?,
            origin_element: narrow(run.start - origin)?,
            slot: NOWHERE,
            count: 1,
            ..ChunkRow::default()
        };
        let (first, end) = (piece.at(run.start), piece.at(run.end));
        self.cuts.push(Cut { buffer: piece.buffer, dtype: piece.dtype, use_, first, end, batch: 0, row });
        Some(())
    }

    /// Adds `count` segments of `elements` elements each, from `element` on, with their strides.
    fn each(
        &mut self,
        piece: &Piece,
        origin: u64,
        element: u64,
        (count, elements): (u64, u64),
        (segment_stride, element_stride): (u64, u64),
    ) -> Option<()> {
        let narrow = |x: u64| u32::try_from(x).ok();
        let row = ChunkRow {
            elements: narrow(elements)?,
            segment: piece.layout.segment_of(element),
            origin: self.origin()?,
            origin_element: narrow(element - origin)?,
            slot: NOWHERE,
            count: narrow(count)?,
            segment_stride: narrow(segment_stride)?,
            element_stride: narrow(element_stride)?,
            ..ChunkRow::default()
        };
        let first = piece.at(element);
        let end = first + (count - 1) * segment_stride + (elements - 1) * element_stride + 1;
        self.cuts.push(Cut { buffer: piece.buffer, dtype: piece.dtype, use_: Use::Each, first, end, batch: 0, row });
        Some(())
    }

    fn origin(&self) -> Option<u32> {
        u32::try_from(self.origins.len() - 1).ok()?.checked_add(self.first_origin)
    }
}

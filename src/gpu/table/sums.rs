//! Cuts sums of examples.

use std::ops::Range;

use super::limits::Limits;
use super::piece::Piece;
use super::rows::{ChunkRow, Table, Window, bytes_of_words};
use crate::Dtype;

/// The most examples that one invocation adds up: llvmpipe silently ends loops after 65,535 iterations.
pub(crate) const SUMMED_ROWS: u64 = 1 << 15;

/// A dispatch of `sum`: rows of a table, with the windows of the examples and of the sums that they use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SumWindow {
    pub(crate) dtype: Dtype,
    /// None if there are no examples, and nothing to read.
    pub(crate) examples: Option<Window>,
    pub(crate) sums: Window,
    pub(crate) table: Table,
}

/// Cuts sums of examples. Each piece of a tensor of examples comes with the piece of its sums. Pieces of one tensor
/// must be in order. None if the device cannot bind a row.
pub(crate) fn sum_windows(pieces: &[(Piece, Piece)], limits: Limits) -> Option<Vec<SumWindow>> {
    let mut found = Vec::new();
    for (of, into) in pieces {
        let columns = into.len;
        let all = of.first_element..of.first_element + of.len;
        if columns == 0 {
            continue;
        }
        if of.len == 0 {
            add_sums(&mut found, (of, into), (0..columns, 0..0), limits)?;
            continue;
        }
        // Part of a row, whole rows, part of a row.
        let first_row = all.start.next_multiple_of(columns).min(all.end);
        let last_row = (all.end / columns * columns).max(first_row);
        for part in [all.start..first_row, last_row..all.end] {
            if !part.is_empty() {
                let (row, column) = (part.start / columns, part.start % columns);
                let end = column + (part.end - part.start);
                add_sums(&mut found, (of, into), (column..end, row..row + 1), limits)?;
            }
        }
        if first_row < last_row {
            add_sums(&mut found, (of, into), (0..columns, first_row / columns..last_row / columns), limits)?;
        }
    }
    // The first row starts a sum, and must come before those that add to it.
    found.sort_by_key(|(tensor, first_row, _)| (*tensor, *first_row));
    Some(found.into_iter().map(|(.., window)| window).collect())
}

/// Adds a rectangle of columns and rows, in bands that can be bound.
fn add_sums(
    found: &mut Vec<(usize, u64, SumWindow)>,
    (of, into): (&Piece, &Piece),
    (columns, rows): (Range<u64>, Range<u64>),
    limits: Limits,
) -> Option<()> {
    let fitting = limits.binding_bytes - limits.alignment;
    let (size, stride) = (of.dtype.size() as u64, into.len);
    let rows_at_once = (fitting / (stride * size)).clamp(1, SUMMED_ROWS);
    // One word more, for an element that begins in the middle of one.
    let columns_at_once = ((fitting - 4) / 4).min(columns.end - columns.start);
    let window = |of: &Piece, elements| Window::of(of.buffer, &bytes_of_words(elements, of.dtype), limits.alignment);
    for left in columns.clone().step_by(columns_at_once as usize) {
        let right = columns.end.min(left + columns_at_once);
        let sums = window(into, into.start + left..into.start + right);
        let mut top = rows.start;
        loop {
            let bottom = rows.end.min(top + rows_at_once);
            let at = |row: u64, column: u64| of.at(row * stride + column);
            let examples = (bottom > top).then(|| window(of, at(top, left)..at(bottom - 1, right - 1) + 1));
            let narrow = |x: u64| u32::try_from(x).ok();
            let mut chunks = Vec::new();
            for column in (left..right).step_by(limits.workgroup as usize) {
                let count = (right - column).min(limits.workgroup.into());
                let first = examples.map_or(0, |w| at(top, column) - w.offset / size);
                chunks.push(ChunkRow {
                    first: narrow(first)?,
                    elements: narrow(bottom - top)?,
                    segment: of.layout.segment + narrow(top)?,
                    column: u32::from(top > 0),
                    slot: narrow(into.start + column - sums.offset / 4)?,
                    count: narrow(count)?,
                    segment_stride: 1,
                    element_stride: narrow(stride)?,
                    ..ChunkRow::default()
                });
            }
            for chunks in chunks.chunks(limits.rows::<ChunkRow>()) {
                let table = Table { tasks: narrow(chunks.len() as u64)?, chunks: chunks.to_vec() };
                found.push((of.tensor, top, SumWindow { dtype: of.dtype, examples, sums, table }));
            }
            top = bottom;
            if top >= rows.end {
                break;
            }
        }
    }
    Some(())
}

//! The words that half-precision tensors share.

use std::collections::BTreeMap;

use super::piece::Piece;
use super::rows::{Batch, EdgeRow, NOWHERE, Window, dtype_code};

/// Lists the words that hold an element of half precision and something not of its tensor, each in its window.
pub(super) fn add_edges(batches: &mut [Batch], pieces: &[Piece]) {
    let mut edges: BTreeMap<(usize, u64), EdgeRow> = BTreeMap::new();
    for piece in pieces.iter().filter(|p| p.len > 0 && p.dtype.size() == 2) {
        let Some(code) = dtype_code(piece.dtype) else { continue };
        let (start, end) = (piece.start, piece.start + piece.len);
        let nobody = EdgeRow { word: 0, low: NOWHERE, high: NOWHERE, dtypes: 0, window: 0 };
        if start % 2 == 1 {
            let edge = edges.entry((piece.buffer, start / 2)).or_insert(nobody);
            edge.high = piece.layout.segment_of(piece.first_element);
            edge.dtypes |= code << 8;
        }
        if end % 2 == 1 {
            let edge = edges.entry((piece.buffer, end / 2)).or_insert(nobody);
            edge.low = piece.layout.segment_of(piece.first_element + piece.len - 1);
            edge.dtypes |= code;
        }
    }
    let mut windows = Vec::new();
    for (b, batch) in batches.iter().enumerate() {
        windows.extend(batch.windows.iter().zip(0..).map(|(window, i)| (*window, b, i)));
    }
    for ((buffer, word), edge) in edges {
        // The last window that starts at or before the word holds it, or else the one before: windows are in order,
        // and overlap only where one begins at an aligned offset inside the end of another.
        let after = windows.partition_point(|(w, ..)| (w.buffer, w.offset / 4) <= (buffer, word));
        let holds = |(w, ..): &&(Window, usize, u32)| w.buffer == buffer && (word + 1) * 4 <= w.offset + w.size;
        if let Some((of, batch, window)) = windows[..after].iter().rev().find(holds) {
            // A window is below 2^31 bytes.
            let word = (word - of.offset / 4) as u32;
            batches[*batch].edges.push(EdgeRow { word, window: *window, ..edge });
        }
    }
}

//! The tables that a plan gives to the kernels: which words of which buffer each workgroup reads, what it may write,
//! and which partials merge. Pure arithmetic on sizes, so that it can be tested at any size without a device.
//!
//! - A *piece* is a run of elements in one buffer, and a run of elements of one tensor. Tensors in GPU memory are one
//!   piece each; host tensors larger than a buffer are several.
//! - A *chunk* is part of a piece, for one workgroup. Partials are in chunk order, which is list order.
//! - A *window* is the part of one buffer that is bound in a dispatch. Offsets are 64-bit up to here; within a window
//!   they count 32-bit words: a binding is at most 2^31 - 1 bytes, so fewer than 2^29 words.

use std::collections::BTreeMap;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::tuning::MERGED_PARTIALS;
use crate::Dtype;

/// A run of elements in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which buffer, by its place in the plan's list.
    pub(super) buffer: usize,
    pub(super) dtype: Dtype,
    /// The first element, counted from the start of the buffer.
    pub(super) start: u64,
    pub(super) len: u64,
    /// Which tensor the elements belong to, and the place of the first of them in it.
    pub(super) tensor: usize,
    pub(super) first_element: u64,
    pub(super) segment: u32,
}

impl Piece {
    fn words(&self) -> Range<u64> {
        let bytes = self.bytes();
        bytes.start / 4..bytes.end.div_ceil(4)
    }

    pub(super) fn bytes(&self) -> Range<u64> {
        let size = self.dtype.size() as u64;
        self.start * size..(self.start + self.len) * size
    }
}

/// Twin of `Chunk` in `shaders/shared/chunk.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct ChunkRow {
    pub(super) word: u32,
    pub(super) words: u32,
    pub(super) skip: u32,
    pub(super) elements: u32,
    pub(super) own_from: u32,
    pub(super) own_to: u32,
    pub(super) partial: u32,
    pub(super) segment: u32,
}

/// Twin of `Edge` in `shaders/edges.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct EdgeRow {
    pub(super) word: u32,
    pub(super) low: u32,
    pub(super) high: u32,
    pub(super) dtypes: u32,
}

/// `NOWHERE` of the shaders.
pub(super) const NOWHERE: u32 = u32::MAX;

/// Twin of `MergeRow` in `shaders/merge.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct MergeRow {
    pub(super) from: u32,
    pub(super) count: u32,
    pub(super) into: u32,
    padding: u32,
}

/// Twin of the `DTYPE_*` constants in `shaders/shared/half.wgsl`. None for dtypes without a kernel.
pub(super) fn dtype_code(dtype: Dtype) -> Option<u32> {
    match dtype {
        Dtype::F32 => Some(0),
        Dtype::F16 => Some(1),
        Dtype::BF16 => Some(2),
        Dtype::F64 => None,
    }
}

/// What is bound together, and the rows that lie in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) buffer: usize,
    /// In bytes from the start of the buffer.
    pub(super) offset: u64,
    pub(super) size: u64,
    /// One table for each dtype that occurs: each is a dispatch.
    pub(super) chunks: Vec<(Dtype, Vec<ChunkRow>)>,
    pub(super) edges: Vec<EdgeRow>,
}

/// Where the elements of a chunk are in the caller's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkOrigin {
    pub(super) tensor: usize,
    pub(super) first_element: u64,
}

/// What a device and its tuning ask of the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) chunk_words: u32,
    /// The largest binding, in bytes, and what offsets of bindings must be multiples of.
    pub(super) binding_bytes: u64,
    pub(super) alignment: u64,
}

/// Cuts pieces into chunks and gathers those in windows. Pieces must be in list order and must not overlap.
pub(super) fn windows(pieces: &[Piece], limits: Limits) -> (Vec<Window>, Vec<ChunkOrigin>) {
    let mut origins = Vec::new();
    let mut cuts = Vec::new();
    for piece in pieces.iter().filter(|p| p.len > 0) {
        let words = piece.words();
        for word in words.clone().step_by(limits.chunk_words as usize) {
            let cut = Cut {
                piece,
                words: word..words.end.min(word + u64::from(limits.chunk_words)),
                partial: u32::try_from(origins.len()).unwrap_or(NOWHERE),
            };
            let first_element = piece.first_element + (cut.elements().start - piece.start);
            origins.push(ChunkOrigin { tensor: piece.tensor, first_element });
            cuts.push(cut);
        }
    }
    cuts.sort_by_key(|cut| (cut.piece.buffer, cut.words.start));
    let mut windows: Vec<Window> = Vec::new();
    for cut in &cuts {
        let (buffer, dtype) = (cut.piece.buffer, cut.piece.dtype);
        let bytes = cut.words.start * 4..cut.words.end * 4;
        let fits = |w: &&mut Window| w.buffer == buffer && bytes.end - w.offset <= limits.binding_bytes;
        let window = if let Some(window) = windows.last_mut().filter(fits) {
            window.size = window.size.max(bytes.end - window.offset);
            window
        } else {
            let offset = bytes.start - bytes.start % limits.alignment;
            let size = bytes.end - offset;
            windows.push(Window { buffer, offset, size, chunks: Vec::new(), edges: Vec::new() });
            windows.last_mut().expect("one was just pushed")
        };
        let row = cut.row(window.offset);
        match window.chunks.iter_mut().find(|(of, _)| *of == dtype) {
            Some((_, rows)) => rows.push(row),
            None => window.chunks.push((dtype, vec![row])),
        }
    }
    add_edges(&mut windows, pieces);
    (windows, origins)
}

/// A chunk, before it has a window.
struct Cut<'a> {
    piece: &'a Piece,
    words: Range<u64>,
    partial: u32,
}

impl Cut<'_> {
    /// Counted from the start of the buffer.
    fn elements(&self) -> Range<u64> {
        let per_word = 4 / self.piece.dtype.size() as u64;
        let end = self.piece.start + self.piece.len;
        self.piece.start.max(self.words.start * per_word)..end.min(self.words.end * per_word)
    }

    fn row(&self, window_offset: u64) -> ChunkRow {
        let per_word = 4 / self.piece.dtype.size() as u64;
        let elements = self.elements();
        // A window holds fewer than 2^29 words and a chunk lies in one.
        let narrow = |x: u64| u32::try_from(x).expect("a window is below 2^31 bytes");
        let words = narrow(self.words.end - self.words.start);
        let skip = narrow(elements.start - self.words.start * per_word);
        ChunkRow {
            word: narrow(self.words.start - window_offset / 4),
            words,
            skip,
            elements: narrow(elements.end - elements.start),
            own_from: skip,
            own_to: words - narrow(self.words.end * per_word - elements.end),
            partial: self.partial,
            segment: self.piece.segment,
        }
    }
}

/// Lists the words that an element of half precision shares with something else, each in a window that holds it.
fn add_edges(windows: &mut [Window], pieces: &[Piece]) {
    let mut edges: BTreeMap<(usize, u64), EdgeRow> = BTreeMap::new();
    for piece in pieces.iter().filter(|p| p.len > 0 && p.dtype.size() == 2) {
        let code = dtype_code(piece.dtype).expect("half precision has kernels");
        let (start, end) = (piece.start, piece.start + piece.len);
        let nobody = EdgeRow { word: 0, low: NOWHERE, high: NOWHERE, dtypes: 0 };
        if start % 2 == 1 {
            let edge = edges.entry((piece.buffer, start / 2)).or_insert(nobody);
            edge.high = piece.segment;
            edge.dtypes |= code << 8;
        }
        if end % 2 == 1 {
            let edge = edges.entry((piece.buffer, end / 2)).or_insert(nobody);
            edge.low = piece.segment;
            edge.dtypes |= code;
        }
    }
    for ((buffer, word), edge) in edges {
        // The last window that starts at or before the word holds it, or else the one before: windows are in order,
        // and overlap only where one begins at an aligned offset inside the end of another.
        let after = windows.partition_point(|w| (w.buffer, w.offset / 4) <= (buffer, word));
        let holds = |w: &&mut Window| w.buffer == buffer && (word + 1) * 4 <= w.offset + w.size;
        if let Some(window) = windows[..after].iter_mut().rev().find(holds) {
            let word = u32::try_from(word - window.offset / 4).expect("a window is below 2^31 bytes");
            window.edges.push(EdgeRow { word, ..edge });
        }
    }
}

/// How partials merge: levels of rows, to be run one after another, and where the results are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MergeTree {
    pub(super) levels: Vec<Vec<MergeRow>>,
    /// The first of the segments' partials, which are consecutive.
    pub(super) segment_partials: u32,
    /// The partial of everything.
    pub(super) total_partial: u32,
    /// How many partials there are room for.
    pub(super) partials: u32,
}

/// Plans the merging of so many chunks' partials for each segment, in order: first within segments, then over them.
/// `chunks` of consecutive segments are consecutive. None if 2^32 rows do not suffice.
pub(super) fn merge_tree(chunks: &[u32]) -> Option<MergeTree> {
    let mut next = chunks.iter().try_fold(0u32, |sum, n| sum.checked_add(*n))?;
    let mut levels = Vec::new();
    let mut runs = Vec::new();
    let mut from = 0;
    for count in chunks {
        runs.push((from, *count));
        from += count;
    }
    let segment_partials = loop {
        let start = next;
        runs = merge_level(&runs, &mut levels, &mut next)?;
        if runs.iter().all(|(_, count)| *count == 1) {
            break start;
        }
    };
    let total_partial = if chunks.len() == 1 {
        segment_partials
    } else {
        let mut run = vec![(segment_partials, u32::try_from(chunks.len()).ok()?)];
        loop {
            run = merge_level(&run, &mut levels, &mut next)?;
            if let [(from, 1)] = run[..] {
                break from;
            }
        }
    };
    Some(MergeTree { levels, segment_partials, total_partial, partials: next })
}

/// Merges each run of partials into a shorter one; an empty run into one empty partial. Returns the new runs.
fn merge_level(runs: &[(u32, u32)], levels: &mut Vec<Vec<MergeRow>>, next: &mut u32) -> Option<Vec<(u32, u32)>> {
    let mut rows = Vec::new();
    let mut merged = Vec::new();
    for &(from, count) in runs {
        let first = *next;
        for at in (0..count.max(1)).step_by(MERGED_PARTIALS as usize) {
            rows.push(MergeRow { from: from + at, count: (count - at).min(MERGED_PARTIALS), into: *next, padding: 0 });
            *next = next.checked_add(1)?;
        }
        merged.push((first, *next - first));
    }
    levels.push(rows);
    Some(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(buffer: usize, dtype: Dtype, start: u64, len: u64) -> Piece {
        Piece { buffer, dtype, start, len, tensor: 0, first_element: 0, segment: 0 }
    }

    /// Every element is in exactly one chunk, every word in at most one writer, and nothing leaves its window.
    fn check(pieces: &[Piece], limits: Limits) -> (Vec<Window>, Vec<ChunkOrigin>) {
        let (windows, origins) = windows(pieces, limits);
        let mut seen: Vec<(usize, u64, u64)> = Vec::new();
        let mut written: Vec<(usize, u64, u64)> = Vec::new();
        let mut chunks = 0;
        for w in &windows {
            assert_eq!(w.offset % limits.alignment, 0);
            assert!(w.size <= limits.binding_bytes && w.size > 0 && w.size.is_multiple_of(4));
            for (dtype, rows) in &w.chunks {
                for row in rows {
                    chunks += 1;
                    assert!(u64::from(row.word + row.words) * 4 <= w.size);
                    assert!(row.words > 0 && row.words <= limits.chunk_words);
                    let first = (w.offset / 4 + u64::from(row.word)) * (4 / dtype.size() as u64) + u64::from(row.skip);
                    let size = dtype.size() as u64;
                    seen.push((w.buffer, first * size, (first + u64::from(row.elements)) * size));
                    let base = w.offset / 4 + u64::from(row.word);
                    if row.own_from < row.own_to {
                        written.push((w.buffer, base + u64::from(row.own_from), base + u64::from(row.own_to)));
                    }
                }
            }
            for edge in &w.edges {
                assert!(u64::from(edge.word) * 4 < w.size);
                assert!(edge.low != NOWHERE || edge.high != NOWHERE);
                written.push((w.buffer, w.offset / 4 + u64::from(edge.word), w.offset / 4 + u64::from(edge.word) + 1));
            }
        }
        assert_eq!(chunks, origins.len());
        // Elements: merging what was seen gives back the pieces.
        let merge = |mut runs: Vec<(usize, u64, u64)>| {
            runs.sort_unstable();
            assert!(runs.windows(2).all(|w| w[0].0 < w[1].0 || w[0].2 <= w[1].1), "covered twice");
            let mut merged: Vec<(usize, u64, u64)> = Vec::new();
            for run in runs {
                match merged.last_mut() {
                    Some(last) if last.0 == run.0 && last.2 == run.1 => last.2 = run.2,
                    _ => merged.push(run),
                }
            }
            merged
        };
        let wanted = |unit: fn(&Piece) -> (u64, u64)| {
            let mut runs: Vec<_> =
                pieces.iter().filter(|p| p.len > 0).map(|p| (p.buffer, unit(p).0, unit(p).1)).collect();
            runs.sort_unstable();
            runs.dedup_by(|b, a| {
                a.0 == b.0 && b.1 <= a.2 && {
                    a.2 = a.2.max(b.2);
                    true
                }
            });
            runs
        };
        assert_eq!(merge(seen), wanted(|p| (p.bytes().start, p.bytes().end)));
        assert_eq!(merge(written), wanted(|p| (p.words().start, p.words().end)));
        (windows, origins)
    }

    const SMALL: Limits = Limits { chunk_words: 16, binding_bytes: 512, alignment: 256 };

    #[test]
    fn every_offset_and_length_is_covered_once() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for start in 0..70 {
                for len in [0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 300, 1000] {
                    check(&[piece(0, dtype, start, len)], SMALL);
                }
            }
        }
    }

    #[test]
    fn neighbours_that_share_a_word_have_one_writer() {
        let pieces = [
            Piece { segment: 7, ..piece(0, Dtype::F16, 1, 4) },
            Piece { segment: 8, ..piece(0, Dtype::BF16, 5, 1) },
            Piece { segment: 9, ..piece(0, Dtype::F16, 6, 5) },
            Piece { segment: 4, ..piece(0, Dtype::F32, 6, 3) },
        ];
        let (windows, _) = check(&pieces, SMALL);
        let edges = &windows[0].edges;
        assert_eq!(
            edges[..],
            [
                EdgeRow { word: 0, low: NOWHERE, high: 7, dtypes: 1 << 8 },
                EdgeRow { word: 2, low: 7, high: 8, dtypes: 1 | 2 << 8 },
                EdgeRow { word: 5, low: 9, high: NOWHERE, dtypes: 1 },
            ]
        );
    }

    #[test]
    fn a_shared_word_at_the_seam_of_two_windows_has_one_writer() {
        for first_len in 240..260 {
            let pieces = [piece(0, Dtype::F16, 0, first_len), piece(0, Dtype::F16, first_len, 300)];
            check(&pieces, SMALL);
        }
    }

    #[test]
    fn pieces_out_of_address_order_keep_list_order_in_their_partials() {
        let mut pieces = [piece(1, Dtype::F32, 100, 50), piece(0, Dtype::F32, 8, 40), piece(1, Dtype::F32, 0, 20)];
        for (i, p) in pieces.iter_mut().enumerate() {
            p.tensor = i;
        }
        let (windows, origins) = check(&pieces, SMALL);
        assert_eq!(origins.iter().map(|o| o.tensor).collect::<Vec<_>>(), [0, 0, 0, 0, 1, 1, 1, 2, 2]);
        for w in &windows {
            for (_, rows) in &w.chunks {
                for row in rows {
                    let origin = origins[row.partial as usize];
                    let element = pieces[origin.tensor].start + origin.first_element;
                    assert_eq!(element, w.offset / 4 + u64::from(row.word));
                }
            }
        }
    }

    #[test]
    fn sizes_beyond_this_machine_add_up() {
        // 2^33 elements of float32 in buffers just below 2 GiB, as drivers give them, with 128 MiB bindings.
        let limits = Limits { chunk_words: 1 << 20, binding_bytes: 128 << 20, alignment: 256 };
        let each = (1u64 << 29) - 64;
        let mut first_element = 0;
        let mut pieces = Vec::new();
        while first_element < 1 << 33 {
            let len = each.min((1 << 33) - first_element);
            pieces.push(Piece { first_element, ..piece(pieces.len(), Dtype::F32, 0, len) });
            first_element += len;
        }
        let (windows, origins) = check(&pieces, limits);
        assert!(windows.len() >= 256);
        assert_eq!(origins.last().map(|o| o.first_element + (1 << 20) > 1 << 33), Some(true));
        let tree = merge_tree(&[u32::try_from(origins.len()).expect("small")]).expect("fits");
        assert_eq!(tree.levels.len(), 2);
        // One piece of 2^36 bytes in a single buffer, with the largest binding there is.
        let limits = Limits { binding_bytes: (1 << 31) - 256, ..limits };
        check(&[piece(0, Dtype::BF16, 3, 1 << 35)], limits);
    }

    #[test]
    fn partials_merge_to_one_for_each_segment_and_one_for_all() {
        let tree = merge_tree(&[0]).expect("fits");
        assert_eq!((tree.segment_partials, tree.total_partial, tree.partials), (0, 0, 1));
        assert_eq!(tree.levels, [[MergeRow { from: 0, count: 0, into: 0, padding: 0 }]]);
        for chunks in [vec![1], vec![1024], vec![1025], vec![3, 0, 5000], vec![1; 3000], vec![2_000_000]] {
            let tree = merge_tree(&chunks).expect("fits");
            // Follow the tree with sums in place of partials.
            let mut values = vec![1u64; chunks.iter().sum::<u32>() as usize];
            values.resize(tree.partials as usize, 0);
            for row in tree.levels.iter().flatten() {
                let (from, count) = (row.from as usize, row.count as usize);
                values[row.into as usize] = values[from..from + count].iter().sum();
            }
            for (i, count) in chunks.iter().enumerate() {
                assert_eq!(values[tree.segment_partials as usize + i], u64::from(*count));
            }
            assert_eq!(values[tree.total_partial as usize], chunks.iter().map(|c| u64::from(*c)).sum());
        }
        assert!(merge_tree(&[u32::MAX, 1]).is_none());
    }
}

//! The tables that a plan gives to the kernels: which elements of which buffer each workgroup reads, what it may write,
//! and which segments they belong to. Pure arithmetic on sizes, so that it can be tested at any size without a device.
//!
//! - A *piece* is a run of elements in one buffer, and a run of elements of one tensor. Tensors in GPU memory are one
//!   piece each; host tensors larger than a buffer are several.
//! - A *chunk* is part of a piece, for one workgroup: either a run of elements, or several segments with the same
//!   number of elements each, evenly spaced (rows or columns of a matrix), one for each invocation.
//! - A *slot* is the place of a partial. The slots of a segment are consecutive, in the order of its pieces; segments
//!   follow one another. `merge.rs` plans how they merge.
//! - A *task* is what one workgroup does: a chunk, or several of one segment that are too short to be worth a workgroup
//!   each. Its result goes into one slot.
//! - A *window* is the part of one buffer that is bound in a dispatch. Offsets are 64-bit up to here. Within a window
//!   they count elements in 32 bits: a binding is at most 2^31 - 1 bytes, so fewer than 2^30 elements. A *batch* is the
//!   windows that are bound at once.
//! - An *origin* is the element of a tensor from which others are counted, so that 32 bits suffice for a place.
//!
//! Why it is so:
//!
//! 1. Slots. The partials of a segment must be consecutive to merge, but its chunks may lie in many tensors. So the
//!    host counts the slots of each segment and numbers them in the caller's order. Merging is then a few rows,
//!    whatever the scope.
//! 2. Windows. Tensors lie at any offset in any number of buffers. Chunks are gathered by address into windows as large
//!    as a binding may be, so many tensors in one buffer are one dispatch, and a tensor larger than a binding is
//!    several.
//! 3. Tasks. A workgroup costs something by itself, its merge most of all. With tasks, 2,000 tensors of 2,100 elements
//!    take 1.2 times as long as one of 4.2 million on llvmpipe; without, 6 times. The layout of buffers decides which
//!    chunks share a task, and so the last bits of a norm, but no more.
//! 4. Heads and tails. Between its first and its last whole quad a chunk is read and written 16 bytes at a time,
//!    wherever it begins. Up to 4 words on either side are taken one by one, by the first invocations.
//! 5. Edges. Kernels write 32-bit words. A half-precision tensor that begins or ends within a word shares it, perhaps
//!    with a tensor of another dtype and segment. Two invocations that each wrote the whole word would undo each other.
//!    So chunks write the words that are theirs alone, and the edge table lists every other word once.
//! 6. Steps. An optimizer reads a gradient, a parameter and state, each at its own place. So it has tables of its own
//!    (`steps.rs`), in dispatches of one window each, and the plan lays out the state (`state.rs`) by shapes alone, so
//!    that it stays where it is when tensors move. A parameter's element in a shared word is a chunk by itself; those in
//!    upper and those in lower halves are dispatches of their own, so that no word has two writers at once.
//! 7. Order. Scaling walks its tasks from the last to the first, because the last measured may still be in a cache.

mod cut;
mod edges;
mod limits;
mod piece;
mod rows;
mod state;
mod steps;
mod sums;
mod window;

use std::collections::HashMap;
use std::ops::Range;

use cut::{Cut, Cutter};
use edges::add_edges;
pub(super) use limits::{Limits, grid};
pub(super) use piece::{Origin, Piece};
#[cfg(any(test, fuzzing))]
pub(super) use rows::StepRow;
pub(super) use rows::{Batch, ChunkRow, EdgeRow, NOWHERE, Table, Use, Window, dtype_code};
pub(super) use state::{Kept, Portion, StateLayout};
pub(super) use steps::{StepBatch, StepKey, StepPiece, step_batches};
#[cfg(any(test, fuzzing))]
pub(super) use sums::SUMMED_ROWS;
pub(super) use sums::{SumWindow, sum_windows};
use window::gather;

use crate::Dtype;

/// The tables of pieces.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tables {
    pub(super) batches: Vec<Batch>,
    pub(super) origins: Vec<Origin>,
    /// How many slots each segment has, one segment after another.
    pub(super) slots: Vec<u32>,
}

impl Tables {
    /// Each table, with its batch.
    pub(super) fn each(&self) -> impl Iterator<Item = (&Batch, Use, Dtype, &Table)> {
        self.batches.iter().flat_map(|batch| batch.tables.iter().map(move |((of, dtype), t)| (batch, *of, *dtype, t)))
    }

    /// Cuts pieces into chunks, gathers those in windows, and makes tasks of them. Pieces must be in list order and
    /// must not overlap. Their segments are `segments`; slots and origins are counted from `first_slot` and
    /// `first_origin`. With `measures_only`, nothing that writes is planned. None if there are more than 2^32 slots or
    /// segments.
    pub(super) fn new(
        pieces: &[Piece],
        segments: Range<u32>,
        (first_slot, first_origin): (u32, u32),
        measures_only: bool,
        limits: Limits,
    ) -> Option<Self> {
        let mut cutter = Cutter { limits, cuts: Vec::new(), origins: Vec::new(), first_origin };
        for piece in pieces.iter().filter(|p| p.len > 0) {
            cutter.cut(piece, measures_only)?;
        }
        let Cutter { mut cuts, origins, .. } = cutter;
        let mut batches = gather(&mut cuts, limits)?;
        let tasks = tasks(&cuts, limits);
        let mut slots = vec![0u32; segments.len()];
        let first = segments.start as usize;
        let own_slots = |row: &ChunkRow| row.segment as usize - first..(row.segment + row.count) as usize - first;
        for head in tasks.iter().map(|task| &cuts[task[0]]).filter(|cut| !cut.use_.is_mixed()) {
            for count in &mut slots[own_slots(&head.row)] {
                *count += 1;
            }
        }
        let mut next = first_slot;
        let mut starts = Vec::with_capacity(slots.len());
        for count in &slots {
            starts.push(next);
            next = next.checked_add(*count)?;
        }
        // The first chunks of tasks come first, so that their numbers are those of workgroups.
        let mut rest = Vec::new();
        let mut open = HashMap::new();
        for task in &tasks {
            let head = cuts[task[0]];
            let placed = if head.use_.is_mixed() { vec![head] } else { head.placed(&mut starts[own_slots(&head.row)]) };
            for head in placed {
                let at = limits.table_of(&mut open, &mut batches, &head, task.len());
                let table = &mut batches[head.batch].tables[at].1;
                if task.len() > 1 {
                    rest.push((head.batch, at, table.chunks.len(), &task[1..]));
                }
                table.chunks.push(head.row);
                table.tasks += 1;
            }
        }
        for (batch, at, mut last, others) in rest {
            let chunks = &mut batches[batch].tables[at].1.chunks;
            for other in others {
                chunks[last].next = u32::try_from(chunks.len()).ok()?;
                last = chunks.len();
                chunks.push(cuts[*other].row);
            }
        }
        if !measures_only {
            add_edges(&mut batches, pieces);
        }
        Some(Self { batches, origins, slots })
    }
}

impl Limits {
    /// The table of a batch for a task of this many chunks: the last of its kind, unless that is full.
    fn table_of(
        &self,
        open: &mut HashMap<(usize, Use, Dtype), (usize, usize)>,
        batches: &mut [Batch],
        head: &Cut,
        chunks: usize,
    ) -> usize {
        let tables = &mut batches[head.batch].tables;
        let (at, rows) = open.entry((head.batch, head.use_, head.dtype)).or_insert((usize::MAX, usize::MAX - chunks));
        if *rows + chunks > self.rows::<ChunkRow>() {
            (*at, *rows) = (tables.len(), 0);
            tables.push(((head.use_, head.dtype), Table::default()));
        }
        *rows += chunks;
        *at
    }
}

/// The most chunks in one task, so that loops stay short.
pub(super) const TASK_CHUNKS: usize = 128;

/// Gathers chunks, by their numbers, in tasks: in list order, of one segment and one table, and together no longer than
/// the longest chunk.
fn tasks(cuts: &[Cut], limits: Limits) -> Vec<Vec<usize>> {
    let mut tasks: Vec<Vec<usize>> = Vec::new();
    // For each table, the task that may go on, and how many words it has.
    let mut open: HashMap<(usize, Use, Dtype), (usize, u64)> = HashMap::new();
    for (i, cut) in cuts.iter().enumerate() {
        let words = u64::from(cut.row.elements) * cut.dtype.size() as u64 / 4 + 1;
        if matches!(cut.use_, Use::Whole | Use::Run) {
            let key = (cut.batch, cut.use_, cut.dtype);
            if let Some((task, sum)) = open.get_mut(&key) {
                let (task, last) = (&mut tasks[*task], *sum + words);
                let same = cuts[task[0]].row.segment == cut.row.segment;
                if same && last <= limits.chunk_words.into() && task.len() < TASK_CHUNKS {
                    task.push(i);
                    *sum = last;
                    continue;
                }
            }
            open.insert(key, (tasks.len(), words));
        }
        tasks.push(vec![i]);
    }
    tasks
}

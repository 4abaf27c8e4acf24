//! The tables that a plan gives to the kernels: which elements of which buffer each workgroup reads, what it may write,
//! and which segments they belong to. Pure arithmetic on sizes, so that it can be tested at any size without a device.
//!
//! - A *piece* is a run of elements in one buffer, and a run of elements of one tensor. Tensors in GPU memory are one
//!   piece each; host tensors larger than a buffer are several.
//! - A *chunk* is part of a piece, for one workgroup: either a run of elements, or so many segments with so many
//!   elements each, evenly spaced (rows or columns of a matrix), of which each invocation takes one.
//! - A *slot* is the place of a partial. The slots of a segment are consecutive, in the order of its pieces; segments
//!   follow one another. `merge.rs` plans what becomes of them.
//! - A *task* is what one workgroup does: a chunk, or several of one segment that are too short to be worth a workgroup
//!   each. What it finds goes into one slot.
//! - A *window* is the part of one buffer that is bound in a dispatch. Offsets are 64-bit up to here; within a window
//!   they count elements: a binding is at most 2^31 - 1 bytes, so fewer than 2^30 elements. A *batch* is as many windows
//!   as are bound at once.
//! - An *origin* is where counting the elements of a tensor begins, so that 32 bits suffice to say where one is.
//!
//! Why it is so:
//!
//! 1. Slots. The partials of a segment must be consecutive to merge, and its chunks may lie in many tensors. So the host counts how
//!    many each segment gets and numbers them in the caller's order. Merging is then a few rows of a table, whatever the scope.
//! 2. Windows. Tensors lie at any offset in any number of buffers. Chunks are gathered by address into windows as large as a binding
//!    may be, so that many tensors in one buffer are one dispatch, and a tensor larger than a binding is several.
//! 3. Tasks. A workgroup costs something by itself, its merge most of all. With tasks, 2,000 tensors of 2,100 elements take 1.2 times as
//!    long as one of 4.2 million on llvmpipe; without, 6 times. Where buffers lie decides what shares a task, and so the last bits of a
//!    norm, but no more.
//! 4. Heads and tails. Between its first and its last whole quad a chunk is read and written 16 bytes at a time, wherever it begins. Up
//!    to 4 words on either side are taken one by one, by the first invocations.
//! 5. Edges. Kernels write 32-bit words. A half-precision tensor that begins or ends within a word shares it, perhaps with a tensor of
//!    another dtype and segment. Two invocations that each wrote the whole word would undo each other. So chunks write the words that
//!    are theirs alone, and the edge table lists every other word once.
//! 6. Order. Scaling walks its tasks from the last to the first, because what was measured last may still be in a cache.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::tuning::{LANE_COLUMN, LANE_ROW, Tuning};
use crate::Dtype;
use crate::segment::{By, Layout};

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
    /// The segments of the tensor.
    pub(super) layout: Layout,
}

impl Piece {
    /// Elements in a quad: 16 bytes, which a chunk reads at once.
    fn per_quad(&self) -> u64 {
        16 / self.dtype.size() as u64
    }

    /// How many words its elements fill.
    pub(super) fn words(&self) -> u64 {
        self.len.div_ceil(4 / self.dtype.size() as u64)
    }

    pub(super) fn bytes(&self) -> Range<u64> {
        let size = self.dtype.size() as u64;
        self.start * size..(self.start + self.len) * size
    }

    /// Where in the buffer an element of the tensor is.
    pub(super) fn at(&self, element: u64) -> u64 {
        self.start + (element - self.first_element)
    }

    /// Runs of at most so many words, cut where quads are, as elements of the tensor.
    fn runs(&self, elements: Range<u64>, chunk_words: u32) -> impl Iterator<Item = Range<u64>> + use<> {
        let step = u64::from(chunk_words) / 4 * self.per_quad();
        // Elements of the first quad that come before.
        let back = self.at(elements.start) % self.per_quad();
        let len = elements.end - elements.start;
        (0..(back + len).div_ceil(step)).map(move |i| {
            let (from, to) = ((i * step).saturating_sub(back), ((i + 1) * step - back).min(len));
            elements.start + from..elements.start + to
        })
    }
}

/// Twin of `Chunk` in `shaders/shared/chunk.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct ChunkRow {
    pub(super) window: u32,
    pub(super) first: u32,
    pub(super) elements: u32,
    pub(super) segment: u32,
    pub(super) column: u32,
    pub(super) columns: u32,
    pub(super) origin: u32,
    pub(super) origin_element: u32,
    pub(super) slot: u32,
    pub(super) count: u32,
    pub(super) segment_stride: u32,
    pub(super) element_stride: u32,
    pub(super) slot_stride: u32,
    pub(super) next: u32,
}

/// Twin of `Edge` in `shaders/edges.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct EdgeRow {
    pub(super) word: u32,
    pub(super) low: u32,
    pub(super) high: u32,
    pub(super) dtypes: u32,
    pub(super) window: u32,
}

/// `NOWHERE` of the shaders.
pub(super) const NOWHERE: u32 = u32::MAX;

/// Twin of the `DTYPE_*` constants in `shaders/shared/half.wgsl`. None for dtypes without a kernel.
pub(super) fn dtype_code(dtype: Dtype) -> Option<u32> {
    match dtype {
        Dtype::F32 => Some(0),
        Dtype::F16 => Some(1),
        Dtype::BF16 => Some(2),
        Dtype::F64 => None,
    }
}

/// What the rows of a table are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Use {
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
    pub(super) fn is_mixed(self) -> bool {
        matches!(self, Self::Mixed { .. })
    }
}

/// Part of a buffer that is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) buffer: usize,
    /// In bytes from the start of the buffer.
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// What is bound together, and what lies in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) windows: Vec<Window>,
    /// A table for each use and dtype that occurs, or several if one cannot be bound: each is a dispatch.
    pub(super) tables: Vec<((Use, Dtype), Table)>,
    pub(super) edges: Vec<EdgeRow>,
}

/// Twin of `Table` in `shaders/shared/chunk.wgsl`: the first chunk of each task, then all others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) tasks: u32,
    pub(super) chunks: Vec<ChunkRow>,
}

/// Where counting the elements of a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) tensor: usize,
    pub(super) first_element: u64,
}

/// Elements from one origin to the next; a chunk that begins before the next may end behind it.
const ORIGIN_SPAN: u64 = 1 << 31;

/// What a device and its tuning ask of the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) chunk_words: u32,
    /// The largest binding, in bytes, and what offsets of bindings must be multiples of.
    pub(super) binding_bytes: u64,
    pub(super) alignment: u64,
    /// Invocations in a workgroup, and so segments in a chunk at most.
    pub(super) workgroup: u32,
    /// Rows of so many elements and fewer are measured by one invocation each.
    pub(super) lane_row: u32,
    /// So many elements of a column are measured by one invocation.
    pub(super) lane_column: u32,
    /// How many windows can be bound at once.
    pub(super) windows: usize,
}

/// The tables of pieces.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tables {
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

    /// Cuts pieces into chunks, gathers those in windows, and makes tasks of them. Pieces must be in list order and must not
    /// overlap; their segments are `segments`, and slots and origins are counted from where the caller's list has got to.
    /// With `measures_only`, nothing is planned that writes. None if 2^32 slots or segments do not suffice.
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
        // First what tasks begin with, so that their numbers are those of workgroups.
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
    /// What follows for a set of so many words from a tuning, a device's largest binding and alignment, and how many windows
    /// it binds at once.
    pub(super) fn new(tuning: &Tuning, words: u64, (largest_binding, alignment): (u64, u64), windows: usize) -> Self {
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
    pub(super) fn rows<T>(&self) -> usize {
        usize::try_from((self.binding_bytes - 4) / size_of::<T>() as u64).unwrap_or(usize::MAX)
    }

    /// The table of a batch that a task of so many chunks goes into: the last of its kind, unless that is full.
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

/// A chunk. Where it lies in its window is told once there are windows.
#[derive(Clone, Copy)]
struct Cut {
    buffer: usize,
    dtype: Dtype,
    use_: Use,
    /// The first element and one past the last, counted from the start of the buffer.
    first: u64,
    end: u64,
    batch: usize,
    row: ChunkRow,
}

impl Cut {
    /// Gives each segment of the chunk the next of its slots. A chunk knows the first slot and the distance to the next
    /// segment's, so it is cut where that distance changes.
    fn placed(self, next: &mut [u32]) -> Vec<Self> {
        let mut placed = Vec::new();
        let mut from = 0;
        while from < next.len() {
            let stride = next.get(from + 1).map_or(0, |second| second - next[from]);
            let even = next[from..].windows(2).take_while(|pair| pair[1] - pair[0] == stride).count();
            let count = even + 1;
            // Within a window, which 32 bits hold.
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

/// Chunks in one task at most, so that loops stay short.
pub(super) const TASK_CHUNKS: usize = 128;

/// Gathers chunks, by their numbers, in tasks: in list order, of one segment and one table, and no longer together than the
/// longest chunk.
fn tasks(cuts: &[Cut], limits: Limits) -> Vec<Vec<usize>> {
    let mut tasks: Vec<Vec<usize>> = Vec::new();
    // By table, the task that may go on, and how many words it has.
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

struct Cutter {
    limits: Limits,
    cuts: Vec<Cut>,
    origins: Vec<Origin>,
    first_origin: u32,
}

impl Cutter {
    fn cut(&mut self, piece: &Piece, measures_only: bool) -> Option<()> {
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
        let Layout { by, columns, .. } = piece.layout;
        let origin = elements.start;
        let chunk_words = self.limits.chunk_words;
        if by == By::Whole {
            for run in piece.runs(elements, chunk_words) {
                self.run(piece, Use::Whole, origin, run)?;
            }
            return Some(());
        }
        if !measures_only {
            for run in piece.runs(elements.clone(), chunk_words) {
                self.run(piece, Use::Mixed { columns: by == By::Columns }, origin, run)?;
            }
        }
        // Whole rows, and parts of rows before and behind them.
        let first_row = elements.start.next_multiple_of(columns).min(elements.end);
        let last_row = (elements.end / columns * columns).max(first_row);
        self.row(piece, origin, elements.start..first_row)?;
        if by == By::Columns {
            self.columns(piece, origin, first_row..last_row)?;
        } else if columns > u64::from(self.limits.lane_row) {
            for row in (first_row..last_row).step_by(columns as usize) {
                self.row(piece, origin, row..row + columns)?;
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
        self.row(piece, origin, last_row..elements.end)
    }

    /// A row, or part of one.
    fn row(&mut self, piece: &Piece, origin: u64, elements: Range<u64>) -> Option<()> {
        if piece.layout.by == By::Columns {
            for first in elements.clone().step_by(self.limits.workgroup as usize) {
                let count = (elements.end - first).min(self.limits.workgroup.into());
                self.each(piece, origin, first, (count, 1), (1, 1))?;
            }
        } else if !elements.is_empty() {
            for run in piece.runs(elements, self.limits.chunk_words) {
                self.run(piece, Use::Run, origin, run)?;
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
        let Layout { by, columns, segment } = piece.layout;
        // Beyond that a chunk meets the end of a row once at most, and only the distance to it counts.
        let folded = columns.min(1 << 31);
        let column = folded - (columns - run.start.checked_rem(columns)?).min(folded);
        let segment = if by == By::Rows { piece.layout.segment_of(run.start) } else { segment };
        let narrow = |x: u64| u32::try_from(x).ok();
        let row = ChunkRow {
            elements: narrow(run.end - run.start)?,
            segment,
            column: if by == By::Whole { 0 } else { narrow(column)? },
            columns: narrow(folded)?,
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

    /// So many segments of so many elements from an element on, with their strides.
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

/// Gathers chunks in windows, by address, and windows in batches; tells each chunk where in them it lies.
fn gather(cuts: &mut [Cut], limits: Limits) -> Option<Vec<Batch>> {
    let bytes = |cut: &Cut| {
        let size = cut.dtype.size() as u64;
        cut.first * size / 4 * 4..(cut.end * size).next_multiple_of(4)
    };
    let mut by_address: Vec<_> = cuts.iter_mut().collect();
    by_address.sort_by_key(|cut| (cut.buffer, bytes(cut).start));
    let mut windows: Vec<(Window, Vec<&mut Cut>)> = Vec::new();
    for cut in by_address {
        let (buffer, bytes) = (cut.buffer, bytes(cut));
        let fits = |(w, _): &&mut (Window, _)| w.buffer == buffer && bytes.end - w.offset <= limits.binding_bytes;
        if let Some((window, cuts)) = windows.last_mut().filter(fits) {
            window.size = window.size.max(bytes.end - window.offset);
            cuts.push(cut);
        } else {
            let offset = bytes.start - bytes.start % limits.alignment;
            let size = bytes.end - offset;
            if size > limits.binding_bytes {
                return None;
            }
            windows.push((Window { buffer, offset, size }, vec![cut]));
        }
    }
    let mut batches: Vec<Batch> = Vec::new();
    for (window, cuts) in windows {
        if batches.last().is_none_or(|batch| batch.windows.len() == limits.windows) {
            batches.push(Batch::default());
        }
        let at = batches.len() - 1;
        let batch = batches.last_mut()?;
        for cut in cuts {
            cut.row.first = u32::try_from(cut.first - window.offset / cut.dtype.size() as u64).ok()?;
            cut.row.window = u32::try_from(batch.windows.len()).ok()?;
            cut.batch = at;
        }
        batch.windows.push(window);
    }
    Some(batches)
}

/// So many workgroups in two dimensions, of which a device allows so many in each. None if it cannot hold them.
pub(super) fn grid(workgroups: u32, widest: u32) -> Option<(u32, u32)> {
    let x = workgroups.clamp(1, widest);
    let y = workgroups.div_ceil(x);
    (y <= widest).then_some((x, y))
}

/// Lists the words that an element of half precision shares with something else than its tensor, each in a window that
/// holds it.
fn add_edges(batches: &mut [Batch], pieces: &[Piece]) {
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

/// Examples that one invocation adds up: with its loops over them it stays below the 65,535 iterations after which
/// llvmpipe silently ends it.
pub(super) const SUMMED_ROWS: u64 = 1 << 15;

/// A dispatch of `sum`: rows of a table, with the part of a tensor and the part of its sums that they lie in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SumWindow {
    pub(super) dtype: Dtype,
    /// None if there are no examples, and nothing to read.
    pub(super) examples: Option<Window>,
    pub(super) sums: Window,
    pub(super) table: Table,
}

/// Cuts the summing of examples: each piece of a tensor of examples is given with the piece of its sums. Pieces of one
/// tensor must be in order. None if the device cannot bind a row.
pub(super) fn sum_windows(pieces: &[(Piece, Piece)], limits: Limits) -> Option<Vec<SumWindow>> {
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

/// A rectangle of columns and rows, in bands of rows and of columns that can be bound.
fn add_sums(
    found: &mut Vec<(usize, u64, SumWindow)>,
    (of, into): (&Piece, &Piece),
    (columns, rows): (Range<u64>, Range<u64>),
    limits: Limits,
) -> Option<()> {
    let fitting = limits.binding_bytes - limits.alignment;
    let (size, stride) = (of.dtype.size() as u64, into.len);
    let rows_at_once = (fitting / (stride * size)).clamp(1, SUMMED_ROWS);
    // A word more, for an element that begins in the middle of one.
    let columns_at_once = ((fitting - 4) / 4).min(columns.end - columns.start);
    let window = |buffer: usize, first: u64, end: u64| {
        let offset = first / 4 * 4 / limits.alignment * limits.alignment;
        Window { buffer, offset, size: end.next_multiple_of(4) - offset }
    };
    for left in columns.clone().step_by(columns_at_once as usize) {
        let right = columns.end.min(left + columns_at_once);
        let sums = window(into.buffer, (into.start + left) * 4, (into.start + right) * 4);
        let mut top = rows.start;
        loop {
            let bottom = rows.end.min(top + rows_at_once);
            let at = |row: u64, column: u64| of.at(row * stride + column);
            let examples =
                (bottom > top).then(|| window(of.buffer, at(top, left) * size, (at(bottom - 1, right - 1) + 1) * size));
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

#[cfg(test)]
mod tests {
    use super::super::tables_hold::{check_grid, check_sums, check_tables};
    use super::super::tuning::HARDWARE;
    use super::*;

    fn piece(buffer: usize, dtype: Dtype, start: u64, len: u64) -> Piece {
        Piece { buffer, dtype, start, len, tensor: 0, first_element: 0, layout: whole(len, 0) }
    }

    fn whole(columns: u64, segment: u32) -> Layout {
        Layout { by: By::Whole, columns, segment }
    }

    /// As [`piece`], as a matrix.
    fn matrix(by: By, columns: u64, of: Piece) -> Piece {
        Piece { layout: Layout { by, columns, segment: 0 }, ..of }
    }

    /// As [`check_tables`], of segments that begin with 0, for a clip.
    fn check(pieces: &[Piece], limits: Limits) -> Tables {
        let last = |p: &Piece| match p.layout.by {
            By::Columns => p.layout.segment + p.layout.columns as u32 - 1,
            _ => p.layout.segment_of(p.first_element + p.len.max(1) - 1),
        };
        let segments = pieces.iter().map(|p| last(p) + 1).max().unwrap_or(1);
        check_tables(pieces, segments, false, limits)
    }

    const SMALL: Limits = Limits {
        chunk_words: 16,
        binding_bytes: 512,
        alignment: 256,
        workgroup: 4,
        lane_row: 6,
        lane_column: 5,
        windows: 1,
    };

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
            Piece { layout: whole(4, 2), ..piece(0, Dtype::F16, 1, 4) },
            Piece { layout: whole(1, 1), ..piece(0, Dtype::BF16, 5, 1) },
            Piece { layout: whole(5, 3), ..piece(0, Dtype::F16, 6, 5) },
            Piece { layout: whole(3, 0), ..piece(0, Dtype::F32, 6, 3) },
        ];
        let tables = check(&pieces, SMALL);
        let edges = &tables.batches[0].edges;
        assert_eq!(
            edges[..],
            [
                EdgeRow { word: 0, low: NOWHERE, high: 2, dtypes: 1 << 8, window: 0 },
                EdgeRow { word: 2, low: 2, high: 1, dtypes: 1 | 2 << 8, window: 0 },
                EdgeRow { word: 5, low: 3, high: NOWHERE, dtypes: 1, window: 0 },
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
    fn pieces_out_of_address_order_keep_list_order_in_their_slots() {
        let mut pieces = [piece(1, Dtype::F32, 100, 50), piece(0, Dtype::F32, 8, 40), piece(1, Dtype::F32, 0, 20)];
        for (i, p) in pieces.iter_mut().enumerate() {
            p.tensor = i;
        }
        let tables = check(&pieces, SMALL);
        assert_eq!(tables.slots, [9]);
        let rows = tables.each().flat_map(|(.., table)| &table.chunks);
        let mut slots: Vec<_> = rows.map(|row| (row.slot, row.origin)).collect();
        slots.sort_unstable();
        assert_eq!(slots.iter().map(|(_, origin)| *origin).collect::<Vec<_>>(), [0, 0, 0, 0, 1, 1, 1, 2, 2]);
    }

    #[test]
    fn tensors_of_many_buffers_share_batches_and_tasks() {
        for windows in [1, 2, 3, 16] {
            let limits = Limits { windows, ..SMALL };
            let mut pieces = Vec::new();
            for tensor in 0..40 {
                // Tensors of 1 to 11 elements, by turns in 7 buffers, some sharing words.
                let of = piece(tensor % 7, Dtype::F16, (tensor / 7 * 13) as u64, 1 + (tensor % 11) as u64);
                pieces.push(Piece { tensor, ..of });
            }
            let tables = check(&pieces, limits);
            assert_eq!(tables.batches.len(), 7usize.div_ceil(windows));
            let tasks: u32 = tables.each().map(|(.., table)| table.tasks).sum();
            assert_eq!(tables.slots, [tasks]);
            assert!(tasks <= 20, "{tasks} tasks for 40 tensors");
        }
    }

    #[test]
    fn two_thousand_small_tensors_are_two_hundred_tasks() {
        let limits = Limits { chunk_words: 1 << 14, binding_bytes: 128 << 20, windows: 64, ..SMALL };
        let pieces: Vec<_> =
            (0..2000).map(|tensor| Piece { tensor, ..piece(0, Dtype::F32, tensor as u64 * 2100, 2100) }).collect();
        let tables = check(&pieces, limits);
        assert_eq!((tables.batches.len(), tables.slots[0]), (1, 2000u32.div_ceil(7)));
    }

    #[test]
    fn rows_and_columns_of_every_shape() {
        for dtype in [Dtype::F32, Dtype::F16] {
            for by in [By::Rows, By::Columns] {
                for columns in [1, 2, 3, 5, 6, 7, 16, 33, 100] {
                    for rows in [1, 2, 5, 6, 11] {
                        for start in [0, 1, 63] {
                            check(&[matrix(by, columns, piece(0, dtype, start, rows * columns))], SMALL);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_matrix_in_pieces_that_end_within_rows() {
        for by in [By::Rows, By::Columns] {
            for columns in [3, 7, 40] {
                for cut in [1, 2, 7, 8, 41, 80] {
                    let total = columns * 5;
                    let part = |buffer, first_element: u64, len| Piece {
                        first_element,
                        ..matrix(by, columns, piece(buffer, Dtype::F32, 3, len))
                    };
                    let cut = cut.min(total - 1);
                    check(&[part(0, 0, cut), part(1, cut, total - cut)], SMALL);
                }
            }
        }
    }

    #[test]
    fn examples_over_all_tensors() {
        // Two tensors with three examples each: every segment has slots of both.
        let second = Piece { tensor: 1, ..matrix(By::Rows, 40, piece(1, Dtype::F16, 1, 120)) };
        let tables = check(&[matrix(By::Rows, 2, piece(0, Dtype::F32, 0, 6)), second], SMALL);
        assert!(tables.slots.iter().all(|n| *n >= 2));
    }

    #[test]
    fn every_example_is_added_to_every_sum_once() {
        for (dtype, columns, examples, cut) in [
            (Dtype::F32, 5u64, 3u64, 15u64),
            (Dtype::F16, 7, 9, 20),
            (Dtype::BF16, 100, 4, 250),
            (Dtype::F32, 60, 40, 61),
            (Dtype::F16, 60, 0, 0),
        ] {
            let len = columns * examples;
            let into = piece(2, Dtype::F32, 9, columns);
            let part = |buffer, first_element, len| Piece {
                first_element,
                ..matrix(By::Rows, columns, piece(buffer, dtype, 2, len))
            };
            let pairs = [(part(0, 0, cut), into), (part(1, cut, len - cut), into)];
            check_sums(&pairs[..if cut < len { 2 } else { 1 }], SMALL);
        }
    }

    /// A device that binds 64 KiB, the least that is taken, and kernels of many invocations.
    #[test]
    fn short_rows_of_a_large_workgroup_fit_a_small_binding() {
        let limits = Limits::new(&HARDWARE, 1 << 20, (1 << 16, 256), 1);
        for columns in [1, 16, 63, 64] {
            check(&[matrix(By::Rows, columns, piece(0, Dtype::F32, 1, columns * 5000))], limits);
        }
    }

    #[test]
    fn workgroups_are_laid_out_in_at_most_two_dimensions() {
        for workgroups in [0, 1, 7, 8, 9, 63, 64, 65, u32::MAX] {
            check_grid(workgroups, 8);
            check_grid(workgroups, 65_535);
            check_grid(workgroups, u32::MAX);
        }
    }

    #[test]
    fn sizes_beyond_this_machine_add_up() {
        // 2^33 elements of float32 in buffers just below 2 GiB, as drivers give them, with 128 MiB bindings.
        let limits = Limits {
            chunk_words: 1 << 20,
            binding_bytes: 128 << 20,
            alignment: 256,
            workgroup: 256,
            lane_row: 64,
            lane_column: 256,
            windows: 1,
        };
        let each = (1u64 << 29) - 64;
        let mut first_element = 0;
        let mut pieces = Vec::new();
        while first_element < 1 << 33 {
            let len = each.min((1 << 33) - first_element);
            pieces.push(Piece { first_element, ..piece(pieces.len(), Dtype::F32, 0, len) });
            first_element += len;
        }
        let tables = check(&pieces, limits);
        assert!(tables.batches.len() >= 256);
        assert!(tables.slots[0] >= 1 << 13);
        // One piece of 2^36 bytes in a single buffer, with the largest binding there is.
        let limits = Limits { binding_bytes: (1 << 31) - 256, ..limits };
        let huge = piece(0, Dtype::BF16, 3, 1 << 35);
        assert_eq!(check(&[huge], limits).origins.len(), 17);
        check(&[matrix(By::Rows, (1 << 32) + 5, huge)], limits);
        check(&[matrix(By::Rows, 1 << 25, Piece { len: 1 << 33, ..huge })], limits);
    }
}

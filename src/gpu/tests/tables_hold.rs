//! One checker of tables and merge trees, of any tensors and limits, for the unit tests and for fuzzing. Kernels trust
//! these tables instead of checking bounds (`kernels::trusted`).

use arbitrary::{Result, Unstructured};

use super::super::merge::MergeTree;
use super::super::table::{
    ChunkRow, Kept, Limits, NOWHERE, Origin, Piece, SUMMED_ROWS, StateLayout, StepPiece, StepRow, TASK_CHUNKS, Table,
    Tables, Use, Window, grid, step_batches, sum_windows,
};
use super::super::tuning::{HARDWARE, LANE_PARTIALS, SMALLEST_WORKGROUP, SOFTWARE};
use crate::segment::{By, SegmentLayout, Segments};
use crate::tensor::Spec;
use crate::{Clip, Dtype, Scope, UnitAxis};

/// llvmpipe silently ends the loops of an invocation after this many iterations in all.
const MOST_ITERATIONS: u64 = 65_535;

/// Slots are counted from here in all checks.
const FIRST_SLOT: u32 = 3;

/// Makes the tables of pieces and checks them. Every element is measured once, into a slot of its segment that no other
/// task has, and found by its origin. Every word has at most one writer, which knows the segment of each of its
/// elements. Nothing leaves its window. No loop is too long.
pub(crate) fn check_tables(pieces: &[Piece], segments: u32, measures_only: bool, limits: Limits) -> Tables {
    let tables = Tables::new(pieces, 0..segments, (FIRST_SLOT, 0), measures_only, limits).expect("fits");
    let mut starts = vec![FIRST_SLOT];
    starts.extend(tables.slots.iter().scan(FIRST_SLOT, |sum, n| {
        *sum += n;
        Some(*sum)
    }));
    let mut checker = Checker { pieces, limits, origins: &tables.origins, measured: Vec::new(), written: Vec::new() };
    let mut used = vec![false; (starts[starts.len() - 1] - FIRST_SLOT) as usize];
    for batch in &tables.batches {
        assert!((1..=limits.windows).contains(&batch.windows.len()));
        for w in &batch.windows {
            check_window(w, limits);
        }
        for ((of, dtype), table) in &batch.tables {
            assert!(table.chunks.len() <= limits.rows::<ChunkRow>());
            for task in tasks_of(table) {
                checker.check_task(*of, *dtype, &task);
                let head = task[0];
                for s in (0..head.count).filter(|_| !of.is_mixed()) {
                    let (slot, segment) = (head.slot + s * head.slot_stride, (head.segment + s) as usize);
                    assert!((starts[segment]..starts[segment + 1]).contains(&slot), "a slot of another segment");
                    let used = &mut used[(slot - FIRST_SLOT) as usize];
                    assert!(!std::mem::replace(used, true), "a slot taken twice");
                }
                for row in &task {
                    assert_eq!(row.segment, head.segment);
                    checker.check_chunk((*of, *dtype), &batch.windows[row.window as usize], row);
                }
            }
        }
        for edge in &batch.edges {
            let w = &batch.windows[edge.window as usize];
            assert!(u64::from(edge.word) * 4 < w.size);
            assert!(edge.low != NOWHERE || edge.high != NOWHERE);
            let word = w.offset / 4 + u64::from(edge.word);
            checker.written.push((w.buffer, word, word + 1));
        }
    }
    assert!(used.iter().all(|used| *used), "a slot that nothing is measured into");
    let bytes = |p: &Piece| (p.buffer, p.bytes().start, p.bytes().end);
    let Checker { measured, written, .. } = checker;
    assert_eq!(united(measured), united(pieces.iter().map(bytes).collect()), "what is measured");
    if measures_only {
        let writes = |batch: &super::super::table::Batch| {
            !batch.edges.is_empty() || batch.tables.iter().any(|((of, _), _)| of.is_mixed())
        };
        assert!(!tables.batches.iter().any(writes));
        return tables;
    }
    // Two pieces may share a word.
    let mut words: Vec<_> =
        pieces.iter().map(bytes).filter(|b| b.1 < b.2).map(|b| (b.0, b.1 / 4, b.2.div_ceil(4))).collect();
    words.sort_unstable();
    for i in 1..words.len() {
        if words[i].0 == words[i - 1].0 {
            words[i].1 = words[i].1.max(words[i - 1].2);
        }
    }
    assert_eq!(united(written), united(words), "what is written");
    tables
}

/// Runs of bytes or words (buffer, from, to), merged where they touch. No two may overlap.
fn united(mut runs: Vec<(usize, u64, u64)>) -> Vec<(usize, u64, u64)> {
    runs.sort_unstable();
    let mut united: Vec<(usize, u64, u64)> = Vec::new();
    for run in runs.into_iter().filter(|run| run.1 < run.2) {
        match united.last_mut() {
            Some(last) if last.0 == run.0 && last.2 >= run.1 => {
                assert_eq!(last.2, run.1, "covered twice");
                last.2 = run.2;
            }
            _ => united.push(run),
        }
    }
    united
}

fn check_window(w: &Window, limits: Limits) {
    assert!((1..=limits.binding_bytes).contains(&w.size) && w.size.is_multiple_of(4));
    assert!(w.offset.is_multiple_of(limits.alignment));
}

/// The chunks of each task, in order. Each chunk belongs to one task, and the next one stands behind it.
fn tasks_of(table: &Table) -> Vec<Vec<ChunkRow>> {
    let mut seen = 0;
    let mut tasks = Vec::new();
    for head in 0..table.tasks as usize {
        let mut task = vec![table.chunks[head]];
        let mut at = head;
        while table.chunks[at].next != 0 {
            assert!(table.chunks[at].next as usize > at.max(table.tasks as usize - 1));
            at = table.chunks[at].next as usize;
            task.push(table.chunks[at]);
        }
        seen += task.len();
        tasks.push(task);
    }
    assert_eq!(seen, table.chunks.len());
    tasks
}

/// The tables being checked, and what their chunks cover so far.
struct Checker<'a> {
    pieces: &'a [Piece],
    limits: Limits,
    origins: &'a [Origin],
    /// Bytes.
    measured: Vec<(usize, u64, u64)>,
    /// Words.
    written: Vec<(usize, u64, u64)>,
}

impl Checker<'_> {
    /// Checks that a task is short enough.
    fn check_task(&self, of: Use, dtype: Dtype, task: &[ChunkRow]) {
        let size = dtype.size() as u64;
        let words = |row: &ChunkRow| u64::from(row.elements) * size / 4;
        let chunk_words = u64::from(self.limits.chunk_words);
        let runs = matches!(of, Use::Whole | Use::Run);
        assert!(task.len() == 1 || (runs && task.iter().map(words).sum::<u64>() <= chunk_words));
        assert!(task.len() <= TASK_CHUNKS);
        let lanes = u64::from(self.limits.workgroup);
        let iterations = |row: &ChunkRow| match of {
            // One invocation for each segment, one element at a time.
            Use::Each => u64::from(row.elements),
            // Shared blocks of 16 words, each of 39 iterations at most, and as many for the words outside.
            _ => (words(row).div_ceil(16 * lanes) + 1) * 39,
        };
        assert!(task.iter().map(iterations).sum::<u64>() <= MOST_ITERATIONS, "loops too long");
    }

    /// Notes which bytes a chunk measures and which words it writes.
    fn check_chunk(&mut self, (of, dtype): (Use, Dtype), w: &Window, row: &ChunkRow) {
        let (size, per_word) = (dtype.size() as u64, 4 / dtype.size() as u64);
        let at = |i: u64| w.offset / size + u64::from(row.first) + i;
        let origin = self.origins[row.origin as usize];
        let holds =
            |p: &&Piece| p.buffer == w.buffer && p.dtype == dtype && (p.start..p.start + p.len).contains(&at(0));
        let piece = self.pieces.iter().find(holds).expect("a chunk lies in a piece");
        assert_eq!((origin.tensor, piece.dtype), (piece.tensor, dtype));
        let place = |i: u64| origin.first_element + u64::from(row.origin_element) + i;
        assert_eq!(piece.at(place(0)), at(0));
        let (count, elements) = (u64::from(row.count), u64::from(row.elements));
        let (segment_stride, element_stride) = match of {
            Use::Each => (u64::from(row.segment_stride), u64::from(row.element_stride)),
            _ => (0, 1),
        };
        let last = at((count - 1) * segment_stride + (elements - 1) * element_stride);
        assert!((last + 1) * size <= w.offset + w.size);
        assert!(row.count >= 1 && row.count <= self.limits.workgroup && row.elements >= 1);
        if of != Use::Each {
            let words = (at(elements) - 1) / per_word - at(0) / per_word + 1;
            assert!(row.count == 1 && words <= self.limits.chunk_words.into());
        }
        for s in (0..row.count).filter(|_| !of.is_mixed()) {
            let first = at(u64::from(s) * segment_stride);
            // All elements of a run are of one segment if its first and its last are.
            let some = if element_stride == 1 { vec![0, elements - 1] } else { (0..elements).collect() };
            for i in some {
                let element = u64::from(s) * segment_stride + i * element_stride;
                assert_eq!(piece.layout.segment_of(place(element)), row.segment + s);
            }
            if element_stride == 1 {
                self.measured.push((w.buffer, first * size, (first + elements) * size));
            } else {
                let each = (0..elements).map(|i| (first + i * element_stride) * size);
                self.measured.extend(each.map(|byte| (w.buffer, byte, byte + size)));
            }
        }
        if matches!(of, Use::Whole | Use::Mixed { .. }) {
            self.written.push((w.buffer, at(0).div_ceil(per_word), at(elements) / per_word));
        }
        if of.is_mixed() {
            for i in (0..elements).step_by(1 + elements as usize / 64).chain([elements - 1]) {
                let at = u64::from(row.column) + i;
                let step =
                    if piece.layout.by == By::Rows { at / u64::from(row.columns) } else { at % u64::from(row.columns) };
                assert_eq!(u64::from(row.segment) + step, u64::from(piece.layout.segment_of(place(i))));
            }
        }
    }
}

/// The pieces of parameters beside those of their gradients, with their state: for each tensor what is kept, in blocks of
/// at most `most` words.
fn step_pieces<'l>(gradients: &[Piece], parameters: &[Piece], layout: &'l StateLayout) -> Vec<StepPiece<'l>> {
    let mut found = Vec::new();
    for (gradient, parameter) in gradients.iter().zip(parameters) {
        for state in layout.of(gradient.tensor) {
            let from = state.elements.start.max(gradient.first_element);
            let to = state.elements.end.min(gradient.first_element + gradient.len);
            let part = |of: &Piece| Piece { start: of.at(from), len: to - from, first_element: from, ..*of };
            if from < to {
                let (gradient, parameter) = (part(gradient), part(parameter));
                found.push(StepPiece { gradient, parameter, state, clip: 0, optimizer: 0 });
            }
        }
    }
    found
}

/// Checks the rows of steps. Every element of a parameter is stepped once, by its own gradient, in its segment, with words
/// of state that no other element has. No dispatch has two writers of a word. Nothing leaves its window or block.
pub(crate) fn check_steps(gradients: &[Piece], parameters: &[Piece], kept: &[KeptOf], most: u64, limits: Limits) {
    let layout = StateLayout::new(kept, most);
    assert!(layout.blocks.iter().all(|words| *words <= most));
    // Parts of tensors, and of blocks: elements, words and halves.
    let (mut stepped, mut floats, mut halves) = (Vec::new(), Vec::new(), Vec::new());
    for batch in step_batches(&step_pieces(gradients, parameters, &layout), limits).expect("fits") {
        check_window(&batch.gradient, limits);
        check_window(&batch.parameter, limits);
        assert!(batch.rows.len() <= limits.rows::<StepRow>());
        let (of_gradient, of_parameter) = (batch.key.gradient.size() as u64, batch.key.parameter.size() as u64);
        let mut written = Vec::new();
        for row in &batch.rows {
            let elements = u64::from(row.elements);
            let (gradient, parameter) = (u64::from(row.gradient), u64::from(row.parameter));
            assert!(elements >= 1 && elements <= limits.chunk_words.into());
            assert!((gradient + elements) * of_gradient <= batch.gradient.size);
            assert!((parameter + elements) * of_parameter <= batch.parameter.size);
            let at = batch.parameter.offset / of_parameter + parameter;
            let holds = |(_, p): &(&Piece, &Piece)| {
                (p.buffer, p.dtype) == (batch.parameter.buffer, batch.key.parameter)
                    && (p.start..p.start + p.len).contains(&at)
            };
            let (own, piece) = gradients.iter().zip(parameters).find(holds).expect("a row lies in a parameter");
            let first = piece.first_element + at - piece.start;
            assert_eq!((own.buffer, own.dtype), (batch.gradient.buffer, batch.key.gradient));
            assert_eq!(own.at(first), batch.gradient.offset / of_gradient + gradient);
            stepped.push((piece.tensor, first, first + elements));
            let Kept { floats: count, remainders, .. } = kept[piece.tensor].1;
            let portion = layout.of(piece.tensor).iter().find(|portion| portion.elements.contains(&first));
            let portion = portion.expect("it has state");
            assert_eq!(batch.key.block, portion.block);
            for k in 0..count {
                let word = u64::from(row.state) + k * u64::from(row.stride);
                assert_eq!(word, portion.float_word(first) + k * portion.len());
                floats.push((portion.block, word, word + elements));
            }
            if remainders {
                let half = 2 * u64::from(row.kept) + parameter % 2;
                halves.push((portion.block, half, half + elements));
            } else if count > 0 {
                assert_eq!(u64::from(row.kept), portion.float_word(first) + (count - 1) * portion.len());
            }
            for i in (0..elements).step_by(1 + elements as usize / 64).chain([elements - 1]) {
                let place = u64::from(row.column) + i;
                let step = match own.layout.by {
                    By::Whole => 0,
                    By::Rows => place / u64::from(row.columns),
                    By::Columns => place % u64::from(row.columns),
                };
                assert_eq!(batch.key.each, own.layout.by != By::Whole);
                assert_eq!(row.by_column == 1, own.layout.by == By::Columns);
                assert_eq!(u64::from(row.segment) + step, u64::from(own.layout.segment_of(first + i)));
            }
            let words = |x: u64| x * of_parameter / 4;
            written.push((0, words(parameter), ((parameter + elements) * of_parameter).div_ceil(4)));
        }
        // Panics if two rows write the same word.
        united(written);
        let chunk = |row: &StepRow| ChunkRow { elements: row.elements, next: row.next, ..ChunkRow::default() };
        let rows: Vec<_> = batch.rows.iter().map(chunk).collect();
        for task in tasks_of(&Table { tasks: batch.tasks, chunks: rows }) {
            assert!(task.len() <= TASK_CHUNKS);
            // Blocks of four elements for each invocation, of 3 iterations at most.
            let lanes = u64::from(limits.workgroup);
            let iterations = task.iter().map(|row| (u64::from(row.elements).div_ceil(4 * lanes) + 1) * 3);
            assert!(iterations.sum::<u64>() <= MOST_ITERATIONS, "loops too long");
        }
    }
    let all = gradients.iter().map(|p| (p.tensor, p.first_element, p.first_element + p.len)).collect();
    assert_eq!(united(stepped), united(all), "what is stepped");
    let block = |(block, _, to): (usize, u64, u64)| assert!(to <= layout.blocks[block]);
    let halves = united(halves);
    united(floats.iter().copied().chain(halves.iter().map(|(of, from, to)| (*of, from / 2, to.div_ceil(2)))).collect())
        .into_iter()
        .for_each(block);
}

/// Checks that each example is added to each sum once, from the first to the last, and that each sum begins with the
/// first. Each tensor has its own buffer of sums; its examples may be in several pieces.
pub(crate) fn check_sums(pairs: &[(Piece, Piece)], limits: Limits) {
    // For each buffer of sums, the next example of each sum; None before the sum has begun.
    let mut added: Vec<(Piece, Vec<Option<u64>>)> = Vec::new();
    for (_, into) in pairs {
        if !added.iter().any(|(known, _)| known.buffer == into.buffer) {
            added.push((*into, vec![None; into.len as usize]));
        }
    }
    for window in sum_windows(pairs, limits).expect("fits") {
        check_window(&window.sums, limits);
        let size = window.dtype.size() as u64;
        if let Some(examples) = &window.examples {
            check_window(examples, limits);
        }
        assert!(window.table.tasks as usize == window.table.chunks.len());
        assert!(window.table.chunks.len() <= limits.rows::<ChunkRow>());
        let (into, added) = added.iter_mut().find(|(into, _)| into.buffer == window.sums.buffer).expect("sums");
        for row in &window.table.chunks {
            assert!(row.count <= limits.workgroup && u64::from(row.elements) <= SUMMED_ROWS);
            for lane in 0..row.count {
                let sum = u64::from(row.slot + lane);
                assert!((sum + 1) * 4 <= window.sums.size);
                let sum = window.sums.offset / 4 + sum - into.start;
                let added = &mut added[sum as usize];
                assert_eq!(row.column == 0, added.is_none(), "a sum begins once");
                *added = Some(added.unwrap_or(0));
                for i in 0..row.elements {
                    let examples = window.examples.expect("there are examples");
                    let at = u64::from(row.first + lane + i * row.element_stride);
                    assert!((at + 1) * size <= examples.size);
                    let at = examples.offset / size + at;
                    let holds = |(of, to): &&(Piece, Piece)| {
                        (of.buffer, of.dtype, to.buffer) == (examples.buffer, window.dtype, into.buffer)
                            && (of.start..of.start + of.len).contains(&at)
                    };
                    let (of, _) = pairs.iter().find(holds).expect("an example lies in a piece");
                    let element = of.first_element + (at - of.start);
                    assert_eq!(element % into.len, sum);
                    assert_eq!(element / into.len, u64::from(row.segment + i - of.layout.segment));
                    assert_eq!(*added, Some(element / into.len), "examples are added in order");
                    *added = Some(element / into.len + 1);
                }
            }
        }
    }
    for (into, added) in added {
        let elements: u64 = pairs.iter().filter(|(_, to)| to.buffer == into.buffer).map(|(of, _)| of.len).sum();
        let examples = elements.checked_div(into.len).unwrap_or(0);
        assert!(added.iter().all(|n| *n == Some(examples)), "{added:?} of {examples}");
    }
}

/// Merges the slots of each segment, then the segments of each group, then the groups, and checks that each result has
/// merged its own slots once. `workgroup` invocations merge `merged` partials.
pub(crate) fn check_merge(groups: &[Vec<u32>], workgroup: u32, merged: u32) {
    let slots: u32 = groups.iter().flatten().sum();
    let mut tree = MergeTree::new(workgroup, merged);
    tree.partials = FIRST_SLOT + slots;
    let (mut first, mut level, mut places) = (FIRST_SLOT, 0, Vec::new());
    for slots in groups {
        let (place, until) = tree.segments(first, slots).expect("fits");
        level = level.max(until);
        places.push(place);
        first += slots.iter().sum::<u32>();
    }
    let total_of = |(place, slots): (&u32, &Vec<u32>)| tree.total(*place, slots.len() as u32, level).expect("fits");
    let totals: Vec<_> = places.iter().zip(groups).map(total_of).collect();
    let everything = tree.everything(&totals).expect("fits");

    // Follow the tree with sums in place of partials; None where nothing has merged yet.
    let mut values = vec![Some(1u64); (FIRST_SLOT + slots) as usize];
    values.resize(tree.partials as usize, None);
    for rows in &tree.levels {
        let mut results = Vec::new();
        for row in rows {
            assert!(row.runs == 1 || (row.runs <= workgroup && row.count <= LANE_PARTIALS));
            assert!(row.runs >= 1 && row.count <= merged);
            for run in 0..row.runs {
                let (from, count) = ((row.from + run * row.count) as usize, row.count as usize);
                let sum = values[from..from + count].iter().map(|value| value.expect("merged before it is there"));
                results.push(((row.into + run) as usize, sum.sum::<u64>()));
            }
        }
        for (into, sum) in results {
            assert!(values[into].replace(sum).is_none(), "two results in one place");
        }
    }
    for ((slots, place), total) in groups.iter().zip(&places).zip(&totals) {
        for (slots, value) in slots.iter().zip(&values[*place as usize..]) {
            assert_eq!(*value, Some(u64::from(*slots)));
        }
        assert_eq!(values[*total as usize], Some(slots.iter().map(|n| u64::from(*n)).sum()));
    }
    assert_eq!(values[everything as usize], Some(slots.into()));
}

/// Checks that there are at least as many workgroups as asked for, and less than one row more, unless they do not fit.
pub(crate) fn check_grid(workgroups: u32, widest: u32) {
    let Some((x, y)) = grid(workgroups, widest) else {
        return assert!(u64::from(workgroups) > u64::from(widest) * u64::from(widest));
    };
    assert!(x >= 1 && x <= widest && y <= widest);
    let (workgroups, x, y) = (u64::from(workgroups), u64::from(x), u64::from(y));
    assert!(x * y >= workgroups && x * y < workgroups + x);
}

/// Tables, sums and merge trees of any tensors under any limits and tuning; see `crate::fuzzing`.
pub fn fuzz(data: &[u8]) {
    // An error means that the bytes are too few for a case.
    let _ = case(&mut Unstructured::new(data));
}

fn case(u: &mut Unstructured<'_>) -> Result<()> {
    let widest = if u.arbitrary()? { 65_535 } else { u.int_in_range(1..=100)? };
    check_grid(u.arbitrary()?, widest);
    let small = u.arbitrary()?;
    let (limits, merged) = if small { small_limits(u)? } else { limits_of_a_device(u)? };
    if u.ratio(1, 4)? {
        let sums = examples_and_sums(u, limits)?;
        check_sums(&sums, limits);
        return Ok(());
    }
    let (pieces, segments) = tensors(u, limits)?;
    if u.ratio(1, 3)? {
        let (parameters, kept) = parameters_of(u, &pieces)?;
        let most = u.int_in_range(16..=limits.binding_bytes.max(64) / 4)?;
        check_steps(&pieces, &parameters, &kept, most, limits);
        return Ok(());
    }
    let tables = check_tables(&pieces, segments, u.ratio(1, 4)?, limits);
    let mut groups = vec![tables.slots];
    if u.arbitrary()? {
        groups.push((0..u.int_in_range(0..=4)?).map(|_| u.int_in_range(0..=5000)).collect::<Result<_>>()?);
    }
    check_merge(&groups, limits.workgroup, merged);
    Ok(())
}

/// Limits as low as the arithmetic allows, so that few elements reach them.
fn small_limits(u: &mut Unstructured<'_>) -> Result<(Limits, u32)> {
    let alignment = 1 << u.int_in_range(4..=8)?;
    let chunk_words = 4 * u.int_in_range(1..=64)?;
    let workgroup = 1 << u.int_in_range(0..=6)?;
    let lane_row = u.int_in_range(1..=64)?;
    // A binding holds a chunk, a row, an element for each invocation, and the rows of a task.
    let fits = u64::from(chunk_words.max(workgroup).max(lane_row) * 4) + alignment;
    let rows = 4 + u64::from(chunk_words.min(TASK_CHUNKS as u32)) * size_of::<ChunkRow>() as u64;
    let limits = Limits {
        chunk_words,
        binding_bytes: fits.max(rows) + 4 * u.int_in_range(0..=1000)?,
        alignment,
        workgroup,
        lane_row,
        long_row: lane_row,
        lane_column: u.int_in_range(1..=300)?,
        windows: u.int_in_range(1..=20)?,
    };
    Ok((limits, u.int_in_range(2..=100)?))
}

/// The limits that a plan takes from a device and any tuning.
fn limits_of_a_device(u: &mut Unstructured<'_>) -> Result<(Limits, u32)> {
    let mut tuning = *u.choose(&[SOFTWARE, HARDWARE])?;
    if u.arbitrary()? {
        tuning.workgroup = 1 << u.int_in_range(3..=10)?;
        tuning.chunks = u.int_in_range(1..=10_000)?;
        tuning.min_chunk_words = u.int_in_range(4..=1 << 24)?;
        tuning.max_chunk_words = u.int_in_range(4..=1 << 24)?;
        tuning.merged_partials = u.int_in_range(2..=1 << 22)?;
    }
    if tuning.check().is_err() {
        tuning = SOFTWARE;
    }
    tuning.narrow(u.int_in_range(SMALLEST_WORKGROUP..=1024)?);
    tuning.check().expect("still fits");
    let most = *u.choose(&[1 << 16, 1 << 27, (1 << 31) - 256, (1 << 31) - 1])?;
    let binding = u.int_in_range(1 << 16..=most)?;
    let alignment = *u.choose(&[32, 64, 128, 256])?;
    let windows = *u.choose(&[1, 2, 8, 256, 1024])?;
    let most = 1 << u.int_in_range(0..=40)?;
    let words = u.int_in_range(0..=most)?;
    Ok((Limits::new(&tuning, words, (binding, alignment), windows), tuning.merged_partials))
}

/// Tensors of some scope, in pieces that lie in buffers in any order, and the number of their segments.
fn tensors(u: &mut Unstructured<'_>, limits: Limits) -> Result<(Vec<Piece>, u32)> {
    let scope =
        *u.choose(&[Scope::Global, Scope::Tensor, Scope::Unit, Scope::Unit, Scope::Example, Scope::ExampleTensor])?;
    let clip = Clip::norm(1.0).scope(scope);
    let examples = u.int_in_range(0..=40)?;
    let (mut shapes, mut axes) = (Vec::new(), Vec::new());
    for _ in 0..u.int_in_range(0..=8)? {
        let shape: Vec<usize> = match (scope, u.int_in_range(0..=3)?) {
            // Long enough for several chunks, and sometimes for several origins, but not for too many chunks to check.
            (Scope::Global | Scope::Tensor, 0) => {
                vec![u.int_in_range(0..=(limits.chunk_words as usize * 100).min(1 << 33))?]
            }
            (_, 0) => vec![u.int_in_range(1..=5)?, u.int_in_range(0..=limits.chunk_words.min(1000) as usize * 10)?],
            (_, 1) => vec![u.int_in_range(0..=100)?],
            (_, 2) => vec![u.int_in_range(0..=20)?, u.int_in_range(0..=60)?],
            _ => vec![u.int_in_range(0..=20)?, u.int_in_range(0..=10)?, u.int_in_range(0..=10)?],
        };
        let any =
            UnitAxis::axes(&(0..shape.len() as isize).filter(|_| u.arbitrary().unwrap_or(false)).collect::<Vec<_>>());
        axes.push(*u.choose(&[UnitAxis::First, UnitAxis::Last, any])?);
        shapes.push(shape);
    }
    if matches!(scope, Scope::Example | Scope::ExampleTensor) {
        shapes.iter_mut().for_each(|shape| shape[0] = examples);
    }
    let len = |shape: &[usize]| shape.iter().map(|n| *n as u64).product();
    let own = shapes.iter().zip(axes);
    let spec = |s, axis| Spec { shape: Some(s), unit_axis: Some(axis), ..Spec::new(Dtype::F32, len(s)) };
    let specs: Vec<_> = own.map(|(s, axis)| spec(s, axis)).collect();
    let segments = Segments::new(&clip, specs.iter().copied()).expect("fits");

    let mut ends = vec![0u64; u.int_in_range(1..=20)?];
    let mut pieces = Vec::new();
    for (tensor, (layout, spec)) in segments.layouts.iter().zip(&specs).enumerate() {
        let dtype = *u.choose(&[Dtype::F32, Dtype::F16, Dtype::BF16])?;
        let mut first_element = 0;
        let parts = u.int_in_range(1..=3)?;
        for part in 1..=parts {
            let rest = spec.len - first_element;
            let len = if part == parts { rest } else { u.int_in_range(0..=rest)? };
            let buffer = u.choose_index(ends.len())?;
            let size = dtype.size() as u64;
            let start = ends[buffer].div_ceil(size) + if u.arbitrary()? { u.int_in_range(0..=300)? } else { 0 };
            ends[buffer] = (start + len) * size;
            pieces.extend(layout.within(first_element..first_element + len).map(|(layout, elements)| {
                let start = start + elements.start - first_element;
                let (first_element, len) = (elements.start, elements.end - elements.start);
                Piece { buffer, dtype, start, len, tensor, first_element, layout }
            }));
            first_element += len;
        }
    }
    if u.arbitrary()? {
        // Reverses the order in each buffer.
        for piece in &mut pieces {
            let end = ends[piece.buffer].next_multiple_of(4) / piece.dtype.size() as u64;
            piece.start = end - piece.start - piece.len;
        }
    }
    Ok((pieces, segments.count))
}

/// Of a tensor: its elements, and what is kept of each.
type KeptOf = (u64, Kept);

/// Places of the parameters of gradients, and what is kept of them.
fn parameters_of(u: &mut Unstructured<'_>, gradients: &[Piece]) -> Result<(Vec<Piece>, Vec<KeptOf>)> {
    let tensors = gradients.iter().map(|p| p.tensor + 1).max().unwrap_or(0);
    let buffers = gradients.iter().map(|p| p.buffer + 1).max().unwrap_or(0);
    let mut ends = vec![0u64; u.int_in_range(1..=4)?];
    let (mut starts, mut kept) = (Vec::new(), Vec::new());
    for tensor in 0..tensors {
        let len = gradients.iter().filter(|p| p.tensor == tensor).map(|p| p.len).sum::<u64>();
        let dtype = *u.choose(&[Dtype::F32, Dtype::F16, Dtype::BF16])?;
        let (buffer, size) = (u.choose_index(ends.len())?, dtype.size() as u64);
        let start = ends[buffer].div_ceil(size) + u.int_in_range(0..=300)?;
        ends[buffer] = (start + len) * size;
        let remainders = dtype == Dtype::BF16 && u.arbitrary()?;
        let own = Kept { floats: u.int_in_range(0..=4)?, remainders, upper: remainders && start % 2 == 1 };
        starts.push((buffers + buffer, dtype, start));
        kept.push((len, own));
    }
    let place = |gradient: &Piece| {
        let (buffer, dtype, start) = starts[gradient.tensor];
        Piece { buffer, dtype, start: start + gradient.first_element, ..*gradient }
    };
    Ok((gradients.iter().map(place).collect(), kept))
}

/// Pieces of tensors of examples, each with that of its sums.
fn examples_and_sums(u: &mut Unstructured<'_>, limits: Limits) -> Result<Vec<(Piece, Piece)>> {
    let examples = u.int_in_range(0..=40)?;
    let tensors = u.int_in_range(0..=4)?;
    let mut found = Vec::new();
    for tensor in 0..tensors {
        let dtype = *u.choose(&[Dtype::F32, Dtype::F16, Dtype::BF16])?;
        let columns = if u.arbitrary()? {
            u.int_in_range(0..=20)?
        } else {
            u.int_in_range(0..=(limits.binding_bytes / 2).min(500))?
        };
        let layout = |by, columns| SegmentLayout { by, columns, segment: 0, first: 0 };
        let start = u.int_in_range(0..=300)?;
        let sums = Piece {
            buffer: 2 * tensors + tensor,
            dtype: Dtype::F32,
            start,
            len: columns,
            tensor,
            first_element: 0,
            layout: layout(By::Whole, columns),
        };
        let all = columns * examples;
        let cut = if u.arbitrary()? { u.int_in_range(0..=all)? } else { 0 };
        for (i, (first_element, end)) in [(0, cut), (cut, all)].into_iter().enumerate() {
            // An empty tensor is one piece; an empty part of another tensor is none.
            if end > first_element || (all == 0 && i == 0) {
                let (start, len) = (u.int_in_range(0..=300)?, end - first_element);
                let (buffer, layout) = (2 * tensor + i, layout(By::Rows, columns));
                found.push((Piece { buffer, dtype, start, len, tensor, first_element, layout }, sums));
            }
        }
    }
    Ok(found)
}

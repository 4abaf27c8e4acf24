//! Cuts the steps of an optimizer: each row a run of a parameter, with its gradients and its state.

use std::collections::HashMap;
use std::ops::Range;

use super::limits::Limits;
use super::piece::Piece;
use super::rows::{StepRow, Window, bytes_of_words};
use super::state::Portion;
use super::{Dtype, TASK_CHUNKS};
use crate::segment::By;

/// A run of elements of a parameter, its gradients, and the portion of state that holds theirs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepPiece<'a> {
    /// With its segments.
    pub(crate) gradient: Piece,
    pub(crate) parameter: Piece,
    pub(crate) state: &'a Portion,
    /// The place of its clip and of its optimizer.
    pub(crate) clip: usize,
    pub(crate) optimizer: usize,
}

/// Which words of parameters a dispatch writes. Within one dispatch no two rows write the same word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Part {
    /// Words that are wholly the piece's.
    Whole,
    /// Upper halves of words whose lower halves are not the piece's.
    Upper,
    /// The opposite.
    Lower,
}

/// What the rows of a dispatch have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StepKey {
    pub(crate) clip: usize,
    pub(crate) optimizer: usize,
    pub(crate) gradient: Dtype,
    pub(crate) parameter: Dtype,
    pub(crate) block: usize,
    /// Whether elements of a row belong to several segments.
    pub(crate) each: bool,
    part: Part,
    gradients: usize,
    parameters: usize,
}

/// A dispatch: rows, in tasks, with the windows that they use.
#[derive(Clone, Debug)]
pub(crate) struct StepBatch {
    pub(crate) key: StepKey,
    pub(crate) gradient: Window,
    pub(crate) parameter: Window,
    pub(crate) tasks: u32,
    pub(crate) rows: Vec<StepRow>,
}

/// A row before its windows are known, with its first elements counted from the start of the buffers.
type Unplaced = (u64, u64, StepRow);

/// A dispatch that may get more rows. Ranges are in bytes.
struct Open {
    key: StepKey,
    gradient: Range<u64>,
    parameter: Range<u64>,
    rows: Vec<Unplaced>,
}

/// Cuts pieces into rows, and gathers these in dispatches. None if a place exceeds 32 bits.
pub(crate) fn step_batches(pieces: &[StepPiece<'_>], limits: Limits) -> Option<Vec<StepBatch>> {
    let mut all: Vec<Open> = Vec::new();
    let mut open: HashMap<StepKey, usize> = HashMap::new();
    for piece in pieces {
        for (part, elements) in runs(piece, limits) {
            let bytes = |of: &Piece| bytes_of_words(of.at(elements.start)..of.at(elements.end), of.dtype);
            let (gradient, parameter) = (bytes(&piece.gradient), bytes(&piece.parameter));
            let key = StepKey {
                clip: piece.clip,
                optimizer: piece.optimizer,
                gradient: piece.gradient.dtype,
                parameter: piece.parameter.dtype,
                block: piece.state.block,
                each: piece.gradient.layout.by != By::Whole,
                part,
                gradients: piece.gradient.buffer,
                parameters: piece.parameter.buffer,
            };
            let row = row(piece, &elements)?;
            let fitting = open.get(&key).copied().filter(|at| {
                let Open { gradient: own, parameter: of, rows, .. } = &all[*at];
                let fits = |own: &Range<u64>, more: &Range<u64>| {
                    Window::of(0, &joined(own, more), limits.alignment).size <= limits.binding_bytes
                };
                rows.len() < limits.rows::<StepRow>() && fits(own, &gradient) && fits(of, &parameter)
            });
            if let Some(at) = fitting {
                let Open { gradient: own, parameter: of, rows, .. } = &mut all[at];
                (*own, *of) = (joined(own, &gradient), joined(of, &parameter));
                rows.push(row);
            } else {
                open.insert(key, all.len());
                all.push(Open { key, gradient, parameter, rows: vec![row] });
            }
        }
    }
    all.into_iter().map(|open| open.placed(limits)).collect()
}

/// The runs of a piece, each with the words that it writes.
fn runs(piece: &StepPiece<'_>, limits: Limits) -> Vec<(Part, Range<u64>)> {
    let Piece { first_element: start, len, dtype, .. } = piece.parameter;
    let end = start + len;
    if len == 0 {
        return Vec::new();
    }
    let mut runs = Vec::new();
    let (mut from, mut to) = (start, end);
    if dtype.size() == 2 {
        if piece.parameter.at(start) % 2 == 1 {
            runs.push((Part::Upper, start..start + 1));
            from += 1;
        }
        if from < end && piece.parameter.at(end) % 2 == 1 {
            runs.push((Part::Lower, end - 1..end));
            to -= 1;
        }
    }
    // An even number of elements, which fill as many words at most.
    let step = u64::from(limits.chunk_words);
    runs.extend((from..to).step_by(step as usize).map(|first| (Part::Whole, first..to.min(first + step))));
    runs
}

fn joined(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.min(b.start)..a.end.max(b.end)
}

fn row(piece: &StepPiece<'_>, elements: &Range<u64>) -> Option<Unplaced> {
    let narrow = |x: u64| u32::try_from(x).ok();
    let StepPiece { gradient, parameter, state, .. } = piece;
    let (first, layout, floats) = (elements.start, &gradient.layout, state.kept.floats);
    // Where nothing is kept, places mean nothing, and may be too large.
    let float = |x: u64| if floats == 0 { 0 } else { x };
    let kept = if state.kept.remainders {
        state.remainder_word() + (u64::from(state.kept.upper) + first - state.elements.start) / 2
    } else {
        // A master copy is the last of the floats.
        float(state.float_word(first) + floats.saturating_sub(1) * state.len())
    };
    let (column, columns) = gradient.column_of(first);
    let by_column = layout.by == By::Columns;
    let row = StepRow {
        elements: narrow(elements.end - first)?,
        state: narrow(float(state.float_word(first)))?,
        stride: narrow(float(state.len()))?,
        kept: narrow(kept)?,
        segment: if by_column { layout.segment } else { layout.segment_of(first) },
        column,
        columns,
        by_column: by_column.into(),
        ..StepRow::default()
    };
    Some((gradient.at(first), parameter.at(first), row))
}

impl Open {
    fn placed(self, limits: Limits) -> Option<StepBatch> {
        let Self { key, gradient, parameter, rows } = self;
        let gradient = Window::of(key.gradients, &gradient, limits.alignment);
        let parameter = Window::of(key.parameters, &parameter, limits.alignment);
        let place =
            |first: u64, window: &Window, dtype: Dtype| u32::try_from(first - window.offset / dtype.size() as u64).ok();
        let mut placed = Vec::with_capacity(rows.len());
        for (of_gradient, of_parameter, row) in rows {
            placed.push(StepRow {
                gradient: place(of_gradient, &gradient, key.gradient)?,
                parameter: place(of_parameter, &parameter, key.parameter)?,
                ..row
            });
        }
        // Tasks are rows that follow one another, together no longer than the longest.
        let mut tasks: Vec<Range<usize>> = Vec::new();
        let mut elements = 0;
        for (i, row) in placed.iter().enumerate() {
            elements += u64::from(row.elements);
            match tasks.last_mut() {
                Some(task) if elements <= limits.chunk_words.into() && task.len() < TASK_CHUNKS => task.end += 1,
                _ => {
                    tasks.push(i..i + 1);
                    elements = row.elements.into();
                }
            }
        }
        // The first rows of tasks come first, so that their numbers are those of workgroups.
        let mut ordered: Vec<_> = tasks.iter().map(|task| placed[task.start]).collect();
        for (head, task) in tasks.iter().enumerate() {
            let mut last = head;
            for row in &placed[task.start + 1..task.end] {
                ordered[last].next = u32::try_from(ordered.len()).ok()?;
                last = ordered.len();
                ordered.push(*row);
            }
        }
        Some(StepBatch { key, gradient, parameter, tasks: u32::try_from(tasks.len()).ok()?, rows: ordered })
    }
}

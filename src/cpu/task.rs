//! Tasks: pieces that are measured in parallel, and how their partials merge.

use super::pool::in_parallel;
use super::tuning::{CHUNK, COLUMNS};
use super::{columns, norm};
use crate::dtype::with_element;
use crate::partial::{Location, Partial};
use crate::segment::{By, Segments};
use crate::{Dtype, NormType, Tensor};

/// A rectangle of a tensor's matrix, from its first element to its last.
pub(super) struct Task<'a> {
    pub(super) at: Location,
    pub(super) dtype: Dtype,
    pub(super) data: &'a [u8],
    shape: Shape,
    /// Its first segment; the others follow.
    segment: u32,
}

#[derive(Clone, Copy)]
enum Shape {
    /// Elements of one segment.
    Run,
    /// The number of whole rows, and their length; each row is a segment.
    Rows(usize, usize),
    /// The number of columns, and the distance from row to row in elements; each column is a segment.
    Columns(usize, usize),
}

impl Task<'_> {
    /// The size of its elements in bytes. `data` of columns also holds elements of other tasks.
    pub(super) fn bytes(&self) -> usize {
        match self.shape {
            Shape::Run | Shape::Rows(..) => self.data.len(),
            Shape::Columns(count, stride) => {
                let size = self.dtype.size();
                self.data.len().div_ceil(stride * size) * count * size
            }
        }
    }

    /// The number of its segments.
    fn slots(&self) -> usize {
        match self.shape {
            Shape::Run => 1,
            Shape::Rows(count, _) | Shape::Columns(count, _) => count,
        }
    }

    /// The partial of each segment.
    pub(super) fn norm(&self, norm_type: NormType, slots: &mut [Partial]) {
        with_element!(self.dtype, T => match self.shape {
            Shape::Run => norm::norms::<T>(norm_type, self.at, self.data, self.data.len() / size_of::<T>(), slots),
            Shape::Rows(_, len) => norm::norms::<T>(norm_type, self.at, self.data, len, slots),
            Shape::Columns(_, stride) => columns::norms::<T>(norm_type, self.at, self.data, stride, slots),
        });
    }
}

/// Cuts the counted tensors into tasks, segment by segment within each tensor.
fn tasks<'a>(tensors: &[Tensor<'a>], segments: &Segments) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    let counted = |(_, (t, _)): &(usize, (&Tensor<'a>, _))| t.spec.counted;
    let of_tensors = tensors.iter().zip(&segments.layouts).enumerate().filter(counted);
    let matrices = of_tensors.flat_map(|(i, (t, of))| of.within(0..t.len() as u64).map(move |found| (i, t, found)));
    for (tensor, t, (layout, elements)) in matrices {
        let (dtype, size) = (t.dtype(), t.dtype().size());
        let (start, all) = (elements.start as usize, (elements.end - elements.start) as usize);
        let mut add = |first: usize, len: usize, shape, segment: usize| {
            let first = start + first;
            let at = Location { tensor, index: first as u64 };
            let data = &t.data[first * size..(first + len) * size];
            tasks.push(Task { at, dtype, data, shape, segment: layout.segment + segment as u32 });
        };
        // Rows are never longer than the tensor.
        let columns = layout.columns as usize;
        match layout.by {
            By::Whole => {
                for first in (0..all).step_by(CHUNK) {
                    add(first, CHUNK.min(all - first), Shape::Run, 0);
                }
            }
            By::Rows if columns > CHUNK / 2 => {
                for (row, start) in (0..all).step_by(columns).enumerate() {
                    for first in (0..columns).step_by(CHUNK) {
                        add(start + first, CHUNK.min(columns - first), Shape::Run, row);
                    }
                }
            }
            By::Rows => {
                let rows = CHUNK / columns.max(1);
                for (i, first) in (0..all).step_by(rows * columns.max(1)).enumerate() {
                    let len = (rows * columns).min(all - first);
                    add(first, len, Shape::Rows(len / columns, columns), i * rows);
                }
            }
            By::Columns => {
                let rows = (CHUNK / COLUMNS * 4).min(all / columns.max(1));
                for top in (0..all).step_by((rows * columns).max(1)) {
                    let rows = rows.min((all - top) / columns);
                    for left in (0..columns).step_by(COLUMNS) {
                        let width = COLUMNS.min(columns - left);
                        add(top + left, (rows - 1) * columns + width, Shape::Columns(width, columns), left);
                    }
                }
            }
        }
    }
    tasks
}

/// The partial of each segment: runs `task` on every task, in parallel if there are many, and merges the slots in
/// order.
pub(super) fn merged(
    tensors: &[Tensor<'_>],
    segments: &Segments,
    task: impl Fn(&Task<'_>, &mut [Partial]) + Send + Sync,
) -> Vec<Partial> {
    let tasks = tasks(tensors, segments);
    let mut slots = vec![Partial::EMPTY; tasks.iter().map(Task::slots).sum()];
    let mut rest = &mut slots[..];
    let work = tasks.iter().map(|task| {
        let (own, others) = std::mem::take(&mut rest).split_at_mut(task.slots());
        rest = others;
        (task, own)
    });
    let bytes = tasks.iter().map(Task::bytes).sum();
    in_parallel(work, tasks.len(), bytes, |(of, slots)| task(of, slots));
    let mut partials = vec![Partial::EMPTY; segments.count as usize];
    let mut next = slots.iter();
    for task in &tasks {
        for (partial, slot) in partials[task.segment as usize..].iter_mut().zip(next.by_ref().take(task.slots())) {
            *partial = partial.merge(*slot);
        }
    }
    partials
}

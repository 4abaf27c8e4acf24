//! Tasks: pieces that are measured in parallel, and how their partials merge.

use std::ops::Deref;

use super::pool::in_parallel;
use super::tuning::{CHUNK, COLUMNS};
use super::{columns, norm};
use crate::dtype::with_element;
use crate::partial::{Location, Partial};
use crate::segment::{By, Segments};
use crate::{Dtype, HostTensor, NormType};

/// A rectangle of a tensor's matrix, from its first element to its last.
pub(super) struct Task<'a> {
    pub(super) at: Location,
    pub(super) dtype: Dtype,
    pub(super) data: &'a [u8],
    rows: usize,
    columns: usize,
    /// The distance from row to row in elements. `data` between two rows holds elements of other tasks.
    stride: usize,
    /// Whether each column is a segment, or else each row.
    by_columns: bool,
    /// Its first segment; the others follow.
    segment: u32,
}

impl Task<'_> {
    /// The size of its elements in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.rows * self.columns * self.dtype.size()
    }

    /// The number of its segments.
    fn slots(&self) -> usize {
        if self.by_columns { self.columns } else { self.rows }
    }

    /// The partial of each segment.
    pub(super) fn norm(&self, norm_type: NormType, slots: &mut [Partial]) {
        with_element!(self.dtype, T => if self.by_columns {
            columns::norms::<T>(norm_type, self.at, self.data, self.stride, slots);
        } else {
            norm::norms::<T>(norm_type, self.at, self.data, self.columns, slots);
        });
    }
}

/// Cuts the counted tensors into tasks, segment by segment within each tensor.
fn tasks<'a, D: Deref<Target = [u8]>>(tensors: &'a [HostTensor<'_, D>], segments: &Segments) -> Vec<Task<'a>> {
    let mut tasks = Vec::with_capacity(tensors.len());
    let of_tensors = tensors.iter().zip(&segments.layouts).enumerate().filter(|(_, (t, _))| t.spec.counted);
    let matrices = of_tensors.flat_map(|(i, (t, of))| of.within(0..t.spec.len).map(move |found| (i, t, found)));
    for (tensor, t, (layout, elements)) in matrices {
        let (dtype, size) = (t.dtype(), t.dtype().size());
        let (start, all) = (elements.start as usize, (elements.end - elements.start) as usize);
        // Rows are never longer than the tensor. A whole matrix is one row.
        let stride = layout.columns as usize;
        let all_rows = all.checked_div(stride).unwrap_or(0);
        let (height, width) = match layout.by {
            By::Columns => (CHUNK / COLUMNS * 4, COLUMNS),
            By::Rows if stride <= CHUNK / 2 => (CHUNK / stride, stride),
            By::Whole | By::Rows => (1, CHUNK),
        };
        for top in (0..all_rows).step_by(height) {
            let rows = height.min(all_rows - top);
            for left in (0..stride).step_by(width) {
                let columns = width.min(stride - left);
                let (first, len) = (start + top * stride + left, (rows - 1) * stride + columns);
                let segment = match layout.by {
                    By::Whole => 0,
                    By::Rows => top,
                    By::Columns => left,
                };
                tasks.push(Task {
                    at: Location { tensor, index: first as u64 },
                    dtype,
                    data: &t.data[first * size..(first + len) * size],
                    rows,
                    columns,
                    stride,
                    by_columns: layout.by == By::Columns,
                    segment: layout.segment + segment as u32,
                });
            }
        }
    }
    tasks
}

/// The partial of each segment: runs `task` on every task, in parallel if there are many, and merges the slots in
/// order.
pub(super) fn merged<D: Deref<Target = [u8]>>(
    tensors: &[HostTensor<'_, D>],
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

//! Which partials merge, level by level. Host side of `shaders/merge.wgsl`.

use bytemuck::{Pod, Zeroable};

use super::tuning::LANE_PARTIALS;

/// Twin of `MergeRow` in `shaders/merge.wgsl`: each of `runs` runs of `count` partials becomes one partial. Runs are
/// consecutive, and so are the results.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct MergeRow {
    pub(super) from: u32,
    pub(super) count: u32,
    pub(super) into: u32,
    pub(super) runs: u32,
}

/// How partials merge: levels of rows, to be run one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MergeTree {
    pub(super) levels: Vec<Vec<MergeRow>>,
    /// The number of partials, with those that merging makes.
    pub(super) partials: u32,
    /// Invocations in a workgroup, and how many partials it merges.
    workgroup: u32,
    merged: u32,
}

impl MergeTree {
    pub(super) fn new(workgroup: u32, merged: u32) -> Self {
        Self { levels: Vec::new(), partials: 0, workgroup, merged }
    }

    /// Plans to merge the slots of each segment into one partial. `slots` counts the slots of each segment; all are
    /// consecutive, from `first` on. Returns the first of the merged partials, which are consecutive, and the level
    /// from which on they exist. Other segments may use the same levels. None if 2^32 partials do not suffice.
    pub(super) fn segments(&mut self, first: u32, slots: &[u32]) -> Option<(u32, usize)> {
        let mut runs = Vec::with_capacity(slots.len());
        let mut from = first;
        for count in slots {
            runs.push((from, *count));
            from = from.checked_add(*count)?;
        }
        let mut start = first;
        let mut level = 0;
        // With one slot for each segment they are in place already.
        while runs.iter().any(|(_, count)| *count != 1) {
            start = self.partials;
            runs = self.level(level, &runs)?;
            level += 1;
        }
        Some((start, level))
    }

    /// Plans to merge consecutive partials, which exist from a level on, into one. Returns its place.
    pub(super) fn total(&mut self, first: u32, count: u32, from_level: usize) -> Option<u32> {
        let mut runs = vec![(first, count)];
        let mut level = from_level;
        while runs[0].1 != 1 {
            runs = self.level(level, &runs)?;
            level += 1;
        }
        Some(runs[0].0)
    }

    /// Plans to merge totals, which exist after all levels so far, into one. Returns its place.
    pub(super) fn everything(&mut self, totals: &[u32]) -> Option<u32> {
        if let [total] = totals {
            return Some(*total);
        }
        // First copy them side by side, then merge them.
        let first = self.partials;
        let mut rows = Vec::new();
        for total in totals {
            rows.push(MergeRow { from: *total, count: 1, into: self.partials, runs: 1 });
            self.partials = self.partials.checked_add(1)?;
        }
        if !rows.is_empty() {
            self.levels.push(rows);
        }
        self.total(first, u32::try_from(totals.len()).ok()?, self.levels.len())
    }

    /// Plans to merge each run of partials into a shorter run, and an empty run into one empty partial. Returns the new
    /// runs.
    fn level(&mut self, level: usize, runs: &[(u32, u32)]) -> Option<Vec<(u32, u32)>> {
        if self.levels.len() <= level {
            self.levels.resize_with(level + 1, Vec::new);
        }
        let mut rows: Vec<MergeRow> = std::mem::take(&mut self.levels[level]);
        let before = rows.len();
        let mut merged = Vec::with_capacity(runs.len());
        for &(from, count) in runs {
            let first = self.partials;
            for at in (0..count.max(1)).step_by(self.merged as usize) {
                let row =
                    MergeRow { from: from + at, count: (count - at).min(self.merged), into: self.partials, runs: 1 };
                let follows = |last: &&mut MergeRow| {
                    last.count == row.count
                        && row.count <= LANE_PARTIALS
                        && last.runs < self.workgroup
                        && last.from + last.count * last.runs == row.from
                        && last.into + last.runs == row.into
                };
                match rows[before..].last_mut().filter(follows) {
                    Some(last) => last.runs += 1,
                    None => rows.push(row),
                }
                self.partials = self.partials.checked_add(1)?;
            }
            merged.push((first, self.partials - first));
        }
        self.levels[level] = rows;
        Some(merged)
    }
}

#[cfg(test)]
#[path = "tests/merge.rs"]
mod tests;

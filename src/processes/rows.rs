//! What ranks know of segments, as rows of a message, and the total of all ranks.

use std::hash::{DefaultHasher, Hash, Hasher};

use bytemuck::{Pod, Zeroable};

use super::exchange::{GroupCall, Kind, Operation};
use crate::partial::{Location, Partial};
use crate::segment::{Family, Segments};
use crate::{Clip, Error, NonFiniteElements};

/// A partial, its number of elements, and the rank of the first non-finite one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
struct Row {
    sum: f64,
    exponent: i64,
    max: f64,
    non_finite: u64,
    elements: u64,
    tensor: u64,
    index: u64,
    /// [`NO_RANK`] if all is finite.
    rank: u32,
    flags: u32,
}

const NO_RANK: u32 = u32::MAX;
const HAS_NAN: u32 = 1;
const HAS_OUTSIDE: u32 = 2;

impl Row {
    fn new(partial: &Partial, elements: u64, rank: u32) -> Self {
        let (tensor, index) = partial.first.map_or((0, 0), |first| (first.tensor as u64, first.index));
        Self {
            sum: partial.sum,
            exponent: partial.exponent,
            max: partial.max,
            non_finite: partial.non_finite,
            elements,
            tensor,
            index,
            rank: if partial.first.is_some() { rank } else { NO_RANK },
            flags: if partial.nan { HAS_NAN } else { 0 } | if partial.outside { HAS_OUTSIDE } else { 0 },
        }
    }

    /// The partial. The place of the first non-finite element is in the list of the rank that holds it.
    fn partial(&self) -> Partial {
        let at = Location { tensor: usize::try_from(self.tensor).unwrap_or(usize::MAX), index: self.index };
        Partial {
            sum: self.sum,
            exponent: self.exponent,
            max: self.max,
            non_finite: self.non_finite,
            nan: self.flags & HAS_NAN != 0,
            first: (self.rank != NO_RANK).then_some(at),
            outside: self.flags & HAS_OUTSIDE != 0,
        }
    }

    fn place(&self) -> (u32, u64, u64) {
        (self.rank, self.tensor, self.index)
    }

    fn merge(&self, other: &Self) -> Self {
        let merged = self.partial().merge(other.partial());
        let first = if self.place() <= other.place() { self } else { other };
        let elements = self.elements.saturating_add(other.elements);
        let (rank, tensor, index) = first.place();
        Self { rank, tensor, index, ..Self::new(&merged, elements, rank) }
    }
}

/// What was measured of a group of tensors, by this process or by all processes together.
#[derive(Clone, Debug)]
pub(crate) struct GroupPartials {
    pub(crate) clip: Clip,
    pub(crate) segments: Segments,
    /// By segment.
    pub(crate) partials: Vec<Partial>,
    /// The partials of the parameters if the clip needs them, else none.
    pub(crate) parameters: Vec<Partial>,
}

/// The total over a group of tensors.
#[derive(Clone, Debug)]
pub(crate) struct GroupTotal {
    pub(crate) partial: Partial,
    pub(crate) non_finite: Option<NonFiniteElements>,
}

impl GroupTotal {
    /// The total of a partial of everything, which this process measured alone.
    pub(crate) fn of<'a>(partial: Partial, name_of: impl Fn(usize) -> Option<&'a str>) -> Self {
        Self { partial, non_finite: partial.non_finite_elements(name_of) }
    }
}

impl GroupPartials {
    /// The partials of one segment, from its partial and its number of elements.
    pub(crate) fn of_one(clip: &Clip, mut segments: Segments, partial: Partial, elements: u64) -> Self {
        segments.set_elements(clip, &[elements]);
        Self::new(clip, segments, vec![partial])
    }

    pub(crate) fn new(clip: &Clip, segments: Segments, partials: Vec<Partial>) -> Self {
        Self { clip: *clip, segments, partials, parameters: Vec::new() }
    }

    /// The total, if this process is alone.
    pub(crate) fn total<'a>(&self, name_of: impl Fn(usize) -> Option<&'a str>) -> GroupTotal {
        GroupTotal::of(self.partials.iter().fold(Partial::EMPTY, |a, b| a.merge(*b)), name_of)
    }

    fn rows(&self, rank: u32) -> Vec<Row> {
        let of = |partials: &[Partial]| -> Vec<_> {
            let row = |(partial, family): (&Partial, &Family)| Row::new(partial, family.elements, rank);
            partials.iter().zip(self.segments.families()).map(row).collect()
        };
        [of(&self.partials), of(&self.parameters)].concat()
    }

    fn set_rows(&mut self, rows: &[Row]) {
        for (partial, row) in self.partials.iter_mut().chain(&mut self.parameters).zip(rows) {
            *partial = row.partial();
        }
        let elements: Vec<_> = rows.iter().take(self.partials.len()).map(|row| row.elements).collect();
        self.segments.set_elements(&self.clip, &elements);
    }
}

/// A digest of what ranks must have in common to merge: clips and segments.
fn description(parts: &[GroupPartials]) -> u64 {
    let mut digest = DefaultHasher::new();
    env!("CARGO_PKG_VERSION").hash(&mut digest);
    for part in parts {
        format!("{:?}", part.clip).hash(&mut digest);
        part.segments.describe(&mut digest);
    }
    digest.finish()
}

/// Merges what was measured of each group of tensors with what the other ranks measured. Returns the total of each
/// group, with the non-finite elements of every rank.
///
/// # Errors
/// Those of the group; nothing changes then.
pub(crate) async fn merge<'a>(
    call: GroupCall<'_>,
    parts: &mut [GroupPartials],
    name_of: impl Fn(usize, usize) -> Option<&'a str>,
) -> Result<Vec<GroupTotal>, Error> {
    let group = call.group();
    let rows: Vec<_> = parts.iter().flat_map(|part| part.rows(group.rank())).collect();
    let operation = Operation { kind: Kind::Merge, description: description(parts), segments: rows.len() as u64 };
    let body = bytemuck::cast_slice(&rows).to_vec();
    let merged = call.exchange(operation, true, body, merge_bodies).run().await?;
    let merged: Vec<Row> = merged.chunks_exact(size_of::<Row>()).map(bytemuck::pod_read_unaligned).collect();
    let (mut of_parts, mut totals, mut rest) = (Vec::new(), Vec::new(), &merged[..]);
    for part in parts.iter() {
        let (own, others) = rest.split_at(part.partials.len() + part.parameters.len());
        let segments = &own[..part.partials.len()];
        totals.push(segments.iter().fold(Row::new(&Partial::EMPTY, 0, NO_RANK), |a, b| a.merge(b)));
        of_parts.push(own);
        rest = others;
    }
    // Names cost a second message, which is needed only if something is not finite.
    let mut names = vec![String::new(); parts.len()];
    if totals.iter().any(|total| total.rank != NO_RANK) {
        for ((i, total), name) in totals.iter().enumerate().zip(&mut names) {
            if total.rank == group.rank() {
                *name = name_of(i, total.tensor as usize).unwrap_or_default().into();
            }
        }
        let exchange = GroupCall::begin(group).exchange(Operation::of(Kind::Names), true, join(&names), merge_names);
        let merged = exchange.run().await?;
        names = split(&merged).into_iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    }
    parts.iter_mut().zip(of_parts).for_each(|(part, rows)| part.set_rows(rows));
    let total = |(row, name): (&Row, String)| {
        let (partial, rank) = (row.partial(), (group.size() > 1).then_some(row.rank));
        let found = partial.non_finite_elements(|_| (!name.is_empty()).then_some(&*name));
        GroupTotal { partial, non_finite: found.map(|found| NonFiniteElements { rank, ..found }) }
    };
    Ok(totals.iter().zip(names).map(total).collect())
}

fn merge_bodies(low: &[u8], high: &[u8]) -> Option<Vec<u8>> {
    let rows = |bytes| <[u8]>::chunks_exact(bytes, size_of::<Row>()).map(bytemuck::pod_read_unaligned::<Row>);
    let merged: Vec<_> = rows(low).zip(rows(high)).map(|(low, high)| low.merge(&high)).collect();
    (low.len() == high.len()).then(|| bytemuck::cast_slice(&merged).to_vec())
}

/// Joins texts, each with its length before it.
pub(crate) fn join<T: AsRef<[u8]>>(texts: &[T]) -> Vec<u8> {
    let with_length = |text: &T| [&(text.as_ref().len() as u64).to_le_bytes(), text.as_ref()].concat();
    texts.iter().flat_map(with_length).collect()
}

/// Splits what [`join`] has joined.
pub(crate) fn split(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut texts = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some((text, rest)) = rest.split_at_checked(length) else { break };
        texts.push(text);
        bytes = rest;
    }
    texts
}

/// For each name, takes the text that is not empty: only the rank that has the tensor knows its name.
fn merge_names(low: &[u8], high: &[u8]) -> Option<Vec<u8>> {
    let (own, other) = (split(low), split(high));
    let names: Vec<_> = own.iter().zip(&other).map(|(a, b)| if a.is_empty() { *b } else { *a }).collect();
    (own.len() == other.len()).then(|| join(&names))
}

#[cfg(test)]
#[path = "tests/rows.rs"]
mod tests;

//! Tests of `src/processes/rows.rs`.

use super::*;
use crate::processes::thread_group;
use std::task::{Context, Poll, Waker};

/// A group as large as on the largest machines. Every rank gets the same bits, the error is that of as many
/// roundings as the tree is deep, and the first rank learns of a non-finite element on the last one.
#[test]
fn sixteen_thousand_ranks_agree() {
    const RANKS: u32 = 1 << 14;
    let row = |rank: u32| {
        let bad = (rank == RANKS - 1).then_some(Location { tensor: 3, index: 7 });
        let sum = 1.0 + f64::from(rank.wrapping_mul(2_654_435_761)) / 2f64.powi(32);
        let partial = Partial { sum, non_finite: bad.is_some().into(), first: bad, ..Partial::EMPTY };
        Row::new(&partial, 1000, rank)
    };
    let rows: Vec<_> = (0..RANKS).map(row).collect();
    // In units of 2^-32 each is a whole number.
    let exact: u64 = rows.iter().map(|row| (row.sum * 2f64.powi(32)) as u64).sum();
    let groups = thread_group(RANKS, None);
    let operation = Operation { kind: Kind::Merge, description: 1, segments: 1 };
    let merging = groups.iter().zip(&rows).map(|(group, row)| {
        let body = bytemuck::bytes_of(row).to_vec();
        Box::pin(GroupCall::begin(&**group).exchange(operation, true, body, merge_bodies).run())
    });
    let mut merging: Vec<_> = merging.collect();
    let mut context = Context::from_waker(Waker::noop());
    let mut ends = Vec::new();
    while !merging.is_empty() {
        merging.retain_mut(|one| match one.as_mut().poll(&mut context) {
            Poll::Ready(merged) => {
                ends.push(merged.expect("all take part"));
                false
            }
            Poll::Pending => true,
        });
    }
    assert!(ends.iter().all(|end| *end == ends[0]));
    let all: Row = bytemuck::pod_read_unaligned(&ends[0]);
    let error = (all.sum * 2f64.powi(32) / exact as f64 - 1.0).abs();
    assert!(error <= 14.0 * 2f64.powi(-53), "{error:e}");
    assert_eq!((all.elements, all.place()), (1000 * u64::from(RANKS), (RANKS - 1, 3, 7)));
}

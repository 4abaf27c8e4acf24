//! Tests of `src/gpu/merge.rs`.

use super::super::tests::tables_hold::check_merge;
use super::*;

#[test]
fn partials_merge_to_one_for_each_segment_and_one_for_all() {
    let groups = [
        vec![],
        vec![0],
        vec![1],
        vec![1024],
        vec![1025],
        vec![3, 0, 5000],
        vec![1; 3000],
        vec![2; 3000],
        vec![2_000_000],
    ];
    for slots in &groups {
        check_merge(std::slice::from_ref(slots), 64, 1024);
    }
    check_merge(&groups, 64, 1024);
    check_merge(&groups, 8, 2);
    check_merge(&[], 8, 2);
    let mut full = MergeTree { partials: u32::MAX, ..MergeTree::new(64, 1024) };
    assert!(full.segments(0, &[2]).is_none());
}

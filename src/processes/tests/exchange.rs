//! Tests of `src/processes/exchange.rs`.

use super::*;
use crate::processes::thread_group;

/// Each message that is sent is received, in the step that the other rank has reached. All ranks finish with the
/// same body, which holds each rank once and in order.
#[test]
fn every_number_of_ranks_comes_to_the_same() {
    // Lists of ranks, as text that shows how they merged.
    let merge = |low: &[u8], high: &[u8]| Some([b"(", low, high, b")"].concat());
    for size in 1..=33 {
        let groups = thread_group(size, None);
        let agree = Operation::of(Kind::Agree);
        let exchanges =
            groups.iter().zip(b'A'..).map(|(g, id)| GroupCall::begin(&**g).exchange(agree, true, vec![id], merge));
        let mut exchanges: Vec<_> = exchanges.collect();
        let mut rounds = 0;
        loop {
            // From last to first, so that the exchange takes many rounds.
            let done = exchanges.iter_mut().rev().filter_map(|e| e.advance().expect("well").then_some(())).count();
            if done == size as usize {
                break;
            }
            rounds += 1;
            assert!(rounds < 40, "{size} ranks wait for each other");
        }
        let all: Vec<_> = exchanges.iter().map(|e| String::from_utf8_lossy(&e.body).into_owned()).collect();
        assert!(all.iter().all(|of| *of == all[0]), "{all:?}");
        let ranks: String = all[0].chars().filter(|c| !"()".contains(*c)).collect();
        assert_eq!(ranks, (0..size).map(|rank| char::from(b'A' + rank as u8)).collect::<String>());
        // The tree is no deeper than necessary.
        let depth = all[0].chars().fold((0u32, 0), |(open, most), c| match c {
            '(' => (open + 1, most.max(open + 1)),
            ')' => (open - 1, most),
            _ => (open, most),
        });
        assert_eq!(depth.1, size.next_power_of_two().ilog2(), "{}", all[0]);
    }
}

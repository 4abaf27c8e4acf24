//! Tests of `src/gpu/profile.rs`.

use super::*;

#[test]
fn clocks_that_stand_still_or_go_backwards_give_no_negative_times() {
    assert_eq!(spans(&[10, 12, 15, 20], 0.5e9), [0.0..1.0, 2.5..5.0]);
    for ticks in [[0; 4], [7; 4], [9, 3, 2, 1], [u64::MAX, 0, 5, u64::MAX]] {
        for span in spans(&ticks, 1.0) {
            assert!(span.start >= 0.0 && span.end >= span.start, "{ticks:?}: {span:?}");
        }
    }
    assert!(spans(&[], 1.0).is_empty());
    assert!(median_speed(8, &[0.0..0.0, 1.0..1.0]).is_infinite());
}

//! Tests of `src/partial.rs`.

use super::*;

#[test]
fn ldexp_reaches_both_ends() {
    assert_eq!(ldexp(1.5, 4), 24.0);
    assert_eq!(ldexp(1.0, -1074), f64::from_bits(1));
    assert_eq!(ldexp(f64::from_bits(1), 1074 + 1023), 2f64.powi(1023));
    assert_eq!(ldexp(1.0, 2000), f64::INFINITY);
    assert_eq!(ldexp(1.0, -3000), 0.0);
}

#[test]
fn merging_keeps_the_larger_scale() {
    let huge = Partial { sum: 1.0, exponent: 2000, ..Partial::EMPTY };
    let small = Partial { sum: 3.0, exponent: -2000, ..Partial::EMPTY };
    assert_eq!(huge.merge(small), huge);
    assert_eq!(small.merge(huge), huge);
    let twice = huge.merge(huge);
    assert_eq!((twice.sum, twice.exponent), (2.0, 2000));
    assert_eq!(small.merge(Partial::EMPTY), small);
    assert_eq!(Partial::EMPTY.merge(small), small);
}

#[test]
fn the_first_bad_element_is_the_first_in_list_order() {
    let at = |tensor, index| Partial { first: Some(Location { tensor, index }), ..Partial::EMPTY };
    assert_eq!(at(1, 0).merge(at(0, 7)).first, Some(Location { tensor: 0, index: 7 }));
    assert_eq!(at(1, 3).merge(Partial::EMPTY).merge(at(1, 2)).first, Some(Location { tensor: 1, index: 2 }));
}

#[test]
fn roots_reach_both_ends() {
    let root_of = |sum, exponent, p| {
        let (value, exponent) = root(sum, exponent, p);
        ldexp(value, exponent)
    };
    assert_eq!(root_of(0.0, 5, 3.0), 0.0);
    assert!((root_of(8.0, 0, 3.0) - 2.0).abs() < 1e-15);
    assert!((root_of(1.5, 3000, 3.0) / 2f64.powi(1000) - 1.5f64.powf(1.0 / 3.0)).abs() < 1e-12);
    assert_eq!(root_of(1.0, -3222, 3.0), f64::from_bits(1));
    assert_eq!(root_of(2.0, 0, 1e-3), 2f64.powi(1000));
    assert_eq!([root_of(2.0, 0, 1e-308), root_of(0.5, 0, 1e-308)], [f64::INFINITY, 0.0]);
}

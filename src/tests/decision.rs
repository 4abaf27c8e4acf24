//! Tests of `src/decision.rs`.

use super::*;

#[test]
fn coefficients_follow_the_formula() {
    let of_floor =
        |norm, max_norm, eps_and_floor| coefficient(Magnitude::plain(norm), Magnitude::plain(max_norm), eps_and_floor);
    let of = |norm, max_norm, eps| of_floor(norm, max_norm, (eps, 0.0));
    assert_eq!(of(2.0, 1.0, 0.0), 0.5);
    assert_eq!(of(1.0, 1.0, 0.0), 1.0);
    assert!(of(1.0, 1.0, 1e-6) < 1.0);
    assert_eq!(of(0.0, 0.0, 0.0), 1.0);
    assert_eq!(of(0.0, 0.0, 1e-6), 0.0);
    assert_eq!(of(f64::INFINITY, 1.0, 1e-6), 0.0);
    assert!(of(f64::NAN, 1.0, 1e-6).is_nan());
    assert_eq!(of_floor(2e-9, 1e-9, (0.0, 1e-6)), 1e-3);
    assert_eq!(of_floor(1e-9, 2e-9, (0.0, 1e-6)), 1.0);
}

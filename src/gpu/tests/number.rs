//! Tests of `src/gpu/number.rs`.

use super::*;

#[test]
fn numbers_hold_what_f64_and_f32_cannot() {
    assert_eq!(Number::product(1.0, 1.0), Number { mantissa: 1 << 31, exponent: -31 });
    assert_eq!(Number::product(3.0, 0.5).to_f64(), 1.5);
    assert_eq!(Number::product(0.0, 5.0), Number::default());
    assert_eq!(Number::product(f64::MAX, f64::MAX).exponent, 2048 - 31);
    assert_eq!(Number::product(f64::from_bits(1), 1.0).to_f64(), f64::from_bits(1));
    let third = Number::reciprocal(3.0).to_f64();
    assert!((third * 3.0 - 1.0).abs() < 2f64.powi(-32));
    assert_eq!(Number::reciprocal(65536.0).to_f64(), 1.0 / 65536.0);
    assert_eq!(Number::product(2.0 - f64::EPSILON, 1.0), Number { mantissa: 1 << 31, exponent: -30 });
}

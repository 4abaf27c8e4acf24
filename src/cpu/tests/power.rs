//! Tests of `src/cpu/power.rs`.

use super::*;
use crate::cpu::isa::{Kernel, run};

/// The logarithms, powers of two and |x|^p of some numbers.
struct Evaluate([f64; LANES], Power);

impl Kernel for Evaluate {
    type Output = [[f64; LANES]; 3];
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) -> Self::Output {
        let x = isa.d(self.0);
        let term = Map::<f64>::of(self.1, isa, x);
        [isa.doubles(log2(isa, x)), isa.doubles(exp2(isa, x)), isa.doubles(term)]
    }
}

#[test]
fn powers_are_within_their_bound() {
    let evaluate = |x: f64| run(Evaluate([x; LANES], Power { p: 1.0, log2_top: 0.0 })).map(|lanes| lanes[0]);
    let mut worst = [0f64; 2];
    for i in 0..100_000 {
        // All sizes, and more of those near 1, where the logarithm is small.
        let size = f64::from(i - 50_000) / 50_000.0;
        for x in [2f64.powf(1023.9 * size), 1.0 + 0.5 * size, 2f64.powf(size)] {
            worst[0] = worst[0].max((evaluate(x)[0] - x.log2()).abs() / x.log2().abs().max(1.0));
        }
        worst[1] = worst[1].max((evaluate(1022.0 * size)[1] / (1022.0 * size).exp2() - 1.0).abs());
    }
    println!("worst: {:.2} and {:.2} of 2^-52", worst[0] * 2f64.powi(52), worst[1] * 2f64.powi(52));
    assert!(worst[0] < 2f64.powi(-50) && worst[1] < 2f64.powi(-50), "{worst:?}");
}

#[test]
fn powers_reach_the_ends() {
    let power = |x, p, log2_top| run(Evaluate([x; LANES], Power { p, log2_top }))[2][LANES - 1];
    for (x, p, want) in [(0.0, 0.3, 0.0), (-8.0, 1.0 / 3.0, 2.0), (2.0, 1023.0, 2f64.powi(1023))] {
        let got = power(x, p, 0.0);
        assert!((got - want).abs() <= want * 1e-12, "{x}^{p} gave {got}");
    }
    assert_eq!(power(2.0, 5000.0, 0.0), f64::INFINITY);
    assert_eq!(power(0.5, 2f64.powi(50), 0.0), 0.0);
    assert!(power(f64::NAN, 3.0, 0.0).is_nan() && power(f64::NEG_INFINITY, 3.0, 0.0).is_nan());
    let smallest = f64::from_bits(1);
    assert!((power(smallest, 0.5, 0.0).log2() + 537.0).abs() < 1e-12);
    assert!((power(smallest, 1.0 / 1024.0, 0.0).log2() + 1074.0 / 1024.0).abs() < 1e-12);
}

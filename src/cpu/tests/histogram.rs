use half::{bf16, f16};

use crate::Tensor;

/// What is counted as lost is what the conversions of another crate lose, at every exponent and beside every bound.
#[test]
fn as_conversions_lose() {
    let edges = [0x3300_0000u32, 0x477f_f000, 0x0000_8000, 0x7f7f_8000].into_iter();
    let near = edges.flat_map(|bits| bits - 3..bits + 4);
    let spread = (0..20_000u32).map(|i| i.wrapping_mul(0x9e37_79b9));
    for bits in near.chain(spread).flat_map(|bits| [bits, bits | 1 << 31]) {
        let x = f32::from_bits(bits);
        let found = Tensor::new(&[x]).histogram();
        let expected = |to_zero: bool, overflow: bool| {
            let lost = x.is_finite() && x != 0.0;
            (u64::from(lost && to_zero), u64::from(lost && overflow))
        };
        let (half, bfloat) = (f16::from_f32(x), bf16::from_f32(x));
        let is_zero = |bits: u16| bits & 0x7fff == 0;
        let float16 = expected(is_zero(half.to_bits()), half.is_infinite());
        let bfloat16 = expected(is_zero(bfloat.to_bits()), bfloat.is_infinite());
        assert_eq!((found.float16.zero, found.float16.infinite), float16, "{x:e}");
        assert_eq!((found.bfloat16.zero, found.bfloat16.infinite), bfloat16, "{x:e}");
    }
}

/// The bounds of the formats in OCP's "8-bit floating point specification": ties to even.
#[test]
fn eight_bits() {
    let lost = |x: f64| {
        let found = Tensor::new(&[x]).histogram();
        [found.float8_e4m3, found.float8_e5m2].map(|lost| (lost.zero, lost.infinite))
    };
    let (kept, zero, overflow) = ((0, 0), (1, 0), (0, 1));
    for (x, expected) in [
        (2f64.powi(-9), [kept, kept]),
        (2f64.powi(-10).next_up(), [kept, kept]),
        (2f64.powi(-10), [zero, kept]),
        (2f64.powi(-17).next_up(), [zero, kept]),
        (-2f64.powi(-17), [zero, zero]),
        (448.0, [kept, kept]),
        (464.0, [kept, kept]),
        (-464f64.next_up(), [overflow, kept]),
        (57_344.0, [overflow, kept]),
        (61_440f64.next_down(), [overflow, kept]),
        (61_440.0, [overflow, overflow]),
        (f64::INFINITY, [kept, kept]),
        (0.0, [kept, kept]),
    ] {
        assert_eq!(lost(x), expected, "{x:e}");
    }
}

#[test]
fn exponents_of_every_dtype() {
    let smallest = [
        (Tensor::new(&[f64::from_bits(1), f64::MAX]).histogram(), [-1074, 1023]),
        (Tensor::new(&[f64::MIN_POSITIVE / 2.0, -f64::MIN_POSITIVE]).histogram(), [-1023, -1022]),
        (Tensor::new(&[f32::from_bits(1), f32::MAX]).histogram(), [-149, 127]),
        (Tensor::new(&[f16::from_bits(1), f16::MAX]).histogram(), [-24, 15]),
        (Tensor::new(&[bf16::from_bits(1), bf16::MAX]).histogram(), [-133, 127]),
    ];
    for (found, exponents) in smallest {
        assert_eq!(found.by_exponent.into_iter().collect::<Vec<_>>(), exponents.map(|e| (e, 1)));
        assert_eq!((found.zeros, found.non_finite), (0, 0));
    }
}

/// Of many chunks the counts are the sum, whichever thread is first.
#[test]
fn long_tensors() {
    let data: Vec<f32> = (0..3_000_000).map(|i| [0.0, 1.0, -2.0, f32::NAN, 1e-30, f32::INFINITY][i % 6]).collect();
    let found = Tensor::new(&data).histogram();
    let each = 500_000;
    assert_eq!((found.zeros, found.non_finite), (each, 2 * each));
    assert_eq!(found.by_exponent.into_iter().collect::<Vec<_>>(), [(-100, each), (0, each), (1, each)]);
    assert_eq!((found.float16.zero, found.float16.infinite), (each, 0));
}

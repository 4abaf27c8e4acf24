//! Guards against updates that vanish because a parameter in half precision has no room for them.

use crate::common::numbers::Random;
use gradclip::{Clip, Clipper, Halves, Optimizer, Tensor, TensorMut};
use half::{bf16, f16};

const ELEMENTS: usize = 100;

/// A thousand steps of AdamW at 1e-3 on ones. The gradients are those of a slope with noise, rounded to bfloat16.
fn trained<T: gradclip::Element>(one: T, halves: Halves) -> (Vec<T>, Option<Vec<u8>>) {
    let (mut w, mut random) = (vec![one; ELEMENTS], Random(3));
    let adamw = Optimizer::adamw(1e-3).halves(halves);
    let mut state = adamw.state(&[Tensor::new(&w)]).expect("valid settings");
    for _ in 0..1000 {
        let gradient: Vec<_> = (0..ELEMENTS).map(|_| bf16::from_f64(1.0 + 0.5 * random.normal())).collect();
        let (parameters, gradients) = (&mut [TensorMut::new(&mut w)], &[Tensor::new(&gradient)]);
        Clipper::cpu().step(&Clip::norm(1.0), &mut state, parameters, gradients).expect("a valid step");
    }
    let kept = ["master", "remainder"].iter().find_map(|name| state.bytes(0, name)).map(<[u8]>::to_vec);
    (w, kept)
}

#[test]
fn halves_with_a_remainder_or_a_master_copy_follow_float32_to_the_bit() {
    let (single, _) = trained(1.0f32, Halves::Rounded);
    assert!(single.iter().all(|x| x.abs() < 0.2), "float32 goes from 1 to about 0: {:?}", &single[..4]);

    let (half, remainder) = trained(bf16::ONE, Halves::Remainder);
    let remainder = remainder.expect("it is kept");
    for ((half, remainder), single) in half.iter().zip(remainder.chunks(2)).zip(&single) {
        let low = u16::from_ne_bytes([remainder[0], remainder[1]]);
        let upper = u32::from(half.to_bits()) - u32::from(low >> 15);
        assert_eq!(upper << 16 | u32::from(low), single.to_bits(), "{half} and {low:x}");
        assert!((half.to_f32() - single).abs() <= single.abs() / 256.0, "{half} is not the nearest to {single}");
    }

    let (half, master) = trained(bf16::ONE, Halves::Master);
    assert_eq!(master.expect("it is kept"), bytemuck::cast_slice::<_, u8>(&single));
    assert!(half.iter().zip(&single).all(|(half, single)| *half == bf16::from_f32(*single)));

    let (half, master) = trained(f16::ONE, Halves::Master);
    assert_eq!(master.expect("it is kept"), bytemuck::cast_slice::<_, u8>(&single));
    assert!(half.iter().zip(&single).all(|(half, single)| *half == f16::from_f32(*single)));
}

#[test]
fn without_them_they_are_lost() {
    let (half, kept) = trained(bf16::ONE, Halves::Rounded);
    assert!(kept.is_none() && half.iter().all(|x| *x == bf16::ONE), "as in PyTorch: {:?}", &half[..4]);
}

/// What a remainder cannot tell apart, it must not make a number of.
#[test]
fn extremes_keep_their_kind() {
    for x in [f32::MAX, -f32::MAX, f32::INFINITY, f32::NAN, -0.0, f32::from_bits(1), 257.0 / 256.0, 255.0 / 256.0] {
        let mut w = [bf16::ZERO];
        let sgd = Optimizer::sgd(1.0).halves(Halves::Remainder);
        let mut state = sgd.state(&[Tensor::new(&w)]).expect("valid settings");
        // From zero to minus the gradient.
        let clip = Clip::range(f64::NEG_INFINITY, f64::INFINITY);
        let gradient = [-x];
        let (parameters, gradients) = (&mut [TensorMut::new(&mut w)], &[Tensor::new(&gradient)]);
        Clipper::cpu().step(&clip, &mut state, parameters, gradients).expect("a valid step");
        let low = u16::from_ne_bytes(state.bytes(0, "remainder").expect("kept").try_into().expect("two bytes"));
        let upper = u32::from(w[0].to_bits()).wrapping_sub(u32::from(low >> 15));
        let got = f32::from_bits(upper << 16 | u32::from(low));
        assert!(got == x || (got.is_nan() && x.is_nan() && w[0].is_nan()), "{x:e} became {got:e}, {}", w[0]);
    }
}

//! Guards against a tensor that is made, or an element that is written, where nothing was to be clipped.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, identities, store, tensor, var};
use gradclip_candle::gradclip::{Clip, NonFinite, Scope, Skipped};
use gradclip_candle::{Error, clip_in_place};

/// Gradients of every dtype, one longer than a chunk, one a view and one without elements.
fn gradients() -> (Vec<Var>, Vec<Tensor>) {
    let mut gradients: Vec<_> = common::DTYPES.iter().map(|dtype| tensor(1, (5, 6), 1.0, *dtype)).collect();
    gradients.push(tensor(2, 300_000, 1e-3, DType::F32));
    gradients.push(tensor(3, (4, 3), 1.0, DType::F32).t().expect("a matrix"));
    gradients.push(tensor(4, (0, 3), 1.0, DType::F32));
    (gradients.iter().map(|gradient| var(5, gradient.shape(), gradient.dtype())).collect(), gradients)
}

/// A way to clip, with its name.
type Way = (&'static str, fn(&mut candle_core::backprop::GradStore, &[Var], &Clip) -> Result<bool, Error>);
const WAYS: [Way; 2] = [
    ("copy", |grads, vars, clip| Ok(gradclip_candle::clip(grads, vars, clip)?.clipped)),
    ("in place", |grads, vars, clip| Ok(clip_in_place(grads, vars, clip, None)?.clipped)),
];

#[test]
fn what_is_below_the_threshold_stays_the_very_tensor() {
    let (vars, gradients) = gradients();
    let far = [
        Clip::norm(100.0),
        Clip::norm(f64::INFINITY),
        Clip::norm(100.0).scope(Scope::Tensor),
        Clip::rms(10.0),
        Clip::average_norm(10.0),
        Clip::agc(1e4),
        Clip::value(2.0),
        Clip::range(f64::NEG_INFINITY, 2.0),
        Clip::value(2.0).non_finite(NonFinite::Error),
        Clip::value(2.0).non_finite(NonFinite::Drop),
    ];
    for (name, way) in WAYS {
        for clip in &far {
            let mut grads = store(vars.iter().zip(&gradients));
            let (before, bits) = (identities(&grads, &vars), all_bits(&grads, &vars));
            assert!(!way(&mut grads, &vars, clip).expect("finite"), "{name} {clip:?}");
            assert_eq!(identities(&grads, &vars), before, "{name} {clip:?}");
            assert_eq!(all_bits(&grads, &vars), bits, "{name} {clip:?}");
        }
    }
}

#[test]
fn an_error_or_a_step_that_is_skipped_leaves_everything() {
    let (vars, mut gradients) = gradients();
    // Behind tensors that would be clipped.
    gradients[4] = Tensor::cat(&[&tensor(2, 299_999, 1.0, DType::F32), &nan()], 0).expect("one tensor");
    for (name, way) in WAYS {
        for policy in [NonFinite::Error, NonFinite::Skip] {
            for clip in [Clip::norm(0.1), Clip::value(0.1), Clip::agc(0.001)] {
                let clip = clip.grad_scale(2.0).non_finite(policy);
                let mut grads = store(vars.iter().zip(&gradients));
                let (before, bits) = (identities(&grads, &vars), all_bits(&grads, &vars));
                let result = way(&mut grads, &vars, &clip);
                assert_eq!(result.is_err(), policy == NonFinite::Error, "{name} {clip:?} {result:?}");
                assert_eq!(identities(&grads, &vars), before, "{name} {clip:?}");
                assert_eq!(all_bits(&grads, &vars), bits, "{name} {clip:?}");
            }
        }
    }
}

#[test]
fn a_step_above_its_limit_is_skipped() {
    for in_place in [false, true] {
        for (limit, skipped) in [(1e-3, Some(Skipped::Above)), (1e6, None)] {
            let clip = Clip::norm(0.1).grad_scale(2.0).skip_above(limit);
            let (vars, gradients) = gradients();
            let mut grads = store(vars.iter().zip(&gradients));
            let bits = all_bits(&grads, &vars);
            let report = if in_place {
                clip_in_place(&mut grads, &vars, &clip, None)
            } else {
                gradclip_candle::clip(&mut grads, &vars, &clip)
            };
            assert_eq!(report.expect("finite").skipped, skipped);
            assert_eq!(all_bits(&grads, &vars) == bits, skipped.is_some(), "in place: {in_place}, {skipped:?}");
        }
    }
}

fn nan() -> Tensor {
    Tensor::new(&[f32::NAN], &Device::Cpu).expect("a tensor")
}

#[test]
fn only_the_gradients_that_are_clipped_are_replaced() {
    let vars = [var(1, 10, DType::F32), var(2, 200_000, DType::F32), var(3, 10, DType::F32)];
    let gradients =
        [tensor(4, 10, 0.1, DType::F32), tensor(5, 200_000, 0.1, DType::F32), tensor(6, 10, 9.0, DType::F32)];
    for clip in [Clip::norm(2.0).scope(Scope::Tensor), Clip::value(0.5)] {
        let mut grads = store(vars.iter().zip(&gradients));
        let before = identities(&grads, &vars);
        gradclip_candle::clip(&mut grads, &vars, &clip).expect("finite");
        let after = identities(&grads, &vars);
        assert_eq!(after[0], before[0], "{clip:?}");
        assert_ne!(after[2], before[2], "{clip:?}");
        // Long, and of a norm above 2.
        assert_eq!(after[1] == before[1], clip == Clip::value(0.5), "{clip:?}");
    }
}

/// A value clip looks for the first chunk to change, and must neither lose nor count twice what it meets on the way.
#[test]
fn elements_out_of_bounds_are_found_wherever_they_are() {
    const LENGTH: usize = 700_001;
    let vars = [var(1, LENGTH, DType::F32)];
    for place in [0, 131_071, 131_072, 400_000, LENGTH - 1] {
        let mut elements = vec![0.25f32; LENGTH];
        (elements[5], elements[300_000], elements[LENGTH - 2]) = (f32::NAN, f32::NAN, f32::NAN);
        elements[place] = -7.0;
        let gradient = Tensor::from_slice(&elements, LENGTH, &Device::Cpu).expect("a tensor");
        for (name, way) in WAYS {
            let mut grads = store([(&vars[0], &gradient.force_contiguous().expect("a tensor"))]);
            assert!(way(&mut grads, &vars, &Clip::value(0.5)).expect("NaN is kept"));
            let after = grads.get(&vars[0]).and_then(|t| t.to_vec1::<f32>().ok()).expect("there");
            for (i, (after, before)) in after.iter().zip(&elements).enumerate() {
                let expected = if i == place { -0.5f32 } else { *before };
                assert_eq!(after.to_bits(), expected.to_bits(), "{name}, element {i}");
            }
        }
        let mut grads = store([(&vars[0], &gradient)]);
        let report = gradclip_candle::clip_grad_value(&mut grads, &vars, 0.5).expect("NaN is kept");
        let found = report.non_finite.expect("three");
        assert_eq!((found.count, found.tensor, found.index), (3, 0, 5), "with an outlier at {place}");
        assert_eq!(report.elements, LENGTH as u64);
    }
}

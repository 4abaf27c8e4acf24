//! Guards against a NaN or an infinity that spreads, or that nobody is told of.

mod common;

use candle_core::{DType, Tensor, Var};
use common::{assert_near, assert_says, store, tensor, values, var};
use gradclip_candle::gradclip::{self, Clip, NonFinite};
use gradclip_candle::{clip_grad_norm, clip_grad_value, clip_in_place};

/// A var without gradient, one of finite numbers, and one with a NaN at 5 and an infinity at 7 of its row-major order, which
/// is not that of its memory.
fn spoiled(dtype: DType) -> (Vec<(&'static str, Var)>, [Tensor; 2]) {
    let mut elements = vec![0.5f64; 12];
    (elements[5], elements[7]) = (f64::NAN, f64::INFINITY);
    let turned = Tensor::from_vec(elements, (4, 3), &candle_core::Device::Cpu)
        .and_then(|t| t.to_dtype(dtype)?.t()?.contiguous()?.t())
        .expect("a matrix");
    assert!(!turned.is_contiguous());
    let vars = vec![("none", var(1, 3, dtype)), ("w", var(2, 9, dtype)), ("head", var(3, (4, 3), dtype))];
    (vars, [tensor(4, 9, 1.0, dtype), turned])
}

#[test]
fn the_first_bad_element_is_named_by_var_and_row_major_index() {
    for dtype in common::DTYPES {
        let (vars, gradients) = spoiled(dtype);
        let mut grads = store(vars.iter().skip(1).map(|(_, var)| var).zip(&gradients));
        assert_says(
            clip_grad_norm(&mut grads, &vars, 1.0),
            &["2 non-finite elements, the first at index 5 of tensor \"head\"", "nothing was written"],
        );
        match clip_grad_norm(&mut grads, &vars, 1.0) {
            Err(gradclip_candle::Error::Clip(gradclip::Error::NonFinite(found))) => {
                assert_eq!(found.tensor, 2, "the var's place");
            }
            other => panic!("{other:?}"),
        }
        let skip = Clip::norm(1.0).non_finite(NonFinite::Skip);
        let report = gradclip_candle::clip(&mut grads, &vars, &skip).expect("skipped");
        let found = report.non_finite.expect("two");
        assert_eq!((found.count, found.tensor, found.name.as_deref(), found.index), (2, 2, Some("head"), 5));
    }
}

#[test]
fn every_policy_does_what_it_says() {
    for in_place in [false, true] {
        for dtype in common::DTYPES {
            let after = |clip: &Clip| {
                let (vars, gradients) = spoiled(dtype);
                let mut grads = store(vars.iter().skip(1).map(|(_, var)| var).zip(&gradients));
                let report = if in_place {
                    clip_in_place(&mut grads, &vars, clip, None)
                } else {
                    gradclip_candle::clip(&mut grads, &vars, clip)
                };
                assert!(report.expect("the policy goes on").has_non_finite());
                (values(grads.get(&vars[1].1).expect("there")), values(grads.get(&vars[2].1).expect("there")))
            };
            let clip = Clip::norm(0.5).eps(0.0);
            let (w, head) = after(&clip.non_finite(NonFinite::Propagate));
            assert!(w.iter().chain(&head).all(|x| x.is_nan()), "a NaN makes the norm NaN");
            let (w, head) = after(&clip.non_finite(NonFinite::Zero));
            assert!(w.iter().chain(&head).all(|x| *x == 0.0));
            let (w, head) = after(&clip.non_finite(NonFinite::Drop));
            assert_eq!((head[5], head[7]), (0.0, 0.0));
            let left = w.iter().chain(&head).map(|x| x * x).sum::<f64>().sqrt();
            assert_near(left, 0.5, if matches!(dtype, DType::F32 | DType::F64) { 1e-6 } else { 5e-3 });
        }
    }
}

#[test]
fn a_value_clip_keeps_nan_and_bounds_infinity() {
    let (vars, gradients) = spoiled(DType::F32);
    let mut grads = store(vars.iter().skip(1).map(|(_, var)| var).zip(&gradients));
    let report = clip_grad_value(&mut grads, &vars, 0.25).expect("NaN is kept");
    assert_eq!(report.non_finite.expect("two").count, 2);
    let head = values(grads.get(&vars[2].1).expect("there"));
    assert!(head[5].is_nan() && head[7] == 0.25 && head[0] == 0.25, "{head:?}");
}

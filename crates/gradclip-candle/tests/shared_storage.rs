//! Guards against a clip that writes into what others hold: a clone or a view that was kept, another var's gradient, the var
//! itself. And against one that scales what several share once for each of them.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{address, assert_near, bits, identities, norm, store, tensor, values, var};
use gradclip_candle::gradclip::Clip;
use gradclip_candle::{clip_grad_norm, clip_grad_value, clip_in_place};

fn half() -> Clip {
    Clip::norm(0.5).eps(0.0)
}

/// That this is the gradient scaled to a norm of all of 0.5.
#[track_caller]
fn assert_scaled(after: &Tensor, before: &Tensor, total_norm: f64) {
    assert_eq!(after.shape(), before.shape());
    for (after, before) in values(after).into_iter().zip(values(before)) {
        assert!((after - before * 0.5 / total_norm).abs() <= 1e-6 * before.abs(), "{before} became {after}");
    }
}

#[test]
fn clones_and_views_that_are_kept_stay_as_they_were() {
    for dtype in common::DTYPES {
        let (w, v) = (var(1, (6, 4), dtype), var(2, 200_000, dtype));
        let mut grads = store([(&w, &tensor(3, (6, 4), 2.0, dtype)), (&v, &tensor(4, 200_000, 2.0, dtype))]);
        let clone = grads.get(&w).expect("there").clone();
        let transposed = clone.t().expect("a matrix");
        let part = grads.get(&v).expect("there").narrow(0, 150_000, 1000).expect("within");
        let kept = [clone, transposed, part];
        let before: Vec<_> = kept.iter().map(bits).collect();
        let report = clip_grad_norm(&mut grads, &[w.clone(), v.clone()], 0.5).expect("finite");
        assert!(report.clipped);
        assert_eq!(kept.iter().map(bits).collect::<Vec<_>>(), before, "{dtype:?}");
        assert_ne!(bits(grads.get(&w).expect("there")), before[0], "{dtype:?}");
        // And the elements that a value clip changes.
        let mut grads = store([(&w, &kept[0]), (&v, &tensor(4, 200_000, 2.0, dtype))]);
        assert!(clip_grad_value(&mut grads, &[w, v], 0.25).expect("finite").clipped);
        assert_eq!(kept.iter().map(bits).collect::<Vec<_>>(), before, "{dtype:?}");
    }
}

#[test]
fn two_vars_with_one_tensor_as_gradient_count_twice_and_are_scaled_once() {
    for in_place in [false, true] {
        let vars = [var(1, 300, DType::F32), var(2, 300, DType::F32)];
        let gradient = tensor(3, 300, 1.0, DType::F32);
        let mut grads = store(vars.iter().map(|var| (var, &gradient)));
        let before = bits(&gradient);
        let report = if in_place {
            clip_in_place(&mut grads, &vars, &half(), None)
        } else {
            gradclip_candle::clip(&mut grads, &vars, &half())
        };
        let total_norm = norm([&gradient, &gradient]);
        assert_near(report.expect("finite").total_norm, total_norm, 1e-12);
        for var in &vars {
            assert_scaled(grads.get(var).expect("there"), &gradient, total_norm);
        }
        assert_eq!(bits(&gradient), before, "in place {in_place}");
    }
}

#[test]
fn gradients_that_are_views_of_one_tensor_are_scaled_once() {
    for in_place in [false, true] {
        let whole = tensor(1, (8, 5), 1.0, DType::F64);
        let before = bits(&whole);
        // Rows that overlap, columns, the whole turned round, one row for all.
        let views = [
            whole.narrow(0, 2, 4).expect("within"),
            whole.narrow(0, 4, 4).expect("within"),
            whole.narrow(1, 1, 2).expect("within"),
            whole.t().expect("a matrix"),
            whole.narrow(0, 7, 1).and_then(|row| row.broadcast_as((3, 5))).expect("one row"),
        ];
        let vars: Vec<_> = views.iter().map(|view| var(2, view.shape(), DType::F64)).collect();
        let mut grads = store(vars.iter().zip(&views));
        let report = if in_place {
            clip_in_place(&mut grads, &vars, &half(), None)
        } else {
            gradclip_candle::clip(&mut grads, &vars, &half())
        };
        let total_norm = norm(&views);
        assert_near(report.expect("finite").total_norm, total_norm, 1e-12);
        for (var, view) in vars.iter().zip(&views) {
            assert_scaled(grads.get(var).expect("there"), view, total_norm);
            assert!(grads.get(var).expect("there").is_contiguous());
        }
        assert_eq!(bits(&whole), before, "in place {in_place}");
    }
}

#[test]
fn a_gradient_that_is_its_vars_own_value_leaves_the_var() {
    for in_place in [false, true] {
        let w = var(1, (7, 3), DType::F32);
        let (vars, before) = ([w.clone()], bits(&w));
        let mut grads = store([(&w, &w.as_detached_tensor())]);
        // Adaptive clipping reads the one as gradient and as parameter.
        let clip = Clip::agc(0.25);
        let report = if in_place {
            clip_in_place(&mut grads, &vars, &clip, None)
        } else {
            gradclip_candle::clip(&mut grads, &vars, &clip)
        };
        assert_eq!(report.expect("finite").num_clipped(), 7);
        assert_eq!(bits(&w), before, "in place {in_place}");
        for (after, before) in values(grads.get(&w).expect("there")).into_iter().zip(values(&w)) {
            assert!((after - before / 4.0).abs() <= 1e-6 * before.abs(), "{before} became {after}");
        }
    }
}

#[test]
fn in_place_makes_no_tensor_unless_storage_is_shared() {
    for dtype in common::DTYPES {
        let w = var(1, (500, 600), dtype);
        let others = [var(2, 9, dtype), var(3, 9, dtype), var(4, (2, 3), dtype)];
        let shared = tensor(6, 9, 1.0, dtype);
        let view = tensor(7, (3, 2), 1.0, dtype).t().expect("a matrix");
        let mut grads = store([(&w, &tensor(5, (500, 600), 1.0, dtype)), (&others[2], &view)]);
        grads.insert(&others[0], shared.clone());
        // Not asked to be clipped, but in the store.
        grads.insert(&others[1], shared);
        let vars = [w, others[0].clone(), others[2].clone()];
        let (before, neighbour) = (identities(&grads, &vars), bits(grads.get(&others[1]).expect("there")));
        let mut copied = store(vars.iter().map(|var| (var, grads.get(var).expect("there"))));
        gradclip_candle::clip(&mut copied, &vars, &half()).expect("finite");
        clip_in_place(&mut grads, &vars, &half(), None).expect("finite");
        let after = identities(&grads, &vars);
        assert_eq!(after[0], before[0], "{dtype:?}");
        assert_ne!(after[1], before[1], "{dtype:?}");
        assert_ne!(after[2], before[2], "{dtype:?}");
        assert_eq!(bits(grads.get(&others[1]).expect("there")), neighbour, "{dtype:?}");
        assert_eq!(common::all_bits(&grads, &vars), common::all_bits(&copied, &vars), "{dtype:?}");
    }
}

/// `backward` as candle does it today: whatever it hands out is nobody else's, so that in place is in place.
#[test]
fn what_backward_hands_out_is_clipped_in_place() {
    let w = Var::from_tensor(&tensor(1, (3, 4), 1.0, DType::F32)).expect("a var");
    let b = Var::zeros(4, DType::F32, &Device::Cpu).expect("a var");
    let x = tensor(2, (5, 3), 1.0, DType::F32);
    let loss = |x: &Tensor| x.matmul(&w)?.broadcast_add(&b)?.sqr()?.sum_all();
    let mut grads = loss(&x).and_then(|loss| loss.backward()).expect("a gradient");
    let vars = [w.clone(), b.clone()];
    let before = identities(&grads, &vars);
    assert!(clip_in_place(&mut grads, &vars, &half(), None).expect("finite").clipped);
    assert_eq!(identities(&grads, &vars), before);
    assert_ne!(address(grads.get(&w).expect("there")), address(&w));
}

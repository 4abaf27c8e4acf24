//! Guards against a step that differs from the library's, writes a gradient, or is half taken.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, assert_says, bits, store, tensor, values, var};
use gradclip_candle::gradclip::{self, Clip, Clipper, NonFinite, Optimizer, TensorMut};
use gradclip_candle::{optimizer_state, step};

const OPTIMIZERS: fn() -> [Optimizer; 4] = || {
    [
        Optimizer::sgd(0.1).momentum(0.9),
        Optimizer::adamw(0.01).amsgrad(true),
        Optimizer::rmsprop(0.01).centered(true),
        Optimizer::adagrad(0.1),
    ]
};

/// A long var is stepped in chunks, by several threads.
#[test]
fn steps_are_the_librarys_to_the_bit() {
    for optimizer in OPTIMIZERS() {
        let vars = [("long", var(1, 300_001, DType::F32)), ("small", var(2, (3, 5), DType::F32))];
        let mut plain: Vec<Vec<f32>> =
            vars.iter().map(|(_, v)| values(v).iter().map(|x| *x as f32).collect()).collect();
        let mut state = optimizer_state(&vars, &optimizer).expect("a state");
        let views: Vec<_> = plain.iter().map(|x| gradclip::Tensor::new(x)).collect();
        let mut own = optimizer.state(&views).expect("a state");
        let clip = Clip::norm(1.0);
        for seed in 10..13 {
            let gradients = [tensor(seed, 300_001, 1.0, DType::BF16), tensor(seed + 50, (5, 3), 1.0, DType::F32)];
            let gradients = [gradients[0].clone(), gradients[1].t().expect("a matrix")];
            let grads = store(vars.iter().map(|(_, v)| v).zip(&gradients));
            let before = all_bits(&grads, &[vars[0].1.clone(), vars[1].1.clone()]);
            let report = step(&grads, &vars, &clip, &mut state).expect("a step");
            assert_eq!(all_bits(&grads, &[vars[0].1.clone(), vars[1].1.clone()]), before, "gradients are read only");

            let of: Vec<Vec<f32>> = gradients.iter().map(|g| values(g).iter().map(|x| *x as f32).collect()).collect();
            let halves: Vec<half::bf16> = of[0].iter().map(|x| half::bf16::from_f32(*x)).collect();
            let views = [gradclip::Tensor::new(&halves), gradclip::Tensor::new(&of[1])];
            let parameters = &mut plain.iter_mut().map(|x| TensorMut::new(x)).collect::<Vec<_>>();
            let expected = Clipper::cpu().step(&clip, &mut own, parameters, &views).expect("a step");
            assert_eq!((report.total_norm, report.clipped), (expected.total_norm, true));
            for ((_, var), plain) in vars.iter().zip(&plain) {
                let plain: Vec<u64> = plain.iter().map(|x| x.to_bits().into()).collect();
                assert_eq!(bits(var), plain, "{optimizer}");
            }
        }
        assert_eq!(state.steps(), 3);
    }
}

#[test]
fn every_dtype_steps() {
    for dtype in common::DTYPES {
        let vars = [var(1, 33, dtype)];
        let before = values(&vars[0]);
        let mut state = optimizer_state(&vars, &Optimizer::sgd(0.5)).expect("a state");
        let gradient = tensor(2, 33, 1.0, dtype);
        step(&store([(&vars[0], &gradient)]), &vars, &Clip::norm(f64::INFINITY), &mut state).expect("a step");
        for ((after, before), g) in values(&vars[0]).into_iter().zip(before).zip(values(&gradient)) {
            assert!((after - (before - 0.5 * g)).abs() < 1e-2, "{dtype:?}");
        }
    }
}

/// A gradient that is the var itself, as that of half the sum of squares may be.
#[test]
fn a_gradient_may_share_the_vars_storage() {
    let w = Var::new(&[2f32, -4.0], &Device::Cpu).expect("a var");
    let vars = [w.clone()];
    let mut state = optimizer_state(&vars, &Optimizer::sgd(0.5)).expect("a state");
    let grads = store([(&w, &w.as_tensor().detach())]);
    step(&grads, &vars, &Clip::norm(f64::INFINITY), &mut state).expect("a step");
    assert_eq!(values(&w), [1.0, -2.0]);
}

#[test]
fn a_skipped_step_changes_nothing() {
    let vars = [var(1, 7, DType::F32)];
    let before = bits(&vars[0]);
    let mut state = optimizer_state(&vars, &Optimizer::adamw(0.1)).expect("a state");
    let bad = Tensor::new(&[f32::NAN; 7], &Device::Cpu).expect("a tensor");
    let grads = store([(&vars[0], &bad)]);
    let report = step(&grads, &vars, &Clip::norm(1.0).non_finite(NonFinite::Skip), &mut state).expect("skipped");
    assert!(report.skipped.is_some());
    assert_says(step(&grads, &vars, &Clip::norm(1.0), &mut state), &["vars[0]", "non-finite"]);
    assert_eq!((bits(&vars[0]), state.steps()), (before, 0));
}

#[test]
fn what_does_not_fit_is_an_error_and_nothing_is_stepped() {
    let vars = [("a", var(1, 4, DType::F32)), ("b", var(2, 4, DType::F32))];
    let all = || [vars[0].1.clone(), vars[1].1.clone()];
    let before = all().map(|v| bits(&v));
    let gradient = tensor(3, 4, 1.0, DType::F32);
    let clip = Clip::norm(1.0);
    let adam = Optimizer::adam(0.1);
    let mut state = optimizer_state(&vars, &adam).expect("a state");
    let both = store([(&vars[0].1, &gradient), (&vars[1].1, &gradient)]);

    let one = store([(&vars[0].1, &gradient)]);
    assert_says(step(&one, &vars, &clip, &mut state), &["b", "no gradient"]);
    let twice = [vars[0].clone(), vars[0].clone()];
    assert_says(step(&both, &twice, &clip, &mut state), &["a", "twice"]);
    assert_says(step(&both, &vars[..1].to_vec(), &clip, &mut state), &["1", "2"]);
    let mut other =
        optimizer_state(&[("a", var(1, 4, DType::F32)), ("b", var(2, 4, DType::F64))], &adam).expect("a state");
    assert_says(step(&both, &vars, &clip, &mut other), &["b", "float64", "float32"]);
    let mut long = optimizer_state(&[var(1, 4, DType::F32), var(2, 8, DType::F32)], &adam).expect("a state");
    assert_says(step(&both, &vars, &clip, &mut long), &["8 elements", "4"]);
    let views = [gradclip::Tensor::new(&[0f32; 4]), gradclip::Tensor::new(&[0f32; 4])];
    let mut elsewhere = gradclip::OptimizerState::elsewhere(&[(adam, &views)]).expect("a state");
    assert_says(step(&both, &vars, &clip, &mut elsewhere), &["exp_avg", "missing"]);
    let steps = [&state, &other, &long, &elsewhere].map(gradclip::OptimizerState::steps);
    assert_eq!((all().map(|v| bits(&v)), steps), (before, [0; 4]));
    let error = optimizer_state(&vars, &Optimizer::adam(-1.0)).expect_err("a negative learning rate");
    assert!(error.to_string().contains("lr"), "{error}");
}

//! Guards against a step that is half taken, or taken with settings, parameters or a state that do not fit.

use gradclip::{Clip, Clipper, Error, Halves, Optimizer, OptimizerState, Tensor, TensorMut};
use half::f16;

fn message(result: Result<impl Sized, Error>) -> String {
    result.err().expect("it must not be accepted").to_string()
}

#[test]
fn settings_are_refused_by_name_and_value() {
    let w = [1.0f32];
    let (sgd, adam, nan) = (Optimizer::sgd(0.1), Optimizer::adam(0.1), f64::NAN);
    let (rmsprop, adagrad) = (Optimizer::rmsprop(0.1), Optimizer::adagrad(0.1));
    let finite = "it must be a finite number, 0 or more";
    let below_1 = "it must be 0 or more and below 1";
    for (optimizer, expected) in [
        (Optimizer::adamw(-1.0), format!("lr is -1; {finite}")),
        (Optimizer::sgd(nan), format!("lr is NaN; {finite}")),
        (Optimizer::sgd(f64::INFINITY), format!("lr is inf; {finite}")),
        (sgd.weight_decay(-0.1), format!("weight_decay is -0.1; {finite}")),
        (sgd.momentum(-0.5), format!("momentum is -0.5; {finite}")),
        (sgd.momentum(0.9).dampening(nan), "dampening is NaN; it must be a finite number".into()),
        (sgd.nesterov(true), "nesterov is true; it needs a momentum above 0 and no dampening".into()),
        (
            sgd.momentum(0.9).dampening(0.1).nesterov(true),
            "nesterov is true; it needs a momentum above 0 and no dampening".into(),
        ),
        (sgd.eps(1e-8), "eps is 1e-8; Optimizer::sgd does not use it".into()),
        (sgd.betas(0.9, 0.99), "beta1 is 0.9; only Optimizer::adam and Optimizer::adamw use it".into()),
        (adam.betas(1.0, 0.9), format!("beta1 is 1; {below_1}")),
        (adam.betas(0.9, -0.1), format!("beta2 is -0.1; {below_1}")),
        (adam.eps(nan), format!("eps is NaN; {finite}")),
        (adam.momentum(0.9), "momentum is 0.9; only Optimizer::sgd and Optimizer::rmsprop use it".into()),
        (adam.centered(true), "centered is true; only Optimizer::rmsprop uses it".into()),
        (adam.nesterov(true), "nesterov is true; only Optimizer::sgd uses it".into()),
        (rmsprop.alpha(1.0), format!("alpha is 1; {below_1}")),
        (rmsprop.amsgrad(true), "amsgrad is true; only Optimizer::adam and Optimizer::adamw use it".into()),
        (rmsprop.dampening(0.1), "dampening is 0.1; only Optimizer::sgd uses it".into()),
        (adam.alpha(0.9), "alpha is 0.9; only Optimizer::rmsprop uses it".into()),
        (adagrad.lr_decay(-1.0), format!("lr_decay is -1; {finite}")),
        (adagrad.initial_accumulator_value(nan), format!("initial_accumulator_value is NaN; {finite}")),
        (sgd.lr_decay(0.1), "lr_decay is 0.1; only Optimizer::adagrad uses it".into()),
    ] {
        assert_eq!(message(optimizer.state(&[Tensor::new(&w)])), expected);
        assert_eq!(message(optimizer.check()), expected);
    }
    let half = [f16::ONE];
    assert_eq!(
        message(adam.halves(Halves::Remainder).state(&[Tensor::new(&half).named("w")])),
        "tensor \"w\": float16 and 16 bits are no float32; keep a master copy (Halves::Master)"
    );
}

/// Two parameters whose state is two steps old.
struct Fixture {
    w: [f32; 6],
    b: [f32; 2],
    state: OptimizerState<'static>,
}

impl Fixture {
    fn new() -> Self {
        let (w, b) = ([0.5; 6], [0.25; 2]);
        let parameters = [Tensor::new(&w).named("w").shape(&[2, 3]).expect("it fits"), Tensor::new(&b).named("b")];
        let state = Optimizer::adamw(0.1).state(&parameters).expect("valid settings");
        let mut found = Self { w, b, state };
        for _ in 0..2 {
            let (g, h) = ([1.0f32; 6], [1.0f32; 2]);
            let g = [Tensor::new(&g).shape(&[2, 3]).expect("it fits"), Tensor::new(&h)];
            found.step(&Clip::norm(1.0), |w| w, &g).expect("a valid step");
        }
        found
    }

    fn step<'g>(
        &mut self,
        clip: &Clip,
        change: impl for<'a> Fn(Vec<TensorMut<'a>>) -> Vec<TensorMut<'a>>,
        gradients: &[Tensor<'g>],
    ) -> Result<(), Error> {
        let w = TensorMut::new(&mut self.w).named("w").shape(&[2, 3]).expect("it fits");
        let mut parameters = change(vec![w, TensorMut::new(&mut self.b).named("b")]);
        Clipper::cpu().step(clip, &mut self.state, &mut parameters, gradients).map(|_| ())
    }

    fn everything(&self) -> (Vec<u8>, u64) {
        let own: &[&[u8]] = &[bytemuck::cast_slice(&self.w), bytemuck::cast_slice(&self.b)];
        let kept = [0, 1].into_iter().flat_map(|i| ["exp_avg", "exp_avg_sq"].map(|name| self.state.bytes(i, name)));
        (own.iter().copied().chain(kept.flatten()).flatten().copied().collect(), self.state.steps())
    }
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let mut fixture = Fixture::new();
    let before = fixture.everything();
    let (g, h) = ([1.0f32; 6], [1.0f32; 2]);
    let (g, h) = (Tensor::new(&g).shape(&[2, 3]).expect("it fits"), Tensor::new(&h));
    let clip = Clip::norm(1.0);
    let mut refuses =
        |clip: &Clip, change: fn(Vec<TensorMut<'_>>) -> Vec<TensorMut<'_>>, g: &[Tensor<'_>], expected: &str| {
            assert_eq!(message(fixture.step(clip, change, g)), expected);
            assert!(fixture.everything() == before, "{expected}");
        };
    let state = "the optimizer's state does not fit: ";
    refuses(&clip, |w| w, &[g], "2 parameters have 1 gradients");
    let other = g.shape(&[3, 2]).expect("it fits");
    refuses(&clip, |w| w, &[other, h], "tensor 0: its shape is [3, 2], but that of its parameter is [2, 3]");
    refuses(&clip, |w| w, &[h, g], "tensor 0: its shape is [2], but that of its parameter is [2, 3]");
    refuses(&clip, |w| w, &[g.named("v"), h], "tensor \"v\": it was given the parameter of \"w\"");
    refuses(
        &clip,
        |mut w| {
            w.reverse();
            w
        },
        &[h, g],
        "tensor \"b\": its shape is [2], but the state is of shape [2, 3]",
    );
    refuses(
        &clip,
        |mut w| {
            w.truncate(1);
            w
        },
        &[g],
        &format!("{state}it is of 2 parameters, and 1 are given"),
    );
    refuses(&clip, |w| w.into_iter().map(|w| w.named("v")).collect(), &[g, h], "tensor \"v\": the state is of \"w\"");
    refuses(&Clip::norm(-1.0), |w| w, &[g, h], "max_norm is -1; it must be 0 or more");
    let nan = [f32::NAN; 2];
    let bad = [g, Tensor::new(&nan)];
    let error = fixture.step(&clip, |w| w, &bad).expect_err("a NaN");
    assert!(matches!(error, Error::NonFinite(_)) && fixture.everything() == before, "{error}");

    fixture.state.optimizers_mut()[0].lr = f64::NAN;
    let error = message(fixture.step(&clip, |w| w, &[g, h]));
    assert_eq!(error, "lr is NaN; it must be a finite number, 0 or more");
    fixture.state.optimizers_mut()[0] = Optimizer::adamw(0.1).amsgrad(true);
    let error = message(fixture.step(&clip, |w| w, &[g, h]));
    assert_eq!(error, format!("{state}that of group 0 is of AdamW, the optimizer is AdamW, amsgrad"));
    assert!(fixture.everything() == before);
}

#[test]
fn the_callers_memory_must_fit() {
    let w = [1.0f32; 4];
    let group = [(Optimizer::adamw(0.1), &[Tensor::new(&w).named("w")][..])];
    let (mut a, mut b, mut c) = ([0u8; 16], [0u8; 16], [0u8; 16]);
    let state = "the optimizer's state does not fit: ";
    assert_eq!(
        message(OptimizerState::over(&group, vec![])),
        format!("{state}there are 1 parameters, and tensors for 0 are given")
    );
    assert_eq!(
        message(OptimizerState::over(&group, vec![vec![&mut a[..]]])),
        format!("{state}exp_avg_sq of tensor \"w\" is missing")
    );
    assert_eq!(
        message(OptimizerState::over(&group, vec![vec![&mut a[..], &mut b[..12]]])),
        format!("{state}exp_avg_sq of tensor \"w\" has 12 bytes, not 16")
    );
    assert_eq!(
        message(OptimizerState::over(&group, vec![vec![&mut a[..], &mut b[..], &mut c[..]]])),
        format!("{state}tensor \"w\" has fewer tensors than are given")
    );
    let mut elsewhere = OptimizerState::elsewhere(&group).expect("valid settings");
    let mut moved = w;
    let error =
        Clipper::cpu().step(&Clip::norm(1.0), &mut elsewhere, &mut [TensorMut::new(&mut moved)], &[Tensor::new(&w)]);
    assert_eq!(message(error), format!("{state}its tensors are elsewhere: take the step piece by piece"));
}

#[test]
fn pieces_must_fit() {
    let mut w = [1.0f32; 4];
    let group = [(Optimizer::sgd(0.1).momentum(0.5), &[Tensor::new(&w).named("w")][..])];
    let mut state = OptimizerState::elsewhere(&group).expect("valid settings");
    let other = Clipper::cpu().decide(&Clip::norm(1.0), &[Tensor::new(&w), Tensor::new(&w)]).expect("a valid clip");
    assert_eq!(message(state.decided(vec![other])), "a clip of 2 tensors was decided for 1 parameters");
    let other = Clipper::cpu().decide(&Clip::norm(1.0), &[Tensor::new(&w[..3])]).expect("a valid clip");
    assert_eq!(message(state.decided(vec![other])), "tensor \"w\": it has 4 elements, its gradient 3");
    assert_eq!(message(state.decided(vec![])), "0 clips for 1 groups: give one for all, or one for each");
    assert_eq!(state.steps(), 0);
    let clip = Clipper::cpu().decide(&Clip::norm(1.0), &[Tensor::new(&w)]).expect("a valid clip");
    let step = state.decided(vec![clip]).expect("it fits");
    let (g, mut momentum, double) = ([1.0f32; 4], [0u8; 16], &mut [0f64; 1]);
    let mut piece = TensorMut::new(&mut w[..2]);
    let gradient = Tensor::new(&g[..2]);
    assert_eq!(
        message(step.apply(1, 0, &mut piece, &gradient, [&mut momentum[..8]])),
        "tensor 1: there are only 1 parameters"
    );
    assert_eq!(
        message(step.apply(0, 3, &mut piece, &gradient, [&mut momentum[..8]])),
        "tensor \"w\": elements 3..5 were given, it has 4"
    );
    assert_eq!(
        message(step.apply(0, 0, &mut piece, &Tensor::new(&g), [&mut momentum[..8]])),
        "tensor \"w\": the piece has 2 elements, its gradient 4"
    );
    assert_eq!(
        message(step.apply(0, 0, &mut TensorMut::new(double), &Tensor::new(&g[..1]), [&mut momentum[..4]])),
        "tensor \"w\": the piece is float64, the parameter float32"
    );
    assert_eq!(
        message(step.apply(0, 0, &mut piece, &gradient, [&mut momentum[..4]])),
        "the optimizer's state does not fit: momentum_buffer of tensor \"w\" has 4 bytes, not 8"
    );
    assert_eq!((w, momentum), ([1.0; 4], [0; 16]));
}

//! Guards against a restored run that goes on otherwise than the one that was saved, and against a state that is taken
//! over although it belongs to something else.
#![cfg(feature = "safetensors")]

use crate::common::numbers::Random;
use gradclip::{Clip, Clipper, Error, Halves, Optimizer, OptimizerState, Tensor, TensorMut};
use half::bf16;
use safetensors::SafeTensors;

struct Run {
    single: Vec<f32>,
    double: Vec<f64>,
    half: Vec<bf16>,
}

impl Run {
    fn new() -> Self {
        Self { single: vec![0.5; 6], double: vec![-0.25; 3], half: vec![bf16::ONE; 5] }
    }

    fn state(&self, optimizer: Optimizer) -> OptimizerState<'static> {
        let single = [Tensor::new(&self.single).named("single").shape(&[2, 3]).expect("it fits")];
        let others = [Tensor::new(&self.double), Tensor::new(&self.half).named("half")];
        OptimizerState::new(&[(optimizer, &single), (optimizer.weight_decay(0.5), &others)]).expect("valid settings")
    }

    fn step(&mut self, state: &mut OptimizerState<'_>, random: &mut Random) {
        let gradients = [6, 3, 5].map(|len| random.normals(len, 0.1).iter().map(|x| *x as f32).collect::<Vec<_>>());
        let gradients: Vec<_> = gradients.iter().map(|g| Tensor::new(g)).collect();
        let gradients = [gradients[0].shape(&[2, 3]).expect("it fits"), gradients[1], gradients[2]];
        let single = TensorMut::new(&mut self.single).shape(&[2, 3]).expect("it fits");
        let mut parameters = [single, TensorMut::new(&mut self.double), TensorMut::new(&mut self.half)];
        Clipper::cpu().step(&Clip::norm(0.1), state, &mut parameters, &gradients).expect("a valid step");
    }

    fn bits(&self) -> (Vec<u32>, Vec<u64>, Vec<u16>) {
        (
            self.single.iter().map(|x| x.to_bits()).collect(),
            self.double.iter().map(|x| x.to_bits()).collect(),
            self.half.iter().map(|x| x.to_bits()).collect(),
        )
    }
}

fn optimizers() -> [(Optimizer, &'static [&'static str]); 7] {
    let adamw = Optimizer::adamw(1e-3);
    [
        (Optimizer::sgd(0.1), &[]),
        (Optimizer::sgd(0.1).momentum(0.9).dampening(0.1), &["momentum_buffer"]),
        (Optimizer::adagrad(0.1).initial_accumulator_value(0.1).lr_decay(0.01), &["sum"]),
        (
            Optimizer::rmsprop(0.1).momentum(0.3).centered(true).halves(Halves::Master),
            &["square_avg", "momentum_buffer", "grad_avg"],
        ),
        (Optimizer::adam(0.1).amsgrad(true).maximize(true), &["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (adamw.betas(0.1 + 0.2, 0.95).halves(Halves::Remainder), &["exp_avg", "exp_avg_sq"]),
        (adamw.halves(Halves::Master), &["exp_avg", "exp_avg_sq"]),
    ]
}

#[test]
fn a_restored_run_gives_the_bits_of_one_that_was_not_stopped() {
    for (optimizer, names) in optimizers() {
        let (mut run, mut random) = (Run::new(), Random(1));
        let mut state = run.state(optimizer);
        for _ in 0..3 {
            run.step(&mut state, &mut random);
        }
        state.optimizers_mut()[1].lr = 0.1 + 0.2;
        let saved = state.to_safetensors().expect("it can be saved");

        // torch's names, by the parameter's name or place, in the parameter's shape.
        let file = SafeTensors::deserialize(&saved).expect("a safetensors file");
        for name in names {
            assert_eq!(file.tensor(&format!("single.{name}")).expect("it is there").shape(), [2, 3]);
            assert_eq!(file.tensor(&format!("1.{name}")).expect("it is there").dtype(), safetensors::Dtype::F64);
        }
        let kept = match optimizer.halves {
            Halves::Remainder => Some(("half.remainder", safetensors::Dtype::U16)),
            Halves::Master => Some(("half.master", safetensors::Dtype::F32)),
            _ => None,
        };
        if let Some((name, dtype)) = kept {
            assert_eq!(file.tensor(name).expect("it is there").dtype(), dtype);
        }
        assert_eq!(file.len(), 3 * names.len() + usize::from(kept.is_some()));

        let mut again = Run { single: run.single.clone(), double: run.double.clone(), half: run.half.clone() };
        let mut restored = again.state(optimizer);
        restored.restore_safetensors(&saved).expect("it fits");
        assert_eq!(restored.optimizers(), state.optimizers(), "settings come back to the bit");
        let mut random_again = random.clone();
        for _ in 0..3 {
            run.step(&mut state, &mut random);
            again.step(&mut restored, &mut random_again);
        }
        assert_eq!(run.bits(), again.bits(), "{optimizer}");
        let saved = |state: &OptimizerState<'_>| state.to_safetensors().expect("it can be saved");
        assert_eq!(saved(&state), saved(&restored), "{optimizer}");
        assert_eq!(restored.steps(), 6);
    }
}

/// The error of restoring, after which the state must be as it was.
fn refused(state: &mut OptimizerState<'_>, bytes: &[u8]) -> String {
    let (steps, settings) = (state.steps(), state.optimizers().to_vec());
    let tensors = |state: &OptimizerState<'_>| state.bytes(0, "exp_avg").map(<[u8]>::to_vec);
    let before = tensors(state);
    let error = state.restore_safetensors(bytes).expect_err("it does not fit");
    assert!(matches!(error, Error::OptimizerState(_) | Error::Setting { .. }), "{error:?}");
    assert_eq!((state.steps(), state.optimizers(), tensors(state)), (steps, &settings[..], before), "{error}");
    error.to_string()
}

#[test]
fn another_state_is_an_error_that_names_it() {
    let w = [0.5f32; 6];
    let named = [Tensor::new(&w).named("w")];
    let adamw = Optimizer::adamw(1e-3);
    let saved = adamw.state(&named).expect("valid settings").to_safetensors().expect("it can be saved");
    let of = |optimizer: Optimizer, parameters: &[Tensor<'_>]| optimizer.state(parameters).expect("valid settings");
    let start = "the optimizer's state does not fit: ";
    for (mut state, expected) in [
        (of(Optimizer::adam(1e-3), &named), "group 0 of the file is of AdamW, here it is of Adam"),
        (of(adamw.amsgrad(true), &named), "group 0 of the file is of AdamW, here it is of AdamW, amsgrad"),
        (
            of(adamw.halves(Halves::Master), &named),
            "group 0 of the file is of AdamW, here it is of AdamW, halves with master",
        ),
        (of(adamw, &[named[0], named[0].named("v")]), "group 0 of the file has 1 parameters, here it has 2"),
        (of(adamw, &[named[0].named("v")]), "the file has no tensor \"v.exp_avg\""),
        (
            of(adamw, &[named[0].shape(&[2, 3]).expect("it fits")]),
            "\"w.exp_avg\" is F32 [6] in the file, here it is F32 [2, 3]",
        ),
        (
            of(adamw, &[Tensor::new(&[0.5f64; 6]).named("w")]),
            "\"w.exp_avg\" is F32 [6] in the file, here it is F64 [6]",
        ),
        (OptimizerState::new(&[(adamw, &named), (adamw, &[])]).expect("valid"), "the file has 1 groups, this state 2"),
    ] {
        assert_eq!(refused(&mut state, &saved), format!("{start}{expected}"));
    }
    let mut state = of(adamw, &named);
    for cut in 0..saved.len() {
        refused(&mut state, &saved[..cut]);
    }
    let text = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = saved.windows(from.len()).position(|part| part == from.as_bytes()).expect("it is there");
        [&saved[..at], to.as_bytes(), &saved[at + from.len()..]].concat()
    };
    for (from, to, expected) in [
        ("version=1", "version=2", "it is of version \"2\" and this gradclip reads version 1"),
        ("version", "virsion", "it is of version \"virsion=1\" and this gradclip reads version 1"),
        ("gradclip_opt", "gradclip_opp", "the file is no optimizer's state that gradclip wrote"),
        ("step=0", "step=o", "the file has no step count"),
        ("AdamW lr", "Amaze lr", "the settings of group 0 cannot be read"),
        ("lr=0.001", "lr=0,001", "the settings of group 0 cannot be read"),
    ] {
        let message = refused(&mut state, &text(from, to));
        assert!(message.starts_with(&format!("{start}{expected}")), "{message}");
    }
    let message = refused(&mut state, &text("beta1=0.9", "beta1=1.9"));
    assert_eq!(message, "beta1 is 1.9; it must be 0 or more and below 1");

    let twice = of(adamw, &[named[0], named[0]]).to_safetensors().expect_err("one name for two");
    assert_eq!(
        twice.to_string(),
        format!("{start}it would have two tensors called \"w.exp_avg\"; give the parameters other names")
    );
}

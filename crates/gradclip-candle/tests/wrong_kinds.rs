//! Guards against a clip that skips quietly, or stops half-way, where a gradient is none: integers, formats without an
//! arithmetic, another shape than the var's; and against a list of vars that is taken for another.

mod common;

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, assert_near, assert_says, identities, norm, store, tensor, var};
use gradclip_candle::gradclip::{self, Clip, Scope, ZClip};
use gradclip_candle::{Error, Vars, clip_grad_norm, clip_grad_value};

#[test]
fn gradients_that_cannot_be_clipped_are_named_and_nothing_is_written() {
    let vars = [var(1, 4, DType::F32), var(2, 3, DType::F32), var(3, 4, DType::F32)];
    let sound = tensor(4, 4, 5.0, DType::F32);
    let zeros = |dtype| Tensor::zeros(3, dtype, &Device::Cpu).expect("a tensor");
    for (gradient, words) in [
        (zeros(DType::U8), ["u8", "to_dtype"]),
        (zeros(DType::U32), ["u32", "to_dtype"]),
        (zeros(DType::I64), ["i64", "to_dtype"]),
        (zeros(DType::F8E4M3), ["f8e4m3", "to_dtype"]),
        (tensor(5, (1, 3), 1.0, DType::F32), ["[1, 3]", "[3]"]),
        (tensor(5, 4, 1.0, DType::F32), ["[4]", "[3]"]),
    ] {
        let mut grads = store([(&vars[0], &sound), (&vars[1], &gradient), (&vars[2], &sound)]);
        let before = identities(&grads, &vars);
        let named: Vec<_> = ["w", "odd", "b"].into_iter().zip(vars.clone()).collect();
        for result in [clip_grad_norm(&mut grads, &named, 1.0), clip_grad_value(&mut grads, &named, 1.0)] {
            assert_says(result, &[&["gradient of \"odd\""][..], &words].concat());
        }
        assert_says(clip_grad_norm(&mut grads, &vars, 1.0), &["gradient of \"vars[1]\"", words[0]]);
        assert_eq!(identities(&grads, &vars), before);
    }
}

#[test]
fn adaptive_clipping_names_the_var_that_it_cannot_read() {
    let vars = [("w", var(1, 2, DType::F32)), ("codes", Var::zeros(2, DType::I64, &Device::Cpu).expect("a var"))];
    let gradient = tensor(2, 2, 5.0, DType::F32);
    let mut grads = store(vars.iter().map(|(_, var)| (var, &gradient)));
    let agc = Clip::agc(0.01);
    assert_says(gradclip_candle::clip(&mut grads, &vars, &agc), &["the var \"codes\"", "i64", "to_dtype"]);
    // Other clips do not ask for its value.
    assert!(clip_grad_norm(&mut grads, &vars, 1.0).expect("finite").clipped);
}

#[test]
fn bad_parameters_are_errors_and_become_candles() {
    fn step(max_norm: f64) -> candle_core::Result<()> {
        let w = var(1, 2, DType::F32);
        let mut grads = w.sqr()?.sum_all()?.backward()?;
        clip_grad_norm(&mut grads, &[w], max_norm)?;
        Ok(())
    }
    step(1.0).expect("valid");
    let error = step(-1.0).expect_err("it would turn the gradients round").to_string();
    assert!(error.contains("max_norm is -1; it must be 0 or more"), "{error}");
    let mut grads = store([]);
    let error = clip_grad_value(&mut grads, &[] as &[Var], f64::NAN).expect_err("not a number");
    assert!(matches!(error, Error::Clip(gradclip::Error::Setting { name: "clip_value", .. })), "{error}");
    // A scalar has no examples.
    let scalar = var(1, (), DType::F32);
    let mut grads = store([(&scalar, &tensor(1, (), 1.0, DType::F32))]);
    let by_example = Clip::norm(1.0).scope(Scope::Example);
    assert_says(gradclip_candle::clip(&mut grads, &[("s", scalar)], &by_example), &["\"s\"", "scalar"]);
}

#[test]
fn no_vars_no_gradients_and_no_elements_are_welcome() {
    let mut none = store([]);
    for vars in [vec![], vec![var(1, 3, DType::F32)]] {
        let report = clip_grad_norm(&mut none, &vars, 1.0).expect("nothing");
        assert_eq!((report.total_norm, report.elements, report.clipped), (0.0, 0, false));
        let mut threshold = ZClip::new();
        let any = Clip::norm(f64::INFINITY);
        gradclip_candle::clip_adaptive(&mut none, &vars, &any, &mut threshold).expect("nothing");
        assert_eq!(threshold, ZClip::new(), "nothing is no step");
        assert!(none.get_ids().next().is_none());
    }
    let vars = [var(1, (0, 3), DType::BF16), var(2, 2, DType::F32), var(3, (2, 0), DType::F64), var(4, (), DType::F32)];
    let gradients: Vec<_> =
        vars.iter().map(|var| Tensor::ones(var.shape(), var.dtype(), &Device::Cpu).expect("a tensor")).collect();
    for scope in [Scope::Global, Scope::Tensor, Scope::Unit] {
        let mut grads = store(vars.iter().zip(&gradients));
        let clip = Clip::norm(0.5).scope(scope);
        let report = gradclip_candle::clip(&mut grads, &vars, &clip).expect("finite");
        assert_near(report.total_norm, 3f64.sqrt(), 1e-12);
        assert!(report.clipped && report.elements == 3, "{scope:?}");
        assert_eq!(grads.get(&vars[0]).expect("there").dims(), [0, 3]);
        assert_eq!(grads.get(&vars[3]).expect("there").rank(), 0);
    }
}

#[test]
fn a_var_that_is_given_twice_counts_once() {
    let (w, b) = (var(1, 100, DType::F32), var(2, 100, DType::F32));
    let gradients = [tensor(3, 100, 1.0, DType::F32), tensor(4, 100, 1.0, DType::F32)];
    // The var, a clone of it, and the var made of its tensor are one.
    let again = Var::from_tensor(w.as_tensor()).expect("a var");
    let repeated = [w.clone(), b.clone(), w.clone(), again];
    for clip in [Clip::norm(0.5), Clip::norm(0.5).scope(Scope::Tensor), Clip::agc(0.01)] {
        let mut once = store([(&w, &gradients[0]), (&b, &gradients[1])]);
        let mut twice = store([(&w, &gradients[0]), (&b, &gradients[1])]);
        let expected = gradclip_candle::clip(&mut once, &[w.clone(), b.clone()], &clip).expect("finite");
        let report = gradclip_candle::clip(&mut twice, &repeated, &clip).expect("finite");
        assert_eq!(report, expected);
        assert_eq!(all_bits(&twice, &repeated[..2]), all_bits(&once, &repeated[..2]), "{clip:?}");
        let in_place = gradclip_candle::clip_in_place(
            &mut store([(&w, &gradients[0]), (&b, &gradients[1])]),
            &repeated,
            &clip,
            None,
        );
        assert_eq!(in_place.expect("finite"), expected);
    }
}

#[test]
fn vars_outside_the_list_keep_their_gradients_and_those_without_are_skipped() {
    let vars: Vec<_> = (0..5).map(|i| var(i, 10, DType::F32)).collect();
    let gradients: Vec<_> = (0..5).map(|i| tensor(10 + i, 10, 1.0, DType::F32)).collect();
    // The first has none, the last is not in the list.
    let mut grads = store(vars.iter().zip(&gradients).skip(1));
    let before = identities(&grads, &vars);
    let each = Clip::norm(0.5).scope(Scope::Tensor);
    let report = gradclip_candle::clip(&mut grads, &vars[..4], &each).expect("finite");
    // A report goes by the places in the list.
    let places: Vec<_> = report.segments.iter().map(|segment| segment.tensor).collect();
    assert_eq!(places, [Some(1), Some(2), Some(3)]);
    assert_near(report.total_norm, norm(&gradients[1..4]), 1e-12);
    assert!(grads.get(&vars[0]).is_none());
    assert_eq!(identities(&grads, &vars)[4], before[4]);
}

#[test]
fn every_kind_of_list_gives_the_same_vars() {
    let names = ["c", "a", "b"];
    let vars: Vec<_> = (0..3).map(|i| var(i, 2, DType::F32)).collect();
    let named: Vec<_> = names.into_iter().zip(vars.clone()).collect();
    let owned: Vec<_> = named.iter().map(|(name, var)| ((*name).to_owned(), var.clone())).collect();
    let hashed: HashMap<_, _> = owned.iter().cloned().collect();
    let sorted: BTreeMap<_, _> = named.iter().cloned().collect();
    let names_and_vars = |vars: Vec<(Option<&str>, &Var)>| -> Vec<_> {
        vars.into_iter().map(|(name, var)| (name.map(str::to_owned), var.id())).collect()
    };
    let of = |order: [usize; 3], with_names: bool| -> Vec<_> {
        order.map(|i| (with_names.then(|| names[i].to_owned()), vars[i].id())).into()
    };
    assert_eq!(names_and_vars(vars.vars()), of([0, 1, 2], false));
    assert_eq!(names_and_vars(vars[..].vars()), of([0, 1, 2], false));
    assert_eq!(names_and_vars(named.vars()), of([0, 1, 2], true));
    assert_eq!(names_and_vars(owned[..].vars()), of([0, 1, 2], true));
    assert_eq!(names_and_vars(hashed.vars()), of([1, 2, 0], true));
    assert_eq!(names_and_vars(sorted.vars()), of([1, 2, 0], true));
}

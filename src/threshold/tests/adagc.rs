use super::*;

#[test]
fn follows_the_formula() {
    let mut threshold = warm_adagc();
    assert_eq!(threshold.max_norms(17f64.sqrt(), &[1.0, 4.0]), [1.125, 1.5]);
    assert_eq!((threshold.gammas.as_slice(), threshold.steps), (&[0.875, 1.25][..], 3));
}

#[test]
fn takes_a_spike_in_as_it_was_clipped() {
    let (mut spiked, mut calm) = (warm_adagc(), warm_adagc());
    spiked.max_norms(1e30, &[1.0, 1e30]);
    calm.max_norms(1.5, &[1.0, 1.5]);
    assert_eq!(spiked, calm);
}

#[test]
fn learns_nothing_from_a_norm_of_zero() {
    let mut threshold = AdaGc::new().warm_up(2);
    for _ in 0..4 {
        assert_eq!(threshold.max_norms(0.5, &[0.0, 0.5])[0], f64::INFINITY);
    }
    assert_eq!(threshold.gammas, [f64::INFINITY, 0.5]);
    assert_eq!(threshold.max_norms(0.5, &[0.25, 0.0])[0], f64::INFINITY);
    assert_eq!(threshold.gammas, [0.25, 0.5]);
}

#[test]
fn takes_no_step_without_tensors() {
    let mut threshold = AdaGc::new();
    threshold.bind(&[]).expect("nothing yet");
    assert!(threshold.max_norms(0.0, &[]).is_empty());
    threshold.bind(&["tensor 0".to_owned()]).expect("any tensors will do before the first step");
}

#[test]
fn names_the_first_tensor_that_differs() {
    let mut threshold = warm_adagc();
    threshold.bind(&labels(&["w", "b"])).expect("its own tensors");
    for (names, message) in [
        (&["w", "v"][..], r#"where the state has tensor "b", the gradients have tensor "v""#),
        (&["b", "w"], r#"where the state has tensor "w", the gradients have tensor "b""#),
        (&["w"], r#"the state has tensor "b", which the gradients lack"#),
        (&["w", "b", "x"], r#"the gradients have tensor "x", which the state lacks"#),
    ] {
        let error = threshold.bind(&labels(names)).expect_err("other tensors").to_string();
        assert!(error.contains(message) && error.contains("AdaGc::new()"), "{error}");
    }
    assert_eq!(threshold, warm_adagc());
    let mut fresh = AdaGc::new();
    fresh.bind(&labels(&["a"])).expect("no state");
    fresh.bind(&labels(&["b", "c"])).expect("still no state");
    assert_eq!((fresh.labels.len(), fresh.gammas.len()), (2, 2));
}

#[test]
fn does_not_take_a_step_of_another_size() {
    let mut threshold = warm_adagc();
    assert_eq!(threshold.max_norms(1.0, &[1.0]), [f64::INFINITY]);
    assert_eq!(threshold, warm_adagc());
    let mut unbound = AdaGc::new();
    unbound.max_norms(1.0, &[0.5, 0.5]);
    assert_eq!(unbound.labels, ["tensor 0", "tensor 1"]);
}

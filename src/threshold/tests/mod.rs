//! Properties of all thresholds.

mod adagc;
mod autoclip;
#[cfg(feature = "serde")]
mod saved;
mod zclip;

use std::fmt::Debug;

use super::*;
use crate::error::tensor_label;

/// Numbers from 0.5 to 1.5, the same in each run.
fn noise() -> impl Iterator<Item = f64> {
    let mut state = 1u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        0.5 + (state >> 11) as f64 / (1u64 << 53) as f64
    })
}

fn labels(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| tensor_label(Some(name), 0)).collect()
}

/// Mean 2, variance 1, z threshold 2.
fn warm_zclip() -> ZClip {
    let mut threshold = zclip(2);
    assert_eq!([threshold.max_norm(1.0), threshold.max_norm(3.0)], [f64::INFINITY; 2]);
    threshold
}

fn zclip(warm_up: u32) -> ZClip {
    ZClip::new().alpha(0.5).z_threshold(2.0).warm_up(warm_up)
}

/// γ 0.75 and 1, at the end of the warm-up.
fn warm_adagc() -> AdaGc {
    let mut threshold = AdaGc::new().lambda_rel(1.5).lambda_abs(2.5).beta(0.5).warm_up(2);
    threshold.bind(&labels(&["w", "b"])).expect("no state yet");
    assert_eq!(threshold.max_norms(5.0, &[3.0, 4.0]), [1.5, 2.0]);
    assert_eq!(threshold.gammas, [1.5, 2.0]);
    assert_eq!(threshold.max_norms(1.25, &[0.75, 1.0]), [f64::INFINITY; 2]);
    assert_eq!(threshold.gammas, [0.75, 1.0]);
    threshold
}

#[test]
fn constant_norms_are_not_clipped() {
    for norm in [0.0, 0.1, 1.0 / 3.0, 1e-300, 1e300] {
        let mut z = ZClip::new();
        let mut auto = AutoClip::new();
        let mut ada = AdaGc::new().lambda_abs(f64::MAX);
        for _ in 0..300 {
            assert!(z.max_norm(norm) >= norm && auto.max_norm(norm) >= norm);
            assert!(ada.max_norms(norm, &[norm])[0] >= norm);
        }
        assert_eq!((z.mean, z.variance), (norm, 0.0));
        assert_eq!(ada.gammas, [if norm == 0.0 { f64::INFINITY } else { norm }]);
    }
}

#[test]
fn thresholds_are_numbers_at_both_ends_of_the_range() {
    let ends = [0.0, f64::from_bits(1), 1e-300, 1.0, 1e160, f64::MAX, 0.0, f64::MAX, f64::from_bits(1), f64::MAX];
    for z_threshold in [1e-300, 2.5, f64::MAX] {
        let mut z = ZClip::new().warm_up(2).z_threshold(z_threshold);
        let mut auto = AutoClip::new();
        let mut ada = AdaGc::new().warm_up(2);
        for norm in ends.into_iter().cycle().take(100) {
            assert!(z.max_norm(norm) >= 0.0 && auto.max_norm(norm) >= 0.0);
            assert!(ada.max_norms(norm, &[norm, 0.0]).iter().all(|&max_norm| max_norm >= 0.0));
            assert!(is_norm(z.mean) && is_norm(z.variance), "{z:?}");
            assert!(ada.gammas[0] > 0.0 && ada.gammas[1] == f64::INFINITY, "{ada:?}");
        }
    }
}

#[test]
fn steps_that_are_not_finite_leave_the_state() {
    let (mut z, mut ada) = (warm_zclip(), warm_adagc());
    let mut auto = AutoClip::new().warm_up(0);
    assert_eq!(auto.max_norm(f64::NAN), f64::INFINITY);
    auto.max_norm(7.0);
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let before = (z.clone(), auto.clone(), ada.clone());
        assert_eq!(z.max_norm(bad), 4.0);
        assert_eq!(auto.max_norm(bad), 7.0);
        assert_eq!(ada.max_norms(bad, &[1.0, 1.0]), [1.125, 1.5]);
        assert_eq!(ada.max_norms(1.0, &[1.0, bad]), [1.125, 1.5]);
        assert_eq!(z.max_norms(1.0, &[bad]), [4.0]);
        assert_eq!(auto.max_norms(bad, &[1.0]), [7.0]);
        assert_eq!((&z, &auto, &ada), (&before.0, &before.1, &before.2));
    }
    let mut cold = AdaGc::new();
    assert_eq!(cold.max_norms(f64::NAN, &[f64::NAN, 1.0]), [1.0; 2]);
    assert_eq!(cold, AdaGc::new());
    cold.bind(&labels(&["w", "b"])).expect("no state");
    let before = cold.clone();
    assert_eq!(cold.max_norms(f64::NAN, &[f64::NAN, 1.0]), [1.0; 2]);
    assert_eq!(cold, before);
    assert_eq!(ZClip::new().max_norm(f64::INFINITY), f64::INFINITY);
}

#[test]
fn one_norm_is_all_that_a_global_threshold_follows() {
    for (threshold, name) in [
        (&mut ZClip::new() as &mut dyn Threshold, "ZClip follows one norm"),
        (&mut AutoClip::new(), "AutoClip follows one norm"),
    ] {
        threshold.bind(&labels(&["w"])).expect("one");
        for names in [&[][..], &["w", "b"], &["w", "b", "c"]] {
            let error = threshold.bind(&labels(names)).expect_err("not one").to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}

/// Checks that `bind` reports the setting, and that steps with it clip nothing and leave the state.
#[track_caller]
fn refused(mut threshold: impl Threshold + Debug, message: &str) {
    // As text, because NaN does not equal itself.
    let before = format!("{threshold:?}");
    let error = threshold.bind(&labels(&["w"])).expect_err(message);
    assert!(matches!(error, Error::Setting { .. }) && error.to_string() == message, "{error}");
    for norm in [1.0, f64::NAN, 1e300] {
        assert_eq!(threshold.max_norms(norm, &[norm]), [f64::INFINITY], "{before}");
    }
    assert_eq!(format!("{threshold:?}"), before);
}

#[test]
fn settings_that_cannot_be_are_told_where_they_are_used() {
    let mut auto = AutoClip::new().warm_up(0);
    auto.max_norm(7.0);
    for bad in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
        refused(warm_zclip().alpha(bad), &format!("alpha is {bad}; it must be 0 or more and below 1"));
        refused(AdaGc::new().beta(bad), &format!("beta is {bad}; it must be 0 or more and below 1"));
    }
    for bad in [0.0, -1.0, f64::NAN] {
        refused(warm_zclip().skip_above_z(bad), &format!("skip_above_z is {bad}; it must be above 0"));
    }
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(warm_zclip().z_threshold(bad), &format!("z_threshold is {bad}; it must be a finite number above 0"));
        refused(AdaGc::new().lambda_rel(bad), &format!("lambda_rel is {bad}; it must be a finite number above 0"));
        refused(AdaGc::new().lambda_abs(bad), &format!("lambda_abs is {bad}; it must be a finite number above 0"));
    }
    for bad in [-0.1, 100.1, f64::NAN] {
        refused(auto.clone().percentile(bad), &format!("percentile is {bad}; it must be from 0 to 100"));
    }
    refused(auto.history(0), "history is 0; it must be 1 or more");
    refused(ZClip::new().warm_up(0), "warm_up is 0; it must be 1 or more");
    refused(AdaGc::new().warm_up(0), "warm_up is 0; it must be 1 or more");
    ZClip::new().alpha(0.0).bind(&labels(&["w"])).expect("the least rate");
    AutoClip::new().percentile(100.0).bind(&labels(&["w"])).expect("the greatest norm");
}

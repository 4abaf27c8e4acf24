//! Guards against answers that differ from those of PyTorch, timm, Optax and TensorFlow on real gradients.
//!
//! `fixtures/cases.json` lists their inputs and results. Where a peer's norm differs from the exact one, the exact one
//! counts, and the peer's gradients are taken as only as precise as its norm.

use std::collections::BTreeSet;

use crate::common::numbers::{exact_norm, ulp};
use crate::common::reference::{Asked, Mode};
use crate::common::{Data, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::{Budget, Clip, Dtype, Error, NonFinite, NormType, Scope, UnitAxis};
use serde_json::Value;

fn fixture(path: &str) -> Vec<u8> {
    let path = format!("{}/tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn tensors(path: &str) -> Vec<Data> {
    let bytes = fixture(path);
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let dtype = match view.dtype() {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::F64 => Dtype::F64,
                safetensors::Dtype::F16 => Dtype::F16,
                safetensors::Dtype::BF16 => Dtype::BF16,
                other => panic!("{path}: {name} is {other:?}"),
            };
            Data::from_bytes(dtype, view.data().to_vec()).named(&name).shaped(view.shape())
        })
        .collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

fn all_cases() -> Vec<Value> {
    serde_json::from_slice(&fixture("cases.json")).expect("JSON")
}

/// The operations, by the tests below that run them.
const NORM: &str = "clip_norm";
const VALUE: &str = "clip_value";
const TOTAL: &str = "total_norm";
const SCOPED: [&str; 5] = [
    "clip_norm_per_tensor",
    "clip_norm_per_unit",
    "clip_rms_per_tensor",
    "clip_average_norm_per_tensor",
    "clip_adaptive",
];
const SUMMED: [&str; 2] = ["clip_per_example_global_sum", "clip_per_example_layer_sum"];

fn cases(op: &str) -> Vec<Value> {
    let cases: Vec<_> = all_cases().into_iter().filter(|case| case["op"] == op).collect();
    assert!(!cases.is_empty(), "no cases of {op}");
    cases
}

#[test]
fn no_case_is_left_out() {
    let cases = all_cases();
    assert_eq!(cases.len(), 86);
    let texts = |key: &str| -> BTreeSet<_> { cases.iter().map(|case| case[key].as_str().expect("a text")).collect() };
    assert_eq!(texts("op"), [&[NORM, VALUE, TOTAL], &SCOPED[..], &SUMMED].concat().into_iter().collect());
    assert_eq!(texts("id").len(), cases.len(), "ids repeat");
}

fn file(case: &Value, key: &str) -> Vec<Data> {
    tensors(case[key].as_str().unwrap_or_else(|| panic!("{}: no {key}", id(case))))
}

fn id(case: &Value) -> &str {
    case["id"].as_str().expect("an id")
}

/// A number of the table, which spells the ones that JSON has not.
fn number(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some("nan") => Some(f64::NAN),
        Some("inf") => Some(f64::INFINITY),
        _ => value.as_f64(),
    }
}

fn norm_type(case: &Value) -> NormType {
    NormType::p(number(&case["args"]["p"]).expect("a p"))
}

/// The places of the tensors that a path can clip. That the GPU refuses the others by name is asserted.
fn for_path(path: Path, clip: &Clip, all: &[Data]) -> Vec<usize> {
    let takes = |t: &Data| path.dtypes().contains(&t.dtype);
    if let Some(float64) = all.iter().find(|t| !takes(t)).filter(|_| path == Path::ALL[1]) {
        let done = path.clip(clip, all);
        let Err(Error::UnsupportedDtype { tensor, dtype: Dtype::F64 }) = done.report else {
            panic!("{path:?} should refuse float64: {:?}", done.report);
        };
        assert!(tensor.contains(float64.name.as_deref().expect("a name")), "{tensor} is not {:?}", float64.name);
        assert_same_bits(&done.after, all, "refused");
    }
    (0..all.len()).filter(|i| takes(&all[*i])).collect()
}

/// Half the last place, relatively.
fn epsilon(dtype: Dtype) -> f64 {
    ulp(dtype, 1.0) / 2.0
}

#[test]
fn norm_clips_agree_with_the_peers() {
    for case in cases(NORM) {
        let what = id(&case);
        let args = &case["args"];
        let max_norm = number(&args["max_norm"]).expect("max_norm");
        let grad_scale = number(&args["grad_scale"]).unwrap_or(1.0);
        let mut clip = Clip::norm(max_norm).norm_type(norm_type(&case));
        clip = clip.grad_scale(grad_scale).non_finite(NonFinite::Propagate);
        let eps = number(&args["eps"]).unwrap_or(1e-6);
        clip = clip.eps(eps);
        let (all, all_expected) = (file(&case, "input"), file(&case, "expected"));
        let all_norm = exact_norm(norm_type(&case), numbers_of(&all)) / grad_scale;
        if let Some(stated) = number(&case["exact_norm"]).filter(|norm| norm.is_finite()) {
            assert_norm(all_norm, stated, 1e-14, what);
        }
        let peers_norm = number(&case["total_norm"]).expect("the peer returned a norm");
        for path in Path::ALL {
            let what = format!("{what} on {path:?}");
            let kept = for_path(*path, &clip, &all);
            let complete = kept.len() == all.len();
            let input: Vec<_> = kept.iter().map(|i| all[*i].clone()).collect();
            let expected: Vec<_> = kept.iter().map(|i| all_expected[*i].clone()).collect();
            if input.is_empty() {
                continue;
            }
            let (report, after) = path.clip(&clip, &input).ok();
            assert_eq!(report.elements, input.iter().map(|t| t.len() as u64).sum::<u64>(), "{what}");
            if !peers_norm.is_finite() {
                assert_eq!(report.total_norm.is_nan(), peers_norm.is_nan(), "{what}");
                assert_eq!(report.total_norm.is_infinite(), peers_norm.is_infinite(), "{what}");
                assert!(report.non_finite.is_some(), "{what}");
                for (got, want) in numbers_of(&after).zip(numbers_of(&expected)) {
                    assert!(got == want || (got.is_nan() && want.is_nan()), "{what}: {got} is not {want}");
                }
                continue;
            }
            let norm = if complete { all_norm } else { exact_norm(norm_type(&case), numbers_of(&input)) / grad_scale };
            let tolerance = path.tolerance_of(norm_type(&case));
            assert_norm(report.total_norm, norm, tolerance, &what);
            let coefficient = (max_norm / (norm + eps)).min(1.0);
            assert_norm(report.clip_coef, coefficient, tolerance, &what);
            assert_eq!(report.clipped, coefficient < 1.0, "{what}");
            if coefficient == 1.0 && grad_scale == 1.0 {
                assert_same_bits(&after, &input, &what);
                continue;
            }
            assert_scaled(&input, &after, coefficient / grad_scale, tolerance, &what);
            if !complete {
                // The peer's norm is over all of them.
                continue;
            }
            let norm_error = (peers_norm / norm - 1.0).abs();
            for (got, want) in after.iter().zip(&expected) {
                assert_eq!((&got.name, got.dtype), (&want.name, want.dtype), "{what}");
                // The peer rounds max_norm, 1 / (norm + eps) and the product of both to float32, or, in half precision,
                // the last two to that.
                let (ulps, relative) = match got.dtype {
                    Dtype::F32 | Dtype::F64 => (2.0, norm_error + 3.0 * epsilon(Dtype::F32)),
                    half => (1.0, norm_error + 2.0 * epsilon(half)),
                };
                for (i, (got_x, want_x)) in got.numbers().zip(want.numbers()).enumerate() {
                    // Float64 is held to float32's last place: the peer's float64 coefficient may come from float32.
                    let unit = if got.dtype == Dtype::F64 { Dtype::F32 } else { got.dtype };
                    let slack = ulps * ulp(unit, want_x) + relative * want_x.abs();
                    assert!(
                        (got_x - want_x).abs() <= slack,
                        "{what}: {:?}[{i}] is {got_x:e}; the peer has {want_x:e}",
                        got.name
                    );
                }
            }
        }
    }
}

#[test]
fn value_clips_agree_with_the_peers_to_the_bit() {
    for case in cases(VALUE) {
        let bound = |name: &str| number(&case["args"][name]).expect("a bound");
        let clip = Clip::range(bound("min"), bound("max"));
        let (all, all_expected) = (file(&case, "input"), file(&case, "expected"));
        for path in Path::ALL {
            let what = format!("{} on {path:?}", id(&case));
            let kept = for_path(*path, &clip, &all);
            let input: Vec<_> = kept.iter().map(|i| all[*i].clone()).collect();
            let expected: Vec<_> = kept.iter().map(|i| all_expected[*i].clone()).collect();
            let (report, after) = path.clip(&clip, &input).ok();
            assert_eq!(report.clipped, input != expected, "{what}");
            assert_same_bits(&after, &expected, &what);
            let bad = numbers_of(&input).filter(|x| !x.is_finite()).count() as u64;
            assert_eq!(report.non_finite.map_or(0, |found| found.count), bad, "{what}");
        }
    }
}

#[test]
fn norms_that_the_peers_lose_are_right() {
    for case in cases(TOTAL) {
        let input = file(&case, "input");
        let norm = number(&case["exact_norm"]).expect("the exact norm");
        for path in Path::ALL {
            let what = format!("{} on {path:?}", id(&case));
            let measure = Clip::norm(f64::INFINITY).norm_type(norm_type(&case));
            let (report, after) = path.clip(&measure, &input).ok();
            assert_norm(report.total_norm, norm, path.norm_tolerance(), &what);
            assert_same_bits(&after, &input, &what);
            let half = Clip::norm(norm / 2.0).eps(0.0);
            let (report, after) = path.clip(&half.norm_type(norm_type(&case)), &input).ok();
            assert!(report.clipped, "{what}");
            assert_scaled(&input, &after, 0.5, path.norm_tolerance(), &what);
        }
    }
}

/// What a case with a scope, or of another mode than the norm's, asks for.
fn asked(case: &Value) -> Asked {
    let args = &case["args"];
    let arg = |name: &str| number(&args[name]).unwrap_or_else(|| panic!("{}: no {name}", id(case)));
    let norm = |scope| Asked { scope, eps: arg("eps"), ..Asked::new(Mode::Norm, arg("max_norm")) };
    let axis = match args["unit_axis"].as_str() {
        None => None,
        Some("first") => Some(UnitAxis::First),
        Some("last") => Some(UnitAxis::Last),
        Some("optax") => Some(UnitAxis::Optax),
        Some(other) => {
            let over = other.strip_prefix("over:").unwrap_or_else(|| panic!("{}: unit_axis is {other}", id(case)));
            Some(UnitAxis::over(&over.split(',').map(|axis| axis.parse().expect("an axis")).collect::<Vec<_>>()))
        }
    };
    match case["op"].as_str().expect("an op") {
        "clip_norm_per_tensor" => Asked { norm_type: norm_type(case), ..norm(Scope::Tensor) },
        "clip_norm_per_unit" => Asked { axis, ..norm(Scope::Unit) },
        "clip_rms_per_tensor" => Asked { scope: Scope::Tensor, ..Asked::new(Mode::Rms, arg("threshold")) },
        "clip_average_norm_per_tensor" => {
            Asked { scope: Scope::Tensor, ..Asked::new(Mode::AverageNorm, arg("max_norm")) }
        }
        "clip_adaptive" => {
            let norm_type = number(&args["p"]).map_or(NormType::L2, NormType::p);
            Asked { axis, norm_type, agc_eps: arg("eps"), ..Asked::new(Mode::Agc, arg("clip_factor")) }
        }
        "clip_per_example_global_sum" => norm(Scope::Example),
        "clip_per_example_layer_sum" => {
            let uniform = args["uniform"].as_bool().expect("uniform or not");
            let budget = if uniform { Budget::Uniform } else { Budget::Sized };
            Asked { budget, ..norm(Scope::ExampleTensor) }
        }
        other => panic!("{other} has no clip"),
    }
}

/// How far the peer's own norm is off, where that alone is more than 4 ulp.
fn peers_norm_error(case: &Value) -> f64 {
    match id(case) {
        // Optax adds up the squares in float32. All quotients of what it returned and what it was given agree that its
        // RMS of `2.weight`, of 2,160 elements, is 3.3e-7 too low.
        "optax_block_rms_convnet_f32" => 3.4e-7,
        // These elements of Optax are up to 3.4 ulp from the float64 result.
        "optax_agc_cubes_0_m1" | "optax_agc_cubes_1" => 2e-7,
        _ => 0.0,
    }
}

#[test]
fn scoped_clips_agree_with_the_peers() {
    for op in SCOPED {
        for case in cases(op) {
            let asked = asked(&case);
            let (mut input, expected) = (file(&case, "input"), file(&case, "expected"));
            if op == "clip_adaptive" {
                let with = |(t, p): (Data, Data)| t.with_parameter(p);
                input = input.into_iter().zip(file(&case, "params")).map(with).collect();
            }
            for path in Path::ALL {
                let clipped = asked.check(*path, &input, id(&case)).clipped();
                assert!(clipped.contains(&true), "{}: nothing is clipped", id(&case));
                let (_, after) = path.clip(&asked.clip(), &input).ok();
                for (got, want) in after.iter().zip(&expected) {
                    assert_eq!((&got.name, got.dtype, &got.shape), (&want.name, Dtype::F32, &want.shape));
                    for (i, (got_x, want_x)) in got.numbers().zip(want.numbers()).enumerate() {
                        let slack = 4.0 * ulp(Dtype::F32, want_x) + peers_norm_error(&case) * want_x.abs();
                        assert!(
                            (got_x - want_x).abs() <= slack,
                            "{} on {path:?}: {:?}[{i}] is {got_x:e}; the peer has {want_x:e}",
                            id(&case),
                            got.name
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn sums_of_clipped_examples_agree_with_the_peers() {
    for op in SUMMED {
        for case in cases(op) {
            let asked = asked(&case);
            let (input, expected) = (file(&case, "input"), file(&case, "expected"));
            for path in Path::HOST {
                let what = format!("{} on {path:?}", id(&case));
                asked.check_sums(*path, &input, id(&case));
                let (report, sums) = path.sum_examples(&asked.clip(), &input).ok();
                let counted: Value = match op {
                    "clip_per_example_global_sum" => report.num_clipped().into(),
                    _ => {
                        // By tensor, in the order of the model, which has each layer's weight before its bias.
                        let of = |name: &&str| {
                            let t = input.iter().position(|t| t.name.as_deref() == Some(*name));
                            report.segments.iter().filter(|s| s.clipped && s.tensor == t).count()
                        };
                        ["1.weight", "1.bias", "3.weight", "3.bias"].iter().map(of).collect()
                    }
                };
                assert_eq!(counted, case["num_clipped"], "{what}");
                let (_, terms) = path.clip(&asked.clip(), &input).ok();
                for ((got, want), terms) in sums.iter().zip(&expected).zip(&terms) {
                    assert_eq!(got.len(), want.len(), "{what}");
                    for i in 0..got.len() {
                        // Where terms cancel, what is left are both sides' errors in the terms.
                        let sizes = (i..terms.len()).step_by(got.len()).map(|at| terms.get(at).abs());
                        let slack = 4.0 * ulp(Dtype::F32, sizes.sum());
                        let (x, peers) = (got.get(i), want.get(i));
                        let name = &want.name;
                        assert!((x - peers).abs() <= slack, "{what}: {name:?}[{i}] is {x:e}; the peer has {peers:e}");
                    }
                }
            }
        }
    }
}

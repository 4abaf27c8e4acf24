//! `--json` prints one object with exactly the documented fields, or nothing.

use std::path::Path;

use crate::common::{EXAMPLE, Folder, clip, f32s, file, gradclip, shaped_file};
use serde_json::{Value, json};

const FIELDS: [&str; 10] = [
    "adapter",
    "backend",
    "clip_coef",
    "clipped",
    "elements",
    "lost",
    "non_finite",
    "seconds",
    "tensors",
    "total_norm",
];

#[track_caller]
fn checked(object: &Value) -> &Value {
    checked_with(object, &[])
}

/// Some options add fields.
#[track_caller]
fn checked_with<'a>(object: &'a Value, more: &[&str]) -> &'a Value {
    let mut fields: Vec<_> = object.as_object().unwrap().keys().map(String::as_str).collect();
    fields.sort();
    let mut expected = [&FIELDS[..], more].concat();
    expected.sort();
    assert_eq!(fields, expected);
    assert!(object["seconds"].as_f64().unwrap() > 0.0);
    object
}

#[track_caller]
fn near(value: &Value, expected: f64) {
    let value = value.as_f64().unwrap();
    assert!((value / expected - 1.0).abs() < 1e-7, "{value} is not {expected}");
}

#[test]
fn of_norm() {
    let object = gradclip(["norm", EXAMPLE, "--json", "--backend", "cpu"]).succeeded().json();
    checked(&object);
    near(&object["total_norm"], 0.5245872834952451);
    assert_eq!(object["clipped"], json!(false));
    assert_eq!(object["clip_coef"], json!(1.0));
    assert_eq!((&object["elements"], &object["tensors"]), (&json!(45_004), &json!(11)));
    assert_eq!((&object["backend"], &object["adapter"]), (&json!("cpu"), &Value::Null));
    assert_eq!(object["non_finite"], Value::Null);
}

#[test]
fn one_norm_over_all_files() {
    let run = gradclip(["norm", EXAMPLE, EXAMPLE, "--json", "--backend", "cpu"]);
    assert!(
        run.stderr.starts_with("warning: 11 tensors counted more than once") && run.stderr.lines().count() == 1,
        "{run:?}"
    );
    let object = run.json();
    near(&object["total_norm"], 0.5245872834952451 * 2f64.sqrt());
    assert_eq!((&object["elements"], &object["tensors"]), (&json!(90_008), &json!(22)));
}

#[test]
fn options_of_norm() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[3.0, -4.0])), ("b", "F32", vec![])]));
    for (norm_type, expected) in [("1", 7.0), ("2", 5.0), ("inf", 4.0), ("3", 91f64.cbrt()), ("1e300", 4.0)] {
        let args = ["norm", input.to_str().unwrap(), "--norm-type", norm_type, "--grad-scale", "2", "--json"];
        near(&gradclip(args).succeeded().json()["total_norm"], expected / 2.0);
    }
}

/// Auto says which backend it fell back to, but not here.
#[test]
fn nothing_else_is_printed() {
    gradclip(["norm", EXAMPLE, "--json"]).succeeded().json();
}

#[test]
fn of_clip() {
    let folder = Folder::new();
    let object = clip(Path::new(EXAMPLE), &folder.path("out"), &["--max-norm", "0.2", "--json"]).succeeded().json();
    checked(&object);
    near(&object["clip_coef"], 0.2 / (0.5245872834952451 + 1e-6));
    assert_eq!(object["clipped"], json!(true));
    let norm = gradclip(["norm", "-q", "--backend", "cpu", folder.path("out").to_str().unwrap()]).succeeded().stdout;
    assert!((norm.trim().parse::<f64>().unwrap() / 0.2 - 1.0).abs() < 1e-5, "{norm}");
}

#[test]
fn segments_have_names() {
    let folder = Folder::new();
    let (w, b) = (f32s(&[3.0, 4.0, 0.0, 5.0]), f32s(&[0.0, 12.0]));
    let input = folder.write("in", shaped_file(&[("w", "F32", &[2, 2], w), ("b", "F32", &[2], b)]));
    let named = |object: &Value| -> Vec<(String, f64)> {
        let segments = checked_with(object, &["segments"])["segments"].as_array().unwrap();
        let one = |s: &Value| (s["name"].as_str().unwrap().to_owned(), s["norm"].as_f64().unwrap());
        segments.iter().map(one).collect()
    };
    let pairs = |of: &[(&str, f64)]| of.iter().map(|(name, norm)| ((*name).to_owned(), *norm)).collect::<Vec<_>>();
    let norm = |scope: &[&str]| {
        let args = ["norm", input.to_str().unwrap(), "--json", "--backend", "cpu", "--scope"];
        named(&gradclip(args.iter().chain(scope)).succeeded().json())
    };
    assert_eq!(norm(&["tensor"]), pairs(&[("w", 50f64.sqrt()), ("b", 12.0)]));
    assert_eq!(norm(&["unit"]), pairs(&[("w[0]", 5.0), ("w[1]", 5.0), ("b", 12.0)]));
    let columns = pairs(&[("w[0]", 3.0), ("w[1]", 41f64.sqrt()), ("b", 12.0)]);
    assert_eq!(norm(&["unit", "--unit-axis", "last"]), columns);
    assert_eq!(norm(&["example"]), pairs(&[("example 0", 5.0), ("example 1", 13.0)]));
    let each = [("w example 0", 5.0), ("w example 1", 5.0), ("b example 0", 0.0), ("b example 1", 12.0)];
    assert_eq!(norm(&["example-tensor"]), pairs(&each));

    let clip = |more: &[&str]| {
        let args = ["--max-norm", "6", "--eps", "0", "--force", "--json", "--scope"];
        clip(&input, &folder.path("out"), &[&args[..], more].concat()).succeeded().json()
    };
    let object = clip(&["example"]);
    assert_eq!(named(&object), pairs(&[("example 0", 5.0), ("example 1", 13.0)]));
    assert_eq!(object["segments"][0], json!({ "name": "example 0", "norm": 5.0, "clip_coef": 1.0 }));
    near(&object["segments"][1]["clip_coef"], 6.0 / 13.0);
    near(&object["clip_coef"], 6.0 / 13.0);
    for (scope, num_clipped) in [("example", json!(1)), ("example-tensor", json!([0, 1]))] {
        let object = clip(&[scope, "--sum"]);
        assert_eq!(checked_with(&object, &["segments", "num_clipped"])["num_clipped"], num_clipped);
    }
}

#[test]
fn the_norm_of_a_segment_may_be_null() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[f32::NAN])), ("b", "F32", f32s(&[2.0]))]));
    let args = ["norm", input.to_str().unwrap(), "--json", "--backend", "cpu", "--scope", "tensor"];
    let object = gradclip(args).succeeded().json();
    assert_eq!((&object["segments"][0]["norm"], &object["segments"][1]["norm"]), (&Value::Null, &json!(2.0)));
}

/// A NaN, an infinity, a norm that is larger than float64, and no norm are all null.
#[test]
fn a_null_says_why() {
    let f64s = |values: &[f64]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    let folder = Folder::new();
    let large = ("large", "F64", f64s(&[1.7e308, 1.7e308]));
    let infinite = ("infinite", "F64", f64s(&[f64::INFINITY, 1.0]));
    let nan = ("nan", "F64", f64s(&[f64::NAN, f64::INFINITY]));
    let good = ("good", "F64", f64s(&[3.0, 4.0]));
    let cases = [
        ("beyond float64", vec![good.clone(), large.clone()]),
        ("infinite", vec![good.clone(), large.clone(), infinite.clone()]),
        ("nan", vec![good, large, infinite, nan]),
    ];
    for (why, tensors) in cases {
        let input = folder.write("in", file(&tensors));
        let norm = |scope| {
            let args = ["norm", input.to_str().unwrap(), "--json", "--backend", "cpu", "--scope", scope];
            gradclip(args).succeeded().json()
        };
        let object = norm("global");
        assert_eq!(checked_with(&object, &["total_norm_is"])["total_norm_is"], why);
        let whys = [Value::Null, json!("beyond float64"), json!("infinite"), json!("nan")];
        for scope in ["tensor", "unit", "example-tensor"] {
            let object = norm(scope);
            assert_eq!((&object["total_norm"], &object["total_norm_is"]), (&Value::Null, &json!(why)));
            for segment in object["segments"].as_array().unwrap().iter().filter(|_| scope != "example-tensor") {
                let place = tensors.iter().position(|(name, ..)| segment["name"] == *name).unwrap();
                assert_eq!(segment["norm_is"], whys[place], "{segment}");
                assert_eq!(segment.get("norm_is").is_none(), segment["norm"].is_f64(), "{segment}");
            }
        }
        // Without its infinities and NaNs, the sum of the two others exceeds float64 still.
        let drop = ["--max-norm", "1", "--non-finite", "drop", "--json", "--force"];
        assert_eq!(clip(&input, &folder.path("out"), &drop).succeeded().json()["total_norm_is"], "beyond float64");
        let object = clip(&input, &folder.path("out"), &["--clip-value", "1", "--json", "--force"]).succeeded().json();
        assert_eq!((&object["total_norm"], &object["total_norm_is"]), (&Value::Null, &json!("not measured")));
    }
}

/// The device says it too. Finite float32 elements exceed float64 by a small p or a small scale.
#[cfg(feature = "gpu")]
#[test]
fn a_null_says_why_on_a_gpu() {
    let folder = Folder::new();
    let tensors = [("large", vec![1e38, 1e38]), ("infinite", vec![f32::INFINITY]), ("nan", vec![f32::NAN])];
    let input = folder.write("in", file(&tensors.map(|(name, values)| (name, "F32", f32s(&values)))));
    let input = input.to_str().unwrap();
    let scaled = ["--grad-scale", "1e-300", "--scope", "tensor"];
    let object = gradclip([&["norm", input, "--json", "--backend", "gpu"], &scaled[..]].concat()).succeeded().json();
    let whys = object["segments"].as_array().unwrap().iter().map(|segment| segment["norm_is"].clone());
    assert_eq!(whys.collect::<Vec<_>>(), ["beyond float64", "infinite", "nan"]);
    assert_eq!(object["total_norm_is"], "nan");
}

#[test]
fn what_is_not_finite_is_null_and_located() {
    let folder = Folder::new();
    let values = f32s(&[1.0, f32::NAN, f32::INFINITY]);
    let input = folder.write("in", file(&[("a", "F32", f32s(&[0.0])), ("b", "F32", values)]));
    let found = json!({ "count": 2, "tensor": "b", "index": 1 });
    let object = gradclip(["norm", "--json", "--backend", "cpu", input.to_str().unwrap()]).succeeded().json();
    assert_eq!(
        (&checked_with(&object, &["total_norm_is"])["total_norm"], &object["non_finite"]),
        (&Value::Null, &found)
    );

    let object = clip(&input, &folder.path("out"), &["--clip-value", "0.5", "--json"]).succeeded().json();
    assert_eq!(
        (&checked_with(&object, &["total_norm_is"])["total_norm"], &object["non_finite"]),
        (&Value::Null, &found)
    );
    assert_eq!((&object["clipped"], &object["clip_coef"]), (&json!(true), &json!(1.0)));
}

/// The file is as it was, and the report says why.
#[test]
fn a_step_above_is_skipped() {
    let folder = Folder::new();
    let (fine, bad) = (f32s(&[3.0, 4.0]), f32s(&[f32::NAN]));
    let bad = folder.write("bad", file(&[("a", "F32", fine.clone()), ("b", "F32", bad)]));
    let input = folder.write("in", file(&[("a", "F32", fine)]));
    for (input, more, skipped) in [
        (&input, "--skip-above=4.9", Some("above")),
        (&input, "--skip-above=5.1", None),
        (&bad, "--non-finite=skip", Some("non-finite")),
    ] {
        let args = ["--max-norm", "1", "--json", "--force", more];
        let object = clip(input, &folder.path("out"), &args).succeeded().json();
        assert_eq!((object["skipped"].as_str(), &object["clipped"]), (skipped, &json!(skipped.is_none())), "{more}");
        let same = std::fs::read(input).unwrap() == folder.read("out");
        assert_eq!(same, skipped.is_some(), "{more}");
    }
    let said = clip(&input, &folder.path("out"), &["--max-norm", "1", "--force", "--skip-above", "4"]).succeeded();
    assert!(said.stdout.contains("unchanged, because the total norm is above 4"), "{}", said.stdout);
}

/// A measurement clips nothing, under a NaN too.
#[test]
fn a_norm_that_is_not_finite_clips_nothing() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[f32::NAN])), ("b", "F32", f32s(&[2.0]))]));
    let input = input.to_str().unwrap();
    for args in [&["--scope", "global"][..], &["--scope", "tensor"], &["--norm-type", "inf"]] {
        let object = gradclip([&["norm", input, "--json", "--backend", "cpu"], args].concat()).succeeded().json();
        assert_eq!((&object["clip_coef"], &object["clipped"]), (&json!(1.0), &json!(false)), "{args:?}");
        assert_eq!(object["total_norm"], Value::Null, "{args:?}");
    }
}

#[test]
fn errors_print_nothing_on_stdout() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[f32::NAN]))]));
    // `failed` checks it.
    clip(&input, &folder.path("out"), &["--max-norm", "1", "--json"]).failed(3, &["non-finite"]);
    gradclip(["norm", "--json", folder.path("none").to_str().unwrap()]).failed(1, &["none"]);
}

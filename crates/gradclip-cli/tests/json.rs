//! `--json` prints one object with exactly the documented fields, or nothing.

mod common;

use std::path::Path;

use common::{EXAMPLE, Folder, clip, f32s, file, gradclip};
use serde_json::{Value, json};

const FIELDS: [&str; 9] =
    ["adapter", "backend", "clip_coef", "clipped", "elements", "non_finite", "seconds", "tensors", "total_norm"];

#[track_caller]
fn checked(object: &Value) -> &Value {
    let mut fields: Vec<_> = object.as_object().unwrap().keys().collect();
    fields.sort();
    assert_eq!(fields, FIELDS);
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
    let object = gradclip(["norm", EXAMPLE, EXAMPLE, "--json", "--backend", "cpu"]).succeeded().json();
    near(&object["total_norm"], 0.5245872834952451 * 2f64.sqrt());
    assert_eq!((&object["elements"], &object["tensors"]), (&json!(90_008), &json!(22)));
}

#[test]
fn options_of_norm() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[3.0, -4.0])), ("b", "F32", vec![])]));
    for (norm_type, expected) in [("1", 7.0), ("2", 5.0), ("inf", 4.0)] {
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
fn what_is_not_finite_is_null_and_located() {
    let folder = Folder::new();
    let values = f32s(&[1.0, f32::NAN, f32::INFINITY]);
    let input = folder.write("in", file(&[("a", "F32", f32s(&[0.0])), ("b", "F32", values)]));
    let found = json!({ "count": 2, "tensor": "b", "index": 1 });
    let object = gradclip(["norm", "--json", "--backend", "cpu", input.to_str().unwrap()]).succeeded().json();
    assert_eq!((&checked(&object)["total_norm"], &object["non_finite"]), (&Value::Null, &found));

    let object = clip(&input, &folder.path("out"), &["--clip-value", "0.5", "--json"]).succeeded().json();
    assert_eq!((&checked(&object)["total_norm"], &object["non_finite"]), (&Value::Null, &found));
    assert_eq!((&object["clipped"], &object["clip_coef"]), (&json!(true), &json!(1.0)));
}

#[test]
fn errors_print_nothing_on_stdout() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[f32::NAN]))]));
    // `failed` checks it.
    clip(&input, &folder.path("out"), &["--max-norm", "1", "--json"]).failed(3, &["non-finite"]);
    gradclip(["norm", "--json", folder.path("none").to_str().unwrap()]).failed(1, &["none"]);
}

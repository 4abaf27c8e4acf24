//! Guards against thresholds that reach the wrong tensors: each group is clipped by its own norm to its own threshold, the rest by
//! the command's, and what one group holds decides about another only where a policy refuses non-finite gradients.

use std::path::{Path, PathBuf};

use crate::by_name::backends;
use crate::common::{Folder, clip, f32s, file, gradclip, last_f32s, text};
use serde_json::{Value, json};

const NAMES: [&str; 5] = ["embed.weight", "layer.0.weight", "layer.1.weight", "layer.0.bias", "head"];

fn grads(folder: &Folder, values: [f32; 5]) -> PathBuf {
    let tensors: Vec<_> = NAMES.iter().zip(values).map(|(name, x)| (*name, "F32", f32s(&[x]))).collect();
    folder.write("in", file(&tensors))
}

#[track_caller]
fn clipped(input: &Path, folder: &Folder, more: &[&str]) -> (Value, Vec<f32>) {
    let out = folder.path("out");
    let args = ["clip", text(input), "-o", text(&out), "--force", "--json"];
    let object = gradclip(args.iter().chain(more)).succeeded().json();
    (object, last_f32s(&folder.read("out"), 5))
}

#[track_caller]
fn near(a: &[f32], b: &[f32]) {
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()), "{a:?} {b:?}");
}

fn named(object: &Value) -> Vec<(&str, f64, f64)> {
    let groups = object["groups"].as_array().expect("groups").iter();
    let number = |group: &Value, key| group[key].as_f64().unwrap_or(f64::NAN);
    groups.map(|group| (group["name"].as_str().unwrap(), number(group, "norm"), number(group, "clip_coef"))).collect()
}

#[test]
fn each_group_has_its_own_norm_and_threshold() {
    let folder = Folder::new();
    let input = grads(&folder, [8.0, 3.0, 4.0, 6.0, 0.5]);
    for backend in backends() {
        // The first that fits takes a tensor: layer.0.bias is not among *.0.*.
        let groups = ["--group", "*.bias=3", "--group", "layer.*=1", "--max-norm", "2", "--eps", "0"];
        let (object, written) = clipped(&input, &folder, &[&groups[..], &["--backend", backend]].concat());
        let rest = 64.25f64.sqrt();
        near(&written, &[16.0 / rest as f32, 0.6, 0.8, 3.0, 1.0 / rest as f32]);
        let found = named(&object);
        assert_eq!(found.iter().map(|(name, ..)| *name).collect::<Vec<_>>(), ["*.bias", "layer.*", "rest"]);
        for ((_, norm, coef), (expected, max)) in found.into_iter().zip([(6.0, 3.0), (5.0, 1.0), (rest, 2.0)]) {
            assert!((norm / expected - 1.0).abs() < 1e-6 && (coef * expected / max - 1.0).abs() < 1e-6, "{object}");
        }
        let total = (64.25f64 + 25.0 + 36.0).sqrt();
        assert!((object["total_norm"].as_f64().unwrap() / total - 1.0).abs() < 1e-6, "{object}");
        assert_eq!((&object["elements"], &object["tensors"], &object["clipped"]), (&json!(5), &json!(5), &json!(true)));
        assert!((object["clip_coef"].as_f64().unwrap() - 0.2).abs() < 1e-6, "{object}");
    }
    let args = ["--group", "layer.*=inf", "--max-norm", "2", "--eps", "0"];
    let run = clip(&input, &folder.path("text"), &args).succeeded();
    assert!(run.stdout.contains("7.81025 times 1: layer.*") && run.stdout.contains("to its threshold"), "{run:?}");
}

/// Of every mode that has one threshold.
#[test]
fn modes_and_scopes() {
    let folder = Folder::new();
    let input = grads(&folder, [8.0, 3.0, 4.0, 6.0, 0.5]);
    let cases: [(&[&str], [f32; 5], f64); 5] = [
        (&["--max-rms", "100"], [8.0, 0.6, 0.8, 6.0, 0.5], (125.25f64 / 5.0).sqrt()),
        (&["--max-average-norm", "100"], [8.0, 0.6, 0.8, 6.0, 0.5], 125.25f64.sqrt() / 5.0),
        (&["--max-norm", "9", "--scope", "tensor", "--eps", "0"], [8.0, 1.0, 1.0, 6.0, 0.5], 125.25f64.sqrt()),
        (&["--max-norm", "9", "--norm-type", "inf", "--eps", "0"], [8.0, 0.75, 1.0, 6.0, 0.5], 8.0),
        (&["--clip-value", "7"], [7.0, 1.0, 1.0, 6.0, 0.5], f64::NAN),
    ];
    for (mode, expected, total) in cases {
        // RMS and average norm of two elements are thresholds on their norm.
        let max = match mode[0] {
            "--max-rms" => 0.5f64.sqrt(),
            "--max-average-norm" => 0.5,
            _ => 1.0,
        };
        for backend in backends() {
            let group = format!("layer.?.weight={max}");
            let (object, written) =
                clipped(&input, &folder, &[mode, &["--group", &group, "--backend", backend]].concat());
            near(&written, &expected);
            match object["total_norm"].as_f64() {
                Some(norm) => assert!((norm / total - 1.0).abs() < 1e-6, "{mode:?} {object}"),
                None => assert!(total.is_nan(), "{mode:?} {object}"),
            }
            if mode.contains(&"tensor") {
                let names: Vec<_> = object["segments"].as_array().unwrap().iter().map(|s| &s["name"]).collect();
                assert_eq!(names, NAMES);
            }
        }
    }
}

/// Under a policy that refuses, one group's NaN leaves all as they are; under the others it stays in its group.
#[test]
fn a_nan_in_one_group() {
    let folder = Folder::new();
    let input = grads(&folder, [8.0, f32::NAN, 4.0, 6.0, 0.5]);
    let unchanged = folder.read("in");
    for backend in backends() {
        let args = ["--max-norm", "1", "--eps", "0", "--group", "layer.*=1", "--backend", backend];
        let out = folder.path("out");
        let refused = [&["clip", text(&input), "-o", text(&out)], &args[..]].concat();
        gradclip(refused).failed(3, &["index 0 of tensor \"layer.0.weight\"", "nothing was written"]);
        assert!(!out.exists());
        let (object, _) = clipped(&input, &folder, &[&args[..], &["--non-finite", "skip"]].concat());
        assert_eq!(folder.read("out"), unchanged);
        assert_eq!((&object["non_finite"]["tensor"], &object["clipped"]), (&json!("layer.0.weight"), &json!(false)));
        let (_, written) = clipped(&input, &folder, &[&args[..], &["--non-finite", "zero"]].concat());
        let rest = 64.25f32.sqrt();
        near(&written, &[8.0 / rest, 0.0, 0.0, 0.0, 0.5 / rest]);
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn what_makes_no_sense() {
    let folder = Folder::new();
    let input = grads(&folder, [8.0, 3.0, 4.0, 6.0, 0.5]);
    let cases: [(&[&str], &str); 8] = [
        (&["--max-norm", "1", "--group", "nope*=1"], "no gradient in the files has this name"),
        (&["--max-norm", "1", "--group", "*=1", "--group", "head=1"], "earlier groups take all"),
        (&["--max-norm", "1", "--group", "head"], "PATTERN=MAX"),
        (&["--max-norm", "1", "--group", "head=x"], "\"x\" is not a number"),
        (&["--max-norm", "1", "--group", "head=-1"], "--group \"head\": max_norm is -1"),
        (&["--clip-value", "1", "--group", "head=-1"], "--group \"head\": clip_value is -1"),
        (&["--clip-range", "0,1", "--group", "head=1"], "--clip-range needs two"),
        (&["--max-norm", "1", "--scope", "example", "--group", "head=1"], "an example has one norm over all tensors"),
    ];
    for (args, expected) in cases {
        let run = clip(&input, &folder.path("out"), args);
        assert!(run.code == Some(2) && run.stderr.contains(expected), "{run:?}");
    }
    assert_eq!(folder.names(), ["in"]);
}

#[cfg(feature = "gpu")]
#[test]
fn verification_covers_every_group() {
    let folder = Folder::new();
    let input = grads(&folder, [8.0, 3.0, 4.0, 6.0, 0.5]);
    let args = ["--max-norm", "1", "--group", "layer.*=2"];
    clip(&input, &folder.path("out"), &[&args[..], &["--verify"]].concat()).succeeded();
    let object = gradclip([&["verify", text(&input), "--json"], &args[..]].concat()).succeeded().json();
    assert_eq!(object["cases"].as_array().unwrap().len(), 2);
}

//! Guards against a history that tells another story than the files: steps out of order, norms of other tensors, a spike or a NaN
//! in the wrong step, and logs that differ from the files they are of.

use std::path::PathBuf;

use crate::common::{Folder, f32s, file, gradclip, text, well_formed};
use serde_json::{Value, json};

/// Two layers and a head, so large.
fn grads(norm: f32) -> Vec<u8> {
    let (layer, head) = (f32s(&[0.6 * norm]), f32s(&[0.0, 0.8 * norm]));
    file(&[("layer.0.weight", "F32", layer), ("layer.1.weight", "F32", f32s(&[0.0])), ("head.bias", "F32", head)])
}

/// 12 steps: a spike at 90, and a NaN at 110.
fn run(folder: &Folder) -> Vec<PathBuf> {
    let steps = (1..=12).map(|i| 10 * i);
    let steps = steps.map(|step| {
        let norm = match step {
            90 => 50.0,
            110 => f32::NAN,
            _ => 1.0 + 0.001 * step as f32,
        };
        folder.write(&format!("grads-{step}.safetensors"), grads(norm))
    });
    steps.collect()
}

fn lines(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

#[track_caller]
fn near(value: &Value, expected: f64) {
    assert!((value.as_f64().unwrap() / expected - 1.0).abs() < 1e-6, "{value}");
}

fn history(files: &[PathBuf], more: &[&str]) -> crate::common::Run {
    gradclip(["history"].into_iter().chain(files.iter().map(|file| text(file))).chain(more.iter().copied()))
}

#[test]
fn steps_are_in_order_and_have_their_norms() {
    let folder = Folder::new();
    // 100 comes before 20 in the shell's order.
    let mut files = run(&folder);
    files.sort();
    let steps = lines(&history(&files, &["--json"]).succeeded().stdout);
    assert_eq!(steps.len(), 12);
    for (i, step) in steps.iter().enumerate() {
        let number = 10 * (i + 1);
        assert_eq!(step["step"], json!(number));
        let values = step.as_object().unwrap();
        // Loggers take numbers only.
        assert!(
            values.iter().all(|(key, value)| value.is_number() && (key == "step" || key.starts_with("grad_norm/")))
        );
        if number == 110 {
            assert_eq!((step.get("grad_norm/total"), &step["grad_norm/non_finite"]), (None, &json!(2)));
            continue;
        }
        let norm = if number == 90 { 50.0 } else { 1.0 + 0.001 * number as f64 };
        near(&step["grad_norm/total"], norm);
        near(&step["grad_norm/layer.0"], 0.6 * norm);
        near(&step["grad_norm/head.bias"], 0.8 * norm);
        assert_eq!((&step["grad_norm/layer.1"], &step["grad_norm/non_finite"]), (&json!(0.0), &json!(0)));
        assert_eq!(step["grad_norm/z"].as_f64().is_some_and(|z| z > 6.0), number == 90);
    }
}

#[test]
fn groups_are_by_level_or_by_pattern() {
    let folder = Folder::new();
    let files = run(&folder);
    let keys = |more: &[&str]| {
        let stdout = history(&files[..1], &[more, &["--json"]].concat()).succeeded().stdout;
        let keys: Vec<_> = lines(&stdout)[0].as_object().unwrap().keys().cloned().collect();
        let others = ["step", "grad_norm/total", "grad_norm/z", "grad_norm/non_finite"];
        keys.into_iter().filter(|key| !others.contains(&key.as_str())).collect::<Vec<_>>()
    };
    let named = |names: &[&str]| names.iter().map(|name| format!("grad_norm/{name}")).collect::<Vec<_>>();
    assert_eq!(keys(&["--levels", "1"]), named(&["head", "layer"]));
    assert_eq!(keys(&["--levels", "9"]), named(&["head.bias", "layer.0.weight", "layer.1.weight"]));
    assert_eq!(keys(&["--group", "*.0.*", "--group", "layer.*"]), named(&["*.0.*", "layer.*", "rest"]));
    history(&files, &["--group", "nope"]).failed(2, &["--group \"nope\": no gradient in the files has this name"]);
    assert_eq!(history(&files, &["--group", "head*", "--levels", "1"]).code, Some(2));
}

#[test]
fn a_table_and_a_plot() {
    let folder = Folder::new();
    let files = run(&folder);
    let svg = folder.path("plot.svg");
    let out = history(&files, &["--plot", text(&svg), "--top", "2"]).succeeded().stdout;
    for expected in [
        "10 to 120, 12 of them",
        "at most 50 in step 90",
        "1: step 90",
        "first in step 110: 2 non-finite elements, the first at index 0 of tensor \"layer.0.weight\"",
        "grads-110.safetensors",
        "the largest 2 of 3 groups",
    ] {
        assert!(out.contains(expected), "{expected}: {out}");
    }
    let row =
        |step: &str| out.lines().find(|line| line.trim_start().starts_with(step)).unwrap_or_else(|| panic!("{out}"));
    assert!(row("90 ").contains("spike (z ") && row("110 ").contains("NaN") && row("110 ").contains("non-finite"));
    let drawing = String::from_utf8(folder.read("plot.svg")).unwrap();
    well_formed(&drawing);
    assert!(drawing.contains("step 90: 50, z") && drawing.contains("step 110: 2 non-finite elements"), "{drawing}");
    // The step without a norm leaves a gap in each of the three curves.
    assert_eq!(drawing.matches("<polyline").count(), 6, "{drawing}");
    history(&files, &["--plot", text(&svg)]).failed(1, &["exists"]);
    history(&files, &["--plot", text(&files[0]), "--force"]).failed(2, &["would replace its own input"]);
}

/// What was logged, step by step, is what the files say.
#[test]
fn logs() {
    let folder = Folder::new();
    let files = run(&folder);
    let log = folder.path("log");
    for file in files.iter().rev() {
        gradclip(["norm", text(file), "-q", "--append", text(&log)]).succeeded();
    }
    for more in [&["--json"][..], &["--json", "--levels", "1"], &["--json", "--group", "layer.*"]] {
        let of_files = history(&files, more).succeeded().stdout;
        assert_eq!(history(std::slice::from_ref(&log), more).succeeded().stdout, of_files);
        // Some steps in the log, others in files: those of the log before the others.
        let half = folder
            .write("half", folder.read("log").split_inclusive(|c| *c == b'\n').take(6).collect::<Vec<_>>().concat());
        let mixed = [&files[..6], &[half]].concat();
        assert_eq!(history(&mixed, more).succeeded().stdout, of_files);
    }
    // A step that was logged again counts once, as it was last.
    gradclip(["norm", text(&files[0]), "-q", "--grad-scale", "0.5", "--append", text(&log)]).succeeded();
    let steps = lines(&history(std::slice::from_ref(&log), &["--json"]).succeeded().stdout);
    assert_eq!(steps.len(), 12);
    near(&steps[0]["grad_norm/total"], 2.0 * 1.01);
    // In a log and in a file, it is unclear which counts.
    history(&[log.clone(), files[0].clone()], &[]).failed(2, &["are both step 10"]);
    history(&[log], &["--norm-type", "1"]).failed(1, &["was measured by L2", "--norm-type"]);
}

/// One file that is overwritten at each step: the order of the lines is that of the steps.
#[test]
fn a_log_without_numbers() {
    let folder = Folder::new();
    let log = folder.path("log.jsonl");
    for norm in [3.0, 1.0, 2.0] {
        let input = folder.write("fp16.safetensors", grads(norm));
        let args = ["norm", text(&input), "--json", "--norm-type", "inf", "--append", text(&log)];
        gradclip(args).succeeded().json();
    }
    let steps = lines(&history(&[log], &["--json", "--norm-type", "inf"]).succeeded().stdout);
    let norms: Vec<_> = steps.iter().map(|step| (step["step"].as_u64(), step["grad_norm/total"].as_f64())).collect();
    assert_eq!(norms.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
    steps.iter().zip([2.4, 0.8, 1.6]).for_each(|(step, norm)| near(&step["grad_norm/total"], norm));
}

/// Nothing else is appended to, and a damaged log is an error that says where.
#[test]
fn what_is_no_log() {
    let folder = Folder::new();
    let input = folder.write("1.safetensors", grads(1.0));
    let other = folder.write("2.safetensors", grads(2.0));
    let append =
        |log: &PathBuf, more: &[&str]| gradclip([&["norm", text(&input), "--append", text(log)], more].concat());
    for log in [&input, &other, &folder.write("text", "notes")] {
        append(log, &[]).failed(1, &["not a log of norms"]);
    }
    assert_eq!((folder.read("1.safetensors"), folder.read("2.safetensors")), (grads(1.0), grads(2.0)));
    let log = folder.path("log");
    append(&log, &["--scope", "unit"]).failed(2, &["--append logs tensors"]);
    append(&log, &[text(&other)]).failed(2, &["--append takes one FILE"]);
    append(&log, &["-q"]).succeeded();
    let whole = folder.read("log");
    let torn = folder.write("torn", [&whole[..], &whole[..whole.len() / 2]].concat());
    history(&[torn], &[]).failed(1, &["line 2 is not a line of gradclip norm --append"]);
    history(&[folder.path("none")], &[]).failed(1, &["none", "cannot open"]);
}

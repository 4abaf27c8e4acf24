//! Guards against clips of the wrong tensors where they are chosen by name: what is left out keeps its bits and counts in no
//! norm, and a pattern that fits nothing is an error, not a clip of everything.

use std::path::{Path, PathBuf};

use crate::common::{Folder, clip, f32s, file, gradclip, last_f32s, shaped_file, text};
use serde_json::json;

/// Tensors of one element each, in this order in the file.
const NAMES: [&str; 4] = ["layer.0.weight", "layer.0.bias", "layer.11.weight", "head"];

fn grads(folder: &Folder, values: [f32; 4]) -> PathBuf {
    let tensors: Vec<_> = NAMES.iter().zip(values).map(|(name, x)| (*name, "F32", f32s(&[x]))).collect();
    folder.write("in", file(&tensors))
}

fn written(folder: &Folder) -> Vec<f32> {
    last_f32s(&folder.read("out"), 4)
}

/// The backends that there are.
pub(crate) fn backends() -> &'static [&'static str] {
    if cfg!(feature = "gpu") { &["cpu", "gpu"] } else { &["cpu"] }
}

#[track_caller]
fn clipped(input: &Path, folder: &Folder, more: &[&str]) -> serde_json::Value {
    let out = folder.path("out");
    let args = ["clip", text(input), "-o", text(&out), "--force", "--json", "--eps", "0"];
    gradclip(args.iter().chain(more)).succeeded().json()
}

#[test]
fn what_is_left_out_passes_through_and_counts_in_no_norm() {
    let folder = Folder::new();
    let input = grads(&folder, [3.0, 100.0, 4.0, f32::NAN]);
    for (select, left_out, expected) in [
        (&["--only", "*.weight"][..], 2, [0.6, 100.0, 0.8]),
        (&["--only", "layer.?.weight", "--only", "layer.11.*"], 2, [0.6, 100.0, 0.8]),
        (&["--except", "head", "--except", "*.bias"], 2, [0.6, 100.0, 0.8]),
        (&["--only", "layer.*", "--except", "*bias"], 2, [0.6, 100.0, 0.8]),
        (&["--only", "layer.0.weight"], 3, [1.0, 100.0, 4.0]),
        (&["--only", "head", "--except", "*"], 4, [3.0, 100.0, 4.0]),
    ] {
        for backend in backends() {
            let object = clipped(&input, &folder, &[select, &["--max-norm", "1", "--backend", backend]].concat());
            assert_eq!(
                (&object["left_out"], &object["tensors"]),
                (&json!(left_out), &json!(4 - left_out)),
                "{select:?}"
            );
            assert_eq!(object["non_finite"], json!(null));
            let written = written(&folder);
            assert!(written[..3].iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{select:?} {written:?}");
            assert!(written[3].is_nan());
        }
        let norm = gradclip([&["norm", text(&input), "--json"], select].concat()).succeeded().json();
        let object = clipped(&input, &folder, &[select, &["--max-norm", "1"]].concat());
        assert_eq!((&norm["total_norm"], &norm["left_out"]), (&object["total_norm"], &json!(left_out)));
    }
}

#[test]
fn the_program_tells_how_many_are_left_out() {
    let folder = Folder::new();
    let input = grads(&folder, [3.0, 1.0, 4.0, 0.0]);
    let run = gradclip(["norm", text(&input), "--only", "*.weight", "--backend", "cpu"]).succeeded();
    assert!(run.stdout.contains("2 in 2 tensors (2 tensors left out)"), "{run:?}");
    let run = clip(&input, &folder.path("out"), &["--max-norm", "1", "--except", "*"]).succeeded();
    assert!(run.stdout.contains("0 in 0 tensors (4 tensors left out)"), "{run:?}");
    // Without a selection nothing is said of it.
    assert!(!gradclip(["norm", text(&input)]).stdout.contains("left out"));
}

#[test]
fn a_pattern_that_fits_nothing_is_an_error() {
    let folder = Folder::new();
    let integers = ("steps", "I64", vec![1; 8]);
    let input = folder.write("in", file(&[integers, ("w", "F32", f32s(&[3.0]))]));
    for (option, pattern) in [("--only", "W"), ("--except", "w?"), ("--only", ""), ("--only", "steps")] {
        let expected = [option, "no gradient in the files has this name"];
        let select = ["--only", "w", option, pattern];
        clip(&input, &folder.path("out"), &[&["--max-norm", "1"], &select[..]].concat()).failed(2, &expected);
        gradclip([&["norm", text(&input)], &select[..]].concat()).failed(2, &expected);
        if cfg!(feature = "gpu") {
            gradclip([&["verify", text(&input)], &select[..]].concat()).failed(2, &expected);
        }
    }
    assert_eq!(folder.names(), ["in"]);
}

/// Of a set it is enough that one shard has the tensor; of several files, that one has.
#[test]
fn across_shards_and_files() {
    let folder = Folder::new();
    folder.write("1.safetensors", file(&[("a.w", "F32", f32s(&[3.0])), ("a.b", "F32", f32s(&[100.0]))]));
    folder.write("2.safetensors", file(&[("b.w", "F32", f32s(&[4.0]))]));
    let map = r#"{"weight_map":{"a.w":"1.safetensors","a.b":"1.safetensors","b.w":"2.safetensors"}}"#;
    let index = folder.write("g.safetensors.index.json", map);
    let out = Folder::new();
    let out = out.path("g.safetensors.index.json");
    let object = clip(&index, &out, &["--max-norm", "1", "--eps", "0", "--except", "a.b", "--json"]).succeeded().json();
    assert_eq!((&object["total_norm"], &object["left_out"]), (&json!(5.0), &json!(1)));
    let read = |name| std::fs::read(out.with_file_name(name)).unwrap();
    assert_eq!(last_f32s(&read("1.safetensors"), 2), [0.6, 100.0]);
    assert_eq!(last_f32s(&read("2.safetensors"), 1), [0.8]);

    let files = [folder.path("1.safetensors"), folder.path("2.safetensors")];
    let norm = ["norm", text(&files[0]), text(&files[1]), "--json", "--only", "b.*"];
    let object = gradclip(norm).succeeded().json();
    assert_eq!((&object["total_norm"], &object["left_out"]), (&json!(4.0), &json!(2)));
}

/// A parameter is needed only for a gradient that is taken.
#[test]
fn parameters_and_sums() {
    let folder = Folder::new();
    let input = grads(&folder, [3.0, 100.0, 4.0, 5.0]);
    let params = folder.write("params", file(&[(NAMES[0], "F32", f32s(&[1.0])), (NAMES[2], "F32", f32s(&[10.0]))]));
    let agc = ["--agc", "1", "--params", text(&params)];
    let out = folder.path("out");
    clip(&input, &out, &agc).failed(1, &["layer.0.bias", "is missing"]);
    clip(&input, &out, &[&agc[..], &["--only", "*.weight"]].concat()).succeeded();
    assert_eq!(written(&folder), [1.0, 100.0, 4.0, 5.0]);

    let examples = folder.write("examples", file(&[("w", "F32", f32s(&[3.0, 4.0])), ("b", "F32", f32s(&[1.0; 3]))]));
    let sum = ["--max-norm", "1", "--eps", "0", "--scope", "example", "--sum", "--only", "w", "--force"];
    clip(&examples, &out, &sum).succeeded();
    let sums = crate::common::f32_tensors(&out);
    assert_eq!((&sums["w"].1, &sums["b"].1), (&vec![2.0], &vec![1.0; 3]));
}

#[cfg(feature = "gpu")]
#[test]
fn verification_covers_what_is_taken() {
    let folder = Folder::new();
    let float64 = ("d", "F64", 8f64.to_le_bytes().to_vec());
    let input = folder.write("in", file(&[float64, ("w", "F32", f32s(&[3.0, 4.0]))]));
    // No GPU takes the other.
    clip(&input, &folder.path("out"), &["--max-norm", "1", "--verify", "--only", "w"]).succeeded();
    gradclip(["verify", text(&input), "--only", "w"]).succeeded();
    gradclip(["verify", "--only", "w"]).failed(2, &["a FILE"]);
}

/// What cannot be clipped is no error and needs no warning if it is left out.
#[test]
fn dtypes_that_cannot_be_clipped() {
    let folder = Folder::new();
    let complex = ("z", "C64", &[1][..], vec![1; 8]);
    let bytes = shaped_file(&[complex, ("w", "F32", &[2], f32s(&[3.0, 4.0])), ("q", "F8_E4M3", &[2], vec![1; 2])]);
    let input = folder.write("in", &bytes);
    let norm = |more: &[&str]| gradclip([&["norm", text(&input), "--json", "--backend", "cpu"], more].concat());
    let run = norm(&[]);
    assert!(run.code == Some(1) && run.stderr.contains("is complex"), "{run:?}");
    let run = norm(&["--except", "z"]);
    assert!(run.code == Some(0) && run.stderr.contains("warning") && run.json()["left_out"] == 1, "{run:?}");
    for select in [&["--except", "z", "--except", "q"][..], &["--only", "w"]] {
        let object = norm(select).succeeded().json();
        assert_eq!((&object["total_norm"], &object["left_out"]), (&json!(5.0), &json!(2)));
    }
    clip(&input, &folder.path("out"), &["--max-norm", "9", "--only", "w"]).succeeded();
    assert_eq!(folder.read("out"), bytes);
}

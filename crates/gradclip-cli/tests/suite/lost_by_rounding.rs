//! Halves that a loss scale takes to 0 or infinity: the program says how many, and `--out-dtype float32` keeps them.

use std::fs;
use std::path::Path;

use crate::common::{Folder, clip, f32s, gradclip, raw, shaped_file, text};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

fn halves(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
}

fn small() -> Vec<f32> {
    [vec![6.5e-5; 8], vec![3.0]].concat()
}

/// The bytes of a tensor, its dtype and its shape.
fn tensor(path: &Path, name: &str) -> (Vec<u8>, Dtype, Vec<usize>) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let view = file.tensor(name).expect("it is there");
    (view.data().to_vec(), view.dtype(), view.shape().to_vec())
}

#[test]
fn losses_are_told() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[("w", "F16", &[9], halves(&small()))]));
    let out = folder.path("out");
    let scaled = ["--max-norm", "1", "--grad-scale", "65536", "--force"];
    let told = "rounding     8 of 9 elements became 0; --out-dtype float32 keeps those of float16\n";
    let run = clip(&input, &out, &scaled).succeeded();
    assert!(run.stdout.contains(told), "{run:?}");
    let lost =
        |run: &[&str]| clip(&input, &out, &[run, &["--force", "--json"]].concat()).succeeded().json()["lost"].clone();
    assert_eq!(lost(&scaled[..4]), json!({ "zero": 8, "infinite": 0 }));
    assert_eq!(lost(&["--max-norm", "1"]), json!({ "zero": 0, "infinite": 0 }));
    assert_eq!(lost(&["--max-norm", "inf", "--grad-scale", "3e-5"]), json!({ "zero": 0, "infinite": 1 }));
    let run = clip(&input, &out, &["--max-norm", "inf", "--grad-scale", "3e-5", "--force"]).succeeded();
    assert!(run.stdout.contains("1 of 9 elements became infinite; --out"), "{run:?}");
    // What float32 loses has no way out here.
    let tiny = folder.write("tiny", shaped_file(&[("w", "F32", &[1], f32s(&[1.2e-38]))]));
    let run = clip(&tiny, &out, &["--clip-value", "1", "--grad-scale", "1e9", "--force"]).succeeded();
    assert!(run.stdout.contains("rounding     1 of 1 element became 0\n"), "{run:?}");
    // Nothing is said where nothing is lost, and a norm writes nothing.
    assert!(!clip(&input, &out, &["--max-norm", "1", "--force"]).succeeded().stdout.contains("rounding"));
    let norm = gradclip(["norm", text(&input), "--backend", "cpu", "--json"]).succeeded().json();
    assert_eq!(norm["lost"], json!(null));
}

/// Every kind of tensor in one file, in an order in which halves that grow would leave others misaligned.
fn mixed(folder: &Folder) -> std::path::PathBuf {
    let header = concat!(
        r#"{"h":{"dtype":"F16","shape":[3,3],"data_offsets":[0,18]},"flags":{"dtype":"U8","shape":[2],"data_offsets":[18,20]},"#,
        r#""f":{"dtype":"F32","shape":[2],"data_offsets":[20,28]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[28,32]},"#,
        r#""d":{"dtype":"F64","shape":[],"data_offsets":[32,40]},"none":{"dtype":"F16","shape":[0],"data_offsets":[40,40]},"#,
        r#""__metadata__":{"step":"7"}}"#
    );
    let brains: Vec<u8> = [1.5f32, -2.5].iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let data = [halves(&small()), vec![7, 8], f32s(&[4.0, -8.0]), brains, 16f64.to_le_bytes().to_vec()].concat();
    folder.write("mixed", raw(header, &data))
}

#[track_caller]
fn check_mixed(out: &Path, scale: f32) {
    let divided = |numbers: &[f32]| f32s(&numbers.iter().map(|x| x / scale).collect::<Vec<_>>());
    let exact: Vec<_> = small().iter().map(|x| f16::from_f32(*x).to_f32()).collect();
    assert_eq!(tensor(out, "h"), (divided(&exact), Dtype::F32, vec![3, 3]));
    assert_eq!(tensor(out, "b"), (divided(&[1.5, -2.5]), Dtype::F32, vec![2]));
    assert_eq!(tensor(out, "f"), (divided(&[4.0, -8.0]), Dtype::F32, vec![2]));
    assert_eq!(tensor(out, "d"), ((16.0 / f64::from(scale)).to_le_bytes().to_vec(), Dtype::F64, vec![]));
    assert_eq!(tensor(out, "none"), (vec![], Dtype::F32, vec![0]));
    assert_eq!(tensor(out, "flags"), (vec![7, 8], Dtype::U8, vec![2]));
    let bytes = fs::read(out).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["step"], "7");
    for (name, info) in metadata.tensors() {
        assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0, "{name}");
    }
}

#[test]
fn float32_keeps_everything() {
    let folder = Folder::new();
    let (input, out) = (mixed(&folder), folder.path("out"));
    for (mode, scale) in [("--max-norm", "65536"), ("--max-rms", "1"), ("--clip-value", "65536"), ("--clip-range", "1")]
    {
        let bound = if mode == "--clip-range" { "-1e9,1e9" } else { "1e9" };
        let more = [mode, bound, "--grad-scale", scale, "--out-dtype", "float32", "--force"];
        let run = clip(&input, &out, &more).succeeded();
        assert!(!run.stdout.contains("rounding"), "{run:?}");
        check_mixed(&out, scale.parse().unwrap());
    }
    // Each example is a half of what it was.
    let rows = folder.write("rows", shaped_file(&[("w", "BF16", &[2, 1], vec![0, 0x40, 0, 0x41])]));
    let more = ["--max-norm", "1", "--eps", "0", "--scope", "unit", "--out-dtype", "float32", "--force"];
    clip(&rows, &out, &more).succeeded();
    assert_eq!(tensor(&out, "w"), (f32s(&[1.0, 1.0]), Dtype::F32, vec![2, 1]));
    // Sums are float32 already.
    let more = ["--max-norm", "1", "--eps", "0", "--scope", "example", "--sum", "--out-dtype", "float32", "--force"];
    clip(&rows, &out, &more).succeeded();
    assert_eq!(tensor(&out, "w"), (f32s(&[2.0]), Dtype::F32, vec![1]));
    // Nothing grows where there are no halves, not even the header.
    let single = folder.write("single", shaped_file(&[("w", "F32", &[1], f32s(&[3.0]))]));
    clip(&single, &out, &["--max-norm", "5", "--out-dtype", "float32", "--force"]).succeeded();
    assert_eq!(folder.read("out"), folder.read("single"));
    clip(&single, &out, &["--max-norm", "5", "--out-dtype", "float16"]).failed(2, &["float16", "float32"]);
}

#[test]
fn a_sharded_set_grows() {
    let folder = Folder::new();
    let out = Folder::new();
    folder.write("1.safetensors", shaped_file(&[("a", "F16", &[9], halves(&small()))]));
    folder.write("2.safetensors", shaped_file(&[("b", "F32", &[1], f32s(&[4.0]))]));
    let index = r#"{"metadata":{"total_size":22},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#;
    let input = folder.write("grads.safetensors.index.json", index);
    let name = "out.safetensors.index.json";
    clip(&input, &out.path(name), &["--max-norm", "1e9", "--grad-scale", "65536", "--out-dtype", "float32"])
        .succeeded();
    let index: serde_json::Value = serde_json::from_slice(&out.read(name)).unwrap();
    assert_eq!(index["metadata"]["total_size"], 40);
    assert_eq!(tensor(&out.path("2.safetensors"), "b").0, f32s(&[4.0 / 65536.0]));
    assert_eq!(tensor(&out.path("1.safetensors"), "a").0.len(), 36);
    gradclip(["norm", text(&out.path(name)), "--backend", "cpu"]).succeeded();
}

/// A tensor of several pieces.
#[test]
fn long_tensors_are_widened_piece_by_piece() {
    let folder = Folder::new();
    let numbers: Vec<_> = (0..1_200_000u32).map(|i| f32::from(i as u16 % 1000) / 8.0).collect();
    let input = folder
        .write("in", shaped_file(&[("w", "F16", &[1_200_000], halves(&numbers)), ("s", "F16", &[1], halves(&[1.0]))]));
    let out = folder.path("out");
    for (bound, factor) in [("1e9", 1.0), ("1e9", 0.5)] {
        let scale = (1.0 / factor).to_string();
        clip(&input, &out, &["--max-norm", bound, "--grad-scale", &scale, "--out-dtype", "float32", "--force"])
            .succeeded();
        let expected: Vec<_> = numbers.iter().map(|x| x * factor).collect();
        assert!(tensor(&out, "w") == (f32s(&expected), Dtype::F32, vec![1_200_000]), "{factor}");
        assert_eq!(tensor(&out, "s").0, f32s(&[factor]));
    }
}

#[cfg(feature = "gpu")]
#[test]
fn a_gpu_does_the_same() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[("w", "F16", &[3, 3], halves(&small()))]));
    let out = folder.path("out");
    let gpu = |more: &[&str]| {
        let args =
            ["clip", text(&input), "-o", text(&out), "--max-norm", "1e9", "--grad-scale", "65536", "--backend", "gpu"];
        gradclip([&args[..], &["--force", "--json", "--verify"], more].concat()).succeeded().json()["lost"].clone()
    };
    assert_eq!(gpu(&[]), json!({ "zero": 8, "infinite": 0 }));
    assert_eq!(gpu(&["--out-dtype", "float32"]), json!({ "zero": 0, "infinite": 0 }));
    let exact: Vec<_> = small().iter().map(|x| f16::from_f32(*x).to_f32() / 65536.0).collect();
    assert_eq!(tensor(&out, "w"), (f32s(&exact), Dtype::F32, vec![3, 3]));
}

//! The file of sums: what the clipped examples add up to, and everything else as it was.

use std::path::Path;

use crate::common::{Folder, Run, clip, f32s, gradclip, last_f32s, raw, shaped_file};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn sum(input: &Path, out: &Path, max_norm: &str) -> Run {
    clip(input, out, &["--max-norm", max_norm, "--eps", "0", "--scope", "example", "--sum"])
}

#[test]
fn metadata_other_tensors_and_alignment() {
    let folder = Folder::new();
    // An odd number of bytes in front, and halves that grow.
    let header = concat!(
        r#"{"flags":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"__metadata__":{"step":"7","b":"\u00e9"},"#,
        r#""half\n":{"dtype":"BF16","shape":[2,1,2],"data_offsets":[3,11]},"#,
        r#""wide":{"dtype":"F64","shape":[2],"data_offsets":[11,27]}}"#
    );
    let halves = [3f32, 4.0, 1.0, 0.0].map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).concat();
    let wide = [0f64, 0.0].map(f64::to_le_bytes).concat();
    let input = folder.write("in", raw(header, &[&[7, 8, 9][..], &halves, &wide].concat()));
    let run = sum(&input, &folder.path("out"), "1").succeeded();
    assert!(run.stdout.contains("clipped to 1, summed over examples\nclipped      1 of 2 examples"), "{run:?}");

    let bytes = folder.read("out");
    let (length, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let out = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(length % 8, 0);
    assert_eq!(metadata.metadata().as_ref().unwrap()["b"], "é");
    let half = out.tensor("half\n").unwrap();
    assert_eq!((half.dtype(), half.shape(), half.data()), (Dtype::F32, &[1, 2][..], &f32s(&[1.6, 0.8])[..]));
    let wide = out.tensor("wide").unwrap();
    assert_eq!((wide.dtype(), wide.shape(), wide.data()), (Dtype::F64, &[][..], &[0; 8][..]));
    assert_eq!((out.len(), out.tensor("flags").unwrap().data()), (3, &[7, 8, 9][..]));
    for name in ["half\n", "wide"] {
        let info = metadata.info(name).unwrap();
        assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0, "{name}");
    }
    // What was written can be read again.
    gradclip(["norm", folder.path("out").to_str().unwrap(), "--backend", "cpu"]).succeeded();
}

#[test]
fn nothing_to_clip_is_summed_nevertheless() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[("w", "F32", &[2, 2], f32s(&[1.0, 2.0, 3.0, -2.0]))]));
    let run = sum(&input, &folder.path("out"), "inf").succeeded();
    assert!(run.stdout.contains("not clipped, summed over examples"), "{run:?}");
    assert_eq!(last_f32s(&folder.read("out"), 2), [4.0, 0.0]);
}

#[test]
fn no_examples_and_no_gradients() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[("w", "F32", &[0, 3], vec![])]));
    sum(&input, &folder.path("out"), "1").succeeded();
    assert_eq!(last_f32s(&folder.read("out"), 3), [0.0; 3]);
    let input = folder.write("none", shaped_file(&[("n", "I64", &[1], vec![1; 8])]));
    sum(&input, &folder.path("same"), "1").succeeded();
    assert_eq!(folder.read("same")[folder.read("same").len() - 8..], [1; 8]);
}

/// 80 bytes could ask for a terabyte of zeros.
#[test]
fn the_sum_of_no_examples_does_not_fill_the_disk() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[("w", "F32", &[0, 1 << 25], vec![])]));
    sum(&input, &folder.path("out"), "1").failed(1, &["tensor \"w\"", "no examples", "134217728 bytes of zeros"]);
    assert_eq!(folder.names(), ["in"]);
}

#[test]
fn non_finite_examples() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[("w", "F32", &[2, 1], f32s(&[f32::NAN, 0.5]))]));
    sum(&input, &folder.path("out"), "1").failed(3, &["index 0 of tensor \"w\""]);
    assert_eq!(folder.names(), ["in"]);
    let options = ["--max-norm", "1", "--scope", "example", "--sum", "--non-finite", "zero"];
    clip(&input, &folder.path("out"), &options).succeeded();
    assert_eq!(last_f32s(&folder.read("out"), 1), [0.5]);
}

#[test]
fn a_sharded_set() {
    let (folder, out) = (Folder::new(), Folder::new());
    let index = "grads.safetensors.index.json";
    folder.write("1", shaped_file(&[("a", "F32", &[2, 1], f32s(&[3.0, 0.0]))]));
    folder.write("2", shaped_file(&[("b", "F32", &[2, 1], f32s(&[4.0, 1.0]))]));
    let text = json!({ "metadata": { "total_size": 16, "by": "me" }, "weight_map": { "b": "2", "a": "1" } });
    let input = folder.write(index, text.to_string());
    sum(&input, &out.path(index), "2.5").succeeded();
    assert_eq!((last_f32s(&out.read("1"), 1), last_f32s(&out.read("2"), 1)), (vec![1.5], vec![3.0]));
    let written: Value = serde_json::from_slice(&out.read(index)).unwrap();
    assert_eq!(written["metadata"], json!({ "total_size": 8, "by": "me" }));
    assert_eq!(written["weight_map"], text["weight_map"]);
}

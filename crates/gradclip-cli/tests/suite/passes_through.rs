//! What is no gradient, or cannot be clipped, stays as it is, bit for bit; what is one is clipped, whatever its dtype and alignment.

use crate::common::{Folder, clip, f32s, file, gradclip, last_f32s, raw, text};

/// An odd number of bytes first, so that everything behind is misaligned.
fn mixed() -> Vec<u8> {
    let header = concat!(
        r#"{"__metadata__":{"step":"7"},"i8":{"dtype":"I8","shape":[3],"data_offsets":[0,3]},"#,
        r#""f64":{"dtype":"F64","shape":[1],"data_offsets":[3,11]},"bool":{"dtype":"BOOL","shape":[1],"data_offsets":[11,12]},"#,
        r#""f16":{"dtype":"F16","shape":[1],"data_offsets":[12,14]},"i64":{"dtype":"I64","shape":[1],"data_offsets":[14,22]},"#,
        r#""empty":{"dtype":"F32","shape":[0,5],"data_offsets":[22,22]},"u8":{"dtype":"U8","shape":[1],"data_offsets":[22,23]},"#,
        r#""bf16":{"dtype":"BF16","shape":[],"data_offsets":[23,25]},"f32":{"dtype":"F32","shape":[1,1],"data_offsets":[25,29]}}   "#
    );
    let (f16, bf16) = (0x4800u16.to_le_bytes(), 0x4100u16.to_le_bytes()); // 8 and 8
    let f32 = 8f32.to_le_bytes();
    raw(header, &[&[255, 0, 1], &8f64.to_le_bytes()[..], &[1], &f16, &[255; 8], &[9], &bf16, &f32].concat())
}

#[test]
fn metadata_and_other_tensors() {
    let folder = Folder::new();
    let input = folder.write("in", mixed());
    // The norm of four eights is 16.
    let args = ["--max-norm", "4", "--eps", "0", "--threads", "3"];
    let run = clip(&input, &folder.path("out"), &args).succeeded();
    assert!(run.stdout.contains("4 in 5 tensors (4 others passed through)"), "{run:?}");
    let mut expected = mixed();
    let data = expected.len() - 29;
    expected[data + 3..data + 11].copy_from_slice(&2f64.to_le_bytes());
    expected[data + 12..data + 14].copy_from_slice(&0x4000u16.to_le_bytes());
    expected[data + 23..data + 25].copy_from_slice(&0x4000u16.to_le_bytes());
    expected[data + 25..data + 29].copy_from_slice(&2f32.to_le_bytes());
    assert_eq!(folder.read("out"), expected);
    assert_eq!(folder.read("in"), mixed());
}

#[test]
fn nothing_to_clip() {
    let folder = Folder::new();
    let input = folder.write("in", mixed());
    for (out, mode) in [("a", ["--max-norm", "17"]), ("b", ["--clip-value", "8"]), ("c", ["--max-norm", "inf"])] {
        let run = clip(&input, &folder.path(out), &mode).succeeded();
        assert!(run.stdout.contains("unchanged"), "{run:?}");
        assert_eq!(folder.read(out), mixed());
    }
}

#[test]
fn no_gradients_at_all() {
    for bytes in [raw("{}", b""), file(&[("a", "I64", vec![1; 8])]), file(&[("a", "F32", vec![])])] {
        let folder = Folder::new();
        let input = folder.write("in", &bytes);
        clip(&input, &folder.path("out"), &["--max-norm", "0"]).succeeded();
        assert_eq!(folder.read("out"), bytes);
    }
}

#[test]
fn bounds_and_scales() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[-2.0, -0.25, 0.0, 0.5, 3.0]))]));
    clip(&input, &folder.path("range"), &["--clip-range", "-0.5,1"]).succeeded();
    assert_eq!(last_f32s(&folder.read("range"), 5), [-0.5, -0.25, 0.0, 0.5, 1.0]);
    clip(&input, &folder.path("value"), &["--clip-value", "0.5", "--grad-scale", "2"]).succeeded();
    assert_eq!(last_f32s(&folder.read("value"), 5), [-0.5, -0.125, 0.0, 0.25, 0.5]);
    clip(&input, &folder.path("inf"), &["--max-norm", "1.5", "--norm-type", "inf", "--eps", "0"]).succeeded();
    assert_eq!(last_f32s(&folder.read("inf"), 5), [-1.0, -0.125, 0.0, 0.25, 1.5]);
}

/// Floating-point numbers that cannot be clipped pass through, and the program says so.
#[test]
fn float8_and_float4() {
    let header = concat!(
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[4,6]},"#,
        r#""c":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[6,7]},"d":{"dtype":"F4","shape":[2],"data_offsets":[7,8]}}"#
    );
    let with = |first: f32| raw(header, &[&first.to_le_bytes()[..], &[1, 2, 3, 0x45]].concat());
    let folder = Folder::new();
    let input = folder.write("in", with(8.0));
    let told = |done: &str| {
        let supported = "only float32, float64, float16 and bfloat16 can be";
        format!("warning: 3 tensors not {done}, the first \"b\" (F8_E4M3): {supported}\n")
    };
    let run = clip(&input, &folder.path("out"), &["--max-norm", "4", "--eps", "0"]);
    assert_eq!((run.code, &run.stderr), (Some(0), &told("clipped")));
    assert!(run.stdout.contains("1 in 1 tensor (3 others passed through)"), "{run:?}");
    assert_eq!(folder.read("out"), with(4.0));
    let run = gradclip(["norm", "--backend", "cpu", "--json", text(&input)]);
    assert_eq!((&run.stderr, &run.json()["total_norm"]), (&told("measured"), &8.0.into()));
    assert_eq!(gradclip(["norm", "--quiet", text(&input)]).succeeded().stdout, "8\n");
}

/// A parameter that no gradient has needs no dtype that can be measured.
#[test]
fn parameters_that_are_not_used() {
    let folder = Folder::new();
    let f32 = ("a", "F32", f32s(&[8.0]));
    let input = folder.write("in", file(std::slice::from_ref(&f32)));
    let others = [("q", "F8_E4M3", vec![1]), ("z", "C64", vec![0; 8])];
    let params = folder.write("params", file(&[&[f32][..], &others].concat()));
    clip(&input, &folder.path("out"), &["--agc", "0.5", "--params", text(&params)]).succeeded();
    assert_eq!(last_f32s(&folder.read("out"), 1), [4.0]);

    let used = folder.write("used", file(&[("a", "F8_E4M3", vec![1])]));
    clip(&input, &folder.path("none"), &["--agc", "0.5", "--params", text(&used)])
        .failed(1, &["used: tensor \"a\" is F8_E4M3, but --agc needs parameters of float32"]);
}

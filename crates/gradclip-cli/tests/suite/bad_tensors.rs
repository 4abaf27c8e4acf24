//! Tensors that a mode or a scope cannot work on: the message names the tensor and the reason, and nothing is written.

use crate::common::{Folder, clip, f32s, file, gradclip, last_f32s, raw, shaped_file};

type Shaped<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

fn ones(name: &'static str, shape: &'static [usize]) -> Shaped<'static> {
    (name, "F32", shape, f32s(&vec![1.0; shape.iter().product()]))
}

/// Checks that the clip is refused, with a message that contains these texts.
#[track_caller]
fn refused(gradients: &[Shaped<'_>], options: &[&str], expected: &[&str]) {
    let (folder, out) = (Folder::new(), Folder::new());
    let input = folder.write("in", shaped_file(gradients));
    clip(&input, &out.path("out"), &[&["--max-norm", "1"], options].concat()).failed(1, expected);
    assert!(out.names().is_empty());
    let options: Vec<_> = options.iter().filter(|option| **option != "--sum").collect();
    gradclip(["norm", "--backend", "cpu", input.to_str().unwrap()].iter().chain(options)).failed(1, expected);
}

#[test]
fn axes_that_a_tensor_does_not_have() {
    for (axes, told) in [("0,2", "no axis 2"), ("over:-3", "no axis -3")] {
        let options = ["--scope", "unit", "--unit-axis", axes];
        refused(&[ones("w", &[2, 2])], &options, &["\"w\"", "its shape is [2, 2]", told]);
    }
    // A scalar has no axis that it could lack.
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[ones("scale", &[])]));
    for (i, axes) in ["first", "last", "optax", "-1", "over:0,2"].into_iter().enumerate() {
        let options = ["--max-norm", "1", "--scope", "unit", "--unit-axis", axes];
        clip(&input, &folder.path(&format!("out {i}")), &options).succeeded();
    }
}

#[test]
fn examples_that_disagree() {
    let tensors = [ones("w", &[4, 2]), ones("b", &[3])];
    let expected = ["\"b\"", "dimension 0 holds 3 examples", "\"w\" 4"];
    let scalar = [ones("w", &[4, 2]), ones("loss", &[])];
    for options in
        [&["--scope", "example"][..], &["--scope", "example", "--sum"], &["--scope", "example-tensor", "--sum"]]
    {
        refused(&tensors, options, &expected);
        refused(&scalar, options, &["\"loss\"", "it is a scalar, and has no dimension 0"]);
    }
}

#[test]
fn sums_that_fit_nowhere() {
    let folder = Folder::new();
    for shape in [&[0, 1 << 62, 4][..], &[0, 1 << 40, 1 << 40]] {
        let input = folder.write("in", shaped_file(&[("w", "F32", shape, vec![])]));
        let options = ["--max-norm", "1", "--scope", "example", "--sum"];
        clip(&input, &folder.path("out"), &options).failed(1, &["\"w\""]);
        assert_eq!(folder.names(), ["in"]);
    }
}

/// Checks that AGC with these parameters is refused.
#[track_caller]
fn refused_parameters(parameters: Vec<u8>, expected: &[&str]) {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[ones("w", &[2, 3]), ones("b", &[2])]));
    let params = folder.write("params", parameters);
    let options = ["--agc", "0.01", "--params", params.to_str().unwrap()];
    clip(&input, &folder.path("out"), &options).failed(1, &[&["params: "], expected].concat());
    assert_eq!(folder.names(), ["in", "params"]);
}

#[test]
fn parameters_that_do_not_match() {
    let b = || ones("b", &[2]);
    refused_parameters(shaped_file(&[b()]), &["tensor \"w\" is missing"]);
    refused_parameters(shaped_file(&[b(), ones("W", &[2, 3])]), &["tensor \"w\" is missing"]);
    let expected = ["tensor \"w\" has the shape [3, 2], but its gradient [2, 3]"];
    refused_parameters(shaped_file(&[ones("w", &[3, 2]), b()]), &expected);
    refused_parameters(
        shaped_file(&[("w", "U8", &[2, 3], vec![1; 6]), b()]),
        &["tensor \"w\" is U8", "--agc needs parameters of float32"],
    );
    refused_parameters(b"short".to_vec(), &["too few"]);
}

#[test]
fn parameters_in_any_order_and_dtype() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[ones("w", &[2, 1]), ones("b", &[1]), ("n", "I64", &[1], vec![0; 8])]));
    let wide = [1f64, 100.0].map(f64::to_le_bytes).concat();
    let halves = 0x4400u16.to_le_bytes().to_vec(); // 4
    let params = [("b", "F16", &[1][..], halves), ones("other", &[7]), ("w", "F64", &[2, 1], wide)];
    let params = folder.write("params", shaped_file(&params));
    clip(&input, &folder.path("out"), &["--agc", "0.125", "--params", params.to_str().unwrap()]).succeeded();
    let out = raw("", &folder.read("out"));
    let floats: Vec<_> = last_f32s(&out[..out.len() - 8], 3);
    assert_eq!(floats, [0.125, 1.0, 0.5]);
}

/// The parameters are as precious as the gradients.
#[test]
fn out_never_replaces_the_parameters() {
    let folder = Folder::new();
    let bytes = file(&[("w", "F32", f32s(&[1.0]))]);
    let (input, params) = (folder.write("in", &bytes), folder.write("params", &bytes));
    let options = ["--agc", "0.01", "--force", "--params", params.to_str().unwrap()];
    clip(&input, &params, &options).failed(2, &["own input"]);
    assert_eq!(folder.read("params"), bytes);
}

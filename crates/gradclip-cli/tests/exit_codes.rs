//! 0 done, 1 could not, 2 usage, 3 non-finite; 4 is among the GPU's tests.

mod common;

use std::path::Path;

use common::{EXAMPLE, Folder, clip, f32s, file, gradclip, last_f32s};

#[test]
fn usage_is_2_and_begins_nothing() {
    let cases: [(&[&str], &str); 21] = [
        (&[], "required"),
        (&["--max-norm", "1", "--clip-value", "1"], "cannot be used with"),
        (&["--clip-range", "0,1", "--clip-value", "1"], "cannot be used with"),
        (&["--max-norm", "-1"], "max_norm is -1"),
        (&["--max-norm=-1"], "max_norm is -1"),
        (&["--max-norm", "nan"], "max_norm is NaN"),
        (&["--max-norm", "much"], "invalid"),
        (&["--clip-value", "-0.5"], "clip_value is -0.5"),
        (&["--clip-value", "NaN"], "clip_value is NaN"),
        (&["--clip-range", "0.5,-0.5"], "0.5 to -0.5"),
        (&["--clip-range", "-0.5,nan"], "NaN"),
        (&["--clip-range", "-0.5"], "MIN,MAX"),
        (&["--clip-range", "-0.5,x"], "\"x\""),
        (&["--max-norm", "1", "--eps", "-1"], "eps is -1"),
        (&["--max-norm", "1", "--grad-scale", "0"], "grad_scale is 0"),
        (&["--max-norm", "1", "--grad-scale", "-2"], "grad_scale is -2"),
        (&["--max-norm", "1", "--norm-type", "3"], "possible values: 2, 1, inf"),
        (&["--max-norm", "1", "--threads", "0"], "zero"),
        (&["--max-norm", "1", "--adapter", "x"], "--adapter"),
        (&["--clip-value", "1", "--eps", "0"], "--eps"),
        (&["--clip-value", "1", "--norm-type", "1"], "--norm-type"),
    ];
    let folder = Folder::new();
    for (args, says) in cases {
        clip(Path::new(EXAMPLE), &folder.path("out"), args).failed(2, &[says]);
        assert!(folder.names().is_empty(), "{args:?}");
    }
    gradclip(["norm"]).failed(2, &["required"]);
    gradclip(["norm", EXAMPLE, "--grad-scale", "nan"]).failed(2, &["grad_scale is NaN"]);
    gradclip(["verify", EXAMPLE, "--seed", "1"]).failed(2, &["--seed"]);
    gradclip(["verify", "--cases", "0"]).failed(2, &["--cases"]);
}

#[test]
fn non_finite_gradients_are_3_and_write_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let folder = Folder::new();
        let bytes = file(&[("a", "F32", f32s(&[1.0; 3])), ("b", "F32", f32s(&[1.0, 2.0, bad, bad]))]);
        let input = folder.write("in", &bytes);
        for mode in [&["--max-norm", "1"][..], &["--clip-value", "1", "--non-finite", "error"]] {
            let says =
                ["2 non-finite elements", "index 2 of tensor \"b\"", "--non-finite propagate, skip, zero or drop"];
            clip(&input, &folder.path("out"), mode).failed(3, &says);
            assert_eq!((folder.names(), folder.read("in")), (vec!["in".to_owned()], bytes.clone()));
        }
    }
}

#[test]
fn other_policies_go_on() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[3.0, f32::NAN, 4.0]))]));
    let clipped = |policy: &str| {
        let out = folder.path(policy);
        let run = clip(&input, &out, &["--max-norm", "1", "--eps", "0", "--non-finite", policy]).succeeded();
        assert!(run.stdout.contains("index 1 of tensor \"a\""), "{run:?}");
        last_f32s(&folder.read(policy), 3)
    };
    assert!(clipped("propagate").iter().all(|x| x.is_nan()));
    assert_eq!(clipped("zero"), [0.0; 3]);
    assert_eq!(clipped("drop"), [0.6, 0.0, 0.8]);
    clipped("skip");
    assert_eq!(folder.read("skip"), folder.read("in"));
}

#[test]
fn a_norm_of_non_finite_gradients_is_0() {
    let folder = Folder::new();
    let good = folder.write("good", file(&[("a", "F32", f32s(&[1.0]))]));
    let bad = folder.write("bad", file(&[("a", "F32", f32s(&[1.0, f32::INFINITY]))]));
    let run = gradclip(["norm", "--backend", "cpu", good.to_str().unwrap(), bad.to_str().unwrap()]).succeeded();
    assert!(run.stdout.contains("index 1 of tensor \"a\" in "), "{run:?}");
    assert!(run.stdout.contains(bad.to_str().unwrap()), "{run:?}");
}

#[test]
fn help_is_0_and_fits_a_terminal() {
    for args in [&["--help"][..], &["norm", "-h"], &["clip", "-h"], &["verify", "-h"], &["devices", "-h"]] {
        let run = gradclip(args).succeeded();
        let wide = run.stdout.lines().find(|line| line.chars().count() > 80);
        assert_eq!(wide, None);
    }
}

#[cfg(not(feature = "gpu"))]
#[test]
fn without_gpu_support_what_needs_one_is_1() {
    let folder = Folder::new();
    let out = folder.path("out");
    let says = ["built without GPU support", "gpu"];
    for args in
        [&["verify"][..], &["devices"], &["norm", EXAMPLE, "--backend", "gpu"], &["norm", EXAMPLE, "--adapter", "x"]]
    {
        gradclip(args).failed(1, &says);
    }
    clip(Path::new(EXAMPLE), &out, &["--max-norm", "1", "--verify"]).failed(1, &says);
    let run = gradclip(["norm", EXAMPLE]);
    assert_eq!((run.code, run.stderr.lines().count()), (Some(0), 1), "{run:?}");
    assert!(run.stderr.contains("measuring on the CPU"), "{run:?}");
}

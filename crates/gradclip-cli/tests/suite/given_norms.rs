//! Guards against norms and scales that part: a norm that was measured elsewhere scales as a measured one does, and a clip by
//! value reports the norm before it.

use crate::by_name::backends;
use crate::common::{EXAMPLE, Folder, clip, f32s, file, gradclip, last_f32s, text};
use serde_json::{Value, json};

#[track_caller]
fn near(value: &Value, expected: f64) {
    assert!((value.as_f64().unwrap() / expected - 1.0).abs() < 1e-6, "{value}");
}

#[test]
fn a_given_norm_scales_as_a_measured_one() {
    let folder = Folder::new();
    let (measured, given) = (folder.path("measured"), folder.path("given"));
    let modes: [&[&str]; 5] = [
        &["--max-norm", "0.2"],
        &["--max-norm", "0.2", "--grad-scale", "4", "--eps", "0"],
        &["--max-norm", "0.2", "--norm-type", "1"],
        &["--max-norm", "1e9"],
        &["--max-rms", "1e-4"],
    ];
    for mode in modes {
        let object = clip(EXAMPLE.as_ref(), &measured, &[mode, &["--json"]].concat()).succeeded().json();
        let norm = object["total_norm"].as_f64().unwrap().to_string();
        let more = ["--given-norm", &norm, "--json"];
        let other = clip(EXAMPLE.as_ref(), &given, &[mode, &more].concat()).succeeded().json();
        for key in ["total_norm", "clip_coef", "clipped", "elements", "tensors"] {
            assert_eq!(object[key], other[key], "{mode:?} {key}");
        }
        assert!(folder.read("measured") == folder.read("given"), "{mode:?}");
        folder.names().iter().for_each(|name| std::fs::remove_file(folder.path(name)).unwrap());
    }
}

#[test]
fn a_given_norm_that_makes_no_sense() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[3.0]))]));
    let cases: [(&[&str], &str); 9] = [
        (&["--max-norm", "1", "--given-norm", "nan"], "a given norm is NaN"),
        (&["--max-norm", "1", "--given-norm", "-1"], "a given norm is -1"),
        (&["--max-norm", "1", "--given-norm", "inf"], "a given norm is inf"),
        (&["--clip-value", "1", "--given-norm", "1"], "--given-norm goes with"),
        (&["--max-norm", "1", "--scope", "tensor", "--given-norm", "1"], "--given-norm goes with"),
        (&["--max-norm", "1", "--group", "a=1", "--given-norm", "1"], "each --group has its own"),
        (&["--max-norm", "1", "--verify", "--given-norm", "1"], "--verify compares norms"),
        (&["--max-norm", "1", "--adapter", "x", "--given-norm", "1"], "leave out --backend gpu"),
        (&["--max-norm", "1", "--report-norm"], "--report-norm goes with --clip-value"),
    ];
    for (args, expected) in cases {
        let out = folder.path("out");
        gradclip([&["clip", text(&input), "-o", text(&out)], args].concat()).failed(2, &[expected]);
    }
    assert_eq!(folder.names(), ["in"]);
}

#[test]
fn a_clip_by_value_reports_the_norm_before_it() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[6.0, 0.0])), ("b", "F32", f32s(&[8.0]))]));
    let out = folder.path("out");
    for backend in backends() {
        let args = ["clip", text(&input), "-o", text(&out), "--force", "--clip-value", "1", "--backend", backend];
        let norm = |more: &[&str]| {
            let object = gradclip([&args[..], more, &["--json"]].concat()).succeeded().json();
            assert_eq!((&object["clipped"], &object["clip_coef"]), (&json!(true), &json!(1.0)));
            object
        };
        assert_eq!(norm(&[])["total_norm"], json!(null));
        near(&norm(&["--report-norm"])["total_norm"], 10.0);
        assert_eq!(last_f32s(&folder.read("out"), 3), [1.0, 0.0, 1.0]);
        near(&norm(&["--report-norm", "--grad-scale", "2"])["total_norm"], 5.0);
        let object = norm(&["--report-norm", "--group", "a=0.5"]);
        near(&object["total_norm"], 10.0);
        near(&object["groups"][0]["norm"], 6.0);
        let run = gradclip([&args[..], &["--report-norm"]].concat()).succeeded();
        assert!(run.stdout.contains("total norm   10 (L2)") && !run.stdout.contains("coefficient"), "{run:?}");
    }
    let bad = folder.write("bad", file(&[("a", "F32", f32s(&[f32::NAN, 3.0, 4.0]))]));
    let norm = |policy| {
        let args = ["--clip-value", "1", "--report-norm", "--non-finite", policy, "--force", "--json"];
        clip(&bad, &out, &args).succeeded().json()["total_norm"].clone()
    };
    assert_eq!((norm("propagate"), norm("drop")), (json!(null), json!(5.0)));
}

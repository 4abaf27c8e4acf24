//! 0 done, 1 could not, 2 usage, 3 non-finite; 4 is among the GPU's tests.

use std::path::Path;

use crate::common::{EXAMPLE, Folder, clip, f32s, file, gradclip, gradclip_with, last_f32s};

#[test]
fn usage_is_2_and_begins_nothing() {
    let cases: [(&[&str], &str); 50] = [
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
        // Above 0, but with too few digits to divide by.
        (&["--max-norm", "1", "--grad-scale", "1e-310"], "grad_scale is 1e-310; it must be a normal number above 0"),
        (&["--max-norm", "1", "--norm-type", "much"], "invalid"),
        (&["--max-norm", "1", "--norm-type", "0"], "norm_type is 0; it must be above 0"),
        (&["--max-norm", "1", "--norm-type", "-2"], "norm_type is -2"),
        (&["--max-norm", "1", "--norm-type", "nan"], "norm_type is NaN"),
        (&["--max-norm", "1", "--threads", "0"], "zero"),
        (&["--max-norm", "1", "--adapter", "x"], "--adapter"),
        (&["--clip-value", "1", "--eps", "0"], "--eps"),
        (&["--clip-value", "1", "--norm-type", "1"], "--norm-type"),
        (&["--max-rms", "1", "--max-average-norm", "1"], "cannot be used with"),
        (&["--max-rms", "-1"], "max_rms is -1"),
        (&["--max-rms", "1", "--norm-type", "2"], "--norm-type goes with --max-norm"),
        (&["--max-rms", "1", "--eps", "0"], "--eps goes with --max-norm"),
        (&["--max-average-norm", "nan"], "max_average_norm is NaN"),
        (&["--agc", "0.01"], "--params FILE"),
        (&["--agc", "inf", "--params", EXAMPLE], "clip_factor is inf"),
        (&["--agc", "-1", "--params", EXAMPLE], "clip_factor is -1"),
        (&["--agc", "1", "--params", EXAMPLE, "--agc-eps", "-1"], "agc_eps is -1"),
        (&["--agc", "1", "--params", EXAMPLE, "--scope", "example"], "parameters have no examples"),
        (&["--agc", "1", "--params", EXAMPLE, "--scope", "tensor", "--unit-axis", "last"], "--scope unit"),
        (&["--max-norm", "1", "--params", EXAMPLE], "--params goes with --agc"),
        (&["--max-norm", "1", "--agc-eps", "1"], "--agc-eps goes with --agc"),
        (&["--max-norm", "1", "--scope", "layer"], "possible values: global, tensor, unit, example, example-tensor"),
        (&["--clip-value", "1", "--scope", "tensor"], "a clip by value measures no norm"),
        (&["--max-norm", "1", "--unit-axis", "last"], "--unit-axis needs --scope unit"),
        (&["--max-norm", "1", "--scope", "example", "--budget", "sized"], "--budget needs --scope example-tensor"),
        (&["--max-norm", "1", "--sum"], "--sum adds the clipped examples: it needs --scope example or example-tensor"),
        (&["--max-norm", "1", "--sum", "--scope", "unit"], "--sum adds the clipped examples"),
        (&["--clip-value", "1", "--sum"], "--sum adds the clipped examples"),
        (&["--max-norm", "1", "--sum", "--scope", "example", "--verify"], "--verify compares"),
        (&["--max-norm", "1", "--sum", "--scope", "example", "--non-finite", "skip"], "another policy"),
        (&["--max-norm", "1", "--sum", "--scope", "example", "--skip-above", "1"], "leave one out"),
        (&["--clip-value", "1", "--skip-above", "1"], "a clip by value measures no norm"),
        (&["--max-norm", "1", "--skip-above", "-1"], "skip_above is -1; it must be 0 or more"),
    ];
    let folder = Folder::new();
    for (args, expected) in cases {
        clip(Path::new(EXAMPLE), &folder.path("out"), args).failed(2, &[expected]);
        assert!(folder.names().is_empty(), "{args:?}");
    }
    gradclip(["norm"]).failed(2, &["required"]);
    gradclip(["norm", EXAMPLE, "--grad-scale", "nan"]).failed(2, &["grad_scale is NaN"]);
    let out = folder.path("out.svg");
    let out = out.to_str().unwrap();
    gradclip(["norm", EXAMPLE, "--norm-type", "0"]).failed(2, &["norm_type is 0"]);
    gradclip(["norm", EXAMPLE, "--unit-axis", "first"]).failed(2, &["--unit-axis needs --scope unit"]);
    gradclip(["norm", EXAMPLE, "--scope", "unit", "--plot", out]).failed(2, &["--plot draws tensors"]);
    gradclip(["norm", EXAMPLE, "--eps", "0"]).failed(2, &["--eps"]);
    gradclip(["norm", EXAMPLE, "--force"]).failed(2, &["--plot"]);
    assert!(folder.names().is_empty());
    gradclip(["verify", EXAMPLE, "--seed", "1"]).failed(2, &["--seed"]);
    gradclip(["verify", "--cases", "0"]).failed(2, &["--cases"]);
}

/// Two thousand threads once took seconds for 80 bytes, and more stopped the machine.
#[test]
fn more_threads_than_cores_can_run_are_not_started() {
    let most = 4 * std::thread::available_parallelism().unwrap().get();
    let (more, told) = (2000.to_string(), format!("{most} threads for 2000"));
    for (args, variable) in [(&["--threads", &more][..], "GRADCLIP"), (&[], "RAYON_NUM_THREADS")] {
        let norm = |quiet: &[&str]| {
            let args = [&["norm", EXAMPLE, "--backend", "cpu"], args, quiet].concat();
            gradclip_with(args, [(variable, more.as_str())])
        };
        let run = norm(&[]);
        assert!(run.code == Some(0) && run.stderr.starts_with(&told) && run.stderr.lines().count() == 1, "{run:?}");
        assert!(run.stdout.contains(&format!("CPU, {most} threads")), "{run:?}");
        norm(&["--quiet"]).succeeded();
        norm(&["--json"]).succeeded();
    }
    gradclip(["norm", EXAMPLE, "--backend", "cpu", "--threads", &most.to_string()]).succeeded();
}

#[test]
fn non_finite_gradients_are_3_and_write_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let folder = Folder::new();
        let bytes = file(&[("a", "F32", f32s(&[1.0; 3])), ("b", "F32", f32s(&[1.0, 2.0, bad, bad]))]);
        let input = folder.write("in", &bytes);
        for mode in [&["--max-norm", "1"][..], &["--clip-value", "1", "--non-finite", "error"]] {
            let expected =
                ["2 non-finite elements", "index 2 of tensor \"b\"", "--non-finite propagate, skip, zero or drop"];
            clip(&input, &folder.path("out"), mode).failed(3, &expected);
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

/// The program once said that it had done so, and had not.
#[test]
fn an_infinite_threshold_still_unscales_and_drops() {
    let folder = Folder::new();
    let bad = folder.write("bad", file(&[("a", "F32", f32s(&[1.0, f32::NAN, f32::INFINITY, 2.0]))]));
    let scaled = folder.write("scaled", file(&[("a", "F32", f32s(&[3.0, 4.0]))]));
    for mode in ["--max-norm", "--max-rms", "--max-average-norm"] {
        let clipped = |input: &Path, policy: &str, grad_scale: &str, count: usize| {
            let options = [mode, "inf", "--non-finite", policy, "--grad-scale", grad_scale, "--force"];
            clip(input, &folder.path("out"), &options).succeeded();
            last_f32s(&folder.read("out"), count)
        };
        assert_eq!(clipped(&bad, "drop", "1", 4), [1.0, 0.0, 0.0, 2.0], "{mode}");
        assert_eq!(clipped(&bad, "zero", "1", 4), [0.0; 4], "{mode}");
        assert_eq!(clipped(&scaled, "error", "8", 2), [0.375, 0.5], "{mode}");
    }
}

#[test]
fn a_norm_of_non_finite_gradients_is_0() {
    let folder = Folder::new();
    let good = folder.write("good", file(&[("a", "F32", f32s(&[1.0]))]));
    let bad = folder.write("bad", file(&[("b", "F32", f32s(&[1.0, f32::INFINITY]))]));
    let run = gradclip(["norm", "--backend", "cpu", good.to_str().unwrap(), bad.to_str().unwrap()]).succeeded();
    assert!(run.stdout.contains("index 1 of tensor \"b\" in "), "{run:?}");
    assert!(run.stdout.contains(bad.to_str().unwrap()), "{run:?}");
}

#[test]
fn help_is_0_and_fits_a_terminal() {
    let commands = ["norm", "clip", "history", "verify", "bench", "devices", "tune", "completions", "man"];
    let listed = gradclip(["--help"]).stdout;
    let listed = listed.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   ")).count();
    // Those above, `help`, and the options -h and -V.
    assert_eq!(listed, commands.len() + 3);
    let of = |command: &'static str| [vec![command, "-h"], vec![command, "--help"], vec!["help", command]];
    for args in commands.into_iter().flat_map(of).chain([vec!["-h"], vec!["--help"], vec!["help"]]) {
        let run = gradclip(args).succeeded();
        let wide = run.stdout.lines().find(|line| line.chars().count() > 80);
        assert_eq!(wide, None);
    }
    let lines = gradclip(["clip", "--help"]).stdout.lines().count();
    assert!(lines <= 100, "two screens have 100 lines, and this is {lines}");
}

#[test]
fn manual_pages_are_0_and_unknown_ones_2() {
    for command in [&["man"][..], &["man", "clip"], &["man", "man"]] {
        let run = gradclip(command).succeeded();
        assert!(run.stdout.contains(".TH gradclip"), "{run:?}");
    }
    gradclip(["man", "clap"]).failed(2, &["no command \"clap\"", "--help"]);
    gradclip(["completions", "sh"]).failed(2, &["invalid value 'sh'", "bash"]);
}

/// As bash does when someone presses Tab.
#[cfg(unix)]
#[test]
fn bash_completes_options_and_their_values() {
    let complete = |words: &str| {
        let script = r#"
            eval "$("$0" completions bash)"
            COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _gradclip gradclip "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            echo "${COMPREPLY[@]}""#;
        let mut command = std::process::Command::new("bash");
        let output = command.args(["-c", script, env!("CARGO_BIN_EXE_gradclip"), words]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete("gradclip ver"), "verify");
    assert_eq!(complete("gradclip clip --max"), "--max-norm --max-rms --max-average-norm");
    assert_eq!(complete("gradclip clip --non-finite z"), "zero");
}

#[cfg(not(feature = "gpu"))]
#[test]
fn without_gpu_support_what_needs_one_is_1() {
    let folder = Folder::new();
    let out = folder.path("out");
    let expected = ["built without GPU support", "gpu"];
    for args in
        [&["verify"][..], &["devices"], &["norm", EXAMPLE, "--backend", "gpu"], &["norm", EXAMPLE, "--adapter", "x"]]
    {
        gradclip(args).failed(1, &expected);
    }
    clip(Path::new(EXAMPLE), &out, &["--max-norm", "1", "--verify"]).failed(1, &expected);
    let run = gradclip(["norm", EXAMPLE]);
    assert_eq!((run.code, run.stderr.lines().count()), (Some(0), 1), "{run:?}");
    assert!(run.stderr.contains("measuring on the CPU"), "{run:?}");
}

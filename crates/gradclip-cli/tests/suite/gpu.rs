//! The program on a real device. These fail where there is none: a Vulkan driver in software will do (Debian and Ubuntu:
//! apt-get install mesa-vulkan-drivers libvulkan1).

use crate::common::{EXAMPLE, Folder, Run, f32s, file, gradclip, gradclip_with, last_f32s, repeats};
use serde_json::{Value, json};

#[track_caller]
fn on_gpu(args: &[&str]) -> Run {
    let run = gradclip(args);
    let advice = "a Vulkan device is needed: apt-get install mesa-vulkan-drivers libvulkan1";
    assert!(!run.stderr.contains("no GPU adapter"), "{advice}\n{run:?}");
    run
}

fn devices() -> Vec<Value> {
    on_gpu(&["devices", "--json"]).succeeded().json()["adapters"].as_array().unwrap().clone()
}

#[test]
fn devices_are_listed() {
    let devices = devices();
    assert!(!devices.is_empty(), "a Vulkan device is needed: apt-get install mesa-vulkan-drivers libvulkan1");
    let text = gradclip(["devices"]).succeeded().stdout;
    for device in devices {
        assert!(text.contains(device["name"].as_str().unwrap()), "{text}");
        assert!(device["max_buffer_size"].as_u64().unwrap() > 0, "{device}");
        assert_eq!(device["software"], json!(device["device_type"] == "Cpu"), "{device}");
    }
}

#[test]
fn norm_and_clip_agree_with_the_cpu() {
    let folder = Folder::new();
    let (cpu, gpu) = (folder.path("cpu"), folder.path("gpu"));
    for (out, backend) in [(&cpu, "cpu"), (&gpu, "gpu")] {
        let out = out.to_str().unwrap();
        let args = ["clip", EXAMPLE, "-o", out, "--max-norm", "0.2", "--backend", backend, "--json"];
        let object = on_gpu(&args).succeeded().json();
        assert_eq!((&object["backend"], object["adapter"].is_string()), (&json!(backend), backend == "gpu"));
        let norm = object["total_norm"].as_f64().unwrap();
        assert!((norm / 0.5245872834952451 - 1.0).abs() < 1e-6, "{norm}");
        let norm: f64 = on_gpu(&["norm", "-q", out, "--backend", backend]).succeeded().stdout.trim().parse().unwrap();
        assert!((norm / 0.2 - 1.0).abs() < 1e-5, "{norm}");
    }
    let floats = |name| last_f32s(&folder.read(name), 45_004);
    let near = |(a, b): (f32, f32)| (a - b).abs() <= 3e-6 * a.abs();
    assert!(floats("cpu").into_iter().zip(floats("gpu")).all(near));
}

#[test]
fn unclipped_is_untouched() {
    let folder = Folder::new();
    let out = folder.path("out");
    on_gpu(&["clip", EXAMPLE, "-o", out.to_str().unwrap(), "--max-norm", "1", "--backend", "gpu"]).succeeded();
    assert_eq!(folder.read("out"), std::fs::read(EXAMPLE).unwrap());
}

#[test]
fn auto_says_why_it_took_the_cpu() {
    let hardware = devices().iter().any(|device| device["software"] == json!(false));
    let run = on_gpu(&["norm", EXAMPLE]);
    assert_eq!(run.code, Some(0), "{run:?}");
    if hardware {
        assert!(run.stdout.contains("GPU"), "{run:?}");
    } else {
        assert!(run.stdout.contains("CPU"), "{run:?}");
        assert!(run.stderr.contains("no GPU found (only the software device"), "{run:?}");
        assert_eq!(run.stderr.lines().count(), 1, "{run:?}");
    }
    gradclip(["norm", EXAMPLE, "--quiet"]).succeeded();
}

#[test]
fn float64_stays_off_the_gpu() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[1.0])), ("wide", "F64", 2f64.to_le_bytes().to_vec())]));
    let (input, out) = (input.to_str().unwrap(), folder.path("out"));
    let out = out.to_str().unwrap();
    let expected = ["\"wide\"", "float64"];
    on_gpu(&["clip", input, "-o", out, "--max-norm", "1", "--backend", "gpu"]).failed(1, &expected);
    on_gpu(&["clip", input, "-o", out, "--max-norm", "1", "--backend", "cpu", "--verify"]).failed(1, &expected);
    on_gpu(&["norm", input, "--backend", "gpu"]).failed(1, &expected);
    on_gpu(&["verify", input]).failed(1, &expected);
    let grads = folder.write("grads", file(&[("wide", "F32", f32s(&[1.0]))]));
    let params = folder.write("params", file(&[("wide", "F64", 2f64.to_le_bytes().to_vec())]));
    let agc = ["clip", grads.to_str().unwrap(), "-o", out, "--agc", "1", "--params", params.to_str().unwrap()];
    on_gpu(&[&agc[..], &["--backend", "gpu"]].concat()).failed(1, &expected);
    on_gpu(&[&agc[..], &["--backend", "cpu", "--verify"]].concat()).failed(1, &expected);
    assert_eq!(on_gpu(&agc).code, Some(0));
    assert_eq!(folder.names(), ["grads", "in", "out", "params"]);
    let run = on_gpu(&["norm", input]);
    assert!(run.code == Some(0) && run.stderr.contains("\"wide\" is float64"), "{run:?}");
}

/// A machine without any driver.
#[cfg(target_os = "linux")]
#[test]
fn no_adapter_at_all() {
    let run = |args: &[&str]| {
        let none = [("WGPU_BACKEND", "vulkan"), ("VK_DRIVER_FILES", "/none"), ("VK_ICD_FILENAMES", "/none")];
        gradclip_with(args, none)
    };
    let out = Folder::new();
    let path = out.path("out");
    let verified = ["clip", EXAMPLE, "-o", path.to_str().unwrap(), "--max-norm", "1", "--backend", "cpu", "--verify"];
    let bench = ["bench", "--backend", "gpu", "--sizes", "1Ki"];
    for args in [&["norm", EXAMPLE, "--backend", "gpu"][..], &["verify"], &verified, &bench] {
        run(args).failed(1, &["no GPU adapter found", "use the CPU"]);
    }
    assert!(out.names().is_empty());
    assert!(run(&["devices"]).succeeded().stdout.contains("no device found"));
    assert_eq!(run(&["devices", "--json"]).succeeded().json(), json!({ "adapters": [] }));
    let fallback = run(&["norm", EXAMPLE]);
    assert_eq!((fallback.code, fallback.stderr.as_str()), (Some(0), "no GPU found: measuring on the CPU\n"));
}

#[test]
fn an_unknown_adapter() {
    for args in [&["norm", EXAMPLE, "--adapter", "no such card"][..], &["verify", "--adapter", "no such card"]] {
        gradclip(args).failed(1, &["no such card"]);
    }
}

#[test]
fn an_adapter_by_a_part_of_its_name() {
    let name = devices()[0]["name"].as_str().unwrap().to_uppercase();
    let object = on_gpu(&["norm", EXAMPLE, "--adapter", &name[..4], "--json"]).succeeded().json();
    assert_eq!(object["backend"], "gpu");
}

#[test]
fn verify_a_file() {
    let object = on_gpu(&["verify", EXAMPLE, "--json"]).succeeded().json();
    assert_eq!(object["agrees"], true);
    let cases = object["cases"].as_array().unwrap();
    assert!(cases.len() >= 5, "{object}");
    for case in cases {
        assert!(case["clip"].is_string() && case["agrees"] == true && case["first_mismatch"].is_null(), "{case}");
        assert!(case["norm_error"].as_f64() <= case["norm_tolerance"].as_f64(), "{case}");
        assert!(case["worst_ulps"].as_u64() <= case["tolerated_ulps"]["float32"].as_u64(), "{case}");
    }
    let text = on_gpu(&["verify", EXAMPLE]).succeeded().stdout;
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert_eq!(text.lines().filter(|line| line.ends_with("  agree")).count(), cases.len(), "{text}");
    assert_eq!(on_gpu(&["verify", EXAMPLE, "--quiet"]).succeeded().stdout, "");
}

#[test]
fn verify_the_clip_that_is_asked_for() {
    let of = |options: &[&str]| {
        let object = on_gpu(&[&["verify", EXAMPLE, "--json"], options].concat()).succeeded().json();
        object["cases"].as_array().unwrap().iter().map(|case| case["clip"].clone()).collect::<Vec<_>>()
    };
    let columns = ["--max-norm", "0.01", "--norm-type", "3", "--scope", "unit", "--unit-axis", "last"];
    assert_eq!(of(&columns), ["norm 0.01 (L3), per unit, unit_axis last"]);
    let agc = ["--agc", "0.5", "--params", EXAMPLE, "--agc-eps", "0.1", "--non-finite", "drop"];
    assert_eq!(of(&agc), ["AGC 0.5, per unit, agc_eps 0.1, non-finite: drop"]);
    gradclip(["verify", "--max-norm", "1"]).failed(2, &["name a FILE"]);
    gradclip(["verify", EXAMPLE, "--scope", "tensor"]).failed(2, &["a mode is required"]);
}

#[test]
fn verify_non_finite_gradients() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[1.0, f32::NAN, 5.0, f32::INFINITY]))]));
    on_gpu(&["verify", input.to_str().unwrap()]).succeeded();
}

#[test]
fn verify_generated_gradients() {
    let run = |seed| on_gpu(&["verify", "--json", "--cases", "12", "--seed", seed]).succeeded().json();
    let (one, again, other) = (run("1"), run("1"), run("2"));
    assert_eq!(one["cases"].as_array().unwrap().len(), 12);
    assert_eq!(one, again);
    assert_ne!(one, other);
    assert!([&one, &other].iter().all(|object| object["agrees"] == true), "{one}\n{other}");
    let text = on_gpu(&["verify", "--cases", &repeats(12, 40).to_string()]).succeeded().stdout;
    assert_eq!(text.lines().find(|line| line.chars().count() > 80), None);
}

#[test]
fn clip_verifies_before_it_writes() {
    let folder = Folder::new();
    let out = folder.path("out");
    let args = ["clip", EXAMPLE, "-o", out.to_str().unwrap(), "--max-norm", "0.2", "--verify", "--backend", "cpu"];
    on_gpu(&args).succeeded();
    let agc = ["--agc", "0.01", "--params", EXAMPLE, "--force"];
    on_gpu(&[&args[..4], &args[6..], &agc].concat()).succeeded();
    on_gpu(&[&args[..], &["--scope", "tensor", "--force"]].concat()).succeeded();
    assert_eq!(folder.names(), ["out"]);
}

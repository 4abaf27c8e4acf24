//! Guards against figures of something else: rows without their case, bytes that were not moved, a plot or an object that
//! cannot be read.

use std::path::Path;

use crate::common::{Folder, Run, gradclip, well_formed};
use serde_json::{Value, json};

const FIELDS: [&str; 6] = ["adapter", "backend", "copy_gb_s", "first_plan_seconds", "read_gb_s", "rows"];
const ROW: [&str; 9] = ["case", "dtype", "elements", "gb_s", "of_copy", "runs", "seconds", "seconds_min", "tensors"];

fn bench(backend: &str, args: &[&str]) -> Run {
    let all = [&["bench", "--backend", backend, "--seconds", "0.01"], args].concat();
    gradclip(all)
}

fn backends() -> &'static [&'static str] {
    if cfg!(feature = "gpu") { &["cpu", "gpu"] } else { &["cpu"] }
}

fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = object.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// Checks what holds for every run, and gives the rows.
#[track_caller]
fn rows<'a>(object: &'a Value, backend: &str) -> &'a [Value] {
    assert_eq!(keys(object), FIELDS);
    assert_eq!((&object["backend"], object["adapter"].is_string()), (&json!(backend), backend == "gpu"));
    let copy = object["copy_gb_s"].as_f64().expect("a number");
    assert!(copy > 0.0 && object["read_gb_s"].as_f64() > Some(0.0), "{object}");
    let rows = object["rows"].as_array().expect("a list");
    for row in rows {
        assert_eq!(keys(row), ROW);
        let number = |name: &str| row[name].as_f64().expect("a number");
        let size = if row["dtype"] == "float32" { 4.0 } else { 2.0 };
        let moves = match row["case"].as_str().expect("text") {
            "norm" | "unclipped" => 1.0,
            "clipped" => 3.0,
            "value" => 2.0,
            other => panic!("no case: {other}"),
        };
        let speed = moves * size * number("elements") / 1e9 / number("seconds");
        assert!((number("gb_s") / speed - 1.0).abs() < 1e-9, "{row}");
        assert!((number("of_copy") / (speed / copy) - 1.0).abs() < 1e-9, "{row}");
        assert!(number("seconds_min") > 0.0 && number("seconds_min") <= number("seconds"), "{row}");
        assert!(number("runs") >= 3.0, "{row}");
    }
    rows
}

#[test]
fn every_case_of_every_size_and_dtype_on_both_backends() {
    for backend in backends() {
        let object = bench(backend, &["--sizes", "1,1000,4Ki", "--json", "--tensors", "one"]);
        // Under --json nothing but the object; a clock other than the device's is reported on stderr.
        assert_eq!(object.code, Some(0), "{object:?}");
        let object = object.json();
        let found: Vec<_> = rows(&object, backend)
            .iter()
            .map(|row| format!("{} {} {} {}", row["dtype"], row["elements"], row["tensors"], row["case"]))
            .collect();
        let mut expected = Vec::new();
        for dtype in ["float32", "float16", "bfloat16"] {
            for size in [1, 1000, 4096] {
                expected.extend(
                    ["norm", "unclipped", "clipped", "value"].map(|case| format!("{dtype:?} {size} 1 {case:?}")),
                );
            }
        }
        assert_eq!(found, expected, "{backend}");
    }
}

#[test]
fn sets_of_tensors() {
    for backend in backends() {
        let counts = |args: &[&str]| -> Vec<(u64, u64)> {
            let run = bench(backend, &[&["--dtype", "bf16", "--json"], args].concat());
            assert_eq!(run.code, Some(0), "{run:?}");
            let pair = |row: &Value| (row["tensors"].as_u64().unwrap(), row["elements"].as_u64().unwrap());
            let mut pairs: Vec<_> = rows(&run.json(), backend).iter().map(pair).collect();
            pairs.dedup();
            pairs
        };
        assert_eq!(counts(&["--sizes", "65000,130000", "--tensors", "2000"]), [(2000, 65_000), (2000, 130_000)]);
        let set = counts(&["--sizes", "100000", "--tensors", "transformer"]);
        assert!(set[0].0 == 291 && set[0].1 <= 100_000, "{set:?}");
        // The default: one tensor, and at the largest size a transformer's.
        let both = counts(&["--sizes", "1Ki,256Ki"]);
        assert_eq!(both.iter().map(|(tensors, _)| *tensors).collect::<Vec<_>>(), [1, 1, 291]);
    }
}

#[test]
fn a_table_for_people() {
    for backend in backends() {
        let run = bench(backend, &["--sizes", "1Ki", "--dtype", "f32,float16"]);
        assert_eq!(run.code, Some(0), "{run:?}");
        assert!(run.stdout.lines().all(|line| line.chars().count() <= 100), "{run:?}");
        for words in ["ran on", "clock", "of copy", "unclipped", "float16", "1Ki"] {
            assert!(run.stdout.contains(words), "{words}: {run:?}");
        }
        assert!(run.stdout.contains(if *backend == "cpu" { "CPU" } else { "GPU" }), "{run:?}");
        // Of so few elements there is one partial, and nothing to merge.
        for pass in ["measure", "decide", "apply"] {
            let lines = run.stdout.lines().filter(|line| line.contains(&format!("  {pass} "))).count();
            assert_eq!(lines, if *backend == "cpu" { 0 } else { 2 }, "{pass}: {run:?}");
        }
    }
}

#[test]
fn a_plot_is_a_whole_picture_and_never_replaces_a_file() {
    let folder = Folder::new();
    let out = folder.path("out.svg");
    let plot = ["--sizes", "1Ki,2Ki", "--plot", out.to_str().unwrap()];
    bench("cpu", &plot).succeeded();
    let svg = String::from_utf8(folder.read("out.svg")).unwrap();
    well_formed(&svg);
    for words in ["<svg ", "copy ", "unclipped", "bfloat16", "<polyline ", "1Ki"] {
        assert!(svg.contains(words), "{words} is missing");
    }
    // A mark for each row, and a curve for each case and dtype.
    assert_eq!((svg.matches("<title>").count(), svg.matches("<polyline ").count()), (24, 12));
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    bench("cpu", &plot).failed(1, &["exists already", "--force"]);
    bench("cpu", &[&plot[..], &["--force"]].concat()).succeeded();
    bench("cpu", &["--plot", "/no/such/folder/out.svg"]).failed(1, &["not a folder"]);
    assert_eq!(folder.names(), ["out.svg"]);
}

#[test]
fn what_makes_no_sense_is_2() {
    let cases: &[(&[&str], &str)] = &[
        (&["--sizes", "0"], "at least 1"),
        (&["--sizes", ""], "64Ki"),
        (&["--sizes", "1Ki,much"], "like 1000, 64Ki, 16Mi or 1Gi"),
        (&["--sizes", "-1"], "-1"),
        (&["--sizes", "99999999Gi"], "no memory"),
        (&["--dtype", "f64"], "f32, f16 or bf16"),
        (&["--tensors", "0"], "from 1 to 1000000"),
        (&["--tensors", "some"], "from 1 to 1000000"),
        (&["--tensors", "2000", "--sizes", "1Ki"], "too few"),
        (&["--tensors", "transformer", "--sizes", "16"], "too few"),
        (&["--seconds", "nan"], "0 to 3600"),
        (&["--seconds", "-1"], "-1"),
        (&["--force"], "--plot"),
        (&["--threads", "0"], "zero"),
        (&["--host-clock"], "--host-clock"),
        (&["--adapter", "x"], "--adapter names a GPU"),
    ];
    for (args, expected) in cases {
        gradclip([&["bench", "--backend", "cpu"], *args].concat()).failed(2, &[expected]);
    }
}

#[test]
fn more_than_there_is_room_for_is_1() {
    for backend in backends() {
        // 64 TiB.
        bench(backend, &["--sizes", "16384Gi", "--json"]).failed(1, &["16384Gi elements", "smaller --sizes"]);
    }
}

#[cfg(feature = "gpu")]
#[test]
fn a_missing_adapter_is_1() {
    bench("gpu", &["--adapter", "no such card", "--sizes", "1Ki"]).failed(1, &["no such card"]);
}

#[cfg(feature = "gpu")]
#[test]
fn the_hosts_clock_says_so() {
    let run = bench("gpu", &["--sizes", "1Ki", "--dtype", "f32", "--host-clock", "--json"]);
    assert!(run.code == Some(0) && run.stderr.starts_with("timed by the host's clock"), "{run:?}");
    assert_eq!((rows(&run.json(), "gpu").len(), run.stderr.lines().count()), (4, 1));
}

#[cfg(not(feature = "gpu"))]
#[test]
fn without_gpu_support_a_gpu_is_1() {
    bench("gpu", &["--sizes", "1Ki"]).failed(1, &["built without GPU support"]);
}

/// Being ended in the middle leaves nothing behind. By SIGTERM, because a suite that runs in the background may be started with
/// SIGINT ignored.
#[cfg(unix)]
#[test]
fn a_signal_ends_it_at_once() {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    let folder = Folder::new();
    let out = folder.path("out.svg");
    let mut child = Command::new(env!("CARGO_BIN_EXE_gradclip"))
        .args(["bench", "--backend", "cpu", "--seconds", "3600", "--sizes", "16Mi", "--plot"])
        .arg(&out)
        .stdout(Stdio::null())
        .spawn()
        .expect("the program starts");
    std::thread::sleep(Duration::from_millis(700));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("it can be asked") {
            break status;
        }
        if start.elapsed() > Duration::from_secs(5) {
            child.kill().expect("it can be killed");
            panic!("it went on for 5 seconds");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.signal() == Some(15) || status.code() == Some(143), "{status:?}");
    assert!(!Path::new(&out).exists() && folder.names().is_empty());
}

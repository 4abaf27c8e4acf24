//! Tunings that are kept for a device: they are used where they fit, and nowhere else.

use std::fs;
use std::sync::LazyLock;

use serde_json::{Value, json};

use crate::common::{EXAMPLE, Folder, Run, gradclip, gradclip_with};

/// Runs the program with a configuration folder of its own.
fn run(folder: &Folder, args: &[&str]) -> Run {
    gradclip_with(args, [("XDG_CONFIG_HOME", folder.path("config").to_str().unwrap())])
}

/// The device that the program takes.
fn device() -> &'static Value {
    static DEVICE: LazyLock<Value> = LazyLock::new(|| {
        let bench = ["bench", "--backend", "gpu", "--sizes", "1Ki", "--dtype", "f32", "--seconds", "0.001", "--json"];
        let name = gradclip(bench).succeeded().json()["adapter"].clone();
        let devices = gradclip(["devices", "--json"]).succeeded().json();
        let same = |device: &&Value| device["name"] == name;
        devices["adapters"].as_array().unwrap().iter().find(same).unwrap().clone()
    });
    &DEVICE
}

/// Keeps a row for the device that the program takes.
fn keep(folder: &Folder, change: impl Fn(&mut Value)) {
    let device = device();
    let mut row = json!({
        "adapter": device["name"], "backend": device["backend"], "driver": device["driver"], "version": env!("CARGO_PKG_VERSION"),
        "tuning": {
            "workgroup": 32, "contiguous": true, "subgroups": false, "native_products": true, "native_halves": true,
            "windows": 16, "chunks": 16,
            "min_chunk_words": 4096, "max_chunk_words": 65536, "merged_partials": 64,
        },
    });
    change(&mut row);
    fs::create_dir_all(folder.path("config/gradclip")).unwrap();
    fs::write(folder.path("config/gradclip/tuning.json"), json!([row]).to_string()).unwrap();
}

const NORM: [&str; 4] = ["norm", EXAMPLE, "--backend", "gpu"];

#[test]
fn a_kept_row_is_used_and_told() {
    let folder = Folder::new();
    keep(&folder, |_| ());
    let told = "tuned by gradclip tune";
    let norm = run(&folder, &NORM).succeeded().stdout;
    assert!(norm.contains(told) && norm.contains("0.5245"), "{norm}");
    let bench = ["bench", "--backend", "gpu", "--sizes", "1Ki", "--dtype", "f32", "--seconds", "0.001"];
    assert!(run(&folder, &bench).succeeded().stdout.contains(told));
    let verify = run(&folder, &["verify", EXAMPLE, "--max-norm", "0.1"]);
    assert_eq!((verify.code, verify.stderr.contains("tuned by gradclip tune")), (Some(0), true), "{verify:?}");
    for without in [&[&NORM[..], &["--no-tuning"]].concat(), &NORM[..2]] {
        assert!(!run(&folder, without).stdout.contains(told), "{without:?}");
    }
}

#[test]
fn a_row_of_another_device_driver_or_version_is_not_used() {
    let folder = Folder::new();
    for key in ["adapter", "backend", "driver", "version"] {
        keep(&folder, |row| row[key] = json!("another"));
        assert!(!run(&folder, &NORM).succeeded().stdout.contains("tuned"), "{key}");
    }
}

#[test]
fn a_broken_file_is_told() {
    let folder = Folder::new();
    for broken in ["", "[{}]", "nothing"] {
        fs::create_dir_all(folder.path("config/gradclip")).unwrap();
        fs::write(folder.path("config/gradclip/tuning.json"), broken).unwrap();
        for args in [&NORM[..], &["tune"], &["verify", EXAMPLE, "--max-norm", "1"]] {
            run(&folder, args).failed(1, &["tuning.json", "remove the file", "--no-tuning"]);
        }
        run(&folder, &[&NORM[..], &["--no-tuning"]].concat()).succeeded();
    }
    // A row that no kernel can have.
    keep(&folder, |row| row["tuning"]["workgroup"] = json!(3));
    run(&folder, &NORM).failed(1, &["workgroup", "power of two"]);
}

#[test]
fn tuning_prints_what_it_tried() {
    let folder = Folder::new();
    let object = run(&folder, &["tune", "--seconds", "0.01", "--json"]).succeeded().json();
    let own = &object["trials"][0];
    assert_eq!((&object["complete"], &object["kept"], &own["taken"]), (&json!(false), &Value::Null, &json!(true)));
    assert_eq!(object["tuning"], own["tuning"]);
    assert!(own["norm_gb_s"].as_f64().unwrap() > 0.0 && object["copy_gb_s"].as_f64().unwrap() > 0.0, "{object}");
    assert!(!folder.path("config").exists(), "nothing was found, so nothing is kept");
}

#[test]
fn the_size_from_which_host_tensors_pay_is_kept_beside_the_row() {
    let folder = Folder::new();
    keep(&folder, |_| ());
    // One size is always measured, and the clips are checked by nothing but their time.
    let object = run(&folder, &["tune", "--host", "--seconds", "0", "--json"]).succeeded().json();
    let sizes = object["sizes"].as_array().unwrap();
    assert_eq!((sizes.len(), &sizes[0]["bytes"]), (1, &json!(1 << 18)), "{object}");
    let rounds: Vec<_> = sizes[0]["rounds"].as_array().unwrap().iter().map(|ratio| ratio.as_f64().unwrap()).collect();
    assert!(rounds.iter().all(|ratio| *ratio > 0.0), "{object}");
    let pays = rounds.len() == 2 && rounds.iter().all(|ratio| *ratio < 0.95);
    assert_eq!(object["host_from"], if pays { json!(1 << 18) } else { Value::Null });
    let rows: Value = serde_json::from_slice(&folder.read("config/gradclip/tuning.json")).unwrap();
    let expected = if pays { 1 << 18 } else { u64::MAX };
    assert_eq!((&rows[0]["host_from"], &rows[0]["tuning"]["workgroup"]), (&json!(expected), &json!(32)), "{rows}");
    // What was found by the other search stays, and is used.
    assert!(run(&folder, &NORM).succeeded().stdout.contains("tuned by gradclip tune"));
}

#[test]
fn pipelines_are_kept_beside_it_and_a_broken_file_costs_nothing() {
    let folder = Folder::new();
    run(&folder, &NORM).succeeded();
    let kept = || -> Vec<_> {
        let files = fs::read_dir(folder.path("config/gradclip")).into_iter().flatten().map(|file| file.unwrap().path());
        files.filter(|path| path.to_string_lossy().contains("pipeline_cache")).collect()
    };
    let files = kept();
    for file in &files {
        let bytes = fs::read(file).unwrap();
        for broken in [&b""[..], b"nothing", &bytes[..bytes.len() / 2]] {
            fs::write(file, broken).unwrap();
            assert!(run(&folder, &NORM).succeeded().stdout.contains("0.5245"));
        }
        assert_eq!(fs::read(file).unwrap().len(), bytes.len(), "it was not written anew");
    }
    // Vulkan has such a cache everywhere.
    let vulkan = run(&folder, &NORM).succeeded().stdout.contains("(Vulkan");
    assert_eq!(!files.is_empty(), vulkan, "{files:?}");
}

//! Sharded sets: read through their index, written beside a new one, and never trusted.

use std::fs;
use std::path::PathBuf;

use crate::common::{Folder, clip, f32s, file, gradclip, last_f32s};

const INDEX: &str = "grads.safetensors.index.json";
const GOOD: &str = r#"{"metadata": {"total_size": 12}, "weight_map": {"b": "2.safetensors", "a": "1.safetensors", "c": "2.safetensors"}}"#;

/// A set of norm 13 with this index: a = 3, b = 4, c = 12.
fn set(index: &str) -> (Folder, PathBuf) {
    let folder = Folder::new();
    folder.write("1.safetensors", file(&[("a", "F32", f32s(&[3.0]))]));
    folder.write("2.safetensors", file(&[("b", "F32", f32s(&[4.0])), ("c", "F32", f32s(&[12.0]))]));
    let index = folder.write(INDEX, index);
    (folder, index)
}

/// Neither command takes the set, and the folder stays as it is.
#[track_caller]
fn refused((folder, index): (Folder, PathBuf), expected: &[&str]) {
    let out = Folder::new();
    let names = folder.names();
    let expected = [&[INDEX], expected].concat();
    gradclip(["norm", "--backend", "cpu", index.to_str().unwrap()]).failed(1, &expected);
    clip(&index, &out.path(INDEX), &["--max-norm", "1"]).failed(1, &expected);
    assert_eq!((folder.names(), out.names()), (names, vec![]));
}

#[test]
fn one_norm_over_all_shards() {
    let (_folder, index) = set(GOOD);
    let object = gradclip(["norm", index.to_str().unwrap(), "--json"]).succeeded().json();
    assert_eq!((&object["total_norm"], &object["tensors"]), (&13.0.into(), &3.into()));
}

#[test]
fn out_mirrors_the_set() {
    let (folder, index) = set(GOOD);
    let out = Folder::new();
    let name = "clipped.safetensors.index.json";
    let run = clip(&index, &out.path(name), &["--max-norm", "6.5", "--eps", "0"]).succeeded();
    assert!(run.stdout.contains("0.5"), "{run:?}");
    assert_eq!(out.names(), ["1.safetensors", "2.safetensors", name]);
    assert_eq!(out.read(name), folder.read(INDEX));
    assert_eq!(last_f32s(&out.read("1.safetensors"), 1), [1.5]);
    assert_eq!(last_f32s(&out.read("2.safetensors"), 2), [2.0, 6.0]);
    assert_eq!(last_f32s(&folder.read("2.safetensors"), 2), [4.0, 12.0]);

    // Again: nothing is replaced unless forced.
    out.write("2.safetensors", "mine");
    fs::remove_file(out.path(name)).unwrap();
    fs::remove_file(out.path("1.safetensors")).unwrap();
    clip(&index, &out.path(name), &["--max-norm", "1"]).failed(1, &["2.safetensors: exists already", "--force"]);
    assert_eq!((out.names(), out.read("2.safetensors")), (vec!["2.safetensors".to_owned()], b"mine".to_vec()));
    clip(&index, &out.path(name), &["--max-norm", "inf", "--force"]).succeeded();
    assert_eq!((out.names().len(), out.read("2.safetensors")), (3, folder.read("2.safetensors")));
}

#[test]
fn tensors_come_in_the_order_of_shard_names() {
    let folder = Folder::new();
    folder.write("z", file(&[("first", "F32", f32s(&[f32::NAN]))]));
    folder.write("y", file(&[("later", "F32", f32s(&[f32::NAN])), ("last", "F32", f32s(&[f32::NAN]))]));
    let index = folder.write(INDEX, r#"{"weight_map": {"first": "z", "last": "y", "later": "y"}}"#);
    let object = gradclip(["norm", index.to_str().unwrap(), "--json"]).succeeded().json();
    assert_eq!(object["non_finite"]["tensor"], "later");
}

#[test]
fn out_names() {
    let (folder, index) = set(GOOD);
    let names = folder.names();
    clip(&index, &folder.path("out.safetensors"), &["--max-norm", "1"])
        .failed(2, &["must end in .safetensors.index.json"]);
    let single = folder.path("1.safetensors");
    clip(&single, &folder.path("x.safetensors.index.json"), &["--max-norm", "1"]).failed(2, &["must not end in"]);
    // Beside the input, the shards would replace it.
    for force in [&["--max-norm", "1"][..], &["--max-norm", "1", "--force"]] {
        clip(&index, &folder.path("x.safetensors.index.json"), force).failed(2, &["1.safetensors", "own input"]);
        clip(&index, &index, force).failed(2, &["own input"]);
    }
    assert_eq!((folder.names(), folder.read(INDEX)), (names, GOOD.as_bytes().to_vec()));

    let (folder, index) = (Folder::new(), r#"{"weight_map": {"a": "a.safetensors.index.json"}}"#);
    folder.write("a.safetensors.index.json", file(&[("a", "F32", f32s(&[3.0]))]));
    let index = folder.write(INDEX, index);
    let out = Folder::new();
    let same = out.path("a.safetensors.index.json");
    clip(&index, &same, &["--max-norm", "1"]).failed(1, &["name of one of the shards"]);
    assert!(out.names().is_empty());
}

#[test]
fn a_failing_clip_leaves_no_shard() {
    let (folder, index) = set(GOOD);
    folder.write("2.safetensors", file(&[("b", "F32", f32s(&[f32::NAN])), ("c", "F32", f32s(&[12.0]))]));
    let out = Folder::new();
    clip(&index, &out.path(INDEX), &["--max-norm", "1"]).failed(3, &["tensor \"b\""]);
    assert!(out.names().is_empty());
}

#[test]
fn a_missing_shard() {
    let (folder, index) = set(GOOD);
    fs::remove_file(folder.path("2.safetensors")).unwrap();
    refused((folder, index), &["shard \"2.safetensors\" of tensor \"c\" is missing"]);
}

/// Not even where no file can have such a name.
#[test]
fn names_of_shards_cannot_forge_the_message() {
    let long = format!("\\u001b[31m{}", "x".repeat(300));
    for (name, shown) in [("1\\u0000", r#""1\0""#), (long.as_str(), r#""\u{1b}[31mxx"#)] {
        refused(set(&format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#)), &["cannot be opened", shown]);
    }
}

#[test]
fn a_damaged_shard() {
    let (folder, index) = set(GOOD);
    folder.write("2.safetensors", "short");
    let run = gradclip(["norm", index.to_str().unwrap()]);
    run.failed(1, &["2.safetensors: the file has 5 bytes"]);
}

#[test]
fn index_and_shards_must_agree() {
    let shards = |map: &str| set(&format!(r#"{{"weight_map": {{{map}}}}}"#));
    let (a, b, c) = (r#""a":"1.safetensors""#, r#""b":"2.safetensors""#, r#""c":"2.safetensors""#);
    refused(shards(&format!("{a},{b}")), &["tensor \"c\" of shard \"2.safetensors\" is missing from the index"]);
    let more = format!(r#"{a},{b},{c},"d":"1.safetensors""#);
    refused(shards(&more), &["tensor \"d\" into \"1.safetensors\", which does not hold it"]);
    let elsewhere = format!(r#"{a},{b},"c":"1.safetensors""#);
    refused(shards(&elsewhere), &["tensor \"c\" into \"1.safetensors\"", "\"2.safetensors\" holds it"]);
    refused(shards(&format!("{a},{b},{c},{a}")), &["tensor \"a\" twice"]);
}

#[test]
fn indexes_that_are_none() {
    for text in [
        "",
        "[]",
        "{}",
        r#"{"weight_map": 1}"#,
        r#"{"weight_map": {"a": 1}}"#,
        r#"{"weight_map": {}, "weight_map": {}}"#,
    ] {
        refused(set(text), &["not an index"]);
    }
}

#[test]
fn shards_outside_the_folder() {
    let (inside, _) = set(GOOD);
    let outside = inside.path("1.safetensors");
    fs::create_dir(inside.path("sub")).unwrap();
    let escapes = [
        "../1.safetensors",
        "sub/../1.safetensors",
        "./1.safetensors",
        "sub/1.safetensors",
        "1.safetensors/",
        "..",
        ".",
        "",
        "/",
    ];
    for shard in escapes.into_iter().chain([outside.to_str().unwrap()]) {
        let index = serde_json::json!({ "weight_map": { "a": shard } }).to_string();
        refused(set(&index), &["tensor \"a\"", "must be the name of a file in the index's folder"]);
    }
}

#[cfg(unix)]
#[test]
fn links_that_leave_the_folder() {
    use std::os::unix::fs::symlink;
    let (elsewhere, _) = set(GOOD);
    let (folder, index) = set(GOOD);
    fs::remove_file(folder.path("1.safetensors")).unwrap();
    symlink(elsewhere.path("1.safetensors"), folder.path("1.safetensors")).unwrap();
    refused((folder, index), &["\"1.safetensors\" of tensor \"a\" is a link that leaves the index's folder", "cp -L"]);

    // Within the folder a link is welcome, and the folder itself may be reached through one.
    let (folder, _) = set(GOOD);
    fs::rename(folder.path("1.safetensors"), folder.path("one")).unwrap();
    symlink("one", folder.path("1.safetensors")).unwrap();
    let link = Folder::new();
    symlink(folder.path(""), link.path("link")).unwrap();
    gradclip(["norm", link.path("link").join(INDEX).to_str().unwrap(), "--json"]).succeeded();
}

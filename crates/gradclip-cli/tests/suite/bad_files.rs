//! Truncated and hostile files: one clear error, and nothing is written.

use std::fs::File;
use std::io::Write;

use crate::common::{EXAMPLE, Folder, clip, f32s, file, gradclip, raw};

/// Checks that neither command accepts the file, and that both messages contain these texts.
#[track_caller]
fn refused(bytes: &[u8], expected: &[&str]) {
    let folder = Folder::new();
    let bad = folder.write("bad.safetensors", bytes);
    let expected = [&["bad.safetensors"], expected].concat();
    gradclip(["norm", "--backend", "cpu", bad.to_str().unwrap()]).failed(1, &expected);
    clip(&bad, &folder.path("out.safetensors"), &["--max-norm", "1"]).failed(1, &expected);
    assert_eq!(folder.names(), ["bad.safetensors"]);
    assert_eq!(folder.read("bad.safetensors"), bytes);
}

/// Two float32 tensors of two elements, with the offsets given.
fn two(a: [u64; 2], b: [u64; 2], data: usize) -> Vec<u8> {
    let header = format!(
        r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a:?}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{b:?}}}}}"#
    );
    raw(&header, &vec![0; data])
}

fn one(tensor: &str, data: usize) -> Vec<u8> {
    raw(&format!(r#"{{"a":{tensor}}}"#), &vec![0; data])
}

#[test]
fn the_builders_make_good_files() {
    let folder = Folder::new();
    let good = folder.write("good", two([0, 8], [8, 16], 16));
    gradclip(["norm", "--backend", "cpu", good.to_str().unwrap()]).succeeded();
}

#[test]
fn every_truncation() {
    let whole = file(&[("a", "F32", f32s(&[1.0, 2.0])), ("b", "F32", f32s(&[3.0]))]);
    for length in 0..whole.len() {
        refused(&whole[..length], &["truncated"]);
    }
    let example = std::fs::read(EXAMPLE).unwrap();
    refused(&example[..example.len() - 1], &["truncated", "tensor \""]);
}

#[test]
fn header_lengths() {
    refused(b"", &["0 bytes", "too few"]);
    refused(&[&u64::MAX.to_le_bytes(), "{}".as_bytes()].concat(), &["claims 18446744073709551615", "only 2 follow"]);
    refused(&[&3u64.to_le_bytes(), "{}".as_bytes()].concat(), &["claims 3", "only 2 follow"]);
    refused(&raw("", b""), &["not valid JSON"]);

    let folder = Folder::new();
    let mut huge = File::create(folder.path("huge")).unwrap();
    huge.write_all(&100_000_001u64.to_le_bytes()).unwrap();
    huge.set_len(100_000_100).unwrap();
    gradclip(["norm", folder.path("huge").to_str().unwrap()]).failed(1, &["claims 100000001", "allows"]);
}

#[test]
fn headers_that_are_not_json_objects() {
    refused(&raw("{", b""), &["not valid JSON"]);
    refused(&raw("[]", b""), &["not valid JSON"]);
    refused(&raw("{} {}", b""), &["not valid JSON"]);
    refused(&[&4u64.to_le_bytes()[..], b"{\"\xff\"", b""].concat(), &["not valid JSON"]);
    refused(&raw(&"{\"a\":".repeat(100_000), b""), &["not valid JSON"]);
    refused(b"{\"weight_map\": {}}", &["not a safetensors file"]);
}

#[test]
fn offsets() {
    refused(&two([0, 8], [4, 12], 12), &["\"a\" and \"b\" overlap at byte 4"]);
    refused(&two([0, 8], [0, 8], 8), &["overlap at byte 0"]);
    refused(&two([8, 0], [8, 16], 16), &["tensor \"a\"", "before it starts"]);
    refused(&two([0, 8], [8, 16], 15), &["tensor \"b\"", "ends at byte 16", "only 15"]);
    refused(&two([0, 8], [12, 20], 20), &["bytes 8..12", "before tensor \"b\""]);
    refused(&two([4, 12], [12, 20], 20), &["bytes 0..4", "before tensor \"a\""]);
    refused(&two([0, 8], [8, 16], 17), &["last 1 bytes"]);
    refused(
        &one(r#"{"dtype":"F32","shape":[],"data_offsets":[0,18446744073709551615]}"#, 4),
        &["tensor \"a\"", "ends at"],
    );
    refused(
        &one(r#"{"dtype":"F32","shape":[],"data_offsets":[-4,0]}"#, 4),
        &["tensor \"a\"", "its description is invalid"],
    );
}

#[test]
fn shapes() {
    refused(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4), &["tensor \"a\"", "[2] of F32", "4 bytes"]);
    refused(&one(r#"{"dtype":"BF16","shape":[],"data_offsets":[0,3]}"#, 3), &["tensor \"a\"", "does not fit"]);
    let overflow = r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#;
    refused(&one(overflow, 0), &["tensor \"a\"", "does not fit"]);
    // 2^61 elements of 64 bits: 0 modulo 2^64.
    let wraps = r#"{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}"#;
    refused(&one(wraps, 0), &["tensor \"a\"", "does not fit"]);
    refused(
        &one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4),
        &["tensor \"a\"", "its description is invalid"],
    );
}

/// The product of its sizes is 0, whatever the others are.
#[test]
fn a_tensor_without_elements_may_have_any_shape() {
    let folder = Folder::new();
    let tensor = one(r#"{"dtype":"F64","shape":[2305843009213693952,0],"data_offsets":[0,0]}"#, 0);
    let file = folder.write("empty.safetensors", tensor);
    gradclip(["norm", "--backend", "cpu", file.to_str().unwrap()]).succeeded();
}

#[test]
fn descriptions() {
    refused(&one(r#"{"shape":[1],"data_offsets":[0,4]}"#, 4), &["tensor \"a\"", "dtype"]);
    refused(&one(r#"{"dtype":"F32","shape":[1]}"#, 4), &["tensor \"a\"", "data_offsets"]);
    refused(&one("null", 4), &["tensor \"a\"", "its description is invalid"]);
    // Which of the two would count?
    refused(
        &one(r#"{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}"#, 4),
        &["tensor \"a\"", "duplicate"],
    );
}

#[test]
fn dtypes() {
    refused(&one(r#"{"dtype":"F31","shape":[1],"data_offsets":[0,4]}"#, 4), &["tensor \"a\"", "\"F31\""]);
    // To pass it on unclipped would be silent damage, and to convert it to float32 would lose its imaginary part.
    let complex = one(r#"{"dtype":"C64","shape":[1],"data_offsets":[0,8]}"#, 8);
    refused(&complex, &["tensor \"a\" is complex", "real and imaginary parts", "view_as_real"]);
}

#[test]
fn duplicate_names() {
    let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    refused(&raw(&format!(r#"{{"a":{entry},"a":{entry}}}"#), &[0; 4]), &["tensor \"a\" twice"]);
    // The same name, spelt otherwise.
    refused(&raw(&format!(r#"{{"a":{entry},"\u0061":{entry}}}"#), &[0; 4]), &["tensor \"a\" twice"]);
}

/// What is written has the metadata of what was read: other readers must take it.
#[test]
fn metadata_that_no_other_reader_accepts() {
    for metadata in ["5", "[]", r#"{"a":1}"#, r#"{"a":{"b":"c"}}"#] {
        refused(
            &raw(&format!(r#"{{"__metadata__":{metadata}}}"#), b""),
            &["\"__metadata__\"", "must be an object of strings"],
        );
    }
}

#[test]
fn names_cannot_forge_the_message() {
    let header = r#"{"a\nerror: \u001b[31m":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#;
    refused(&raw(header, &[0; 4]), &[r#""a\nerror: \u{1b}[31m""#]);
}

#[test]
fn not_files() {
    let folder = Folder::new();
    for (what, expected) in
        [(folder.path(""), "regular"), (folder.path("missing"), "cannot open"), ("/dev/zero".into(), "regular")]
    {
        gradclip(["norm", what.to_str().unwrap()]).failed(1, &[expected]);
        clip(&what, &folder.path("out"), &["--max-norm", "1"]).failed(1, &[expected]);
    }
    assert!(folder.names().is_empty());
}

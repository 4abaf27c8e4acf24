//! A Hugging Face cache: every file of a snapshot is a link into the folder of blobs. Links that leave the folder of the
//! repository are refused.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::common::{Folder, clip, f32s, file, gradclip, last_f32s, text};

const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// Adds a repository with a set of norm 5 (a = 3, b = 4) to a cache; returns the folder of the set.
pub(crate) fn repository(cache: &Folder, name: &str, below: &str) -> PathBuf {
    let set = cache.path(name).join("snapshots/0f3a").join(below);
    let blobs = cache.path(name).join("blobs");
    fs::create_dir_all(&set).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    let index = format!(r#"{{"weight_map": {{"a": "{}", "b": "{}"}}}}"#, SHARDS[0], SHARDS[1]);
    let [a, b] = [("a", 3.0), ("b", 4.0)].map(|(name, value)| file(&[(name, "F32", f32s(&[value]))]));
    let up = if below.is_empty() { "../../" } else { "../../../" };
    for (name, hash, bytes) in [(INDEX, "1a", index.into()), (SHARDS[0], "2b", a), (SHARDS[1], "3c", b)] {
        fs::write(blobs.join(hash), bytes).unwrap();
        symlink(format!("{up}blobs/{hash}"), set.join(name)).unwrap();
    }
    set
}

#[test]
fn a_set_is_measured_clipped_and_taken_as_parameters() {
    for (name, below) in [("models--org--name", ""), ("datasets--org--name", ""), ("spaces--org--name", "unet")] {
        let (cache, out, by_agc) = (Folder::new(), Folder::new(), Folder::new());
        let set = repository(&cache, name, below);
        let index = set.join(INDEX);
        assert_eq!(gradclip(["norm", "--quiet", text(&index)]).succeeded().stdout, "5\n");
        clip(&index, &out.path(INDEX), &["--max-norm", "2.5", "--eps", "0", "--quiet"]).succeeded();
        clip(&index, &by_agc.path(INDEX), &["--agc", "0.5", "--params", text(&index), "--quiet"]).succeeded();
        for out in [out, by_agc] {
            assert_eq!(out.names(), [SHARDS[0], SHARDS[1], INDEX]);
            assert!(out.names().iter().all(|name| !out.path(name).is_symlink()));
            assert_eq!(SHARDS.map(|shard| last_f32s(&out.read(shard), 1)), [[1.5], [2.0]]);
        }
        assert_eq!(last_f32s(&fs::read(set.join(SHARDS[0])).unwrap(), 1), [3.0]);
    }
}

#[test]
fn a_single_file_and_a_cache_behind_a_link() {
    let (cache, out) = (Folder::new(), Folder::new());
    let shard = repository(&cache, "models--org--name", "").join(SHARDS[0]);
    assert_eq!(gradclip(["norm", "--quiet", text(&shard)]).succeeded().stdout, "3\n");
    clip(&shard, &out.path("out"), &["--max-norm", "1", "--eps", "0"]).succeeded();
    assert_eq!(last_f32s(&out.read("out"), 1), [1.0]);

    symlink(cache.path(""), out.path("hub")).unwrap();
    let index = out.path("hub/models--org--name/snapshots/0f3a").join(INDEX);
    assert_eq!(gradclip(["norm", "--quiet", text(&index)]).succeeded().stdout, "5\n");
}

#[test]
fn a_link_that_leaves_the_repository() {
    let (cache, outside, out) = (Folder::new(), Folder::new(), Folder::new());
    let set = repository(&cache, "models--org--name", "");
    repository(&cache, "models--org--name2", "");
    cache.write("beside", "");
    let outside = outside.write("outside", "");
    for target in [text(&outside), "../../../beside", "../../../models--org--name2/blobs/2b"] {
        fs::remove_file(set.join(SHARDS[0])).unwrap();
        symlink(target, set.join(SHARDS[0])).unwrap();
        assert!(set.join(SHARDS[0]).exists(), "{target}");
        let expected = [SHARDS[0], "leaves the index's folder", "Hugging Face cache", "cp -L"];
        gradclip(["norm", text(&set.join(INDEX))]).failed(1, &expected);
        clip(&set.join(INDEX), &out.path(INDEX), &["--max-norm", "1"]).failed(1, &expected);
        assert!(out.names().is_empty());
    }
}

/// Only the snapshots of a cache are made of links.
#[test]
fn folders_that_only_look_like_a_cache() {
    for (from, to) in [("models--a/snapshots", "models--a/copies"), ("models--a", "model")] {
        let cache = Folder::new();
        let set = repository(&cache, "models--a", "");
        fs::rename(cache.path(from), cache.path(to)).unwrap();
        let set = text(&set).replace(from, to);
        gradclip(["norm", &format!("{set}/{INDEX}")]).failed(1, &["leaves the index's folder"]);
    }
}

//! Guards against `unsafe` that is not listed: docs/TESTING.md lists exactly the files that have any, and every crate
//! has the lints that ask for a proof beside each block.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below these folders with this name or ending.
fn files(ends_with: &str) -> Vec<PathBuf> {
    let mut folders: Vec<_> = ["src", "crates", "tests", "benches", "examples", "fuzz"].map(PathBuf::from).into();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).expect("a folder of the workspace") {
            let entry = entry.expect("readable");
            let (name, path) = (entry.file_name(), folder.join(entry.file_name()));
            if entry.file_type().expect("readable").is_dir() {
                // What is built lies here.
                if name != "target" {
                    folders.push(path);
                }
            } else if name.to_string_lossy().ends_with(ends_with) {
                found.push(path);
            }
        }
    }
    found
}

/// Whether a source file has the keyword outside of comments.
fn has_unsafe(path: &Path) -> bool {
    let keyword = concat!("un", "safe");
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let text = fs::read_to_string(root().join(path)).expect("readable");
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    code.flat_map(|code| code.split(|c| !is_name(c))).any(|word| word == keyword)
}

/// The files and folders in the first column of the table below the heading.
fn inventory() -> Vec<PathBuf> {
    let text = fs::read_to_string(root().join("docs/TESTING.md")).expect("readable");
    let (_, section) = text.split_once(concat!("\n## `un", "safe`\n")).expect("the heading");
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let mut found = Vec::new();
    for row in rows {
        let cell = row.trim_start_matches('|').split('|').next().unwrap_or_default();
        let mut folder = PathBuf::new();
        for name in cell.split('`').skip(1).step_by(2) {
            // Without a folder it lies beside the one before.
            let path = if name.contains('/') { PathBuf::from(name) } else { folder.join(name) };
            folder = path.parent().expect("a folder").to_owned();
            found.push(path);
        }
    }
    found
}

#[test]
fn every_file_with_unsafe_code_is_in_the_inventory_and_no_other() {
    let listed = inventory();
    let with: BTreeSet<_> = files(".rs").into_iter().filter(|path| has_unsafe(path)).collect();
    assert!(with.contains(Path::new("src/cpu/pool.rs")), "the search finds nothing: {with:?}");
    for path in &with {
        assert!(listed.iter().any(|known| path.starts_with(known)), "{} is not in docs/TESTING.md", path.display());
    }
    for known in &listed {
        assert!(with.iter().any(|path| path.starts_with(known)), "{} has none, or is gone", known.display());
    }
    println!("inventory: {} files, all listed", with.len());
}

#[test]
fn every_crate_asks_for_proofs() {
    let text = |path: &Path| fs::read_to_string(root().join(path)).expect("readable");
    let workspace = text(Path::new("Cargo.toml"));
    assert!(workspace.contains("unsafe_op_in_unsafe_fn = \"deny\"\n"));
    assert!(workspace.contains("undocumented_unsafe_blocks = \"warn\"\n"));
    let manifests: Vec<_> = files("Cargo.toml").into_iter().chain([PathBuf::from("Cargo.toml")]).collect();
    assert!(manifests.len() >= 4, "{manifests:?}");
    for manifest in manifests {
        // Fuzzing is a workspace of its own.
        let asks = if manifest.starts_with("fuzz") {
            text(&manifest).contains("unsafe_code = \"deny\"\n")
        } else {
            text(&manifest).contains("[lints]\nworkspace = true\n")
        };
        assert!(asks, "{}", manifest.display());
    }
}

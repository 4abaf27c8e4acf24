//! A dependency under a licence that nobody agreed to: everything that is built on this platform, in every crate and with
//! every feature, has one that `deny.toml` allows. `scripts/deny.sh` looks at the other platforms as well.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The licences in `deny.toml`.
fn allowed(manifest: &str) -> Vec<&str> {
    let (_, list) = manifest.split_once("\nallow = [").expect("a list of licences");
    let list = list.split(']').next().unwrap_or_default();
    list.split('"').skip(1).step_by(2).collect()
}

/// Whether an SPDX expression can be met. Old manifests write `/` for OR. What comes with an exception is not taken.
fn is_met(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let met = any_of(&mut words, allowed);
    met && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any_of(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    let mut met = all_of(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        met |= all_of(words, allowed);
    }
    met
}

fn all_of(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    let mut met = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words, allowed);
    }
    met
}

fn one(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    match words.next() {
        Some("(") => any_of(words, allowed) & (words.next() == Some(")")),
        Some(name) => {
            let plain = words.next_if_eq(&"WITH").and_then(|_| words.next()).is_none();
            plain && allowed.contains(&name)
        }
        None => false,
    }
}

#[test]
fn every_dependency_has_a_licence_that_is_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = std::fs::read_to_string(root.join("deny.toml")).expect("readable");
    let allowed = allowed(&manifest);
    let rustc = Command::new("rustc").args(["--print", "host-tuple"]).output().expect("rustc runs");
    let host = String::from_utf8(rustc.stdout).expect("text");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root).args(["metadata", "--format-version=1", "--locked", "--offline", "--all-features"]);
    let output = cargo.args(["--filter-platform", host.trim()]).output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("a list");
    let licence = |package: &Value| package["license"].as_str().unwrap_or("none").to_owned();
    let refused: Vec<_> =
        packages.iter().filter(|p| !is_met(&licence(p), &allowed)).map(|p| (&p["name"], licence(p))).collect();
    assert!(refused.is_empty(), "{refused:?}");
    assert!(packages.len() > 50, "cargo names {} packages only", packages.len());
    println!("licences: {} packages, all under one of {}", packages.len(), allowed.join(", "));
}

#[test]
fn expressions_mean_what_spdx_says() {
    let allowed = ["MIT", "Zlib"];
    for met in
        ["MIT", "GPL-3.0 OR MIT", "GPL-3.0/MIT", "(GPL-3.0 OR MIT) AND Zlib", "X WITH Y OR MIT", "X AND Z OR MIT"]
    {
        assert!(is_met(met, &allowed), "{met}");
    }
    for refused in ["", "none", "GPL-3.0", "MIT AND GPL-3.0", "(MIT", "MIT)", "MIT WITH X", "(MIT OR Zlib) AND X"] {
        assert!(!is_met(refused, &allowed), "{refused}");
    }
}

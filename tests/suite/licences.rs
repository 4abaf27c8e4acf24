//! Guards against a dependency under a licence that the project does not allow: everything that is built on this
//! platform, in every crate and with every feature, needs one in `deny.toml`. `scripts/deny.sh` also checks the other
//! platforms.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

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

/// The expressions in `deny.toml` that a crate may have beside those.
fn excepted<'a>(manifest: &'a str, name: &str) -> Vec<&'a str> {
    let of_crate = format!("crate = \"{name}\"");
    let line = manifest.lines().find(|line| line.contains(&of_crate) && line.contains("allow = ["));
    let list = line.and_then(|line| line.split(['[', ']']).nth(1)).unwrap_or_default();
    list.split('"').skip(1).step_by(2).collect()
}

#[test]
fn every_dependency_has_a_licence_that_is_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = std::fs::read_to_string(root.join("deny.toml")).expect("readable");
    let allowed = allowed(&manifest);
    let mut cargo = Command::new(env!("CARGO"));
    // What is built, where `cargo metadata` also tells what features that are off would need. Cargo fetches what no other
    // test has needed.
    cargo.current_dir(root).args(["tree", "--workspace", "--all-features", "--locked", "--prefix=none"]);
    let output = cargo.arg("--format={p}|{l}").output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).expect("text");
    let lines = tree.lines().filter(|line| !line.is_empty()).map(|line| line.trim_end_matches(" (*)"));
    let packages: BTreeSet<(&str, &str)> = lines.map(|line| line.split_once('|').expect("as asked")).collect();
    let is_fine = |(package, licence): &&(&str, &str)| {
        let name = package.split_whitespace().next().unwrap_or_default();
        is_met(licence, &allowed) || excepted(&manifest, name).contains(licence)
    };
    let refused: Vec<_> = packages.iter().filter(|package| !is_fine(package)).collect();
    assert!(refused.is_empty(), "{refused:?}");
    assert!(packages.len() > 50, "cargo names {} packages only", packages.len());
    println!("licences: {} packages, all under licences of deny.toml: {}", packages.len(), allowed.join(", "));
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

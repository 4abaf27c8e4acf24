//! Guards against a promise without a test: docs/RELIABILITY.md names for each promise its tests and when they run.
//! Each of them must exist and run then, and every file of tests must be named.

use std::fs;
use std::path::{Path, PathBuf};

/// Where a test stands that the page names without a path.
const FOLDERS: [&str; 3] = ["tests", "tests/suite", "crates/gradclip-cli/tests/suite"];

/// What `.ci/run` tests only if it differs from what has passed.
const OWN_CHANGES: [&str; 3] = ["crates/gradclip-burn", "crates/gradclip-candle", "src/cpu/tests/instructions.rs"];

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn exists(path: &str) -> bool {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists()
}

/// The cells of each row that says in its last one when its tests run.
fn promises(page: &str) -> Vec<Vec<&str>> {
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let cells = rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
    cells.filter(|cells| ["each change", "its changes", "by night"].contains(&cells[cells.len() - 1])).collect()
}

/// What stands in backticks.
fn names(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The file or folder of the test that the page names so.
fn place(name: &str) -> String {
    let (file, test) = name.split_once("::").unwrap_or((name, ""));
    let place = if file.contains('/') {
        file.to_owned()
    } else {
        let candidates = FOLDERS.map(|folder| format!("{folder}/{file}.rs"));
        let found = candidates.iter().find(|path| exists(path));
        found.unwrap_or_else(|| panic!("no file of tests is called {file}")).clone()
    };
    assert!(exists(&place), "{place} does not exist");
    if !test.is_empty() {
        assert!(read(&place).contains(&format!("fn {test}")), "{place} has no test {test}");
    }
    if place.ends_with(".rs") && !place.contains("/ranks") {
        assert!(read(&place).contains("#[test]") || place.contains("src/"), "{place} has no test");
    }
    place
}

/// When the tests of a name run.
fn when(name: &str, each_change: &str, by_night: &str) -> &'static str {
    if let Some(command) = name.strip_prefix("scripts/") {
        let script = command.split(' ').next().unwrap_or_default();
        assert!(exists(&format!("scripts/{script}")), "scripts/{script} does not exist");
        let line = format!("scripts/{command}\n");
        if each_change.contains(&line) {
            return "each change";
        }
        let part = command.rsplit([' ', '/']).next().unwrap_or_default().trim_end_matches(".sh");
        assert!(by_night.contains(&format!("scripts/{command}")) || by_night.contains(part), "nothing runs {name}");
        return "by night";
    }
    let place = place(name);
    if OWN_CHANGES.iter().any(|path| place.starts_with(path)) { "its changes" } else { "each change" }
}

#[test]
fn what_holds_each_promise_exists_and_runs_when_the_page_says() {
    let page = read("docs/RELIABILITY.md");
    let (each_change, by_night) = (read(".ci/run"), read("scripts/nightly.sh"));
    let promises = promises(&page);
    assert!(promises.len() > 50, "{} promises: the search does not find the tables", promises.len());
    for row in &promises {
        let [.., held_by, said] = row[..] else { panic!("too few cells: {row:?}") };
        let runs: Vec<_> = names(held_by).map(|name| when(name, &each_change, &by_night)).collect();
        assert!(!runs.is_empty(), "nothing holds: {}", row[0]);
        // Held on each change if one of them runs then.
        let soonest = if runs.contains(&"each change") { "each change" } else { runs[0] };
        assert_eq!(said, soonest, "{}", row[0]);
    }
}

/// The files with tests of their own in the folders of tests, as the page may name them.
fn test_files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).expect("a folder of tests") {
            let path = entry.expect("readable").path();
            if path.extension().is_some_and(|end| end == "rs")
                && path.file_stem().is_some_and(|name| name != "main" && name != "common")
            {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn every_file_of_tests_holds_a_promise() {
    let page = read("docs/RELIABILITY.md");
    let named: Vec<_> = promises(&page)
        .iter()
        .flat_map(|row| names(row[row.len() - 2]).map(place_or_script).collect::<Vec<_>>())
        .collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in test_files() {
        assert!(
            named.iter().any(|place| root.join(place) == file),
            "docs/RELIABILITY.md does not name {}",
            file.display()
        );
    }
}

fn place_or_script(name: &str) -> String {
    if name.starts_with("scripts/") { name.to_owned() } else { place(name) }
}

#[test]
fn the_counted_table_is_of_the_night_and_has_no_failure() {
    let (page, nightly) = (read("docs/RELIABILITY.md"), read("scripts/nightly.sh"));
    let list = |name: &str| {
        let (_, rest) = nightly.split_once(&format!("\n{name}=(")).unwrap_or_else(|| panic!("a list called {name}"));
        rest.split(')').next().unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let parts = [list("rows"), list("parts").split_off(1)].concat();
    let (_, table) = page.split_once("<!-- nightly -->\n").expect("the table begins");
    let table = table.split("<!-- end of nightly -->").next().unwrap_or_default();
    for row in table.lines().skip(2) {
        let part = row.trim_start_matches("| ").split(' ').next().unwrap_or_default();
        assert!(parts.iter().any(|known| known == part), "scripts/nightly.sh has no part {part}");
        let mut failures =
            row.match_indices(" failed").map(|(end, _)| row[..end].rsplit(' ').next().unwrap_or_default());
        assert!(failures.all(|count| count == "0"), "{row}");
    }
}

//! What the unit tests of both crates include: a target run on each case of its corpus.

use std::fs;
use std::path::Path;

/// `root` is the repository's folder, as the crate knows it.
pub(crate) fn replay(root: &str, name: &str, target: fn(&[u8])) {
    let folder = Path::new(root).join("fuzz/corpus").join(name);
    let files = fs::read_dir(&folder).expect("there is a corpus");
    let mut cases: Vec<_> = files.map(|file| file.expect("readable").path()).collect();
    cases.sort();
    assert!(cases.len() >= 10, "{} cases in {}", cases.len(), folder.display());
    for case in &cases {
        println!("{}", case.display());
        target(&fs::read(case).expect("readable"));
    }
}

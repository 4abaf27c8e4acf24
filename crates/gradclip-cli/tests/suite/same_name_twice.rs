//! A tensor that is given twice, as by a pattern that fits a set and its merged file: the norm counts both, and says so.

use crate::common::{Folder, f32s, file, gradclip, text};

#[test]
fn a_tensor_in_two_files_is_told() {
    let folder = Folder::new();
    let [a, b, c, n] = ["a", "b", "c", "n"].map(|name| (name, "F32", f32s(&[2.0])));
    let steps = ("steps", "I64", vec![0; 8]);
    let first = folder.write("1", file(&[a.clone(), b.clone(), steps.clone()]));
    let second = folder.write("2", file(&[n, b, a, steps]));
    let third = folder.write("3", file(&[c]));
    let norm = |files: [&std::path::Path; 2], more: &[&str]| {
        gradclip([&["norm", "--backend", "cpu"], &files.map(text)[..], more].concat())
    };
    let run = norm([&first, &second], &[]);
    let (one, two) = (text(&first), text(&second));
    let told = format!("warning: 2 tensors counted more than once, the first \"b\" in {one} and in {two}\n");
    assert_eq!((run.code, run.stderr), (Some(0), told.clone()));
    assert!(run.stdout.contains("in 5 tensors"), "{}", run.stdout);
    assert_eq!(norm([&first, &second], &["--json"]).stderr, told);
    norm([&first, &second], &["--quiet"]).succeeded();
    // Integers are no gradients, and other names are other tensors.
    norm([&first, &third], &[]).succeeded();
}

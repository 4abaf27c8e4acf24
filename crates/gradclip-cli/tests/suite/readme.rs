//! The commands that the README shows, on the file that the repository ships.

use std::path::Path;

use crate::common::{EXAMPLE, fixture, gradclip};

const README: &str = include_str!("../../../../README.md");

fn run(command: &str, folder: &Path) {
    let words = command.split('#').next().unwrap_or_default().split_whitespace();
    let words: Vec<String> = words
        .map(|word| match word {
            // Its own gradients will do for parameters.
            "grads.safetensors" | "params.safetensors" | "examples/data/lstm_grads.safetensors" => EXAMPLE.into(),
            "per_example.safetensors" => fixture("inputs/per_example_f32.safetensors").display().to_string(),
            _ if word.ends_with(".safetensors") || word.ends_with(".svg") => folder.join(word).display().to_string(),
            _ => word.into(),
        })
        .collect();
    let run = gradclip(&words);
    assert_eq!(run.code, Some(0), "{command}: {}", run.stderr);
}

#[test]
fn every_command_of_the_readme_works() {
    let folder = tempfile::tempdir().unwrap();
    let mut commands = 0;
    for line in README.lines() {
        let first = line.strip_prefix("cargo run --release -- ");
        if let Some(command) = first.or_else(|| line.strip_prefix("gradclip ")) {
            // Without the feature there is no GPU to list or to verify.
            if cfg!(feature = "gpu") || !(command.starts_with("verify") || command.starts_with("devices")) {
                run(command, folder.path());
            }
            commands += 1;
        }
    }
    assert!(commands >= 5, "{commands}");
    for name in ["clipped.safetensors", "out.safetensors"] {
        assert!(folder.path().join(name).is_file());
    }
}

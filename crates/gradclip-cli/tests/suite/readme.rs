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

#[test]
fn the_readme_shows_what_is_printed() {
    let (_, block) = README.split_once("```console\n$ gradclip ").expect("a block of what is printed");
    let (command, shown) = block.split_once('\n').expect("a command");
    let shown = shown.split("\n```").next().unwrap_or_default();
    let folder = tempfile::tempdir().unwrap();
    let words = command.split_whitespace().map(|word| match word {
        _ if word.starts_with("examples/") => concat!(env!("CARGO_MANIFEST_DIR"), "/../../").to_owned() + word,
        _ if word.ends_with(".svg") => folder.path().join(word).display().to_string(),
        _ => word.to_owned(),
    });
    let run = gradclip(words.chain(["--backend", "cpu", "--threads", "2"].map(str::to_owned)));
    // Which differ from run to run.
    let lasting = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with("time ") && !line.starts_with("plot "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(lasting(&run.stdout), lasting(shown), "{}", run.stderr);
}

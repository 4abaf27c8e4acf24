//! OUT appears whole or not at all, never over what must not be lost, and without a trace of failed attempts.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::process::Command;

use common::{EXAMPLE, Folder, clip, f32s, file};

const MODE: [&str; 2] = ["--max-norm", "0.2"];

fn example() -> (Folder, PathBuf) {
    let folder = Folder::new();
    let input = folder.write("in", fs::read(EXAMPLE).unwrap());
    (folder, input)
}

#[test]
fn an_existing_file_stays_without_force() {
    let (folder, input) = example();
    let out = folder.write("out", "mine");
    clip(&input, &out, &MODE).failed(1, &["out: exists already", "--force"]);
    assert_eq!((folder.names(), folder.read("out")), (vec!["in".into(), "out".into()], b"mine".to_vec()));
    clip(&input, &out, &[&MODE[..], &["--force"]].concat()).succeeded();
    assert_eq!((folder.names().len(), folder.read("out").len()), (2, folder.read("in").len()));
}

#[test]
fn force_replaces_nothing_when_the_clip_fails() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[f32::NAN]))]));
    let out = folder.write("out", "mine");
    clip(&input, &out, &["--max-norm", "1", "--force"]).failed(3, &["non-finite"]);
    assert_eq!((folder.names(), folder.read("out")), (vec!["in".into(), "out".into()], b"mine".to_vec()));
}

#[test]
fn the_input_is_never_the_output() {
    let (folder, input) = example();
    let before = folder.read("in");
    fs::hard_link(&input, folder.path("hard")).unwrap();
    let mut aliases = vec![input.clone(), folder.path("./in"), folder.path("hard")];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&input, folder.path("soft")).unwrap();
        aliases.push(folder.path("soft"));
    }
    let names = folder.names();
    for out in aliases {
        for force in [&[][..], &["--force"]] {
            clip(&input, &out, &[&MODE[..], force].concat()).failed(2, &["own input", "choose another OUT"]);
            assert_eq!((folder.names(), folder.read("in")), (names.clone(), before.clone()));
        }
    }
}

#[test]
fn places_that_cannot_be_written() {
    let (folder, input) = example();
    fs::create_dir(folder.path("sub")).unwrap();
    let names = folder.names();
    let mut cases = vec![
        (folder.path("none/out"), "not a folder"),
        (folder.path("in/out"), "not a folder"),
        (folder.path("sub"), "a folder: OUT must name a file"),
    ];
    if cfg!(target_os = "linux") {
        cases.push(("/proc/out".into(), "/proc/out: cannot write"));
        // Replacing a device by a file would harm the whole machine.
        cases.push(("/dev/null".into(), "/dev/null: not a regular file"));
    }
    for (out, says) in cases {
        clip(&input, &out, &[&MODE[..], &["--force"]].concat()).failed(1, &[says]);
        assert_eq!(folder.names(), names);
    }
    clip(&input, &folder.path(".."), &MODE).failed(2, &["must name a file"]);
}

/// Nothing of OUT is begun before the gradients were measured: here it could not be.
#[cfg(target_os = "linux")]
#[test]
fn the_decision_comes_before_the_first_byte() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[f32::NAN]))]));
    clip(&input, "/proc/out".as_ref(), &["--max-norm", "1"]).failed(3, &["non-finite"]);
    clip(&input, "/proc/out".as_ref(), &["--clip-value", "1"]).failed(1, &["/proc/out: cannot write"]);
}

/// A link that leads nowhere is in the way, too.
#[cfg(unix)]
#[test]
fn a_dangling_link_stays_without_force() {
    let (folder, input) = example();
    std::os::unix::fs::symlink(folder.path("gone"), folder.path("out")).unwrap();
    clip(&input, &folder.path("out"), &MODE).failed(1, &["exists already"]);
    assert_eq!(folder.names(), ["in", "out"]);
}

#[cfg(unix)]
#[test]
fn permissions_are_those_of_a_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let (folder, input) = example();
    clip(&input, &folder.path("out"), &MODE).succeeded();
    let usual = folder.write("usual", "");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&folder.path("out")), mode(&usual));
}

/// The disk is full: here, files may not grow past 64 KiB.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing() {
    let (folder, input) = example();
    let script = r#"trap '' XFSZ; ulimit -f 64; exec "$0" clip "$1" -o "$2" --max-norm 1 --backend cpu"#;
    let mut command = Command::new("bash");
    command.args(["-c", script, env!("CARGO_BIN_EXE_gradclip")]).args([&input, &folder.path("out")]);
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains("out: cannot write"), "{stderr}");
    assert_eq!(folder.names(), ["in"]);
}

/// Ctrl-C while OUT is being written.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing() {
    let (folder, input) = (Folder::new(), 256 << 20);
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{input}]}}}}"#, input / 4);
    let path = folder.write("in", common::raw(&header, b""));
    // Sparse: only the writing takes time.
    fs::File::options().write(true).open(&path).unwrap().set_len(8 + header.len() as u64 + input).unwrap();
    let mut codes = Vec::new();
    // On a busy machine OUT may be finished before the interrupt comes.
    while codes.last() != Some(&Some(130)) && codes.len() < 5 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradclip"));
        command.arg("clip").arg(&path).arg("-o").arg(folder.path("out")).args(["--max-norm", "1", "--force", "-q"]);
        let _ = fs::remove_file(folder.path("out"));
        let mut child = command.args(["--backend", "cpu"]).spawn().unwrap();
        while folder.names().len() == 1 {
            assert!(child.try_wait().unwrap().is_none(), "it ended without writing");
            std::thread::yield_now();
        }
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        codes.push(child.wait().unwrap().code());
        // Whole or not at all, and no temporary file; an interrupt after the rename finds the former.
        let names = folder.names();
        assert!(names == ["in"] || names == ["in", "out"], "{names:?}");
        if let Ok(out) = fs::metadata(folder.path("out")) {
            assert_eq!(out.len(), fs::metadata(&path).unwrap().len());
        }
    }
    assert_eq!(codes.last(), Some(&Some(130)), "{codes:?}");
}

//! OUT appears whole or not at all, never over what must not be lost, and without a trace of failed attempts.

use std::fs;
#[cfg(unix)]
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::process::Command;
#[cfg(target_os = "linux")]
use std::process::Stdio;

#[cfg(unix)]
use crate::common::sparse;
use crate::common::{EXAMPLE, Folder, clip, f32s, file};
#[cfg(unix)]
use nix::{
    sys::signal::{SigHandler, Signal},
    unistd::Pid,
};

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
    for (out, expected) in cases {
        clip(&input, &out, &[&MODE[..], &["--force"]].concat()).failed(1, &[expected]);
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

/// Runs the program until it has begun to write, then sends it a signal; until that met it writing, and `ended` says so.
#[cfg(unix)]
fn signalled(signal: Signal, ignore: &str, route: &[&str], ended: Option<i32>) {
    let folder = Folder::new();
    // Sparse: only the writing takes time.
    let path = sparse(&folder.path("in"), &[64, 1 << 20]);
    let mut codes = Vec::new();
    // On a busy machine OUT may be finished before the signal comes.
    while codes.last() != Some(&ended) && codes.len() < 10 {
        let _ = fs::remove_file(folder.path("out"));
        let script = format!(r#"{ignore} exec "$0" "$@""#);
        let mut command = Command::new("sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_gradclip"), "clip"]).arg(&path).arg("-o");
        // A suite in the background, or under `nohup`, was started with some signals ignored, and its children inherit that.
        // SAFETY: Between fork and exec it makes one system call, which is allowed there; the default is no code of ours.
        unsafe {
            command.pre_exec(move || {
                nix::sys::signal::signal(signal, SigHandler::SigDfl)?;
                Ok(())
            })
        };
        let mut child = command.arg(folder.path("out")).args(route).arg("-q").spawn().unwrap();
        while folder.names().len() == 1 {
            assert!(child.try_wait().unwrap().is_none(), "it ended without writing");
            std::thread::yield_now();
        }
        nix::sys::signal::kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        codes.push(child.wait().unwrap().code());
        // Whole or not at all, and no temporary file; a signal after the rename finds the former.
        let names = folder.names();
        assert!(names == ["in"] || names == ["in", "out"], "{names:?}");
        if let (Ok(out), false) = (fs::metadata(folder.path("out")), route.contains(&"--sum")) {
            assert_eq!(out.len(), fs::metadata(&path).unwrap().len());
        }
    }
    assert_eq!(codes.last(), Some(&ended), "{signal} {ignore} {route:?}: {codes:?}");
}

/// Ctrl-C and its kin while OUT is being written.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing() {
    let route = ["--max-norm", "1", "--backend", "cpu"];
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signalled(signal, "", &route, Some(130));
    }
    // In mapped files.
    signalled(Signal::SIGTERM, "", &[&route[..], &["--scope", "example", "--sum"]].concat(), Some(130));
    #[cfg(feature = "gpu")]
    signalled(Signal::SIGTERM, "", &["--max-norm", "1", "--backend", "gpu"], Some(130));
}

/// As under `nohup`, whose terminal goes while it runs.
#[cfg(unix)]
#[test]
fn a_signal_that_is_ignored_from_the_start_stays_ignored() {
    for (signal, name) in [(Signal::SIGHUP, "HUP"), (Signal::SIGINT, "INT")] {
        let ignore = format!("trap '' {name};");
        signalled(signal, &ignore, &["--max-norm", "1", "--backend", "cpu"], Some(0));
    }
}

/// Someone takes OUT's folder away, or moves it, while OUT is being written.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_goes_while_it_is_written_to() {
    let folder = Folder::new();
    let input = sparse(&folder.path("in"), &[64, 1 << 20]);
    let routes =
        [&["--max-norm", "1"][..], &["--clip-value", "1"], &["--max-norm", "1", "--scope", "example", "--sum"]];
    for (route, moved) in routes.into_iter().flat_map(|route| [(route, false), (route, true)]) {
        let (sub, out) = (folder.path("sub"), folder.path("sub/out"));
        fs::create_dir(&sub).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradclip"));
        command.arg("clip").arg(&input).arg("-o").arg(&out).args(route).args(["--backend", "cpu"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        while fs::read_dir(&sub).unwrap().count() == 0 {
            std::thread::yield_now();
        }
        let pid = Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
        if moved {
            fs::rename(&sub, folder.path("moved")).unwrap();
        } else {
            fs::remove_dir_all(&sub).unwrap();
        }
        nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{route:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains("sub/out: cannot write"), "{stderr}");
        assert!(stderr.lines().count() <= 2 && !out.exists(), "{stderr}");
        if moved {
            fs::remove_dir_all(folder.path("moved")).unwrap();
        }
        assert_eq!(folder.names(), ["in"]);
    }
}

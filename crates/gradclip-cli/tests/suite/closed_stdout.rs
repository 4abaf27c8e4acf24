//! Standard output that takes nothing: a reader that has gone (`| head -0`) is no failure, a full disk is one; neither is
//! a panic, and OUT is in place before anything is printed.

use std::fs::{self, File};
use std::io::pipe;
use std::process::{Command, Stdio};

use crate::common::{EXAMPLE, Folder, f32s, file, fixture};

/// Commands with long and short output.
fn commands(folder: &Folder) -> Vec<Vec<String>> {
    let many: Vec<_> = (0..5000).map(|i| format!("tensor {i}")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), "F32", f32s(&[1.0]))).collect();
    // Longer than a pipe holds.
    let many = folder.write("many", file(&many)).display().to_string();
    let examples = fixture("inputs/per_example_f32.safetensors").display().to_string();
    let out = folder.path("out").display().to_string();
    let mut lines = vec![
        format!("norm {EXAMPLE} --backend cpu"),
        format!("norm {EXAMPLE} --backend cpu --quiet"),
        format!("norm {many} --backend cpu --top 5000"),
        format!("norm {many} --backend cpu --scope tensor --json"),
        format!("clip {many} -o {out} --max-norm 1 --backend cpu --force"),
        format!("clip {many} -o {out} --max-norm 1 --backend cpu --force --scope tensor --json"),
        format!("clip {examples} -o {out} --max-norm 1 --backend cpu --force --scope example --sum --json"),
        "bench --backend cpu --sizes 1Ki --dtype f32 --seconds 0.001".into(),
    ];
    if cfg!(feature = "gpu") {
        lines.extend(["devices", "devices --json", "verify --cases 1", "verify --cases 1 --json"].map(String::from));
    }
    lines.iter().map(|line| line.split(' ').map(String::from).collect()).collect()
}

#[track_caller]
fn ended(args: &[String], stdout: impl Into<Stdio>) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradclip"));
    let output = command.args(args).stdout(stdout).output().expect("the program starts");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let folder = Folder::new();
    for args in commands(&folder) {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        assert_eq!(ended(&args, writer), (Some(0), String::new()), "{args:?}");
        assert_eq!(args[0] == "clip", fs::remove_file(folder.path("out")).is_ok(), "{args:?}");
    }
}

#[test]
fn a_full_disk_is_1_and_says_so() {
    let folder = Folder::new();
    for args in commands(&folder) {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (code, stderr) = ended(&args, full);
        let expected = "error: standard output: cannot write: No space left on device (os error 28)\n";
        assert_eq!((code, stderr.as_str()), (Some(1), expected), "{args:?}");
        assert_eq!(args[0] == "clip", fs::remove_file(folder.path("out")).is_ok(), "{args:?}");
    }
}

#[test]
fn closed_streams_are_no_failure() {
    let folder = Folder::new();
    for args in commands(&folder) {
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$0" "$@" >&- 2>&- <&-"#, env!("CARGO_BIN_EXE_gradclip")]).args(&args);
        assert_eq!(command.status().unwrap().code(), Some(0), "{args:?}");
        assert_eq!(args[0] == "clip", fs::remove_file(folder.path("out")).is_ok(), "{args:?}");
    }
}

/// The exit code shows a failure even if nobody reads the message.
#[test]
fn an_error_that_nobody_reads() {
    for redirection in ["2>&-", "2>/dev/full"] {
        let mut command = Command::new("sh");
        let script = format!(r#"exec "$0" norm missing {redirection}"#);
        assert_eq!(command.args(["-c", &script, env!("CARGO_BIN_EXE_gradclip")]).status().unwrap().code(), Some(1));
    }
}

//! A file that is cut short, changed or replaced while the program reads it: an error that names it, nothing of OUT, and no
//! temporary file; never a signal, nor numbers from two files at once.
//!
//! The program is stopped (SIGSTOP) once it has begun to read or to write, and before it has done half; then the file is
//! changed, and it goes on.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Folder, Run, f32s, file, sparse, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// 256 MiB: long enough to be met half way.
const SHAPE: [u64; 2] = [64, 1 << 20];
const BYTES: u64 = 256 << 20;
/// The last element but one.
const LATE: u64 = BYTES - 8;

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Reading,
    Writing,
    /// Reading, with its temporary file there already.
    Summing,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Emptied,
    Halved,
    Grown,
    /// One element, in place.
    Changed,
    /// To NaN: the change must be reported, not the NaN.
    Poisoned,
    /// As `cp` does: emptied, and written anew.
    Rewritten,
}

const CHANGES: [Change; 6] =
    [Change::Emptied, Change::Halved, Change::Grown, Change::Changed, Change::Poisoned, Change::Rewritten];

impl Change {
    fn make(self, path: &Path) {
        let file = File::options().write(true).open(path).unwrap();
        let length = file.metadata().unwrap().len();
        let late = length - BYTES + LATE;
        match self {
            Self::Emptied => file.set_len(0).unwrap(),
            Self::Halved => file.set_len(length / 2).unwrap(),
            Self::Grown => file.set_len(length + 4).unwrap(),
            Self::Changed => file.write_all_at(&f32s(&[1.0]), late).unwrap(),
            Self::Poisoned => file.write_all_at(&f32s(&[f32::NAN]), late).unwrap(),
            Self::Rewritten => {
                let mut header = vec![0; (length - BYTES) as usize];
                File::open(path).unwrap().read_exact_at(&mut header, 0).unwrap();
                file.set_len(0).unwrap();
                file.write_all_at(&header, 0).unwrap();
                file.set_len(length).unwrap();
                file.write_all_at(&f32s(&[1.0]), late).unwrap();
            }
        }
    }
}

/// Runs the program, stops it half way, makes the change, and returns how it ended.
#[track_caller]
fn met(args: &[&str], out: &Folder, when: When, change: impl Fn()) -> Run {
    for _ in 0..50 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradclip"));
        let mut child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        if stopped_half_way(&mut child, out, when) {
            change();
            kill(Pid::from_raw(child.id() as i32), Signal::SIGCONT).unwrap();
            let output = child.wait_with_output().unwrap();
            let text = |bytes| String::from_utf8(bytes).unwrap();
            return Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        }
        let _ = child.kill();
        child.wait().unwrap();
        for name in out.names() {
            fs::remove_file(out.path(&name)).unwrap();
        }
    }
    panic!("{args:?} was never met while {when:?}");
}

fn stopped_half_way(child: &mut Child, out: &Folder, when: When) -> bool {
    let start = Instant::now();
    while !(1..50).contains(&done(child, out, when)) {
        if child.try_wait().unwrap().is_some() || start.elapsed() > Duration::from_secs(20) {
            return false;
        }
        std::thread::yield_now();
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGSTOP).unwrap();
    while child.try_wait().unwrap().is_none() {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
        if stat.contains(") T ") {
            return (1..90).contains(&done(child, out, when));
        }
        std::thread::yield_now();
    }
    false
}

/// How far it is, in percent: what it has in memory of the files that it reads, or what its temporary file has on disk.
fn done(child: &Child, out: &Folder, when: When) -> u64 {
    let bytes = match when {
        When::Reading if !out.names().is_empty() => return 100,
        When::Reading | When::Summing => {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap_or_default();
            let kib = line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default();
            // The program itself is some of it.
            (kib << 10).saturating_sub(32 << 20)
        }
        When::Writing => match &out.names()[..] {
            [name] if name.ends_with(".tmp") => fs::metadata(out.path(name)).map_or(0, |found| 512 * found.blocks()),
            [] => 0,
            _ => return 100,
        },
    };
    (100 * bytes).div_ceil(BYTES)
}

/// Every change, at this moment.
fn every_change(args: &[&str], when: When) {
    for change in CHANGES {
        let (folder, out) = (Folder::new(), Folder::new());
        let input = sparse(&folder.path("in"), &SHAPE);
        let (output, drawing) = (out.path("out"), out.path("out.svg"));
        let filled: Vec<_> = args
            .iter()
            .map(|arg| match *arg {
                "IN" => text(&input),
                "OUT" => text(&output),
                "OUT.svg" => text(&drawing),
                other => other,
            })
            .collect();
        let run = met(&filled, &out, when, || change.make(&input));
        run.failed(1, &["in: changed while it was read", "run it again"]);
        assert!(out.names().is_empty(), "{change:?}: {:?}", out.names());
    }
    println!("changing input: {} changes while {when:?}: {}", CHANGES.len(), args.join(" "));
}

#[test]
fn while_a_norm_is_measured() {
    every_change(&["norm", "IN", "--backend", "cpu", "--json"], When::Reading);
    every_change(&["norm", "IN", "--backend", "cpu", "--plot", "OUT.svg"], When::Reading);
}

#[test]
fn while_a_clip_is_decided() {
    every_change(&["clip", "IN", "-o", "OUT", "--max-norm", "1", "--backend", "cpu"], When::Reading);
}

#[test]
fn while_the_clipped_file_is_written() {
    every_change(&["clip", "IN", "-o", "OUT", "--max-norm", "1", "--backend", "cpu"], When::Writing);
    every_change(
        &["clip", "IN", "-o", "OUT", "--grad-scale", "2", "--clip-value", "1", "--backend", "cpu"],
        When::Writing,
    );
}

#[test]
fn while_examples_are_summed() {
    let scope = ["--scope", "example", "--sum", "--backend", "cpu"];
    every_change(&[&["clip", "IN", "-o", "OUT", "--max-norm", "1"][..], &scope].concat(), When::Summing);
}

#[cfg(feature = "gpu")]
#[test]
fn while_a_gpu_clips() {
    every_change(&["clip", "IN", "-o", "OUT", "--max-norm", "1", "--backend", "gpu"], When::Writing);
}

#[test]
fn parameters_and_shards_count_too() {
    let (folder, out) = (Folder::new(), Folder::new());
    let input = sparse(&folder.path("in"), &SHAPE);
    let params = sparse(&folder.path("params"), &SHAPE);
    let output = out.path("out");
    let args = ["clip", text(&input), "-o", text(&output), "--agc", "1", "--params", text(&params), "--backend", "cpu"];
    for change in [Change::Emptied, Change::Changed] {
        sparse(&params, &SHAPE);
        let run = met(&args, &out, When::Reading, || change.make(&params));
        run.failed(1, &["params: changed while it was read"]);
        assert!(out.names().is_empty());
    }

    let index = folder.write("x.safetensors.index.json", r#"{"weight_map": {"a": "in", "b": "tiny"}}"#);
    let tiny = folder.write("tiny", file(&[("b", "F32", f32s(&[1.0]))]));
    let output = out.path("out.safetensors.index.json");
    let args = ["clip", text(&index), "-o", text(&output), "--max-norm", "1", "--backend", "cpu"];
    let run = met(&args, &out, When::Reading, || File::options().write(true).open(&tiny).unwrap().set_len(3).unwrap());
    run.failed(1, &["tiny: changed while it was read"]);
    assert!(out.names().is_empty());
}

/// Who writes beside and renames, as this program does, disturbs nobody: the old file is read to its end.
#[test]
fn a_file_that_is_replaced_is_read_as_it_was() {
    for when in [When::Reading, When::Writing] {
        let (folder, out) = (Folder::new(), Folder::new());
        let input = sparse(&folder.path("in"), &SHAPE);
        File::options().write(true).open(&input).unwrap().write_all_at(&f32s(&[3.0]), BYTES / 2).unwrap();
        let new = folder.write("new", file(&[("b", "F32", f32s(&[1.0]))]));
        let (kept, output) = (folder.path("kept"), out.path("out"));
        fs::hard_link(&input, &kept).unwrap();
        let args = ["clip", text(&input), "-o", text(&output), "--max-norm", "1", "--eps", "0", "--backend", "cpu"];
        met(&args, &out, when, || fs::rename(&new, &input).unwrap()).succeeded();
        assert_eq!(out.names(), ["out"]);
        let file = File::open(&output).unwrap();
        let mut element = [0; 4];
        file.read_exact_at(&mut element, BYTES / 2).unwrap();
        assert_eq!(
            (file.metadata().unwrap().len(), f32::from_le_bytes(element)),
            (kept.metadata().unwrap().len(), 1.0)
        );
    }
}

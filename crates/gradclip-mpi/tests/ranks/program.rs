//! The program `gradclip-mpi` under `mpirun`: the same files from any number of ranks, whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use gradclip_mpi::gradclip::Dtype;

use crate::SOON;
use crate::gradients::Gradient;
use crate::launch::{Run, mpirun_of};

const PROGRAM: &str = env!("CARGO_BIN_EXE_gradclip-mpi");

/// An empty folder of a test's own.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// A file with one tensor, in a header that ends where data may begin.
fn header(name: &str, elements: usize) -> Vec<u8> {
    let bytes = 4 * elements;
    let text = format!(r#"{{"{name}":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{bytes}]}}}}"#);
    let padded = text.len().next_multiple_of(8);
    [&(padded as u64).to_le_bytes()[..], format!("{text:padded$}").as_bytes()].concat()
}

/// Five files of uneven sizes.
fn shards(folder: &Path) -> Vec<String> {
    let shard = |i: usize| {
        let gradient = Gradient::random(&format!("w{i}"), Dtype::F32, &[1000 * i + 7], 0.5, i as u64);
        let path = folder.join(format!("{i}.safetensors"));
        fs::write(&path, [header(&gradient.name, gradient.len()), gradient.bytes].concat()).expect("written");
        path.to_str().expect("text").to_owned()
    };
    (0..5).map(shard).collect()
}

fn run(ranks: u32, command: &str, files: &[String], more: &[&str]) -> Run {
    let args: Vec<_> =
        [command].into_iter().chain(files.iter().map(String::as_str)).chain(more.iter().copied()).collect();
    mpirun_of(ranks, &[], Path::new(PROGRAM), &args, "")
}

/// The one line of ours among what `mpirun` says.
#[track_caller]
fn failed(run: &Run, code: i32, says: &str) {
    let errors: Vec<_> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(run.status.code() == Some(code) && run.took < SOON, "{run}");
    assert!(errors.len() == 1 && errors[0].contains(says), "{run}");
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> = entries.map(|entry| entry.expect("readable").file_name()).collect();
    names.sort();
    names.into_iter().map(|name| name.into_string().expect("text")).collect()
}

#[test]
fn any_number_of_ranks_writes_the_same_files() {
    let folder = folder("same_files");
    let files = shards(&folder);
    let mut of_one = None;
    for ranks in [1, 2, 3, 4, 8] {
        let out = folder.join(format!("out{ranks}"));
        let more = ["-o", out.to_str().expect("text"), "--max-norm", "1", "--backend", "cpu", "--json"];
        let run = run(ranks, "clip", &files, &more);
        assert!(run.status.success() && run.stderr.is_empty(), "{run}");
        let field = |name: &str| {
            let (_, after) = run.stdout.split_once(&format!("\"{name}\":")).unwrap_or_else(|| panic!("{run}"));
            after[..after.find([',', '}']).expect("JSON")].to_owned()
        };
        let norm: f64 = field("total_norm").parse().expect("a number");
        assert_eq!(field("clipped"), "true");
        let written: Vec<_> = names(&out).iter().map(|name| fs::read(out.join(name)).expect("readable")).collect();
        let (expected_norm, expected) = of_one.get_or_insert_with(|| (norm, written.clone()));
        assert!((norm - *expected_norm).abs() <= 1e-12 * *expected_norm && norm > 1.0, "{norm} and {expected_norm}");
        assert!(written == *expected && written.len() == 5, "{ranks} ranks");
    }
}

#[test]
fn what_fails_fails_on_all_ranks_and_writes_nothing() {
    let folder = folder("failures");
    let mut files = shards(&folder);
    let before = names(&folder);
    let out = folder.join("out");
    let more = ["-o", out.to_str().expect("text"), "--max-norm", "1", "--backend", "cpu"];
    // A NaN in the last file.
    let mut bytes = fs::read(&files[4]).expect("readable");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&files[4], bytes).expect("written");
    failed(&run(3, "clip", &files, &more), 3, "w4");
    assert_eq!(names(&folder), before);
    // A file that is not there.
    files.push(folder.join("nowhere.safetensors").to_str().expect("text").to_owned());
    failed(&run(3, "clip", &files, &more), 1, "nowhere.safetensors");
    assert_eq!(names(&folder), before);
    failed(&run(2, "clip", &files, &["--max-norm", "1"]), 2, "required");
}

/// Clips on two ranks, where rank 1 is started by a script of its own, in whose `$@` the program is.
fn clip_with_rank_1_by(script: &str, folder: &Path, out: &Path) -> Run {
    let mut files = Vec::new();
    for i in 0..2 {
        // Zeros that take no place on the disk, and longer to read and copy than the script leaves.
        let path = folder.join(format!("{i}.safetensors"));
        let header = header(&format!("w{i}"), 1 << 30);
        fs::write(&path, &header).expect("written");
        let file = fs::OpenOptions::new().write(true).open(&path).expect("there");
        file.set_len(header.len() as u64 + (4 << 30)).expect("a sparse file");
        files.push(path.to_str().expect("text").to_owned());
    }
    // Which rank this is, each MPI says in a variable of its own.
    let script = format!("if [ \"${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}}\" = 1 ]; then {script}; fi; exec \"$@\"");
    let mut args = vec!["-c", &script, "sh", PROGRAM, "clip"];
    args.extend(files.iter().map(String::as_str));
    args.extend(["-o", out.to_str().expect("text"), "--max-norm", "1", "--backend", "cpu"]);
    mpirun_of(2, &[], Path::new("/bin/sh"), &args, "")
}

/// In the middle of measuring, or before it has begun.
#[test]
fn a_rank_that_is_killed_leaves_no_out() {
    let folder = folder("killed");
    let out = folder.join("out");
    let run = clip_with_rank_1_by("exec timeout -s KILL 0.7 \"$@\"", &folder, &out);
    assert!(!run.status.success() && run.took < SOON && !out.exists(), "{run}");
    fs::remove_dir_all(&folder).expect("removed");
}

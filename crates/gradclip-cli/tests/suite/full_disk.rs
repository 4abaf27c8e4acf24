//! A disk that is full before OUT is written: an error that names OUT, and neither OUT nor a temporary file; what was there
//! before stays. The disk is a small one in memory, mounted where only the program's own process sees it.

use std::process::Command;

use crate::common::{EXAMPLE, Folder, f32s, file, fixture, sparse, text};

/// Mounts a disk of so many KiB, prepares it, runs the program on it, and lists what is left there.
const SCRIPT: &str = r#"
mount -t tmpfs -o "size=${KIB}k" gradclip "$DISK" || exit 99
cd "$DISK" && sh -c "$PREPARE" || exit 98
"$@" >"$STREAMS/stdout" 2>"$STREAMS/stderr"
code=$?
ls -A "$DISK" >"$STREAMS/names"
exit $code
"#;

/// How a run ended.
#[derive(Debug)]
struct DiskRun {
    code: Option<i32>,
    stderr: String,
    /// What is on the disk.
    names: String,
}

/// Runs the program in a folder that is a disk of so many KiB, on which a shell did something before.
#[track_caller]
fn on_disk(kib: u64, prepare: &str, args: &[&str]) -> DiskRun {
    // Root may mount, in a namespace of its own; others must become root of one first.
    for user in [&["--mount"][..], &["--mount", "--map-root-user"]] {
        let (disk, streams) = (Folder::new(), Folder::new());
        let run = ["sh", "-c", SCRIPT, "sh", env!("CARGO_BIN_EXE_gradclip")];
        let mut command = Command::new("unshare");
        command.args(user).arg("--").args(run).args(args).env("KIB", kib.to_string()).env("PREPARE", prepare);
        command.env("DISK", disk.path("")).env("STREAMS", streams.path(""));
        let output = command.output().expect("unshare (util-linux) is installed");
        let text = |name| String::from_utf8(streams.read(name)).unwrap();
        if streams.names().contains(&"names".into()) {
            let names = text("names").split_whitespace().collect::<Vec<_>>().join(" ");
            return DiskRun { code: output.status.code(), stderr: text("stderr"), names };
        }
        eprintln!("unshare {user:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    panic!(
        "this test mounts a tmpfs of its own: it needs root with CAP_SYS_ADMIN, or user namespaces (see unshare(1))"
    );
}

impl DiskRun {
    #[track_caller]
    fn failed(&self, expected: &str, names: &str) {
        assert_eq!((self.code, self.names.as_str()), (Some(1), names), "{self:?}");
        assert!(self.stderr.starts_with("error: ") && self.stderr.lines().count() <= 2, "{self:?}");
        assert!(self.stderr.contains(expected), "{self:?}");
    }

    #[track_caller]
    fn succeeded(&self, names: &str) {
        assert_eq!((self.code, self.stderr.as_str(), self.names.as_str()), (Some(0), "", names), "{self:?}");
    }
}

/// Clips, with OUT of so many KiB, onto disks with too little room for it, and onto one with just enough.
#[track_caller]
fn fills(kib: u64, out: &str, args: &[&str]) {
    let expected = format!("{out}: cannot write: No space left on device");
    // The last one lacks one page.
    let disks = [4, kib / 2, kib - 4];
    for disk in disks {
        on_disk(disk, "true", args).failed(&expected, "");
    }
    // An old file is neither lost nor replaced by half a new one.
    let forced = [args, &["--force"]].concat();
    on_disk(kib, &format!("echo mine >{out}"), &forced).failed(&expected, out);
    on_disk(kib, "true", args).succeeded(out);
    println!("full disk: {} disks without room: {}", disks.len() + 1, args[2..].join(" "));
}

/// 3 MiB, all of it clipped.
fn input(folder: &Folder) -> String {
    let ones = file(&[("a", "F32", f32s(&vec![1.0; 768 << 10]))]);
    text(&folder.write("in", ones)).to_owned()
}

#[test]
fn clipped_piece_by_piece() {
    let folder = Folder::new();
    let input = input(&folder);
    let before = folder.read("in");
    // A page more for the header.
    for mode in [&["--max-norm", "1"][..], &["--clip-value", "0.5"], &["--max-norm", "inf"]] {
        fills(3076, "out", &[&["clip", &input, "-o", "out", "--backend", "cpu", "-q"], mode].concat());
    }
    assert_eq!((folder.names(), folder.read("in")), (vec!["in".to_owned()], before));
}

/// In a mapped file a full disk would be a signal.
#[cfg(feature = "gpu")]
#[test]
fn clipped_on_a_gpu() {
    let folder = Folder::new();
    let input = input(&folder);
    fills(3076, "out", &["clip", &input, "-o", "out", "--backend", "gpu", "-q", "--max-norm", "1"]);
}

#[test]
fn sums_of_examples() {
    let folder = Folder::new();
    let input = sparse(&folder.path("in"), &[2, 768 << 10]);
    let args = ["clip", text(&input), "-o", "out", "--backend", "cpu", "-q", "--max-norm", "1"];
    fills(3076, "out", &[&args[..], &["--scope", "example", "--sum"]].concat());
}

#[test]
fn a_plot() {
    let many: Vec<_> = (0..400).map(|i| format!("tensor {i}")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), "F32", f32s(&[1.0]))).collect();
    let folder = Folder::new();
    let input = folder.write("in", file(&many));
    let full = on_disk(8, "true", &["norm", text(&input), "--backend", "cpu", "--plot", "out.svg"]);
    full.failed("out.svg: cannot write: No space left on device", "");
    on_disk(1024, "true", &["norm", text(&input), "--backend", "cpu", "--plot", "out.svg"]).succeeded("out.svg");
}

/// Whichever of its files the disk has no room for.
#[test]
fn a_sharded_set() {
    let folder = Folder::new();
    for (shard, name) in [("1.safetensors", "a"), ("2.safetensors", "b"), ("3.safetensors", "c")] {
        folder.write(shard, file(&[(name, "F32", f32s(&vec![1.0; 25_000]))]));
    }
    let name = "x.safetensors.index.json";
    let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}}"#;
    let index = folder.write(name, index);
    for route in [&["--max-norm", "1"][..], &["--max-norm", "1", "--scope", "example", "--sum"]] {
        let args = [&["clip", text(&index), "-o", name, "--backend", "cpu", "-q"], route].concat();
        // A shard has 100,000 bytes and a header: 25 pages. A sum has one page, and so have the index and its folder.
        let whole = if route.len() == 2 { 25 * 3 + 1 } else { 3 + 1 };
        for pages in 1..whole {
            // Each file that is missing, and on the last disk the index alone.
            if whole < 10 || pages % 12 == 1 || pages + 1 == whole {
                let full = on_disk(4 * pages, "true", &args);
                full.failed("cannot write: No space left on device", "");
            }
        }
        on_disk(4 * whole + 4, "true", &args)
            .succeeded("1.safetensors 2.safetensors 3.safetensors x.safetensors.index.json");
    }
}

/// Not a full disk, but a limit on the length of files (`ulimit -f`), which by default is a signal.
#[test]
fn a_file_that_may_not_become_so_long() {
    let inputs = Folder::new();
    let input = sparse(&inputs.path("in"), &[2, 16 << 10]);
    let sum = ["--backend", "cpu", "--scope", "example", "--sum"];
    let mapped = ["--backend", if cfg!(feature = "gpu") { "gpu" } else { "cpu" }];
    for route in [&["--backend", "cpu"][..], &sum, &mapped] {
        let folder = Folder::new();
        let out = folder.path("out");
        let args = [&["clip", text(&input), "-o", text(&out), "--max-norm", "1"], route].concat();
        // In blocks of 512 bytes or of 1 KiB.
        let script = ["-c", "ulimit -f 4; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_gradclip")];
        let output = Command::new("sh").args(script).args(args).output().expect("a shell");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && error.contains("out: cannot write: File too large"), "{output:?}");
        assert!(folder.names().is_empty(), "{:?}", folder.names());
    }
}

/// Not full, but closed.
#[test]
fn a_disk_that_is_mounted_for_reading() {
    let read_only = r#"echo mine >old; mount -o remount,ro "$DISK""#;
    for route in [&["--max-norm", "0.1"][..], &["--max-norm", "0.1", "--scope", "example", "--sum"]] {
        let file = fixture("inputs/per_example_f32.safetensors");
        for out in ["out", "old"] {
            let args = [&["clip", text(&file), "-o", out, "--backend", "cpu", "--force"], route].concat();
            on_disk(64, read_only, &args).failed(&format!("{out}: cannot write: Read-only file system"), "old");
        }
    }
    let plot = ["norm", EXAMPLE, "--backend", "cpu", "--plot", "out.svg"];
    on_disk(64, read_only, &plot).failed("out.svg: cannot write: Read-only file system", "old");
}

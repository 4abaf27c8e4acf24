//! The commands of `gradclip-mpi`, on ranks that are threads: what they clip is what `gradclip` clips in one file, OUT is
//! whole or not there, and all ranks end alike.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::{Folder, clip, f32s, file, gradclip, repeats, shaped_file};
use gradclip::processes::{ProcessGroup, thread_group};
use gradclip_cli::processes::{Exit, run};
use serde_json::Value;

/// How all ranks ended.
#[derive(Debug)]
struct Ranks {
    exits: Vec<Exit>,
    stdout: String,
}

/// Runs ranks with the same arguments, on the CPU.
fn ranks(count: u32, args: &[&str]) -> Ranks {
    each_rank(count, |_| [args, &["--backend", "cpu", "--threads", "1"]].concat())
}

/// Runs ranks, each with its own arguments.
fn each_rank<'a>(count: u32, args: impl Fn(u32) -> Vec<&'a str>) -> Ranks {
    let groups = thread_group(count, Some(Duration::from_secs(60)));
    run_groups(groups.into_iter().zip(0..).map(|(group, rank)| (group, args(rank))))
}

/// Runs ranks, each with its group and arguments.
fn run_groups<'a>(groups: impl IntoIterator<Item = (Arc<dyn ProcessGroup>, Vec<&'a str>)>) -> Ranks {
    let groups = groups.into_iter().map(|(group, args)| {
        let args: Vec<_> = args.into_iter().map(OsString::from).collect();
        thread::spawn(move || {
            let mut stdout = Vec::new();
            (run(group, 0, args, &mut stdout), String::from_utf8(stdout).expect("stdout is text"))
        })
    });
    let ranks = groups.collect::<Vec<_>>().into_iter().map(|rank| rank.join().expect("no rank panics"));
    let (exits, mut stdout): (Vec<_>, Vec<_>) = ranks.unzip();
    let first = stdout.remove(0);
    assert!(stdout.iter().all(String::is_empty), "others than rank 0 print: {stdout:?}");
    Ranks { exits, stdout: first }
}

impl Ranks {
    #[track_caller]
    fn succeeded(self) -> Self {
        assert!(self.exits.iter().all(|exit| *exit == Exit { exit_code: 0, message: String::new() }), "{self:?}");
        self
    }

    /// Every rank ended with this code, and their messages contain each of these texts once.
    #[track_caller]
    fn failed(self, code: u8, expected: &[&str]) -> Self {
        assert!(self.exits.iter().all(|exit| exit.exit_code == code) && self.stdout.is_empty(), "{self:?}");
        let all: String = self.exits.iter().map(|exit| &*exit.message).collect();
        for part in expected {
            assert_eq!(all.matches(part).count(), 1, "{part:?}: {self:?}");
        }
        assert!(all.starts_with("error: "), "{self:?}");
        assert!(self.exits.iter().all(|exit| exit.message.lines().count() <= 2), "{self:?}");
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A folder with five files of different sizes and dtypes, and `whole`, which holds the tensors of all.
struct Set {
    folder: Folder,
    files: Vec<String>,
}

/// Pseudo-random, and of the size that gradients have.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next() * 0.1).collect()
}

type Named<'a> = (&'a str, &'a str, Vec<u8>);

fn set(more: &[Named<'_>]) -> Set {
    let folder = Folder::new();
    let half = |values: Vec<f32>| values.into_iter().flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let double = |values: Vec<f32>| values.into_iter().flat_map(|x| f64::from(x).to_le_bytes()).collect::<Vec<_>>();
    let mut files: Vec<Vec<Named<'_>>> = vec![
        vec![("a.weight", "F32", f32s(&noise(70_001, 1))), ("a.steps", "I64", vec![7; 16])],
        vec![("b.weight", "F32", f32s(&noise(3, 2)))],
        vec![("c.weight", "F32", f32s(&noise(40_000, 3))), ("c.bias", "F32", f32s(&noise(300, 4)))],
        vec![("d.weight", "BF16", half(noise(30_002, 5))), ("d.empty", "F32", vec![])],
        vec![("e.weight", "F64", double(noise(999, 6)))],
    ];
    files[1].extend_from_slice(more);
    let names = files.iter().zip(0..).map(|(tensors, i)| {
        let path = folder.write(&format!("{i}.safetensors"), file(tensors));
        path.to_str().expect("UTF-8").to_owned()
    });
    let names = names.collect();
    let mut whole = files.concat();
    // Readers need every tensor aligned.
    whole.sort_by_key(|(_, dtype, _)| !matches!(*dtype, "F64" | "I64"));
    folder.write("whole", file(&whole));
    Set { folder, files: names }
}

impl Set {
    fn args<'a>(&'a self, command: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
        command.iter().copied().chain(self.files.iter().map(String::as_str)).chain(more.iter().copied()).collect()
    }

    fn out(&self) -> String {
        self.folder.path("out").to_str().expect("UTF-8").to_owned()
    }

    /// Nothing has been written.
    #[track_caller]
    fn is_as_it_was(&self) {
        let all = ["0", "1", "2", "3", "4"].map(|name| format!("{name}.safetensors"));
        assert_eq!(self.folder.names(), [&all[..], &["whole".into()]].concat());
    }
}

/// The tensors of a folder's files, or of one file.
fn tensors(path: &Path) -> BTreeMap<String, (String, Vec<u8>)> {
    let files = match path.is_dir() {
        true => fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect(),
        false => vec![path.to_owned()],
    };
    let mut all = BTreeMap::new();
    for file in files {
        let bytes = fs::read(file).expect("readable");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        for (name, view) in file.tensors() {
            all.insert(name, (view.dtype().to_string(), view.data().to_vec()));
        }
    }
    all
}

/// Holds what ranks have clipped to what `gradclip` makes of one file.
#[track_caller]
fn same_tensors(ranks: &Path, whole: &Path) {
    let (ours, theirs) = (tensors(ranks), tensors(whole));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for (name, (dtype, bytes)) in &ours {
        let reference = &theirs[name].1;
        if dtype == "F64" {
            let close = |(a, b): (&[u8], &[u8])| {
                let [a, b] = [a, b].map(|x| f64::from_le_bytes(x.try_into().unwrap()));
                (a - b).abs() <= 1e-12 * b.abs() || a.is_nan() && b.is_nan()
            };
            assert!(bytes.chunks(8).zip(reference.chunks(8)).all(close), "{name}");
        } else {
            assert!(bytes == reference, "{name}: {dtype}");
        }
    }
}

#[track_caller]
fn same_report(ours: &Value, theirs: &Value, ranks: u32) {
    for key in ["total_norm", "clip_coef"] {
        match (ours[key].as_f64(), theirs[key].as_f64()) {
            (Some(a), Some(b)) => assert!((a - b).abs() <= 1e-12 * b.abs(), "{key}: {a} {b}"),
            (a, b) => assert_eq!(a, b, "{key}"),
        }
    }
    for key in ["total_norm_is", "clipped", "elements", "tensors", "left_out", "backend", "adapter"] {
        assert_eq!(ours[key], theirs[key], "{key}: {ours} {theirs}");
    }
    for key in ["count", "tensor", "index"] {
        assert_eq!(ours["non_finite"][key], theirs["non_finite"][key], "{key}: {ours} {theirs}");
    }
    assert_eq!(ours["ranks"], ranks);
    assert!(ours["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0));
}

/// Clips by ranks, and in one file, and compares.
#[track_caller]
fn same_clip(set: &Set, count: u32, mode: &[&str]) {
    let (out, whole) = (set.out(), set.folder.path("clipped"));
    let ours = ranks(count, &set.args(&["clip"], &[&["-o", &out, "--json"], mode].concat())).succeeded().json();
    let theirs = clip(&set.folder.path("whole"), &whole, &[mode, &["--json"]].concat()).succeeded().json();
    same_report(&ours, &theirs, count);
    same_tensors(Path::new(&out), &whole);
    fs::remove_dir_all(out).unwrap();
    fs::remove_file(whole).unwrap();
    set.is_as_it_was();
}

#[test]
fn as_one_file_is_clipped() {
    let set = set(&[]);
    for count in [1, 2, 3, 5, 8] {
        same_clip(&set, count, &["--max-norm", "1"]);
    }
    let modes: [&[&str]; 12] = [
        &["--max-norm", "1e9"],
        &["--max-norm", "0.01", "--grad-scale", "4", "--eps", "0"],
        &["--max-norm", "0.03", "--norm-type", "inf"],
        &["--max-norm", "7", "--norm-type", "1.5"],
        &["--max-rms", "0.001"],
        &["--max-average-norm", "1e-7"],
        &["--clip-value", "0.01"],
        &["--clip-range=-0.02,0.04"],
        &["--max-norm", "1", "--only", "*.weight", "--except", "c.*"],
        &["--max-norm", "1", "--group", "c.*=0.01", "--group", "?.weight=0.1"],
        &["--clip-value", "0.01", "--group", "e.*=0.001"],
        &["--clip-value", "0.01", "--report-norm"],
    ];
    for mode in modes {
        same_clip(&set, 2, mode);
        same_clip(&set, 4, mode);
    }
}

#[test]
fn as_one_file_is_clipped_when_something_is_not_finite() {
    let set = set(&[("f.bias", "F32", f32s(&[1.0, f32::NAN, f32::INFINITY]))]);
    for policy in ["propagate", "skip", "zero", "drop"] {
        let groups = ["--max-norm", "1", "--group", "*.bias=1"];
        for mode in [&["--max-norm", "1"][..], &["--clip-value", "0.01"], &groups] {
            for count in [1, 3, 8] {
                same_clip(&set, count, &[mode, &["--non-finite", policy]].concat());
            }
        }
    }
}

#[cfg(unix)]
#[test]
fn files_of_a_hugging_face_cache() {
    use crate::common::{last_f32s, text};
    use crate::hugging_face_cache::{SHARDS, repository};
    let cache = Folder::new();
    let set = repository(&cache, "models--org--name", "");
    let files = SHARDS.map(|shard| set.join(shard));
    let out = cache.path("out");
    let args = [text(&files[0]), text(&files[1]), "-o", text(&out), "--max-norm", "2.5", "--eps", "0"];
    ranks(2, &[&["clip"][..], &args].concat()).succeeded();
    assert_eq!(SHARDS.map(|shard| last_f32s(&fs::read(out.join(shard)).unwrap(), 1)), [[1.5], [2.0]]);
}

#[test]
fn a_norm_is_that_of_all_files() {
    let set = set(&[]);
    let whole = set.folder.path("whole");
    for count in [1, 2, 4, 8] {
        for norm in [&["--norm-type", "2"][..], &["--norm-type", "inf"], &["--norm-type", "1", "--grad-scale", "16"]] {
            let ours = ranks(count, &set.args(&["norm", "--json"], norm)).succeeded().json();
            let theirs = [&["norm", whole.to_str().unwrap(), "--backend", "cpu", "--json"], norm].concat();
            same_report(&ours, &gradclip(theirs).succeeded().json(), count);
        }
    }
    let alone = ranks(3, &set.args(&["norm", "-q"], &[])).succeeded().stdout;
    let json = ranks(3, &set.args(&["norm", "--json"], &[])).succeeded().json();
    let (alone, json) = (alone.trim().parse::<f64>().unwrap(), json["total_norm"].as_f64().unwrap());
    assert!((alone / json - 1.0).abs() < 1e-15, "{alone} {json}");
    let table = ranks(3, &set.args(&["norm"], &[])).succeeded().stdout;
    assert!(
        table.contains("in 7 tensors (1 other passed through)") && table.contains("3 ranks, the first on CPU"),
        "{table}"
    );
    set.is_as_it_was();
}

/// The same bits on every rank, and in every run, whatever comes first.
#[test]
fn runs_repeat() {
    let set = set(&[]);
    let run = || ranks(4, &set.args(&["norm", "-q"], &[])).succeeded().stdout;
    let first = run();
    for _ in 0..20 {
        assert_eq!(run(), first);
    }
}

#[test]
fn a_rank_that_cannot_begin_stops_all() {
    let set = set(&[]);
    let out = set.out();
    let names = set.folder.names();
    let broken = set.folder.write("broken", "no safetensors file");
    for count in [1, 2, 3, 8] {
        for (bad, expected) in [(broken.to_str().unwrap(), "broken: the header claims"), ("none", "none: cannot open")]
        {
            for command in [&["clip", "-o", &out, "--max-norm", "1"][..], &["norm"]] {
                ranks(count, &set.args(command, &[bad])).failed(1, &[expected]);
            }
        }
    }
    fs::remove_file(broken).unwrap();
    assert_eq!(set.folder.names(), names);
}

#[test]
fn non_finite_gradients_stop_all_and_are_found() {
    let set = set(&[("f.bias", "F32", f32s(&[1.0, f32::NAN, 2.0]))]);
    for count in [1, 2, 8] {
        let run = ranks(count, &set.args(&["clip"], &["-o", &set.out(), "--max-norm", "1"]));
        run.failed(3, &[r#"index 1 of tensor "f.bias""#, "1.safetensors; nothing was written", "--non-finite"]);
        set.is_as_it_was();
    }
    let found = ranks(8, &set.args(&["norm", "--json"], &[])).succeeded().json();
    let found = &found["non_finite"];
    // The smallest file is the last one that is given away.
    assert_eq!((&found["count"], &found["rank"], &found["index"]), (&1.into(), &4.into(), &1.into()), "{found}");
    assert_eq!((&found["tensor"], &found["file"]), (&"f.bias".into(), &Value::from(&*set.files[1])), "{found}");
    let table = ranks(8, &set.args(&["norm"], &[])).succeeded().stdout;
    assert!(table.contains(&format!(r#"of tensor "f.bias" on rank 4 in {}"#, set.files[1])), "{table}");
}

#[test]
fn places_that_cannot_be_written() {
    let set = set(&[]);
    let inside = set.folder.path("whole/out");
    let mut cases = vec![
        (set.folder.path("none/out"), 1, "not a folder, so OUT cannot be written"),
        (inside, 1, "not a folder, so OUT cannot be written"),
        (set.folder.path(".."), 2, "OUT must name a new folder"),
        (set.folder.path("whole"), 1, "whole: not a folder"),
    ];
    if cfg!(target_os = "linux") {
        cases.push(("/proc/out".into(), 1, "/proc/out: cannot write"));
    }
    for (out, code, expected) in cases {
        for count in [1, 3] {
            let args = set.args(&["clip"], &["-o", out.to_str().unwrap(), "--max-norm", "1", "--force"]);
            ranks(count, &args).failed(code, &[expected]);
            set.is_as_it_was();
        }
    }
}

#[test]
fn out_is_replaced_only_when_forced_and_only_by_a_whole_set() {
    let set = set(&[("f.bias", "F32", f32s(&[f32::NAN]))]);
    let out = set.out();
    let args = |more: &[&'static str]| [&["-o", &out, "--max-norm", "1", "--non-finite"][..], more].concat();
    let clip = |more: &[&'static str]| ranks(3, &set.args(&["clip"], &args(more)));
    clip(&["drop"]).succeeded();
    let before = tensors(out.as_ref());

    clip(&["skip"]).failed(1, &["out: exists already", "--force"]);
    clip(&["error", "--force"]).failed(3, &["f.bias"]);
    assert!(tensors(out.as_ref()) == before);
    fs::rename(Path::new(&out).join("0.safetensors"), Path::new(&out).join("an older set.safetensors")).unwrap();
    clip(&["skip", "--force"]).succeeded();
    let names = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, ["0", "1", "2", "3", "4"].map(|name| format!("{name}.safetensors")));
    assert!(tensors(out.as_ref()) != before);

    // What is no set is not removed, not even by force.
    let note = Path::new(&out).join("notes");
    fs::write(&note, "mine").unwrap();
    clip(&["skip", "--force"]).failed(1, &[r#"out: holds "notes""#, "choose another OUT"]);
    fs::remove_file(&note).unwrap();
    fs::create_dir(&note).unwrap();
    clip(&["skip", "--force"]).failed(1, &[r#"out: holds "notes""#]);
    fs::remove_dir(&note).unwrap();
    let inputs = set.folder.path("");
    let inputs = inputs.to_str().unwrap().trim_end_matches('/');
    let args = set.args(&["clip"], &["-o", inputs, "--force", "--max-norm", "1"]);
    ranks(2, &args).failed(2, &["OUT would replace its own input"]);
    fs::remove_dir_all(&out).unwrap();
    set.is_as_it_was();
}

/// Two files of these tensors, and one more without.
fn with_replicas(a: Named<'_>, b: Named<'_>) -> (Folder, [String; 3]) {
    let folder = Folder::new();
    let own = |name, x: f32| (name, "F32", f32s(&[x]));
    let files = [
        folder.write("0", file(&[own("w0", 3.0), a])),
        folder.write("1", file(&[own("w1", 4.0), b, own("more", 0.0), own("still more", 0.0)])),
        folder.write("2", file(&[own("w2", 12.0)])),
    ];
    let files = files.map(|path: PathBuf| path.to_str().expect("UTF-8").to_owned());
    (folder, files)
}

#[test]
fn replicas_count_once() {
    let bias = || ("ln.bias", "F32", f32s(&[84.0]));
    let (folder, files) = with_replicas(bias(), bias());
    let norm = |count, more: &[&str]| {
        let args = ["norm", "--json"].into_iter().chain(files.iter().map(String::as_str)).chain(more.iter().copied());
        let json = ranks(count, &args.collect::<Vec<_>>()).succeeded().json();
        (json["total_norm"].as_f64().unwrap(), json["elements"].as_u64().unwrap(), json["tensors"].as_u64().unwrap())
    };
    for count in [1, 2, 3, 5] {
        assert_eq!(norm(count, &["--replicated", "ln.bias"]), (85.0, 6, 6));
        assert_eq!(norm(count, &["--replicated", "w*", "--replicated", "*.bi*s"]), (85.0, 6, 6));
        // Slices count each.
        assert_eq!(norm(count, &[]), ((169.0f64 + 2.0 * 84.0 * 84.0).sqrt(), 7, 7));

        let out = folder.path("out");
        let args = ["clip", "-o", out.to_str().unwrap(), "--replicated", "ln.*", "--max-norm", "42.5", "--eps", "0"];
        let run = ranks(count, &[&args[..], &files.each_ref().map(String::as_str)].concat()).succeeded();
        assert!(run.stdout.contains("replicas     1 tensor not counted"), "{run:?}");
        for (name, own) in [("0", 1.5f32), ("1", 2.0)] {
            let all = tensors(&out.join(name));
            // The replica that does not count is scaled like the other one.
            assert_eq!((&all["ln.bias"].1, &all[&format!("w{name}")].1), (&f32s(&[42.0]), &f32s(&[own])));
        }
        fs::remove_dir_all(out).unwrap();
    }
}

/// Each rank clips copies of its files on a device.
#[cfg(feature = "gpu")]
#[test]
fn on_a_gpu() {
    let (folder, files) = with_replicas(("ln.bias", "F32", f32s(&[84.0])), ("ln.bias", "F32", f32s(&[84.0])));
    let out = folder.path("out");
    let more = ["--backend", "gpu", "--json", "--replicated", "ln.bias"];
    for count in [1, 2, 5] {
        let clip = [&["clip", "-o", out.to_str().unwrap(), "--max-norm", "42.5", "--eps", "0"], &more[..]].concat();
        for args in [&clip[..], &[&["norm"], &more[..]].concat()] {
            let args = [args, &files.each_ref().map(String::as_str)].concat();
            let json = each_rank(count, |_| args.clone()).succeeded().json();
            let norm = json["total_norm"].as_f64().unwrap();
            assert!((norm / 85.0 - 1.0).abs() < 1e-6 && json["backend"] == "gpu" && json["elements"] == 6, "{json}");
        }
        for (name, own) in [("0", 1.5f32), ("1", 2.0)] {
            let all = tensors(&out.join(name));
            for (name, value) in [("ln.bias", 42.0), (&*format!("w{name}"), own)] {
                let clipped = f32::from_le_bytes(all[name].1[..].try_into().unwrap());
                assert!((clipped / value - 1.0).abs() < 1e-6, "{name}: {clipped}");
            }
        }
        fs::remove_dir_all(&out).unwrap();
    }
    // Whatever stops them, the copies vanish.
    let bad = folder.write("bad", file(&[("b", "F32", f32s(&[f32::NAN]))]));
    let double = folder.write("double", file(&[("b", "F64", vec![0; 8])]));
    for (file, code, expected) in [(bad, 3, "tensor \"b\" on rank"), (double, 1, "is float64")] {
        let args = ["clip", "-o", out.to_str().unwrap(), "--max-norm", "1", "--backend", "gpu", file.to_str().unwrap()];
        let args = [&args[..], &files.each_ref().map(String::as_str)].concat();
        each_rank(3, |_| args.clone()).failed(code, &[expected]);
    }
    assert_eq!(folder.names(), ["0", "1", "2", "bad", "double"]);
}

#[test]
fn replicas_that_are_none() {
    let bias = |x: &[f32]| ("ln.bias", "F32", f32s(x));
    let cases = [(bias(&[1.0]), bias(&[1.0, 2.0])), (bias(&[1.0]), ("ln.bias", "BF16", vec![0; 2]))];
    for (a, b) in cases {
        let (_folder, files) = with_replicas(a, b);
        for count in [1, 2, 4] {
            let norm = |replicated| {
                let args = ["norm", "--replicated", replicated].into_iter().chain(files.iter().map(String::as_str));
                ranks(count, &args.collect::<Vec<_>>())
            };
            norm("*").failed(1, &[r#"1: tensor "ln.bias" is"#, "replicas of one tensor must be alike"]);
            norm("ln").failed(2, &[r#"--replicated "ln": no gradient in the files has this name"#]);
        }
    }
}

#[test]
fn ranks_that_were_asked_for_different_things() {
    let set = set(&[]);
    let out = set.out();
    let args = |files: std::ops::Range<usize>, norm| {
        let files = set.files[files].iter().map(String::as_str);
        ["clip", "-o", &out, "--backend", "cpu", "--max-norm", norm].into_iter().chain(files).collect::<Vec<_>>()
    };
    each_rank(4, |rank| args(0..if rank == 2 { 4 } else { 5 }, "1")).failed(2, &["rank 2 was given other arguments"]);
    each_rank(3, |rank| args(0..5, if rank == 1 { "2" } else { "1" })).failed(2, &["rank 1 was given other arguments"]);
    each_rank(2, |rank| if rank == 0 { vec!["--help"] } else { args(0..5, "1") }).failed(2, &["rank 1 was given"]);
    set.is_as_it_was();
}

#[test]
fn a_rank_that_never_comes() {
    let set = set(&[]);
    let out = set.out();
    let args = set.args(&["clip"], &["-o", &out, "--max-norm", "1", "--backend", "cpu"]);
    for gone in 0..3 {
        let mut groups = thread_group(3, None);
        drop(groups.remove(gone));
        let run = run_groups(groups.into_iter().map(|group| (group, args.clone())));
        assert!(run.exits.iter().all(|exit| exit.exit_code == 1), "{run:?}");
        set.is_as_it_was();
    }
}

/// An error of the command line is printed once.
#[test]
fn usage() {
    let set = set(&[]);
    let out = set.out();
    let scope = "use gradclip on each file";
    let cases: [(&[&str], &str); 10] = [
        (&["clip", "-o", &out], "a mode is required"),
        (&["clip", "-o", &out, "--max-norm", "-1"], "max_norm is -1"),
        (&["clip", "--max-norm", "1"], "--out <OUT>"),
        (&["clip", "-o", &out, "--max-norm", "1", "--scope", "tensor"], scope),
        (&["clip", "-o", &out, "--agc", "0.1", "--params", "p"], scope),
        (&["clip", "-o", &out, "--clip-value", "1", "--replicated", "a"], "a clip by value measures no norm"),
        (&["clip", "-o", &out, "--max-norm", "1", &set.files[0]], r#"two files are called "0.safetensors""#),
        (&["norm", "--scope", "unit"], scope),
        (&["norm", "--only", "a.*", "--only", "f"], r#"--only "f": no gradient in the files has this name"#),
        (&["norm", "x.safetensors.index.json"], "is an index: name the files"),
    ];
    for (args, expected) in cases {
        let run = each_rank(3, |_| set.args(args, &[]));
        let all: String = run.exits.iter().map(|exit| &*exit.message).collect();
        assert!(run.exits.iter().all(|exit| exit.exit_code == 2) && all.matches(expected).count() == 1, "{run:?}");
        assert!(run.exits[1..].iter().all(|exit| exit.message.is_empty()), "{run:?}");
    }
    set.is_as_it_was();
    let help = each_rank(2, |_| vec!["clip", "--help"]).succeeded().stdout;
    assert!(help.contains("--replicated") && !help.contains("--agc") && !help.contains("--scope"), "{help}");
    assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
}

/// The ranks that print nothing know that the first could not.
#[test]
fn a_closed_stdout_stops_all() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let ranks = thread_group(3, None)
        .into_iter()
        .map(|group| thread::spawn(move || run(group, 0, [OsString::from("--help")], &mut Full)));
    let exits: Vec<_> = ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().expect("no panic")).collect();
    assert!(exits.iter().all(|exit| exit.exit_code == 1), "{exits:?}");
}

/// Whether a folder in this one has files.
fn has_begun(folder: &Folder) -> bool {
    folder.names().iter().any(|name| fs::read_dir(folder.path(name)).is_ok_and(|mut of| of.next().is_some()))
}

/// While one rank still writes, an input of another changes: nobody's OUT appears.
#[cfg(unix)]
#[test]
fn an_input_that_changes_stops_all() {
    let (folder, outs) = (Folder::new(), Folder::new());
    let (mut met, mut tries) = (0, 0);
    // On a busy machine it may be written before the change comes.
    while met < repeats(3, 20) && tries < 20 {
        tries += 1;
        let small = folder.write("small", shaped_file(&[("a", "F32", &[1], f32s(&[1.0]))]));
        let large = crate::common::sparse(&folder.path("large"), &[64, 1 << 20]);
        let out = outs.path("out");
        let args: Vec<_> = ["clip", "--max-norm", "0.5", "-o"].map(str::to_owned).into();
        let args: Vec<_> =
            args.into_iter().chain([&out, &small, &large].map(|path| path.to_str().unwrap().to_owned())).collect();
        let ranks = thread::spawn(move || ranks(2, &args.iter().map(String::as_str).collect::<Vec<_>>()));
        while !has_begun(&outs) {
            assert!(!ranks.is_finished(), "it ended without writing");
        }
        fs::OpenOptions::new().write(true).open(&large).unwrap().set_len(1 << 20).unwrap();
        let ranks = ranks.join().unwrap();
        if ranks.exits[0].exit_code == 1 {
            ranks.failed(1, &["large: changed while it was read"]);
            assert!(outs.names().is_empty(), "{:?}", outs.names());
            met += 1;
        } else {
            // It was written already.
            ranks.succeeded();
            fs::remove_dir_all(out).unwrap();
        }
    }
    assert!(met > 0, "never met while it wrote");
}

/// A rank that dies when it has sent and asked for so many messages: it can do neither any more, and the others see that.
#[derive(Debug)]
struct Dying {
    group: Arc<dyn ProcessGroup>,
    left: AtomicU32,
}

impl Dying {
    fn lives(&self) -> Result<(), gradclip::Error> {
        let died = || gradclip::Error::ProcessGroup("died".into());
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .map(|_| ())
            .map_err(|_| died())
    }
}

impl ProcessGroup for Dying {
    fn rank(&self) -> u32 {
        self.group.rank()
    }

    fn size(&self) -> u32 {
        self.group.size()
    }

    fn send(&self, to: u32, message: &[u8]) -> Result<(), gradclip::Error> {
        self.lives()?;
        self.group.send(to, message)
    }

    fn try_receive(&self, from: u32) -> Result<Option<Vec<u8>>, gradclip::Error> {
        if self.left.load(Ordering::Relaxed) == 0 {
            self.lives()?;
        }
        match self.group.try_receive(from)? {
            Some(message) => self.lives().map(|()| Some(message)),
            None => Ok(None),
        }
    }

    fn calls(&self) -> &AtomicU64 {
        self.group.calls()
    }
}

/// Whenever it happens: nobody waits for ever, OUT is whole or not there, and nothing else is left.
#[test]
fn a_rank_that_dies() {
    let set = set(&[]);
    let out = set.out();
    let args = set.args(&["clip"], &["-o", &out, "--max-norm", "1", "--backend", "cpu", "--threads", "1"]);
    let elsewhere = Folder::new();
    let clipped = elsewhere.path("clipped");
    clip(&set.folder.path("whole"), &clipped, &["--max-norm", "1"]).succeeded();
    for dies in 0..3 {
        let mut placed = 0;
        for left in 0.. {
            let run = run_groups(thread_group(3, None).into_iter().zip(0..).map(|(group, rank)| {
                let left = AtomicU32::new(if rank == dies { left } else { u32::MAX });
                (Arc::new(Dying { group, left }) as Arc<dyn ProcessGroup>, args.clone())
            }));
            let exits = run.exits;
            let codes: Vec<_> = exits.iter().map(|exit| exit.exit_code).collect();
            if Path::new(&out).exists() {
                same_tensors(out.as_ref(), &clipped);
                fs::remove_dir_all(&out).unwrap();
                placed += 1;
            } else {
                assert_eq!(codes, [1; 3], "{exits:?}");
                assert!(exits.iter().any(|exit| !exit.message.is_empty()), "{exits:?}");
            }
            set.is_as_it_was();
            if codes == [0; 3] {
                break;
            }
            assert!(left < 1000);
        }
        // In the last step OUT is there already.
        assert!((1..=5).contains(&placed), "{placed}");
    }
}

/// Runs a test of this file again in another process, which gets `folder` by its environment and is started by a shell.
#[cfg(unix)]
fn again(test: &str, folder: &Folder, before: &str) -> std::process::Command {
    let mut command = std::process::Command::new("bash");
    command.args(["-c", &format!(r#"{before} exec "$0" --exact {test}"#)]).arg(std::env::current_exe().unwrap());
    command.env(AGAIN, folder.path("")).stdout(std::process::Stdio::null());
    command
}

/// The folder of the process that runs this test, if this is the other one.
#[cfg(unix)]
fn folder_of_the_first() -> Option<PathBuf> {
    std::env::var_os(AGAIN).map(PathBuf::from)
}

#[cfg(unix)]
const AGAIN: &str = "GRADCLIP_TEST_AGAIN";

/// One rank's file fits the disk and the other's does not: here, files may not grow past 64 KiB.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_stops_all() {
    if let Some(folder) = folder_of_the_first() {
        let path = |name| folder.join(name).to_str().expect("UTF-8").to_owned();
        for count in [1, 2, 3] {
            ranks(count, &["clip", &path("small"), &path("large"), "-o", &path("out"), "--max-norm", "1"])
                .failed(1, &["out/large: cannot write"]);
        }
        return;
    }
    let folder = Folder::new();
    folder.write("small", file(&[("a", "F32", f32s(&[1.0]))]));
    folder.write("large", file(&[("a", "F32", f32s(&noise(20_000, 1)))]));
    let mut command = again("processes::a_full_disk_stops_all", &folder, "trap '' XFSZ; ulimit -f 64;");
    let stdout = command.stdout(std::process::Stdio::piped()).output().unwrap().stdout;
    let stdout = String::from_utf8_lossy(&stdout);
    assert!(stdout.contains("1 passed"), "{stdout}");
    assert_eq!(folder.names(), ["large", "small"]);
}

/// Ctrl-C and its kin while the ranks write, here in a process of their own.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing() {
    if let Some(folder) = folder_of_the_first() {
        let path = |name| folder.join(name).to_str().expect("UTF-8").to_owned();
        ranks(2, &["clip", &path("in"), "-o", &path("out"), "--max-norm", "1"]);
        return;
    }
    let (folder, mut interrupted) = (Folder::new(), false);
    crate::common::sparse(&folder.path("in"), &[64, 1 << 20]);
    for _ in 0..10 {
        let mut child = again("processes::an_interrupt_leaves_nothing", &folder, "").spawn().unwrap();
        while !has_begun(&folder) {
            assert!(child.try_wait().unwrap().is_none(), "it ended without writing");
            thread::yield_now();
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGTERM)
            .unwrap();
        let code = child.wait().unwrap().code();
        let names = folder.names();
        match code {
            Some(130) if names == ["in"] => interrupted = true,
            // It was done already.
            Some(0 | 130) if names == ["in", "out"] => fs::remove_dir_all(folder.path("out")).unwrap(),
            code => panic!("{code:?}: {names:?}"),
        }
    }
    assert!(interrupted, "never met while it wrote");
}

/// What rounding loses is added up over the ranks, and float32 loses nothing.
#[test]
fn losses_are_those_of_all_ranks() {
    let folder = Folder::new();
    let halves = |count: usize| vec![half::f16::from_f32(6.5e-5).to_le_bytes(); count].concat();
    let files = [3, 5].map(|count| folder.write(&format!("{count}.safetensors"), file(&[("w", "F16", halves(count))])));
    let [a, b] = files.each_ref().map(|path| path.to_str().unwrap());
    let out = folder.path("out");
    let args = ["clip", a, b, "-o", out.to_str().unwrap(), "--max-norm", "1", "--grad-scale", "65536", "--force"];
    for count in [1, 2, 3] {
        let json = ranks(count, &[&args[..], &["--json"]].concat()).succeeded().json();
        assert_eq!(json["lost"], serde_json::json!({ "zero": 8, "infinite": 0 }), "{count}");
        let text = ranks(count, &args).succeeded().stdout;
        assert!(text.contains("8 of 8 elements became 0; --out-dtype float32 keeps those of float16"), "{text}");
        let json = ranks(count, &[&args[..], &["--json", "--out-dtype", "float32"]].concat()).succeeded().json();
        assert_eq!(json["lost"], serde_json::json!({ "zero": 0, "infinite": 0 }), "{count}");
        let wide = fs::read(out.join("5.safetensors")).expect("it is written");
        assert!(wide.ends_with(&f32s(&[half::f16::from_f32(6.5e-5).to_f32() / 65536.0; 5])), "{count}");
    }
}

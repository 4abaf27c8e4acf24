//! The program is killed (SIGKILL), so that it cannot clean up: OUT is absent, or whole and right. A temporary file may be
//! left, whose name says so.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use crate::common::{Folder, f32s, file, repeats, text};

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradclip"));
    command
        .args(args)
        .args(["--backend", "cpu", "--quiet"])
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the program starts")
}

/// Random numbers from 0 to 1, other ones in every run.
fn moments() -> impl Iterator<Item = f64> {
    let mut state = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    })
}

#[test]
fn at_any_moment_out_is_absent_or_whole() {
    let (folder, out) = (Folder::new(), Folder::new());
    let ones = f32s(&vec![1.0; 2 << 20]);
    let input = folder.write("in", file(&[("a", "F32", ones.clone()), ("b", "F32", ones)]));
    let output = out.path("out");
    let args = ["clip", text(&input), "-o", text(&output), "--max-norm", "1"];
    let mut whole = Vec::new();
    let mut times: Vec<_> = (0..5)
        .map(|_| {
            let begin = Instant::now();
            assert!(start(&args).wait().unwrap().success());
            let took = begin.elapsed();
            whole = out.read("out");
            fs::remove_file(&output).unwrap();
            took
        })
        .collect();
    times.sort();
    let time = times[0];

    let kills = repeats(40, 200);
    let (mut before, mut during, mut after, mut ended) = (0, 0, 0, 0);
    let mut moments = moments();
    while before + during + after < kills {
        assert!(ended < 10 * kills, "it ends before it can be killed");
        let moment = moments.next().unwrap();
        let mut child = start(&args);
        std::thread::sleep(time.mul_f64(moment));
        // One that ended already is not there to be killed.
        let _ = child.kill();
        let status = child.wait().unwrap();
        assert!(status.success() || status.signal() == Some(9), "{status:?}");
        let mut left = out.names();
        let there = left.iter().position(|name| name == "out").map(|i| left.remove(i)).is_some();
        let temporary = |name: &String| name.starts_with(".gradclip-") && name.ends_with(".tmp");
        assert!(left.len() <= 1 && left.iter().all(temporary), "{left:?}");
        if there {
            assert!(left.is_empty() && out.read("out") == whole, "OUT is there, but not whole");
        }
        match (status.success(), there, left.is_empty()) {
            (true, true, _) => ended += 1,
            (true, false, _) => panic!("it ended well without OUT"),
            (false, true, _) => after += 1,
            (false, false, false) => during += 1,
            (false, false, true) => before += 1,
        }
        for name in out.names() {
            fs::remove_file(out.path(&name)).unwrap();
        }
    }
    println!(
        "kills: {kills} at random moments of {} ms: {before} before it wrote, {during} while it wrote, {after} with OUT in \
         place ({ended} more runs had ended before)",
        time.as_millis()
    );
    assert!(during >= kills / 20, "only {during} of {kills} kills met it writing");
    assert_eq!(folder.names(), ["in"]);
}

/// Between two of its renames: shards of two sets must not stand under one index.
#[test]
fn a_set_that_replaces_another_is_never_half_of_each() {
    const SHARDS: usize = 100;
    const NAME: &str = "x.safetensors.index.json";
    let (folder, out) = (Folder::new(), Folder::new());
    let shard = |i: usize| format!("{i:03}.safetensors");
    let map: Vec<_> = (0..SHARDS).map(|i| format!(r#""t{i}": "{}""#, shard(i))).collect();
    for i in 0..SHARDS {
        folder.write(&shard(i), file(&[(&format!("t{i}"), "F32", f32s(&[1.0]))]));
    }
    let index = folder.write(NAME, format!(r#"{{"weight_map": {{{}}}}}"#, map.join(", ")));
    let output = out.path(NAME);
    let wanted = repeats(5, 20);
    let (mut between, mut old, mut new) = (0, 0, 0);
    let begin = Instant::now();
    while between < wanted && begin.elapsed() < Duration::from_secs(60) {
        for name in out.names() {
            fs::remove_file(out.path(&name)).unwrap();
        }
        assert!(start(&["clip", text(&index), "-o", text(&output), "--max-norm", "inf"]).wait().unwrap().success());
        let inodes = || -> Vec<_> { (0..SHARDS).map(|i| fs::metadata(out.path(&shard(i))).unwrap().ino()).collect() };
        let (first, at_first) = (out.path(&shard(0)), inodes());
        let mut child = start(&["clip", text(&index), "-o", text(&output), "--max-norm", "1", "--force"]);
        while fs::metadata(&first).unwrap().ino() == at_first[0] && child.try_wait().unwrap().is_none() {
            std::hint::spin_loop();
        }
        let _ = child.kill();
        child.wait().unwrap();
        let replaced = inodes().iter().zip(&at_first).filter(|(now, then)| now != then).count();
        match replaced {
            0 => old += 1,
            SHARDS => new += 1,
            _ => {
                assert!(!output.exists(), "an index of {replaced} new shards and {} old ones", SHARDS - replaced);
                between += 1;
            }
        }
    }
    println!("kills: {between} between the renames of a set, {old} before, {new} after");
    assert!(between >= wanted / 4, "only {between} of {wanted} kills met it between its renames");
}

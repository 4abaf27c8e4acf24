//! Guards against holding a file in memory: the program runs with less of it than an eighth of the file. The limit is on
//! what a process has for itself; the page cache, which a mapped file lies in, does not count.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::common::{Folder, f32s, raw, text};

/// 256 MiB of gradients.
const BYTES: u64 = 256 << 20;
/// What `ulimit -d` counts in.
const LIMIT_KIB: u64 = 32 << 10;

/// Zeros but for the numbers given, each at a place in the data. Sparse, so that it takes no room.
fn sparse(folder: &Folder, shape: &[u64], numbers: &[(u64, f32)]) -> std::path::PathBuf {
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape:?},"data_offsets":[0,{BYTES}]}}}}"#);
    let path = folder.write("in", raw(&header, b""));
    let file = File::options().write(true).open(&path).unwrap();
    let data = 8 + header.len() as u64;
    file.set_len(data + BYTES).unwrap();
    for (place, x) in numbers {
        file.write_all_at(&f32s(&[*x]), data + 4 * place).unwrap();
    }
    path
}

/// Runs the program on two threads with little memory, and returns its JSON.
#[track_caller]
fn within_the_limit(args: &[&str]) -> serde_json::Value {
    let script = format!(r#"ulimit -d {LIMIT_KIB}; exec "$0" "$@" --backend cpu --threads 2 --json"#);
    let output = Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_gradclip")]).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {:?}, {stderr}", output.status);
    serde_json::from_slice(&output.stdout).expect("stdout is JSON")
}

#[test]
fn an_eighth_of_the_file_is_enough() {
    let folder = Folder::new();
    let last = BYTES / 4 - 1;
    let path = sparse(&folder, &[last + 1], &[(0, 3.0), (last / 2, 4.0), (last, 12.0)]);
    let out = folder.path("out");
    let (input, output) = (text(&path), text(&out));
    assert_eq!(within_the_limit(&["norm", input])["total_norm"], 13.0);
    let cases: [(&[&str], [f32; 3]); 2] =
        [(&["--max-norm", "6.5", "--eps", "0"], [1.5, 2.0, 6.0]), (&["--clip-value", "5"], [3.0, 4.0, 5.0])];
    for (mode, want) in cases {
        let object = within_the_limit(&[&["clip", input, "-o", output, "--force"], mode].concat());
        assert_eq!(object["clipped"], true);
        let file = File::open(&out).unwrap();
        let length = file.metadata().unwrap().len();
        assert_eq!(length, path.metadata().unwrap().len());
        let at = |place: u64| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, length - BYTES + 4 * place).unwrap();
            f32::from_le_bytes(bytes)
        };
        assert_eq!([at(0), at(last / 2), at(last)], want, "{mode:?}");
        let norm = want.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        assert_eq!(within_the_limit(&["norm", output])["total_norm"], norm);
    }
}

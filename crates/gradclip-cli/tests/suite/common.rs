//! Runs the program, and makes files by hand, so that they can be wrong.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Real gradients: float32, L2 norm 0.5245872834952451.
pub(crate) const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/data/lstm_grads.safetensors");

/// How often to repeat what chance decides: a few times for each change, and often where `GRADCLIP_WHOLE` is set, as by night.
pub(crate) fn repeats(few: u32, often: u32) -> u32 {
    if std::env::var_os("GRADCLIP_WHOLE").is_some() { often } else { few }
}

/// What the program did.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the program.
pub(crate) fn gradclip<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Run {
    gradclip_with(args, [])
}

/// Runs the program with more in its environment.
pub(crate) fn gradclip_with<A: AsRef<OsStr>, const N: usize>(
    args: impl IntoIterator<Item = A>,
    environment: [(&str, &str); N],
) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradclip"));
    // What the user has tuned changes the last bits of a norm.
    command.env("XDG_CONFIG_HOME", std::env::temp_dir().join("gradclip's tests keep nothing here"));
    let output = command.args(args).envs(environment).output().expect("the program starts");
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("stdout is text"),
        stderr: String::from_utf8(output.stderr).expect("stderr is text"),
    }
}

/// Clips on the CPU; `more` begins with the mode.
pub(crate) fn clip(file: &Path, out: &Path, more: &[&str]) -> Run {
    let args = [OsStr::new("clip"), file.as_os_str(), OsStr::new("-o"), out.as_os_str()];
    gradclip(args.into_iter().chain(["--backend", "cpu"].map(OsStr::new)).chain(more.iter().map(OsStr::new)))
}

impl Run {
    /// The run succeeded without a message.
    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self
    }

    /// The run ended with this code and a short error that contains all of these texts.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, expected: &[&str]) -> Self {
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
        for part in expected {
            assert!(self.stderr.contains(part), "{part:?} is missing: {self:?}");
        }
        // Clap's own messages add the usage.
        assert!(self.stderr.lines().count() <= 2 || self.stderr.contains("try '--help'"), "{self:?}");
        self
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.stdout.lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.stdout).expect("stdout is JSON")
    }
}

/// A folder of files that vanishes with the test.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), bytes).expect("the file is written");
        self.path(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("the file is there")
    }

    /// Every name, hidden ones too, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(&self.0).unwrap().map(name).collect();
        names.sort();
        names
    }
}

/// A file with any header.
pub(crate) fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A well-formed file of tensors (name, dtype, data) with one dimension.
pub(crate) fn file(tensors: &[(&str, &str, Vec<u8>)]) -> Vec<u8> {
    let shapes: Vec<_> = tensors.iter().map(|(_, dtype, bytes)| [bytes.len() / size(dtype)]).collect();
    let shaped = tensors.iter().zip(&shapes);
    shaped_file(
        &shaped.map(|((name, dtype, bytes), shape)| (*name, *dtype, &shape[..], bytes.clone())).collect::<Vec<_>>(),
    )
}

/// A well-formed file of tensors (name, dtype, shape, data).
pub(crate) fn shaped_file(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut entries = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        let name = serde_json::Value::from(*name);
        entries.push(format!(r#"{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#));
        data.extend_from_slice(bytes);
    }
    raw(&format!("{{{}}}", entries.join(",")), &data)
}

fn size(dtype: &str) -> usize {
    match dtype {
        "F64" | "I64" | "C64" => 8,
        "F32" => 4,
        "F16" | "BF16" => 2,
        _ => 1,
    }
}

/// A well-formed file of float32 zeros, so many bytes of them. Sparse, so that it takes no room.
#[cfg(unix)]
pub(crate) fn sparse(path: &Path, shape: &[u64]) -> PathBuf {
    let bytes = 4 * shape.iter().product::<u64>();
    let header = raw(&format!(r#"{{"a":{{"dtype":"F32","shape":{shape:?},"data_offsets":[0,{bytes}]}}}}"#), b"");
    fs::write(path, &header).expect("the file is written");
    let file = fs::File::options().write(true).open(path).expect("the file is there");
    file.set_len(header.len() as u64 + bytes).expect("the file grows");
    path.to_owned()
}

/// One of the files that the peers were asked about, or answered with.
pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")).join(path)
}

/// The float32 tensors of a file, by name: shape and elements.
pub(crate) fn f32_tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        let values = view.data().chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
        (name, (view.shape().to_vec(), values.collect()))
    };
    file.tensors().into_iter().map(tensor).collect()
}

pub(crate) fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The float32 values at the end of a file, which is where a last tensor lies.
pub(crate) fn last_f32s(file: &[u8], count: usize) -> Vec<f32> {
    file[file.len() - 4 * count..].chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Checks that every element is closed where it should be, and that text holds no markup: all that this SVG uses of XML.
#[track_caller]
pub(crate) fn well_formed(svg: &str) {
    let mut open = Vec::new();
    let body = svg.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n").unwrap();
    assert!(body.chars().all(|c| !c.is_control() || c == '\n'));
    for piece in body.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').unwrap();
        assert!(!text.contains('>') && tag.matches('"').count() % 2 == 0, "{piece}");
        for entity in text.split('&').skip(1) {
            assert!(["amp;", "lt;", "gt;", "quot;"].iter().any(|known| entity.starts_with(known)), "{piece}");
        }
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "{piece}"),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split(' ').next().unwrap()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

//! Logs of norms: JSON lines, one for each file that was measured. `gradclip norm --append` writes them, and `gradclip history`
//! reads them.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use gradclip::{Clip, ClipReport, Tensor};
use gradclip_common::header::Pairs;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::failure::Failure;
use crate::input::open_regular;

/// The norms of one file.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LogLine {
    pub(crate) file: String,
    /// The p of the norm.
    pub(crate) norm_type: Number,
    pub(crate) total_norm: Number,
    pub(crate) non_finite: Option<Found>,
    /// The norm of each tensor.
    pub(crate) tensors: Pairs<Number>,
}

/// The non-finite elements of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) count: u64,
    pub(crate) tensor: String,
    pub(crate) index: u64,
}

/// A number, or `"NaN"` or `"inf"`, which JSON has no numbers for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Number(pub(crate) f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() { serializer.serialize_f64(self.0) } else { serializer.collect_str(&self.0) }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(f64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(x) => Ok(Self(x)),
            Either::Text(text) => text.parse().map(Self).map_err(serde::de::Error::custom),
        }
    }
}

impl LogLine {
    /// The line of a report by tensor.
    pub(crate) fn new(file: &Path, clip: &Clip, report: &ClipReport, tensors: &[Tensor<'_>]) -> Self {
        let found = |found: &gradclip::NonFiniteElements| Found {
            count: found.count,
            tensor: found.name.clone().unwrap_or_default(),
            index: found.index,
        };
        let norm = |segment: &gradclip::SegmentReport| {
            let name = segment.tensor.and_then(|i| tensors[i].name()).unwrap_or_default();
            (name.to_owned(), Number(segment.norm))
        };
        Self {
            file: file.display().to_string(),
            norm_type: Number(clip.norm_type.power()),
            total_norm: Number(report.total_norm),
            non_finite: report.non_finite.as_ref().map(found),
            tensors: Pairs(report.segments.iter().map(norm).collect()),
        }
    }

    /// Appends the line to a log. [`check_appendable`] comes first.
    pub(crate) fn append(&self, log: &Path) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(self).map_err(|error| Failure::Setup(error.to_string()))?;
        line.push(b'\n');
        let mut file = OpenOptions::new().append(true).create(true).open(log).map_err(Failure::io(log, "open"))?;
        // One write, so that lines of several processes do not mix.
        file.write_all(&line).map_err(Failure::io(log, "write"))
    }
}

/// Checks that lines can be appended: the file is absent or empty, or it is a log.
pub(crate) fn check_appendable(log: &Path) -> Result<(), Failure> {
    match log.metadata() {
        Ok(found) if found.is_file() && (found.len() == 0 || is_log(log)?) => Ok(()),
        Ok(_) => Err(Failure::file(log, "not a log of norms: choose another LOG")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::io(log, "open")(error)),
    }
}

/// Whether a file begins as a log does. A safetensors file begins with a length, whose upper bytes are 0.
pub(crate) fn is_log(path: &Path) -> Result<bool, Failure> {
    let mut first = Vec::new();
    open_regular(path)?.take(8).read_to_end(&mut first).map_err(Failure::io(path, "read"))?;
    Ok(first.starts_with(b"{\"") && !first.contains(&0))
}

/// Calls `each` with each line of a log.
pub(crate) fn read(log: &Path, mut each: impl FnMut(LogLine) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut file = BufReader::new(open_regular(log)?);
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        if file.read_until(b'\n', &mut text).map_err(Failure::io(log, "read"))? == 0 {
            break;
        }
        let line = serde_json::from_slice(&text).map_err(|error| {
            Failure::file(log, format!("line {number} is not a line of gradclip norm --append ({error}): remove it"))
        });
        each(line?)?;
    }
    Ok(())
}

//! What the commands print.

use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

use gradclip::{Clip, ClipReport, NonFiniteElements, Scope, SegmentReport, Tensor};
use indicatif::HumanCount;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::backend::Backend;
use crate::failure::Failure;
use crate::names::norm_name;

/// Prints to stdout.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    print_by(|stdout| stdout.write_all(text.as_bytes()))
}

/// Prints one object on one line, which may be too long to hold.
pub(crate) fn print_json(object: &impl Serialize) -> Result<(), Failure> {
    print_by(|mut stdout| {
        serde_json::to_writer(&mut stdout, object)?;
        stdout.write_all(b"\n")
    })
}

/// Prints to stdout what may be long.
pub(crate) fn print_by(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    let mut stdout = BufWriter::new(io::stdout().lock());
    printed(write(&mut stdout).and_then(|()| stdout.flush()))
}

/// How printing to stdout went: a reader that has gone (`| head`) is no failure.
pub(crate) fn printed(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io(Path::new("standard output"), "write")(error))
        }
        _ => Ok(()),
    }
}

/// A remark for people, on stderr.
pub(crate) fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// The outcome of `norm` and `clip`, ready to be printed.
#[derive(Debug)]
pub(crate) struct Outcome<'a> {
    pub(crate) report: &'a ClipReport,
    pub(crate) scope: Scope,
    pub(crate) tensors: &'a [Tensor<'a>],
    /// Whether clipped examples were summed.
    pub(crate) sum: bool,
    pub(crate) backend: &'a Backend,
    pub(crate) time: Duration,
    /// The file of the first non-finite element, where there are several.
    pub(crate) file: Option<&'a Path>,
    /// Who else had a part in it, if it was done by several ranks.
    pub(crate) ranks: Option<Ranks>,
}

/// What several ranks are together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranks {
    pub(crate) count: u32,
    /// How many tensors all of them count.
    pub(crate) tensors: usize,
}

/// The fields of `--json`. Numbers that are not finite become null.
#[derive(Serialize)]
struct Json<'a> {
    total_norm: f64,
    clip_coef: f64,
    clipped: bool,
    elements: u64,
    tensors: usize,
    backend: &'static str,
    adapter: Option<&'a str>,
    non_finite: Option<NonFiniteJson<'a>>,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    segments: Option<SegmentsJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    num_clipped: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranks: Option<u32>,
}

#[derive(Serialize)]
struct NonFiniteJson<'a> {
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rank: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    tensor: Option<&'a str>,
    index: u64,
}

/// A list that is never held: there may be millions of segments.
struct SegmentsJson<'a>(&'a Outcome<'a>);

impl Serialize for SegmentsJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let json = |s: &SegmentReport| SegmentJson { name: self.0.name(s), norm: s.norm, clip_coef: s.clip_coef };
        serializer.collect_seq(self.0.report.segments.iter().map(json))
    }
}

#[derive(Serialize)]
struct SegmentJson {
    name: String,
    norm: f64,
    clip_coef: f64,
}

impl<'a> Outcome<'a> {
    /// What `--json` prints.
    pub(crate) fn json(&self) -> impl Serialize {
        let non_finite = |found: &'a NonFiniteElements| NonFiniteJson {
            count: found.count,
            rank: self.ranks.map(|_| found.rank.unwrap_or_default()),
            file: self.file.filter(|_| self.ranks.is_some()).map(|file| file.display().to_string()),
            tensor: found.name.as_deref(),
            index: found.index,
        };
        Json {
            total_norm: self.report.total_norm,
            clip_coef: self.report.clip_coef,
            clipped: self.report.clipped,
            elements: self.report.elements,
            tensors: self.num_tensors(),
            backend: if self.backend.adapter().is_some() { "gpu" } else { "cpu" },
            adapter: self.backend.adapter(),
            non_finite: self.report.non_finite.as_ref().map(non_finite),
            seconds: self.time.as_secs_f64(),
            segments: (self.scope != Scope::Global).then_some(SegmentsJson(self)),
            num_clipped: self.sum.then(|| self.num_clipped()),
            ranks: self.ranks.map(|ranks| ranks.count),
        }
    }

    fn num_tensors(&self) -> usize {
        self.ranks.map_or(self.tensors.len(), |ranks| ranks.tensors)
    }

    /// The lines of a norm.
    pub(crate) fn measured(&self, clip: &Clip) -> Vec<(&'static str, String)> {
        let norm = format!("{} ({})", number(self.report.total_norm, 9), norm_name(clip));
        [("total norm", norm)].into_iter().chain(self.non_finite().map(|found| ("non-finite", found))).collect()
    }

    /// What is not finite, and where the first of it is.
    pub(crate) fn non_finite(&self) -> Option<String> {
        let file = self.file.map(|file| format!(" in {}", file.display()));
        self.report.non_finite.as_ref().map(|found| format!("{found}{}", file.unwrap_or_default()))
    }

    /// How many examples were clipped: of all tensors, or a list by tensor.
    fn num_clipped(&self) -> Value {
        if self.scope == Scope::Example {
            return self.report.num_clipped().into();
        }
        let mut counts = vec![0; self.tensors.len()];
        for tensor in self.report.segments.iter().filter(|s| s.clipped).filter_map(|s| s.tensor) {
            counts[tensor] += 1;
        }
        counts.into()
    }

    /// What a segment is called.
    pub(crate) fn name(&self, segment: &SegmentReport) -> String {
        let tensor = segment.tensor.and_then(|i| self.tensors[i].name()).unwrap_or_default();
        match segment.index {
            None => tensor.to_owned(),
            Some(index) if self.scope == Scope::Unit => format!("{tensor}[{index}]"),
            Some(index) => format!("{tensor} example {index}").trim_start().to_owned(),
        }
    }

    /// The segments of the largest norms, what is not finite before all.
    pub(crate) fn largest(&self, count: usize) -> Vec<&SegmentReport> {
        let mut segments: Vec<_> = self.report.segments.iter().collect();
        // A NaN may carry a sign.
        segments.sort_by(|a, b| b.norm.abs().total_cmp(&a.norm.abs()));
        segments.truncate(count);
        segments
    }

    /// The lines that both commands share; `others` tensors were no gradients, `bytes` were read.
    pub(crate) fn lines(&self, others: usize, bytes: u64) -> Vec<(&'static str, String)> {
        let mut size =
            format!("{} in {}", HumanCount(self.report.elements), plural(self.num_tensors() as u64, "tensor"));
        if others > 0 {
            size += &format!(" ({} other{} passed by)", HumanCount(others as u64), if others == 1 { "" } else { "s" });
        }
        let ran_on = match self.ranks {
            Some(Ranks { count, .. }) if count > 1 => format!("{count} ranks, the first on {}", self.backend),
            _ => self.backend.to_string(),
        };
        let seconds = self.time.as_secs_f64();
        let speed = bytes as f64 / 1e9 / seconds.max(1e-9);
        vec![
            ("elements", size),
            ("ran on", ran_on),
            ("time", format!("{} s, {} GB/s", number(seconds, 3), number(speed, 3))),
        ]
    }
}

/// What so many segments of a scope are called.
pub(crate) fn segments(scope: Scope, count: usize) -> String {
    let what = match scope {
        Scope::Unit => "unit",
        Scope::Example | Scope::ExampleTensor => "example",
        _ => "tensor",
    };
    plural(count as u64, what)
}

/// A name from a file as it is printed: in one line, and without what a terminal would obey.
pub(crate) fn shown(name: &str) -> String {
    name.escape_debug().to_string()
}

/// Lays out labels and what they label.
pub(crate) fn table(lines: &[(&'static str, String)]) -> String {
    lines.iter().map(|(label, text)| format!("{label:<12} {text}\n")).collect()
}

/// `1 tensor`, `2,000 tensors`.
pub(crate) fn plural(count: u64, what: &str) -> String {
    format!("{} {what}{}", HumanCount(count), if count == 1 { "" } else { "s" })
}

/// A number of so many significant digits, without trailing zeros.
pub(crate) fn number(x: f64, digits: i32) -> String {
    if x == 0.0 {
        return "0".into();
    }
    if !x.is_finite() {
        return x.to_string();
    }
    let exponent = x.abs().log10().floor() as i32;
    let decimals = (digits - 1 - exponent).max(0) as usize;
    let (text, power) = if (-4..9).contains(&exponent) {
        (format!("{x:.decimals$}"), String::new())
    } else {
        let text = format!("{x:.*e}", (digits - 1) as usize);
        text.split_once('e').map(|(text, power)| (text.to_owned(), format!("e{power}"))).unwrap_or_default()
    };
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{power}")
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_are_short_and_right() {
        let cases = [
            (0.0, "0"),
            (-0.0, "0"),
            (0.5, "0.5"),
            (-0.25, "-0.25"),
            (65536.0, "65536"),
            (100.0, "100"),
            (0.524_587_283_495, "0.5245873"),
            (1e20, "1e20"),
            (-1.25e-25, "-1.25e-25"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "NaN"),
        ];
        for (x, text) in cases {
            assert_eq!(number(x, 7), text);
        }
    }
}

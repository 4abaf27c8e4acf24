//! The report of `norm` and `clip`: as lines of text, and as JSON.

use std::path::Path;
use std::time::Duration;

use gradclip::{
    Clip, ClipReport, Dtype, Histogram, LostElements, NonFinite, NonFiniteElements, Scope, SegmentReport, Skipped,
    Tensor,
};
use gradclip_common::text::{grouped, number, plural};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::backend::Backend;
use crate::description::norm_name;
use crate::groups::GroupReport;

/// A report of the library, and what else is printed with it.
#[derive(Debug)]
pub(crate) struct Summary<'a> {
    pub(crate) report: &'a ClipReport,
    /// The report on each group, if there are several.
    pub(crate) groups: &'a [GroupReport],
    /// Whether norms were measured.
    pub(crate) has_norm: bool,
    /// What was asked for; of groups, what the rest was.
    pub(crate) clip: &'a Clip,
    pub(crate) tensors: &'a [Tensor<'a>],
    /// Whether clipped examples were summed.
    pub(crate) sum: bool,
    /// Whether gradients of half precision were clipped as float32.
    pub(crate) widened: bool,
    pub(crate) backend: &'a Backend,
    pub(crate) time: Duration,
    /// The file of the first non-finite element, if there are several files.
    pub(crate) file: Option<&'a Path>,
    /// The ranks, if it was done by several.
    pub(crate) ranks: Option<Ranks>,
    /// How many tensors are no gradients.
    pub(crate) others: usize,
    /// How many gradients were left out, if there was a selection.
    pub(crate) left_out: Option<usize>,
    /// The magnitudes of all elements, if they were asked for.
    pub(crate) histogram: Option<Histogram>,
}

/// The ranks of a process group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranks {
    pub(crate) count: u32,
    /// How many tensors the norm counts, over all ranks.
    pub(crate) tensors: usize,
}

/// The fields of `--json`. Numbers that are not finite become null; a field beside a norm says why.
#[derive(Serialize)]
struct Json<'a> {
    total_norm: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_norm_is: Option<&'static str>,
    clip_coef: f64,
    clipped: bool,
    elements: u64,
    tensors: usize,
    backend: &'static str,
    adapter: Option<&'a str>,
    non_finite: Option<NonFiniteJson<'a>>,
    lost: Option<LostJson>,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<Vec<GroupJson<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    segments: Option<SegmentsJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    num_clipped: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranks: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    histogram: Option<Value>,
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

#[derive(Serialize)]
struct GroupJson<'a> {
    name: &'a str,
    norm: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    norm_is: Option<&'static str>,
    clip_coef: f64,
    clipped: bool,
    elements: u64,
}

#[derive(Serialize)]
struct LostJson {
    zero: u64,
    infinite: u64,
}

/// A list that is serialised without being held in memory: there may be millions of segments.
struct SegmentsJson<'a>(&'a Summary<'a>);

impl Serialize for SegmentsJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.report.segments.iter().map(|segment| SegmentJson {
            name: self.0.name(segment),
            norm: segment.norm,
            norm_is: why_null(segment.norm, segment.non_finite),
            clip_coef: segment.clip_coef,
        }))
    }
}

#[derive(Serialize)]
struct SegmentJson {
    name: String,
    norm: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    norm_is: Option<&'static str>,
    clip_coef: f64,
}

/// Why a norm is null; `non_finite` says that a gradient is the reason.
fn why_null(norm: f64, non_finite: bool) -> Option<&'static str> {
    match norm {
        finite if finite.is_finite() => None,
        nan if nan.is_nan() => Some("nan"),
        _ if non_finite => Some("infinite"),
        _ => Some("beyond float64"),
    }
}

impl<'a> Summary<'a> {
    /// What `--json` prints.
    pub(crate) fn json(&self) -> impl Serialize {
        let non_finite = |found: &'a NonFiniteElements| NonFiniteJson {
            count: found.count,
            rank: self.ranks.map(|_| found.rank.unwrap_or_default()),
            file: self.file.filter(|_| self.ranks.is_some()).map(|file| file.display().to_string()),
            tensor: found.name.as_deref(),
            index: found.index,
        };
        let group = |GroupReport { name, report }: &'a GroupReport| GroupJson {
            name,
            norm: report.total_norm,
            norm_is: self.norm_is(report),
            clip_coef: report.clip_coef,
            clipped: report.clipped,
            elements: report.elements,
        };
        Json {
            total_norm: self.report.total_norm,
            total_norm_is: self.norm_is(self.report),
            clip_coef: self.report.clip_coef,
            clipped: self.report.clipped,
            elements: self.report.elements,
            tensors: self.num_tensors(),
            backend: if self.backend.adapter().is_some() { "gpu" } else { "cpu" },
            adapter: self.backend.adapter(),
            non_finite: self.report.non_finite.as_ref().map(non_finite),
            lost: self.report.lost.map(|lost| LostJson { zero: lost.zero, infinite: lost.infinite }),
            seconds: self.time.as_secs_f64(),
            groups: (!self.groups.is_empty()).then(|| self.groups.iter().map(group).collect()),
            skipped: self.report.skipped.map(|why| if why == Skipped::Above { "above" } else { "non-finite" }),
            segments: (self.clip.scope != Scope::Global).then_some(SegmentsJson(self)),
            num_clipped: self.sum.then(|| self.num_clipped()),
            ranks: self.ranks.map(|ranks| ranks.count),
            left_out: self.left_out,
            histogram: self.histogram.as_ref().map(histogram),
        }
    }

    /// Why the norm of a report is null.
    fn norm_is(&self, report: &ClipReport) -> Option<&'static str> {
        let non_finite = report.has_non_finite() && self.clip.non_finite != NonFinite::Drop;
        if self.has_norm { why_null(report.total_norm, non_finite) } else { Some("not measured") }
    }

    fn num_tensors(&self) -> usize {
        self.ranks.map_or(self.tensors.len(), |ranks| ranks.tensors)
    }

    /// The lines of a measurement.
    pub(crate) fn measured(&self) -> Vec<(&'static str, String)> {
        let norm = format!("{} ({})", number(self.report.total_norm, 9), norm_name(self.clip));
        [("total norm", norm)].into_iter().chain(self.non_finite().map(|found| ("non-finite", found))).collect()
    }

    /// The non-finite elements: how many, and where the first is.
    pub(crate) fn non_finite(&self) -> Option<String> {
        let file = self.file.map(|file| format!(" in {}", file.display()));
        self.report.non_finite.as_ref().map(|found| format!("{found}{}", file.unwrap_or_default()))
    }

    /// The elements that rounding has made 0 or infinite.
    pub(crate) fn lost(&self) -> Option<String> {
        let lost = self.report.lost.filter(|lost| lost.zero + lost.infinite > 0)?;
        let all = plural(self.report.elements, "element");
        let became = match (grouped(lost.zero), grouped(lost.infinite)) {
            (zero, _) if lost.infinite == 0 => format!("{zero} of {all} became 0"),
            (_, infinite) if lost.zero == 0 => format!("{infinite} of {all} became infinite"),
            (zero, infinite) => format!("{zero} of {all} became 0, {infinite} infinite"),
        };
        let of = |dtype| self.tensors.iter().any(|tensor| tensor.dtype() == dtype);
        let halves: Vec<_> = [Dtype::F16, Dtype::BF16].into_iter().filter(|dtype| of(*dtype)).collect();
        let [first, ..] = halves[..] else { return Some(became) };
        let halves = if halves.len() > 1 { "half precision".to_owned() } else { first.to_string() };
        let keep = format!("{became}; --out-dtype float32 keeps those of {halves}");
        Some(if self.widened { became } else { keep })
    }

    /// How many examples were clipped: one count, or a list by tensor under scope `example-tensor`.
    fn num_clipped(&self) -> Value {
        if self.clip.scope == Scope::Example {
            return self.report.num_clipped().into();
        }
        let mut counts = vec![0; self.tensors.len()];
        for tensor in self.report.segments.iter().filter(|s| s.clipped).filter_map(|s| s.tensor) {
            counts[tensor] += 1;
        }
        counts.into()
    }

    /// The name of a segment.
    pub(crate) fn name(&self, segment: &SegmentReport) -> String {
        let tensor = segment.tensor.and_then(|i| self.tensors[i].name()).unwrap_or_default();
        match segment.index {
            None => tensor.to_owned(),
            Some(index) if self.clip.scope == Scope::Unit => format!("{tensor}[{index}]"),
            Some(index) => format!("{tensor} example {index}").trim_start().to_owned(),
        }
    }

    /// The segments with the largest norms; those that are not finite come first.
    pub(crate) fn largest(&self, count: usize) -> Vec<&SegmentReport> {
        let mut segments: Vec<_> = self.report.segments.iter().collect();
        // A NaN may carry a sign.
        segments.sort_by(|a, b| b.norm.abs().total_cmp(&a.norm.abs()));
        segments.truncate(count);
        segments
    }

    /// The lines that both commands print; `bytes` is how many were read.
    pub(crate) fn lines(&self, bytes: u64) -> Vec<(&'static str, String)> {
        let mut size = format!("{} in {}", grouped(self.report.elements), plural(self.num_tensors() as u64, "tensor"));
        let others = Some(self.others).filter(|others| *others > 0);
        let others = others.map(|count| plural(count as u64, "other") + " passed through");
        let left_out = self.left_out.map(|count| plural(count as u64, "tensor") + " left out");
        let beside: Vec<_> = left_out.into_iter().chain(others).collect();
        if !beside.is_empty() {
            size += &format!(" ({})", beside.join(", "));
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

fn histogram(found: &Histogram) -> Value {
    let lost =
        |(name, lost): (&str, LostElements)| (name.to_owned(), json!({ "zero": lost.zero, "infinite": lost.infinite }));
    let lost: Map<_, _> = formats(found).into_iter().map(lost).collect();
    let Histogram { zeros, non_finite, by_exponent, .. } = found;
    json!({ "zeros": zeros, "non_finite": non_finite, "by_exponent": by_exponent, "lost": lost })
}

/// What each narrower format would lose.
pub(crate) fn formats(found: &Histogram) -> [(&'static str, LostElements); 4] {
    [
        ("float16", found.float16),
        ("bfloat16", found.bfloat16),
        ("float8_e4m3", found.float8_e4m3),
        ("float8_e5m2", found.float8_e5m2),
    ]
}

/// A number of segments, by the word of their scope.
pub(crate) fn segments(scope: Scope, count: usize) -> String {
    let what = match scope {
        Scope::Unit => "unit",
        Scope::Example | Scope::ExampleTensor => "example",
        _ => "tensor",
    };
    plural(count as u64, what)
}

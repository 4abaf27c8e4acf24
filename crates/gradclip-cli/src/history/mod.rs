//! `gradclip history`: norms over the steps of a training run, from files of gradients or from logs of them.
//!
//! ```text
//! each FILE          measure its tensors, one file at a time; or read the lines of a log
//! each step          the total, the norm of each group of tensors, the first non-finite element
//! all steps          sort, mark spikes, print
//! ```
//!
//! Memory does not depend on the number of elements: it holds a file's norms by tensor, and each step's norms by group.

mod plot;
mod spikes;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use gradclip::{Clip, NormType, Scope};
use gradclip_common::text::{number, plural, shown, table};
use serde_json::{Map, Value};

use crate::args::{BackendArgs, BackendChoice, HistoryArgs};
use crate::backend::Backend;
use crate::description::measuring;
use crate::failure::Failure;
use crate::groups::norm_of_norms;
use crate::input::{INDEX_SUFFIX, Input, explain, unchanged, unsupported_warning};
use crate::log::{self, Found, LogLine};
use crate::output;
use crate::print::{print, print_by, remark};
use crate::progress;
use crate::selection::{fits, no_such_gradient};

/// The norms of one step.
#[derive(Debug)]
struct Step {
    number: u64,
    file: String,
    total: f64,
    /// By group; a group may have no tensor in this step.
    groups: Vec<Option<f64>>,
    non_finite: Option<Found>,
    /// The robust z-score of the total, where enough steps came before.
    z: Option<f64>,
}

/// The groups of tensors, as they were found.
#[derive(Debug)]
struct Groups<'a> {
    args: &'a HistoryArgs,
    /// In the order in which they came.
    names: Vec<String>,
    numbers: HashMap<String, usize>,
    /// For each pattern, whether it fits a tensor.
    fitting: Vec<bool>,
}

pub(crate) fn run(args: &HistoryArgs) -> Result<(), Failure> {
    let norm_type = args.norm_type.map_or(NormType::L2, NormType::p);
    let clip = measuring(Clip::norm(f64::INFINITY).norm_type(norm_type).scope(Scope::Tensor));
    clip.check()?;
    if let Some(plot) = &args.plot.out {
        let inputs = args.files.iter().map(PathBuf::as_path);
        output::check_paths(std::slice::from_ref(plot), inputs, args.plot.force)?;
    }
    let mut groups = Groups::new(args);
    let steps = steps(args, &clip, &mut groups)?;
    groups.check()?;
    let shown_groups = largest(&steps, groups.names.len(), args.top);
    if let Some(path) = &args.plot.out {
        let title = format!("{} norms over {}", clip.norm_type, plural(steps.len() as u64, "step"));
        let drawing = plot::draw(&title, &steps, &groups.names, &shown_groups, args.spike);
        output::write_file(drawing.as_bytes(), path, args.plot.force)?;
    }
    if args.json {
        return print_by(|stdout| {
            for step in &steps {
                serde_json::to_writer(&mut *stdout, &step.json(&groups.names))?;
                stdout.write_all(b"\n")?;
            }
            Ok(())
        });
    }
    print(&text(args, &clip, &steps, &groups.names, &shown_groups))
}

/// Measures the files and reads the logs, and sorts what they hold by step.
fn steps(args: &HistoryArgs, clip: &Clip, groups: &mut Groups<'_>) -> Result<Vec<Step>, Failure> {
    let cpu = BackendArgs {
        backend: BackendChoice::Cpu,
        adapter: None,
        threads: args.threads,
        no_tuning: false,
        local_rank: None,
    };
    let backend = Backend::choose(&cpu, &[])?;
    let bar = progress::count(args.files.len() as u64, "measuring", args.json);
    let (mut steps, mut warning) = (Vec::new(), None);
    // For each step, whether a later one of the same number may replace it: a run that was resumed logs steps again.
    let mut from_logs = Vec::new();
    for path in bar.wrap_iter(args.files.iter()) {
        let mut add = |line: LogLine, from_log| {
            if line.norm_type.0 != clip.norm_type.power() {
                let other = NormType::p(line.norm_type.0);
                let problem =
                    format!("{:?} was measured by {other}, not by {}: see --norm-type", line.file, clip.norm_type);
                return Err(Failure::file(path, problem));
            }
            steps.push(Step::new(line, groups));
            from_logs.push(from_log);
            Ok(())
        };
        if log::is_log(path)? {
            log::read(path, |line| add(line, true))?;
            continue;
        }
        let input = Input::open(path)?;
        // Of one file, since the others will be alike.
        warning = warning.or_else(|| unsupported_warning(input.unsupported(), "measured"));
        let tensors = input.tensors()?;
        let report = backend.run(|clipper| clipper.measure(clip, &tensors)).map_err(explain([&input]))?;
        unchanged([&input])?;
        add(LogLine::new(path, clip, &report, &tensors), false)?;
    }
    warning.iter().for_each(|warning| remark(warning));
    number_steps(&mut steps);
    let mut sorted: Vec<_> = steps.into_iter().zip(from_logs).collect();
    sorted.sort_by_key(|(step, _)| step.number);
    let mut kept: Vec<(Step, bool)> = Vec::new();
    for (step, from_log) in sorted {
        match kept.last_mut().filter(|(last, _)| last.number == step.number) {
            Some(last) if last.1 && from_log => *last = (step, from_log),
            Some((last, _)) => {
                let message = format!("{:?} and {:?} are both step {}", last.file, step.file, step.number);
                return Err(Failure::Usage(message + ": name one file for each step, with the step last in its name"));
            }
            None => kept.push((step, from_log)),
        }
    }
    let mut steps: Vec<_> = kept.into_iter().map(|(step, _)| step).collect();
    let totals: Vec<_> = steps.iter().map(|step| step.total).collect();
    for (step, z) in steps.iter_mut().zip(spikes::z_scores(&totals)) {
        step.z = z;
        // Later steps may have had groups that this one has not.
        step.groups.resize(groups.names.len(), None);
    }
    Ok(steps)
}

/// Gives each step the number in the name of its file. If one has none, or all have the same, the steps are numbered in order.
fn number_steps(steps: &mut [Step]) {
    let numbers: Vec<_> = steps.iter().map(|step| step_in_name(Path::new(&step.file))).collect();
    let differ = numbers.len() < 2 || numbers.iter().any(|number| *number != numbers[0]);
    for (i, (step, number)) in steps.iter_mut().zip(&numbers).enumerate() {
        step.number = match number {
            Some(number) if differ && !numbers.contains(&None) => *number,
            _ => i as u64,
        };
    }
}

/// The last number in a file's name, or in that of its folder if it has none.
fn step_in_name(path: &Path) -> Option<u64> {
    let last = |name: &str| {
        let end = name.rfind(|c: char| c.is_ascii_digit())? + 1;
        let start = name[..end]
            .rfind(|c: char| !c.is_ascii_digit())
            .map_or(0, |i| i + name[i..].chars().next().map_or(1, char::len_utf8));
        name[start..end].parse().ok()
    };
    let name = path.file_name()?.to_string_lossy();
    let name = name.strip_suffix(INDEX_SUFFIX).or(name.strip_suffix(".safetensors")).unwrap_or(&name);
    last(name).or_else(|| last(&path.parent()?.file_name()?.to_string_lossy()))
}

impl<'a> Groups<'a> {
    fn new(args: &'a HistoryArgs) -> Self {
        Self { args, names: Vec::new(), numbers: HashMap::new(), fitting: vec![false; args.groups.len()] }
    }

    /// The number of a tensor's group: the first pattern that fits, or else `rest`; without patterns the first levels of its
    /// name.
    fn of(&mut self, tensor: &str) -> usize {
        let fitting = self.args.groups.iter().position(|pattern| fits(tensor, pattern));
        let name = match fitting {
            Some(i) => {
                self.fitting[i] = true;
                &*self.args.groups[i]
            }
            None if !self.args.groups.is_empty() => "rest",
            None => tensor.match_indices('.').nth(self.args.levels.get() - 1).map_or(tensor, |(end, _)| &tensor[..end]),
        };
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        self.names.push(name.to_owned());
        self.numbers.insert(name.to_owned(), self.names.len() - 1);
        self.names.len() - 1
    }

    /// Checks that each pattern fits a tensor, so that nobody relies on one that does not.
    fn check(&self) -> Result<(), Failure> {
        let unused = self.args.groups.iter().zip(&self.fitting).find(|(_, fits)| !**fits);
        unused.map_or(Ok(()), |(pattern, _)| Err(no_such_gradient("--group", pattern)))
    }
}

impl Step {
    fn new(line: LogLine, groups: &mut Groups<'_>) -> Self {
        let mut norms: Vec<Vec<f64>> = Vec::new();
        for (name, norm) in &line.tensors.0 {
            let group = groups.of(name);
            norms.resize_with(norms.len().max(group + 1), Vec::new);
            norms[group].push(norm.0);
        }
        let of_group = |norms: &Vec<f64>| (!norms.is_empty()).then(|| norm_of_norms(norms, line.norm_type.0));
        Self {
            number: 0,
            file: line.file,
            total: line.total_norm.0,
            groups: norms.iter().map(of_group).collect(),
            non_finite: line.non_finite,
            z: None,
        }
    }

    /// Flat scalars, as loggers take them. A norm that is not finite is left out, because JSON has no number for it.
    fn json(&self, names: &[String]) -> Value {
        let mut scalars = Map::new();
        scalars.insert("step".into(), self.number.into());
        let mut add = |name: &str, value: Option<f64>| {
            if let Some(value) = value.and_then(serde_json::Number::from_f64) {
                scalars.insert(format!("grad_norm/{name}"), Value::Number(value));
            }
        };
        add("total", Some(self.total));
        add("z", self.z);
        names.iter().zip(&self.groups).for_each(|(name, norm)| add(name, *norm));
        scalars.insert("grad_norm/non_finite".into(), self.non_finite.as_ref().map_or(0, |found| found.count).into());
        Value::Object(scalars)
    }

    /// Whether the total stands out from the steps before.
    fn is_spike(&self, least: f64) -> bool {
        self.z.is_some_and(|z| z > least)
    }
}

/// The groups with the largest norms in any step; those that are not finite do not count.
fn largest(steps: &[Step], groups: usize, top: usize) -> Vec<usize> {
    let peak = |group: usize| {
        let norms = steps.iter().filter_map(|step| step.groups[group]).filter(|norm| norm.is_finite());
        norms.fold(0.0, f64::max)
    };
    let mut peaks: Vec<_> = (0..groups).map(|group| (group, peak(group))).collect();
    peaks.sort_by(|a, b| b.1.total_cmp(&a.1));
    peaks.into_iter().take(top).map(|(group, _)| group).collect()
}

fn text(args: &HistoryArgs, clip: &Clip, steps: &[Step], names: &[String], largest: &[usize]) -> String {
    let mut lines = Vec::new();
    if let (Some(first), Some(last)) = (steps.first(), steps.last()) {
        lines.push(("steps", format!("{} to {}, {} of them", first.number, last.number, steps.len())));
    }
    let finite = || steps.iter().filter(|step| step.total.is_finite());
    if let Some(peak) = finite().max_by(|a, b| a.total.total_cmp(&b.total)) {
        let totals: Vec<_> = finite().map(|step| step.total).collect();
        let (median, total) = (number(spikes::median(totals), 6), number(peak.total, 6));
        lines.push((
            "total norm",
            format!("{median} (median, {}), at most {total} in step {}", clip.norm_type, peak.number),
        ));
    }
    let found: Vec<_> = steps.iter().filter(|step| step.is_spike(args.spike)).collect();
    let mut at: Vec<_> = found.iter().take(10).map(|step| format!("step {}", step.number)).collect();
    at.extend((found.len() > 10).then(|| "...".into()));
    lines.push(("spikes", if at.is_empty() { "none".into() } else { format!("{}: {}", found.len(), at.join(", ")) }));
    if let Some((step, found)) = steps.iter().find_map(|step| Some((step, step.non_finite.as_ref()?))) {
        lines.push(("non-finite", format!("first in step {}: {} ({})", step.number, found, shown(&step.file))));
    }
    let of = plural(names.len() as u64, "group");
    lines.push(("groups", format!("the largest {} of {of}", largest.len())));
    if let Some(path) = &args.plot.out {
        lines.push(("plot", path.display().to_string()));
    }

    let headings: Vec<_> = ["total".to_owned()].into_iter().chain(largest.iter().map(|i| shown(&names[*i]))).collect();
    let widths: Vec<_> = headings.iter().map(|heading| heading.chars().count().max(12)).collect();
    let mut rows = format!("\n{:>12}", "step");
    headings.iter().zip(&widths).for_each(|(heading, width)| rows += &format!("  {heading:>width$}"));
    for step in steps {
        rows += &format!("\n{:>12}", step.number);
        let norms = [Some(step.total)].into_iter().chain(largest.iter().map(|group| step.groups[*group]));
        for (norm, width) in norms.zip(&widths) {
            rows += &format!("  {:>width$}", norm.map_or_else(|| "-".into(), |norm| number(norm, 6)));
        }
        if let Some(found) = &step.non_finite {
            rows += &format!("  {}", plural(found.count, "non-finite element"));
        }
        if let Some(z) = step.z.filter(|_| step.is_spike(args.spike)) {
            rows += &format!("  spike (z {})", number(z, 3));
        }
    }
    table(&lines) + &rows + "\n"
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, tensor, index } = self;
        write!(f, "{}, the first at index {index} of tensor {tensor:?}", plural(*count, "non-finite element"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_is_the_last_number_in_the_name() {
        for (path, step) in [
            ("step-100.safetensors", Some(100)),
            ("run2/step_0007.safetensors", Some(7)),
            ("step-12/grads.safetensors", Some(12)),
            ("a3.safetensors.index.json", Some(3)),
            ("größe9.safetensors", Some(9)),
            ("grads.safetensors", None),
            ("99999999999999999999.safetensors", None),
        ] {
            assert_eq!(step_in_name(Path::new(path)), step, "{path}");
        }
    }
}

//! `gradclip norm`: the norm over all files, and its largest segments.

use std::collections::HashMap;
use std::time::Instant;

use gradclip::{Clip, Histogram, NonFiniteElements, NormType, Scope, SegmentReport};
use gradclip_common::description::share_of;
use gradclip_common::header::Entry;
use gradclip_common::plot::{self, TensorNorm};
use gradclip_common::text::{exact, grouped, number, percent, plural, shown, table};

use crate::args::NormArgs;
use crate::backend::Backend;
use crate::description::{measuring, norm_name, refuse};
use crate::failure::Failure;
use crate::input::{Input, explain, unchanged, unsupported_warning};
use crate::log::{self, LogLine};
use crate::output;
use crate::print::{print, print_json, remark};
use crate::progress;
use crate::report::{Summary, formats, segments};

pub(crate) fn run(args: &NormArgs) -> Result<(), Failure> {
    let asked = measuring(args.measure.clip(Clip::norm(f64::INFINITY))?);
    asked.check()?;
    let by_tensor = matches!(asked.scope, Scope::Global | Scope::Tensor);
    refuse(&[
        (args.plot.out.is_some() && !by_tensor, "--plot draws tensors: it needs --scope global or tensor"),
        (args.append.is_some() && !by_tensor, "--append logs tensors: it needs --scope global or tensor"),
        (args.append.is_some() && args.files.len() > 1, "--append takes one FILE: run gradclip norm once for each"),
    ])?;
    if let Some(log) = &args.append {
        log::check_appendable(log)?;
    }
    // A global norm that is measured by tensor is the same.
    let segments = args.plot.out.is_some() || args.append.is_some() || (args.top > 0 && !(args.quiet || args.json));
    let clip = if by_tensor && segments { asked.scope(Scope::Tensor) } else { asked };
    let mut inputs = args.files.iter().map(|file| Input::open(file)).collect::<Result<Vec<_>, _>>()?;
    args.select.take(&mut inputs)?;
    measure(args, &asked, &clip, &inputs).map_err(explain(&inputs))
}

fn measure(args: &NormArgs, asked: &Clip, clip: &Clip, inputs: &[Input]) -> Result<(), Failure> {
    let hidden = args.quiet || args.json;
    if let Some(plot) = &args.plot.out {
        output::check(std::slice::from_ref(plot), inputs.iter(), args.plot.force)?;
    }
    if !args.quiet {
        let left_out = unsupported_warning(inputs.iter().flat_map(Input::unsupported), "measured");
        twice(inputs).into_iter().chain(left_out).for_each(|warning| remark(&warning));
    }
    let tensors = inputs.iter().map(Input::tensors).collect::<Result<Vec<_>, _>>()?;
    let tensors_of: Vec<_> = tensors.iter().map(Vec::len).collect();
    let tensors = tensors.concat();
    let mut backend = Backend::choose(&args.backend, &tensors)?;
    if !hidden {
        backend.explain("measuring");
    }

    let bytes = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    let (start, bar) = (Instant::now(), progress::bytes(bytes, "measuring", hidden));
    backend.show_progress(&bar);
    let mut report = backend.run(|clipper| clipper.measure(clip, &tensors))?;
    // Nothing was to be written.
    report.skipped = None;
    let time = start.elapsed();
    // With several files a name may not identify the tensor.
    let file_of_element =
        |found: &NonFiniteElements| file_of(found.tensor, tensors_of.iter().copied()).map(|i| args.files[i].as_path());
    let file = report.non_finite.as_ref().filter(|_| args.files.len() > 1).and_then(file_of_element);
    let (backend, tensors) = (&backend, &tensors[..]);
    let others = inputs.iter().map(Input::others).sum();
    let left_out = args.select.is_given().then(|| inputs.iter().map(Input::left_out).sum());
    let mut summary = Summary {
        report: &report,
        groups: &[],
        has_norm: true,
        clip: asked,
        tensors,
        sum: false,
        widened: false,
        backend,
        time,
        file,
        ranks: None,
        others,
        left_out,
        histogram: None,
    };
    bar.finish_and_clear();
    let entries: Vec<_> = inputs.iter().flat_map(Input::gradients).collect();
    let largest = if hidden { String::new() } else { largest(&summary, &entries, args.top) };
    let drawing = args.plot.out.as_ref().map(|path| (path, draw(&summary, &title(args, asked))));
    summary.histogram = args.histogram.then(|| histogram(&summary, hidden));

    // Nothing is read after this.
    unchanged(inputs)?;
    if let Some((path, drawing)) = &drawing {
        output::write_file(drawing.as_bytes(), path, args.plot.force)?;
    }
    if let Some(log) = &args.append {
        LogLine::new(&args.files[0], asked, &report, tensors).append(log)?;
    }
    if args.json {
        return print_json(&summary.json());
    }
    if args.quiet {
        return print(&(exact(report.total_norm) + "\n"));
    }
    let mut lines = summary.measured();
    lines.extend(summary.lines(bytes));
    for (label, path) in [("plot", &args.plot.out), ("appended to", &args.append)] {
        lines.extend(path.as_ref().map(|path| (label, path.display().to_string())));
    }
    print(&(table(&lines) + &largest + &summary.histogram.as_ref().map_or_else(String::new, magnitudes)))
}

/// A warning if several inputs have gradients of the same name: each counts, which is seldom meant.
fn twice(inputs: &[Input]) -> Option<String> {
    let mut seen: HashMap<&str, (&Input, usize)> = HashMap::new();
    let gradients = inputs.iter().flat_map(|input| input.gradients().map(move |entry| (entry.name.as_str(), input)));
    let mut again = gradients.filter_map(|(name, input)| {
        let (first, count) = seen.entry(name).or_insert((input, 0));
        *count += 1;
        (*count == 2).then_some((name, *first, input))
    });
    let (name, first, second) = again.next()?;
    let tensors = plural(1 + again.count() as u64, "tensor");
    let (first, second) = (first.path.display(), second.path.display());
    Some(format!("warning: {tensors} counted more than once, the first {name:?} in {first} and in {second}"))
}

/// The number of the file that holds a tensor, given how many tensors each file holds.
pub(crate) fn file_of(tensor: usize, tensors_of: impl IntoIterator<Item = usize>) -> Option<usize> {
    let mut before = 0;
    tensors_of.into_iter().position(|count| {
        before += count;
        tensor < before
    })
}

/// A plot of the norm of each tensor.
fn draw(summary: &Summary<'_>, title: &str) -> String {
    let row = |segment: &SegmentReport| {
        let tensor = &summary.tensors[segment.tensor.unwrap_or_default()];
        let counts = || summary.backend.install(|| tensor.counts());
        let non_finite = if segment.norm.is_finite() { 0 } else { counts().non_finite };
        TensorNorm { label: shown(&summary.name(segment)), norm: segment.norm, non_finite }
    };
    let rows: Vec<_> = summary.report.segments.iter().map(row).collect();
    plot::draw(title, &rows, summary.report.total_norm)
}

/// The largest norms, one per line.
fn largest(summary: &Summary<'_>, entries: &[&Entry], top: usize) -> String {
    let asked = summary.clip;
    let (found, all) = (summary.largest(top), summary.report.segments.len());
    if found.is_empty() {
        return String::new();
    }
    let by_tensor = matches!(asked.scope, Scope::Global | Scope::Tensor);
    let share = if asked.norm_type == NormType::Inf { "of max" } else { "share" };
    let counts = if by_tensor { format!("{:>10} {:>8}  ", "non-finite", "zeros") } else { String::new() };
    let what = format!("largest {} of {}", found.len(), segments(asked.scope, all));
    let mut text = format!("\n{:>12} {share:>8}  {counts}{what}\n", "norm");
    for segment in found {
        let share = percent(share_of(segment.norm, summary.report.total_norm, asked.norm_type));
        text += &format!("{:>12} {share:>8}  ", number(segment.norm, 6));
        let name = shown(&summary.name(segment));
        match segment.tensor.filter(|_| by_tensor) {
            Some(i) => {
                let tensor = &summary.tensors[i];
                let counts = summary.backend.install(|| tensor.counts());
                let (non_finite, zeros) = (counts.non_finite, percent(counts.zeros as f64 / tensor.len() as f64));
                let shape = &entries[i].shape;
                text += &format!("{non_finite:>10} {zeros:>8}  {name} {shape:?} {}\n", tensor.dtype());
            }
            None => text += &format!("{name}\n"),
        }
    }
    text
}

/// Counts all elements by magnitude, on the CPU.
fn histogram(summary: &Summary<'_>, hidden: bool) -> Histogram {
    let bytes = summary.tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    let bar = progress::bytes(bytes, "counting", hidden);
    let mut all = Histogram::default();
    for tensor in summary.tensors {
        all.add(&summary.backend.install(|| tensor.histogram()));
        bar.inc(tensor.bytes().len() as u64);
    }
    all
}

/// The magnitudes, one power of two a line, and what narrower formats would lose.
fn magnitudes(found: &Histogram) -> String {
    let elements = found.zeros + found.non_finite + found.by_exponent.values().sum::<u64>();
    let share = |count: u64| percent(count as f64 / elements as f64);
    let mut text = format!("\n{:>12} {:>8}  magnitude\n", "elements", "share");
    let mut row = |count: u64, what: &str| {
        let bar = "#".repeat((40.0 * count as f64 / elements as f64).ceil() as usize);
        text += format!("{:>12} {:>8}  {what:<16} {bar}", grouped(count), share(count)).trim_end();
        text.push('\n');
    };
    if found.non_finite > 0 {
        row(found.non_finite, "not finite");
    }
    for (exponent, count) in found.by_exponent.iter().rev() {
        row(*count, &format!("2^{exponent} .. 2^{}", exponent + 1));
    }
    if found.zeros > 0 {
        row(found.zeros, "0");
    }
    text += &format!("\n{:>12} {:>8}  would become 0, would be too large\n", "to 0", "too large");
    for (name, lost) in formats(found) {
        text += &format!("{:>12} {:>8}  as {name}\n", share(lost.zero), share(lost.infinite));
    }
    text
}

/// The title of the plot.
fn title(args: &NormArgs, asked: &Clip) -> String {
    let first = args.files.first().and_then(|file| file.file_name()).unwrap_or_default();
    let more = match args.files.len() {
        0 | 1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    format!("{} norms in {}{more}", norm_name(asked), shown(&first.to_string_lossy()))
}

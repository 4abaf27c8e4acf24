//! `gradclip clip`: clips the gradients of a file into a new file.

use std::iter::once;
use std::slice::from_mut;
use std::time::Instant;

use gradclip::{Clip, DecidedClip, Dtype, Mode, NonFinite, Scope, Skipped, Tensor, TensorMut};
use gradclip_common::generated::with_parameters;
use gradclip_common::text::{exact, grouped, number, shown, table};

use crate::args::{BackendArgs, BackendChoice, ClipArgs};
use crate::backend::Backend;
use crate::description::{clamps, norm_name};
use crate::failure::Failure;
use crate::groups::{Decided, GroupReport, Groups};
use crate::input::{Input, explain, unchanged, unsupported_warning};
use crate::layout::Content;
use crate::output::Output;
use crate::print::{print, print_json, remark};
use crate::progress;
use crate::report::{Summary, segments};

pub(crate) fn run(args: &ClipArgs) -> Result<(), Failure> {
    let groups = args.options.groups(args.clip()?)?;
    let mut input = Input::open(&args.file)?;
    args.select.take(from_mut(&mut input))?;
    groups.check(&groups.counts(input.gradients().map(|entry| &*entry.name)))?;
    let params = args.options.params.as_deref().map(Input::open).transpose()?;
    clip_file(args, &groups, &input, params.as_ref()).map_err(explain(once(&input).chain(&params)))
}

fn clip_file(args: &ClipArgs, groups: &Groups, input: &Input, params: Option<&Input>) -> Result<(), Failure> {
    let hidden = args.quiet || args.json;
    let content = match args.out_dtype {
        // Sums are float32 already.
        _ if args.sum => Content::Sums,
        Some(_) => Content::Widened,
        None => Content::Same,
    };
    let output = Output::new(input, params, &args.out, content, args.force)?;
    let parameters = input.parameters(params)?;
    let tensors = with_parameters(input.tensors()?, &parameters);
    // With a given norm nothing is measured, and pieces are scaled while they are written.
    let backend_args = match args.given_norm {
        Some(_) => &BackendArgs { backend: BackendChoice::Cpu, adapter: None, ..args.backend },
        None => &args.backend,
    };
    let mut backend = Backend::choose(backend_args, &[&tensors[..], &parameters].concat())?;
    if !hidden {
        backend.explain("clipping");
    }
    if let Some(warning) = unsupported_warning(input.unsupported(), "clipped").filter(|_| !args.quiet) {
        remark(&warning);
    }
    if args.verify {
        let spinner = progress::spinner("verifying", hidden);
        let widened = if content == Content::Widened { widened(&tensors)? } else { Vec::new() };
        let views = input
            .gradients()
            .zip(&widened)
            .map(|(entry, (dtype, bytes))| Tensor::from_bytes(*dtype, bytes)?.named(&entry.name).shape(&entry.shape));
        let views = with_parameters(views.collect::<Result<_, gradclip::Error>>()?, &parameters);
        let clipped = if widened.is_empty() { &tensors } else { &views };
        for (clip, tensors) in groups.clips().zip(groups.divide(clipped.iter().copied())) {
            verify(&backend, &clip, &tensors)?;
        }
        drop(spinner);
    }

    let start = Instant::now();
    let gradients = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    let show_progress = |backend: &mut Backend, doing| {
        let bar = progress::bytes(gradients, doing, hidden);
        backend.show_progress(&bar);
        bar
    };
    let reports = if backend.streams() && !args.sum {
        let bar = show_progress(&mut backend, "measuring");
        let decided = match args.given_norm {
            None => backend.decide(groups, &tensors)?,
            Some(norm) => {
                let decided = backend.run(|clipper| clipper.decide_scale(&groups.rest, &[norm], &tensors))?;
                Decided::new(groups, &tensors, vec![decided])
            }
        };
        unchanged(output.inputs())?;
        bar.finish_and_clear();
        let bar = progress::bytes(output.bytes(), "writing", hidden);
        backend.install(|| output.stream(&decided, &bar))?;
        bar.finish_and_clear();
        decided.clips.iter().map(DecidedClip::report).collect()
    } else {
        let bar = progress::bytes(output.bytes(), "copying", hidden);
        let copies = output.copy(&bar)?;
        bar.finish_and_clear();
        let bar = show_progress(&mut backend, "clipping");
        copies.clip(
            &parameters,
            |_| true,
            |mut written| {
                if content == Content::Widened {
                    widen(&tensors, &mut written)?;
                }
                let reports = match args.sum {
                    true => {
                        backend.run(|clipper| Ok(vec![clipper.sum_examples(&groups.rest, &tensors, &mut written)?]))
                    }
                    false => backend.apply(groups, written),
                };
                bar.finish_and_clear();
                reports
            },
        )?
    };
    let clip = &groups.rest;
    let (sum, time) = (args.sum, start.elapsed());
    let (report, groups) = groups.report(&tensors, reports);
    let (backend, tensors) = (&backend, &tensors[..]);
    let (others, left_out) = (input.others(), args.select.is_given().then(|| input.left_out()));
    let (file, ranks) = (None, None);
    let (report, groups) = (&report, &groups[..]);
    let has_norm = clip.report_norm || !clamps(clip);
    let summary = Summary {
        report,
        groups,
        has_norm,
        clip,
        tensors,
        sum,
        widened: content == Content::Widened,
        backend,
        time,
        file,
        ranks,
        others,
        left_out,
        histogram: None,
    };

    if args.json {
        return print_json(&summary.json());
    }
    if args.quiet {
        return Ok(());
    }
    let mut lines = lines(&summary);
    lines.extend(summary.lines(input.bytes()));
    lines.push(("written to", args.out.display().to_string()));
    print(&table(&lines))
}

/// The lines of a clip: what was measured, and the result.
pub(crate) fn lines(summary: &Summary<'_>) -> Vec<(&'static str, String)> {
    let Summary { report, groups, clip, .. } = *summary;
    let scope = clip.scope;
    let mut lines = Vec::new();
    if summary.has_norm {
        lines.push(("total norm", format!("{} ({})", number(report.total_norm, 9), norm_name(clip))));
    }
    if !clamps(clip) {
        let least = if scope == Scope::Global && groups.is_empty() { "" } else { " at the least" };
        lines.push(("coefficient", number(report.clip_coef, 9) + least));
    }
    lines.extend(summary.non_finite().map(|found| ("non-finite", found)));
    lines.push(("result", result(summary)));
    lines.extend(summary.lost().map(|lost| ("rounding", lost)));
    if scope != Scope::Global {
        let all = segments(scope, report.segments.len());
        lines.push(("clipped", format!("{} of {all}", grouped(report.num_clipped() as u64))));
    }
    for (i, GroupReport { name, report }) in groups.iter().enumerate() {
        let clipped = if report.clipped { "" } else { ", not clipped" };
        let words = match (clamps(clip), summary.has_norm) {
            (false, _) => {
                format!("{} times {}: {}", number(report.total_norm, 6), number(report.clip_coef, 6), shown(name))
            }
            (true, true) => format!("{}: {}{clipped}", number(report.total_norm, 6), shown(name)),
            (true, false) => format!("{}{clipped}", shown(name)),
        };
        lines.push((if i == 0 { "groups" } else { "" }, words));
    }
    for (i, segment) in summary.largest(3).into_iter().enumerate() {
        let (norm, coefficient) = (number(segment.norm, 6), number(segment.clip_coef, 6));
        let name = shown(&summary.name(segment));
        lines.push((if i == 0 { "largest" } else { "" }, format!("{norm} times {coefficient}: {name}")));
    }
    lines
}

/// The result of the clip, in words.
fn result(summary: &Summary<'_>) -> String {
    let Summary { report, clip, sum, .. } = *summary;
    let whole = clip.scope == Scope::Global && summary.groups.is_empty();
    let mut words = match (clip.mode, report.clipped) {
        (_, true) if !summary.groups.is_empty() => "clipped, each group to its threshold".into(),
        (Mode::Norm(to) | Mode::Rms(to) | Mode::AverageNorm(to), true) => format!("clipped to {}", number(to, 9)),
        (Mode::Agc(factor), true) => format!("clipped to {} of the parameters' norms", number(factor, 9)),
        (Mode::Value { min, max }, true) => format!("clipped to {} .. {}", number(min, 9), number(max, 9)),
        (_, true) => "clipped".into(),
        (_, false) if clip.grad_scale != 1.0 || sum => "not clipped".into(),
        (_, false) => "unchanged".into(),
    };
    if clip.grad_scale != 1.0 {
        words += &format!(", divided by the scale {}", exact(clip.grad_scale));
    }
    if sum {
        words += ", summed over examples";
    }
    match (&report.non_finite, clip.non_finite) {
        _ if report.skipped == Some(Skipped::Above) => {
            format!("unchanged, because the total norm is above {}", number(clip.skip_above, 9))
        }
        (Some(_), NonFinite::Skip) => "unchanged, because not all are finite".into(),
        (Some(_), NonFinite::Zero) if whole => "all set to 0, because not all are finite".into(),
        (Some(_), NonFinite::Zero) => words + ", gradients that share a norm with non-finite elements set to 0",
        (Some(_), NonFinite::Drop) if !report.clipped => "non-finite elements set to 0, others ".to_owned() + &words,
        (Some(_), NonFinite::Drop) => words + ", non-finite elements set to 0",
        _ => words,
    }
}

/// Copies tensors into others of the same or of a wider dtype.
pub(crate) fn widen(tensors: &[Tensor<'_>], into: &mut [TensorMut<'_>]) -> Result<(), gradclip::Error> {
    tensors.iter().zip(into).try_for_each(|(tensor, into)| tensor.widen_into(into))
}

/// Copies of the gradients, those of half precision as float32, and their dtypes.
fn widened(tensors: &[Tensor<'_>]) -> Result<Vec<(Dtype, Vec<u8>)>, gradclip::Error> {
    let copy = |tensor: &Tensor<'_>| {
        let dtype = if tensor.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        let mut bytes = vec![0; tensor.len() * dtype.size()];
        tensor.widen_into(&mut TensorMut::from_bytes(dtype, &mut bytes)?)?;
        Ok((dtype, bytes))
    };
    tensors.iter().map(copy).collect()
}

#[cfg(feature = "gpu")]
fn verify(backend: &Backend, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<(), Failure> {
    let verification = backend.verify(clip, tensors)?;
    match gradclip_common::difference::disagreement(&verification) {
        None => Ok(()),
        Some(what) => Err(Failure::Mismatch(format!("GPU and CPU disagree ({clip:.2}): {what}; OUT was not written"))),
    }
}

#[cfg(not(feature = "gpu"))]
fn verify(_: &Backend, _: &Clip, _: &[Tensor<'_>]) -> Result<(), Failure> {
    Err(Failure::BuiltWithoutGpu)
}

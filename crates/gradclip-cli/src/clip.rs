//! `gradclip clip`: the gradients of a file, clipped into a new file.

use std::time::Instant;

use gradclip::{Clip, ClipReport, NonFinite, Tensor};

use crate::args::ClipArgs;
use crate::backend::Backend;
use crate::failure::Failure;
use crate::input::Input;
use crate::output::Output;
use crate::progress;
use crate::report::{Outcome, number, print, remark, table};
use crate::spec::{Mode, Spec, norm_name};

pub(crate) fn run(args: &ClipArgs) -> Result<(), Failure> {
    let hidden = args.quiet || args.json;
    let spec = args.spec();
    let clip = spec.clip()?;
    let input = Input::open(&args.file)?;
    let output = Output::new(&input, &args.out, args.force)?;
    let tensors = input.tensors()?;
    let mut backend = Backend::choose(&args.backend, &tensors)?;
    if let Some(why) = backend.fallback.as_ref().filter(|_| !hidden) {
        remark(&format!("{why}: clipping on the CPU"));
    }
    if args.verify {
        let spinner = progress::spinner("verifying", hidden);
        verify(&backend, &spec, &clip, &tensors)?;
        drop(spinner);
    }

    let (start, bar) = (Instant::now(), progress::bytes(output.bytes(), "copying", hidden));
    let gradients = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    let report = output.write(&bar, |copies| {
        bar.finish_and_clear();
        let bar = progress::bytes(gradients, "clipping", hidden);
        backend.show_progress(&bar);
        let report = backend.apply(&clip, copies);
        bar.finish_and_clear();
        report
    })?;
    let outcome = Outcome { report: &report, tensors: tensors.len(), backend: &backend, time: start.elapsed() };

    if args.json {
        return outcome.print_json();
    }
    if args.quiet {
        return Ok(());
    }
    let mut lines = Vec::new();
    if let Mode::Norm(_) = spec.mode {
        let norm = number(report.total_norm, 9);
        lines.push(("total norm", format!("{norm} ({})", norm_name(spec.norm_type))));
        lines.push(("coefficient", number(report.clip_coef, 9)));
    }
    if let Some(found) = &report.non_finite {
        lines.push(("non-finite", found.to_string()));
    }
    lines.push(("result", result(&spec, &report)));
    lines.extend(outcome.lines(input.others(), output.bytes()));
    lines.push(("written to", args.out.display().to_string()));
    print(&table(&lines))
}

/// What became of the gradients, in words.
fn result(spec: &Spec, report: &ClipReport) -> String {
    let mut words = match (spec.mode, report.clipped) {
        (Mode::Norm(max_norm), true) => format!("clipped to {}", number(max_norm, 9)),
        (Mode::Value(bound), true) => format!("clipped to {} .. {}", number(-bound, 9), number(bound, 9)),
        (Mode::Range((min, max)), true) => format!("clipped to {} .. {}", number(min, 9), number(max, 9)),
        (_, false) if spec.grad_scale != 1.0 => "not clipped".into(),
        (_, false) => "unchanged".into(),
    };
    if spec.grad_scale != 1.0 {
        words += &format!(", divided by the scale {}", spec.grad_scale);
    }
    match (&report.non_finite, spec.non_finite) {
        (Some(_), Some(NonFinite::Skip)) => "unchanged, because not all are finite".into(),
        (Some(_), Some(NonFinite::Zero)) => "all set to 0, because not all are finite".into(),
        (Some(_), Some(NonFinite::Drop)) if !report.clipped => {
            "non-finite elements set to 0, else ".to_owned() + &words
        }
        (Some(_), Some(NonFinite::Drop)) => words + ", non-finite elements set to 0",
        _ => words,
    }
}

#[cfg(feature = "gpu")]
fn verify(backend: &Backend, spec: &Spec, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<(), Failure> {
    let verification = backend.verify(clip, tensors)?;
    match crate::verify::disagreement(&verification) {
        None => Ok(()),
        Some(what) => Err(Failure::Mismatch(format!("GPU and CPU disagree ({spec}): {what}; OUT was not written"))),
    }
}

#[cfg(not(feature = "gpu"))]
fn verify(_: &Backend, _: &Spec, _: &Clip, _: &[Tensor<'_>]) -> Result<(), Failure> {
    Err(Failure::BuiltWithoutGpu)
}

//! `gradclip norm`: one global norm over all files.

use std::time::Instant;

use crate::args::NormArgs;
use crate::backend::Backend;
use crate::failure::Failure;
use crate::input::Input;
use crate::progress;
use crate::report::{Outcome, number, print, remark, table};
use crate::spec::{Spec, norm_name};

pub(crate) fn run(args: &NormArgs) -> Result<(), Failure> {
    let hidden = args.quiet || args.json;
    let clip = Spec::measuring(args.norm_type.into(), args.grad_scale).clip()?;
    let inputs = args.files.iter().map(|file| Input::open(file)).collect::<Result<Vec<_>, _>>()?;
    let tensors = inputs.iter().map(Input::tensors).collect::<Result<Vec<_>, _>>()?;
    let tensors_of: Vec<_> = tensors.iter().map(Vec::len).collect();
    let tensors = tensors.concat();
    let mut backend = Backend::choose(&args.backend, &tensors)?;
    if let Some(why) = backend.fallback.as_ref().filter(|_| !hidden) {
        remark(&format!("{why}: measuring on the CPU"));
    }

    let bytes = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    let (start, bar) = (Instant::now(), progress::bytes(bytes, "measuring", hidden));
    backend.show_progress(&bar);
    let report = backend.measure(&clip, &tensors)?;
    let outcome = Outcome { report: &report, tensors: tensors.len(), backend: &backend, time: start.elapsed() };
    bar.finish_and_clear();

    if args.json {
        return outcome.print_json();
    }
    if args.quiet {
        return print(&format!("{}\n", report.total_norm));
    }
    let norm = number(report.total_norm, 9);
    let mut lines = vec![("total norm", format!("{norm} ({})", norm_name(args.norm_type.into())))];
    if let Some(found) = &report.non_finite {
        let mut before = 0;
        let holder = tensors_of.iter().position(|count| {
            before += count;
            found.tensor < before
        });
        // With several files a name may not tell which.
        let file = holder.filter(|_| args.files.len() > 1).map(|i| format!(" in {}", args.files[i].display()));
        lines.push(("non-finite", format!("{found}{}", file.unwrap_or_default())));
    }
    lines.extend(outcome.lines(inputs.iter().map(Input::others).sum(), bytes));
    print(&table(&lines))
}

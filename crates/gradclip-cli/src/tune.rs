//! `gradclip tune`: measures which tuning is fastest on a device, and keeps it for the other commands.

use std::path::Path;
use std::time::Duration;

use gradclip::gpu::tuning::Tuning;
use gradclip::gpu::{Trial, Tuned};
use gradclip_common::text::table;
use serde::Serialize;

use crate::args::TuneArgs;
use crate::backend;
use crate::bench::copy_speed;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::progress;
use crate::tuning;

#[derive(Serialize)]
struct Json<'a> {
    adapter: &'a str,
    copy_gb_s: f64,
    tuning: Tuning,
    complete: bool,
    kept: Option<&'a Path>,
    trials: Vec<TrialJson>,
}

#[derive(Serialize)]
struct TrialJson {
    tuning: Tuning,
    rounds: Vec<f64>,
    taken: bool,
    norm_gb_s: Option<f64>,
    clip_gb_s: Option<f64>,
    value_gb_s: Option<f64>,
}

pub(crate) fn run(args: &TuneArgs) -> Result<(), Failure> {
    let gpu = backend::open_gpu(args.adapter.as_deref(), None)?;
    let info = gpu.device().adapter_info();
    // A file that cannot be read should not cost the minute.
    tuning::kept(&info)?;
    let spinner = progress::spinner("measuring copy speed", args.json);
    let (copy, method) = copy_speed(&gpu)?;
    drop(spinner);
    if !args.json {
        let head = [
            ("device", format!("{} ({:?})", info.name, info.backend)),
            ("copy", format!("{:.1} GB/s ({method})", copy / 1e9)),
        ];
        let columns = format!("{:<28} {:>13} {:>13} {:>13} {:>13}", "tried", "time", "norm", "clip", "value");
        print(&format!("{}\n{columns}\n", table(&head)))?;
    }
    let spinner = progress::spinner("tuning", args.json);
    let mut best: Option<Tuning> = None;
    let mut shown = Ok(());
    let budget = Duration::from_secs_f64(args.seconds);
    let tuned = gpu.tune(budget, |trial| {
        if !args.json && shown.is_ok() {
            let line = line(trial, best, copy);
            shown = spinner.suspend(|| print(&line));
        }
        if trial.taken {
            best = Some(trial.tuning);
        }
    });
    let tuned = tuned.wait()?;
    drop(spinner);
    shown?;
    let improved = (tuned.tuning != tuned.trials[0].tuning).then_some(tuned.tuning);
    let kept = tuning::keep(&info, improved)?;
    if args.json {
        let trials = tuned.trials.iter().map(TrialJson::of).collect();
        let Tuned { tuning, complete, .. } = tuned;
        return print_json(&Json {
            adapter: &info.name,
            copy_gb_s: copy / 1e9,
            tuning,
            complete,
            kept: kept.as_deref(),
            trials,
        });
    }
    if !tuned.complete {
        print("\nThe time was over before all was tried: raise --seconds to go on.\n")?;
    }
    match kept {
        Some(path) => print(&format!("\nOther commands now use this row. It is kept in {}\n", path.display())),
        None => print("\nNo row is 5 % faster in two rounds, so the built-in one stays.\n"),
    }
}

/// A row of the table. Speeds are shown in GB/s and as a share of the copy's.
fn line(trial: &Trial, best: Option<Tuning>, copy: f64) -> String {
    let what = best.map_or_else(|| "built-in, against itself".into(), |best| changes(best, trial.tuning));
    if trial.rounds.is_empty() {
        return format!("{what:<28} {:>13}\n", "wrong norms");
    }
    let time = trial.rounds.iter().map(|ratio| format!("{ratio:.2}")).collect::<Vec<_>>().join(", ");
    let speeds = trial.speeds.iter().map(|speed| format!(" {:>7.1} {:>4.0}%", speed / 1e9, 100.0 * speed / copy));
    let taken = if trial.taken && best.is_some() { "  taken" } else { "" };
    format!("{what:<28} {time:>13}{}{taken}\n", speeds.collect::<String>())
}

/// How a row differs from another.
fn changes(from: Tuning, to: Tuning) -> String {
    let numbers = |row: Tuning| {
        [
            ("workgroup", u64::from(row.workgroup)),
            ("chunks", row.chunks),
            ("shortest chunk", u64::from(row.min_chunk_words)),
        ]
    };
    let numbers = numbers(to).into_iter().zip(numbers(from)).filter(|(to, from)| to != from);
    let flags = [("contiguous", to.contiguous, from.contiguous), ("subgroups", to.subgroups, from.subgroups)];
    let flags = flags.into_iter().filter(|(_, to, from)| to != from);
    let flags = flags.map(|(name, to, _)| format!("{name} {}", if to { "on" } else { "off" }));
    numbers.map(|((name, to), _)| format!("{name} {to}")).chain(flags).collect::<Vec<_>>().join(", ")
}

impl TrialJson {
    fn of(trial: &Trial) -> Self {
        let speed = |case: usize| trial.speeds.get(case).map(|speed| speed / 1e9);
        Self {
            tuning: trial.tuning,
            rounds: trial.rounds.clone(),
            taken: trial.taken,
            norm_gb_s: speed(0),
            clip_gb_s: speed(1),
            value_gb_s: speed(2),
        }
    }
}

#[cfg(test)]
mod tests {
    use gradclip::gpu::tuning::SOFTWARE;

    use super::*;

    #[test]
    fn a_row_is_told_by_what_it_changes() {
        let changed = |change: fn(&mut Tuning)| {
            let mut row = SOFTWARE;
            change(&mut row);
            changes(SOFTWARE, row)
        };
        assert_eq!(changed(|row| row.workgroup = 16), "workgroup 16");
        assert_eq!(changed(|row| (row.chunks, row.contiguous) = (256, false)), "chunks 256, contiguous off");
        assert_eq!(changed(|row| (row.min_chunk_words, row.subgroups) = (8, true)), "shortest chunk 8, subgroups on");
    }
}

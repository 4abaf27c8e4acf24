//! `gradclip tune`: measures which tuning is fastest on a device, and keeps it for the other commands.

use std::path::Path;
use std::time::{Duration, Instant};

use gradclip::gpu::tuning::Tuning;
use gradclip::gpu::{GpuClipper, Trial, Tuned};
use gradclip::{Clip, Clipper, TensorMut};
use gradclip_common::text::{size_label, table};
use serde::Serialize;

use crate::args::TuneArgs;
use crate::backend;
use crate::bench::{copy_speed, median};
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::progress;
use crate::tuning;

/// Bytes of tensors in host memory, from 256 KiB to 256 MiB.
const HOST_SIZES: [u64; 6] = [1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28];
/// How many times a round clips each.
const HOST_RUNS: usize = 5;
/// The GPU pays if it takes less than this of the CPU's time, in each of two rounds: the same as for a row.
const PAYS_BELOW: f64 = 0.95;

#[derive(Serialize)]
struct HostJson<'a> {
    adapter: &'a str,
    /// None if the GPU pays at no size.
    host_from: Option<u64>,
    kept: Option<&'a Path>,
    sizes: Vec<HostTrial>,
}

/// One size: the time of the GPU over that of the CPU, in one round or two.
#[derive(Clone, Debug, Serialize)]
struct HostTrial {
    bytes: u64,
    rounds: Vec<f64>,
}

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
    if args.host {
        return host(&gpu, args);
    }
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
    let kept = tuning::keep(&info, |found| found.tuning = improved)?;
    if args.json {
        let trials = tuned.trials.iter().map(TrialJson::of).collect();
        let Tuned { tuning, complete, .. } = tuned;
        return print_json(&Json {
            adapter: &info.name,
            copy_gb_s: copy / 1e9,
            tuning,
            complete,
            kept: kept.as_deref().filter(|_| improved.is_some()),
            trials,
        });
    }
    if !tuned.complete {
        print("\nThe time was over before all was tried: raise --seconds to go on.\n")?;
    }
    match kept.filter(|_| improved.is_some()) {
        Some(path) => print(&format!("\nOther commands now use this row. It is kept in {}\n", path.display())),
        None => print("\nNo row is 5 % faster in two rounds, so the built-in one stays.\n"),
    }
}

/// Measures from how many bytes on the GPU is faster than the CPU for tensors in host memory.
fn host(gpu: &GpuClipper, args: &TuneArgs) -> Result<(), Failure> {
    let info = gpu.device().adapter_info();
    let gpu = backend::tuned(gpu)?.unwrap_or_else(|| gpu.clone());
    if !args.json {
        print(&format!("{}{:>10} {:>16}\n", table(&[("device", info.name.clone())]), "bytes", "time to the CPU's"))?;
    }
    let spinner = progress::spinner("clipping on both", args.json);
    let begin = Instant::now();
    let mut sizes: Vec<HostTrial> = Vec::new();
    for bytes in HOST_SIZES {
        // A size that was begun is measured to its end.
        if begin.elapsed().as_secs_f64() > args.seconds && !sizes.is_empty() {
            break;
        }
        let trial = HostTrial { bytes, rounds: host_rounds(&gpu, bytes)? };
        if !args.json {
            let rounds = trial.rounds.iter().map(|ratio| format!("{ratio:.2}")).collect::<Vec<_>>().join(", ");
            spinner.suspend(|| print(&format!("{:>10} {rounds:>16}\n", size_label(bytes))))?;
        }
        sizes.push(trial);
    }
    drop(spinner);
    let host_from = pays_from(&sizes);
    let kept = tuning::keep(&info, |found| found.host_from = Some(host_from.unwrap_or(tuning::NEVER)))?;
    if args.json {
        return print_json(&HostJson { adapter: &info.name, host_from, kept: kept.as_deref(), sizes });
    }
    let told = match host_from {
        Some(bytes) => format!("from {} bytes on, and on the CPU below", size_label(bytes)),
        None => "at none of these sizes, so they take the CPU".into(),
    };
    print(&format!("\nThe GPU pays {told}. Commands that are not told a backend now follow this.\n"))
}

/// The smallest size from which on the GPU is faster at every size.
fn pays_from(sizes: &[HostTrial]) -> Option<u64> {
    let pays = |trial: &&HostTrial| trial.rounds.len() == 2 && trial.rounds.iter().all(|ratio| *ratio < PAYS_BELOW);
    sizes.iter().rev().take_while(pays).last().map(|trial| trial.bytes)
}

/// Clips a tensor in host memory on both in turns, in a second round only if the GPU was faster in the first.
fn host_rounds(gpu: &GpuClipper, bytes: u64) -> Result<Vec<f64>, Failure> {
    let mut gradients = vec![0.5f32; bytes as usize / 4];
    // Every step writes, and leaves elements of about the same size.
    let clip = Clip::norm(f64::INFINITY).grad_scale(1.000_001);
    let clippers = [Clipper::gpu(gpu.clone()), Clipper::cpu()];
    let mut step = |clipper: &Clipper| -> Result<f64, Failure> {
        let start = Instant::now();
        clipper.apply(&clip, &mut [TensorMut::new(&mut gradients)])?;
        Ok(start.elapsed().as_secs_f64())
    };
    for clipper in &clippers {
        step(clipper)?;
    }
    let mut rounds = Vec::new();
    for round in 0..2 {
        let mut seconds = [Vec::new(), Vec::new()];
        for run in 0..HOST_RUNS {
            // Each is first every other time.
            let first = (run + round) % 2;
            for which in [first, 1 - first] {
                seconds[which].push(step(&clippers[which])?);
            }
        }
        let [gpu, cpu] = seconds.map(|mut seconds| median(&mut seconds));
        rounds.push(gpu / cpu);
        if rounds[round] >= PAYS_BELOW {
            break;
        }
    }
    Ok(rounds)
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
    fn the_gpu_pays_from_the_size_on_that_no_slower_one_follows() {
        let sizes = |rounds: [&[f64]; 4]| {
            let trials = HOST_SIZES.iter().zip(rounds);
            pays_from(
                &trials.map(|(bytes, rounds)| HostTrial { bytes: *bytes, rounds: rounds.to_vec() }).collect::<Vec<_>>(),
            )
        };
        let (slow, fast, once): (&[f64], &[f64], &[f64]) = (&[1.2], &[0.5, 0.94], &[0.9, 0.95]);
        assert_eq!(sizes([slow, slow, fast, fast]), Some(HOST_SIZES[2]));
        assert_eq!(sizes([fast, slow, fast, fast]), Some(HOST_SIZES[2]));
        assert_eq!(sizes([fast, fast, fast, fast]), Some(HOST_SIZES[0]));
        assert_eq!(sizes([fast, fast, fast, once]), None);
        assert_eq!(pays_from(&[]), None);
    }

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

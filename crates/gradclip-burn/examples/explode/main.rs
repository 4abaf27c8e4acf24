//! Trains one recurrent network on real prose, where gradients explode, four times side by side: without clipping, with
//! value clipping, with clipping by the global norm, and with ZClip.
//!
//! ```text
//! cargo run --release -p gradclip-burn --example explode
//! ```
//!
//! Writes a picture and the figures (`explode.svg`, `explode.json`), and checkpoints that `--resume` goes on from.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::module::Module;
use burn::tensor::Device;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use checkpoint::Checkpoint;
use data::Data;
use model::Rnn;
use settings::{Backend, Clipping, Settings};
use train::{Figures, Run};

mod checkpoint;
mod data;
mod model;
mod optimizer;
mod plot;
mod settings;
mod train;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Trains a recurrent network where gradients explode: without clipping, with value clipping, norm clipping and ZClip
#[derive(Parser)]
#[command(name = "explode", args_override_self = true)]
struct Options {
    #[command(flatten)]
    settings: Settings,
    /// Number of steps of each run
    #[arg(long, value_name = "N", default_value_t = 3000, value_parser = settings::count)]
    steps: usize,
    /// Number of steps between checkpoints, which also validate
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = settings::count)]
    save_every: usize,
    /// The folder for the picture, the figures and the checkpoints
    #[arg(long, value_name = "DIR", default_value = "target/explode")]
    out: PathBuf,
    /// Resume from the checkpoints in the folder
    #[arg(long)]
    resume: bool,
    /// Start again even if the folder holds checkpoints
    #[arg(long, conflicts_with = "resume")]
    force: bool,
}

fn main() -> ExitCode {
    ExitCode::from(run(std::env::args_os()))
}

/// The program; returns its exit code.
pub(crate) fn run(arguments: impl Iterator<Item = OsString>) -> u8 {
    let parsed = Options::try_parse_from(arguments).and_then(|mut options| {
        let usage = |error| Options::command().error(ErrorKind::ValueValidation, error);
        options.settings.check(Data::longest()).map_err(usage)?;
        options.settings.loss = Some(options.settings.loss());
        Ok(options)
    });
    let done = match parsed {
        Ok(options) => compare(&options),
        Err(error) => {
            let _ = error.print();
            return error.exit_code() as u8;
        }
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error}");
            1
        }
    }
}

fn compare(options: &Options) -> Result<()> {
    let settings = &options.settings;
    let data = Data::new(settings);
    let device = match settings.device {
        Backend::Flex => Device::flex(),
        #[cfg(feature = "wgpu")]
        Backend::Wgpu => gradclip_burn::open_wgpu(Device::wgpu_options())?,
    }
    .autodiff();
    device.seed(settings.seed);
    let model = Rnn::new(settings, data.widths(), &device);
    let folder = options.out.join("checkpoints");
    let mut runs = runs(options, &folder, &model, &device)?;
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    println!("{} parameters, {} steps, figures in {}", model.num_params(), options.steps, options.out.display());

    train(&mut runs, options, &data)?;
    report(options, model.num_params(), &runs)
}

/// The four runs, new or from their checkpoints. Nothing is written before all are loaded.
fn runs(options: &Options, folder: &Path, model: &Rnn, device: &Device) -> Result<Vec<Run>> {
    let paths = Clipping::ALL.map(|clipping| (clipping, folder.join(clipping.file_name())));
    let found = paths.iter().filter(|(_, path)| path.exists()).count();
    if options.resume && found == 0 {
        return Err(format!("no checkpoint to resume in {}", folder.display()).into());
    }
    if !options.resume && !options.force && found > 0 {
        let folder = folder.display();
        return Err(format!("{folder} holds checkpoints: --resume goes on from them, --force begins anew").into());
    }
    let mut runs = Vec::new();
    for (clipping, path) in paths {
        let saved = if options.resume { Checkpoint::read(&path, &options.settings, clipping)? } else { None };
        let run = Run::new(clipping, &options.settings, path, (model, device), saved)?;
        if run.steps() > options.steps {
            let steps = run.steps();
            return Err(format!("{} has done {steps} steps: --steps must be at least that", clipping.name()).into());
        }
        runs.push(run);
    }
    Ok(runs)
}

/// Trains the runs by turns, with bars on a terminal, and a line at each checkpoint.
///
/// One thread runs everything: graphs of burn's autodiff that shared a parameter deadlock if several threads use them (seen in
/// burn 0.22.1).
fn train(runs: &mut [Run], options: &Options, data: &Data) -> Result<()> {
    let bars = MultiProgress::new();
    let style = ProgressStyle::with_template("{prefix:>14} {wide_bar} {pos}/{len} {msg:36}")?;
    let bar = |run: &Run| bars.add(ProgressBar::new(options.steps as u64).with_prefix(run.clipping.name()));
    let mut training: Vec<_> = runs.iter_mut().map(|run| (bar(run).with_style(style.clone()), run)).collect();
    let say = |run: &Run, words: String| bars.suspend(|| println!("{:>14}: {words}", run.clipping.name()));
    while !training.is_empty() {
        let mut going_on = Vec::new();
        for (bar, run) in training {
            let goes_on = run.advance(data, options.steps, options.save_every, |run| {
                if let Some((step, loss)) = run.figures.validation.last() {
                    say(run, format!("step {step}, saved, held-out loss {}", words(*loss)));
                }
            })?;
            let figures = &run.figures;
            bar.set_message(format!(
                "loss {}, norm {}",
                words(figures.loss.last().copied()),
                words(figures.norm.last().copied().flatten())
            ));
            bar.set_position(run.steps() as u64);
            if goes_on {
                going_on.push((bar, run));
                continue;
            }
            if let Some(step) = figures.diverged_at {
                say(run, format!("diverged: the loss of step {step} is not finite"));
            }
            bar.abandon();
        }
        training = going_on;
    }
    Ok(())
}

fn words(number: Option<f32>) -> String {
    number.map_or("not finite".into(), |number| format!("{number:.4}"))
}

/// The figures as they are written.
#[derive(Serialize)]
struct Report<'a> {
    settings: &'a Settings,
    parameters: usize,
    runs: Vec<Summary<'a>>,
}

#[derive(Serialize)]
struct Summary<'a> {
    clipping: Clipping,
    steps: usize,
    mean_loss_of_last_100: f32,
    weights: String,
    #[serde(flatten)]
    figures: &'a Figures,
}

impl<'a> Summary<'a> {
    fn of(run: &'a Run) -> Self {
        let (figures, clipping) = (&run.figures, run.clipping);
        let last = &figures.loss[figures.loss.len().saturating_sub(100)..];
        let mean_loss_of_last_100 = last.iter().sum::<f32>() / last.len().max(1) as f32;
        Self { clipping, steps: run.steps(), mean_loss_of_last_100, weights: run.fingerprint(), figures }
    }
}

/// Writes the picture and the figures.
fn report(options: &Options, parameters: usize, runs: &[Run]) -> Result<()> {
    let settings = &options.settings;
    let json = serde_json::to_string(&Report { settings, parameters, runs: runs.iter().map(Summary::of).collect() })?;
    let title = "A recurrent network where gradients explode, and four ways to clip them";
    let subtitle = format!(
        "{} hidden units, {} steps unrolled, {:?}, {:?}, learning rate {}; lines: means, bands: least to most, losses up to 100",
        settings.hidden, settings.unroll, settings.activation, settings.optimizer, settings.lr
    );
    for (file, text) in [("explode.json", json), ("explode.svg", plot::draw(title, &subtitle, runs))] {
        let path = options.out.join(file);
        fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

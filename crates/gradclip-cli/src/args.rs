//! The command line.

// Without a GPU two commands only say so, and read none of their options.
#![cfg_attr(not(feature = "gpu"), allow(dead_code))]

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::spec::{Mode, Spec};

#[derive(Debug, Parser)]
#[command(name = "gradclip", version, about, long_about = LONG, max_term_width = 80, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const LONG: &str = "Measures, clips and verifies gradients in safetensors files, on the GPU or on the CPU.

FILE is a safetensors file, or the *.safetensors.index.json of a sharded set. float32, float64, float16 and bfloat16 \
tensors are measured and clipped; metadata, integers and booleans pass through unchanged.";

const EXIT_CODES: &str = "Exit codes: 0 done; 1 could not (file, device); 2 usage;
3 non-finite gradients under --non-finite error; 4 GPU and CPU disagree.";

const CLIP_USAGE: &str = "gradclip clip FILE -o OUT --max-norm N [OPTIONS]
       gradclip clip FILE -o OUT --clip-value V [OPTIONS]
       gradclip clip FILE -o OUT --clip-range MIN,MAX [OPTIONS]";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Measure the global norm of all gradients in the files
    Norm(NormArgs),
    /// Clip the gradients of a file into a new file
    #[command(override_usage = CLIP_USAGE)]
    Clip(ClipArgs),
    /// Clip on GPU and CPU, and compare
    Verify(VerifyArgs),
    /// List the devices that the GPU backend can use
    Devices(DevicesArgs),
}

#[derive(Debug, Args)]
pub(crate) struct NormArgs {
    /// Safetensors files or indexes; one norm is measured over all of them
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Which norm
    #[arg(long, value_enum, value_name = "P", default_value = "2")]
    pub(crate) norm_type: NormType,
    /// The loss scale that the gradients carry: the norm is divided by it
    #[arg(long, value_name = "S", default_value_t = 1.0, allow_hyphen_values = true)]
    pub(crate) grad_scale: f64,
    #[command(flatten)]
    pub(crate) backend: BackendArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Print only the norm
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ClipArgs {
    /// A safetensors file or index
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Where the clipped gradients go; an index puts its shards beside itself
    #[arg(long, short, value_name = "OUT")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) mode: ModeArgs,
    /// Which norm [default: 2]
    #[arg(long, value_enum, value_name = "P", conflicts_with_all = ["clip_value", "clip_range"])]
    pub(crate) norm_type: Option<NormType>,
    /// Added to the norm before dividing; 0 is Optax's and TensorFlow's arithmetic [default: 1e-6, PyTorch's]
    #[arg(long, value_name = "E", conflicts_with_all = ["clip_value", "clip_range"], allow_hyphen_values = true)]
    pub(crate) eps: Option<f64>,
    /// The loss scale that the gradients carry: they are divided by it
    #[arg(long, value_name = "S", default_value_t = 1.0, allow_hyphen_values = true)]
    pub(crate) grad_scale: f64,
    /// What NaN and infinity lead to [default: error; with bounds on the values: propagate]
    #[arg(long, value_enum, value_name = "POLICY")]
    pub(crate) non_finite: Option<NonFinite>,
    #[command(flatten)]
    pub(crate) backend: BackendArgs,
    /// Before OUT is written, clip on GPU and CPU in memory and compare
    #[arg(long)]
    pub(crate) verify: bool,
    /// Replace OUT if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Print nothing but errors
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ModeArgs {
    /// Scale all gradients so that their norm is at most N
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) max_norm: Option<f64>,
    /// Clamp each element to -V..V
    #[arg(long, value_name = "V", allow_hyphen_values = true)]
    pub(crate) clip_value: Option<f64>,
    /// Clamp each element to MIN..MAX
    #[arg(long, value_name = "MIN,MAX", allow_hyphen_values = true, value_parser = range)]
    pub(crate) clip_range: Option<(f64, f64)>,
}

#[derive(Debug, Args)]
pub(crate) struct BackendArgs {
    /// Where to compute; auto takes a GPU if there is one, but no software device
    #[arg(long, value_enum, value_name = "WHERE", default_value = "auto")]
    pub(crate) backend: BackendChoice,
    /// Use the first GPU whose name contains NAME, even a software device
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// Threads for the CPU [default: one a core]; the result is the same for any number
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// A safetensors file or index, copied into memory; without one, gradients are made
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Seed of the made gradients
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "file")]
    pub(crate) seed: u64,
    /// How many sets of gradients to make
    #[arg(long, value_name = "N", default_value = "20", conflicts_with = "file")]
    pub(crate) cases: NonZeroUsize,
    /// Use the first GPU whose name contains NAME
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Print only what disagrees
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum BackendChoice {
    Auto,
    Gpu,
    Cpu,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum NormType {
    #[value(name = "2")]
    L2,
    #[value(name = "1")]
    L1,
    #[value(name = "inf")]
    Inf,
}

impl From<NormType> for gradclip::NormType {
    fn from(norm_type: NormType) -> Self {
        match norm_type {
            NormType::L2 => Self::L2,
            NormType::L1 => Self::L1,
            NormType::Inf => Self::Inf,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum NonFinite {
    /// Stop with exit code 3
    Error,
    /// Compute with them, as PyTorch does
    Propagate,
    /// Leave all gradients as they are
    Skip,
    /// Set all gradients to 0
    Zero,
    /// Set these elements to 0 and clip the rest
    Drop,
}

impl From<NonFinite> for gradclip::NonFinite {
    fn from(policy: NonFinite) -> Self {
        match policy {
            NonFinite::Error => Self::Error,
            NonFinite::Propagate => Self::Propagate,
            NonFinite::Skip => Self::Skip,
            NonFinite::Zero => Self::Zero,
            NonFinite::Drop => Self::Drop,
        }
    }
}

impl ClipArgs {
    /// The clip asked for, its numbers not yet checked.
    pub(crate) fn spec(&self) -> Spec {
        // The group guarantees one mode; were there none, infinity would clip nothing.
        let norm = || Mode::Norm(self.mode.max_norm.unwrap_or(f64::INFINITY));
        let value = || self.mode.clip_value.map(Mode::Value);
        let mode = self.mode.clip_range.map(Mode::Range).or_else(value).unwrap_or_else(norm);
        Spec {
            norm_type: self.norm_type.map(Into::into).unwrap_or_default(),
            eps: self.eps,
            grad_scale: self.grad_scale,
            non_finite: self.non_finite.map(Into::into),
            ..Spec::new(mode)
        }
    }
}

fn range(text: &str) -> Result<(f64, f64), String> {
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| format!("{text:?} is not a number"));
    let (min, max) = text.split_once(',').ok_or("two numbers are needed: MIN,MAX")?;
    Ok((number(min)?, number(max)?))
}

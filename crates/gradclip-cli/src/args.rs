//! The command line.

// Without a GPU two commands only say so, and read none of their options.
#![cfg_attr(not(feature = "gpu"), allow(dead_code))]

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use gradclip::{Budget, Clip, NonFinite, NormType, Scope, UnitAxis};

use crate::failure::Failure;
use crate::names::{AXES, BUDGETS, Names, POLICIES, SCOPES, by_example, clamps};
use crate::subject;

#[derive(Debug, Parser)]
#[command(name = "gradclip", version, about = ABOUT, long_about = LONG, max_term_width = 80, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const ABOUT: &str = "Measures, clips and verifies gradients in safetensors files";

const LONG: &str = "Measures, clips and verifies gradients in safetensors files, on the GPU or on the CPU.

FILE is a safetensors file, or the *.safetensors.index.json of a sharded set. float32, float64, float16 and bfloat16 \
tensors are measured and clipped; metadata, integers and booleans pass through unchanged.";

const EXIT_CODES: &str = "Exit codes: 0 done; 1 could not (file, device); 2 usage;
3 non-finite gradients under --non-finite error; 4 GPU and CPU disagree.";

const CLIP_USAGE: &str = "gradclip clip FILE -o OUT --max-norm N [OPTIONS]
       gradclip clip FILE -o OUT --max-rms R [OPTIONS]
       gradclip clip FILE -o OUT --max-average-norm A [OPTIONS]
       gradclip clip FILE -o OUT --agc FACTOR --params FILE [OPTIONS]
       gradclip clip FILE -o OUT --clip-value V [OPTIONS]
       gradclip clip FILE -o OUT --clip-range MIN,MAX [OPTIONS]";

const VERIFY_USAGE: &str = "gradclip verify [--seed N] [--cases N] [OPTIONS]
       gradclip verify FILE [MODE and options of clip] [OPTIONS]";

const BENCH: &str = "The gradients are made, and every answer that is timed is checked. Each row is one case: norm (measured \
only), unclipped (a clip that finds nothing to do), clipped (by norm) and value (clipped by value). GB/s is what the case \
must move over the median time: float32 4, 4, 12 and 8 bytes an element. A copy of n bytes moves 2 n.";

const COMPLETIONS: &str = "For bash: gradclip completions bash > ~/.local/share/bash-completion/completions/gradclip";

const MAN: &str = "To read one: gradclip man clip > gradclip-clip.1; man ./gradclip-clip.1";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Measure the gradients in the files: their norm, and which are the largest
    Norm(NormArgs),
    /// Clip the gradients of a file into a new file
    #[command(override_usage = CLIP_USAGE)]
    Clip(ClipArgs),
    /// Clip on GPU and CPU, and compare
    #[command(override_usage = VERIFY_USAGE)]
    Verify(VerifyArgs),
    /// Measure the throughput of clips, against the device's own copy speed
    #[command(after_help = BENCH)]
    Bench(BenchArgs),
    /// List the devices that the GPU backend can use
    Devices(DevicesArgs),
    /// Print a script that lets a shell complete commands and options
    #[command(after_help = COMPLETIONS)]
    Completions(CompletionsArgs),
    /// Print the manual page of the program, or of a command
    #[command(after_help = MAN)]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct NormArgs {
    /// Safetensors files or indexes; one norm is measured over all of them
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,
    /// How many of the largest norms to list
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) top: usize,
    #[command(flatten)]
    pub(crate) plot: PlotArgs,
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
    pub(crate) how: HowArgs,
    /// Write the sum of the clipped examples: in float32, float64 for float64
    #[arg(long)]
    pub(crate) sum: bool,
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

/// The mode of a clip, and what goes with it.
#[derive(Debug, Default, PartialEq, Args)]
pub(crate) struct HowArgs {
    #[command(flatten)]
    mode: ModeArgs,
    /// The parameters of the gradients, for --agc: a safetensors file or index
    #[arg(long, value_name = "FILE")]
    pub(crate) params: Option<PathBuf>,
    #[command(flatten)]
    measure: MeasureArgs,
    /// How tensors share N out under --scope example-tensor [default: each]
    #[arg(long, value_name = "HOW", value_parser = one_of(BUDGETS))]
    budget: Option<Budget>,
    /// Added to the norm before dividing; 0 is Optax's and TensorFlow's arithmetic [default: 1e-6, PyTorch's]
    #[arg(long, value_name = "E", allow_hyphen_values = true)]
    eps: Option<f64>,
    /// What --agc takes the norm of a parameter for at least [default: 1e-3]
    #[arg(long, value_name = "E", allow_hyphen_values = true)]
    agc_eps: Option<f64>,
    /// What NaN and infinity lead to [default: error; with bounds on the values: propagate]
    #[arg(long, value_name = "POLICY", value_parser = one_of(POLICIES))]
    non_finite: Option<NonFinite>,
}

#[derive(Debug, Default, PartialEq, Args)]
#[group(multiple = false)]
struct ModeArgs {
    /// Scale gradients so that their norm is at most N
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    max_norm: Option<f64>,
    /// Scale gradients so that their root mean square is at most R
    #[arg(long, value_name = "R", allow_hyphen_values = true)]
    max_rms: Option<f64>,
    /// Scale gradients so that their L2 norm is at most A times their number
    #[arg(long, value_name = "A", allow_hyphen_values = true)]
    max_average_norm: Option<f64>,
    /// Adaptive gradient clipping: scale gradients so that their norm is at most FACTOR times that of the parameters; by
    /// unit, if --scope says nothing else
    #[arg(long, value_name = "FACTOR", allow_hyphen_values = true)]
    agc: Option<f64>,
    /// Clamp each element to -V..V
    #[arg(long, value_name = "V", allow_hyphen_values = true)]
    clip_value: Option<f64>,
    /// Clamp each element to MIN..MAX
    #[arg(long, value_name = "MIN,MAX", allow_hyphen_values = true, value_parser = range)]
    clip_range: Option<(f64, f64)>,
}

/// What a norm is.
#[derive(Debug, Default, PartialEq, Args)]
pub(crate) struct MeasureArgs {
    /// Which norm: 2, 1, inf or any P above 0 [default: 2]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    norm_type: Option<f64>,
    /// Which gradients share a norm [default: global]
    #[arg(long, value_name = "SCOPE", value_parser = one_of(SCOPES))]
    scope: Option<Scope>,
    /// Which axis of a tensor counts its units [default: first]
    #[arg(long, value_name = "AXIS", value_parser = one_of(AXES))]
    unit_axis: Option<UnitAxis>,
    /// The loss scale that the gradients carry: they are divided by it [default: 1]
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    grad_scale: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct BackendArgs {
    /// Where to compute
    #[arg(long, value_enum, value_name = "WHERE", default_value = "auto")]
    pub(crate) backend: BackendChoice,
    /// Use the first GPU whose name contains NAME, even a software device
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// Threads for the CPU [default: one a core]; the result is the same for any number
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

/// A picture beside the text.
#[derive(Debug, Args)]
pub(crate) struct PlotArgs {
    /// Draw what was measured, into a new file
    #[arg(long = "plot", id = "plot", value_name = "OUT.svg")]
    pub(crate) out: Option<PathBuf>,
    /// Replace OUT.svg if it exists
    #[arg(long, requires = "plot")]
    pub(crate) force: bool,
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
    #[command(flatten)]
    pub(crate) how: HowArgs,
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
pub(crate) struct BenchArgs {
    /// How many elements, like 1000, 64Ki, 16Mi or 1Gi, separated by commas [default: 1Ki, 4Ki, ... to what the device and
    /// a quarter of the free memory hold; at most 64Mi on the CPU and on software devices]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = subject::size)]
    pub(crate) sizes: Vec<u64>,
    /// Which dtypes, separated by commas: f32, f16, bf16 [default: all]
    #[arg(long, value_name = "D", value_delimiter = ',', value_parser = subject::dtype)]
    pub(crate) dtype: Vec<gradclip::Dtype>,
    /// What a size is cut into: one tensor; the 291 tensors of a transformer of 7 G parameters, scaled down; or N tensors,
    /// 64 times as long and short by turns [default: one, and at the largest size also transformer]
    #[arg(long, value_name = "one|transformer|N", value_parser = subject::cut)]
    pub(crate) tensors: Option<subject::Cut>,
    /// How long each case runs again and again, in seconds; at least three times
    #[arg(long, value_name = "S", default_value = "0.2", value_parser = subject::seconds)]
    pub(crate) seconds: f64,
    /// Time GPU steps by the host's clock, with recording, submitting and waiting, even where the device has a clock
    #[arg(long)]
    pub(crate) host_clock: bool,
    #[command(flatten)]
    pub(crate) plot: PlotArgs,
    #[command(flatten)]
    pub(crate) backend: BackendArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    #[arg(value_name = "SHELL", value_enum)]
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Of which command; without one, of the program
    #[arg(value_name = "COMMAND")]
    pub(crate) command: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum BackendChoice {
    /// On a GPU if there is one, else on the CPU
    Auto,
    /// On a GPU, even a software device
    Gpu,
    /// On the CPU
    Cpu,
}

/// One of these values, by its name.
fn one_of<T: Copy + Send + Sync + 'static>(names: &'static Names<T>) -> impl TypedValueParser<Value = T> {
    let named = |(name, _, help): &(&'static str, _, &'static str)| PossibleValue::new(name).help(help);
    PossibleValuesParser::new(names.iter().map(named)).try_map(|text| {
        let found = names.iter().find(|(name, ..)| *name == text);
        found.map(|(_, value, _)| *value).ok_or("no such value")
    })
}

impl NormArgs {
    /// Whether nothing but the answer is printed.
    pub(crate) fn hidden(&self) -> bool {
        self.quiet || self.json
    }
}

impl MeasureArgs {
    /// What is measured, or clipped by this mode.
    pub(crate) fn clip(&self, mut clip: Clip) -> Result<Clip, Failure> {
        if let Some(p) = self.norm_type {
            clip = clip.norm_type(NormType::p(p));
        }
        clip.scope = self.scope.unwrap_or(clip.scope);
        clip.unit_axis = self.unit_axis;
        clip.grad_scale = self.grad_scale.unwrap_or(clip.grad_scale);
        refuse(&[(self.unit_axis.is_some() && clip.scope != Scope::Unit, "--unit-axis needs --scope unit")])?;
        Ok(clip)
    }
}

impl HowArgs {
    /// The clip asked for; `None` if none is.
    pub(crate) fn clip(&self) -> Result<Option<Clip>, Failure> {
        let ModeArgs { max_norm, max_rms, max_average_norm, agc, clip_value, clip_range } = self.mode;
        let modes = [
            max_norm.map(Clip::norm),
            max_rms.map(Clip::rms),
            max_average_norm.map(Clip::average_norm),
            agc.map(Clip::agc),
            clip_value.map(Clip::value),
            clip_range.map(|(min, max)| Clip::range(min, max)),
        ];
        let Some(mode) = modes.into_iter().flatten().next() else {
            refuse(&[(*self != Self::default(), MODE_NEEDED)])?;
            return Ok(None);
        };
        let mut clip = self.measure.clip(mode)?;
        let by_norm = max_norm.is_some();
        refuse(&[
            (self.measure.norm_type.is_some() && !by_norm, "--norm-type goes with --max-norm only"),
            (self.eps.is_some() && !by_norm, "--eps goes with --max-norm only"),
            (
                self.measure.scope.is_some() && clamps(&clip),
                "--scope says what shares a norm, and a clamp measures none",
            ),
            (self.budget.is_some() && clip.scope != Scope::ExampleTensor, "--budget needs --scope example-tensor"),
            (
                agc.is_some() && by_example(&clip),
                "parameters have no examples: --agc needs --scope unit, tensor or global",
            ),
            (agc.is_some() && self.params.is_none(), "--agc needs the parameters of the gradients: --params FILE"),
            (agc.is_none() && self.params.is_some(), "--params goes with --agc only"),
            (agc.is_none() && self.agc_eps.is_some(), "--agc-eps goes with --agc only"),
        ])?;
        clip.budget = self.budget.unwrap_or(clip.budget);
        clip.eps = self.eps.or(clip.eps);
        clip.agc_eps = self.agc_eps.or(clip.agc_eps);
        clip.non_finite = self.non_finite.unwrap_or(clip.non_finite);
        clip.check()?;
        Ok(Some(clip))
    }
}

impl ClipArgs {
    /// The clip asked for.
    pub(crate) fn clip(&self) -> Result<Clip, Failure> {
        let clip = self.how.clip()?.ok_or_else(|| Failure::Usage(MODE_NEEDED.into()))?;
        let skips = clip.non_finite == NonFinite::Skip;
        refuse(&[
            (
                self.sum && !by_example(&clip),
                "--sum adds up clipped examples: it needs --scope example or example-tensor",
            ),
            (self.sum && skips, "a sum cannot be left as it was: --sum needs another policy than --non-finite skip"),
            (self.sum && self.verify, "--verify compares clipped gradients, not their sums: leave it or --sum out"),
        ])?;
        Ok(clip)
    }
}

pub(crate) const MODE_NEEDED: &str = "a mode is required: --max-norm N, --max-rms R, --max-average-norm A, \
    --agc FACTOR --params FILE, --clip-value V or --clip-range MIN,MAX";

/// Fails with the message of the first that is true. What would change nothing is refused, lest someone rely on it.
pub(crate) fn refuse(wrong: &[(bool, &str)]) -> Result<(), Failure> {
    wrong.iter().find(|(wrong, _)| *wrong).map_or(Ok(()), |(_, why)| Err(Failure::Usage((*why).into())))
}

fn range(text: &str) -> Result<(f64, f64), String> {
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| format!("{text:?} is not a number"));
    let (min, max) = text.split_once(',').ok_or("two numbers are needed: MIN,MAX")?;
    Ok((number(min)?, number(max)?))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn everything_has_a_help_text() {
        let mut program = Cli::command();
        program.build();
        program.clone().debug_assert();
        for command in program.get_subcommands().chain([&program]) {
            assert!(command.get_about().is_some(), "{command}");
            for option in command.get_arguments() {
                assert!(option.get_help().is_some_and(|help| !help.to_string().is_empty()), "{command}: {option}");
                let values = option.get_possible_values();
                let told = values.iter().filter(|value| value.get_help().is_some()).count();
                // The names of shells say enough.
                assert!(told == values.len() || option.get_id() == "shell", "{command}: {option}");
            }
        }
    }
}

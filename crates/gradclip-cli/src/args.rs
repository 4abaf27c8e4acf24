//! The command line.

// Without the GPU feature two commands return an error and read none of their options.
#![cfg_attr(not(feature = "gpu"), allow(dead_code))]

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use gradclip::{Budget, Dtype, NonFinite, Scope, UnitAxis};

use crate::values::{self, BUDGETS, Cut, OUT_DTYPES, POLICIES, SCOPES, one_of};

#[derive(Debug, Parser)]
#[command(name = "gradclip", version, about = ABOUT, long_about = LONG, max_term_width = 80, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const ABOUT: &str = "Measures, clips and verifies gradients in safetensors files";

const LONG: &str = "Measures, clips and verifies gradients in safetensors files, on the GPU or on the CPU.

FILE is a safetensors file, or the *.safetensors.index.json of a sharded set. The program measures and clips float32, \
float64, float16 and bfloat16 tensors. It copies everything else unchanged, and names tensors of other floating-point dtypes.";

const EXIT_CODES: &str = "Exit codes: 0 success; 1 failure (file, device); 2 usage error;
3 non-finite gradients under --non-finite error; 4 GPU and CPU disagree.";

const CLIP_USAGE: &str = "gradclip clip FILE -o OUT --max-norm N [OPTIONS]
       gradclip clip FILE -o OUT --max-rms R [OPTIONS]
       gradclip clip FILE -o OUT --max-average-norm A [OPTIONS]
       gradclip clip FILE -o OUT --agc FACTOR --params FILE [OPTIONS]
       gradclip clip FILE -o OUT --clip-value V [OPTIONS]
       gradclip clip FILE -o OUT --clip-range MIN,MAX [OPTIONS]";

const VERIFY_USAGE: &str = "gradclip verify [--seed N] [--cases N] [OPTIONS]
       gradclip verify FILE [MODE and options of clip] [OPTIONS]";

const BENCH: &str = "The program generates the gradients and checks every result that it times. Each row is one case: norm \
(only measures), unclipped (a clip that changes nothing), clipped (by norm) and value (clipped by value). GB/s is the bytes \
that the case must move, divided by the median time: for float32 4, 4, 12 and 8 bytes per element. A copy of n bytes moves \
2 n.";

const TUNE: &str = "Each row differs from the best one before in one number. Its time is relative to that row's: the geometric mean \
over norms and clips of several sizes, in one round or two. A row is taken if it is 5 % faster in each of two rounds. The other \
commands use it from then on, but for --no-tuning; a row of another driver or version does not count.";

const HISTORY: &str = "A step is the last number in a file's name, or in that of its folder. If a file has none, or all have the \
same, steps are numbered in the order given. If a log has a step twice, the last line counts.

The z-score of a total norm N is (ln N - median) / spread, over ln N of the 50 steps before it. The spread is 1.4826 times the \
median distance from the median, and at least 0.05. A norm with fewer than 5 steps before it has none.";

const COMPLETIONS: &str = "For bash: gradclip completions bash > ~/.local/share/bash-completion/completions/gradclip";

const MAN: &str = "To read a page: gradclip man clip > gradclip-clip.1; man ./gradclip-clip.1";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Measure the norm of the gradients in files, and list the largest
    Norm(NormArgs),
    /// Clip the gradients of a file into a new file
    // Its help must fit two screens, so what each value means stands in its manual page alone.
    #[command(override_usage = CLIP_USAGE, disable_help_flag = true)]
    Clip(ClipArgs),
    /// Show norms over the steps of a training run, and where they spike or are not finite
    #[command(after_help = HISTORY)]
    History(HistoryArgs),
    /// Clip on the GPU and on the CPU, and compare the results
    #[command(override_usage = VERIFY_USAGE)]
    Verify(VerifyArgs),
    /// Measure the throughput of clips, and compare it with the device's copy speed
    #[command(after_help = BENCH)]
    Bench(BenchArgs),
    /// List the devices that the GPU backend can use
    Devices(DevicesArgs),
    /// Measure which tuning is fastest on a GPU, and keep it for the other commands
    #[command(after_help = TUNE)]
    Tune(TuneArgs),
    /// Print a script that lets a shell complete commands and options
    #[command(after_help = COMPLETIONS)]
    Completions(CompletionsArgs),
    /// Print the manual page of the program or of a command
    #[command(after_help = MAN)]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct NormArgs {
    /// Safetensors files or indexes; the norm is that of all of them together
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,
    #[command(flatten)]
    pub(crate) select: SelectArgs,
    /// How many of the largest norms to list
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) top: usize,
    #[command(flatten)]
    pub(crate) plot: PlotArgs,
    /// Count elements, as they are stored, by powers of two, and those that narrower formats would lose
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) histogram: bool,
    /// Append the norms of FILE and of its tensors to LOG, as a line of JSON for gradclip history
    #[arg(long, value_name = "LOG")]
    pub(crate) append: Option<PathBuf>,
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
pub(crate) struct HistoryArgs {
    /// Safetensors files or indexes, one for each step, or logs of gradclip norm --append
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Which norm: 2, 1, inf or any P above 0 [default: 2]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub(crate) norm_type: Option<f64>,
    /// Take tensors whose names fit as a group: * is any characters, ? is one. The first fit counts. Repeatable
    #[arg(long = "group", value_name = "PATTERN", conflicts_with = "levels")]
    pub(crate) groups: Vec<String>,
    /// Without --group: how many first levels of a name, divided by dots, make a group
    #[arg(long, value_name = "N", default_value = "2")]
    pub(crate) levels: NonZeroUsize,
    /// How many of the largest groups to show
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) top: usize,
    /// The z-score above which a total norm is a spike
    #[arg(long, value_name = "Z", default_value_t = 6.0)]
    pub(crate) spike: f64,
    #[command(flatten)]
    pub(crate) plot: PlotArgs,
    /// Number of CPU threads; it does not change the result [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Print one JSON object of flat scalars for each step, with all groups
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ClipArgs {
    /// A safetensors file or index
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The file to write the clipped gradients to; shards go into the folder of an index
    #[arg(long, short, value_name = "OUT")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) options: ClipOptions,
    #[command(flatten)]
    pub(crate) select: SelectArgs,
    /// Scale by this norm, which was measured elsewhere: that of all gradients, divided by --grad-scale. Measures nothing
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) given_norm: Option<f64>,
    /// Write the sum of the clipped examples, in float32, or in float64 for float64
    #[arg(long)]
    pub(crate) sum: bool,
    /// Widen float16 and bfloat16 gradients to float32 before they are clipped, so that rounding loses none
    #[arg(long, value_name = "float32", value_parser = one_of(OUT_DTYPES), hide_possible_values = true)]
    pub(crate) out_dtype: Option<Dtype>,
    #[command(flatten)]
    pub(crate) backend: BackendArgs,
    /// Before OUT is written, clip in memory on GPU and CPU, and compare
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
    /// Print help; `gradclip man clip` says what each value means
    #[arg(long, short, action = ArgAction::HelpShort)]
    help: Option<bool>,
}

/// The mode of a clip, and its options.
#[derive(Debug, Default, PartialEq, Args)]
pub(crate) struct ClipOptions {
    #[command(flatten)]
    pub(crate) mode: ModeArgs,
    /// Clip tensors whose names fit as a group, with its own norm and this threshold. The first fit counts. Repeatable
    #[arg(long = "group", value_name = "PATTERN=MAX", value_parser = values::group)]
    pub(crate) groups: Vec<(String, f64)>,
    /// The parameters of the gradients, for --agc: a safetensors file or index
    #[arg(long, value_name = "FILE")]
    pub(crate) params: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,
    /// How N is divided among tensors under --scope example-tensor [default: each]
    #[arg(long, value_name = "BUDGET", value_parser = one_of(BUDGETS))]
    pub(crate) budget: Option<Budget>,
    /// Number added to the norm before dividing; Optax and TensorFlow use 0 [default: 1e-6, as in PyTorch]
    #[arg(long, value_name = "E", allow_hyphen_values = true)]
    pub(crate) eps: Option<f64>,
    /// The least norm of a parameter that --agc computes with [default: 1e-3]
    #[arg(long, value_name = "E", allow_hyphen_values = true)]
    pub(crate) agc_eps: Option<f64>,
    /// Beside a clip by value, measure and report the L2 norm before it, in a pass of its own
    #[arg(long)]
    pub(crate) report_norm: bool,
    /// What to do about NaN and infinity [default: error; with --clip-value and --clip-range: propagate]
    #[arg(long, value_name = "POLICY", value_parser = one_of(POLICIES))]
    pub(crate) non_finite: Option<NonFinite>,
    /// Leave all gradients as they are if their total norm is above N
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) skip_above: Option<f64>,
}

#[derive(Debug, Default, PartialEq, Args)]
#[group(multiple = false)]
pub(crate) struct ModeArgs {
    /// Scale gradients so that their norm is at most N
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) max_norm: Option<f64>,
    /// Scale gradients so that their root mean square is at most R
    #[arg(long, value_name = "R", allow_hyphen_values = true)]
    pub(crate) max_rms: Option<f64>,
    /// Scale gradients so that their L2 norm is at most A times their number
    #[arg(long, value_name = "A", allow_hyphen_values = true)]
    pub(crate) max_average_norm: Option<f64>,
    /// Adaptive gradient clipping: scale gradients so that their norm is at most FACTOR times the norm of their parameters
    /// [default scope: unit]
    #[arg(long, value_name = "FACTOR", allow_hyphen_values = true)]
    pub(crate) agc: Option<f64>,
    /// Clamp each element to -V..V
    #[arg(long, value_name = "V", allow_hyphen_values = true)]
    pub(crate) clip_value: Option<f64>,
    /// Clamp each element to MIN..MAX
    #[arg(long, value_name = "MIN,MAX", allow_hyphen_values = true, value_parser = values::range)]
    pub(crate) clip_range: Option<(f64, f64)>,
}

/// Which norm is measured.
#[derive(Debug, Default, PartialEq, Args)]
pub(crate) struct MeasureArgs {
    /// Which norm: 2, 1, inf or any P above 0 [default: 2]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub(crate) norm_type: Option<f64>,
    /// Which gradients share a norm [default: global]
    #[arg(long, value_name = "SCOPE", value_parser = one_of(SCOPES))]
    pub(crate) scope: Option<Scope>,
    /// The axes of a tensor that number its units: first (rows, as in PyTorch), last (columns, as in JAX), optax, or a list
    /// like 0,-1; or over:LIST, those that a norm goes over, as in TensorFlow [default: first]
    #[arg(long, value_name = "AXES", allow_hyphen_values = true, value_parser = values::unit_axis)]
    pub(crate) unit_axis: Option<UnitAxis>,
    /// Divide the gradients by this loss scale [default: 1]
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    pub(crate) grad_scale: Option<f64>,
}

/// Which gradients are taken, by name.
#[derive(Debug, Args)]
pub(crate) struct SelectArgs {
    /// Take only tensors whose names fit: * is any characters, ? is one. Others pass through. Repeatable
    #[arg(long, value_name = "PATTERN")]
    pub(crate) only: Vec<String>,
    /// Let tensors whose names fit pass through unchanged. Repeatable
    #[arg(long, value_name = "PATTERN")]
    pub(crate) except: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct BackendArgs {
    /// The device to compute on
    #[arg(long, value_enum, value_name = "BACKEND", default_value = "auto")]
    pub(crate) backend: BackendChoice,
    /// Use the first GPU whose name contains NAME, even a software device
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// Number of CPU threads, at most 4 per core; it does not change the result [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Do not use what `gradclip tune` has found
    #[arg(long)]
    pub(crate) no_tuning: bool,
    /// The number of this process among the ranks on its machine, if it is a rank.
    #[arg(skip)]
    pub(crate) local_rank: Option<u32>,
}

/// A plot of what was measured.
#[derive(Debug, Args)]
pub(crate) struct PlotArgs {
    /// Draw the results into a new file
    #[arg(long = "plot", id = "plot", value_name = "OUT.svg")]
    pub(crate) out: Option<PathBuf>,
    /// Replace OUT.svg if it exists
    #[arg(long, requires = "plot")]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// A safetensors file or index, which is copied into memory [default: generated gradients]
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Seed of the generated gradients
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "file")]
    pub(crate) seed: u64,
    /// How many sets of gradients to generate
    #[arg(long, value_name = "N", default_value = "20", conflicts_with = "file")]
    pub(crate) cases: NonZeroUsize,
    #[command(flatten)]
    pub(crate) options: ClipOptions,
    #[command(flatten)]
    pub(crate) select: SelectArgs,
    /// Use the first GPU whose name contains NAME
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// Do not use what `gradclip tune` has found
    #[arg(long)]
    pub(crate) no_tuning: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Print only the clips that disagree
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Numbers of elements, like 1000, 64Ki, 16Mi or 1Gi, separated by commas [default: 1Ki, 4Ki, ... up to what the device
    /// and a quarter of the free memory hold; at most 64Mi on the CPU and on software devices]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = values::size)]
    pub(crate) sizes: Vec<u64>,
    /// Dtypes, separated by commas: f32, f16, bf16 [default: all]
    #[arg(long, value_name = "D", value_delimiter = ',', value_parser = values::dtype)]
    pub(crate) dtype: Vec<Dtype>,
    /// How the elements are cut into tensors: one tensor; the 291 tensors of a transformer of 7 G parameters, scaled down; or
    /// N tensors, alternately long and 64 times shorter [default: one, and at the largest size also transformer]
    #[arg(long, value_name = "one|transformer|N", value_parser = values::cut)]
    pub(crate) tensors: Option<Cut>,
    /// For how many seconds each case is repeated; it runs at least three times
    #[arg(long, value_name = "S", default_value = "0.2", value_parser = values::seconds)]
    pub(crate) seconds: f64,
    /// Time GPU steps by the host's clock even if the device has one; recording, submitting and waiting then count
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
pub(crate) struct TuneArgs {
    /// Measure from how many bytes on the GPU is faster than the CPU for tensors in files, and take it only then
    #[arg(long)]
    pub(crate) host: bool,
    /// Use the first GPU whose name contains NAME
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// For about how many seconds to go on
    #[arg(long, value_name = "S", default_value = "50", value_parser = values::seconds)]
    pub(crate) seconds: f64,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The command [default: the program]
    #[arg(value_name = "COMMAND")]
    pub(crate) command: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum BackendChoice {
    /// The GPU if there is one, else the CPU
    Auto,
    /// The GPU, even a software device
    Gpu,
    /// The CPU
    Cpu,
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
                let described = values.iter().filter(|value| value.get_help().is_some()).count();
                // The names of shells need no help text.
                assert!(described == values.len() || option.get_id() == "shell", "{command}: {option}");
            }
        }
    }
}

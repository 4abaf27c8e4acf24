//! The command line of `gradclip-mpi`.

use std::path::PathBuf;

use clap::{Arg, Args, Parser, Subcommand};
use gradclip::Dtype;

use crate::args::{BackendArgs, ClipOptions, MeasureArgs, SelectArgs};
use crate::values::{OUT_DTYPES, one_of};

#[derive(Debug, Parser)]
#[command(name = "gradclip-mpi", version, about = ABOUT, long_about = LONG, max_term_width = 80, after_help = EXIT_CODES)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

const ABOUT: &str = "Measures and clips gradients in many safetensors files, on many processes, by one norm";

const LONG: &str = "Measures and clips gradients in many safetensors files, on many processes, by one norm.

Start it with mpirun. The files are divided among the processes (ranks), as evenly in bytes as whole files allow. All ranks \
scale by the norm of all gradients in all files. All ranks must see the files, and the folder of OUT, under the same \
names: on one machine, or on a shared file system. Ranks on one machine share its cores: divide them with --threads.

If several files have a tensor of the same name, these are slices of one tensor, and each slice counts. Replicas of one \
tensor, such as layer norms or biases beside sharded weights, would be counted several times: name them with --replicated.";

const EXIT_CODES: &str = "Example:
  mpirun -n 4 gradclip-mpi clip shards/*.safetensors -o out --max-norm 1

GRADCLIP_MPI_TIMEOUT=S limits how many seconds a rank waits for another.

Exit codes, the same on every rank: 0 success; 1 failure (file, device, rank);
2 usage error; 3 non-finite gradients under --non-finite error.";

const CLIP_USAGE: &str = "mpirun gradclip-mpi clip FILE... -o OUT --max-norm N [OPTIONS]
       mpirun gradclip-mpi clip FILE... -o OUT --max-rms R [OPTIONS]
       mpirun gradclip-mpi clip FILE... -o OUT --max-average-norm A [OPTIONS]
       mpirun gradclip-mpi clip FILE... -o OUT --clip-value V [OPTIONS]
       mpirun gradclip-mpi clip FILE... -o OUT --clip-range MIN,MAX [OPTIONS]";

const NORM_USAGE: &str = "mpirun gradclip-mpi norm FILE... [OPTIONS]";

const CLIP_LONG: &str = "Clip the gradients of many files by one norm, into new files of the same names in the folder OUT.

OUT appears whole or not at all. Every rank writes into a folder beside OUT. When all ranks have finished, that folder is \
renamed to OUT. If a rank fails before that, the folder is removed, and there is no OUT.";

/// Hides options that need other scopes. They are parsed, so that the error can give a reason.
fn by_one_norm(arg: Arg) -> Arg {
    let id = arg.get_id().as_str();
    let hidden = ["scope", "unit_axis", "budget", "agc", "agc_eps", "params"].contains(&id);
    arg.hide(hidden)
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one in a run")]
pub(super) enum Command {
    /// Measure the norm of the gradients of all files together
    #[command(override_usage = NORM_USAGE, mut_args(by_one_norm))]
    Norm(NormArgs),
    /// Clip the gradients of many files by one norm, into new files
    #[command(override_usage = CLIP_USAGE, long_about = CLIP_LONG, mut_args(by_one_norm))]
    Clip(ClipArgs),
}

#[derive(Debug, Args)]
pub(super) struct NormArgs {
    #[command(flatten)]
    pub(super) measure: MeasureArgs,
    #[command(flatten)]
    pub(super) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(super) struct ClipArgs {
    /// The folder to write the clipped files to
    #[arg(long, short, value_name = "OUT")]
    pub(super) out: PathBuf,
    /// Replace OUT if it exists and holds nothing but safetensors files
    #[arg(long)]
    pub(super) force: bool,
    /// Widen float16 and bfloat16 gradients to float32 before they are clipped, so that rounding loses none
    #[arg(long, value_name = "float32", value_parser = one_of(OUT_DTYPES), hide_possible_values = true)]
    pub(super) out_dtype: Option<Dtype>,
    #[command(flatten)]
    pub(super) options: ClipOptions,
    #[command(flatten)]
    pub(super) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(super) struct CommonArgs {
    /// Safetensors files
    #[arg(value_name = "FILE", required = true)]
    pub(super) files: Vec<PathBuf>,
    /// Tensors of this name are replicas of one tensor: count only that of the first file. A * stands for any characters. May
    /// be given several times
    #[arg(long, value_name = "NAME")]
    pub(super) replicated: Vec<String>,
    #[command(flatten)]
    pub(super) select: SelectArgs,
    #[command(flatten)]
    pub(super) backend: BackendArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    /// Print only the norm; for clip, print nothing but errors
    #[arg(long, short)]
    pub(super) quiet: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn everything_has_a_help_text_of_80_columns() {
        let mut program = Cli::command();
        program.build();
        program.clone().debug_assert();
        for command in program.get_subcommands().chain([&program]) {
            for help in [command.clone().render_help(), command.clone().render_long_help()] {
                let help = help.to_string();
                assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
            }
            for option in command.get_arguments() {
                assert!(option.get_help().is_some_and(|help| !help.to_string().is_empty()), "{command}: {option}");
            }
        }
    }
}

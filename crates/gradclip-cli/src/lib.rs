//! The program `gradclip`: measures, clips and verifies gradients in safetensors files, and measures how fast it is.
//!
//! It is a library only so that tests, fuzzing and the Python package can call it; it offers [`main()`] and [`main_with()`]
//! alone. To clip in your own program, use the library `gradclip`.
//!
//! Each command has a file: [`norm`], [`clip`], [`history`], [`verify`], [`bench`], [`devices`], [`tune`], [`completions`], [`man`]. [`args`] is the command
//! line, [`values`] parses options, [`description`] makes the clip, [`selection`] takes
//! gradients by name, and [`groups`] divides them. [`input`], [`mapped`] and [`log`] read; [`layout`],
//! [`stream`], [`output`] and [`temporary`] write, whole or not at all. [`backend`] computes, by what [`tuning`] has kept of `tune`.
//! [`report`], [`print`] and [`progress`] show. What the page for browsers has too is in the crate `gradclip-common`; [`failure`] has the exit codes. [`processes`] is the program
//! `gradclip-mpi`, which does the same on many ranks.

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian, and gradclip computes on their bytes in place");

mod args;
mod backend;
mod bench;
mod clip;
mod completions;
mod description;
#[cfg(feature = "gpu")]
mod devices;
mod failure;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod groups;
mod history;
mod input;
mod layout;
mod log;
mod man;
mod mapped;
mod norm;
mod output;
mod print;
#[doc(hidden)]
pub mod processes;
mod progress;
mod report;
mod selection;
mod stream;
mod temporary;
#[cfg(feature = "gpu")]
mod tune;
#[cfg(feature = "gpu")]
mod tuning;
mod values;
#[cfg(feature = "gpu")]
mod verify;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use failure::Failure;

/// Runs the command line, and prints errors to stderr.
pub fn main() -> ExitCode {
    ExitCode::from(main_with(std::env::args_os()))
}

/// The same with these arguments, the first of them the program's name. Returns the exit code.
pub fn main_with(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    temporary::ignore_length_signal();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // If nobody can read the message, the exit code still tells.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(1);
        }
    };
    match run(&cli.command) {
        Ok(()) => 0,
        Err(failure) => {
            // If stderr is closed, nobody can read the message.
            let _ = writeln!(std::io::stderr(), "error: {}", failure.message());
            failure.exit_code()
        }
    }
}

fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Norm(args) => norm::run(args),
        Command::Clip(args) => clip::run(args),
        Command::History(args) => history::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
        #[cfg(feature = "gpu")]
        Command::Verify(args) => verify::run(args),
        #[cfg(feature = "gpu")]
        Command::Devices(args) => devices::run(args),
        #[cfg(feature = "gpu")]
        Command::Tune(args) => tune::run(args),
        #[cfg(not(feature = "gpu"))]
        Command::Verify(_) | Command::Devices(_) | Command::Tune(_) => Err(Failure::BuiltWithoutGpu),
    }
}

//! The program `gradclip`: measures, clips and verifies gradients in safetensors files, and tells how fast it is.
//!
//! A library only so that tests and fuzzing reach what is inside: all it offers is [`main()`]. To clip in a program of your
//! own, use the library `gradclip`.
//!
//! One file a command ([`norm`], [`clip`], [`verify`], [`bench`], [`devices`], [`completions`], [`man`]), and what they share:
//! [`args`] is the command line, [`names`] what settings are called, [`input`], [`header`] and [`mapped`] read gradients,
//! [`layout`], [`stream`] and [`output`] write them whole or not at all, [`backend`] chooses where to compute, [`report`] prints, [`plot`] draws norms
//! and [`throughput`] speeds, [`made`] and [`subject`] make gradients, [`contender`] times a step on them, [`failure`] holds the exit codes.
//! [`processes`] is the program `gradclip-mpi`, whose ranks do the same together.

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian, and gradclip computes on their bytes in place");

mod args;
mod backend;
mod bench;
mod clip;
mod completions;
mod contender;
#[cfg(feature = "gpu")]
mod devices;
mod failure;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod input;
mod layout;
#[cfg(feature = "gpu")]
mod made;
mod man;
mod mapped;
mod names;
mod norm;
mod output;
mod plot;
#[doc(hidden)]
pub mod processes;
mod progress;
mod report;
mod stream;
mod subject;
mod throughput;
#[cfg(feature = "gpu")]
mod verify;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use failure::Failure;

/// Does what the command line asks for, and says on stderr why if it cannot.
pub fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Nobody is left to tell if stderr is closed.
            let _ = writeln!(std::io::stderr(), "error: {}", failure.message());
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Norm(args) => norm::run(args),
        Command::Clip(args) => clip::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
        #[cfg(feature = "gpu")]
        Command::Verify(args) => verify::run(args),
        #[cfg(feature = "gpu")]
        Command::Devices(args) => devices::run(args),
        #[cfg(not(feature = "gpu"))]
        Command::Verify(_) | Command::Devices(_) => Err(Failure::BuiltWithoutGpu),
    }
}

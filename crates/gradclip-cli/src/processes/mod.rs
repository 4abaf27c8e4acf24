//! The program `gradclip-mpi`: the files of a sharded model, measured or clipped by many processes and one norm. The crate of
//! that name gives [`main()`] its process group, and is all that knows of MPI.
//!
//! Every rank goes through the same steps, and none goes on before all have done the one before ([`together`]):
//!
//! ```text
//! arguments   are the same on all ranks
//! open        each rank has mapped its share of the files, and all know what is in them (share.rs)
//! folder      rank 0 has made one beside OUT (folder.rs), and all see it
//! ready       each rank has its backend, and on a GPU its copies
//!             -> measure, exchange partials, decide: the library's part, within the group
//! done        each rank has written its clipped files into the folder, and no input has changed
//!             -> rank 0 makes the folder OUT, by one rename, and prints the report
//! end         how that went
//! ```
//!
//! A rank that fails says so in the step that it was on the way to. So each rank ends there, with the same exit code, and
//! nobody waits for what will not come.

mod args;
mod folder;
mod job;
mod share;
mod together;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use gradclip::processes::ProcessGroup;

use crate::failure::Failure;
use crate::report;
use args::Cli;
use job::Job;
use together::{Stopped, Together};

/// How a rank ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// The same on every rank.
    pub exit_code: u8,
    /// What the rank has to say on stderr: whole lines, or nothing.
    pub message: String,
}

/// Does what the command line asks for, as one of the ranks of a group, and says on stderr why if it cannot. All ranks must
/// call it.
pub fn main(group: Arc<dyn ProcessGroup>) -> ExitCode {
    let Ended { exit_code, message } = run(group, std::env::args_os().skip(1), &mut std::io::stdout());
    // Nobody is left to tell if stderr is closed.
    let _ = std::io::stderr().write_all(message.as_bytes());
    ExitCode::from(exit_code)
}

/// The same with these arguments, without the program's name. Rank 0 alone writes to `stdout`.
pub fn run(group: Arc<dyn ProcessGroup>, args: impl IntoIterator<Item = OsString>, stdout: &mut dyn Write) -> Ended {
    let args: Vec<_> = args.into_iter().collect();
    let together = Together::new(group);
    match parse(&together, &args, stdout).and_then(|job| job.map_or(Ok(()), |job| job.run(&together, stdout))) {
        Ok(()) => Ended { exit_code: 0, message: String::new() },
        Err(Stopped { exit_code, message }) => Ended { exit_code, message },
    }
}

/// What is asked of all ranks; nothing if rank 0 has answered it already.
fn parse(together: &Together, args: &[OsString], stdout: &mut dyn Write) -> Result<Option<Job>, Stopped> {
    let other = |rank| Failure::Usage(format!("rank {rank} was given other arguments than rank 0: give all the same"));
    together.same("arguments", Ok((env!("CARGO_PKG_VERSION"), args)), other)?;
    let error = match Cli::try_parse_from([&OsString::from("gradclip-mpi")].into_iter().chain(args)) {
        Ok(cli) => return Job::new(cli).map(Some).map_err(|failure| together.known_to_all(&failure)),
        Err(error) => error,
    };
    let text = error.render().to_string();
    if error.use_stderr() {
        return Err(Stopped { exit_code: 2, message: together.first_says(text) });
    }
    let shown = if together.is_first() {
        report::printed(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))
    } else {
        Ok(())
    };
    together.step("help", shown.map(|()| ((), ()))).map(|_| None)
}

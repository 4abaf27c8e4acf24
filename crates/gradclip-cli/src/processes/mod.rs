//! The program `gradclip-mpi`: many processes measure or clip the files of a sharded model by one norm. The crate of that name
//! gives [`run`] its process group; only that crate uses MPI.
//!
//! Every rank goes through the same steps. None begins a step before all have finished the one before ([`lockstep`]):
//!
//! ```text
//! arguments   are the same on all ranks
//! open        each rank has mapped its files, and all know what is in them (assignment.rs)
//! folder      rank 0 has created one beside OUT (folder.rs), and all see it
//! ready       each rank has its backend, and on a GPU its copies
//!             -> the library measures, exchanges partials and decides within the group
//! done        each rank has written its clipped files into the folder, and no input has changed
//!             -> rank 0 renames the folder to OUT and prints the report
//! end         whether that succeeded
//! ```
//!
//! A rank that fails reports it in its next step. So every rank ends there, with the same exit code, and none waits for a message
//! that will not come.

mod args;
mod assignment;
mod folder;
mod lockstep;
mod operation;

use std::ffi::OsString;
use std::io::Write;
use std::sync::Arc;

use clap::Parser;
use gradclip::processes::ProcessGroup;

use crate::failure::Failure;
use crate::print::printed;
use crate::temporary::ignore_length_signal;
use args::Cli;
pub use lockstep::Exit;
use lockstep::Lockstep;
use operation::Operation;

/// Runs these arguments, without the name of the program, as one rank of a group. All ranks must call it. `local_rank` is the
/// number of this one among the ranks on its machine. Only rank 0 writes to `stdout`.
pub fn run(
    group: Arc<dyn ProcessGroup>,
    local_rank: u32,
    args: impl IntoIterator<Item = OsString>,
    stdout: &mut dyn Write,
) -> Exit {
    ignore_length_signal();
    let args: Vec<_> = args.into_iter().collect();
    let lockstep = Lockstep { group };
    let operation = parse(&lockstep, local_rank, &args, stdout);
    let done = operation.and_then(|operation| operation.map_or(Ok(()), |operation| operation.run(&lockstep, stdout)));
    done.err().unwrap_or(Exit { exit_code: 0, message: String::new() })
}

/// The operation that all ranks perform; `None` if rank 0 has printed the answer (help, version).
fn parse(
    lockstep: &Lockstep,
    local_rank: u32,
    args: &[OsString],
    stdout: &mut dyn Write,
) -> Result<Option<Operation>, Exit> {
    let other = |rank| Failure::Usage(format!("rank {rank} was given other arguments than rank 0: give all the same"));
    lockstep.same("arguments", Ok((env!("CARGO_PKG_VERSION"), args)), other)?;
    let error = match Cli::try_parse_from([&OsString::from("gradclip-mpi")].into_iter().chain(args)) {
        Ok(cli) => return Operation::new(cli, local_rank).map(Some).map_err(|failure| lockstep.exit_with(&failure)),
        Err(error) => error,
    };
    let text = error.render().to_string();
    if error.use_stderr() {
        return Err(lockstep.exit(2, text));
    }
    let result = if lockstep.is_first() {
        printed(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))
    } else {
        Ok(())
    };
    lockstep.step("help", result.map(|()| ((), ()))).map(|_| None)
}

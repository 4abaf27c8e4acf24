//! The program `gradclip-mpi`: runs `gradclip_cli::processes` as the ranks of an MPI job.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use gradclip_cli::processes::{Exit, run};
use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::processes::agree;
use mpi::Threading;
use mpi::traits::Communicator;

/// The variable with the number of seconds that a rank waits for a message of another; without it, for ever.
const TIMEOUT: &str = "GRADCLIP_MPI_TIMEOUT";

/// How long a rank that has failed waits for the others to fail too, before it aborts them.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// The exit code if the program cannot start.
const FAILED: u8 = 1;

/// The exit code of a panic.
const PANICKED: u8 = 101;

fn main() -> ExitCode {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa's device-select layer prints an error to stderr wherever there is no desktop session; this turns it off.
        // SAFETY: No other thread runs yet, so none can read the environment meanwhile.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Serialized) else {
        print_error("error: MPI is initialised already\n");
        return ExitCode::from(FAILED);
    };
    let world = universe.world();
    // The second is for the exit, because the first may be unusable then.
    let groups = timeout().and_then(|timeout| {
        let new = || MpiGroup::new(&world).map_err(|error| error.to_string());
        let group = new()?;
        let group = if let Some(timeout) = timeout { group.with_timeout(timeout) } else { group };
        Ok((group, new()?))
    });
    let (group, exit_group) = match groups {
        Ok((group, exit_group)) => (Arc::new(group), exit_group.with_timeout(EXIT_TIMEOUT)),
        Err(error) => {
            print_error(&format!("error: {error}\n"));
            world.abort(FAILED.into());
        }
    };
    // Ranks that share memory are on one machine.
    let local_rank = u32::try_from(world.split_shared(world.rank()).rank()).unwrap_or_default();
    let exit =
        catch_unwind(AssertUnwindSafe(|| run(group, local_rank, std::env::args_os().skip(1), &mut std::io::stdout())));
    // The panic has printed its message. Other ranks may wait for a message of this one.
    let Ok(Exit { exit_code, message }) = exit else { world.abort(PANICKED.into()) };
    print_error(&message);
    // Finalising MPI waits for every rank, so a rank that failed alone would wait for ever. Usually all ranks have the same
    // failure; then each exits with its exit code.
    if exit_code != 0 && agree(&exit_group, true).is_err() {
        world.abort(exit_code.into());
    }
    ExitCode::from(exit_code)
}

fn timeout() -> Result<Option<Duration>, String> {
    let Some(given) = std::env::var_os(TIMEOUT) else { return Ok(None) };
    let seconds = given.to_str().and_then(|text| text.parse().ok()).filter(|seconds| *seconds > 0.0);
    let timeout = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    timeout.map(Some).ok_or_else(|| format!("{TIMEOUT} is {given:?}; it must be a number of seconds above 0"))
}

/// If stderr is closed, nobody can read the message.
fn print_error(message: &str) {
    let _ = std::io::stderr().write_all(message.as_bytes());
}

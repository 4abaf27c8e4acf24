//! The program `gradclip-mpi`: what `gradclip_cli::processes` does, as the ranks of an MPI job.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use gradclip_cli::processes::{Ended, run};
use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::processes::agree;
use mpi::Threading;
use mpi::traits::Communicator;

/// Seconds that a rank waits for a message of another; for ever without it.
const TIMEOUT: &str = "GRADCLIP_MPI_TIMEOUT";

/// How long a rank that has failed waits for the others to come to the same end, before it ends them.
const PATIENCE: Duration = Duration::from_secs(10);

/// The exit code of what cannot even begin.
const COULD_NOT: u8 = 1;

/// As that of a panic.
const PANICKED: u8 = 101;

fn main() -> ExitCode {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa's device-select layer prints an error to stderr wherever there is no desktop session; this turns it off.
        // SAFETY: No other thread runs yet, so none can read the environment meanwhile.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Serialized) else {
        say("error: MPI is initialised already\n");
        return ExitCode::from(COULD_NOT);
    };
    let world = universe.world();
    // The second is for the end, where the first may be of no use any more.
    let groups = timeout().and_then(|timeout| {
        let new = || MpiGroup::new(&world).map_err(|error| error.to_string());
        let group = new()?;
        let group = if let Some(timeout) = timeout { group.with_timeout(timeout) } else { group };
        Ok((group, new()?))
    });
    let (group, at_end) = match groups {
        Ok((group, at_end)) => (Arc::new(group), at_end.with_timeout(PATIENCE)),
        Err(error) => {
            say(&format!("error: {error}\n"));
            world.abort(COULD_NOT.into());
        }
    };
    let ended = catch_unwind(AssertUnwindSafe(|| run(group, std::env::args_os().skip(1), &mut std::io::stdout())));
    // The panic has told why; the others may wait for what this rank would have said.
    let Ok(Ended { exit_code, message }) = ended else { world.abort(PANICKED.into()) };
    say(&message);
    // Finalising MPI waits for every rank, and one that has failed by itself would wait for ever. Where all have come
    // to the same failure, which is the rule, each ends by itself and with its exit code.
    if exit_code != 0 && agree(&at_end, true).is_err() {
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

/// Nobody is left to tell if stderr is closed.
fn say(message: &str) {
    let _ = std::io::stderr().write_all(message.as_bytes());
}

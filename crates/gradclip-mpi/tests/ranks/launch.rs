//! Starts this program as the ranks of an MPI job.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use gradclip_mpi::mpi::environment;

/// The variable with the cases that a rank runs.
pub(crate) const CASES: &str = "GRADCLIP_TEST_CASES";

/// Longer than any job takes.
const LONGEST: Duration = Duration::from_secs(240);

/// What a job did.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} after {:?}\n{}\n{}", self.status, self.took, self.stdout, self.stderr)
    }
}

/// Whether this program was built for OpenMPI, and not MPICH or one of its descendants.
pub(crate) fn is_openmpi() -> bool {
    environment::library_version().expect("text").starts_with("Open MPI")
}

/// The `mpirun` of the MPI that this program was built for.
fn launcher() -> Command {
    // As root in a container, on fewer cores than there are ranks, where a process may not read another's memory.
    let openmpi = "--oversubscribe --allow-run-as-root --bind-to none --mca btl_vader_single_copy_mechanism none";
    // Debian's names first: the plain ones are of whichever MPI was chosen there.
    let (names, options, package) = if is_openmpi() {
        (["mpirun.openmpi", "mpirun"], openmpi, "openmpi-bin")
    } else {
        (["mpiexec.mpich", "mpiexec"], "", "mpich")
    };
    let is_there = |name: &&str| {
        let asked = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        !matches!(asked, Err(error) if error.kind() == ErrorKind::NotFound)
    };
    let Some(name) = names.into_iter().find(is_there) else {
        panic!("{} is not there: install it (Debian: apt-get install {package})", names[0]);
    };
    let mut command = Command::new(name);
    command.args(options.split_whitespace());
    command
}

/// Starts a program as so many ranks, and waits for their end.
#[track_caller]
pub(crate) fn mpirun_of(ranks: u32, options: &[&str], program: &Path, args: &[&str], cases: &str) -> Run {
    let mut command = launcher();
    command.args(options).args(["-n", &ranks.to_string()]).arg(program).args(args);
    command.env(CASES, cases).env("RUST_BACKTRACE", "0");
    finish(command)
}

/// Starts cases as so many ranks.
#[track_caller]
pub(crate) fn mpirun(ranks: u32, options: &[&str], cases: &str) -> Run {
    mpirun_of(ranks, options, &std::env::current_exe().expect("a path"), RANK, cases)
}

/// Starts a case as a process that no `mpirun` knows of.
#[track_caller]
pub(crate) fn alone(case: &str) -> Run {
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args(RANK).env(CASES, case).env("RUST_BACKTRACE", "0");
    finish(command)
}

/// What makes this program a rank.
const RANK: &[&str] = &["--ignored", "--exact", "rank", "--nocapture"];

/// Waits for the end of a job, which comes.
#[track_caller]
fn finish(mut command: Command) -> Run {
    let begin = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    let status = loop {
        if let Some(status) = child.try_wait().expect("our child") {
            break status;
        }
        if begin.elapsed() > LONGEST {
            child.kill().expect("our child");
            child.wait().expect("our child");
            panic!("no end in {LONGEST:?}: {command:?}");
        }
        thread::sleep(Duration::from_millis(20));
    };
    let text = |from: thread::JoinHandle<_>| from.join().expect("no panic");
    Run { status, stdout: text(stdout), stderr: text(stderr), took: begin.elapsed() }
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("readable");
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

//! Several processes under a real `mpirun`: a transport that loses or mixes messages, ranks that disagree, die or stop.
//!
//! Each test starts this program again, by the `mpirun` of the MPI that it was built for, as so many ranks, each of
//! which goes through the cases of the test and says so.

#[cfg(feature = "gpu")]
mod devices;
mod failures;
mod gradients;
mod launch;
mod norms;
#[cfg(feature = "program")]
mod program;
mod transport;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gradclip_mpi::MpiGroup;
use gradclip_mpi::mpi::{self, Threading, traits::Communicator};

use launch::{CASES, Run, alone, is_openmpi, mpirun, mpirun_of};

/// What each rank does: cases by name, which every rank goes through in the same order.
type Case = fn(&Arc<MpiGroup>);

/// Cases that end well on every rank.
const ALL: &[(&str, Case)] = &[
    ("messages arrive whole and in order", transport::messages_arrive_whole_and_in_order),
    ("groups do not hear each other", transport::groups_do_not_hear_each_other),
    ("messages nobody asked for", transport::messages_nobody_asked_for),
    ("ranks that are not there", transport::ranks_that_are_not_there),
    ("slices clip as the whole", norms::slices_clip_as_the_whole),
    ("ranks without anything", norms::ranks_without_anything),
    ("replicas count once", norms::replicas_count_once),
    ("pieces as they come", norms::pieces_as_they_come),
    ("any number of threads", norms::any_number_of_threads),
    ("many norms are one message", norms::many_norms_are_one_message),
    ("one NaN is known to all", norms::one_nan_is_known_to_all),
    ("only the description must agree", norms::only_the_description_must_agree),
    ("nobody waits for who is done", norms::nobody_waits_for_who_is_done),
    ("another clip", failures::another_clip),
    ("another number of segments", failures::another_number_of_segments),
    ("a rank that fails before it measures", failures::a_rank_that_fails_before_it_measures),
    ("a rank that comes late", failures::a_rank_that_comes_late),
];

/// Cases that need a GPU, which compiles its kernels on every rank.
const ON_GPUS: &[(&str, Case)] = &[
    #[cfg(feature = "gpu")]
    ("host tensors through a GPU and not", devices::host_tensors_through_a_gpu_and_not),
    #[cfg(feature = "gpu")]
    ("plans on a GPU", devices::plans_on_a_gpu),
];

/// Cases that do not.
const BAD: &[(&str, Case)] = &[
    ("a rank that dies", failures::a_rank_that_dies),
    ("a rank that stops", failures::a_rank_that_stops),
    ("a rank that panics", failures::a_rank_that_panics),
];

/// Cases of a process by itself, which initialises MPI in another way.
const ALONE: &[(&str, fn())] = &[
    ("no MPI", failures::no_mpi),
    ("MPI for a single thread", failures::mpi_for_a_single_thread),
    ("MPI for the main thread", failures::mpi_for_the_main_thread),
    ("MPI that was finalised", failures::mpi_that_was_finalised),
];

#[test]
#[ignore = "one rank, as which the other tests start this program"]
fn rank() {
    let chosen = std::env::var(CASES).expect("a test starts this");
    if let Some((_, case)) = ALONE.iter().find(|(name, _)| chosen == *name) {
        case();
        println!("{chosen}: as it should be");
        return;
    }
    let (universe, _) = mpi::initialize_with_threading(Threading::Serialized).expect("the first call of MPI");
    let world = universe.world();
    // Nobody waits for a rank that has failed.
    let done = catch_unwind(AssertUnwindSafe(|| {
        let group = Arc::new(MpiGroup::new(&universe.world()).expect("a group"));
        let sets = [("all", ALL), ("GPUs", ON_GPUS), ("", BAD)];
        let all = sets.iter().flat_map(|(set, cases)| cases.iter().map(move |(name, case)| (*set, *name, case)));
        for (_, name, case) in all.filter(|(set, name, _)| chosen == *set || chosen == *name) {
            case(&group);
            println!("{name}: rank {} of {}: as it should be", world.rank(), world.size());
        }
    }));
    if done.is_err() {
        world.abort(101);
    }
}

#[test]
fn every_case_on_2_ranks() {
    every_case(2, &[], "all", ALL);
}

#[test]
fn every_case_on_3_ranks() {
    every_case(3, &[], "all", ALL);
}

#[test]
fn every_case_on_4_ranks() {
    every_case(4, &[], "all", ALL);
}

#[test]
fn every_case_on_8_ranks() {
    every_case(8, &[], "all", ALL);
}

/// Where one rank cannot read what another holds, it depends on the other's calls of MPI.
#[test]
fn every_case_over_tcp() {
    let options: &[&str] = if is_openmpi() { &["--mca", "btl", "self,tcp"] } else { &[] };
    every_case(3, options, "all", ALL);
}

#[cfg(feature = "gpu")]
#[test]
fn every_case_on_gpus() {
    let run = every_case(3, &[], "GPUs", ON_GPUS);
    // What Khronos's validation layers say, where they are at work.
    assert!(!run.stdout.contains("Validation "), "{run}");
}

#[track_caller]
fn every_case(ranks: u32, options: &[&str], set: &str, cases: &[(&str, Case)]) -> Run {
    let run = mpirun(ranks, options, set);
    assert!(run.status.success(), "{run}");
    for (name, _) in cases {
        for rank in 0..ranks {
            let line = format!("{name}: rank {rank} of {ranks}: as it should be");
            assert!(run.stdout.contains(&line), "{line:?} is missing: {run}");
        }
    }
    run
}

/// What nobody waits longer for.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn a_rank_that_dies_ends_all() {
    let run = mpirun(4, &[], "a rank that dies");
    assert!(!run.status.success() && run.took < SOON, "{run}");
    assert!(!run.stdout.contains("as it should be") && !run.stdout.contains("clipped"), "{run}");
}

#[test]
fn who_survives_a_rank_that_dies_gets_an_error() {
    if !is_openmpi() {
        // The option `-disable-auto-cleanup` of MPICH 4.0 ends `mpiexec` by SIGPIPE, and with it all ranks.
        return a_rank_that_dies_ends_all();
    }
    let run = mpirun(4, &["--enable-recovery"], "a rank that dies");
    assert!(run.took < SOON && !run.stdout.contains("clipped"), "{run}");
    for rank in [0, 2, 3] {
        assert!(run.stdout.contains(&format!("rank {rank} ends untouched: ")), "{run}");
    }
}

#[test]
fn a_rank_that_stops_ends_all() {
    let run = mpirun(3, &[], "a rank that stops");
    assert!(!run.status.success() && run.took < SOON, "{run}");
    assert!(run.stdout.contains("ends untouched: ") && !run.stdout.contains("clipped"), "{run}");
}

#[test]
fn a_rank_that_panics_ends_all() {
    let run = mpirun(3, &[], "a rank that panics");
    assert!(!run.status.success() && run.took < SOON, "{run}");
    assert!(run.stderr.contains("as asked for") && !run.stdout.contains("clipped"), "{run}");
}

/// They check by themselves what they come to.
#[test]
fn examples_come_to_what_one_process_does() {
    let built = std::env::current_exe().expect("a path");
    let folder = built.parent().and_then(Path::parent).expect("target").join("examples");
    for name in ["data_parallel", "fully_sharded"] {
        let program = folder.join(name);
        assert!(program.exists(), "{} is not there: cargo build -p gradclip-mpi --examples", program.display());
        let run = mpirun_of(3, &[], &program, &[], "");
        assert!(run.status.success() && run.stdout.contains("3 ranks: "), "{run}");
    }
}

#[test]
fn mpi_is_not_called_where_it_may_not_be() {
    for (name, _) in ALONE {
        let run = alone(name);
        assert!(run.status.success() && run.stdout.contains(&format!("{name}: as it should be")), "{run}");
    }
}

//! Ranks that are not called alike, and ranks that do not answer.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::processes::ProcessGroup;
use gradclip_mpi::gradclip::{Clip, ClipReport, Clipper, Dtype, Error, Scope, UnitAxis};
use gradclip_mpi::mpi::topology::SimpleCommunicator;
use gradclip_mpi::mpi::traits::Communicator;
use gradclip_mpi::mpi::{self, Threading};
use nix::sys::signal::{Signal, raise};

use crate::gradients::{Gradient, model, slices, views_mut};
use crate::norms::same_on_all;
use crate::transport::barrier;

fn norm() -> Clip {
    Clip::norm(0.1)
}

/// Clips, and finds what was refused untouched.
fn clip(group: &Arc<MpiGroup>, clip: &Clip, gradients: &[Gradient]) -> Result<ClipReport, Error> {
    let mut mine = gradients.to_vec();
    let within = Clipper::cpu().processes(Arc::clone(group) as Arc<dyn ProcessGroup>);
    let result = within.apply(clip, &mut views_mut(&mut mine));
    assert!(result.is_ok() || mine == gradients, "an error leaves every bit");
    result
}

/// A clip that all want, after which the group is as good as new.
#[track_caller]
fn goes_on(group: &Arc<MpiGroup>) {
    let report = clip(group, &norm(), &slices(&model(), group.rank(), group.size())).expect("the others answer");
    assert!(report.clipped);
    same_on_all(group, report.total_norm.to_bits());
}

pub(crate) fn another_clip(group: &Arc<MpiGroup>) {
    let mine = slices(&model(), group.rank(), group.size());
    for odd in [0, group.size() - 1] {
        for other in [Clip::norm(0.2), Clip::rms(0.1), norm().eps(0.0), norm().grad_scale(2.0)] {
            let wanted = if group.rank() == odd { other } else { norm() };
            let error = clip(group, &wanted, &mine).expect_err("ranks disagree");
            let Error::Disagreement { rank, reason } = &error else { panic!("{error:?}") };
            assert!(reason.contains("another clip"), "{error}");
            same_on_all(group, u64::from(*rank));
        }
    }
    goes_on(group);
}

pub(crate) fn another_number_of_segments(group: &Arc<MpiGroup>) {
    let per_tensor = norm().scope(Scope::Tensor);
    let mut mine = slices(&model(), group.rank(), group.size());
    if group.rank() == group.size() / 2 {
        mine.pop();
    }
    let error = clip(group, &per_tensor, &mine).expect_err("ranks disagree");
    assert!(matches!(&error, Error::Disagreement { reason, .. } if reason.contains("segments")), "{error:?}");
    // As many segments, of other tensors.
    let shape = if group.rank() == 0 { [8, 1] } else { [4, 2] };
    let units = vec![
        Gradient::random("a", Dtype::F32, &shape, 1.0, 1),
        Gradient::random("b", Dtype::F32, &[12 - shape[0], 1], 1.0, 2),
    ];
    let per_unit = norm().scope(Scope::Unit).unit_axis(UnitAxis::First);
    let error = clip(group, &per_unit, &units).expect_err("ranks disagree");
    assert!(matches!(error, Error::Disagreement { .. }), "{error:?}");
    goes_on(group);
}

pub(crate) fn a_rank_that_fails_before_it_measures(group: &Arc<MpiGroup>) {
    let (rank, bad_rank) = (group.rank(), group.size() - 1);
    // It has no parameters, by which it was to clip.
    let wanted = if rank == bad_rank { Clip::agc(0.01) } else { norm() };
    let error = clip(group, &wanted, &slices(&model(), rank, group.size())).expect_err("one has failed");
    match error {
        Error::PeerFailed { rank: reported } => assert!(rank != bad_rank && reported == bad_rank),
        own => assert_eq!(rank, bad_rank, "{own:?}"),
    }
    goes_on(group);
}

pub(crate) fn a_rank_that_comes_late(group: &Arc<MpiGroup>) {
    const TIMEOUT: Duration = Duration::from_millis(300);
    let hasty = Arc::new(MpiGroup::new(&SimpleCommunicator::world()).expect("a group").with_timeout(TIMEOUT));
    let mine = slices(&model(), hasty.rank(), hasty.size());
    let late = hasty.size() - 1;
    if hasty.rank() == late {
        // Until all others have given up.
        barrier();
        // The others sent their partials before they gave up: it may clip as they would have, or learn that one has failed.
        match clip(&hasty, &norm(), &mine) {
            Ok(report) => assert!(report.clipped, "{report:?}"),
            Err(error) => assert!(matches!(error, Error::PeerFailed { .. } | Error::ProcessGroup(_)), "{error:?}"),
        }
    } else {
        let begin = Instant::now();
        let error = clip(&hasty, &norm(), &mine).expect_err("one is late");
        assert!(matches!(error, Error::PeerFailed { .. } | Error::ProcessGroup(_)), "{error:?}");
        assert!(begin.elapsed() < 100 * TIMEOUT, "{:?}", begin.elapsed());
        barrier();
    }
    barrier();
    // On all ranks as many calls were made, so that the next is everybody's next.
    let patient = Arc::new(Arc::into_inner(hasty).expect("nobody else's").with_timeout(100 * TIMEOUT));
    goes_on(&patient);
    goes_on(group);
}

/// Clips among ranks of which one does something else; prints the result, and ends all.
fn clip_without_rank_1(instead: impl FnOnce()) -> ! {
    let world = SimpleCommunicator::world();
    let group = Arc::new(MpiGroup::new(&world).expect("a group").with_timeout(Duration::from_secs(2)));
    let mine = slices(&model(), group.rank(), group.size());
    goes_on(&group);
    barrier();
    if group.rank() == 1 {
        // The others are in the middle of it.
        thread::sleep(Duration::from_millis(500));
        instead();
    }
    match clip(&group, &norm(), &mine) {
        Ok(report) => println!("rank {} clipped: {report:?}", group.rank()),
        Err(error) => println!("rank {} ends untouched: {error}", group.rank()),
    }
    // Time for the others to print too.
    thread::sleep(Duration::from_secs(3));
    world.abort(1);
}

pub(crate) fn a_rank_that_dies(_: &Arc<MpiGroup>) {
    clip_without_rank_1(|| raise(Signal::SIGKILL).expect("our own process"));
}

pub(crate) fn a_rank_that_stops(_: &Arc<MpiGroup>) {
    clip_without_rank_1(|| raise(Signal::SIGSTOP).expect("our own process"));
}

pub(crate) fn a_rank_that_panics(group: &Arc<MpiGroup>) {
    barrier();
    assert!(group.rank() != 1, "as asked for");
    // Without a timeout: nothing but its end ends this.
    let result = clip(group, &norm(), &slices(&model(), group.rank(), group.size()));
    println!("rank {} clipped: {result:?}", group.rank());
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, says: &str) {
    match result {
        Err(Error::ProcessGroup(why)) => assert!(why.contains(says), "{why}"),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it is accepted"),
    }
}

pub(crate) fn no_mpi() {
    refused(MpiGroup::new(&SimpleCommunicator::world()), "not initialised");
}

pub(crate) fn mpi_for_a_single_thread() {
    let universe = mpi::initialize().expect("the first call of MPI");
    refused(MpiGroup::new(&universe.world()), "Threading::Serialized");
}

pub(crate) fn mpi_for_the_main_thread() {
    let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).expect("the first call of MPI");
    let group = Arc::new(MpiGroup::new(&universe.world()).expect("the main thread"));
    goes_on_alone(&group);
    thread::scope(|scope| {
        let elsewhere = scope.spawn(|| refused(group.send(0, b""), "another"));
        elsewhere.join().expect("refused");
        // Nothing of MPI's is given back there.
        let group = MpiGroup::new(&universe.world()).expect("the main thread");
        scope.spawn(move || drop(group)).join().expect("no call of MPI");
    });
    goes_on_alone(&group);
}

pub(crate) fn mpi_that_was_finalised() {
    let (universe, _) = mpi::initialize_with_threading(Threading::Serialized).expect("the first call of MPI");
    let group = Arc::new(MpiGroup::new(&universe.world()).expect("MPI is there"));
    goes_on_alone(&group);
    // To itself, and never asked for.
    group.send(0, &[7; 1 << 20]).expect("MPI works");
    drop(universe);
    refused(group.send(0, b""), "finalised");
    refused(group.try_receive(0), "finalised");
    drop(group);
}

fn goes_on_alone(group: &Arc<MpiGroup>) {
    assert!(clip(group, &norm(), &model()).expect("there is nobody else").clipped);
}

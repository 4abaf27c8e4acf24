//! What a step costs as ranks are added: messages and bytes of each rank, the time of a merge, and the norm of as many
//! gradients on each (weak scaling).
//!
//! `cargo bench -p gradclip-mpi --bench scale` starts itself by `mpirun` with 1 to 16 ranks, and prints a row for each.
//! Times are medians, of the slowest rank in each round; all ranks begin a round together.

#[path = "../tests/ranks/launch.rs"]
#[allow(dead_code, reason = "the tests start more than this does")]
mod launch;

use std::sync::Arc;
use std::time::Instant;

use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::{Clip, Clipper, Error, NormAccumulator, Scope, Tensor};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::traits::{Communicator, CommunicatorCollectives};

/// 16 MiB.
const ELEMENTS: usize = 4 << 20;
const SEGMENTS: usize = 1000;
const RANK: &str = "--one-rank";

fn main() {
    if std::env::args().any(|argument| argument == RANK) {
        rank().expect("the others answer");
        return;
    }
    println!(
        "| ranks | messages | bytes, 1 segment | bytes, 1,000 | merge of 1, µs | of 1,000, µs | norm of 16 MiB, ms |"
    );
    println!("|---|---|---|---|---|---|---|");
    for ranks in [1, 2, 3, 4, 5, 8, 12, 16] {
        let program = std::env::current_exe().expect("a path");
        let run = launch::mpirun_of(ranks, &[], &program, &[RANK], "");
        assert!(run.status.success(), "{run}");
        print!("{}", run.stdout);
    }
}

/// Rounds that all ranks begin together: the median over them of the slowest rank's time, in microseconds.
fn median(
    world: &impl CommunicatorCollectives,
    rounds: usize,
    mut f: impl FnMut() -> Result<(), Error>,
) -> Result<f64, Error> {
    let mut all = Vec::new();
    for _ in 0..rounds + 3 {
        world.barrier();
        let begin = Instant::now();
        f()?;
        let (mine, mut slowest) = (begin.elapsed().as_secs_f64() * 1e6, 0.0);
        world.all_reduce_into(&mine, &mut slowest, SystemOperation::max());
        all.push(slowest);
    }
    // The first few warm up.
    let mut all = all.split_off(3);
    all.sort_unstable_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

fn rank() -> Result<(), Error> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Serialized).expect("the first call of MPI");
    let world = universe.world();
    let group = Arc::new(MpiGroup::new(&world)?);
    let clipper = Clipper::cpu().processes(Arc::clone(&group) as _);
    let clip = Clip::norm(1.0);
    // The machine is shared by the ranks.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");

    let merge = || NormAccumulator::new(&clip)?.merge_across(&*group).wait();
    let each = [1.0f32; SEGMENTS];
    let tensors: Vec<_> = each.iter().map(|x| Tensor::new(std::slice::from_ref(x))).collect();
    let per_tensor = clip.scope(Scope::Tensor);
    let merge_many = || clipper.measure(&per_tensor, &tensors).map(drop);
    let large: Vec<f32> = (0..ELEMENTS).map(|i| (i % 1000) as f32 - 500.0).collect();
    let norm = || pool.install(|| clipper.measure(&clip, &[Tensor::new(&large)])).map(drop);

    // Of the rank that sends the most.
    let sent_by = |f: &dyn Fn() -> Result<(), Error>| {
        let before = group.sent();
        f()?;
        let mine = [group.sent().messages - before.messages, group.sent().bytes - before.bytes];
        let mut most = [0u64; 2];
        world.all_reduce_into(&mine, &mut most, SystemOperation::max());
        Ok::<_, Error>(most)
    };
    let ([messages, bytes], [_, bytes_of_many]) = (sent_by(&merge)?, sent_by(&merge_many)?);
    let (one, many) = (median(&world, 200, merge)?, median(&world, 100, merge_many)?);
    let weak = median(&world, 20, norm)? / 1e3;
    if world.rank() == 0 {
        let ranks = world.size();
        println!("| {ranks} | {messages} | {bytes} | {bytes_of_many} | {one:.1} | {many:.0} | {weak:.2} |");
    }
    Ok(())
}

//! Data-parallel training: every rank has the whole model and a share of the samples, and the gradients are
//! all-reduced.
//!
//! After that they are the same on every rank, bit for bit. So each clips for itself, without a group and without a
//! message, and all come to the same norm. Two ways to get this wrong: clipping before the all-reduce, by the norm of
//! one's own samples alone, which is another on each rank; and clipping within a group, which would count every
//! gradient as often as there are ranks.
//!
//!     cargo build --release -p gradclip-mpi --example data_parallel
//!     mpirun -n 4 target/release/examples/data_parallel

mod regression;

use std::error::Error;

use gradclip_mpi::gradclip::{Clip, Clipper, TensorMut};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::traits::{Communicator, CommunicatorCollectives};
use regression::{BATCH, MAX_NORM, STEPS, WEIGHTS, by_one_process, check, descend, gradient, slice_range};

fn main() -> Result<(), Box<dyn Error>> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Serialized).ok_or("MPI is initialised already")?;
    let world = universe.world();
    let (rank, ranks) = (world.rank() as usize, world.size() as usize);
    let clip = Clip::norm(MAX_NORM);
    let mut params = vec![0.0f32; WEIGHTS + 1];
    let mut norms = Vec::new();
    for step in 0..STEPS {
        let (mine, my_loss) = gradient(step, slice_range(BATCH, rank, ranks), &params);

        let (mut reduced, mut loss) = (vec![0.0f32; mine.len()], 0.0f32);
        world.all_reduce_into(&mine[..], &mut reduced[..], SystemOperation::sum());
        world.all_reduce_into(&my_loss, &mut loss, SystemOperation::sum());
        let report = Clipper::auto().apply(&clip, &mut [TensorMut::new(&mut reduced)])?;

        descend(&mut params, &reduced);
        norms.push(report.total_norm);
        if rank == 0 {
            println!("step {step:2}: loss {loss:9.2}, norm {:8.3}, 0 bytes in 0 messages for it", report.total_norm);
        }
    }
    same_on_all(&world, norms.iter().map(|norm| norm.to_bits()))?;
    same_on_all(&world, params.iter().map(|p| u64::from(p.to_bits())))?;
    let (norms_of_one, params_of_one) = by_one_process()?;
    check((&norms, &norms_of_one), (&params, &params_of_one))?;
    if rank == 0 {
        println!("{ranks} ranks: norms and parameters are the same bits on all, and those of one process");
    }
    Ok(())
}

/// An error if one rank has other numbers than rank 0.
fn same_on_all(world: &impl CommunicatorCollectives, mine: impl Iterator<Item = u64>) -> Result<(), String> {
    let mine: Vec<_> = mine.collect();
    let mut all = vec![0u64; mine.len() * world.size() as usize];
    world.all_gather_into(&mine[..], &mut all[..]);
    let odd = all.chunks(mine.len()).position(|of_rank| of_rank != &all[..mine.len()]);
    odd.map_or(Ok(()), |rank| Err(format!("rank {rank} has come to something else than rank 0")))
}

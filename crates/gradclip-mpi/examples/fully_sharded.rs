//! Fully sharded training: every rank holds a slice of the weights, of their gradient and of the optimizer's state, and
//! all hold the bias.
//!
//! No rank sees the whole gradient, so they clip within a group: the norm is that of all slices. The bias is the same
//! on all, and counts on the first alone; all scale it. Without that its share of the norm would grow with the number
//! of ranks.
//!
//!     cargo build --release -p gradclip-mpi --example fully_sharded
//!     mpirun -n 4 target/release/examples/fully_sharded

mod regression;

use std::error::Error;
use std::sync::Arc;

use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::processes::{ProcessGroup, check_replicas};
use gradclip_mpi::gradclip::{Clip, Clipper, Tensor, TensorMut};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::traits::{Communicator, CommunicatorCollectives};
use regression::{BATCH, MAX_NORM, STEPS, WEIGHTS, by_one_process, check, descend, gradient, slice_range};

fn main() -> Result<(), Box<dyn Error>> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Serialized).ok_or("MPI is initialised already")?;
    let world = universe.world();
    let (rank, ranks) = (world.rank() as usize, world.size() as usize);
    let group = Arc::new(MpiGroup::new(&world)?);
    let clipper = Clipper::auto().processes(Arc::clone(&group) as Arc<dyn ProcessGroup>);
    let clip = Clip::norm(MAX_NORM);

    let slice = slice_range(WEIGHTS, rank, ranks);
    let (mut weights, mut bias) = (vec![0.0f32; slice.len()], [0.0f32]);
    let name = format!("weights, slice {rank}");
    // Once, while the code is new: it sends every name.
    let tensors = [Tensor::new(&weights).named(&name), Tensor::new(&bias).named("bias").replica(rank != 0)];
    check_replicas(&*group, &tensors)?;

    let mut norms = Vec::new();
    for step in 0..STEPS {
        let params = gathered(&world, &weights, slice.start, bias[0]);
        let (mine, my_loss) = gradient(step, slice_range(BATCH, rank, ranks), &params);
        let (mut reduced, mut loss) = (vec![0.0f32; mine.len()], 0.0f32);
        world.all_reduce_into(&mine[..], &mut reduced[..], SystemOperation::sum());
        world.all_reduce_into(&my_loss, &mut loss, SystemOperation::sum());
        // Of the reduced gradient a rank keeps its slice; a reduce-scatter would give it no more.
        let (mut of_weights, mut of_bias) = (reduced[slice.clone()].to_vec(), [reduced[WEIGHTS]]);

        let before = group.sent();
        let mut grads = [
            TensorMut::new(&mut of_weights).named(&name),
            TensorMut::new(&mut of_bias).named("bias").replica(rank != 0),
        ];
        let report = clipper.apply(&clip, &mut grads)?;
        let sent = group.sent();

        descend(&mut weights, &of_weights);
        descend(&mut bias, &of_bias);
        norms.push(report.total_norm);
        if rank == 0 {
            let (bytes, messages) = (sent.bytes - before.bytes, sent.messages - before.messages);
            println!(
                "step {step:2}: loss {loss:9.2}, norm {:8.3}, {bytes} bytes in {messages} messages for it",
                report.total_norm
            );
        }
    }
    let params = gathered(&world, &weights, slice.start, bias[0]);
    let (norms_of_one, params_of_one) = by_one_process()?;
    check((&norms, &norms_of_one), (&params, &params_of_one))?;
    if rank == 0 {
        println!("{ranks} ranks: norms and parameters are those of one process");
    }
    Ok(())
}

/// All weights, and the bias behind them.
fn gathered(world: &impl CommunicatorCollectives, weights: &[f32], begin: usize, bias: f32) -> Vec<f32> {
    let (mut mine, mut all) = (vec![0.0f32; WEIGHTS + 1], vec![0.0f32; WEIGHTS + 1]);
    mine[begin..begin + weights.len()].copy_from_slice(weights);
    world.all_reduce_into(&mine[..], &mut all[..], SystemOperation::sum());
    all[WEIGHTS] = bias;
    all
}

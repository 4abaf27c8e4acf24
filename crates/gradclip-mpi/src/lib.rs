//! Gradient clipping over the ranks of an MPI job: [`MpiGroup`] makes an MPI communicator the
//! [`ProcessGroup`](gradclip::processes::ProcessGroup) that [`gradclip`] clips within.
//!
//! ```no_run
//! use std::sync::Arc;
//! use gradclip_mpi::{MpiGroup, gradclip::{Clip, Clipper, TensorMut}, mpi};
//!
//! let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Serialized).ok_or("initialised already")?;
//! let group = Arc::new(MpiGroup::new(&universe.world())?);
//! let clipper = Clipper::auto().processes(group);
//! // Each step: this rank's slice.
//! let mut slice = vec![0.1f32; 1 << 20];
//! let report = clipper.apply(&Clip::norm(1.0), &mut [TensorMut::new(&mut slice)])?;
//! println!("norm of all slices: {}", report.total_norm);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`gradclip::processes`] says what all ranks must call, what they send each other, and what is measured once.
#![cfg_attr(
    feature = "gpu",
    doc = "On a GPU, [`GpuPlan::merge_across`](gradclip::gpu::GpuPlan::merge_across) stands between measuring and scaling."
)]
//!
//! # Which norm to use where
//!
//! The norm that a step is clipped by should be that of the gradient that one process would have, of the whole batch
//! and the whole model. What a rank holds of it decides what it must do. Let d be the ranks that see different samples,
//! and s those that hold different parts of the model; a group is made of those ranks whose gradients make up one
//! model, s of them, each element once.
//!
//! | training | a rank holds, when it clips | group | what counts |
//! |---|---|---|---|
//! | data-parallel | the whole gradient, all-reduced, the same bits everywhere | none: each computes the norm for itself, without a message | everything |
//! | fully sharded (ZeRO 2 and 3, FSDP) | its slice of each gradient, reduced over all samples | all ranks that share one copy of the model | slices on all; what is held whole, on one |
//! | the same, and replicated (HSDP) | its slice, the same on every replica | the ranks of one replica, by a split of the world; or the world, with the slices of one replica counted | the slices of one replica |
//! | pipelined | the whole gradient of its layers | all stages of one pipeline | everything; tied embeddings, which the first and the last stage hold, on one of them |
//! | tensor-parallel | slices of matrices, and whole layer norms and biases | the ranks that share each layer | slices on all; layer norms and biases on one |
//! | mixture of experts | its experts' gradients, and whole the others' | all ranks that hold different experts | experts on all (where an expert has replicas, on one); the others on one |
//! | several of these at once | parts of parts | all ranks of one copy of the model: the product of the sharded, pipelined and tensor-parallel ones | each element on one rank |
//!
//! A replica ([`replica(true)`](gradclip::TensorMut::replica)) is scaled all the same, by the
//! coefficient of its replicas. [`check_replicas`](gradclip::processes::check_replicas) finds what counts twice
//! or never: call it once, with names, before the first step. A group over a part of the ranks comes from a split
//! communicator: `MpiGroup::new(&world.split_by_color(..)?)`.
//!
//! Norms per tensor ([`Scope::Tensor`](gradclip::Scope::Tensor)) and per unit are those of all slices too: every rank
//! gives as many tensors, in the same order, each with its slice. They are one message, however many.
//!
//! # What goes wrong in the field
//!
//! - **Local norms only.** Each rank clips by the norm of what it holds: PyTorch's `clip_grad_norm_` on a shard's plain
//!   tensors does. With s shards of about the same size, each norm is too small by a factor of about √s, so little is
//!   clipped, and what is clipped is clipped by a coefficient of its own on each rank: replicas drift apart, and the
//!   direction of the gradient changes. Here: clip [within](gradclip::Clipper::processes) the group.
//! - **Clipped before the all-reduce.** The mean of gradients that were clipped each for itself is not the clipped
//!   mean; a rank whose samples are harmless is scaled differently from one whose are not. Reduce first, then clip.
//! - **Replicas counted twice.** The squares of layer norms, biases and tied embeddings go into the sum once for each
//!   rank that holds them: the norm is too large, by up to √s, and grows with the number of ranks, so that the same run
//!   clips more on more machines. Here: `replica(true)` on all but one, and `check_replicas`.
//! - **Norms that are added, averaged or maximised.** Norms do not add; their p-th powers do. Here partials merge, of
//!   any norm type.
//! - **Sums all-reduced in bfloat16.** With 8 significant bits every addition is off by up to 0.2%, and what is less
//!   than a 512th of the sum is lost; squares of gradients below 1e-20 are 0, and those above 2e19 infinite. In float16
//!   a gradient of 256 is enough for infinity, and one below 1.7e-4 counts as nothing. Here sums travel as float64 with
//!   an exponent of their own, so a merge neither overflows nor underflows, and rounds to 53 bits.
//! - **A sum whose order depends on arrival.** An all-reduce may add in another order in another run, or on another
//!   number of nodes; a norm next to its threshold is then clipped in one run and not in the other. Here the tree is
//!   fixed by the number of ranks. Another number of ranks is another order, and may change the last bits; with
//!   half-precision gradients also where a tensor is cut, as four of their squares are added in float32 (2^-24 of the
//!   norm at most).
//! - **A NaN that one rank sees.** That rank skips the step and the others do not, or they wait for it for ever. Here all ranks
//!   decide the same, by the policy of the [`Clip`](gradclip::Clip), and all know rank, tensor and index.
//! - **A group of the wrong ranks.** The world, where the data-parallel ranks hold the same gradients: the norm is too
//!   large by √d.
//!
//! # What ranks wait for
//!
//! A call returns when all ranks of the group have called it. Most `mpirun` end every rank as soon as one dies, but none when one
//! merely stops; with [`MpiGroup::with_timeout`] the call then returns an error. After such an error ranks do not know what
//! others have done: a late rank may have clipped, by the partials that it received before the others gave up. End the job
//! (`communicator.abort(1)`) and resume from a checkpoint. The same holds if the device of a rank fails after the rank has sent
//! its partials. Any earlier error reaches every rank. Then no rank has written, and the group can still be used.
//!
//! # Building
//!
//! Install an MPI and libclang: on Debian `libopenmpi-dev openmpi-bin libclang-dev`, or `libmpich-dev mpich libclang-dev`. If one
//! is missing, the build of the crate `mpi-sys` prints "This library checks multiple methods to find an MPI library on your
//! system" or "Unable to find libclang". If several MPIs are installed, the variable `MPICC` chooses one at build time, and its
//! `mpirun` must start the program. OpenMPI 4.1 and MPICH 4.0 are tested.
#![deny(unsafe_op_in_unsafe_fn)]

mod calls;
mod group;

pub use gradclip;
pub use group::{MpiGroup, Sent};
pub use mpi;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

//! Processes that clip together: the global norm of gradients that are spread over many.
//!
//! ```text
//! each rank: measure what it holds       one partial for each segment, as without a group
//! exchange                               partials of all ranks merged, in one order             exchange.rs
//! each rank: decide, apply               from the same partials, so with the same coefficients
//! ```
//!
//! [`Clipper::processes`](crate::Clipper::processes), [`NormAccumulator::merge_across`](crate::NormAccumulator::merge_across) and,
#![cfg_attr(
    feature = "gpu",
    doc = "on the device, [`GpuPlan::merge_across`](crate::gpu::GpuPlan::merge_across) and [`GpuNormAccumulator::merge_across`](crate::gpu::GpuNormAccumulator::merge_across)"
)]
#![cfg_attr(not(feature = "gpu"), doc = "with the feature `gpu`, plans on the device")]
//! take a [`ProcessGroup`]. The crate `gradclip-mpi` makes one of an MPI communicator; [`thread_group`] one of threads.
//!
//! ```
//! use gradclip::{Clip, Clipper, TensorMut, processes::thread_group};
//! // Two ranks, here threads, that hold a half of the gradient each.
//! let ranks = thread_group(2, None).into_iter().zip([3.0f32, 4.0]).map(|(group, half)| {
//!     std::thread::spawn(move || {
//!         let mut mine = [half];
//!         let clipper = Clipper::cpu().processes(group);
//!         let report = clipper.apply(&Clip::norm(1.0), &mut [TensorMut::new(&mut mine)])?;
//!         Ok::<_, gradclip::Error>((report.total_norm, mine[0]))
//!     })
//! });
//! let of: Vec<_> = ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().expect("no panic")).collect();
//! let [Ok((5.0, first)), Ok((5.0, second))] = of[..] else { panic!("{of:?}") };
//! assert!((first - 0.6).abs() < 1e-6 && (second - 0.8).abs() < 1e-6);
//! ```
//!
//! # What is called together
//!
//! Every rank of a group must make the same calls in the same order, with the same [`Clip`](crate::Clip) and the same
//! segments: under [`Scope::Global`](crate::Scope::Global) whatever tensors it holds, be it none; under any other scope as
//! many tensors, with as many units or examples, of which it holds a slice each. Where they differ, or one of them fails
//! before it has measured, each gets an error, and no gradient is touched. What a rank does wrong alone (it stops, or never
//! calls) the others find out by [`ProcessGroup::timeout`].
//!
//! Two things nobody compares. Calls that look alike are taken for the same: a rank that leaves out one of many equal steps
//! is in the others' next one from then on, until it has one call too few. And adaptive thresholds must begin with the same state
//! on each rank; from the same norms they then go on alike.
//!
//! # Which tensors count
//!
//! A slice that no other rank holds counts, as every tensor does. Of a tensor that several ranks hold whole (a replica, a tied
//! embedding, a bias beside sharded weights), one counts and the others say `replica(true)`
//! ([`Tensor::replica`](crate::Tensor::replica)): they are scaled and not measured. [`check_replicas`] finds out
//! whether a tensor is counted twice or never.
//!
//! Data-parallel ranks hold the same gradients once these are all-reduced. Each then computes the norm for itself, without
//! a group: the same one, because the same bits give the same norm.

#[cfg(not(target_arch = "wasm32"))]
mod agree;
mod exchange;
mod group;
mod rows;
mod threads;

#[cfg(not(target_arch = "wasm32"))]
pub use agree::{agree, check_replicas};
pub(crate) use exchange::GroupCall;
pub use group::ProcessGroup;
pub(crate) use rows::{GroupPartials, GroupTotal, merge};
pub(crate) use threads::single_process;
pub use threads::thread_group;

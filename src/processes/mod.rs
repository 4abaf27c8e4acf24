//! Processes that clip together: the global norm of gradients that are spread over many processes.
//!
//! ```text
//! each rank: measure what it holds       one partial for each segment, as without a group
//! exchange                               partials of all ranks merged, in one order             exchange.rs
//! each rank: decide, apply               from the same partials, so with the same coefficients
//! ```
//!
//! [`Clipper::processes`](crate::Clipper::processes),
//! [`NormAccumulator::merge_across`](crate::NormAccumulator::merge_across) and,
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
//! segments. Under [`Scope::Global`](crate::Scope::Global) it may hold any tensors, or none. Under any other scope all
//! ranks hold the same number of tensors, with the same number of units or examples, and each rank holds a slice of
//! each. If ranks differ, or one fails before it has measured, every rank gets an error and no gradient is changed. If
//! a rank stops or never calls, the others notice by [`ProcessGroup::timeout`].
//!
//! Two errors go unnoticed:
//!
//! - Calls that look alike count as the same call. A rank that skips one of many equal steps takes part in the others'
//!   next step from then on, until it has one call too few.
//! - Adaptive thresholds must begin with the same state on each rank. From the same norms they then stay the same.
//!
//! # Which tensors count
//!
//! A slice that no other rank holds counts, like every tensor. If several ranks hold a whole tensor (a replica, a tied
//! embedding, a bias beside sharded weights), it counts on one of them. The others call `replica(true)`
//! ([`Tensor::replica`](crate::Tensor::replica)), so there it is scaled and not measured. [`check_replicas`] finds
//! tensors that count twice or never.
//!
//! Data-parallel ranks hold the same gradients after an all-reduce. Each rank then computes the norm without a group.
//! The norms are equal, because the same bits give the same norm.

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
pub(crate) use rows::{GroupPartials, GroupTotal, join, merge, split};
pub(crate) use threads::single_process;
pub use threads::thread_group;

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
//! take a [`ProcessGroup`]. The crate `gradclip-mpi` makes one of an MPI communicator; [`ThreadGroup`] one of threads.
//!
//! ```
//! use std::sync::Arc;
//! use gradclip::{Clip, Clipper, TensorMut, processes::ThreadGroup};
//! // Two ranks, here threads, that hold a half of the gradient each.
//! let ranks = ThreadGroup::new(2).into_iter().zip([3.0f32, 4.0]).map(|(group, half)| {
//!     std::thread::spawn(move || {
//!         let mut mine = [half];
//!         let clipper = Clipper::cpu().processes(Arc::new(group));
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
mod rows;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Error;
#[cfg(not(target_arch = "wasm32"))]
pub use agree::{agree, check_replicas};
pub(crate) use exchange::Turn;
pub(crate) use rows::{Part, Total, merge};

/// Processes, called ranks and numbered from 0, that send each other messages.
///
/// All that is asked of a transport. What the messages are, who sends one to whom, and in which order they merge, is the
/// library's: each rank exchanges about log2(size) messages in a call, of 64 bytes and 64 more for each segment.
pub trait ProcessGroup: std::fmt::Debug + Send + Sync {
    /// Which of them this is.
    fn rank(&self) -> u32;

    /// How many there are; more than [`ProcessGroup::rank`].
    fn size(&self) -> u32;

    /// Sends a message and returns, whether or not the other has asked for it. Messages from one rank to another arrive whole,
    /// once, and in the order in which they were sent.
    ///
    /// # Errors
    /// [`Error::ProcessGroup`] if it cannot be sent.
    fn send(&self, to: u32, message: &[u8]) -> Result<(), Error>;

    /// The next message from a rank, if it has come. Returns at once.
    ///
    /// # Errors
    /// [`Error::ProcessGroup`] if none can come any more.
    fn try_receive(&self, from: u32) -> Result<Option<Vec<u8>>, Error>;

    /// Whether all that was sent has left, and arrives whatever this process does next. A transport that moves messages only
    /// while it is called says `false` until then, and is asked again; others leave this out. Returns at once.
    ///
    /// # Errors
    /// [`Error::ProcessGroup`] if it cannot be sent.
    fn is_sent(&self) -> Result<bool, Error> {
        Ok(true)
    }

    /// A counter of this group, 0 at first, for the library to number its calls by.
    fn calls(&self) -> &AtomicU64;

    /// How long a call waits for the messages of others before it ends in an error; None, the default, for ever.
    ///
    /// After such an error ranks no longer know what others have done: one that came late may have clipped, by what the others
    /// had told it before they gave up. End the job, and go on from a checkpoint.
    fn timeout(&self) -> Option<Duration> {
        None
    }
}

/// The one rank of a group of one: what a clip is decided within unless there is another group.
#[derive(Debug, Default)]
pub(crate) struct SingleProcess {
    calls: AtomicU64,
}

impl ProcessGroup for SingleProcess {
    fn rank(&self) -> u32 {
        0
    }

    fn size(&self) -> u32 {
        1
    }

    fn send(&self, to: u32, _: &[u8]) -> Result<(), Error> {
        Err(Error::ProcessGroup(format!("there is no rank {to}, only this one")))
    }

    fn try_receive(&self, from: u32) -> Result<Option<Vec<u8>>, Error> {
        Err(Error::ProcessGroup(format!("there is no rank {from}, only this one")))
    }

    fn calls(&self) -> &AtomicU64 {
        &self.calls
    }
}

/// A rank whose peers are threads of the same process: one for each of several devices, say.
#[derive(Debug)]
pub struct ThreadGroup {
    rank: u32,
    size: u32,
    timeout: Option<Duration>,
    calls: AtomicU64,
    post: Arc<Mutex<Post>>,
}

/// What is on its way between threads.
#[derive(Debug, Default)]
struct Post {
    /// By sender and receiver.
    letters: HashMap<(u32, u32), VecDeque<Vec<u8>>>,
    /// Which ranks are gone.
    gone: HashSet<u32>,
}

impl ThreadGroup {
    /// The ranks of a group, in order, each to be moved to its thread.
    #[must_use]
    pub fn new(size: u32) -> Vec<Self> {
        let post = Arc::new(Mutex::default());
        let of = |rank| Self { rank, size, timeout: None, calls: AtomicU64::new(0), post: Arc::clone(&post) };
        (0..size).map(of).collect()
    }

    /// Sets [`ProcessGroup::timeout`] of this rank.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    fn post(&self) -> MutexGuard<'_, Post> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, rank: u32) -> Result<(), Error> {
        if rank < self.size {
            return Ok(());
        }
        Err(Error::ProcessGroup(format!("there is no rank {rank} among {}", self.size)))
    }
}

impl ProcessGroup for ThreadGroup {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn send(&self, to: u32, message: &[u8]) -> Result<(), Error> {
        self.check(to)?;
        self.post().letters.entry((self.rank, to)).or_default().push_back(message.to_vec());
        Ok(())
    }

    fn try_receive(&self, from: u32) -> Result<Option<Vec<u8>>, Error> {
        self.check(from)?;
        let mut post = self.post();
        match post.letters.get_mut(&(from, self.rank)).and_then(VecDeque::pop_front) {
            None if post.gone.contains(&from) => Err(Error::ProcessGroup(format!("rank {from} has left the group"))),
            letter => Ok(letter),
        }
    }

    fn calls(&self) -> &AtomicU64 {
        &self.calls
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        self.post().gone.insert(self.rank);
    }
}

//! Running pieces of work in parallel, on rayon's current pool: the global one, or the caller's through
//! `ThreadPool::install`.
//!
//! The calling thread works too, and takes piece after piece like the others. Threads that sleep need some 20 to 100 us to
//! wake up: by then it is well ahead, or done. Handing everything over to the pool would make it wait for that.

use std::error::Error;
use std::sync::{Mutex, OnceLock, PoisonError};

use rayon::ThreadPoolBuilder;

use super::tuning::{CHUNK, PARALLEL_FROM};

/// Runs `task` on every piece of work, in parallel if there are many of `bytes` together. There are about as many as
/// `pieces`; each is made when a thread comes for it.
pub(super) fn in_parallel<W: Send>(
    work: impl Iterator<Item = W> + Send,
    pieces: usize,
    bytes: usize,
    task: impl Fn(W) + Send + Sync,
) {
    let threads = if bytes < PARALLEL_FROM * size_of::<f32>() { 1 } else { threads() };
    if threads == 1 {
        return work.for_each(task);
    }
    // Many tiny tensors make tiny pieces: a thread takes as many at a time as fill a chunk on average.
    let batch = (pieces * CHUNK * size_of::<f32>() / bytes).clamp(1, CHUNK);
    let left = Mutex::new(work);
    let run = || {
        loop {
            let next: Vec<_> = left.lock().unwrap_or_else(PoisonError::into_inner).by_ref().take(batch).collect();
            if next.is_empty() {
                break;
            }
            next.into_iter().for_each(&task);
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..threads.min(pieces.div_ceil(batch)) {
            scope.spawn(|_| run());
        }
        run();
    });
}

/// How many threads there are to work: one where no pool can be had, because the system gives no more threads.
fn threads() -> usize {
    static GLOBAL: OnceLock<bool> = OnceLock::new();
    let global = || {
        ThreadPoolBuilder::new().build_global().map_or_else(
            // Without a source, the error says that someone has built it already.
            |error| {
                let built = error.source().is_none();
                if !built {
                    log::warn!("working on one thread: {error}");
                }
                built
            },
            |()| true,
        )
    };
    // Asking rayon without this would panic where it cannot start its threads.
    if rayon::current_thread_index().is_some() || *GLOBAL.get_or_init(global) {
        rayon::current_num_threads()
    } else {
        1
    }
}

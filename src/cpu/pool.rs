//! Runs pieces of work in parallel, on rayon's current pool: the global one, or the caller's through
//! `ThreadPool::install`.
//!
//! The calling thread works too, and takes piece after piece like the others. Sleeping threads take 20 us to a
//! millisecond to wake up; by then the calling thread is well ahead, or done. So it waits only for those that have
//! begun to work. (A scope of rayon's waits for all that were called.)

use std::any::Any;
use std::error::Error;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::available_parallelism;

use rayon::ThreadPoolBuilder;

use super::tuning::{CHUNK, PARALLEL_FROM};

/// More threads for each core than this only wait for each other. To wake thousands takes seconds.
const THREADS_PER_CORE: usize = 4;

/// Runs `task` on every piece of work, in parallel if their `bytes` together are many. `pieces` is about their number.
/// Each piece is made when a thread asks for it.
pub(crate) fn in_parallel<W: Send>(
    work: impl Iterator<Item = W> + Send,
    pieces: usize,
    bytes: usize,
    task: impl Fn(W) + Send + Sync,
) {
    let threads = if bytes < PARALLEL_FROM * size_of::<f32>() { 1 } else { threads() };
    if threads == 1 {
        return work.for_each(task);
    }
    // Many tiny tensors make tiny pieces, so a thread takes as many at a time as fill a chunk on average.
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
    with_helpers(threads.min(pieces.div_ceil(batch)).saturating_sub(1), &run);
}

/// Runs `work` on this thread, and on up to `helpers` other threads of the pool if they come before it returns here.
/// Returns when it has returned on all of them. If it panics on one, so does this.
fn with_helpers(helpers: usize, work: &(dyn Fn() + Sync)) {
    // Closes the latch when dropped: however this function ends, no helper runs after it.
    let latch = CloseOnDrop(Arc::new(Latch::default()));
    for _ in 0..helpers {
        let (latch, work) = (Arc::clone(&latch.0), WorkPointer::new(work));
        rayon::spawn(move || {
            if latch.enter() {
                // SAFETY: The work must be there until it returns. The `CloseOnDrop` was made before the first helper
                // was called. Its drop waits for this helper to `leave`, before `with_helpers` returns or unwinds.
                latch.leave(catch_unwind(AssertUnwindSafe(|| unsafe { work.run() })).err());
            }
        });
    }
    work();
    if let Some(panic) = latch.0.close() {
        resume_unwind(panic);
    }
}

/// Work that may be gone. It is a pointer, because a reference to it must not even exist then.
struct WorkPointer(*const (dyn Fn() + Sync));

// SAFETY: The work is `Sync`: other threads may use it through a shared reference, and `run` does nothing else.
unsafe impl Send for WorkPointer {}

impl WorkPointer {
    fn new(work: &(dyn Fn() + Sync)) -> Self {
        // SAFETY: Both types are pointers of the same kind, and only the named lifetime differs. That the lifetime has
        // not ended is `run`'s obligation.
        Self(unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync)>(work) })
    }

    /// # Safety
    /// The work must not be gone before this returns or unwinds.
    unsafe fn run(&self) {
        // SAFETY: The pointer was made of a reference, and the caller promises that the work is still there.
        unsafe { (*self.0)() }
    }
}

/// Counts the running helpers. Once it is closed, none can begin.
#[derive(Default)]
struct Latch {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    running: usize,
    /// The payload of the first panic of a helper.
    panic: Option<Box<dyn Any + Send>>,
}

impl Latch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to run. False if the latch is closed.
    fn enter(&self) -> bool {
        let mut state = self.state();
        state.running += usize::from(!state.closed);
        !state.closed
    }

    fn leave(&self, panic: Option<Box<dyn Any + Send>>) {
        let mut state = self.state();
        state.running -= 1;
        state.panic = state.panic.take().or(panic);
        self.left.notify_all();
    }

    /// Closes the latch, and waits for the running helpers.
    fn close(&self) -> Option<Box<dyn Any + Send>> {
        let mut state = self.state();
        state.closed = true;
        while state.running > 0 {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.panic.take()
    }
}

struct CloseOnDrop(Arc<Latch>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The number of threads to work on: at most [`THREADS_PER_CORE`] for each core, whatever the pool has. One if there is no
/// pool, because the system gives no more threads.
fn threads() -> usize {
    // A page has one thread, and rayon would try to start more.
    if cfg!(target_arch = "wasm32") {
        return 1;
    }
    static MOST: OnceLock<usize> = OnceLock::new();
    static GLOBAL: OnceLock<bool> = OnceLock::new();
    let most = *MOST.get_or_init(|| THREADS_PER_CORE * available_parallelism().map_or(1, NonZeroUsize::get));
    let global = || {
        // 0 is rayon's own choice: a thread for each core.
        let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|number| number.parse().ok()).unwrap_or(0);
        ThreadPoolBuilder::new().num_threads(most.min(asked)).build_global().map_or_else(
            // Without a source, the error says that the pool exists already.
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
    // Without this check rayon would panic where it cannot start its threads.
    if rayon::current_thread_index().is_some() || *GLOBAL.get_or_init(global) {
        rayon::current_num_threads().min(most)
    } else {
        1
    }
}

#[cfg(test)]
#[path = "tests/pool.rs"]
mod tests;

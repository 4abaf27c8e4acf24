//! Running pieces of work in parallel, on rayon's current pool: the global one, or the caller's through
//! `ThreadPool::install`.
//!
//! The calling thread works too, and takes piece after piece like the others. Threads that sleep take their time to wake up,
//! 20 us to a millisecond: by then it is well ahead, or done. So it waits for those only that have begun to work. (A scope of
//! rayon's waits for all that were called.)

use std::any::Any;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

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
    with_helpers(threads.min(pieces.div_ceil(batch)) - 1, &run);
}

/// Runs `work` on this thread, and on up to so many others of the pool as come before it returns here. Returns when all of
/// them have; if it panics in one, so does this.
fn with_helpers(helpers: usize, work: &(dyn Fn() + Sync)) {
    // SAFETY: The reference must not be used after this function returns, by panic or not, because what it refers to may be
    // gone then:
    // - A helper uses it between a successful `enter` and its `leave` only, and `leave` comes whether `work` panics or not.
    // - `Host` shuts the door when it is dropped, so that none enters any more, and waits until all that have are gone.
    // - `Host` is made before the first helper is called, and dropped at the end of this function, however it ends.
    // - Helpers that come later find the door shut, and drop the reference unused, which does nothing.
    let work: &'static (dyn Fn() + Sync) =
        unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(work) };
    let host = Host(Arc::new(Door::default()));
    for _ in 0..helpers {
        let door = Arc::clone(&host.0);
        rayon::spawn(move || {
            if door.enter() {
                door.leave(catch_unwind(AssertUnwindSafe(work)).err());
            }
        });
    }
    work();
    let panic = host.0.shut();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Who is at work.
#[derive(Default)]
struct Door {
    inside: Mutex<Inside>,
    left: Condvar,
}

#[derive(Default)]
struct Inside {
    shut: bool,
    helpers: usize,
    /// What the first helper that panicked said.
    panic: Option<Box<dyn Any + Send>>,
}

impl Door {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if it is shut.
    fn enter(&self) -> bool {
        let mut inside = self.inside();
        inside.helpers += usize::from(!inside.shut);
        !inside.shut
    }

    fn leave(&self, panic: Option<Box<dyn Any + Send>>) {
        let mut inside = self.inside();
        inside.helpers -= 1;
        inside.panic = inside.panic.take().or(panic);
        self.left.notify_all();
    }

    /// Lets none in any more, and waits for those inside.
    fn shut(&self) -> Option<Box<dyn Any + Send>> {
        let mut inside = self.inside();
        inside.shut = true;
        while inside.helpers > 0 {
            inside = self.left.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        inside.panic.take()
    }
}

/// Shuts the door behind itself.
struct Host(Arc<Door>);

impl Drop for Host {
    fn drop(&mut self) {
        self.0.shut();
    }
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

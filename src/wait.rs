//! [`Waiting`]: the one way to wait for a device or for other processes.

use std::cell::Cell;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

#[cfg(not(target_arch = "wasm32"))]
type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
#[cfg(target_arch = "wasm32")]
type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A result to wait for. Either `.await` it, or call `.wait()`, which puts the thread to sleep until the result is
/// there. Browsers have no `.wait()`.
///
/// Nothing begins before one of the two is used. Each poll looks for the result and asks for another poll, so any
/// executor will do.
#[must_use = "nothing happens until it is awaited or waited for"]
pub struct Waiting<'a, T>(Boxed<'a, T>);

impl<'a, T> Waiting<'a, T> {
    /// Wraps a future.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new(future: impl Future<Output = T> + Send + 'a) -> Self {
        Self(Box::pin(future))
    }

    /// Wraps a future.
    #[cfg(target_arch = "wasm32")]
    pub fn new(future: impl Future<Output = T> + 'a) -> Self {
        Self(Box::pin(future))
    }

    /// Sleeps until the result is there.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn wait(self) -> T {
        block_on(self.0)
    }
}

impl<T> Future for Waiting<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        self.0.as_mut().poll(context)
    }
}

impl<T> fmt::Debug for Waiting<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waiting(..)")
    }
}

thread_local! {
    /// Whether this thread has nothing to do but wait for the future that it polls.
    static MAY_SLEEP: Cell<bool> = const { Cell::new(false) };
}

/// Whether a poll may sleep until it has an answer: within [`block_on`].
pub(crate) fn may_sleep() -> bool {
    MAY_SLEEP.get()
}

/// The result of a future. A poll may put this thread to sleep.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            MAY_SLEEP.set(self.0);
        }
    }
    let _restore = Restore(MAY_SLEEP.replace(true));
    pollster::block_on(future)
}

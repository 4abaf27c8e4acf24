//! How what has to wait waits: for a device, or for other processes.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// What a future does until it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Each poll of the future looks once and asks to be polled again.
    Polling,
    /// The first poll of the future sleeps until it is ready; for the blocking functions.
    Sleeping,
}

/// The outcome of a future that sleeps rather than be polled twice.
pub(crate) fn at_once<T>(future: impl Future<Output = T>) -> T {
    let (mut future, mut context) = (pin!(future), Context::from_waker(Waker::noop()));
    loop {
        if let Poll::Ready(outcome) = future.as_mut().poll(&mut context) {
            return outcome;
        }
    }
}

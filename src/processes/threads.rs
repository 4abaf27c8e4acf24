//! A group whose ranks are threads of one process.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::ProcessGroup;
use crate::Error;

/// The ranks of a group of threads of this process, in order. Move each to its thread, for example one thread for each
/// device. The timeout is their [`ProcessGroup::timeout`].
#[must_use]
pub fn thread_group(size: u32, timeout: Option<Duration>) -> Vec<Arc<dyn ProcessGroup>> {
    let mailbox = Arc::new(Mutex::default());
    let rank = |rank| {
        let (calls, mailbox) = (AtomicU64::new(0), Arc::clone(&mailbox));
        Arc::new(ThreadRank { rank, size, timeout, calls, mailbox }) as Arc<dyn ProcessGroup>
    };
    (0..size).map(rank).collect()
}

/// The group of this process alone, for clips without another group.
pub(crate) fn single_process() -> &'static Arc<dyn ProcessGroup> {
    static SINGLE: LazyLock<Arc<dyn ProcessGroup>> = LazyLock::new(|| thread_group(1, None).swap_remove(0));
    &SINGLE
}

/// A rank whose peers are threads of the same process.
#[derive(Debug)]
struct ThreadRank {
    rank: u32,
    size: u32,
    timeout: Option<Duration>,
    calls: AtomicU64,
    mailbox: Arc<Mutex<Mailbox>>,
}

/// The messages that were sent and not yet received.
#[derive(Debug, Default)]
struct Mailbox {
    /// By sender and receiver.
    messages: HashMap<(u32, u32), VecDeque<Vec<u8>>>,
    /// The ranks that are gone.
    gone: HashSet<u32>,
}

impl ThreadRank {
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, rank: u32) -> Result<(), Error> {
        if rank < self.size {
            return Ok(());
        }
        Err(Error::ProcessGroup(format!("there is no rank {rank} among {}", self.size)))
    }
}

impl ProcessGroup for ThreadRank {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn send(&self, to: u32, message: &[u8]) -> Result<(), Error> {
        self.check(to)?;
        self.mailbox().messages.entry((self.rank, to)).or_default().push_back(message.to_vec());
        Ok(())
    }

    fn try_receive(&self, from: u32) -> Result<Option<Vec<u8>>, Error> {
        self.check(from)?;
        let mut mailbox = self.mailbox();
        match mailbox.messages.get_mut(&(from, self.rank)).and_then(VecDeque::pop_front) {
            None if mailbox.gone.contains(&from) => Err(Error::ProcessGroup(format!("rank {from} has left the group"))),
            message => Ok(message),
        }
    }

    fn calls(&self) -> &AtomicU64 {
        &self.calls
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.mailbox().gone.insert(self.rank);
    }
}

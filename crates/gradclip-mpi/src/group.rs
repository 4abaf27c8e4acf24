//! [`MpiGroup`]: the ranks of a communicator.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gradclip::Error;
use gradclip::processes::ProcessGroup;
use mpi::environment;
use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator as _;

use crate::calls::{Calls, Communicator, Transfer};

/// The ranks of an MPI communicator, as the group that a clip is decided within.
///
/// It sends on a communicator of its own, separate from your messages. A message is a copy: `send` returns at once, and
/// the copy is freed once MPI has sent it. If the group is dropped or MPI finalised before, the message is still sent, and its
/// memory is leaked. That happens only if a rank did not receive what was sent to it.
///
/// # Threads
///
/// A group may be used from any thread, and several groups from several, if MPI was initialised for it:
///
/// | level | a group may be used |
/// |---|---|
/// | [`Threading::Multiple`](mpi::Threading::Multiple) | from any thread, whatever other threads do |
/// | [`Threading::Serialized`](mpi::Threading::Serialized) | from any thread, while no other thread is in a call of MPI of your own: this crate's calls exclude each other only |
/// | [`Threading::Funneled`](mpi::Threading::Funneled) | from the main thread; from others it returns an error |
/// | [`Threading::Single`](mpi::Threading::Single) | not at all, because a clip uses threads |
///
/// MPI must not be finalised while another thread is in a call of a group. After that every call is an error.
#[derive(Debug)]
pub struct MpiGroup {
    communicator: Communicator,
    rank: u32,
    size: u32,
    timeout: Option<Duration>,
    calls: AtomicU64,
    messages: AtomicU64,
    bytes: AtomicU64,
    /// Locked only while MPI's calls are held.
    transfers: Mutex<Transfers>,
}

/// What a rank has sent, without the overhead of MPI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// The number of messages.
    pub messages: u64,
    /// The number of bytes in them.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Transfers {
    sent: Vec<Transfer>,
    /// By sender; no other message of that sender is received meanwhile.
    arriving: BTreeMap<u32, Transfer>,
}

impl MpiGroup {
    /// The group of all ranks of a communicator. Every one of them must call this, in the same order among groups, while
    /// no other thread clips within a group or merges across one: it waits for the others, and other threads for it.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use gradclip_mpi::{MpiGroup, gradclip::{Clip, Clipper, TensorMut}, mpi};
    ///
    /// let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Serialized).ok_or("initialised twice")?;
    /// let group = Arc::new(MpiGroup::new(&universe.world())?);
    /// let mut my_slice = vec![1.0f32; 1 << 20];
    /// let report = Clipper::auto().processes(group).apply(&Clip::norm(1.0), &mut [TensorMut::new(&mut my_slice)])?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::ProcessGroup`] if MPI is not running or not for this thread, if the communicator is one between two
    /// groups, if this process was started by another MPI's `mpirun` than that which the program was built for, and
    /// what MPI says else.
    pub fn new(communicator: &impl mpi::traits::Communicator) -> Result<Self, Error> {
        let mut calls = Calls::enter()?;
        if let Some(expected) = ranks_by_environment(|name| std::env::var(name).ok())
            && SimpleCommunicator::world().size() == 1
        {
            return Err(Error::ProcessGroup(format!(
                "this process was started as one of {expected} and finds itself alone: the program was built for {}; \
                 start it by that one's mpirun, or build it for the other by setting MPICC to that one's compiler",
                library()
            )));
        }
        if communicator.test_inter() {
            return Err(Error::ProcessGroup("the communicator is one between two groups; merge them first".to_owned()));
        }
        let number =
            |of: mpi::Rank| u32::try_from(of).map_err(|_| Error::ProcessGroup(format!("MPI numbers a rank {of}")));
        let (rank, size) = (number(communicator.rank())?, number(communicator.size())?);
        let communicator = calls.duplicate(communicator)?;
        let [calls, messages, bytes] = [0; 3].map(AtomicU64::new);
        Ok(Self { communicator, rank, size, timeout: None, calls, messages, bytes, transfers: Mutex::default() })
    }

    /// Sets how long a call waits for messages of other ranks before it returns an error. Without a timeout it waits for ever.
    /// Most `mpirun` end all ranks when one dies, but none when one merely stops.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// What this rank has sent so far. A step's traffic is the difference between two.
    #[must_use]
    pub fn sent(&self) -> Sent {
        Sent { messages: self.messages.load(Ordering::Relaxed), bytes: self.bytes.load(Ordering::Relaxed) }
    }

    fn check(&self, rank: u32) -> Result<(), Error> {
        if rank < self.size {
            return Ok(());
        }
        Err(Error::ProcessGroup(format!("there is no rank {rank}, only {}", self.size)))
    }

    /// `calls` proves that no thread waits for `Calls` while it holds this lock.
    fn transfers(&self, _calls: &Calls) -> MutexGuard<'_, Transfers> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transfers {
    /// Frees the messages that were sent.
    fn free_sent(&mut self, calls: &Calls) -> Result<(), Error> {
        let mut all = Ok(());
        for transfer in std::mem::take(&mut self.sent) {
            match calls.finish(transfer) {
                Ok(Ok(_)) => {}
                Ok(Err(unfinished)) => self.sent.push(unfinished),
                Err(error) => all = all.and(Err(error)),
            }
        }
        all
    }
}

impl ProcessGroup for MpiGroup {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn send(&self, to: u32, message: &[u8]) -> Result<(), Error> {
        self.check(to)?;
        let calls = Calls::enter()?;
        let mut transfers = self.transfers(&calls);
        let transfer = calls.send(&self.communicator, to, message)?;
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(message.len() as u64, Ordering::Relaxed);
        transfers.sent.push(transfer);
        transfers.free_sent(&calls)
    }

    fn try_receive(&self, from: u32) -> Result<Option<Vec<u8>>, Error> {
        self.check(from)?;
        let calls = Calls::enter()?;
        let mut transfers = self.transfers(&calls);
        transfers.free_sent(&calls)?;
        let begun = transfers.arriving.remove(&from);
        let Some(transfer) = begun.map_or_else(|| calls.receive(&self.communicator, from), |begun| Ok(Some(begun)))?
        else {
            return Ok(None);
        };
        match calls.finish(transfer)? {
            Ok(message) => Ok(Some(message.into())),
            Err(unfinished) => {
                transfers.arriving.insert(from, unfinished);
                Ok(None)
            }
        }
    }

    fn is_sent(&self) -> Result<bool, Error> {
        let calls = Calls::enter()?;
        let mut transfers = self.transfers(&calls);
        transfers.free_sent(&calls)?;
        Ok(transfers.sent.is_empty())
    }

    fn calls(&self) -> &AtomicU64 {
        &self.calls
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }
}

impl Drop for MpiGroup {
    fn drop(&mut self) {
        // If MPI may no longer be called, its handles are leaked.
        let Ok(calls) = Calls::enter() else { return };
        let mut transfers = std::mem::take(&mut *self.transfers(&calls));
        let _ = transfers.free_sent(&calls);
        for unfinished in transfers.sent.into_iter().chain(transfers.arriving.into_values()) {
            calls.abandon(unfinished);
        }
        calls.free(&mut self.communicator);
    }
}

/// How many ranks the process was started with, if more than one and whatever started it says so: OpenMPI's `mpirun`,
/// or MPICH's and its descendants'.
fn ranks_by_environment(variable: impl Fn(&str) -> Option<String>) -> Option<u64> {
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].iter().filter_map(|name| variable(name)?.parse().ok()).find(|ranks| *ranks > 1)
}

/// The name of this MPI.
fn library() -> String {
    let version = environment::library_version().unwrap_or_default();
    let words: Vec<_> = version.split_whitespace().map(|word| word.trim_matches(char::from(0))).collect();
    let known = ["Open MPI", "MPICH"].into_iter().find(|name| version.starts_with(name));
    known.map_or_else(|| words.into_iter().take(4).collect::<Vec<_>>().join(" "), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_mpis_mpirun_is_seen() {
        let with =
            |name: &'static str, value: &'static str| move |asked: &str| (asked == name).then(|| value.to_owned());
        assert_eq!(ranks_by_environment(with("OMPI_COMM_WORLD_SIZE", "4")), Some(4));
        assert_eq!(ranks_by_environment(with("PMI_SIZE", "2")), Some(2));
        for one in [with("PMI_SIZE", "1"), with("PMI_SIZE", "many"), with("SLURM_NTASKS", "4")] {
            assert_eq!(ranks_by_environment(one), None);
        }
    }
}

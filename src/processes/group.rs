//! [`ProcessGroup`]: what a transport must provide.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::Error;

/// Processes, called ranks and numbered from 0, that send each other messages.
///
/// A transport needs nothing else. The library decides what the messages are, who sends one to whom, and in which order
/// they merge. In a call each rank exchanges about log2(size) messages, of 64 bytes and 64 more for each segment.
pub trait ProcessGroup: std::fmt::Debug + Send + Sync {
    /// The number of this process.
    fn rank(&self) -> u32;

    /// The number of processes; more than [`ProcessGroup::rank`].
    fn size(&self) -> u32;

    /// Sends a message and returns, whether or not the other rank has asked for it. Messages from one rank to another
    /// arrive whole, once, and in the order in which they were sent.
    ///
    /// # Errors
    /// [`Error::ProcessGroup`] if the message cannot be sent.
    fn send(&self, to: u32, message: &[u8]) -> Result<(), Error>;

    /// The next message from a rank, if there is one. Returns at once.
    ///
    /// # Errors
    /// [`Error::ProcessGroup`] if no message can come any more.
    fn try_receive(&self, from: u32) -> Result<Option<Vec<u8>>, Error>;

    /// Whether everything sent has left, so that it arrives whatever this process does next. A transport that moves
    /// messages only while it is called returns `false` until then, and is asked again. Others keep the default.
    /// Returns at once.
    ///
    /// # Errors
    /// [`Error::ProcessGroup`] if a message cannot be sent.
    fn is_sent(&self) -> Result<bool, Error> {
        Ok(true)
    }

    /// A counter of this group, 0 at first. The library numbers its calls with it.
    fn calls(&self) -> &AtomicU64;

    /// How long a call waits for the messages of others before it fails. None, the default, means for ever.
    ///
    /// After such an error a rank no longer knows what the others have done. A late rank may have clipped, by what the
    /// others sent before they gave up. End the job, and continue from a checkpoint.
    fn timeout(&self) -> Option<Duration> {
        None
    }
}

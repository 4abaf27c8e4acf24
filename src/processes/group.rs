//! [`ProcessGroup`]: what is asked of a transport.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::Error;

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

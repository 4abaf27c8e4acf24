//! The messages that ranks exchange, and the order in which they merge: recursive doubling.
//!
//! Among n ranks, let p be the largest power of two. The first 2 (n - p) ranks pair up: each even rank merges what its
//! odd neighbour knows, which leaves p ranks. In round i each of them trades all it knows with the rank whose number
//! among the p differs in bit i. Both merge the body of the lower rank with that of the higher one. After log2(p)
//! rounds all p know the same, and the even ranks send it to their odd neighbours.
//!
//! So everything merges along one tree, whatever arrives first. The number of ranks alone decides the tree. Every rank
//! computes the root itself, from the same bits in the same order. A sum of n partials is rounded ceil(log2 n) times.

use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};

use super::ProcessGroup;
use crate::Error;
use crate::wait::may_sleep;

/// A call of the whole group. It must be the same on each rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) kind: Kind,
    /// A digest of everything else that must be the same.
    pub(super) description: u64,
    pub(super) segments: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Merge,
    Names,
    #[cfg(not(target_arch = "wasm32"))]
    Agree,
    #[cfg(not(target_arch = "wasm32"))]
    Check,
}

impl Operation {
    /// An operation for which only the kind must agree.
    pub(super) fn of(kind: Kind) -> Self {
        Self { kind, description: 0, segments: 0 }
    }
}

/// The start of a message. Numbers are in the byte order of the machines, which must be the same.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct Header {
    magic: u64,
    /// Which call of the group it belongs to.
    sequence: u64,
    description: u64,
    segments: u64,
    kind: u32,
    status: u32,
    /// The lowest rank with a part in it. For a failure, the rank that failed. For a disagreement, a rank that differs.
    rank: u32,
    /// For a disagreement, the rank that it differs from.
    other: u32,
    /// The number of segments of that other rank.
    segments_of_other: u64,
    padding: u64,
}

/// No rank has failed so far.
const OK: u32 = 0;
/// Ranks were not called alike.
const DISAGREES: u32 = 1;
/// A rank has failed.
const FAILED: u32 = 2;

/// The name of the format with its version. With another byte order it does not read the same.
const MAGIC: u64 = u64::from_be_bytes(*b"gradcli\x01");

/// Merges the body of lower ranks with that of higher ones. None if they do not fit together.
pub(super) type MergeBodies = fn(&[u8], &[u8]) -> Option<Vec<u8>>;

/// A call of all ranks of a group. It begins before this rank measures. If it is dropped before
/// [`GroupCall::exchange`], the others learn that this rank has failed.
#[derive(Debug)]
pub(crate) struct GroupCall<'g> {
    group: &'g dyn ProcessGroup,
    sequence: u64,
    is_open: bool,
}

impl<'g> GroupCall<'g> {
    pub(crate) fn begin(group: &'g dyn ProcessGroup) -> Self {
        Self { group, sequence: group.calls().fetch_add(1, Ordering::Relaxed), is_open: true }
    }

    pub(crate) fn group(&self) -> &'g dyn ProcessGroup {
        self.group
    }

    /// Begins to exchange bodies. If `ok` is false, the others learn that this rank has failed.
    pub(super) fn exchange(mut self, op: Operation, ok: bool, body: Vec<u8>, merge: MergeBodies) -> Exchange<'g> {
        self.is_open = false;
        let group = self.group;
        let Operation { kind, description, segments } = op;
        let (status, body) = if ok { (OK, body) } else { (FAILED, Vec::new()) };
        let header = Header { kind: kind as u32, description, segments, status, ..header(self.sequence, group.rank()) };
        let begun = group.timeout().map(|timeout| (Instant::now(), timeout));
        Exchange { group, steps: steps(group.rank(), group.size()), done: 0, header, body, merge, begun }
    }
}

impl Drop for GroupCall<'_> {
    fn drop(&mut self) {
        if self.is_open {
            send_failure(self.group, self.sequence, &steps(self.group.rank(), self.group.size()));
        }
    }
}

fn header(sequence: u64, rank: u32) -> Header {
    Header { magic: MAGIC, sequence, rank, ..Header::zeroed() }
}

/// Tells the ranks of these steps that this one has failed. Errors are ignored: a rank that cannot be reached is gone.
fn send_failure(group: &dyn ProcessGroup, sequence: u64, steps: &[Step]) {
    let header = Header { status: FAILED, ..header(sequence, group.rank()) };
    for step in steps {
        if let Step::Send(to) = step {
            let _ = group.send(*to, bytemuck::bytes_of(&header));
        }
    }
}

/// One step of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Sends all it knows to a rank.
    Send(u32),
    /// Merges what a rank has sent.
    Merge(u32),
    /// Replaces what it knows by what a rank has sent.
    Replace(u32),
}

fn steps(rank: u32, size: u32) -> Vec<Step> {
    let Some(levels) = size.checked_ilog2() else { return Vec::new() };
    let paired = 2 * (size - (1 << levels));
    let mut steps = Vec::new();
    if rank < paired && rank % 2 == 1 {
        return vec![Step::Send(rank - 1), Step::Replace(rank - 1)];
    }
    // Ranks without their odd neighbours.
    let (number_of, rank_of) = (
        |rank: u32| if rank < paired { rank / 2 } else { rank - paired / 2 },
        |number: u32| if number < paired / 2 { 2 * number } else { number + paired / 2 },
    );
    if rank < paired {
        steps.push(Step::Merge(rank + 1));
    }
    for level in 0..levels {
        let peer = rank_of(number_of(rank) ^ (1 << level));
        steps.extend([Step::Send(peer), Step::Merge(peer)]);
    }
    if rank < paired {
        steps.push(Step::Send(rank + 1));
    }
    steps
}

/// A call in which this rank has begun to take part. If it is dropped early, the others learn that this rank has
/// failed.
#[derive(Debug)]
pub(super) struct Exchange<'g> {
    group: &'g dyn ProcessGroup,
    steps: Vec<Step>,
    /// How many steps are done.
    done: usize,
    header: Header,
    body: Vec<u8>,
    merge: MergeBodies,
    /// When it began, and how long it may take.
    begun: Option<(Instant, Duration)>,
}

impl Exchange<'_> {
    /// What all ranks know together.
    ///
    /// # Errors
    /// [`Error::PeerFailed`] or [`Error::Disagreement`] on every rank; [`Error::ProcessGroup`].
    pub(super) async fn run(mut self) -> Result<Vec<u8>, Error> {
        let mut tries = 0;
        poll_fn(|context| {
            loop {
                match self.advance() {
                    Ok(true) => return Poll::Ready(Ok(())),
                    Ok(false) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
                if !may_sleep() {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                pause(&mut tries);
            }
        })
        .await?;
        let Header { status, rank, other, segments, segments_of_other, .. } = self.header;
        match status {
            OK => Ok(std::mem::take(&mut self.body)),
            FAILED => Err(Error::PeerFailed { rank }),
            _ if segments != segments_of_other => {
                let reason = format!("has {segments} segments where rank {other} has {segments_of_other}");
                Err(Error::Disagreement { rank, reason })
            }
            _ => {
                let reason = format!("was called with another clip, or for other tensors, than rank {other}");
                Err(Error::Disagreement { rank, reason })
            }
        }
    }

    /// Does everything that needs no waiting. True at the end.
    fn advance(&mut self) -> Result<bool, Error> {
        while let Some(step) = self.steps.get(self.done) {
            match *step {
                Step::Send(to) => {
                    let message = [bytemuck::bytes_of(&self.header), &self.body].concat();
                    self.group.send(to, &message)?;
                }
                Step::Merge(from) => {
                    let Some((header, body)) = self.receive(from)? else { return Ok(false) };
                    self.merge_message(from, header, body)?;
                }
                Step::Replace(from) => {
                    let Some((header, body)) = self.receive(from)? else { return Ok(false) };
                    (self.header, self.body) = (header, body);
                }
            }
            self.done += 1;
        }
        // The transport may need this rank to move its messages, and the rank may not call again for long. So it waits
        // until they are sent, unless a rank failed or the timeout is over. Every healthy rank receives what was sent
        // to it. If one dies meanwhile, that is no failure of this call.
        Ok(self.header.status != OK || self.timed_out().is_some() || self.group.is_sent().unwrap_or(true))
    }

    /// The timeout, once it is over.
    fn timed_out(&self) -> Option<Duration> {
        self.begun.filter(|(begun, timeout)| begun.elapsed() >= *timeout).map(|(_, timeout)| timeout)
    }

    /// The message of this call from a rank. It skips messages of earlier calls, which this rank did not finish.
    fn receive(&mut self, from: u32) -> Result<Option<(Header, Vec<u8>)>, Error> {
        while let Some(mut message) = self.group.try_receive(from)? {
            let body =
                if message.len() >= size_of::<Header>() { message.split_off(size_of::<Header>()) } else { Vec::new() };
            let header =
                bytemuck::try_pod_read_unaligned::<Header>(&message).ok().filter(|header| header.magic == MAGIC);
            let Some(header) = header else {
                let strange = format!("rank {from} sent a message of another version or byte order");
                return Err(Error::ProcessGroup(strange));
            };
            if header.sequence > self.header.sequence {
                let reason = format!("is {} calls ahead of this one", header.sequence - self.header.sequence);
                // The ranks in that later call would wait for this rank. So it fails that call too, and the next is the
                // same for all.
                self.group.calls().fetch_max(header.sequence.saturating_add(1), Ordering::Relaxed);
                (self.header.sequence, self.done) = (header.sequence, 0);
                return Err(Error::Disagreement { rank: from, reason });
            }
            if header.sequence == self.header.sequence {
                return Ok(Some((header, body)));
            }
        }
        let Some(timeout) = self.timed_out() else { return Ok(None) };
        let seconds = timeout.as_secs_f64();
        let late = format!("rank {from} did not answer within {seconds} s: it died, it waits, or it made no such call");
        Err(Error::ProcessGroup(late))
    }

    /// Merges a message, with the same result on both sides.
    fn merge_message(&mut self, from: u32, theirs: Header, their_body: Vec<u8>) -> Result<(), Error> {
        let is_lower = self.group.rank() < from;
        let (mut low, high) = if is_lower { (self.header, theirs) } else { (theirs, self.header) };
        let own_body = std::mem::take(&mut self.body);
        let (body, other_body) = if is_lower { (own_body, their_body) } else { (their_body, own_body) };
        let agree = (low.kind, low.description, low.segments) == (high.kind, high.description, high.segments);
        if low.status.max(high.status) > OK {
            // A failure explains more than a disagreement. Among equals, the lower rank comes first.
            low = if high.status > low.status { high } else { low };
        } else if !agree {
            let (other, segments_of_other) = (low.rank, low.segments);
            low = Header { status: DISAGREES, other, segments_of_other, ..high };
        } else {
            let unfit = || Error::ProcessGroup(format!("the message of rank {from} does not fit"));
            self.body = (self.merge)(&body, &other_body).ok_or_else(unfit)?;
        }
        self.header = low;
        Ok(())
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        send_failure(self.group, self.header.sequence, &self.steps[self.done..]);
    }
}

/// Lets other threads work: at first only those ready to run, later any.
fn pause(tries: &mut u32) {
    *tries = tries.saturating_add(1);
    if *tries < 1000 {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(50));
    }
}

#[cfg(test)]
#[path = "tests/exchange.rs"]
mod tests;

//! Ranks that go through the same steps: all finish a step, or all end in it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gradclip::processes::ProcessGroup;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// The ranks, as one of them sees them.
#[derive(Debug)]
pub(super) struct Lockstep {
    pub(super) group: Arc<dyn ProcessGroup>,
}

/// How a rank ends.
#[derive(Debug, PartialEq, Eq)]
pub struct Exit {
    /// The same on every rank.
    pub exit_code: u8,
    /// What the rank prints to stderr: whole lines, or nothing.
    pub message: String,
}

/// A failure, as other ranks see it.
#[derive(Debug, Serialize, Deserialize)]
struct RankFailure {
    rank: u32,
    exit_code: u8,
    message: String,
    /// Whether it only follows from the failure of another rank.
    follows: bool,
}

/// What a rank sends in a step.
type StepResult<T> = Result<T, RankFailure>;

impl RankFailure {
    fn new(rank: u32, failure: &Failure) -> Self {
        let follows = matches!(failure, Failure::Library(gradclip::Error::PeerFailed { .. }));
        Self { rank, exit_code: failure.exit_code(), message: failure.message(), follows }
    }
}

impl Lockstep {
    /// Whether this is the rank that prints for all.
    pub(super) fn is_first(&self) -> bool {
        self.group.rank() == 0
    }

    /// How a rank ends if all ranks fail; rank 0 prints the message.
    pub(super) fn exit(&self, exit_code: u8, message: String) -> Exit {
        Exit { exit_code, message: if self.is_first() { message } else { String::new() } }
    }

    /// How a rank ends if all ranks have found the same failure.
    pub(super) fn exit_with(&self, failure: &Failure) -> Exit {
        self.exit(failure.exit_code(), format!("error: {}\n", failure.message()))
    }

    /// Checks that a value is the same on all ranks. If it is not, `other` makes the failure from the first rank that differs.
    pub(super) fn same<T: Hash>(
        &self,
        name: &str,
        own: Result<T, Failure>,
        other: impl Fn(usize) -> Failure,
    ) -> Result<T, Exit> {
        let hashed = own.map(|own| {
            let mut hasher = DefaultHasher::new();
            own.hash(&mut hasher);
            (own, hasher.finish())
        });
        let (own, all) = self.step(name, hashed)?;
        match all.iter().position(|hash| *hash != all[0]) {
            None => Ok(own),
            Some(rank) => Err(self.exit_with(&other(rank))),
        }
    }

    /// Waits until every rank has finished this step. If all succeed, each keeps its `K` and gets the `T` of all, in the order of
    /// ranks. If one fails, all end, with the highest exit code.
    pub(super) fn step<K, T>(&self, name: &str, own: Result<(K, T), Failure>) -> Result<(K, Vec<T>), Exit>
    where
        T: Serialize + DeserializeOwned,
    {
        let failed = |failure| Err(RankFailure::new(self.group.rank(), &failure));
        let (kept, own) = match own {
            Ok((kept, shared)) => (Some(kept), Ok(shared)),
            Err(failure) => (None, failed(failure)),
        };
        let all = self.exchange(name, own).unwrap_or_else(|(own, failure)| vec![own, failed(failure)]);
        let (mut failures, mut shared) = (Vec::new(), Vec::new());
        for result in all {
            match result {
                Ok(value) => shared.push(value),
                Err(failure) => failures.push(failure),
            }
        }
        match kept {
            Some(kept) if failures.is_empty() => Ok((kept, shared)),
            _ => Err(self.exit_after(failures, shared.is_empty())),
        }
    }

    /// How this rank ends after these failures; `of_all` says whether no rank succeeded.
    fn exit_after(&self, mut failures: Vec<RankFailure>, of_all: bool) -> Exit {
        if failures.iter().any(|failure| !failure.follows) {
            failures.retain(|failure| !failure.follows);
        }
        let exit_code = failures.iter().map(|failure| failure.exit_code).max().unwrap_or(1);
        // The first rank that has a message prints it.
        let repeated = |i: usize| failures[..i].iter().any(|failure| failure.message == failures[i].message);
        let own = (0..failures.len()).find(|&i| failures[i].rank == self.group.rank() && !repeated(i));
        let is_alike = of_all && (1..failures.len()).all(repeated) && failures.len() == self.group.size() as usize;
        let from = if is_alike { String::new() } else { format!("rank {}: ", self.group.rank()) };
        let message = own.map(|i| format!("error: {from}{}\n", failures[i].message));
        Exit { exit_code, message: message.unwrap_or_default() }
    }

    /// Sends the result of every rank to every rank, through rank 0. A rank that cannot send or receive gets its own result back.
    fn exchange<T>(&self, name: &str, own: StepResult<T>) -> Result<Vec<StepResult<T>>, (StepResult<T>, Failure)>
    where
        T: Serialize + DeserializeOwned,
    {
        // Other ranks may have waited for one timeout before they come.
        let timeout = self.group.timeout().map(|timeout| timeout.saturating_mul(2));
        if !self.is_first() {
            let sent = self.group.send(0, &encoded(&(name, &own))).map_err(Failure::from);
            // Rank 0 waits for all ranks before it answers.
            let received = sent.and_then(|()| self.receive(name, 0, timeout.map(|timeout| timeout.saturating_mul(2))));
            return received.map_err(|failure| (own, failure));
        }
        let start = Instant::now();
        let mut all = vec![own];
        for rank in 1..self.group.size() {
            let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
            let result = self.receive(name, rank, left);
            all.push(result.unwrap_or_else(|failure| Err(RankFailure::new(0, &failure))));
        }
        let message = encoded(&(name, &all));
        let sent: Vec<_> = (1..self.group.size()).map(|rank| self.group.send(rank, &message)).collect();
        if all.iter().any(Result::is_err) {
            // A rank that cannot receive has failed already.
            return Ok(all);
        }
        match sent.into_iter().collect::<Result<(), _>>().and_then(|()| self.wait_until_sent(timeout)) {
            Ok(()) => Ok(all),
            Err(error) => Err((all.swap_remove(0), error.into())),
        }
    }

    /// Waits until all messages are sent, because the next step may take long. Waits no longer than for an answer.
    fn wait_until_sent(&self, timeout: Option<Duration>) -> Result<(), gradclip::Error> {
        let start = Instant::now();
        while !self.group.is_sent()? && timeout.is_none_or(|timeout| start.elapsed() <= timeout) {
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Receives what a rank sends in this step.
    fn receive<T: DeserializeOwned>(&self, name: &str, from: u32, timeout: Option<Duration>) -> Result<T, Failure> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(1);
        let message = loop {
            match self.group.try_receive(from)? {
                Some(message) if message.starts_with(START) => break message,
                // A message of an exchange that failed.
                Some(_) => continue,
                None => {}
            }
            if timeout.is_some_and(|timeout| start.elapsed() > timeout) {
                return Err(Failure::Setup(format!("rank {from} has not answered in time: has it stopped?")));
            }
            std::thread::sleep(pause);
            // So a message is late by no more than a fraction of the wait.
            pause = (pause * 5 / 4).min(Duration::from_millis(2));
        };
        match serde_json::from_slice::<(String, T)>(&message) {
            Ok((step, value)) if step == name => Ok(value),
            _ => Err(Failure::Setup(format!("rank {from} is at another step: are all ranks of the same version?"))),
        }
    }
}

/// The first bytes of messages here. Messages of the library have others.
const START: &[u8] = b"[\"";

fn encoded(message: &impl Serialize) -> Vec<u8> {
    // Plain data cannot fail to serialise.
    serde_json::to_vec(message).unwrap_or_default()
}

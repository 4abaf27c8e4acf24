//! Ranks that go on together, or end together.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gradclip::processes::ProcessGroup;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// The ranks, as one of them sees them.
#[derive(Debug)]
pub(super) struct Together {
    pub(super) group: Arc<dyn ProcessGroup>,
}

/// All ranks end here, with the same exit code.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) exit_code: u8,
    /// What this rank has to say: lines, or nothing.
    pub(super) message: String,
}

/// What a rank says of itself in a step.
#[derive(Debug, Serialize, Deserialize)]
enum Said<T> {
    Done(T),
    Failed(Told),
}

#[derive(Debug, Serialize, Deserialize)]
struct Told {
    /// The rank that has it to say.
    by: u32,
    exit_code: u8,
    message: String,
    /// Whether it is only that another rank failed.
    follows: bool,
}

impl Told {
    fn new(by: u32, failure: &Failure) -> Self {
        let follows = matches!(failure, Failure::Library(gradclip::Error::PeerFailed { .. }));
        Self { by, exit_code: failure.exit_code(), message: failure.message(), follows }
    }
}

impl Together {
    pub(super) fn new(group: Arc<dyn ProcessGroup>) -> Self {
        Self { group }
    }

    pub(super) fn rank(&self) -> u32 {
        self.group.rank()
    }

    pub(super) fn size(&self) -> u32 {
        self.group.size()
    }

    /// Whether this is the rank that speaks for all.
    pub(super) fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// What is to be said once.
    pub(super) fn first_says(&self, message: String) -> String {
        if self.is_first() { message } else { String::new() }
    }

    /// How all ranks end that have come to the same failure by themselves.
    pub(super) fn known_to_all(&self, failure: &Failure) -> Stopped {
        let message = self.first_says(format!("error: {}\n", failure.message()));
        Stopped { exit_code: failure.exit_code(), message }
    }

    /// Checks that something is the same on all ranks; `other` is the failure if one of them, the first, has another.
    pub(super) fn same<T: Hash>(
        &self,
        name: &str,
        mine: Result<T, Failure>,
        other: impl Fn(usize) -> Failure,
    ) -> Result<T, Stopped> {
        let hashed = mine.map(|mine| {
            let mut hasher = DefaultHasher::new();
            mine.hash(&mut hasher);
            (mine, hasher.finish())
        });
        let (mine, all) = self.step(name, hashed)?;
        match all.iter().position(|hash| *hash != all[0]) {
            None => Ok(mine),
            Some(rank) => Err(self.known_to_all(&other(rank))),
        }
    }

    /// Waits until every rank has come here. If all are well, each gets what all have told, in the order of ranks, and keeps
    /// what it has; if one has failed, all are stopped. The worst exit code is that of all.
    pub(super) fn step<K, T>(&self, name: &str, mine: Result<(K, T), Failure>) -> Result<(K, Vec<T>), Stopped>
    where
        T: Serialize + DeserializeOwned,
    {
        let failed = |failure| Said::Failed(Told::new(self.rank(), &failure));
        let (kept, said) = match mine {
            Ok((kept, told)) => (Some(kept), Said::Done(told)),
            Err(failure) => (None, failed(failure)),
        };
        let all = self.exchange(name, said).unwrap_or_else(|(said, failure)| vec![said, failed(failure)]);
        let mut failures = Vec::new();
        let mut told = Vec::new();
        for said in all {
            match said {
                Said::Done(done) => told.push(done),
                Said::Failed(failure) => failures.push(failure),
            }
        }
        match kept {
            Some(kept) if failures.is_empty() => Ok((kept, told)),
            _ => Err(self.stopped(failures, told.is_empty())),
        }
    }

    /// What this rank says and ends with after these failures, be they all ranks' or not.
    fn stopped(&self, mut failures: Vec<Told>, of_all: bool) -> Stopped {
        if failures.iter().any(|told| !told.follows) {
            failures.retain(|told| !told.follows);
        }
        let exit_code = failures.iter().map(|told| told.exit_code).max().unwrap_or(1);
        // What several have to say is said by the first of them.
        let said = |i: usize| failures[..i].iter().any(|told| told.message == failures[i].message);
        let mine = (0..failures.len()).find(|&i| failures[i].by == self.rank() && !said(i));
        let is_alike = of_all && (1..failures.len()).all(said) && failures.len() == self.size() as usize;
        let from = if is_alike { String::new() } else { format!("rank {}: ", self.rank()) };
        let message = mine.map(|i| format!("error: {from}{}\n", failures[i].message));
        Stopped { exit_code, message: message.unwrap_or_default() }
    }

    /// Lets every rank know what every rank says. Rank 0 hears all and tells all. Who can neither be heard nor hear gets back
    /// what it has said.
    fn exchange<T>(&self, name: &str, mine: Said<T>) -> Result<Vec<Said<T>>, (Said<T>, Failure)>
    where
        T: Serialize + DeserializeOwned,
    {
        // Others may have spent a timeout already when they come.
        let timeout = self.group.timeout().map(|timeout| timeout.saturating_mul(2));
        if !self.is_first() {
            let sent = self.group.send(0, &encoded(&(name, &mine))).map_err(Failure::from);
            // Rank 0 has it before it answers.
            let heard = sent.and_then(|()| self.receive(name, 0, timeout.map(|timeout| timeout.saturating_mul(2))));
            return heard.map_err(|failure| (mine, failure));
        }
        let start = Instant::now();
        let mut all = vec![mine];
        for rank in 1..self.size() {
            let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
            let said = self.receive(name, rank, left);
            all.push(said.unwrap_or_else(|failure| Said::Failed(Told::new(0, &failure))));
        }
        let message = encoded(&(name, &all));
        let told: Vec<_> = (1..self.size()).map(|rank| self.group.send(rank, &message)).collect();
        if !all.iter().all(|said| matches!(said, Said::Done(_))) {
            // Who cannot be told has failed already.
            return Ok(all);
        }
        match told.into_iter().collect::<Result<(), _>>().and_then(|()| self.has_left(timeout)) {
            Ok(()) => Ok(all),
            Err(error) => Err((all.swap_remove(0), error.into())),
        }
    }

    /// Waits until all that was said has left, because what comes next may take long, or as long as for an answer.
    fn has_left(&self, timeout: Option<Duration>) -> Result<(), gradclip::Error> {
        let start = Instant::now();
        while !self.group.is_sent()? && timeout.is_none_or(|timeout| start.elapsed() <= timeout) {
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// What a rank says in this step.
    fn receive<T: DeserializeOwned>(&self, name: &str, from: u32, timeout: Option<Duration>) -> Result<T, Failure> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(1);
        let message = loop {
            match self.group.try_receive(from)? {
                Some(message) if message.starts_with(START) => break message,
                // Of an exchange that failed, something may be left.
                Some(_) => continue,
                None => {}
            }
            if timeout.is_some_and(|timeout| start.elapsed() > timeout) {
                return Err(Failure::Setup(format!("rank {from} has not answered in time: has it stopped?")));
            }
            std::thread::sleep(pause);
            // A message costs no more than a fraction of what was waited for already.
            pause = (pause * 5 / 4).min(Duration::from_millis(2));
        };
        match serde_json::from_slice::<(String, T)>(&message) {
            Ok((step, said)) if step == name => Ok(said),
            _ => Err(Failure::Setup(format!("rank {from} is at another step: are all ranks of the same version?"))),
        }
    }
}

/// What messages begin with here, and in the library do not.
const START: &[u8] = b"[\"";

fn encoded(message: &impl Serialize) -> Vec<u8> {
    // All that is said is plain data.
    serde_json::to_vec(message).unwrap_or_default()
}

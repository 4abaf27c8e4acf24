//! Bytes from rank to rank.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::Error;
use gradclip_mpi::gradclip::processes::ProcessGroup;
use gradclip_mpi::mpi::topology::{Color, SimpleCommunicator};
use gradclip_mpi::mpi::traits::{Communicator, CommunicatorCollectives};

/// From none to more than MPI copies before the receiver has asked.
const LENGTHS: [usize; 6] = [0, 1, 136, 72_064, 3, 8 << 20];

/// The bytes of one message, which no other has.
fn message(from: u32, to: u32, number: usize) -> Vec<u8> {
    let seed = from as usize * 31 + to as usize * 7 + number;
    (0..LENGTHS[number % LENGTHS.len()]).map(|i| (i.wrapping_mul(seed + 1) >> 3) as u8).collect()
}

/// The next message, which comes.
pub(crate) fn receive(group: &MpiGroup, from: u32) -> Vec<u8> {
    let begin = Instant::now();
    loop {
        if let Some(message) = group.try_receive(from).expect("MPI works") {
            return message;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "nothing from rank {from}");
        std::thread::yield_now();
    }
}

/// All ranks have come here. On the communicator of the world, so that a group's own is not touched.
pub(crate) fn barrier() {
    SimpleCommunicator::world().barrier();
}

pub(crate) fn messages_arrive_whole_and_in_order(group: &Arc<MpiGroup>) {
    let me = group.rank();
    let others = || (0..group.size()).filter(|rank| *rank != me);
    // All are sent before any is asked for: a send that waits for its receiver ends here.
    for number in 0..2 * LENGTHS.len() {
        for to in others() {
            group.send(to, &message(me, to, number)).expect("MPI works");
        }
    }
    for number in 0..2 * LENGTHS.len() {
        for from in others() {
            assert!(receive(group, from) == message(from, me, number), "message {number} from rank {from}");
        }
    }
    barrier();
    for from in others() {
        assert_eq!(group.try_receive(from).expect("MPI works"), None, "once");
    }
}

pub(crate) fn groups_do_not_hear_each_other(group: &Arc<MpiGroup>) {
    let other = MpiGroup::new(&SimpleCommunicator::world()).expect("a group");
    assert_eq!((other.rank(), other.size()), (group.rank(), group.size()));
    let (next, before) = ((group.rank() + 1) % group.size(), (group.rank() + group.size() - 1) % group.size());
    group.send(next, b"ours").expect("MPI works");
    other.send(next, b"theirs").expect("MPI works");
    assert_eq!(receive(&other, before), b"theirs");
    assert_eq!(receive(group, before), b"ours");
    // A part of the ranks, with numbers of their own.
    let color = Color::with_value((group.rank() % 2) as i32);
    let half = SimpleCommunicator::world().split_by_color(color).expect("every rank has a colour");
    let half = MpiGroup::new(&half).expect("a group");
    assert_eq!((half.rank(), half.size()), (group.rank() / 2, (group.size() + 1 - group.rank() % 2) / 2));
    for to in (0..half.size()).filter(|to| *to != half.rank()) {
        half.send(to, &group.rank().to_le_bytes()).expect("MPI works");
    }
    for from in (0..half.size()).filter(|from| *from != half.rank()) {
        assert_eq!(receive(&half, from), (2 * from + group.rank() % 2).to_le_bytes());
    }
}

/// A group ends, and later MPI, while messages are on their way, whatever their size.
pub(crate) fn messages_nobody_asked_for(group: &Arc<MpiGroup>) {
    let lost = MpiGroup::new(&SimpleCommunicator::world()).expect("a group");
    for number in 0..LENGTHS.len() {
        let to = (group.rank() + 1) % group.size();
        lost.send(to, &message(group.rank(), to, number)).expect("MPI works");
    }
    drop(lost);
    barrier();
    // MPI may know the next one by the same number.
    let next = MpiGroup::new(&SimpleCommunicator::world()).expect("a group");
    let before = (group.rank() + group.size() - 1) % group.size();
    barrier();
    assert_eq!(next.try_receive(before).expect("MPI works"), None, "what was sent in another group");
    barrier();
}

pub(crate) fn ranks_that_are_not_there(group: &Arc<MpiGroup>) {
    for rank in [group.size(), u32::MAX] {
        for error in [group.send(rank, b"").expect_err("an error"), group.try_receive(rank).expect_err("an error")] {
            let Error::ProcessGroup(why) = error else { panic!("{error:?}") };
            assert!(why.starts_with(&format!("there is no rank {rank}, only ")), "{why}");
        }
    }
}

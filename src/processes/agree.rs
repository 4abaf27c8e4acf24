//! Calls in which ranks agree on something other than partials.

use std::collections::BTreeMap;

use super::ProcessGroup;
use super::exchange::{GroupCall, Kind, Operation};
use super::rows::{join, split};
use crate::error::tensor_label;
use crate::wait::block_on;
use crate::{Error, Tensor};

/// Waits until every rank of the group has called this. It fails on every rank if `ok` is `false` on any. It serves
/// work that all ranks must do or none, such as putting written files in place.
///
/// # Errors
/// [`Error::PeerFailed`] with the first rank where `ok` is `false`; [`Error::ProcessGroup`] if others are out of reach.
pub fn agree(group: &dyn ProcessGroup, ok: bool) -> Result<(), Error> {
    let exchange =
        GroupCall::begin(group).exchange(Operation::of(Kind::Agree), ok, Vec::new(), |low, _| Some(low.to_vec()));
    block_on(exchange.run()).map(|_| ())
}

/// Checks that each named tensor counts exactly once in the group: a tensor that several ranks hold must count on one
/// of them ([`Tensor::replica`]). Use it for debugging, before the first step, because it sends all names. A tensor is
/// known by its name, so slices of one tensor need different names. Tensors without a name are left out.
///
/// # Errors
/// [`Error::Tensor`] on each rank, with the first tensor that does not count once; those of the group.
pub fn check_replicas(group: &dyn ProcessGroup, tensors: &[Tensor<'_>]) -> Result<(), Error> {
    let mut own = Counts::new();
    for tensor in tensors {
        if let Some(name) = tensor.name() {
            let of = Count { times: tensor.spec.counted.into(), len: tensor.len() as u64, alike: true };
            add(&mut own, name.as_bytes(), of);
        }
    }
    let merge = |low: &[u8], high: &[u8]| {
        let mut all = from_bytes(low);
        from_bytes(high).into_iter().for_each(|(name, of)| add(&mut all, name, of));
        Some(to_bytes(&all))
    };
    let exchange = GroupCall::begin(group).exchange(Operation::of(Kind::Check), true, to_bytes(&own), merge);
    let all = block_on(exchange.run())?;
    for (name, Count { times, alike, .. }) in from_bytes(&all) {
        let reason = match (times, alike) {
            (1, true) => continue,
            (_, false) => "ranks hold it with different lengths; slices need names of their own".into(),
            (0, _) => "no rank counts it; leave out replica(true) on one of the ranks that hold it".into(),
            (times, _) => format!("it counts {times} times; call replica(true) on all its ranks but one"),
        };
        return Err(Error::Tensor { tensor: tensor_label(Some(&String::from_utf8_lossy(name)), 0), reason });
    }
    Ok(())
}

/// How often a tensor counts, how long it is, and whether it has the same length on every rank.
#[derive(Clone, Copy)]
struct Count {
    times: u64,
    len: u64,
    alike: bool,
}

/// By name.
type Counts<'n> = BTreeMap<&'n [u8], Count>;

fn add<'n>(counts: &mut Counts<'n>, name: &'n [u8], of: Count) {
    let all = counts.entry(name).or_insert(Count { times: 0, ..of });
    all.times = all.times.saturating_add(of.times);
    all.alike &= of.alike && all.len == of.len;
}

fn to_bytes(counts: &Counts<'_>) -> Vec<u8> {
    let entry = |(name, of): (&&[u8], &Count)| {
        [&of.times.to_le_bytes()[..], &of.len.to_le_bytes(), &[u8::from(of.alike)], name].concat()
    };
    join(&counts.iter().map(entry).collect::<Vec<_>>())
}

fn from_bytes(bytes: &[u8]) -> Counts<'_> {
    fn entry(text: &[u8]) -> Option<(&[u8], Count)> {
        let (times, rest) = text.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (alike, name) = rest.split_first()?;
        let (times, len) = (u64::from_le_bytes(*times), u64::from_le_bytes(*len));
        Some((name, Count { times, len, alike: *alike != 0 }))
    }
    split(bytes).into_iter().filter_map(entry).collect()
}

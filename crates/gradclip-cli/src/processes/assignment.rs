//! Which rank takes which file, and which replica of a tensor counts.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};

use gradclip::NonFiniteElements;
use gradclip_common::header::Entry;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::groups::Groups;
use crate::input::Input;
use crate::norm::file_of;
use crate::selection::{fits, no_such_gradient};

/// The rank of each file. The largest file comes first, and each goes to the rank with the fewest bytes so far.
pub(super) fn owners(sizes: &[u64], ranks: u32) -> Vec<u32> {
    let mut files: Vec<_> = (0..sizes.len()).collect();
    files.sort_by_key(|&i| Reverse(sizes[i]));
    let mut loads: BinaryHeap<_> = (0..ranks).map(|rank| Reverse((0, rank))).collect();
    let mut owners = vec![0; sizes.len()];
    for i in files {
        if let Some(mut least) = loads.peek_mut() {
            let Reverse((bytes, rank)) = &mut *least;
            owners[i] = *rank;
            *bytes += sizes[i];
        }
    }
    owners
}

/// What every rank knows of a file, once its owner has opened it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FileSummary {
    /// Its number among all files.
    pub(super) number: usize,
    pub(super) rank: u32,
    pub(super) bytes: u64,
    /// How many gradients each group takes.
    pub(super) gradients: Vec<usize>,
    /// How many tensors are no gradients, or cannot be clipped.
    pub(super) others: usize,
    /// Those that may be gradients: name and dtype.
    pub(super) unsupported: Vec<(String, String)>,
    /// How many gradients were left out.
    pub(super) left_out: usize,
    /// For each pattern of the selection, whether it fits a gradient.
    pub(super) fitting: Vec<bool>,
    /// The gradients that `--replicated` names.
    pub(super) replicas: Vec<Replica>,
}

/// One of the tensors that are replicas of each other.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Replica {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
}

impl FileSummary {
    pub(super) fn new(
        (number, rank): (usize, u32),
        input: &Input,
        fitting: Vec<bool>,
        groups: &Groups,
        replicated: &[String],
    ) -> Self {
        let is_replicated = |entry: &&Entry| replicated.iter().any(|pattern| fits(&entry.name, pattern));
        let replica = |entry: &Entry| Replica {
            name: entry.name.clone(),
            dtype: entry.kind.to_string(),
            shape: entry.shape.clone(),
        };
        Self {
            number,
            rank,
            bytes: input.bytes(),
            gradients: groups.counts(input.gradients().map(|entry| &*entry.name)),
            others: input.others(),
            unsupported: input.unsupported().collect(),
            left_out: input.left_out(),
            fitting,
            replicas: input.gradients().filter(is_replicated).map(replica).collect(),
        }
    }
}

/// All files, as every rank knows them.
#[derive(Debug)]
pub(super) struct AllFiles<'a> {
    paths: &'a [PathBuf],
    pub(super) opened: Vec<FileSummary>,
    /// The file that counts each replicated tensor: the first that holds it.
    counted_in: HashMap<String, usize>,
}

impl<'a> AllFiles<'a> {
    /// Checks that replicas are alike. A name that fits no tensor is an error, so that nobody relies on it.
    pub(super) fn new(
        paths: &'a [PathBuf],
        mut opened: Vec<FileSummary>,
        replicated: &[String],
    ) -> Result<Self, Failure> {
        opened.sort_by_key(|file| file.number);
        let mut first: HashMap<&str, (usize, &Replica)> = HashMap::new();
        for (file, replica) in opened.iter().flat_map(|file| file.replicas.iter().map(|replica| (file.number, replica)))
        {
            let Replica { name, dtype, shape } = replica;
            let (of, same) = *first.entry(name).or_insert((file, replica));
            if same != replica {
                let there = format!("{} {:?} in {}", same.dtype, same.shape, paths[of].display());
                let problem =
                    format!("tensor {name:?} is {dtype} {shape:?}, but {there}: replicas of one tensor must be alike");
                return Err(Failure::file(&paths[file], problem));
            }
        }
        if let Some(pattern) = replicated.iter().find(|pattern| !first.keys().any(|name| fits(name, pattern))) {
            return Err(no_such_gradient("--replicated", pattern));
        }
        let counted_in = first.into_iter().map(|(name, (file, _))| (name.to_owned(), file)).collect();
        Ok(Self { paths, opened, counted_in })
    }

    /// Whether the tensor of this name counts in the file of this number.
    pub(super) fn counts(&self, name: &str, number: usize) -> bool {
        self.counted_in.get(name).is_none_or(|first| *first == number)
    }

    /// How many tensors are not counted.
    pub(super) fn uncounted(&self) -> usize {
        self.opened.iter().map(|file| file.replicas.len()).sum::<usize>() - self.counted_in.len()
    }

    /// How many tensors are counted.
    pub(super) fn tensors(&self) -> usize {
        self.opened.iter().flat_map(|file| &file.gradients).sum::<usize>() - self.uncounted()
    }

    /// How many gradients each group takes.
    pub(super) fn of_groups(&self, groups: &Groups) -> Vec<usize> {
        let of = |group: usize| self.opened.iter().map(|file| file.gradients[group]).sum();
        (0..groups.clips().count()).map(of).collect()
    }

    /// The file of a non-finite element. Its tensor is numbered in its group.
    pub(super) fn file_of(&self, found: &NonFiniteElements, groups: &Groups) -> Option<&'a Path> {
        let group = groups.of(found.name.as_deref().unwrap_or_default());
        // A group of one rank reports none.
        let rank = found.rank.unwrap_or_default();
        let files: Vec<_> = self.opened.iter().filter(|file| file.rank == rank).collect();
        let file = file_of(found.tensor, files.iter().map(|file| file.gradients[group]))?;
        Some(&self.paths[files[file].number])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_files_are_assigned_first() {
        assert_eq!(owners(&[1, 5, 3, 4, 1], 2), [0, 0, 1, 1, 0]);
        assert_eq!(owners(&[7, 7, 7], 3), [0, 1, 2]);
        assert_eq!(owners(&[7, 7], 4), [0, 1]);
        assert!(owners(&[], 4).is_empty());
        let sizes: Vec<_> = (0..1000).map(|i| 1 + i * 7919 % 4096).collect();
        let mut bytes = [0; 16];
        owners(&sizes, 16).iter().zip(&sizes).for_each(|(owner, size)| bytes[*owner as usize] += size);
        let [least, most] = [bytes.iter().min(), bytes.iter().max()].map(Option::unwrap);
        assert!(most - least <= 64, "{bytes:?}");
    }
}

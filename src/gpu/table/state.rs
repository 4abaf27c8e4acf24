//! Where the state of an optimizer lies: in blocks, each small enough to be bound, by the shapes of parameters alone.

use std::ops::Range;

/// What is kept of each element of a parameter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    /// The number of tensors of float32.
    pub(crate) floats: u64,
    /// Whether remainders of 16 bits follow, two in a word, as the parameters are.
    pub(crate) remainders: bool,
    /// With remainders: whether the parameter begins in the upper half of a word.
    pub(crate) upper: bool,
}

impl Kept {
    /// The words of so many elements from the first or, if these begin a word, from any.
    fn words(self, elements: u64) -> u64 {
        self.floats * elements + if self.remainders { (u64::from(self.upper) + elements).div_ceil(2) } else { 0 }
    }
}

/// Consecutive elements of a parameter whose state lies in one block: one tensor of float32 after another, then the
/// remainders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Portion {
    /// Which parameter, and which of its elements.
    pub(crate) parameter: usize,
    pub(crate) elements: Range<u64>,
    pub(crate) block: usize,
    /// The first word in the block.
    pub(crate) word: u64,
    pub(crate) kept: Kept,
}

impl Portion {
    /// The number of its elements: the distance, in words, from one tensor to the next.
    pub(crate) fn len(&self) -> u64 {
        self.elements.end - self.elements.start
    }

    /// The word of an element in the first tensor.
    pub(crate) fn float_word(&self, element: u64) -> u64 {
        self.word + (element - self.elements.start)
    }

    /// The first word of the remainders.
    pub(crate) fn remainder_word(&self) -> u64 {
        self.word + self.kept.floats * self.len()
    }

    /// The words of the remainders.
    pub(crate) fn remainder_words(&self) -> u64 {
        self.kept.words(self.len()) - self.kept.floats * self.len()
    }
}

/// The state of all parameters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StateLayout {
    /// In the order of the parameters and of their elements.
    pub(crate) portions: Vec<Portion>,
    /// The words of each block.
    pub(crate) blocks: Vec<u64>,
}

impl StateLayout {
    /// Lays out the state of parameters, each of so many elements, in blocks of at most so many words.
    pub(crate) fn new(parameters: &[(u64, Kept)], most: u64) -> Self {
        let mut layout = Self { portions: Vec::new(), blocks: vec![0] };
        for (parameter, (len, kept)) in parameters.iter().enumerate() {
            // At most a word and a half for each element beyond the floats; whole words of remainders.
            let fitting = (most.saturating_sub(2) / (kept.floats + u64::from(kept.remainders)).max(1)).max(2) & !1;
            let mut from = 0;
            while from < *len {
                // A parameter that begins in an upper half ends its first portion with a whole word.
                let skip = u64::from(from == 0 && kept.upper);
                let to = if kept.words(*len) <= most { *len } else { (from + fitting - skip).min(*len) };
                let kept = Kept { upper: from == 0 && kept.upper, ..*kept };
                let words = kept.words(to - from);
                if layout.blocks.last().is_some_and(|used| used + words > most && *used > 0) {
                    layout.blocks.push(0);
                }
                let block = layout.blocks.len() - 1;
                let word = layout.blocks[block];
                layout.blocks[block] += words;
                layout.portions.push(Portion { parameter, elements: from..to, block, word, kept });
                from = to;
            }
        }
        layout
    }

    /// The portions of a parameter.
    pub(crate) fn of(&self, parameter: usize) -> &[Portion] {
        let first = self.portions.partition_point(|portion| portion.parameter < parameter);
        let end = self.portions.partition_point(|portion| portion.parameter <= parameter);
        &self.portions[first..end]
    }
}

// Stands in the place of `counted_losses` without COUNTS.

#import outcome
#import chunk

fn lose_word(before: u32, after: u32, run: Run, chunk: Chunk, i: u32, low: Outcome, high: Outcome) {}

fn add_losses() {}

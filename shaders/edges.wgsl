// edges: scales or clamps in words that hold an element of half precision and something else. One invocation a word
// writes both halves at once, so that no two invocations ever write the same word.

#import constants
#import group
#import partial
#import windows
#import apply

struct Edge {
    word: u32,
    // The segment of the lower and of the upper element; NOWHERE if it is not ours.
    low: u32,
    high: u32,
    // The dtype of the lower element, and of the upper one times 256.
    dtypes: u32,
    window: u32,
}

@group(1) @binding(0) var<storage, read> edges: array<Edge>;

fn half_of(half: u32, segment: u32, dtype: u32) -> u32 {
    if segment == NOWHERE {
        return half;
    }
    return applied_half(half, dtype, outcome_of(segment));
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let row = lane + index_of(group) * WORKGROUP;
    if row >= arrayLength(&edges) {
        return;
    }
    let edge = edges[row];
    let word = word_at(edge.window, edge.word);
    let low = half_of(word & 0xffffu, edge.low, edge.dtypes & 0xffu);
    let high = half_of(word >> 16u, edge.high, edge.dtypes >> 8u);
    let result = low | (high << 16u);
    if result != word {
        set_word(edge.window, edge.word, result);
    }
}

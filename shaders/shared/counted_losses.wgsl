// Counts the elements that a clip makes 0 or infinite only because products are rounded. Twin: src/cpu/lost.rs. Without
// COUNTS, `no_losses` stands in its place.

#import constants
#import number
#import outcome
#import half
#import chunk

// Of the group of tensors: how many became 0, and how many infinite; each as low and high word.
@group(1) @binding(LOSSES) var<storage, read_write> losses: array<atomic<u32>, 4>;

// Those of the invocation.
var<private> lost: array<u32, 2>;

// Takes an element, as float32 bits before and after. An element that is a subnormal float32 before does not count. No
// float16 is one.
fn lose(before: u32, after: u32, outcome: Outcome) {
    let magnitude = before & MAGNITUDE;
    let multiplied = outcome.action == APPLY && outcome.factor.exact.mantissa != 0u;
    if !multiplied || magnitude < SMALLEST_NORMAL || magnitude >= INFINITE {
        return;
    }
    var to_zero = (after & MAGNITUDE) == 0u;
    var to_infinity = (after & MAGNITUDE) == INFINITE;
    if VALUE {
        // A bound that is 0 or infinite itself loses nothing.
        let negative = (before & SIGN) != 0u;
        let bound = select(params.max[DTYPE], params.min[DTYPE], negative);
        to_zero = to_zero && (bound & MAGNITUDE) != 0u && ((bound & SIGN) != 0u) == negative;
        to_infinity = to_infinity && params.min[DTYPE] != params.max[DTYPE];
    }
    lost[0] += select(0u, 1u, to_zero);
    lost[1] += select(0u, 1u, to_infinity);
}

// Takes word `i` of the run before and after. The first and the last word may hold an element that is not the chunk's.
fn lose_word(before: u32, after: u32, run: Run, chunk: Chunk, i: u32, low: Outcome, high: Outcome) {
    if DTYPE == DTYPE_F32 {
        lose(before, after, low);
        return;
    }
    if 2u * i >= run.skip {
        lose(widened(DTYPE, before & 0xffffu), widened(DTYPE, after & 0xffffu), low);
    }
    if 2u * i + 1u < run.skip + chunk.elements {
        lose(widened(DTYPE, before >> 16u), widened(DTYPE, after >> 16u), high);
    }
}

// Adds what the invocation has lost.
fn add_losses() {
    for (var k = 0u; k < 2u; k += 1u) {
        if lost[k] == 0u {
            continue;
        }
        let before = atomicAdd(&losses[2u * k], lost[k]);
        if before + lost[k] < before {
            atomicAdd(&losses[2u * k + 1u], 1u);
        }
    }
}

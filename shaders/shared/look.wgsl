// What a value clip reports of its elements: which are not finite, and whether one lies outside its bounds.

#import constants
#import number
#import partial
#import outcome
#import half
#import chunk
#import apply

// What the invocation has found.
var<private> partial: Partial;

fn found(outside: bool) {
    partial.flags |= select(0u, OUTSIDE, outside);
}

fn look(bits: u32, chunk: Chunk, element: u32) {
    let magnitude = bits & MAGNITUDE;
    var value = bits;
    if magnitude >= INFINITE {
        partial = with_non_finite(partial, magnitude, chunk.origin, chunk.origin_element + element);
        if params.policy == POLICY_DROP {
            return;
        }
    } else {
        value = scaled(bits, unscale());
    }
    found(clamped(value, DTYPE) != value);
}

// The first and the last word may hold an element that is not the chunk's and must not be counted.
fn look_at_word(word: u32, run: Run, chunk: Chunk, i: u32) {
    if DTYPE == DTYPE_F32 {
        look(word, chunk, i);
        return;
    }
    if 2u * i >= run.skip {
        look(widened(DTYPE, word & 0xffffu), chunk, 2u * i - run.skip);
    }
    if 2u * i + 1u < run.skip + chunk.elements {
        look(widened(DTYPE, word >> 16u), chunk, 2u * i + 1u - run.skip);
    }
}

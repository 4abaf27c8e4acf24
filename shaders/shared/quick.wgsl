// Applies an outcome to one element in plain float32 arithmetic, and tells whether that suffices.

#import constants
#import number
#import half
#import apply

// The largest magnitude of a block's elements and results, and the smallest of the results of elements that are not 0.
var<private> largest: u32;
var<private> smallest: u32;
// Whether one of them lies outside the bounds of a value clip.
var<private> outside: bool;

fn begin_block() {
    largest = 0u;
    smallest = INFINITE;
    outside = false;
}

// Whether some element needs more than a float32 product: `applied` then decides. A driver may flush subnormals, and
// need not produce infinities.
fn is_unusual() -> bool {
    return largest >= INFINITE || smallest < SMALLEST_NORMAL;
}

// `applied` where the outcome is APPLY, the factor is a float32 and nothing is unusual.
fn quickly_applied(bits: u32, factor: f32) -> u32 {
    let product = bitcast<u32>(bitcast<f32>(bits) * factor);
    let magnitude = bits & MAGNITUDE;
    let size = product & MAGNITUDE;
    largest = max(largest, max(magnitude, size));
    smallest = min(smallest, select(size, INFINITE, magnitude == 0u));
    if VALUE {
        let bounded = clamped(product, DTYPE);
        outside |= bounded != product;
        return bounded;
    }
    return product;
}

fn quickly_applied_word(word: u32, factor: f32) -> u32 {
    if DTYPE == DTYPE_F32 {
        return quickly_applied(word, factor);
    }
    let low = quickly_applied(widened(DTYPE, word & 0xffffu), factor);
    let high = quickly_applied(widened(DTYPE, word >> 16u), factor);
    return narrowed(DTYPE, low) | (narrowed(DTYPE, high) << 16u);
}

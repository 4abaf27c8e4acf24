// Clamps whole words to the bounds of a value clip by their bits, without any conversion.

#import constants
#import outcome
#import half
#import quick

// The bounds of elements above and below 0, as magnitudes with their sign bits set.
struct Bounds {
    above: u32,
    below: u32,
}

fn bounds() -> Bounds {
    let above = EACH * narrowed_bound(params.max[DTYPE]);
    let below = EACH * narrowed_bound(params.min[DTYPE]);
    return Bounds(SIGNS | above, SIGNS | below);
}

// The magnitude of a bound, which is an element of this dtype, in its own format.
fn narrowed_bound(bound: u32) -> u32 {
    let magnitude = bound & MAGNITUDE;
    if DTYPE == DTYPE_F32 {
        return magnitude;
    }
    return narrowed(DTYPE, magnitude);
}

// Software devices clamp float32 faster as numbers (benches/records/2026-11-29-epyc-software-kernels.md).
const NEVER_BY_BITS: bool = DTYPE == DTYPE_F32 && CONTIGUOUS;

// Whether bits suffice: nothing is multiplied, and 0 lies between the bounds, so that each belongs to one sign.
fn is_by_bits(factor: u32) -> bool {
    let below = params.min[DTYPE] > SIGN;
    let above = params.max[DTYPE] > 0u && params.max[DTYPE] < SIGN;
    return !NEVER_BY_BITS && factor == ONE && below && above;
}

fn clamped_word(word: u32, bounds: Bounds) -> u32 {
    let magnitudes = word & ~SIGNS;
    let signs = word & SIGNS;
    unusual |= magnitudes + reaching(TOP);
    // All bits of negative elements but their signs.
    let negative = signs - (signs >> (BITS - 1u));
    let bound = (bounds.above & ~negative) | (bounds.below & negative);
    // The sign bit stays where the element is within its bound.
    let within = bound - magnitudes;
    inside &= within;
    let beyond = ~within & SIGNS;
    let replaced = beyond - (beyond >> (BITS - 1u));
    return signs | (magnitudes & ~replaced) | (bound & replaced);
}

fn clamped_quad(quad: vec4<u32>, to: Bounds) -> vec4<u32> {
    return vec4<u32>(clamped_word(quad.x, to), clamped_word(quad.y, to), clamped_word(quad.z, to), clamped_word(quad.w, to));
}

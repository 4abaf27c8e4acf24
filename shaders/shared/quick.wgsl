// Applies an outcome to whole words in plain arithmetic, and tells whether that suffices. What tests or clamps an element
// of float32 by its 31 bits does so to both halves of a word at once, by their 15 bits: the sign bits are free, and
// catch what a sum carries.

#import constants
#import number
#import half
#import pair
#import apply

// The sign bits of a word's elements, and what turns the bits of one element into those of all.
const SIGNS: u32 = select(0x80008000u, SIGN, DTYPE == DTYPE_F32);
const EACH: u32 = select(0x10001u, 1u, DTYPE == DTYPE_F32);
// Bits in an element, and before its exponent.
const BITS: u32 = select(16u, 32u, DTYPE == DTYPE_F32);
const FRACTION: u32 = select(select(7u, 10u, DTYPE == DTYPE_F16), 23u, DTYPE == DTYPE_F32);
// The exponent of what is not finite.
const TOP: u32 = select(255u, 31u, DTYPE == DTYPE_F16);

// Sets sign bits where an element of the block needs more than plain arithmetic: `applied` then decides.
var<private> unusual: u32;
// Clears sign bits where an element of the block lies outside the bounds of a value clip.
var<private> inside: u32;

fn begin_block() {
    unusual = 0u;
    inside = SIGNS;
}

fn is_unusual() -> bool {
    return (unusual & SIGNS) != 0u;
}

fn is_outside() -> bool {
    return (inside & SIGNS) != SIGNS;
}

// What sets the sign bit of a magnitude with this exponent, or a larger one, if it is added.
fn reaching(exponent: u32) -> u32 {
    return SIGNS - EACH * (exponent << FRACTION);
}

// Which elements can be multiplied plainly: those that are 0 or have an exponent from `lowest` to below `beyond`.
struct Plain {
    factor: f32,
    reaching_lowest: u32,
    reaching_beyond: u32,
}

// A driver may flush float32s below the normal ones, and need not produce infinities. So neither element nor product
// may be either. With exponents a and b, biased by 127, the product is at least 2^(a + b - 254) and below
// 2^(a + b - 252). Products of float16 are within float32's range if the factor is from 2^-101 to 2^101; but their
// conversion must not overflow either, so they stay below 2^15, unless the factor is at most 1. With COUNTS
// plain products lose nothing: float16 has nothing below 2^-24, and bfloat16 rounds the largest products to infinity.
fn plain(factor: u32) -> Plain {
    let exponent = i32(factor >> 23u);
    var lowest = max(128 - exponent, 1);
    var beyond = min(select(381, 380, COUNTS) - exponent, 255);
    if DTYPE == DTYPE_F16 {
        lowest = select(0, clamp(118 - exponent, 1, 31), COUNTS && factor < ONE);
        beyond = select(clamp(156 - exponent, 0, 31), 31, factor <= ONE);
        beyond = select(beyond, 0, exponent < 26);
    }
    // The factor 0 is exact only in `applied`.
    beyond = select(beyond, 0, exponent == 0 || !NATIVE_PRODUCTS);
    return Plain(bitcast<f32>(factor), reaching(u32(lowest)), reaching(u32(beyond)));
}

// The bits of a float32 within the bounds of a value clip.
fn bounded(bits: u32) -> u32 {
    if VALUE {
        let within = clamped(bits, DTYPE);
        inside &= select(SIGNS, 0u, within != bits);
        return within;
    }
    return bits;
}

// A word times a factor, and clamped.
fn multiplied(word: u32, by: Plain) -> u32 {
    let magnitudes = word & ~SIGNS;
    unusual |= magnitudes + by.reaching_beyond;
    if DTYPE != DTYPE_F16 || COUNTS {
        unusual |= (magnitudes + ~SIGNS) & ~(magnitudes + by.reaching_lowest);
    }
    if DTYPE == DTYPE_F32 {
        return bounded(bitcast<u32>(bitcast<f32>(word) * by.factor));
    }
    let product = widened_pair(word) * by.factor;
    let low = bounded(bitcast<u32>(product.x));
    let high = bounded(bitcast<u32>(product.y));
    return narrowed_pair(vec2<f32>(bitcast<f32>(low), bitcast<f32>(high)));
}

fn multiplied_quad(quad: vec4<u32>, by: Plain) -> vec4<u32> {
    return vec4<u32>(multiplied(quad.x, by), multiplied(quad.y, by), multiplied(quad.z, by), multiplied(quad.w, by));
}

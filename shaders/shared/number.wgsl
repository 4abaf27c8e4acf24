// Numbers with a 32-bit mantissa and an exponent of their own: mantissa * 2^exponent, with the mantissa's top bit set
// unless the number is 0. Sums and norms live in them, because neither 1e20 squared nor 1e-25 squared is a float32.
// Integers decide all of it, so every driver computes the same, however it contracts, reassociates or flushes floats.

struct Number {
    mantissa: u32,
    exponent: i32,
}

const ZERO_NUMBER = Number(0u, 0);

const SIGN: u32 = 0x80000000u;
const MAGNITUDE: u32 = 0x7fffffffu;
const INFINITE: u32 = 0x7f800000u;
const QUIET_NAN: u32 = 0x7fc00000u;
const SMALLEST_NORMAL: u32 = 0x00800000u;
const ONE: u32 = 0x3f800000u;

fn normalised(mantissa: u32, exponent: i32) -> Number {
    if mantissa == 0u {
        return ZERO_NUMBER;
    }
    let shift = countLeadingZeros(mantissa);
    return Number(mantissa << shift, exponent - i32(shift));
}

// The number in the bits of a finite float32 without its sign.
fn number_of(magnitude: u32) -> Number {
    let biased = magnitude >> 23u;
    let fraction = magnitude & 0x007fffffu;
    if biased == 0u {
        return normalised(fraction, -149);
    }
    return Number((fraction | SMALLEST_NORMAL) << 8u, i32(biased) - 158);
}

// Below the exponent of every number.
const LOWEST: i32 = -0x40000000;

// a + b, rounded to 32 bits. Without branches, which would cost more than what they spare.
fn add(a: Number, b: Number) -> Number {
    let of_a = select(a.exponent, LOWEST, a.mantissa == 0u);
    let of_b = select(b.exponent, LOWEST, b.mantissa == 0u);
    let high = select(b.mantissa, a.mantissa, of_a >= of_b);
    let low = select(a.mantissa, b.mantissa, of_a >= of_b);
    let exponent = max(of_a, of_b);
    let shift = u32(exponent - min(of_a, of_b));
    // To one bit more than is kept, for rounding.
    let shifted = low >> (min(shift, 31u) - min(shift, 1u));
    let rounded = select((shifted >> 1u) + (shifted & 1u), 0u, shift > 31u);
    let sum = high + select(rounded, low, shift == 0u);
    let carried = sum < high;
    let mantissa = select(sum, (sum >> 1u) | SIGN, carried);
    return Number(mantissa, select(exponent + select(0, 1, carried), 0, mantissa == 0u));
}

fn less(a: Number, b: Number) -> bool {
    if a.mantissa == 0u || b.mantissa == 0u {
        return a.mantissa < b.mantissa;
    }
    return a.exponent < b.exponent || (a.exponent == b.exponent && a.mantissa < b.mantissa);
}

// a * b as (low, high).
fn wide_product(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    let high = (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
    return vec2<u32>((other << 16u) | (low & 0xffffu), high);
}

// a * b, truncated to 32 bits; so a number times 1 is itself.
fn multiply(a: Number, b: Number) -> Number {
    if a.mantissa == 0u || b.mantissa == 0u {
        return ZERO_NUMBER;
    }
    let product = wide_product(a.mantissa, b.mantissa);
    let exponent = a.exponent + b.exponent + 32;
    if (product.y & SIGN) != 0u {
        return Number(product.y, exponent);
    }
    return Number((product.y << 1u) | (product.x >> 31u), exponent - 1);
}

fn squared(a: Number) -> Number {
    return multiply(a, a);
}

// |a - b|
fn distance(a: Number, b: Number) -> Number {
    var high = a;
    var low = b;
    if less(a, b) {
        high = b;
        low = a;
    }
    if low.mantissa == 0u {
        return high;
    }
    let shift = u32(high.exponent - low.exponent);
    if shift > 31u {
        return high;
    }
    return normalised(high.mantissa - (low.mantissa >> shift), high.exponent);
}

// a - b of 64 bits each, as a rough float.
fn rough_difference(a: vec2<u32>, b: vec2<u32>) -> f32 {
    let high = a.y - b.y - select(0u, 1u, a.x < b.x);
    return f32(bitcast<i32>(high)) * 4294967296.0 + f32(a.x - b.x);
}

fn exceeds(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y > b.y || (a.y == b.y && a.x > b.x);
}

// `near` moved by `step`, and a little up: never below the number that floats have approached, which has its top bit set.
fn above(near: u32, step: f32) -> u32 {
    let moved = near + bitcast<u32>(i32(floor(step))) + 2u;
    return select(0xffffffffu, moved, moved >= SIGN);
}

// The largest float below 2^32.
const MOST: f32 = 4294967040.0;

// a / b for b > 0, truncated to 32 bits. Floats find it nearly; integers make it exact, however a device rounds floats.
fn divide(a: Number, b: Number) -> Number {
    if a.mantissa == 0u {
        return ZERO_NUMBER;
    }
    let smaller = a.mantissa < b.mantissa;
    let exponent = a.exponent - b.exponent - select(31, 32, smaller);
    let dividend = select(vec2<u32>(a.mantissa << 31u, a.mantissa >> 1u), vec2<u32>(0u, a.mantissa), smaller);
    let divisor = f32(b.mantissa);
    let near = u32(min(f32(dividend.y) / divisor * 4294967296.0, MOST));
    var quotient = above(near, rough_difference(dividend, wide_product(near, b.mantissa)) / divisor);
    while exceeds(wide_product(quotient, b.mantissa), dividend) {
        quotient -= 1u;
    }
    return Number(quotient, exponent);
}

// The square root, truncated to 32 bits: the largest root whose square is not above the 64-bit radicand. By a step of
// Newton's, which does not fall below the root, from a root by floats.
fn square_root(a: Number) -> Number {
    if a.mantissa == 0u {
        return ZERO_NUMBER;
    }
    // (low, high), scaled so that the exponent is even.
    var radicand = vec2<u32>(0u, a.mantissa);
    var exponent = a.exponent - 32;
    if (exponent & 1) != 0 {
        radicand = vec2<u32>(a.mantissa << 31u, a.mantissa >> 1u);
        exponent += 1;
    }
    let near = u32(min(sqrt(f32(radicand.y)) * 65536.0, MOST));
    var root = above(near, rough_difference(radicand, wide_product(near, near)) / (2.0 * f32(near)));
    while exceeds(wide_product(root, root), radicand) {
        root -= 1u;
    }
    return Number(root, exponent / 2);
}

// The float32, rounded to nearest even and gradually below the normal range, of a mantissa with its top bit set,
// an exponent, and whether anything below the mantissa is lost.
fn rounded(mantissa: u32, exponent: i32, rest: bool) -> u32 {
    let biased = exponent + 158;
    if biased >= 255 {
        return INFINITE;
    }
    var shift = 8u;
    if biased < 1 {
        shift = 9u + u32(-biased);
    }
    if shift > 32u {
        return 0u;
    }
    var kept = 0u;
    var lost = mantissa;
    if shift < 32u {
        kept = mantissa >> shift;
        lost = mantissa << (32u - shift);
    }
    let up = lost > SIGN || (lost == SIGN && (rest || (kept & 1u) == 1u));
    // `kept` holds the leading bit, which adds 1 to the exponent field; so does a carry out of rounding.
    return (u32(max(biased, 1) - 1) << 23u) + kept + select(0u, 1u, up);
}

fn float_of(a: Number) -> u32 {
    if a.mantissa == 0u {
        return 0u;
    }
    return rounded(a.mantissa, a.exponent, false);
}

// The float32 nearest to the product of a finite float32 without its sign and a number.
fn exact_product(magnitude: u32, factor: Number) -> u32 {
    if magnitude == 0u || factor.mantissa == 0u {
        return 0u;
    }
    let x = number_of(magnitude);
    var product = wide_product(x.mantissa, factor.mantissa);
    var exponent = x.exponent + factor.exponent + 32;
    if (product.y & SIGN) == 0u {
        product = vec2<u32>(product.x << 1u, (product.y << 1u) | (product.x >> 31u));
        exponent -= 1;
    }
    return rounded(product.y, exponent, product.x != 0u);
}

// Above every norm: the exponent leaves room for products.
const UNBOUNDED = Number(0xffffffffu, 0x20000000);

fn is_bounded(a: Number) -> bool {
    return a.mantissa == 0u || a.exponent < UNBOUNDED.exponent / 2;
}

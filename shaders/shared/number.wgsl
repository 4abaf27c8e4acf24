// Numbers with a 32-bit mantissa and an exponent of their own: mantissa * 2^exponent, with the mantissa's top bit set
// unless the number is 0. Sums and norms live in them, because neither 1e20 squared nor 1e-25 squared is a float32.
// All of it is integer arithmetic, so every driver computes the same and none may contract, reassociate or flush it.

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

// a + b, rounded to 32 bits.
fn add(a: Number, b: Number) -> Number {
    if a.mantissa == 0u {
        return b;
    }
    if b.mantissa == 0u {
        return a;
    }
    var high = a;
    var low = b;
    if a.exponent < b.exponent {
        high = b;
        low = a;
    }
    let shift = u32(high.exponent - low.exponent);
    if shift > 31u {
        return high;
    }
    var addend = low.mantissa >> shift;
    if shift > 0u {
        addend += (low.mantissa >> (shift - 1u)) & 1u;
    }
    let sum = high.mantissa + addend;
    if sum < high.mantissa {
        return Number((sum >> 1u) | SIGN, high.exponent + 1);
    }
    return Number(sum, high.exponent);
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

// a / b for b > 0, by long division; truncated to 32 bits.
fn divide(a: Number, b: Number) -> Number {
    if a.mantissa == 0u {
        return ZERO_NUMBER;
    }
    var exponent = a.exponent - b.exponent - 31;
    var remainder = a.mantissa;
    var carry = false;
    if remainder < b.mantissa {
        carry = true;
        remainder = remainder << 1u;
        exponent -= 1;
    }
    var quotient = 0u;
    for (var bit = 0; bit < 32; bit += 1) {
        quotient = quotient << 1u;
        if carry || remainder >= b.mantissa {
            remainder -= b.mantissa;
            quotient |= 1u;
        }
        carry = (remainder & SIGN) != 0u;
        remainder = remainder << 1u;
    }
    return Number(quotient, exponent);
}

// The square root, truncated to 32 bits: the largest root whose square is not above the 64-bit radicand.
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
    var root = 0u;
    for (var bit = 31; bit >= 0; bit -= 1) {
        let candidate = root | (1u << u32(bit));
        let square = wide_product(candidate, candidate);
        if square.y < radicand.y || (square.y == radicand.y && square.x <= radicand.x) {
            root = candidate;
        }
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

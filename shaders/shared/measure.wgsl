// Measures 16 elements at a time. If their largest is neither huge nor tiny, they are summed as they are: no square
// overflows, and what is flushed to 0 is below 2^-34 of the sum. Any others are taken again, in units of the power of
// two of their largest, into a Number. Elements that are not finite, or too small even for that, are taken one by one.
//
// Sixteen elements are summed as a tree. At most 14 trees are summed one after another in float32 (12 of whole blocks,
// 2 of words outside), and those sums in a Number. So the longest chain of float32 roundings is short whatever the
// length. A driver may contract a tree, and some make it a chain of fused multiplications and additions. So each order
// counts: of 16 squares a square is rounded at most 16 times, by its product and 15 additions or by 16 fused ones, and
// then the sum at most 14 times. That is 30 units of 2^-24 in the sum and half of that in the norm: 9.0e-7 at worst. (As
// a tree it is 1 + 4 + 14: 5.7e-7.) The running sum is added to whole trees: to carry it through one would be less
// accurate than what is written, which WGSL forbids. The L1 norm is the sum itself, without products to contract: 8
// trees of whole blocks, 4 + 10 units, 8.3e-7 at worst.

#import constants
#import number
#import partial
#import outcome
#import chunk
#import power

const SUMS: bool = NORM != NORM_INF;
// How many trees of whole blocks follow one another in float32.
const TREES_IN_FLOAT: u32 = select(12u, 8u, NORM == NORM_L1);
// Powers have a range of their own, and are always taken again.
const PLAIN_FROM: u32 = select(0x13800000u, 0x29800000u, NORM == NORM_L2); // 2^-88; 2^-44
const PLAIN_TO: u32 = select(select(0x71800000u, 0x58800000u, NORM == NORM_L2), INFINITE, !SUMS); // 2^100; 2^50
// If the largest exponent is below that of 2^-100, subnormals matter. Float arithmetic may flush them, so these are
// summed in Numbers.
const TINY_EXPONENT: u32 = 27u;
const HAS_TINY: bool = NORM == NORM_L1 || NORM == NORM_L2;

// The float32 sum since the last `settle`.
var<private> sum: f32;
var<private> partial: Partial;
// Whether the elements of the block at hand are too small even for a sum in their own unit.
var<private> tiny: bool;

fn begin() {
    sum = 0.0;
    partial = EMPTY_PARTIAL;
}

// Adds the float32 sum to the partial's.
fn settle() {
    partial.sum = add(partial.sum, number_of(bitcast<u32>(sum)));
    sum = 0.0;
}

fn power_of_two(k: i32) -> f32 {
    return select(bitcast<f32>(u32(127 + k) << 23u), 0.0, k < -126);
}

// |x|^p in units of 2^unit, where unit is that of the largest element.
fn powered(magnitude: u32, unit: i32) -> f32 {
    let term = power_of_float(max(magnitude, 1u), number(params.power));
    // At most 1, because the largest element has the unit's power, or one more if its rest was rounded up to 2.
    let k = max(term.whole - unit, -127);
    return select(0.0, term.rest * power_of_two(k), magnitude > 0u);
}

fn sum_of_4(magnitudes: vec4<u32>) -> f32 {
    let x = bitcast<vec4<f32>>(magnitudes);
    if NORM == NORM_L2 {
        return (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
    }
    return (x.x + x.y) + (x.z + x.w);
}

fn sum_of(x: Sixteen) -> f32 {
    return (sum_of_4(x.a) + sum_of_4(x.b)) + (sum_of_4(x.c) + sum_of_4(x.d));
}

// Elements in units of 2^(exponent - 128), all below 4, because a driver may turn a sum of products into a product of
// the sum, which overflows. They are moved by their exponent bits. What would become subnormal is below 2^-127 of the
// largest, and becomes 0.
fn in_unit_4(magnitudes: vec4<u32>, exponent: u32) -> vec4<u32> {
    let moved = magnitudes + vec4<u32>((128u - exponent) << 23u);
    let smallest = vec4<u32>((max(exponent, 128u) - 127u) << 23u);
    return select(vec4<u32>(0u), moved, magnitudes >= smallest);
}

fn powered_4(x: vec4<u32>, unit: i32) -> f32 {
    return (powered(x.x, unit) + powered(x.y, unit)) + (powered(x.z, unit) + powered(x.w, unit));
}

fn largest_of(x: Sixteen) -> u32 {
    let top = max(max(x.a, x.b), max(x.c, x.d));
    return max(max(top.x, top.y), max(top.z, top.w));
}

fn only_finite_4(magnitudes: vec4<u32>) -> vec4<u32> {
    return select(magnitudes, vec4<u32>(0u), magnitudes >= vec4<u32>(INFINITE));
}

// Takes 16 magnitudes, or returns true if `take_again` must take them, as it must those that are not known to be right.
fn take(x: Sixteen, known: bool) -> bool {
    if NORM == NORM_P {
        return true;
    }
    let top = largest_of(x);
    let plain = known && top < PLAIN_TO && (top >= PLAIN_FROM || !SUMS);
    if plain {
        partial.max = max(partial.max, top);
        if SUMS {
            sum += sum_of(x);
        }
    }
    return !plain && (top > 0u || !known);
}

// Takes 16 magnitudes of any size. Returns true if `take_one` must take each of them as well.
fn take_again(x: Sixteen) -> bool {
    let finite = Sixteen(only_finite_4(x.a), only_finite_4(x.b), only_finite_4(x.c), only_finite_4(x.d));
    let top = largest_of(finite);
    partial.max = max(partial.max, top);
    let exponent = max(top >> 23u, 1u);
    tiny = HAS_TINY && exponent < TINY_EXPONENT;
    var own = 0.0;
    var unit = 0;
    if NORM == NORM_P {
        unit = power_of_float(max(top, 1u), number(params.power)).whole;
        own = (powered_4(finite.a, unit) + powered_4(finite.b, unit))
            + (powered_4(finite.c, unit) + powered_4(finite.d, unit));
    } else if SUMS && !tiny {
        unit = select(1, 2, NORM == NORM_L2) * (i32(exponent) - 128);
        own = sum_of(Sixteen(
            in_unit_4(finite.a, exponent),
            in_unit_4(finite.b, exponent),
            in_unit_4(finite.c, exponent),
            in_unit_4(finite.d, exponent),
        ));
    }
    let number = number_of(bitcast<u32>(own));
    if number.mantissa != 0u {
        partial.sum = add(partial.sum, Number(number.mantissa, number.exponent + unit));
    }
    return largest_of(x) >= INFINITE || (tiny && top > 0u);
}

// Takes one of 16 elements that are taken one by one, `element` elements from `origin`.
fn take_one(magnitude: u32, origin: u32, element: u32) {
    if magnitude >= INFINITE {
        partial = with_non_finite(partial, magnitude, origin, element);
    } else if tiny {
        let x = number_of(magnitude);
        if NORM == NORM_L2 {
            partial.sum = add(partial.sum, squared(x));
        } else {
            partial.sum = add(partial.sum, x);
        }
    }
}

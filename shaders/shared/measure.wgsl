// Measuring 16 elements at a time. Elements are scaled by the power of two of the largest met so far, so that no square
// overflows and none that matters underflows. Sixteens with non-finite elements, or with none but tiny ones, are taken
// a second time, element by element.
//
// Sixteen elements are summed as a tree, at most 16 trees one after another in float32, and what they add up to in a
// Number. So the longest chain of float32 roundings is short whatever the length: 1 (square) + 4 (tree) + 16 units of
// 2^-24 in the sum, half of that in the norm: 6.3e-7 at worst.

// Where the largest exponent so far is below that of 2^-100, subnormals matter, which float arithmetic may flush:
// such elements are summed in Numbers. Powers have a range of their own.
const TINY_EXPONENT: u32 = 27u;
const SUMS: bool = NORM != NORM_INF;
const HAS_TINY: bool = NORM == NORM_L1 || NORM == NORM_L2;

// The float32 sum since the last `settle`, in units of 2^(exponent - 128), squared for L2, of 2^power for p-norms.
var<private> sum: f32;
// The biased exponent of the largest element so far; at least 1.
var<private> exponent: u32;
// That of the largest |x|^p so far.
var<private> power: i32;
var<private> partial: Partial;

fn begin() {
    sum = 0.0;
    exponent = 1u;
    power = -0x40000000;
    partial = EMPTY_PARTIAL;
}

fn power_of_two(k: i32) -> f32 {
    return select(bitcast<f32>(u32(127 + k) << 23u), 0.0, k < -126);
}

// Adds the float32 sum to the partial's.
fn settle() {
    let settled = number_of(bitcast<u32>(sum));
    if settled.mantissa != 0u {
        let unit = i32(exponent) - 128;
        let units = select(select(unit, 2 * unit, NORM == NORM_L2), power, NORM == NORM_P);
        partial.sum = add(partial.sum, Number(settled.mantissa, settled.exponent + units));
    }
    sum = 0.0;
}

// Raises the unit to that of `top`, the largest of the next elements.
fn raise(top: u32) {
    if NORM == NORM_P {
        let whole = power_of_float(max(top, 1u), number(params.power)).whole;
        let raised = max(power, select(power, whole, top > 0u));
        sum *= power_of_two(max(power - raised, -127));
        power = raised;
        return;
    }
    let raised = max(exponent, top >> 23u);
    let k = i32(exponent) - i32(raised);
    sum *= power_of_two(select(k, 2 * k, NORM == NORM_L2));
    exponent = raised;
}

// |x|^p in its unit.
fn powered(magnitude: u32) -> f32 {
    let term = power_of_float(max(magnitude, 1u), number(params.power));
    // At most 1, because the largest element has the unit's power, or one more where its rest was rounded up to 2.
    let k = max(term.whole - power, -127);
    return select(0.0, term.rest * power_of_two(k), magnitude > 0u);
}

// Elements in the unit, all below 4, by their exponent bits: a driver may turn a sum of products into a product of the
// sum, which overflows. What would become subnormal is below 2^-127 of the largest, and 0.
fn sum_of_4(magnitudes: vec4<u32>) -> f32 {
    if NORM == NORM_P {
        return (powered(magnitudes.x) + powered(magnitudes.y)) + (powered(magnitudes.z) + powered(magnitudes.w));
    }
    let moved = magnitudes + vec4<u32>((128u - exponent) << 23u);
    let smallest = vec4<u32>((max(exponent, 128u) - 127u) << 23u);
    let x = bitcast<vec4<f32>>(select(vec4<u32>(0u), moved, magnitudes >= smallest));
    if NORM == NORM_L2 {
        return (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
    }
    return (x.x + x.y) + (x.z + x.w);
}

// The magnitudes of 16 elements.
struct Sixteen {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

fn sum_of(x: Sixteen) -> f32 {
    return (sum_of_4(x.a) + sum_of_4(x.b)) + (sum_of_4(x.c) + sum_of_4(x.d));
}

fn largest_of(x: Sixteen) -> u32 {
    let top = max(max(x.a, x.b), max(x.c, x.d));
    return max(max(top.x, top.y), max(top.z, top.w));
}

fn only_finite_4(magnitudes: vec4<u32>) -> vec4<u32> {
    return select(magnitudes, vec4<u32>(0u), magnitudes >= vec4<u32>(INFINITE));
}

fn only_finite(x: Sixteen) -> Sixteen {
    return Sixteen(only_finite_4(x.a), only_finite_4(x.b), only_finite_4(x.c), only_finite_4(x.d));
}

// Takes 16 elements, or returns true if they are to be taken by `take_one` as well.
fn take(x: Sixteen) -> bool {
    let finite = only_finite(x);
    let top = largest_of(finite);
    raise(top);
    partial.max = max(partial.max, top);
    let tiny = HAS_TINY && exponent < TINY_EXPONENT;
    if SUMS && !tiny {
        sum += sum_of(finite);
    }
    return largest_of(x) >= INFINITE || (tiny && top > 0u);
}

// Takes an element of sixteen that are taken again. It is at this place from this origin.
fn take_one(magnitude: u32, origin: u32, element: u32) {
    if magnitude >= INFINITE {
        partial = with_non_finite(partial, magnitude, origin, element);
    } else if HAS_TINY && exponent < TINY_EXPONENT {
        let x = number_of(magnitude);
        if NORM == NORM_L2 {
            partial.sum = add(partial.sum, squared(x));
        } else {
            partial.sum = add(partial.sum, x);
        }
    }
}

// Applies an outcome to one element, given and returned as float32 bits or as a half.

#import constants
#import number
#import outcome
#import half

@group(0) @binding(2) var<storage, read> results: Results;

// A value clip of one pass has decided nothing before.
fn outcome_of(segment: u32) -> Outcome {
    if GUARDED {
        return results.outcomes[segment];
    }
    return Outcome(APPLY, NORM_FINITE, ZERO_NUMBER, unscale());
}

fn scaled(bits: u32, factor: Factor) -> u32 {
    let magnitude = bits & MAGNITUDE;
    if factor.value == ONE || magnitude == 0u {
        return bits;
    }
    if NATIVE_PRODUCTS && factor.is_float != 0u {
        let product = bitcast<u32>(bitcast<f32>(bits) * bitcast<f32>(factor.value));
        let size = product & MAGNITUDE;
        // A driver may flush subnormals, and need not produce infinities.
        if size >= SMALLEST_NORMAL && size < INFINITE {
            return product;
        }
    }
    return (bits & SIGN) | exact_product(magnitude, factor.exact);
}

// Orders floats; -0 and 0 are equal. Not for NaN.
fn rank(bits: u32) -> i32 {
    let magnitude = i32(bits & MAGNITUDE);
    return select(magnitude, -magnitude, (bits & SIGN) != 0u);
}

fn clamped(bits: u32, dtype: u32) -> u32 {
    let below = rank(bits) < rank(params.min[dtype]);
    let above = rank(bits) > rank(params.max[dtype]);
    let bounded = select(select(bits, params.max[dtype], above), params.min[dtype], below);
    return select(bounded, bits, (bits & MAGNITUDE) > INFINITE);
}

fn applied(bits: u32, dtype: u32, outcome: Outcome) -> u32 {
    if outcome.action == LEAVE {
        return bits;
    }
    if outcome.action == ZERO {
        return 0u;
    }
    if outcome.action == ALL_NAN {
        return QUIET_NAN;
    }
    let finite = (bits & MAGNITUDE) < INFINITE;
    if outcome.action == ZERO_OR_NAN {
        return select(QUIET_NAN, bits & SIGN, finite);
    }
    if !finite && params.policy == POLICY_DROP {
        return 0u;
    }
    var result = bits;
    if finite {
        result = scaled(bits, outcome.factor);
    }
    if VALUE {
        result = clamped(result, dtype);
    }
    return result;
}

// An element of half precision. One that does not change keeps its bits, NaN payloads included.
fn applied_half(half: u32, dtype: u32, outcome: Outcome) -> u32 {
    let bits = widened(dtype, half);
    let result = applied(bits, dtype, outcome);
    if result == bits {
        return half;
    }
    return narrowed(dtype, result);
}

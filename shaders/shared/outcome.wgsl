// What a clip does with each segment, and the parameters it follows. Twins: `Params` in src/gpu/params.rs, `Results` in
// src/gpu/readback.rs.

#import number

struct Factor {
    // The factor as float32 bits, if it is a normal float32; else every product is taken exactly.
    value: u32,
    is_float: u32,
    exact: Number,
}

const LEAVE: u32 = 0u;
const ZERO: u32 = 1u;
const APPLY: u32 = 2u;
// Under the policy `propagate`: every element becomes NaN; or finite elements become 0 and infinite ones NaN.
const ALL_NAN: u32 = 3u;
const ZERO_OR_NAN: u32 = 4u;

struct Outcome {
    action: u32,
    // CLIPPED, ALL_LEFT, and what kind of norm it is.
    flags: u32,
    // The measured norm, not yet divided by grad_scale. Without meaning if its kind is not NORM_FINITE.
    norm: Number,
    factor: Factor,
}

const CLIPPED: u32 = 1u;
// In the outcome of the first of each WORKGROUP segments of a group: all of these are left as they are.
const ALL_LEFT: u32 = 8u;
const NORM_FINITE: u32 = 0u;
const NORM_INFINITE: u32 = 2u;
const NORM_NAN: u32 = 4u;

struct Results {
    // How many steps have run.
    steps: u32,
    // Why the last step wrote nothing; else 0.
    refused: u32,
    // Whether the norm of any group was above its limit.
    above: u32,
    padding_1: u32,
    padding_2: u32,
    padding_3: u32,
    padding_4: u32,
    padding_5: u32,
    outcomes: array<Outcome>,
}

const REFUSED_NON_FINITE: u32 = 1u;
const REFUSED_ABOVE: u32 = 2u;

const POLICY_ERROR: u32 = 0u;
const POLICY_PROPAGATE: u32 = 1u;
const POLICY_SKIP: u32 = 2u;
const POLICY_ZERO: u32 = 3u;
const POLICY_DROP: u32 = 4u;

// The parameters of a group of tensors. Numbers travel as mantissa and exponent.
struct Params {
    grad_scale: vec2<u32>,
    // eps, and the lower bound on a norm as a divisor; both times grad_scale.
    eps_scaled: vec2<u32>,
    floor_scaled: vec2<u32>,
    // The p of a p-norm, and its reciprocal.
    power: vec2<u32>,
    root: vec2<u32>,
    // The factor 1 / grad_scale.
    unscale_exact: vec2<u32>,
    unscale_value: u32,
    unscale_is_float: u32,
    policy: u32,
    // The group's segments, and where their partials start.
    first_segment: u32,
    segments: u32,
    segment_partials: u32,
    // Where the partial of the group is, and that of everything.
    group_partial: u32,
    total_partial: u32,
    // Where the partials of the parameters' segments start.
    parameter_partials: u32,
    // For `threshold.wgsl`, as are `threshold_a` to `threshold_e`.
    warm_up: u32,
    // Where the group's limit stands among the thresholds. A total norm above it skips the step.
    limit: u32,
    padding: u32,
    threshold_a: vec2<u32>,
    threshold_b: vec2<u32>,
    threshold_c: vec2<u32>,
    threshold_d: vec2<u32>,
    threshold_e: vec2<u32>,
    padding_2: vec2<u32>,
    // The bounds of a value clip as float32 bits, rounded to each dtype, by its code.
    min: vec4<u32>,
    max: vec4<u32>,
}

@group(0) @binding(1) var<uniform> params: Params;

// A uniform may not hold a struct of two words, so numbers travel as vectors.
fn number(pair: vec2<u32>) -> Number {
    return Number(pair.x, bitcast<i32>(pair.y));
}

fn unscale() -> Factor {
    return Factor(params.unscale_value, params.unscale_is_float, number(params.unscale_exact));
}

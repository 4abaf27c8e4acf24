// What a clip does with each segment, and the parameters it follows. Twins: `Params` in
// src/gpu/plan.rs, `Results` in src/gpu/readback.rs.

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
    clipped: u32,
    // The norm, not yet divided by grad_scale. Without meaning if `norm_kind` is not FINITE.
    norm: Number,
    factor: Factor,
}

struct Results {
    // How often a step has run.
    steps: u32,
    // Of the first segment: whether its norm is a number.
    norm_kind: u32,
    padding_0: u32,
    padding_1: u32,
    padding_2: u32,
    padding_3: u32,
    padding_4: u32,
    padding_5: u32,
    total: Partial,
    outcomes: array<Outcome>,
}

const POLICY_ERROR: u32 = 0u;
const POLICY_PROPAGATE: u32 = 1u;
const POLICY_SKIP: u32 = 2u;
const POLICY_ZERO: u32 = 3u;
const POLICY_DROP: u32 = 4u;

struct Params {
    // Numbers, as mantissa and exponent: max_norm, and max_norm and eps times grad_scale.
    max_norm: vec2<u32>,
    max_norm_scaled: vec2<u32>,
    eps_scaled: vec2<u32>,
    // The factor 1 / grad_scale.
    unscale_exact: vec2<u32>,
    unscale_value: u32,
    unscale_is_float: u32,
    policy: u32,
    only_measures: u32,
    segments: u32,
    // Where the partials of segments start, and where the partial of everything is.
    segment_partials: u32,
    total_partial: u32,
    padding: u32,
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

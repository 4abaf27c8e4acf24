// finalise: decides on each segment by its merged partial, an invocation a segment. Twin: `Clip::outcome` in
// src/decision.rs.
//
// Let s be grad_scale and N the norm of the gradients as they are stored. The coefficient is
// min(1, max_norm / (N / s + eps)), and elements are multiplied by that divided by s:
// max_norm / (N + eps s) if max_norm s < N + eps s, else 1 / s. So one division serves both.

#import constants
#import number
#import group
#import partial
#import outcome
#import measured

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;
@group(0) @binding(2) var<storage, read_write> results: Results;

// The threshold of each segment, as mantissa and exponent.
@group(1) @binding(0) var<storage, read> thresholds: array<vec2<u32>>;

// For the caller: see `GpuPlan::coefficients`.
struct Coefficients {
    skip: u32,
    // As float32 bits.
    factors: array<u32>,
}
@group(1) @binding(1) var<storage, read_write> coefficients: Coefficients;

fn factor_of(exact: Number) -> Factor {
    let value = float_of(exact);
    let is_float = (value >= SMALLEST_NORMAL && value < INFINITE) || exact.mantissa == 0u;
    if is_float {
        // Products that leave the normal range are taken with the same rounded factor as the others.
        return Factor(value, 1u, number_of(value));
    }
    return Factor(0u, 0u, exact);
}

// The factor of elements, as well as a float32 can hold it.
fn coefficient_of(action: u32, factor: Factor, refused: bool) -> u32 {
    if refused {
        return ONE;
    }
    if action == ZERO || action == ZERO_OR_NAN {
        return 0u;
    }
    if action == ALL_NAN {
        return QUIET_NAN;
    }
    return select(float_of(factor.exact), factor.value, factor.is_float != 0u);
}

// Decides on a segment of the group. Returns whether it is left as it is.
fn decide(index: u32, refused: bool) -> bool {
    let segment = params.first_segment + index;
    let own = partials[params.segment_partials + index];
    // A given norm is the partial of one element, and tells nothing of the gradient's own elements.
    let drops = params.policy == POLICY_DROP;
    let bad = is_bad(own) || (GIVEN && drops);
    var kind = NORM_FINITE;
    if is_bad(own) && (GIVEN || !drops) {
        kind = select(NORM_INFINITE, NORM_NAN, (own.flags & HAS_NAN) != 0u);
    }
    var norm = ZERO_NUMBER;
    var clipped = false;
    // No norm exceeds an infinite threshold; but an infinity divided by it is NaN, as in PyTorch.
    var unbounded = false;
    var factor = unscale();
    if !VALUE {
        let max_norm = number(thresholds[segment]);
        unbounded = !is_bounded(max_norm);
        norm = measured_norm(own);
        if GIVEN {
            norm = multiply(norm, number(params.grad_scale));
        }
        let compared = add(norm, number(params.eps_scaled));
        clipped = kind == NORM_FINITE && less(multiply(max_norm, number(params.grad_scale)), compared);
        if clipped {
            var divisor = norm;
            if less(norm, number(params.floor_scaled)) {
                divisor = number(params.floor_scaled);
            }
            factor = factor_of(divide(max_norm, add(divisor, number(params.eps_scaled))));
        }
    }
    var action = APPLY;
    if refused || (GIVEN && drops && kind != NORM_FINITE) {
        action = LEAVE;
    } else if bad && params.policy == POLICY_ZERO {
        action = ZERO;
    } else if !VALUE && (kind == NORM_NAN || (kind == NORM_INFINITE && unbounded)) {
        action = ALL_NAN;
    } else if !VALUE && kind == NORM_INFINITE {
        action = ZERO_OR_NAN;
    } else if !VALUE && !clipped && params.unscale_value == ONE && !bad {
        action = LEAVE;
    }
    results.outcomes[segment] = Outcome(action, kind | select(0u, CLIPPED, clipped), norm, factor);
    coefficients.factors[segment] = coefficient_of(action, factor, refused);
    return action == LEAVE;
}

// Whether a segment of the workgroup's is not left as it is.
var<workgroup> some_applied: atomic<u32>;

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let index = lane + index_of(group) * WORKGROUP;
    let total = partials[params.total_partial];
    let refuses = params.policy == POLICY_ERROR || params.policy == POLICY_SKIP;
    var reason = select(0u, REFUSED_ABOVE, results.above != 0u);
    if is_bad(total) && refuses {
        reason = REFUSED_NON_FINITE;
    }
    let refused = reason != 0u;
    if index == 0u && params.first_segment == 0u {
        results.steps += 1u;
        results.refused = reason;
        coefficients.skip = select(0u, 1u, refused);
    }
    var left = true;
    if index < params.segments {
        left = decide(index, refused);
    }
    // Only `scale_each` asks, and it has several segments.
    if params.segments > 1u {
        if lane == 0u {
            atomicStore(&some_applied, 0u);
        }
        workgroupBarrier();
        if !left {
            atomicStore(&some_applied, 1u);
        }
        workgroupBarrier();
        if lane == 0u && atomicLoad(&some_applied) == 0u {
            results.outcomes[params.first_segment + index].flags |= ALL_LEFT;
        }
    }
}

// finalise: what follows from the merged partials, one invocation a segment. Twin: `Clip::outcome` in src/partial.rs.
//
// With s = grad_scale and N the norm of the gradients as they are stored, the coefficient on N / s is
// min(1, max_norm / (N / s + eps)), and what an element is multiplied by is that divided by s:
// max_norm / (N + eps s) if max_norm s < N + eps s, else 1 / s. So one division serves both.

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;
@group(0) @binding(2) var<storage, read_write> results: Results;

const NORM_FINITE: u32 = 0u;
const NORM_INFINITE: u32 = 1u;
const NORM_NAN: u32 = 2u;

fn finite_norm(segment: Partial) -> Number {
    if NORM == NORM_L1 {
        return segment.sum;
    }
    if NORM == NORM_L2 {
        return square_root(segment.sum);
    }
    return number_of(segment.max);
}

fn factor_of(exact: Number) -> Factor {
    let value = float_of(exact);
    let is_float = (value >= SMALLEST_NORMAL && value < INFINITE) || exact.mantissa == 0u;
    if is_float {
        // Products that leave the normal range are taken with the same rounded factor as the others.
        return Factor(value, 1u, number_of(value));
    }
    return Factor(0u, 0u, exact);
}

fn is_bad(partial: Partial) -> bool {
    return (partial.non_finite | partial.non_finite_high) != 0u;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let segment = id.x + id.y * groups.x * WORKGROUP;
    if segment >= params.segments {
        return;
    }
    let own = partials[params.segment_partials + segment];
    let total = partials[params.total_partial];
    var norm_kind = NORM_FINITE;
    if is_bad(own) && params.policy != POLICY_DROP {
        norm_kind = select(NORM_INFINITE, NORM_NAN, (own.flags & HAS_NAN) != 0u);
    }
    var norm = ZERO_NUMBER;
    var clipped = false;
    var factor = unscale();
    if !VALUE {
        norm = finite_norm(own);
        let threshold = add(norm, number(params.eps_scaled));
        clipped = norm_kind == NORM_FINITE && less(number(params.max_norm_scaled), threshold);
        if clipped {
            factor = factor_of(divide(number(params.max_norm), threshold));
        }
    }
    var action = APPLY;
    if params.only_measures != 0u
        || (is_bad(total) && (params.policy == POLICY_ERROR || params.policy == POLICY_SKIP)) {
        action = LEAVE;
    } else if is_bad(own) && params.policy == POLICY_ZERO {
        action = ZERO;
    } else if !VALUE && norm_kind == NORM_NAN {
        action = ALL_NAN;
    } else if !VALUE && norm_kind == NORM_INFINITE {
        action = ZERO_OR_NAN;
    } else if !VALUE && !clipped && params.unscale_value == ONE && !is_bad(own) {
        action = LEAVE;
    }
    results.outcomes[segment] = Outcome(action, select(0u, 1u, clipped), norm, factor);
    if segment == 0u {
        results.steps += 1u;
        results.norm_kind = norm_kind;
        results.total = total;
    }
}

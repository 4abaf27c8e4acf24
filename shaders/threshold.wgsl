// threshold: computes the threshold of each segment where it is not known beforehand, one invocation a segment, and
// whether the norm of a group skips the step. THRESHOLD says what it follows: the norms of parameters (AGC), those of
// earlier steps, or nothing (FIXED). Twins: `Clip::max_norm` in src/clip.rs, `Clip::skips` in src/decision.rs, `ZClip`
// and `AdaGc` in src/threshold/. Host side: src/gpu/threshold.rs.

#import constants
#import number
#import group
#import partial
#import outcome
#import measured

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;
@group(0) @binding(2) var<storage, read_write> results: Results;

@group(1) @binding(0) var<storage, read_write> thresholds: array<vec2<u32>>;

// What is known of earlier steps. Twin of `StateRow` in src/gpu/threshold.rs.
struct State {
    // ZClip's mean, AdaGC's mean of clipped norms.
    mean: Number,
    // ZClip's.
    variance: Number,
    steps: u32,
    padding_0: u32,
    padding_1: u32,
    padding_2: u32,
}
@group(1) @binding(1) var<storage, read_write> states: array<State>;

fn smaller(a: Number, b: Number) -> Number {
    if less(b, a) {
        return b;
    }
    return a;
}

// from + rate * (to - from)
fn moved(start: Number, end: Number, rate: Number) -> Number {
    let step = multiply(rate, distance(start, end));
    if less(end, start) {
        return distance(start, step);
    }
    return add(start, step);
}

fn of_integer(n: u32) -> Number {
    return normalised(n, 0);
}

// threshold_a = clip_factor, threshold_b = agc_eps.
fn by_parameter(whole: Partial) -> Number {
    if is_bad(whole) {
        return UNBOUNDED;
    }
    var norm = measured_norm(whole);
    if less(norm, number(params.threshold_b)) {
        norm = number(params.threshold_b);
    }
    return multiply(number(params.threshold_a), norm);
}

// threshold_a = 1 - alpha, threshold_b = alpha, threshold_c = z_threshold.
fn by_zclip(norm: Number, enters: bool, before: State) -> State {
    var after = before;
    var max_norm = UNBOUNDED;
    let spread = square_root(before.variance);
    let warms_up = before.steps < params.warm_up;
    let allowed = multiply(number(params.threshold_c), spread);
    if enters {
        after.steps = before.steps + select(1u, 0u, before.steps == 0xffffffffu);
    } else if !warms_up && spread.mantissa != 0u {
        max_norm = add(before.mean, allowed);
    }
    let off = distance(norm, before.mean);
    if enters && warms_up {
        let n = of_integer(after.steps);
        let share = divide(of_integer(before.steps), n);
        after.mean = moved(before.mean, norm, divide(of_integer(1u), n));
        after.variance = multiply(add(before.variance, divide(squared(off), n)), share);
    } else if enters {
        if spread.mantissa != 0u && less(before.mean, norm) && less(allowed, off) {
            // z_threshold² / z · spread = (z_threshold · spread)² / (norm - mean)
            max_norm = add(before.mean, divide(squared(allowed), off));
        }
        let clipped = smaller(norm, max_norm);
        after.mean = moved(before.mean, clipped, number(params.threshold_a));
        let square = squared(distance(clipped, after.mean));
        after.variance = add(
            multiply(number(params.threshold_b), before.variance),
            multiply(number(params.threshold_a), square),
        );
    }
    chosen = max_norm;
    return after;
}

// threshold_e = skip_above_z.
fn limit_of_zclip(before: State) -> Number {
    let spread = square_root(before.variance);
    if before.steps < params.warm_up || spread.mantissa == 0u {
        return UNBOUNDED;
    }
    return add(before.mean, multiply(number(params.threshold_e), spread));
}

// threshold_a = 1 - beta, threshold_b = lambda_rel, threshold_c = lambda_abs.
fn by_adagc(norm: Number, total_norm: Number, enters: bool, before: State) -> State {
    var after = before;
    var max_norm = UNBOUNDED;
    let warms_up = before.steps < params.warm_up;
    let limit = number(params.threshold_c);
    if enters {
        after.steps = before.steps + select(1u, 0u, before.steps == 0xffffffffu);
    }
    if !warms_up {
        if is_bounded(before.mean) {
            max_norm = multiply(number(params.threshold_b), before.mean);
        }
    } else if !enters {
        max_norm = limit;
    } else if less(limit, total_norm) {
        max_norm = multiply(divide(limit, total_norm), norm);
    }
    let clipped = smaller(norm, max_norm);
    if enters && clipped.mantissa != 0u {
        if warms_up || !is_bounded(before.mean) {
            after.mean = smaller(before.mean, clipped);
        } else {
            after.mean = moved(before.mean, clipped, number(params.threshold_a));
        }
    }
    chosen = max_norm;
    return after;
}

// The threshold that `by_zclip` and `by_adagc` choose.
var<private> chosen: Number;

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let index = lane + index_of(group) * WORKGROUP;
    let total = partials[params.group_partial];
    // `drop` measures the finite elements.
    let is_measured = !is_bad(total) || params.policy == POLICY_DROP;
    let total_norm = divide(measured_norm(total), number(params.grad_scale));
    var limit = number(thresholds[params.limit]);
    if THRESHOLD == ZCLIP {
        limit = smaller(limit, limit_of_zclip(states[0]));
    }
    let above = is_measured && less(limit, total_norm);
    if index == 0u {
        // The first group begins anew. One group above skips the step of all.
        let before = select(results.above, 0u, params.first_segment == 0u);
        results.above = select(before, 1u, above);
    }
    if THRESHOLD == FIXED || index >= params.segments {
        return;
    }
    let segment = params.first_segment + index;
    if THRESHOLD == AGC {
        chosen = by_parameter(partials[params.parameter_partials + index]);
    } else {
        let norm = divide(measured_norm(partials[params.segment_partials + index]), number(params.grad_scale));
        // A step that is skipped, or whose norm is not finite, does not change the state.
        let enters = is_measured && !above;
        if THRESHOLD == ZCLIP {
            states[index] = by_zclip(norm, enters, states[index]);
        } else {
            states[index] = by_adagc(norm, total_norm, enters, states[index]);
        }
        // The clip's own threshold stays an upper bound.
        chosen = smaller(chosen, number(params.threshold_d));
    }
    thresholds[segment] = vec2<u32>(chosen.mantissa, bitcast<u32>(chosen.exponent));
}

// The norm of a merged partial, over its finite elements.

#import constants
#import number
#import partial
#import outcome
#import power

fn measured_norm(whole: Partial) -> Number {
    if NORM == NORM_L1 {
        return whole.sum;
    }
    if NORM == NORM_L2 {
        return square_root(whole.sum);
    }
    if NORM == NORM_INF || whole.sum.mantissa == 0u {
        return number_of(whole.max);
    }
    let root = power_of_number(whole.sum, number(params.root));
    let rest = number_of(bitcast<u32>(root.rest));
    return Number(rest.mantissa, rest.exponent + root.whole);
}

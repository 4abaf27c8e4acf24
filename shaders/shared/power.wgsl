// Powers and roots for the p-norms, as a whole power of two and a rest, so that nothing leaves the range of float32.
// The logarithm and the exponential are our own polynomials, because WGSL's may be off by 2^-21. Ours are off by 5e-8
// and 8e-8 at worst, and 1e-9 on average. They are least-squares fits at Chebyshev points.

#import number

// |x|^p = 2^whole * rest, with rest from 1 to 2.
struct Power {
    whole: i32,
    rest: f32,
}

// log2(m) for m from sqrt(1/2) to sqrt(2).
fn log2_near_1(m: f32) -> f32 {
    let x = m - 1.0;
    var y = -0.11020159;
    y = y * x + 0.1863121;
    y = y * x - 0.19102497;
    y = y * x + 0.20457529;
    y = y * x - 0.23961905;
    y = y * x + 0.28856888;
    y = y * x - 0.36069664;
    y = y * x + 0.4808982;
    y = y * x - 0.72134733;
    y = y * x + 1.442695;
    return y * x;
}

// 2^x for x from 0 to 1.
fn exp2_below_1(x: f32) -> f32 {
    var y = 2.1651724e-5;
    y = y * x + 0.00014299402;
    y = y * x + 0.0013429811;
    y = y * x + 0.0096135354;
    y = y * x + 0.05550529;
    y = y * x + 0.24022636;
    y = y * x + 0.6931472;
    return y * x + 1.0;
}

// 2^(power * (whole + part)), where `power` is above 2^-23 and below 2^23 and `part` between -1 and 1. The product with
// the whole number is exact, in integers: as a float32 it would lose what the power needs. Without branches, for
// SwiftShader's compiler.
fn exp2_of_product(power: Number, whole: i32, part: f32) -> Power {
    let product = wide_product(power.mantissa, u32(abs(whole)));
    // The product is to be moved right by 9 to 54 bits.
    let far = power.exponent <= -32;
    let shift = u32(-power.exponent) & 31u;
    let back = (32u - shift) & 31u;
    let near_units = (product.x >> shift) | (product.y << back);
    let units = i32(select(near_units, product.y >> shift, far));
    let far_rest = select((product.y << back) | (product.x >> shift), product.x, shift == 0u);
    let rest = f32(select(product.x << back, far_rest, far)) * 2.3283064365386963e-10;
    let factor = f32(power.mantissa) * bitcast<f32>(u32(power.exponent + 127) << 23u);
    let fraction = select(rest, -rest, whole < 0) + factor * part;
    let floor_of = floor(fraction);
    return Power(select(units, -units, whole < 0) + i32(floor_of), exp2_below_1(fraction - floor_of));
}

// (m * 2^exponent)^power, for m from 1 to 2.
fn powered_parts(m: f32, exponent: i32, power: Number) -> Power {
    let above = m > 1.4142135;
    return exp2_of_product(power, exponent + select(0, 1, above), log2_near_1(select(m, 0.5 * m, above)));
}

// |x|^power of the finite float32 with these bits, which is not 0.
fn power_of_float(magnitude: u32, power: Number) -> Power {
    let subnormal = magnitude < SMALLEST_NORMAL;
    let bits = select(magnitude, bitcast<u32>(f32(magnitude)), subnormal);
    let exponent = i32(bits >> 23u) - select(127, 276, subnormal);
    return powered_parts(bitcast<f32>((bits & 0x007fffffu) | ONE), exponent, power);
}

// A number above 0 to a power.
fn power_of_number(x: Number, power: Number) -> Power {
    return powered_parts(f32(x.mantissa) * 4.6566128730773926e-10, x.exponent + 31, power);
}

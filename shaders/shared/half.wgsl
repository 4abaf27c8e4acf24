// float16 and bfloat16 in integer arithmetic: WGSL's own conversions may round either way. Without branches, because
// these stand several times in a kernel, and SwiftShader's compiler takes minutes and gigabytes for many branches.
// `pair` has the quick way for two finite elements.

#import constants
#import number

// The float32 bits of an element.
fn widened(dtype: u32, bits: u32) -> u32 {
    if dtype == DTYPE_F32 {
        return bits;
    }
    if dtype == DTYPE_F16 {
        return widened_f16(bits);
    }
    return bits << 16u;
}

fn widened_f16(half: u32) -> u32 {
    let magnitude = half & 0x7fffu;
    let normal = (magnitude << 13u) + 0x38000000u;
    // Subnormal in float16, normal in float32.
    let subnormal = bitcast<u32>(f32(magnitude) * 5.9604644775390625e-8);
    let not_finite = INFINITE | ((magnitude & 0x03ffu) << 13u);
    let finite = select(normal, subnormal, magnitude < 0x0400u);
    return ((half & 0x8000u) << 16u) | select(finite, not_finite, magnitude >= 0x7c00u);
}

// The half-precision element nearest to a float32, ties to even.
fn narrowed(dtype: u32, bits: u32) -> u32 {
    if dtype == DTYPE_F16 {
        return narrowed_f16(bits);
    }
    return narrowed_bf16(bits);
}

fn narrowed_bf16(bits: u32) -> u32 {
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, (bits >> 16u) | 0x0040u, (bits & MAGNITUDE) > INFINITE);
}

fn narrowed_f16(bits: u32) -> u32 {
    let magnitude = bits & MAGNITUDE;
    // From 65520 on, infinity.
    let normal = min((magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13u) & 1u)) >> 13u, 0x7c00u);
    // Subnormal in float16: in units of 2^-24, which are `shift` bits up. Beyond 25 bits nothing is left.
    let shift = clamp(126u - min(magnitude >> 23u, 113u), 13u, 25u);
    let whole = (magnitude & 0x007fffffu) | 0x00800000u;
    let subnormal = (whole + (1u << (shift - 1u)) - 1u + ((whole >> shift) & 1u)) >> shift;
    let finite = select(normal, subnormal, magnitude < 0x38800000u);
    let result = select(finite, 0x7e00u | ((magnitude >> 13u) & 0x03ffu), magnitude > INFINITE);
    return ((bits >> 16u) & 0x8000u) | result;
}

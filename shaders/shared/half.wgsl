// float16 and bfloat16 in integer arithmetic: WGSL's own conversions may round either way.

// The float32 bits of an element of half precision. DTYPE_*: twin of `dtype_code` in src/gpu/table.rs.
const DTYPE_F32: u32 = 0u;
const DTYPE_F16: u32 = 1u;

fn widened(dtype: u32, half: u32) -> u32 {
    if dtype != DTYPE_F16 {
        return half << 16u;
    }
    let sign = (half & 0x8000u) << 16u;
    let magnitude = half & 0x7fffu;
    if magnitude >= 0x7c00u {
        return sign | INFINITE | ((magnitude & 0x03ffu) << 13u);
    }
    if magnitude < 0x0400u {
        // Subnormal in float16, normal in float32.
        return sign | bitcast<u32>(f32(magnitude) * 5.9604644775390625e-8);
    }
    return sign | ((magnitude << 13u) + 0x38000000u);
}

// The half-precision element nearest to a float32, ties to even.
fn narrowed(dtype: u32, bits: u32) -> u32 {
    let magnitude = bits & MAGNITUDE;
    let sign = (bits >> 16u) & 0x8000u;
    if dtype != DTYPE_F16 {
        if magnitude > INFINITE {
            return (bits >> 16u) | 0x0040u;
        }
        return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    }
    if magnitude > INFINITE {
        return sign | 0x7e00u | ((magnitude >> 13u) & 0x03ffu);
    }
    // 65520 and more round to infinity.
    if magnitude >= 0x477ff000u {
        return sign | 0x7c00u;
    }
    if magnitude >= 0x38800000u {
        let rebased = magnitude - 0x38000000u;
        return sign | ((rebased + 0x0fffu + ((rebased >> 13u) & 1u)) >> 13u);
    }
    // Subnormal in float16: an integer multiple of 2^-24. Below 2^-25 that is 0.
    if magnitude < 0x33000000u {
        return sign;
    }
    let shift = 126u - (magnitude >> 23u);
    let mantissa = (magnitude & 0x007fffffu) | SMALLEST_NORMAL;
    let kept = mantissa >> shift;
    let lost = mantissa & ((1u << shift) - 1u);
    let middle = 1u << (shift - 1u);
    return sign | (kept + select(0u, 1u, lost > middle || (lost == middle && (kept & 1u) == 1u)));
}

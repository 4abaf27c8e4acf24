// The two elements of half precision in a word at once, where both are finite: by the device's own arithmetic if that is
// right (NATIVE_HALVES, which `probe` finds out), else as `half` does it.

#import constants
#import number
#import half

fn widened_pair(word: u32) -> vec2<f32> {
    if DTYPE != DTYPE_F16 {
        return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
    }
    if NATIVE_HALVES {
        return unpack2x16float(word);
    }
    return vec2<f32>(bitcast<f32>(widened_f16(word & 0xffffu)), bitcast<f32>(widened_f16(word >> 16u)));
}

// The magnitude of a float32 below 65520 as a float16, rounded by an addition: of the power of two whose last bit is that
// of the float16. WGSL's own packing may round either way, and does toward 0 on AMD. The sign is masked off in bits, so
// that no compiler makes one operation of this addition and the product before it, which is to be rounded by itself.
fn rounded_f16(bits: u32) -> u32 {
    let magnitude = bits & MAGNITUDE;
    // Subnormal ones have the last bit of the smallest normal ones.
    let exponent = max(magnitude & INFINITE, 0x38800000u);
    let sum = bitcast<u32>(bitcast<f32>(magnitude) + bitcast<f32>(exponent + 0x06800000u));
    // Without the exponent of the power of two, and with that of the float16, which is 112 less.
    return sum - exponent + (exponent >> 13u) - 0x0681c400u;
}

// bfloat16 rounded, in the upper half; not for NaN.
fn rounded_bf16(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return bits + 0x7fffu + ((bits >> 16u) & 1u);
}

fn narrowed_pair(x: vec2<f32>) -> u32 {
    if DTYPE != DTYPE_F16 {
        return (rounded_bf16(x.x) >> 16u) | (rounded_bf16(x.y) & 0xffff0000u);
    }
    let low = bitcast<u32>(x.x);
    let high = bitcast<u32>(x.y);
    if NATIVE_HALVES {
        let signs = ((low >> 16u) & 0x8000u) | (high & SIGN);
        return signs | rounded_f16(low) | (rounded_f16(high) << 16u);
    }
    return narrowed_f16(low) | (narrowed_f16(high) << 16u);
}

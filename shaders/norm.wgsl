// norm: the partial of each chunk, one workgroup a chunk. Host side: src/gpu/plan.rs; twin: src/cpu/norm.rs.
//
// An invocation takes blocks of 16 words, WORKGROUP apart. A block's elements are scaled by the power of two of the
// largest element met so far, so that no square overflows and none that matters underflows; a block is summed as a
// tree, 8 blocks one after another in float32, and what they add up to in a Number. So the longest chain of float32
// roundings is short whatever the length: 1 (square) + 5 (block) + 8 (blocks) units of 2^-24 in the sum, half of that
// in the norm: 4.2e-7 at worst.

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

const BLOCK: u32 = 16u;
const BLOCKS_IN_FLOAT: u32 = 8u;

// Blocks whose largest element is below 2^-100 may hold subnormals that matter; float arithmetic may flush those.
const TINY: u32 = 27u << 23u;

// The float32 sum, in units of 2^(128 - exponent) (squared for L2), of the blocks since the last `settle`.
var<private> sum: f32;
// The biased exponent of the largest element so far; at least 1.
var<private> exponent: u32;
var<private> partial: Partial;

fn power_of_two(k: i32) -> f32 {
    return select(bitcast<f32>(u32(127 + k) << 23u), 0.0, k < -126);
}

// Adds the float32 sum to the partial's.
fn settle() {
    let unit = i32(exponent) - 128;
    let settled = number_of(bitcast<u32>(sum));
    if settled.mantissa != 0u {
        partial.sum = add(partial.sum, Number(settled.mantissa, settled.exponent + select(unit, 2 * unit, NORM == NORM_L2)));
    }
    sum = 0.0;
}

// |x| in the unit, where subnormals must not be flushed.
fn in_unit_exactly(x: vec4<u32>) -> vec4<f32> {
    let subnormal = vec4<f32>(x) * bitcast<f32>((106u - exponent) << 23u);
    let normal = bitcast<vec4<f32>>(x) * bitcast<f32>((255u - exponent) << 23u);
    return select(normal, subnormal, x < vec4<u32>(SMALLEST_NORMAL));
}

fn sum_of(x: vec4<f32>) -> f32 {
    if NORM == NORM_L2 {
        return (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
    }
    return (x.x + x.y) + (x.z + x.w);
}

fn largest(x: vec4<u32>) -> u32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

// Counts and locates the non-finite ones of four elements, and returns the others.
fn without_non_finite(magnitudes: vec4<u32>, chunk: Chunk, element: vec4<u32>) -> vec4<u32> {
    var finite = magnitudes;
    for (var i = 0u; i < 4u; i += 1u) {
        if magnitudes[i] >= INFINITE {
            finite[i] = 0u;
            partial.non_finite += 1u;
            partial.first_chunk = chunk.partial;
            partial.first_element = min(partial.first_element, element[i] - chunk.skip);
            if magnitudes[i] > INFINITE {
                partial.flags |= HAS_NAN;
            }
        }
    }
    return finite;
}

// Takes 16 elements without their signs. `element` is the index of the first, `step` the distance of two.
fn take(a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>, chunk: Chunk, element: u32, step: u32) {
    var x = array<vec4<u32>, 4>(a, b, c, d);
    var top = largest(max(max(a, b), max(c, d)));
    if top >= INFINITE {
        for (var i = 0u; i < 4u; i += 1u) {
            let at = vec4<u32>(element + 4u * i * step) + vec4<u32>(0u, 1u, 2u, 3u) * step;
            x[i] = without_non_finite(x[i], chunk, at);
        }
        top = largest(max(max(x[0], x[1]), max(x[2], x[3])));
    }
    if NORM == NORM_INF {
        partial.max = max(partial.max, top);
        return;
    }
    let raised = max(exponent, top >> 23u);
    if raised != exponent {
        let k = i32(exponent) - i32(raised);
        sum *= power_of_two(select(k, 2 * k, NORM == NORM_L2));
        exponent = raised;
    }
    if exponent < (TINY >> 23u) {
        sum += (sum_of(in_unit_exactly(x[0])) + sum_of(in_unit_exactly(x[1])))
            + (sum_of(in_unit_exactly(x[2])) + sum_of(in_unit_exactly(x[3])));
    } else {
        let unit = bitcast<f32>((255u - exponent) << 23u);
        sum += (sum_of(bitcast<vec4<f32>>(x[0]) * unit) + sum_of(bitcast<vec4<f32>>(x[1]) * unit))
            + (sum_of(bitcast<vec4<f32>>(x[2]) * unit) + sum_of(bitcast<vec4<f32>>(x[3]) * unit));
    }
}

// Word `i` of the chunk, with 0 for elements that are not the chunk's.
fn word_of(chunk: Chunk, i: u32) -> u32 {
    if i >= chunk.words {
        return 0u;
    }
    var word = words[chunk.word + i];
    if DTYPE != DTYPE_F32 {
        if i == 0u && chunk.skip == 1u {
            word &= 0xffff0000u;
        }
        if 2u * i + 1u == chunk.skip + chunk.elements {
            word &= 0x0000ffffu;
        }
    }
    return word;
}

fn four_words(chunk: Chunk, i: u32) -> vec4<u32> {
    return vec4<u32>(
        word_of(chunk, i),
        word_of(chunk, i + WORKGROUP),
        word_of(chunk, i + 2u * WORKGROUP),
        word_of(chunk, i + 3u * WORKGROUP),
    );
}

fn magnitudes_of(halves: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(
        widened(DTYPE, halves.x),
        widened(DTYPE, halves.y),
        widened(DTYPE, halves.z),
        widened(DTYPE, halves.w),
    ) & vec4<u32>(MAGNITUDE);
}

fn take_block(chunk: Chunk, i: u32) {
    let a = four_words(chunk, i);
    let b = four_words(chunk, i + 4u * WORKGROUP);
    let c = four_words(chunk, i + 8u * WORKGROUP);
    let d = four_words(chunk, i + 12u * WORKGROUP);
    if DTYPE == DTYPE_F32 {
        let m = vec4<u32>(MAGNITUDE);
        take(a & m, b & m, c & m, d & m, chunk, i, WORKGROUP);
    } else {
        let low = vec4<u32>(0xffffu);
        let high = vec4<u32>(16u);
        take(magnitudes_of(a & low), magnitudes_of(b & low), magnitudes_of(c & low), magnitudes_of(d & low),
            chunk, 2u * i, 2u * WORKGROUP);
        take(magnitudes_of(a >> high), magnitudes_of(b >> high), magnitudes_of(c >> high), magnitudes_of(d >> high),
            chunk, 2u * i + 1u, 2u * WORKGROUP);
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if row >= arrayLength(&chunks) {
        return;
    }
    let chunk = chunks[row];
    sum = 0.0;
    exponent = 1u;
    partial = EMPTY_PARTIAL;
    var blocks = 0u;
    for (var i = 0u; i < chunk.words; i += BLOCK * WORKGROUP) {
        take_block(chunk, i + lane);
        blocks += 1u;
        if blocks % BLOCKS_IN_FLOAT == 0u {
            settle();
        }
    }
    settle();
    let whole = merged_in_workgroup(lane, partial);
    if lane == 0u {
        partials[chunk.partial] = whole;
    }
}

// norm: the partial of each chunk, one workgroup a chunk. Host side: src/gpu/plan.rs; twin: src/cpu/norm.rs.
//
// An invocation takes blocks of 16 words, WORKGROUP apart. A block's elements are scaled by the power of two of the
// largest element met so far, so that no square overflows and none that matters underflows. Blocks with non-finite
// elements, or with none but tiny ones, are walked a second time, element by element.
//
// A block is summed as a tree, 8 blocks one after another in float32, and what they add up to in a Number. So the
// longest chain of float32 roundings is short whatever the length: 1 (square) + 5 (block) + 8 (blocks) units of 2^-24
// in the sum, half of that in the norm: 4.2e-7 at worst.

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

const BLOCK: u32 = 16u;
const BLOCKS_IN_FLOAT: u32 = 8u;

// Where the largest exponent so far is below that of 2^-100, subnormals matter, which float arithmetic may flush:
// such elements are summed in Numbers.
const TINY_EXPONENT: u32 = 27u;

// The float32 sum, in units of 2^(exponent - 128) (squared for L2), of the blocks since the last `settle`.
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
        let units = select(unit, 2 * unit, NORM == NORM_L2);
        partial.sum = add(partial.sum, Number(settled.mantissa, settled.exponent + units));
    }
    sum = 0.0;
}

// Raises the unit to that of `top`, the largest element of the next block.
fn raise(top: u32) {
    let raised = max(exponent, top >> 23u);
    let k = i32(exponent) - i32(raised);
    sum *= power_of_two(select(k, 2 * k, NORM == NORM_L2));
    exponent = raised;
}

// Elements in the unit, all below 4, by their exponent bits: a driver may turn a sum of products into a product of the
// sum, which overflows. What would become subnormal is below 2^-127 of the largest, and 0.
fn sum_of_4(magnitudes: vec4<u32>) -> f32 {
    let moved = magnitudes + vec4<u32>((128u - exponent) << 23u);
    let smallest = vec4<u32>((max(exponent, 128u) - 127u) << 23u);
    let x = bitcast<vec4<f32>>(select(vec4<u32>(0u), moved, magnitudes >= smallest));
    if NORM == NORM_L2 {
        return (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
    }
    return (x.x + x.y) + (x.z + x.w);
}

// The magnitudes of 16 elements.
struct Sixteen {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

fn sum_of(x: Sixteen) -> f32 {
    return (sum_of_4(x.a) + sum_of_4(x.b)) + (sum_of_4(x.c) + sum_of_4(x.d));
}

fn largest_of(x: Sixteen) -> u32 {
    let top = max(max(x.a, x.b), max(x.c, x.d));
    return max(max(top.x, top.y), max(top.z, top.w));
}

fn only_finite_4(magnitudes: vec4<u32>) -> vec4<u32> {
    return select(magnitudes, vec4<u32>(0u), magnitudes >= vec4<u32>(INFINITE));
}

fn only_finite(x: Sixteen) -> Sixteen {
    return Sixteen(only_finite_4(x.a), only_finite_4(x.b), only_finite_4(x.c), only_finite_4(x.d));
}

// Takes an element of a block that is walked again. `element` is its place in the chunk.
fn take_one(magnitude: u32, chunk: Chunk, element: u32) {
    if magnitude >= INFINITE {
        partial = with_non_finite(partial, magnitude, chunk.partial, element);
    } else if NORM != NORM_INF && exponent < TINY_EXPONENT {
        let x = number_of(magnitude);
        if NORM == NORM_L2 {
            partial.sum = add(partial.sum, squared(x));
        } else {
            partial.sum = add(partial.sum, x);
        }
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

fn sixteen_words(chunk: Chunk, i: u32) -> Sixteen {
    return Sixteen(
        four_words(chunk, i),
        four_words(chunk, i + 4u * WORKGROUP),
        four_words(chunk, i + 8u * WORKGROUP),
        four_words(chunk, i + 12u * WORKGROUP),
    );
}

// The magnitudes in words of float32, or in the halves of words that start at bit `shift`.
fn magnitudes_of_4(words: vec4<u32>, shift: u32) -> vec4<u32> {
    if DTYPE == DTYPE_F32 {
        return words & vec4<u32>(MAGNITUDE);
    }
    let halves = (words >> vec4<u32>(shift)) & vec4<u32>(0xffffu);
    return vec4<u32>(
        widened(DTYPE, halves.x),
        widened(DTYPE, halves.y),
        widened(DTYPE, halves.z),
        widened(DTYPE, halves.w),
    ) & vec4<u32>(MAGNITUDE);
}

fn magnitudes_of(words: Sixteen, shift: u32) -> Sixteen {
    return Sixteen(
        magnitudes_of_4(words.a, shift),
        magnitudes_of_4(words.b, shift),
        magnitudes_of_4(words.c, shift),
        magnitudes_of_4(words.d, shift),
    );
}

fn take_block(chunk: Chunk, i: u32) {
    let block = sixteen_words(chunk, i);
    let low = magnitudes_of(block, 0u);
    var top = largest_of(low);
    let finite_low = only_finite(low);
    var finite_top = largest_of(finite_low);
    if DTYPE == DTYPE_F32 {
        raise(finite_top);
        if NORM != NORM_INF && exponent >= TINY_EXPONENT {
            sum += sum_of(finite_low);
        }
    } else {
        let high = magnitudes_of(block, 16u);
        top = max(top, largest_of(high));
        let finite_high = only_finite(high);
        finite_top = max(finite_top, largest_of(finite_high));
        raise(finite_top);
        if NORM != NORM_INF && exponent >= TINY_EXPONENT {
            sum += sum_of(finite_low) + sum_of(finite_high);
        }
    }
    partial.max = max(partial.max, finite_top);
    let tiny = NORM != NORM_INF && exponent < TINY_EXPONENT && finite_top > 0u;
    let again = top >= INFINITE || tiny;
    // In the loop, because software devices run the body of every branch, but not of every loop.
    for (var k = 0u; k < BLOCK && again; k += 1u) {
        let j = i + k * WORKGROUP;
        let word = word_of(chunk, j);
        if DTYPE == DTYPE_F32 {
            take_one(word & MAGNITUDE, chunk, j);
        } else {
            take_one(widened(DTYPE, word & 0xffffu) & MAGNITUDE, chunk, 2u * j - chunk.skip);
            take_one(widened(DTYPE, word >> 16u) & MAGNITUDE, chunk, 2u * j + 1u - chunk.skip);
        }
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
    let step = BLOCK * WORKGROUP;
    for (var span = 0u; span < chunk.words; span += BLOCKS_IN_FLOAT * step) {
        let end = min(chunk.words, span + BLOCKS_IN_FLOAT * step);
        for (var i = span; i < end; i += step) {
            take_block(chunk, i + lane);
        }
        settle();
    }
    let whole = merged_in_workgroup(lane, partial);
    if lane == 0u {
        partials[chunk.partial] = whole;
    }
}

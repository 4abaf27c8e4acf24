// norm_each: measures the partial of each segment of a chunk, one invocation a segment. Segments are columns, which lie
// side by side, or short rows, which are read as quads if they are made of whole ones. Host side: src/gpu/table/; twin:
// src/cpu/columns.rs.

#import constants
#import number
#import group
#import partial
#import half
#import windows
#import chunk
#import measure
#import take_words

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

const PER_QUAD: u32 = 4u * PER_WORD;

// The words of elements at `at`, or of the last one, which is at `last`. Sixteen of these are in flight, because no branch
// stands before any.
fn words_of_4(chunk: Chunk, at: vec4<u32>, last: u32) -> vec4<u32> {
    let words = min(at, vec4<u32>(last)) >> vec4<u32>(PER_WORD - 1u);
    return vec4<u32>(
        word_at(chunk.window, words.x),
        word_at(chunk.window, words.y),
        word_at(chunk.window, words.z),
        word_at(chunk.window, words.w),
    );
}

// By how many bits words are shifted down to elements at `at`.
fn shifts_of_4(at: vec4<u32>) -> vec4<u32> {
    return (at & vec4<u32>(PER_WORD - 1u)) << vec4<u32>(4u);
}

// Elements of words without their signs.
fn elements_in_4(words: vec4<u32>, shifts: vec4<u32>) -> vec4<u32> {
    if DTYPE == DTYPE_F32 {
        return words & vec4<u32>(MAGNITUDE);
    }
    return (words >> shifts) & vec4<u32>(0x7fffu);
}

// The same for elements `k` to `k + 3`; 0 behind the last. (Places behind it may have wrapped around, so `k` is compared.)
fn own_elements_in_4(words: vec4<u32>, shifts: vec4<u32>, chunk: Chunk, k: u32) -> vec4<u32> {
    let own = (k + vec4<u32>(0u, 1u, 2u, 3u)) < vec4<u32>(chunk.elements);
    return select(vec4<u32>(0u), elements_in_4(words, shifts), own);
}

// Takes 16 elements of the segment that begins with element `first`, wherever they are.
fn take_spread(chunk: Chunk, first: u32, origin_element: u32, k: u32) {
    let stride = chunk.element_stride;
    let last = first + (chunk.elements - 1u) * stride;
    let a = first + k * stride + vec4<u32>(0u, stride, 2u * stride, 3u * stride);
    let four = vec4<u32>(4u * stride);
    let b = a + four;
    let c = b + four;
    let d = c + four;
    // Four strides are even, so these are also the shifts of the others.
    let shifts = shifts_of_4(a);
    let words = Sixteen(
        words_of_4(chunk, a, last),
        words_of_4(chunk, b, last),
        words_of_4(chunk, c, last),
        words_of_4(chunk, d, last),
    );
    let elements = Sixteen(
        own_elements_in_4(words.a, shifts, chunk, k),
        own_elements_in_4(words.b, shifts, chunk, k + 4u),
        own_elements_in_4(words.c, shifts, chunk, k + 8u),
        own_elements_in_4(words.d, shifts, chunk, k + 12u),
    );
    for (var again = take(first_of(elements), are_convertible(elements)); again; again = false) {
        let one_by_one = take_again(magnitudes_of(elements, 0u));
        for (var i = k; i < min(k + 16u, chunk.elements) && one_by_one; i += 1u) {
            let at = vec4<u32>(first + i * stride);
            let element = elements_in_4(words_of_4(chunk, at, last), shifts_of_4(at)).x;
            take_one(widened(DTYPE, element), chunk.origin, origin_element + i * stride);
        }
    }
}

// Takes four quads of a row, or those that there are.
fn take_quads(row: Chunk, q: u32) {
    let run = run_of(row);
    let none = vec4<u32>(0u);
    let count = min(run.quads - q, 4u);
    let at = run.quad + q;
    let last = count - 1u;
    let quads = Sixteen(
        quad_at(run.window, at),
        select(none, quad_at(run.window, at + min(1u, last)), vec4<bool>(count > 1u)),
        select(none, quad_at(run.window, at + min(2u, last)), vec4<bool>(count > 2u)),
        select(none, quad_at(run.window, at + last), vec4<bool>(count > 3u)),
    );
    take_words(run, row, quads, 4u * q, count, 1u);
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let index = index_of(group);
    if index >= table.tasks {
        return;
    }
    let chunk = table.chunks[index];
    if lane >= chunk.count {
        return;
    }
    let skipped = lane * chunk.segment_stride;
    var row = chunk;
    row.first += skipped;
    row.origin_element += skipped;
    let whole = (chunk.first | chunk.segment_stride | chunk.elements) % PER_QUAD == 0u && chunk.element_stride == 1u;
    // Loops for either kind, because software devices run the body of every branch, but not of every loop.
    let in_quads = select(0u, chunk.elements, whole);
    let spread = select(chunk.elements, 0u, whole);
    begin();
    for (var span = 0u; span < in_quads; span += 16u * TREES_IN_FLOAT) {
        for (var k = span; k < min(span + 16u * TREES_IN_FLOAT, in_quads); k += 4u * PER_QUAD) {
            take_quads(row, k / PER_QUAD);
        }
        settle();
    }
    for (var span = 0u; span < spread; span += 16u * TREES_IN_FLOAT) {
        for (var k = span; k < min(span + 16u * TREES_IN_FLOAT, spread); k += 16u) {
            take_spread(chunk, row.first, row.origin_element, k);
        }
        settle();
    }
    partials[chunk.slot + lane * chunk.slot_stride] = partial;
}

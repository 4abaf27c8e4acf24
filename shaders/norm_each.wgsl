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

// The word of element `k` of the segment that begins with element `first`, or of its last element. Sixteen of these are
// in flight, because no branch stands before any.
fn word_of(chunk: Chunk, first: u32, k: u32) -> u32 {
    return word_at(chunk.window, (first + min(k, chunk.elements - 1u) * chunk.element_stride) / PER_WORD);
}

fn words_of_4(chunk: Chunk, first: u32, k: u32) -> vec4<u32> {
    return vec4<u32>(
        word_of(chunk, first, k),
        word_of(chunk, first, k + 1u),
        word_of(chunk, first, k + 2u),
        word_of(chunk, first, k + 3u),
    );
}

// Element `k`, which is in this word, without its sign; 0 behind the last.
fn element_in(word: u32, chunk: Chunk, first: u32, k: u32) -> u32 {
    let at = first + k * chunk.element_stride;
    let bits = select((word >> (16u * (at & 1u))) & 0x7fffu, word & MAGNITUDE, DTYPE == DTYPE_F32);
    return select(0u, bits, k < chunk.elements);
}

fn elements_in_4(words: vec4<u32>, chunk: Chunk, first: u32, k: u32) -> vec4<u32> {
    return vec4<u32>(
        element_in(words.x, chunk, first, k),
        element_in(words.y, chunk, first, k + 1u),
        element_in(words.z, chunk, first, k + 2u),
        element_in(words.w, chunk, first, k + 3u),
    );
}

// Takes 16 elements of a segment, wherever they are.
fn take_spread(chunk: Chunk, first: u32, origin_element: u32, k: u32) {
    let words = Sixteen(
        words_of_4(chunk, first, k),
        words_of_4(chunk, first, k + 4u),
        words_of_4(chunk, first, k + 8u),
        words_of_4(chunk, first, k + 12u),
    );
    let elements = Sixteen(
        elements_in_4(words.a, chunk, first, k),
        elements_in_4(words.b, chunk, first, k + 4u),
        elements_in_4(words.c, chunk, first, k + 8u),
        elements_in_4(words.d, chunk, first, k + 12u),
    );
    for (var again = take(first_of(elements), are_convertible(elements)); again; again = false) {
        let one_by_one = take_again(magnitudes_of(elements, 0u));
        for (var i = k; i < min(k + 16u, chunk.elements) && one_by_one; i += 1u) {
            let magnitude = widened(DTYPE, element_in(word_of(chunk, first, i), chunk, first, i));
            take_one(magnitude, chunk.origin, origin_element + i * chunk.element_stride);
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

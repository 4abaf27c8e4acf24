// norm_each: measures the partial of each segment of a chunk, one invocation a segment. Segments are columns, which lie
// side by side, or short rows. Host side: src/gpu/table/; twin: src/cpu/columns.rs.

#import constants
#import number
#import group
#import partial
#import half
#import windows
#import chunk
#import measure

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

// The magnitude of element `k` of the segment that begins with element `first`; 0 behind its last.
fn magnitude_of(chunk: Chunk, first: u32, k: u32) -> u32 {
    if k >= chunk.elements {
        return 0u;
    }
    let at = first + k * chunk.element_stride;
    let word = word_at(chunk.window, at / PER_WORD);
    let bits = select((word >> (16u * (at & 1u))) & 0xffffu, word, DTYPE == DTYPE_F32);
    return widened(DTYPE, bits) & MAGNITUDE;
}

fn four_of(chunk: Chunk, first: u32, k: u32) -> vec4<u32> {
    return vec4<u32>(
        magnitude_of(chunk, first, k),
        magnitude_of(chunk, first, k + 1u),
        magnitude_of(chunk, first, k + 2u),
        magnitude_of(chunk, first, k + 3u),
    );
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let row = index_of(group);
    if row >= table.tasks {
        return;
    }
    let chunk = table.chunks[row];
    if lane >= chunk.count {
        return;
    }
    let first = chunk.first + lane * chunk.segment_stride;
    begin();
    for (var span = 0u; span < chunk.elements; span += 16u * TREES_IN_FLOAT) {
        for (var k = span; k < min(span + 16u * TREES_IN_FLOAT, chunk.elements); k += 16u) {
            let magnitudes = Sixteen(
                four_of(chunk, first, k),
                four_of(chunk, first, k + 4u),
                four_of(chunk, first, k + 8u),
                four_of(chunk, first, k + 12u),
            );
            for (var again = take(magnitudes); again; again = false) {
                let one_by_one = take_again(magnitudes);
                for (var i = k; i < min(k + 16u, chunk.elements) && one_by_one; i += 1u) {
                    let place = chunk.origin_element + lane * chunk.segment_stride + i * chunk.element_stride;
                    take_one(magnitude_of(chunk, first, i), chunk.origin, place);
                }
            }
        }
        settle();
    }
    partials[chunk.slot + lane * chunk.slot_stride] = partial;
}

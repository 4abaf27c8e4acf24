// sum: adds up the scaled rows of a matrix, one row for each example, one invocation a column. Twin: src/cpu/sum.rs.
// Host side: src/gpu/table/sums.rs. Products are summed in float32: 32 of them, then 32 of those sums, then 32 of these.
// A chunk has no more rows, and adds its sum to that of the chunk before. With one unit for the product and one for its
// factor, the error is at most 98 and one for each chunk, in units of 2^-24 of the sum of the products' magnitudes.

#import constants
#import group
#import half
#import windows
#import chunk
#import apply

@group(1) @binding(2) var<storage, read_write> sums: array<u32>;

fn element_of(at: u32) -> u32 {
    let word = word_at(0u, at / PER_WORD);
    return widened(DTYPE, select((word >> (16u * (at & 1u))) & 0xffffu, word, DTYPE == DTYPE_F32));
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let row = index_of(group);
    if row >= table.tasks || results.refused != 0u {
        return;
    }
    let chunk = table.chunks[row];
    if lane >= chunk.count {
        return;
    }
    var total = 0.0;
    for (var k = 0u; k < chunk.elements; k += 1024u) {
        var outer = 0.0;
        for (var j = k; j < min(k + 1024u, chunk.elements); j += 32u) {
            var inner = 0.0;
            for (var i = j; i < min(j + 32u, chunk.elements); i += 1u) {
                let bits = element_of(chunk.first + lane * chunk.segment_stride + i * chunk.element_stride);
                inner += bitcast<f32>(applied(bits, DTYPE, results.outcomes[chunk.segment + i]));
            }
            outer += inner;
        }
        total += outer;
    }
    // A chunk of the first rows starts the sum; any other goes on.
    let into = chunk.slot + lane;
    if chunk.column != 0u {
        total += bitcast<f32>(sums[into]);
    }
    sums[into] = bitcast<u32>(total);
}

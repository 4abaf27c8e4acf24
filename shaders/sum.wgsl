// sum: adds up the scaled rows of a matrix, one row for each example, one invocation a column. Twin: src/cpu/sum.rs.
// Host side: src/gpu/table/sums.rs. Products are summed in float32: 16 of them, then 16 of those sums, then these. The
// error is at most 32 + rows / 256 units of 2^-24 of the sum of the products' magnitudes.

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
    // A chunk of the first rows starts at 0; any other goes on.
    let into = chunk.slot + lane;
    var total = select(0.0, bitcast<f32>(sums[into]), chunk.column != 0u);
    for (var k = 0u; k < chunk.elements; k += 256u) {
        var outer = 0.0;
        for (var j = k; j < min(k + 256u, chunk.elements); j += 16u) {
            var inner = 0.0;
            for (var i = j; i < min(j + 16u, chunk.elements); i += 1u) {
                let bits = element_of(chunk.first + lane * chunk.segment_stride + i * chunk.element_stride);
                inner += bitcast<f32>(applied(bits, DTYPE, results.outcomes[chunk.segment + i]));
            }
            outer += inner;
        }
        total += outer;
    }
    sums[into] = bitcast<u32>(total);
}

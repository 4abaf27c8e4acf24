// accumulate: merges the partial of some tensors into a running one or, with MOVES, moves the running one to where the
// report finds it, and empties it. Host side: src/gpu/accumulator.rs; twin: src/accumulator.rs.

#import constants
#import partial
#import outcome

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;
@group(1) @binding(0) var<storage, read_write> into: array<Partial>;

@compute @workgroup_size(1)
fn main() {
    let own = partials[params.total_partial];
    if MOVES {
        into[0] = own;
        partials[params.total_partial] = EMPTY_PARTIAL;
    } else {
        into[0] = merge(into[0], own);
    }
}

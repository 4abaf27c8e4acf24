// norm: measures the partial of each task of runs of one segment, one workgroup a task. An invocation takes blocks of 4
// quads. Host side: src/gpu/table/; twin: src/cpu/norm.rs.

#import constants
#import number
#import group
#import partial
#import merging
#import windows
#import chunk
#import measure
#import take_words

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

// Blocks that are summed in float32.
const BLOCKS_IN_FLOAT: u32 = TREES_IN_FLOAT / PER_WORD;

// How many quads are in flight outside whole blocks; software devices have none in flight.
const REST: u32 = select(4u, 1u, CONTIGUOUS);

fn take_chunk(chunk: Chunk, lane: u32) {
    let run = run_of(chunk);
    let none = vec4<u32>(0u);
    for (var again = lane < run.head + run.tail; again; again = false) {
        let i = ragged_word(run, lane);
        let word = vec4<u32>(own_word(run, chunk, i), 0u, 0u, 0u);
        take_words(run, chunk, Sixteen(word, none, none, none), i, 0u, 0u);
    }
    let blocks = blocks_of(run);
    let first = first_quad(lane, blocks);
    for (var span = 0u; span < blocks; span += BLOCKS_IN_FLOAT) {
        for (var block = span; block < min(blocks, span + BLOCKS_IN_FLOAT); block += 1u) {
            let i = first + 4u * APART * block;
            take_words(run, chunk, quads_of(run, i), run.head + 4u * i, 4u, APART);
        }
        settle();
    }
    for (var i = 4u * WORKGROUP * blocks + lane; i < run.quads; i += REST * WORKGROUP) {
        // As many as there are, and 0 for the others.
        let count = min((run.quads - i + WORKGROUP - 1u) / WORKGROUP, REST);
        let at = run.quad + i;
        let last = (count - 1u) * WORKGROUP;
        var quads = Sixteen(quad_at(run.window, at), none, none, none);
        if REST > 1u {
            quads.b = select(none, quad_at(run.window, at + min(WORKGROUP, last)), vec4<bool>(count > 1u));
            quads.c = select(none, quad_at(run.window, at + min(2u * WORKGROUP, last)), vec4<bool>(count > 2u));
            quads.d = select(none, quad_at(run.window, at + last), vec4<bool>(count > 3u));
        }
        take_words(run, chunk, quads, run.head + 4u * i, count, WORKGROUP);
    }
    settle();
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, me: Invocation) {
    let task = index_of(group);
    if task >= table.tasks {
        return;
    }
    var chunk = table.chunks[task];
    let slot = chunk.slot;
    begin();
    loop {
        take_chunk(chunk, me.lane);
        if chunk.next == 0u {
            break;
        }
        chunk = table.chunks[chunk.next];
    }
    let whole = merged_in_workgroup(me, partial);
    if leads(me) {
        partials[slot] = whole;
    }
}

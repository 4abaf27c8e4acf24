// merge: merges each run of consecutive partials of a row into one. The whole workgroup merges a single run; several
// runs are merged by an invocation each. Host side: src/gpu/merge.rs.

#import constants
#import group
#import partial
#import merging

struct MergeRow {
    start: u32,
    count: u32,
    into: u32,
    runs: u32,
}

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;
@group(1) @binding(0) var<storage, read> rows: array<MergeRow>;

// Partial `i`; an empty one at the end.
fn partial_at(i: u32, end: u32) -> Partial {
    let found = partials[min(i, end - 1u)];
    if i < end {
        return found;
    }
    return EMPTY_PARTIAL;
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, me: Invocation) {
    let index = index_of(group);
    if index >= arrayLength(&rows) {
        return;
    }
    let row = rows[index];
    let alone = row.runs == 1u;
    let lane = me.lane;
    let begin = select(row.start + lane * row.count, row.start, alone);
    let end = select(select(begin, begin + row.count, lane < row.runs), begin + row.count, alone);
    let first = select(begin, begin + lane, alone);
    let step = select(1u, WORKGROUP, alone);
    var own = EMPTY_PARTIAL;
    // Four in flight, which merge as a tree: the device has nothing else to do while one workgroup merges.
    for (var i = first; i < end; i += 4u * step) {
        let a = merge(partial_at(i, end), partial_at(i + step, end));
        let b = merge(partial_at(i + 2u * step, end), partial_at(i + 3u * step, end));
        own = merge(own, merge(a, b));
    }
    if alone {
        own = merged_in_workgroup(me, own);
    }
    if select(lane < row.runs, leads(me), alone) {
        partials[row.into + select(lane, 0u, alone)] = own;
    }
}

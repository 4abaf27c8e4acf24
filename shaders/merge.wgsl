// merge: consecutive partials into one, as many times as a row has runs: a single run by the whole workgroup, more than
// one by an invocation each. Host side: src/gpu/merge.rs.

struct MergeRow {
    start: u32,
    count: u32,
    into: u32,
    runs: u32,
}

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;
@group(1) @binding(0) var<storage, read> rows: array<MergeRow>;

@compute @workgroup_size(WORKGROUP)
fn main(me: Invocation) {
    let index = me.group.x + me.group.y * me.groups.x;
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
    for (var i = first; i < end; i += step) {
        own = merge(own, partials[i]);
    }
    if alone {
        own = merged_in_workgroup(me, own);
    }
    if select(lane < row.runs, leads(me), alone) {
        partials[row.into + select(lane, 0u, alone)] = own;
    }
}

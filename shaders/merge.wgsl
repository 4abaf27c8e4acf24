// merge: consecutive partials into one, one workgroup a row. Host side: src/gpu/plan.rs.

struct MergeRow {
    start: u32,
    count: u32,
    into: u32,
    padding: u32,
}

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;
@group(1) @binding(0) var<storage, read> rows: array<MergeRow>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    if index >= arrayLength(&rows) {
        return;
    }
    let row = rows[index];
    var own = EMPTY_PARTIAL;
    for (var i = lane; i < row.count; i += WORKGROUP) {
        own = merge(own, partials[row.start + i]);
    }
    let whole = merged_in_workgroup(lane, own);
    if lane == 0u {
        partials[row.into] = whole;
    }
}

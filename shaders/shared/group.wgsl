// The workgroup's number, apart from an invocation's own values: WGSL wants barriers and subgroup operations where all
// invocations provably meet, and judges a struct as a whole.

struct Group {
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
}

// The workgroup's number. A dispatch has a second dimension if one is too short.
fn index_of(group: Group) -> u32 {
    return group.id.x + group.id.y * group.count.x;
}

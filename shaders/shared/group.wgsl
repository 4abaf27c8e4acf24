// Which workgroup this is. Apart from what is an invocation's own, because WGSL wants barriers and operations of subgroups
// where all invocations provably meet, and counts a struct as a whole.

struct Group {
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
}

// Its number: a dispatch has a second dimension where one is too short.
fn index_of(group: Group) -> u32 {
    return group.id.x + group.id.y * group.count.x;
}

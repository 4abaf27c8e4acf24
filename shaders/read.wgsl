// read: only adds up the words of a buffer, to measure how fast the device reads. Host side: src/gpu/profile.rs.

#import constants
#import share

@group(0) @binding(0) var<storage, read> words: array<vec4<u32>>;
// One for each invocation.
@group(0) @binding(1) var<storage, read_write> sums: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let share = share_of(arrayLength(&words), group.x, groups.x, lane);
    var sum = vec4<u32>(0u);
    var i = share.first;
    // Four loads in flight.
    for (; i + 3u * APART < share.end; i += 4u * APART) {
        let a = words[i];
        let b = words[i + APART];
        let c = words[i + 2u * APART];
        let d = words[i + 3u * APART];
        sum += (a + b) + (c + d);
    }
    for (; i < share.end; i += APART) {
        sum += words[i];
    }
    sums[group.x * WORKGROUP + lane] = sum;
}

// probe: does what kernels leave to the device, for chosen values, so that the host can tell whether they may. Host side:
// src/gpu/probe.rs.

#import constants
#import pair

struct Asked {
    // Two float16s and a factor; and two float32s.
    halves: u32,
    factor: f32,
    low: f32,
    high: f32,
}

struct Answered {
    // The float16s as float32s, and their products with the factor as float16s.
    low: f32,
    high: f32,
    multiplied: u32,
    // The float32s as float16s, and their product.
    halves: u32,
    product: f32,
}

@group(0) @binding(0) var<storage, read> asked: array<Asked>;
@group(0) @binding(1) var<storage, read_write> answered: array<Answered>;

// There may be more questions than a dispatch has invocations.
@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var i = group.x * WORKGROUP + lane; i < arrayLength(&asked); i += groups.x * WORKGROUP) {
        let question = asked[i];
        let wide = widened_pair(question.halves);
        let multiplied = narrowed_pair(wide * question.factor);
        let narrow = narrowed_pair(vec2<f32>(question.low, question.high));
        answered[i] = Answered(wide.x, wide.y, multiplied, narrow, question.low * question.high);
    }
}

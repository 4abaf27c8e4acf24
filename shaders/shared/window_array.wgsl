// Gradients in WINDOWS windows, as words and as quads. No invocation reaches the same bytes both ways. Not standard
// WGSL: arrays of bindings need `enable wgpu_binding_array`, which src/gpu/kernels.rs puts first.

#import constants

struct Words {
    data: array<u32>,
}

struct Quads {
    data: array<vec4<u32>>,
}

@group(1) @binding(1) var<storage, read_write> words: binding_array<Words, WINDOWS>;
@group(1) @binding(2) var<storage, read_write> quads: binding_array<Quads, WINDOWS>;

fn word_at(window: u32, i: u32) -> u32 {
    return words[window].data[i];
}

fn set_word(window: u32, i: u32, word: u32) {
    words[window].data[i] = word;
}

fn quad_at(window: u32, i: u32) -> vec4<u32> {
    return quads[window].data[i];
}

fn set_quad(window: u32, i: u32, quad: vec4<u32>) {
    quads[window].data[i] = quad;
}

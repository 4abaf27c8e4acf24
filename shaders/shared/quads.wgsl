// The same window as `words`, as quads. No invocation reaches the same bytes both ways.

#import words

@group(1) @binding(2) var<storage, read_write> quads: array<vec4<u32>>;

fn quad_at(window: u32, i: u32) -> vec4<u32> {
    return quads[i];
}

fn set_quad(window: u32, i: u32, quad: vec4<u32>) {
    quads[i] = quad;
}

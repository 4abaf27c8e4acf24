// Quads where only words are bound.

#import words

fn quad_at(window: u32, i: u32) -> vec4<u32> {
    return vec4<u32>(
        word_at(window, 4u * i),
        word_at(window, 4u * i + 1u),
        word_at(window, 4u * i + 2u),
        word_at(window, 4u * i + 3u),
    );
}

fn set_quad(window: u32, i: u32, quad: vec4<u32>) {
    set_word(window, 4u * i, quad.x);
    set_word(window, 4u * i + 1u, quad.y);
    set_word(window, 4u * i + 2u, quad.z);
    set_word(window, 4u * i + 3u, quad.w);
}

// Gradients in one window, as words.

@group(1) @binding(1) var<storage, read_write> words: array<u32>;

fn word_at(window: u32, i: u32) -> u32 {
    return words[i];
}

fn set_word(window: u32, i: u32, word: u32) {
    words[i] = word;
}

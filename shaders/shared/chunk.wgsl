// Chunk: a piece of one tensor, as words of the window that is bound. Twin of `ChunkRow` in src/gpu/table.rs.

struct Chunk {
    // The first word in the window, and how many words the chunk's elements touch.
    word: u32,
    words: u32,
    // Elements of the first word that belong to something else: 0 or, in half precision, 1.
    skip: u32,
    elements: u32,
    // The words that hold nothing else, relative to `word`: these the chunk may write. Others are in the edge table.
    own_from: u32,
    own_to: u32,
    // Its place in the list of all chunks, and so of its partial.
    partial: u32,
    segment: u32,
}

@group(1) @binding(0) var<storage, read_write> words: array<u32>;
@group(1) @binding(1) var<storage, read> chunks: array<Chunk>;

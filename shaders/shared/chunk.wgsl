// Chunk: part of one tensor in the window that is bound, a run of elements or evenly spaced ones of many segments.
// Twin of `ChunkRow` in src/gpu/table.rs. Elements are counted from the start of the window.

struct Chunk {
    first: u32,
    // In the run, or in each segment.
    elements: u32,
    // The segment of the first element; and in a run over many segments, where in its row that element is, and how long
    // rows are.
    segment: u32,
    column: u32,
    columns: u32,
    // What the place of an element is told from, and the place of the first.
    origin: u32,
    origin_element: u32,
    // The place of the first segment's partial.
    slot: u32,
    // How many segments, and the distances from one to the next: of their elements, and of their partials.
    count: u32,
    segment_stride: u32,
    element_stride: u32,
    slot_stride: u32,
}

@group(1) @binding(0) var<storage, read_write> words: array<u32>;
@group(1) @binding(1) var<storage, read> chunks: array<Chunk>;

// A run of elements as words.
struct Run {
    // The first word, and how many the elements touch.
    word: u32,
    words: u32,
    // Elements of the first word that belong to something else: 0 or, in half precision, 1.
    skip: u32,
    // One past the last word that holds nothing else, counted from `word`; the first is at `skip`. These the chunk may
    // write; the others are in the edge table, if another tensor or nothing is there.
    own_to: u32,
}

fn run_of(chunk: Chunk) -> Run {
    let skip = chunk.first % PER_WORD;
    let end = skip + chunk.elements;
    return Run(chunk.first / PER_WORD, (end + PER_WORD - 1u) / PER_WORD, skip, end / PER_WORD);
}

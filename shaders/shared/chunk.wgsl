// Chunk: part of one tensor in a bound window, either a run of elements or evenly spaced ones of many segments. Twin of
// `ChunkRow` in src/gpu/table/rows.rs. Elements are counted from the start of the window.

#import constants
#import windows

struct Chunk {
    // Which of the windows that are bound.
    window: u32,
    first: u32,
    // In the run, or in each segment.
    elements: u32,
    // The segment of the first element and, in a run over many segments, that element's column and the length of rows.
    segment: u32,
    column: u32,
    columns: u32,
    // The origin from which elements are counted, and the first element counted from there.
    origin: u32,
    origin_element: u32,
    // The place of the first segment's partial.
    slot: u32,
    // How many segments, and the distances between: from one segment's elements to the next segment's, from one element
    // of a segment to the next, and from one segment's partial to the next segment's.
    count: u32,
    segment_stride: u32,
    element_stride: u32,
    slot_stride: u32,
    // The next chunk of the same task; 0 behind the last.
    next: u32,
}

// A task is what one workgroup does: enough chunks of one segment to be worth it. Task `i` begins with chunk `i`.
struct Table {
    tasks: u32,
    chunks: array<Chunk>,
}

@group(1) @binding(0) var<storage, read> table: Table;

// A run of elements as words.
struct Run {
    window: u32,
    // The first word, and how many words the elements touch.
    word: u32,
    words: u32,
    // Elements of the first word that are not the run's: 0 or, in half precision, 1.
    skip: u32,
    // The words from `skip` to before `own_to`, counted from `word`, hold nothing else. The chunk may write these; the
    // others are in the edge table, if another tensor or nothing is there.
    own_to: u32,
    // The words before the first and behind the last quad that is wholly the run's: at most 4 each.
    head: u32,
    tail: u32,
    // Those quads: the first, counted in the window, and how many.
    quad: u32,
    quads: u32,
}

fn run_of(chunk: Chunk) -> Run {
    let word = chunk.first / PER_WORD;
    let skip = chunk.first % PER_WORD;
    let end = skip + chunk.elements;
    let words = (end + PER_WORD - 1u) / PER_WORD;
    let own_to = end / PER_WORD;
    let quad = (word + skip + 3u) / 4u;
    let head = min(4u * quad - word, words);
    let quads = (max(own_to, head) - head) / 4u;
    return Run(chunk.window, word, words, skip, own_to, head, words - head - 4u * quads, quad, quads);
}

// The word of the run that is the k-th of those outside its quads.
fn ragged_word(run: Run, k: u32) -> u32 {
    return select(run.words - run.tail + k - run.head, k, k < run.head);
}

// Sixteen words, or the magnitudes of 16 elements.
struct Sixteen {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

// How many blocks, of 4 quads for each invocation, are in the run's quads.
fn blocks_of(run: Run) -> u32 {
    return run.quads / (4u * WORKGROUP);
}

// The first quad of an invocation, next to the others' or in a contiguous stretch. The quads of a block are APART quads
// apart.
fn first_quad(lane: u32, blocks: u32) -> u32 {
    return select(lane, 4u * blocks * lane, CONTIGUOUS);
}

fn quads_of(run: Run, i: u32) -> Sixteen {
    let at = run.quad + i;
    return Sixteen(
        quad_at(run.window, at),
        quad_at(run.window, at + APART),
        quad_at(run.window, at + 2u * APART),
        quad_at(run.window, at + 3u * APART),
    );
}

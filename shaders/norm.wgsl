// norm: measures the partial of each task of runs of one segment, one workgroup a task. An invocation takes blocks of 4
// quads. Host side: src/gpu/table/; twin: src/cpu/norm.rs.

#import constants
#import number
#import group
#import partial
#import merging
#import half
#import windows
#import chunk
#import measure

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

// Blocks that are summed in float32.
const BLOCKS_IN_FLOAT: u32 = TREES_IN_FLOAT / PER_WORD;

// How many quads are in flight outside whole blocks; software devices have none in flight.
const REST: u32 = select(4u, 1u, CONTIGUOUS);

// The word of the run, with 0 for elements that are not the run's.
fn own_word(run: Run, chunk: Chunk, i: u32) -> u32 {
    var word = word_at(run.window, run.word + i);
    if DTYPE != DTYPE_F32 {
        word &= select(0xffffffffu, 0xffff0000u, i == 0u && run.skip == 1u);
        word &= select(0xffffffffu, 0x0000ffffu, 2u * i + 1u == run.skip + chunk.elements);
    }
    return word;
}

// The magnitudes in words of float32, or in the halves of words that start at bit `shift`.
fn magnitudes_of_4(words: vec4<u32>, shift: u32) -> vec4<u32> {
    if DTYPE == DTYPE_F32 {
        return words & vec4<u32>(MAGNITUDE);
    }
    let halves = (words >> vec4<u32>(shift)) & vec4<u32>(0x7fffu);
    return vec4<u32>(
        widened(DTYPE, halves.x),
        widened(DTYPE, halves.y),
        widened(DTYPE, halves.z),
        widened(DTYPE, halves.w),
    );
}

fn magnitudes_of(words: Sixteen, shift: u32) -> Sixteen {
    return Sixteen(
        magnitudes_of_4(words.a, shift),
        magnitudes_of_4(words.b, shift),
        magnitudes_of_4(words.c, shift),
        magnitudes_of_4(words.d, shift),
    );
}

// Takes words of the run: `count` quads from word `i` on, `apart` quads apart, or with a count of 0 that word alone.
fn take_words(run: Run, chunk: Chunk, words: Sixteen, i: u32, count: u32, apart: u32) {
    // The halves of a word are not neighbours here, but no sum depends on which elements share a tree.
    for (var half = 0u; half < PER_WORD; half += 1u) {
        let magnitudes = magnitudes_of(words, 16u * half);
        // A loop, because software devices run the body of every branch, but not of every loop.
        for (var again = take(magnitudes); again; again = false) {
            let one_by_one = take_again(magnitudes);
            for (var k = 0u; k < max(4u * count, 1u) && one_by_one; k += 1u) {
                let j = i + 4u * apart * (k / 4u) + k % 4u;
                let word = own_word(run, chunk, j);
                let bits = select((word >> (16u * half)) & 0xffffu, word, DTYPE == DTYPE_F32);
                let element = PER_WORD * j + half - run.skip;
                take_one(widened(DTYPE, bits) & MAGNITUDE, chunk.origin, chunk.origin_element + element);
            }
        }
    }
}

fn take_chunk(chunk: Chunk, lane: u32) {
    let run = run_of(chunk);
    let none = vec4<u32>(0u);
    for (var again = lane < run.head + run.tail; again; again = false) {
        let i = ragged_word(run, lane);
        let word = vec4<u32>(own_word(run, chunk, i), 0u, 0u, 0u);
        take_words(run, chunk, Sixteen(word, none, none, none), i, 0u, 0u);
    }
    let blocks = blocks_of(run);
    let first = first_quad(lane, blocks);
    for (var span = 0u; span < blocks; span += BLOCKS_IN_FLOAT) {
        for (var block = span; block < min(blocks, span + BLOCKS_IN_FLOAT); block += 1u) {
            let i = first + 4u * APART * block;
            take_words(run, chunk, quads_of(run, i), run.head + 4u * i, 4u, APART);
        }
        settle();
    }
    for (var i = 4u * WORKGROUP * blocks + lane; i < run.quads; i += REST * WORKGROUP) {
        // As many as there are, and 0 for the others.
        let count = min((run.quads - i + WORKGROUP - 1u) / WORKGROUP, REST);
        let at = run.quad + i;
        let last = (count - 1u) * WORKGROUP;
        var quads = Sixteen(quad_at(run.window, at), none, none, none);
        if REST > 1u {
            quads.b = select(none, quad_at(run.window, at + min(WORKGROUP, last)), vec4<bool>(count > 1u));
            quads.c = select(none, quad_at(run.window, at + min(2u * WORKGROUP, last)), vec4<bool>(count > 2u));
            quads.d = select(none, quad_at(run.window, at + last), vec4<bool>(count > 3u));
        }
        take_words(run, chunk, quads, run.head + 4u * i, count, WORKGROUP);
    }
    settle();
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, me: Invocation) {
    let task = index_of(group);
    if task >= table.tasks {
        return;
    }
    begin();
    var row = task;
    loop {
        let chunk = table.chunks[row];
        take_chunk(chunk, me.lane);
        row = chunk.next;
        if row == 0u {
            break;
        }
    }
    let whole = merged_in_workgroup(me, partial);
    if leads(me) {
        partials[table.chunks[task].slot] = whole;
    }
}

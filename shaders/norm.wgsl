// norm: the partial of each chunk that is a run of one segment, one workgroup a chunk. Host side: src/gpu/plan.rs;
// twin: src/cpu/norm.rs. An invocation takes blocks of 16 words, WORKGROUP apart.

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

const BLOCK: u32 = 16u;
// Blocks that are summed in float32: 16 trees of 16 elements.
const BLOCKS_IN_FLOAT: u32 = 16u / PER_WORD;

// Word `i` of the run, with 0 for elements that are not the run's.
fn word_of(run: Run, chunk: Chunk, i: u32) -> u32 {
    if i >= run.words {
        return 0u;
    }
    var word = words[run.word + i];
    if DTYPE != DTYPE_F32 {
        if i == 0u && run.skip == 1u {
            word &= 0xffff0000u;
        }
        if 2u * i + 1u == run.skip + chunk.elements {
            word &= 0x0000ffffu;
        }
    }
    return word;
}

fn four_words(run: Run, chunk: Chunk, i: u32) -> vec4<u32> {
    return vec4<u32>(
        word_of(run, chunk, i),
        word_of(run, chunk, i + WORKGROUP),
        word_of(run, chunk, i + 2u * WORKGROUP),
        word_of(run, chunk, i + 3u * WORKGROUP),
    );
}

fn sixteen_words(run: Run, chunk: Chunk, i: u32) -> Sixteen {
    return Sixteen(
        four_words(run, chunk, i),
        four_words(run, chunk, i + 4u * WORKGROUP),
        four_words(run, chunk, i + 8u * WORKGROUP),
        four_words(run, chunk, i + 12u * WORKGROUP),
    );
}

// The magnitudes in words of float32, or in the halves of words that start at bit `shift`.
fn magnitudes_of_4(words: vec4<u32>, shift: u32) -> vec4<u32> {
    if DTYPE == DTYPE_F32 {
        return words & vec4<u32>(MAGNITUDE);
    }
    let halves = (words >> vec4<u32>(shift)) & vec4<u32>(0xffffu);
    return vec4<u32>(
        widened(DTYPE, halves.x),
        widened(DTYPE, halves.y),
        widened(DTYPE, halves.z),
        widened(DTYPE, halves.w),
    ) & vec4<u32>(MAGNITUDE);
}

fn magnitudes_of(words: Sixteen, shift: u32) -> Sixteen {
    return Sixteen(
        magnitudes_of_4(words.a, shift),
        magnitudes_of_4(words.b, shift),
        magnitudes_of_4(words.c, shift),
        magnitudes_of_4(words.d, shift),
    );
}

fn take_block(run: Run, chunk: Chunk, i: u32) {
    let block = sixteen_words(run, chunk, i);
    // Halves of one word do not follow one another here, but no sum depends on who shares a tree.
    for (var half = 0u; half < PER_WORD; half += 1u) {
        let again = take(magnitudes_of(block, 16u * half));
        // In the loop, because software devices run the body of every branch, but not of every loop.
        for (var k = 0u; k < BLOCK && again; k += 1u) {
            let j = i + k * WORKGROUP;
            let word = word_of(run, chunk, j);
            let bits = select((word >> (16u * half)) & 0xffffu, word, DTYPE == DTYPE_F32);
            let element = PER_WORD * j + half - run.skip;
            take_one(widened(DTYPE, bits) & MAGNITUDE, chunk.origin, chunk.origin_element + element);
        }
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if row >= arrayLength(&chunks) {
        return;
    }
    let chunk = chunks[row];
    let run = run_of(chunk);
    begin();
    let step = BLOCK * WORKGROUP;
    for (var span = 0u; span < run.words; span += BLOCKS_IN_FLOAT * step) {
        let end = min(run.words, span + BLOCKS_IN_FLOAT * step);
        for (var i = span; i < end; i += step) {
            take_block(run, chunk, i + lane);
        }
        settle();
    }
    let whole = merged_in_workgroup(lane, partial);
    if lane == 0u {
        partials[chunk.slot] = whole;
    }
}

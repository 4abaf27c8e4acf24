// Applies an outcome to a chunk: four quads at a time in plain arithmetic, and word by word where that does not suffice.

#import constants
#import outcome
#import windows
#import chunk
#import apply
#import quick
#import clamp_words
#import look
#import losses

fn applied_word(word: u32, outcome: Outcome) -> u32 {
    if DTYPE == DTYPE_F32 {
        return applied(word, DTYPE, outcome);
    }
    return applied_half(word & 0xffffu, DTYPE, outcome) | (applied_half(word >> 16u, DTYPE, outcome) << 16u);
}

// Looks at word `i` of the run and, if no other chunk has a part in it, writes the result.
fn apply_word(run: Run, chunk: Chunk, i: u32, outcome: Outcome) {
    let word = word_at(run.window, run.word + i);
    if VALUE {
        look_at_word(word, run, chunk, i);
    }
    let after = applied_word(word, outcome);
    lose_word(word, after, run, chunk, i, outcome, outcome);
    if WRITES && after != word && i >= run.skip && i < run.own_to {
        set_word(run.window, run.word + i, after);
    }
}

// How an outcome is applied to whole quads.
struct Way {
    // Whether plain arithmetic may suffice, and whether it is that of bits alone.
    quick: bool,
    by_bits: bool,
    by: Plain,
    to: Bounds,
}

fn way_of(outcome: Outcome) -> Way {
    // A bound that all finite elements exceed is infinite in this dtype, and the quick way makes no infinities.
    let infinite = VALUE && (params.min[DTYPE] == INFINITE || params.max[DTYPE] == (SIGN | INFINITE));
    let quick = outcome.action == APPLY && outcome.factor.is_float != 0u && !infinite;
    return Way(quick, VALUE && quick && is_by_bits(outcome.factor.value), plain(outcome.factor.value), bounds());
}

fn quickly_applied(x: Sixteen, way: Way) -> Sixteen {
    if !VALUE || NEVER_BY_BITS {
        return multiplied_sixteen(x, way.by);
    }
    // Loops, because software devices run the body of every branch, but not of every loop.
    var after = x;
    for (var once = way.by_bits; once; once = false) {
        after = Sixteen(
            clamped_quad(x.a, way.to),
            clamped_quad(x.b, way.to),
            clamped_quad(x.c, way.to),
            clamped_quad(x.d, way.to),
        );
    }
    for (var once = way.quick && !way.by_bits; once; once = false) {
        after = multiplied_sixteen(x, way.by);
    }
    return after;
}

fn multiplied_sixteen(x: Sixteen, by: Plain) -> Sixteen {
    return Sixteen(
        multiplied_quad(x.a, by),
        multiplied_quad(x.b, by),
        multiplied_quad(x.c, by),
        multiplied_quad(x.d, by),
    );
}

fn write_quad(run: Run, i: u32, before: vec4<u32>, after: vec4<u32>) {
    if any(after != before) {
        set_quad(run.window, run.quad + i, after);
    }
}

// Applies the outcome to all elements of a chunk.
fn apply_chunk(chunk: Chunk, lane: u32, outcome: Outcome) {
    let run = run_of(chunk);
    let way = way_of(outcome);
    // A loop, because software devices run the body of every branch, but not of every loop.
    for (var again = lane < run.head + run.tail; again; again = false) {
        apply_word(run, chunk, ragged_word(run, lane), outcome);
    }
    let blocks = blocks_of(run);
    let first = first_quad(lane, blocks);
    for (var block = 0u; block < blocks; block += 1u) {
        let i = first + 4u * APART * block;
        begin_block();
        let before = quads_of(run, i);
        let after = quickly_applied(before, way);
        let again = !way.quick || is_unusual();
        if !again {
            if VALUE {
                found(is_outside());
            }
            if WRITES && (!VALUE || !way.by_bits || is_outside()) {
                write_quad(run, i, before.a, after.a);
                write_quad(run, i + APART, before.b, after.b);
                write_quad(run, i + 2u * APART, before.c, after.c);
                write_quad(run, i + 3u * APART, before.d, after.d);
            }
        }
        for (var k = 0u; k < 16u && again; k += 1u) {
            apply_word(run, chunk, run.head + 4u * (i + APART * (k / 4u)) + k % 4u, outcome);
        }
    }
    for (var i = 4u * WORKGROUP * blocks + lane; i < run.quads; i += WORKGROUP) {
        begin_block();
        let before = quad_at(run.window, run.quad + i);
        var after = multiplied_quad(before, way.by);
        if VALUE && !NEVER_BY_BITS && way.by_bits {
            begin_block();
            after = clamped_quad(before, way.to);
        }
        let again = !way.quick || is_unusual();
        if !again {
            if VALUE {
                found(is_outside());
            }
            if WRITES {
                write_quad(run, i, before, after);
            }
        }
        for (var k = 0u; k < 4u && again; k += 1u) {
            apply_word(run, chunk, run.head + 4u * i + k, outcome);
        }
    }
}

// Applies the outcome to all chunks of the task that begins with chunk `first`.
fn apply_task(first: u32, lane: u32, outcome: Outcome) {
    var row = first;
    loop {
        let chunk = table.chunks[row];
        apply_chunk(chunk, lane, outcome);
        row = chunk.next;
        if row == 0u {
            break;
        }
    }
}

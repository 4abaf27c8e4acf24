// The quick way through a chunk: blocks of words, several in flight, in plain float32 arithmetic.

// Whether an element of the block at hand needs more than a float32 product: `applied` then decides.
var<private> unusual: bool;
// Whether an element of the block at hand lies outside the bounds of a value clip.
var<private> outside: bool;

// `applied` where the outcome is APPLY, the factor is a float32 and neither element nor product is unusual.
fn quickly_applied(bits: u32, factor: f32) -> u32 {
    let product = bitcast<u32>(bitcast<f32>(bits) * factor);
    let magnitude = bits & MAGNITUDE;
    let size = product & MAGNITUDE;
    // A driver may flush subnormals, and need not produce infinities.
    unusual |= magnitude >= INFINITE || size >= INFINITE || (size < SMALLEST_NORMAL && magnitude > 0u);
    if VALUE {
        let bounded = clamped(product, DTYPE);
        outside |= bounded != product;
        return bounded;
    }
    return product;
}

fn quickly_applied_half(half: u32, factor: f32) -> u32 {
    let bits = widened(DTYPE, half);
    let result = quickly_applied(bits, factor);
    return select(narrowed(DTYPE, result), half, result == bits);
}

fn quickly_applied_word(word: u32, factor: f32) -> u32 {
    if DTYPE == DTYPE_F32 {
        return quickly_applied(word, factor);
    }
    return quickly_applied_half(word & 0xffffu, factor) | (quickly_applied_half(word >> 16u, factor) << 16u);
}

// Words in a block, WORKGROUP apart.
const BLOCK: u32 = 4u;

// Word `i + k * WORKGROUP` of the run or, past its end, word `i`: the block's first, which no other invocation writes.
fn word_or_first(run: Run, i: u32, k: u32) -> u32 {
    let j = i + k * WORKGROUP;
    return words[run.word + select(i, j, j < run.words)];
}

fn write(run: Run, i: u32, before: u32, after: u32) {
    if after != before && i >= run.skip && i < run.own_to {
        words[run.word + i] = after;
    }
}

// Applies the outcome to the block that starts at word `i`, unless something in it is unusual: then returns true, and
// the block is to be walked word by word. On software devices the condition of that must stand in the loop: they run
// the body of every branch, but not of every loop.
fn apply_block(run: Run, i: u32, outcome: Outcome, looks_closer: bool) -> bool {
    unusual = looks_closer || outcome.action != APPLY || outcome.factor.is_float == 0u;
    outside = false;
    let factor = bitcast<f32>(outcome.factor.value);
    let a = word_or_first(run, i, 0u);
    let b = word_or_first(run, i, 1u);
    let c = word_or_first(run, i, 2u);
    let d = word_or_first(run, i, 3u);
    let e = quickly_applied_word(a, factor);
    let f = quickly_applied_word(b, factor);
    let g = quickly_applied_word(c, factor);
    let h = quickly_applied_word(d, factor);
    if WRITES && !unusual {
        write(run, i, a, e);
        write(run, i + WORKGROUP, b, f);
        write(run, i + 2u * WORKGROUP, c, g);
        write(run, i + 3u * WORKGROUP, d, h);
    }
    return unusual;
}

fn applied_word(word: u32, outcome: Outcome) -> u32 {
    if DTYPE == DTYPE_F32 {
        return applied(word, DTYPE, outcome);
    }
    return applied_half(word & 0xffffu, DTYPE, outcome) | (applied_half(word >> 16u, DTYPE, outcome) << 16u);
}

// clamp: takes the elements of each chunk to the bounds of a value clip and tells what it met, one workgroup a chunk.
// Without WRITES it only looks. Twin: src/cpu/clamp.rs.

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

var<private> partial: Partial;

fn look(bits: u32, chunk: Chunk, element: u32) {
    let magnitude = bits & MAGNITUDE;
    var value = bits;
    if magnitude >= INFINITE {
        partial = with_non_finite(partial, magnitude, chunk.origin, chunk.origin_element + element);
        if params.policy == POLICY_DROP {
            return;
        }
    } else {
        value = scaled(bits, unscale());
    }
    if clamped(value, DTYPE) != value {
        partial.flags |= OUTSIDE;
    }
}

fn look_at_word(word: u32, run: Run, chunk: Chunk, i: u32) {
    if DTYPE == DTYPE_F32 {
        look(word, chunk, i);
        return;
    }
    if 2u * i >= run.skip {
        look(widened(DTYPE, word & 0xffffu), chunk, 2u * i - run.skip);
    }
    if 2u * i + 1u < run.skip + chunk.elements {
        look(widened(DTYPE, word >> 16u), chunk, 2u * i + 1u - run.skip);
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
    let outcome = outcome_of(chunk.segment);
    if outcome.action == LEAVE {
        return;
    }
    partial = EMPTY_PARTIAL;
    for (var i = lane; i < run.words; i += BLOCK * WORKGROUP) {
        // The first and the last word may hold an element that is not the chunk's, and of which it must not tell.
        let shares = (run.skip > 0u && i == lane)
            || (run.own_to < run.words && i + BLOCK * WORKGROUP >= run.words);
        let again = apply_block(run, i, outcome, shares);
        if !again && outside {
            partial.flags |= OUTSIDE;
        }
        for (var k = 0u; k < BLOCK && again; k += 1u) {
            let j = i + k * WORKGROUP;
            if j < run.words {
                let word = words[run.word + j];
                look_at_word(word, run, chunk, j);
                if WRITES {
                    write(run, j, word, applied_word(word, outcome));
                }
            }
        }
    }
    let whole = merged_in_workgroup(lane, partial);
    if lane == 0u {
        partials[chunk.slot] = whole;
    }
}

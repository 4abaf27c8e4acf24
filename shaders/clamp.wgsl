// clamp: takes the elements of each task to the bounds of a value clip and tells what it met, one workgroup a task.
// Without WRITES it only looks. Twin: src/cpu/clamp.rs.

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

var<private> partial: Partial;

fn found(outside: bool) {
    partial.flags |= select(0u, OUTSIDE, outside);
}

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
    found(clamped(value, DTYPE) != value);
}

// The first and the last word may hold an element that is not the chunk's, and of which it must not tell.
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
fn main(me: Invocation) {
    let task = me.group.x + me.group.y * me.groups.x;
    if task >= table.tasks {
        return;
    }
    // The same for all chunks of a task.
    let outcome = outcome_of(table.chunks[task].segment);
    if outcome.action == LEAVE {
        return;
    }
    partial = EMPTY_PARTIAL;
    apply_task(task, me.lane, outcome);
    let whole = merged_in_workgroup(me, partial);
    if leads(me) {
        partials[table.chunks[task].slot] = whole;
    }
}

// scale: multiplies the elements of each task by the factor of its one segment, one workgroup a task. Twin:
// src/cpu/scale.rs. Tasks are walked from the last to the first: what the norm has read last may still be in a cache.

// What `clamp` tells of. Scaling has nothing to tell.
fn look_at_word(word: u32, run: Run, chunk: Chunk, i: u32) {}

fn found(outside: bool) {}

@compute @workgroup_size(WORKGROUP)
fn main(me: Invocation) {
    let task = me.group.x + me.group.y * me.groups.x;
    if task >= table.tasks {
        return;
    }
    let row = table.tasks - 1u - task;
    // The same for all chunks of a task.
    let outcome = outcome_of(table.chunks[row].segment);
    if outcome.action == LEAVE {
        return;
    }
    apply_task(row, me.lane, outcome);
}

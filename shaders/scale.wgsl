// scale: multiplies the elements of each task by the factor of its one segment, one workgroup a task. Twin:
// src/cpu/scale.rs. Tasks are walked from the last to the first: what the norm has read last may still be in a cache.

#import constants
#import group
#import outcome
#import chunk
#import apply
#import apply_chunk
#import losses

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let task = index_of(group);
    if task >= table.tasks {
        return;
    }
    let row = table.tasks - 1u - task;
    // The same for all chunks of a task.
    let outcome = outcome_of(table.chunks[row].segment);
    if outcome.action == LEAVE {
        return;
    }
    apply_task(row, lane, outcome);
    add_losses();
}

// clamp: clamps the elements of each task to the bounds of a value clip and reports what it found, one workgroup a
// task. Without WRITES it only looks. Twin: src/cpu/clamp.rs.

#import constants
#import group
#import partial
#import merging
#import outcome
#import chunk
#import apply
#import look
#import apply_chunk
#import losses

@group(0) @binding(0) var<storage, read_write> partials: array<Partial>;

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, me: Invocation) {
    let task = index_of(group);
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
    add_losses();
    let whole = merged_in_workgroup(me, partial);
    if leads(me) {
        partials[table.chunks[task].slot] = whole;
    }
}

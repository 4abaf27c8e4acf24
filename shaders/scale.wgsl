// scale: multiplies the elements of each chunk by the factor of its one segment, one workgroup a chunk. Twin:
// src/cpu/scale.rs.

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
    for (var i = lane; i < run.own_to; i += BLOCK * WORKGROUP) {
        let again = apply_block(run, i, outcome, false);
        for (var k = 0u; k < BLOCK && again; k += 1u) {
            let word = word_or_first(run, i, k);
            write(run, i + k * WORKGROUP, word, applied_word(word, outcome));
        }
    }
}

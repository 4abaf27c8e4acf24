// Merges the partials of a workgroup where there are no subgroups: by a tree in workgroup memory.

#import constants
#import partial

struct Invocation {
    @builtin(local_invocation_index) lane: u32,
}

var<workgroup> tree: array<Partial, WORKGROUP>;

// Merges the partials of all invocations, in a fixed tree. Valid in the invocation that leads.
fn merged_in_workgroup(me: Invocation, own: Partial) -> Partial {
    tree[me.lane] = own;
    for (var width = WORKGROUP / 2u; width > 0u; width = width / 2u) {
        workgroupBarrier();
        if me.lane < width {
            tree[me.lane] = merge(tree[me.lane], tree[me.lane + width]);
        }
    }
    return tree[me.lane];
}

fn leads(me: Invocation) -> bool {
    return me.lane == 0u;
}

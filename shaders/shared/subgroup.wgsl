// Merges the partials of a workgroup where there are subgroups, of any size: first in each subgroup, by its own
// operations, then over the subgroups. Sums are aligned and added as integers, so that no order matters.

#import constants
#import number
#import partial

struct Invocation {
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
    @builtin(subgroup_size) subgroup_size: u32,
}

// One for each subgroup. A device that made more than it says could be wrong in its norm, but not beyond this array.
var<workgroup> tree: array<Partial, SUBGROUPS>;

// Merges the partials of the invocations of a subgroup. All of them must be active.
fn merged_in_subgroup(own: Partial) -> Partial {
    var whole = own;
    // Mantissas in units of the largest exponent, in two halves, so that their sum over a subgroup is exact.
    let top = subgroupMax(select(-0x7fffffff, own.sum.exponent, own.sum.mantissa != 0u));
    let shift = u32(top - own.sum.exponent);
    let shifted = own.sum.mantissa >> (min(shift, 32u) - min(shift, 1u));
    let aligned = select(select((shifted >> 1u) + (shifted & 1u), 0u, shift > 32u), own.sum.mantissa, shift == 0u);
    let units = select(aligned, 0u, own.sum.mantissa == 0u);
    let low = subgroupAdd(units & 0xffffu);
    let high = subgroupAdd(units >> 16u);
    whole.sum = add(normalised(low, top), normalised(high, top + 16));
    whole.max = subgroupMax(own.max);
    whole.flags = subgroupOr(own.flags);
    let low_count = subgroupAdd(own.non_finite & 0xffffu);
    let high_count = subgroupAdd(own.non_finite >> 16u) + (low_count >> 16u);
    whole.non_finite = (low_count & 0xffffu) | (high_count << 16u);
    whole.non_finite_high = subgroupAdd(own.non_finite_high) + (high_count >> 16u);
    whole.first_origin = subgroupMin(own.first_origin);
    whole.first_element = subgroupMin(select(NOWHERE, own.first_element, own.first_origin == whole.first_origin));
    return whole;
}

// Merges the partials of all invocations: those of each subgroup, then one subgroup after another. Valid in the invocation
// that leads.
fn merged_in_workgroup(me: Invocation, own: Partial) -> Partial {
    let part = merged_in_subgroup(own);
    if me.subgroup_lane == 0u {
        tree[min(me.subgroup, SUBGROUPS - 1u)] = part;
    }
    workgroupBarrier();
    var whole = EMPTY_PARTIAL;
    for (var i = 0u; leads(me) && i < min(me.subgroups, SUBGROUPS); i += 1u) {
        whole = merge(whole, tree[i]);
    }
    return whole;
}

fn leads(me: Invocation) -> bool {
    return me.subgroup == 0u && me.subgroup_lane == 0u;
}

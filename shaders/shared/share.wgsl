// Share: the part of a sweep over all words that one invocation takes. Each workgroup has an even part. In it an
// invocation takes one run (CONTIGUOUS) or every WORKGROUP-th word.

#import constants

struct Share {
    first: u32,
    end: u32,
}

fn share_of(words: u32, group: u32, groups: u32, lane: u32) -> Share {
    // There are at most 2^27 words (2 GiB, the largest binding), so nothing here wraps.
    let each = (words + groups * WORKGROUP - 1u) / (groups * WORKGROUP);
    let start = group * each * WORKGROUP;
    let end = min(words, start + each * WORKGROUP);
    if CONTIGUOUS {
        let first = start + lane * each;
        return Share(first, min(end, first + each));
    }
    return Share(start + lane, end);
}

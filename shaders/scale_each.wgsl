// scale_each: multiplies each element of each chunk by the factor of its own segment, one workgroup a chunk. Segments
// are rows or, with COLUMNS, columns. Twin: src/cpu/scale.rs.

#import constants
#import number
#import group
#import outcome
#import half
#import pair
#import windows
#import chunk
#import apply
#import quick
#import losses

const PER_QUAD: u32 = 4u * PER_WORD;

// The place of an element in the matrix.
struct Place {
    row: u32,
    column: u32,
}

fn place_of(element: u32, columns: u32) -> Place {
    return Place(element / columns, element % columns);
}

fn next(place: Place, columns: u32) -> Place {
    let wraps = place.column + 1u == columns;
    return Place(place.row + select(0u, 1u, wraps), select(place.column + 1u, 0u, wraps));
}

// The place of the first element of the word behind.
fn next_word(place: Place, columns: u32) -> Place {
    if PER_WORD == 2u {
        return next(next(place, columns), columns);
    }
    return next(place, columns);
}

fn segment_at(chunk: Chunk, place: Place) -> u32 {
    return chunk.segment + select(place.row, place.column, COLUMNS);
}

// Whether all segments of the chunk are left as they are. `finalise` tells it of WORKGROUP segments at a time. So if others
// of these change, it is false.
fn is_left(chunk: Chunk) -> bool {
    let end = chunk.column + chunk.elements - 1u;
    var first = chunk.segment - params.first_segment;
    var last = first + end / chunk.columns;
    if COLUMNS {
        let one_row = end < chunk.columns;
        last = first + select(chunk.columns - 1u, end, one_row);
        first += select(0u, chunk.column, one_row);
    }
    var left = true;
    for (var i = first / WORKGROUP; i <= last / WORKGROUP && left; i += 1u) {
        left = (results.outcomes[params.first_segment + i * WORKGROUP].flags & ALL_LEFT) != 0u;
    }
    return left;
}

// Applies the outcomes to word `i` of the run, of which the chunk has the element at `place` and, if there is one, the
// next.
fn apply_word_each(run: Run, chunk: Chunk, i: u32, place: Place) {
    let word = word_at(run.window, run.word + i);
    let low = results.outcomes[segment_at(chunk, place)];
    var high = low;
    var after = word;
    if DTYPE == DTYPE_F32 {
        after = applied(word, DTYPE, low);
    } else {
        if i >= run.skip {
            high = results.outcomes[segment_at(chunk, next(place, chunk.columns))];
        }
        after = applied_half(word & 0xffffu, DTYPE, low) | (applied_half(word >> 16u, DTYPE, high) << 16u);
    }
    lose_word(word, after, run, chunk, i, low, high);
    if after != word && i >= run.skip && i < run.own_to {
        set_word(run.window, run.word + i, after);
    }
}

// The factor of a segment's elements, if they need no more than plain products: 1 leaves them. Each member is loaded by
// itself, because software devices read all members of a struct that is loaded, used or not.
fn factor_at(segment: u32) -> u32 {
    let action = results.outcomes[segment].action;
    let is_float = results.outcomes[segment].factor.is_float;
    let value = results.outcomes[segment].factor.value;
    // `||` and `&&` would be branches.
    unusual |= select(SIGN, 0u, (action == LEAVE) | ((action == APPLY) & (is_float != 0u)));
    return select(value, ONE, action == LEAVE);
}

// A quad whose elements are all of one segment.
fn multiplied_together(quad: vec4<u32>, segment: u32) -> vec4<u32> {
    return multiplied_quad(quad, plain(factor_at(segment)));
}

// Products from LEAST_PRODUCT to below PRODUCTS_TO are taken as they are. A driver may have flushed a smaller one, or made
// a larger one finite that should be infinite. In float16 the conversion of a larger one may overflow. With COUNTS no product
// in between becomes 0 or infinite.
const LEAST_PRODUCT: u32 = select(SMALLEST_NORMAL, 0x33800000u, COUNTS && DTYPE == DTYPE_F16); // 2^-24
const PRODUCTS_TO: u32 = select(0x7f000000u, 0x47000000u, DTYPE == DTYPE_F16); // 2^127; 2^15

// An element as a float32 times a factor. Where each has its own factor, looking at the product is quicker than `plain`.
fn product_of(x: f32, factor: u32) -> f32 {
    let product = x * bitcast<f32>(factor);
    let size = bitcast<u32>(product) & MAGNITUDE;
    let magnitude = bitcast<u32>(x) & MAGNITUDE;
    let normal = (magnitude < INFINITE) & (size >= LEAST_PRODUCT) & (size < PRODUCTS_TO);
    unusual |= select(SIGN, 0u, NATIVE_PRODUCTS & (normal | (magnitude == 0u)));
    return product;
}

// A word whose elements may be of two segments.
fn multiplied_apart(word: u32, chunk: Chunk, first: Place) -> u32 {
    let low = factor_at(segment_at(chunk, first));
    if DTYPE == DTYPE_F32 {
        return bitcast<u32>(product_of(bitcast<f32>(word), low));
    }
    let high = factor_at(segment_at(chunk, next(first, chunk.columns)));
    // Only finite elements of float16 are converted rightly.
    unusual |= select(0u, (word & ~SIGNS) + EACH * (1u << FRACTION), DTYPE == DTYPE_F16);
    let pair = widened_pair(word);
    return narrowed_pair(vec2<f32>(product_of(pair.x, low), product_of(pair.y, high)));
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let row = index_of(group);
    if row >= table.tasks || results.refused != 0u {
        return;
    }
    let chunk = table.chunks[row];
    if is_left(chunk) {
        return;
    }
    let run = run_of(chunk);
    // Loops, because software devices run the body of every branch, but not of every loop.
    for (var once = lane < run.head + run.tail; once; once = false) {
        let i = ragged_word(run, lane);
        let element = max(i * PER_WORD, run.skip) - run.skip;
        // The first word may begin with an element that is not the chunk's. It is not written.
        apply_word_each(run, chunk, i, place_of(chunk.column + element, chunk.columns));
    }
    // An invocation takes quads at even distances and divides once.
    let step = place_of(WORKGROUP * PER_QUAD, chunk.columns);
    var place = place_of(chunk.column + run.head * PER_WORD - run.skip + lane * PER_QUAD, chunk.columns);
    for (var i = lane; i < run.quads; i += WORKGROUP) {
        begin_block();
        let before = quad_at(run.window, run.quad + i);
        var after = before;
        let together = !COLUMNS && place.column + PER_QUAD <= chunk.columns;
        for (var once = together; once; once = false) {
            after = multiplied_together(before, segment_at(chunk, place));
        }
        for (var once = !together; once; once = false) {
            let second = next_word(place, chunk.columns);
            let third = next_word(second, chunk.columns);
            after = vec4<u32>(
                multiplied_apart(before.x, chunk, place),
                multiplied_apart(before.y, chunk, second),
                multiplied_apart(before.z, chunk, third),
                multiplied_apart(before.w, chunk, next_word(third, chunk.columns)),
            );
        }
        let again = is_unusual();
        if !again && any(after != before) {
            set_quad(run.window, run.quad + i, after);
        }
        var own = place;
        for (var k = 0u; k < 4u && again; k += 1u) {
            apply_word_each(run, chunk, run.head + 4u * i + k, own);
            own = next_word(own, chunk.columns);
        }
        place.row += step.row;
        place.column += step.column;
        if place.column >= chunk.columns {
            place.column -= chunk.columns;
            place.row += 1u;
        }
    }
    add_losses();
}

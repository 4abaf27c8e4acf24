// scale_each: multiplies each element of each chunk by the factor of its own segment, one workgroup a chunk. Segments
// are rows or, with COLUMNS, columns. Twin: src/cpu/scale.rs.

#import constants
#import number
#import group
#import outcome
#import half
#import windows
#import chunk
#import apply
#import quick

// The place of a word's first element in the matrix. An invocation takes words at even distances and divides once.
struct Place {
    row: u32,
    column: u32,
}

fn next(place: Place, columns: u32) -> Place {
    if place.column + 1u == columns {
        return Place(place.row + 1u, 0u);
    }
    return Place(place.row, place.column + 1u);
}

fn segment_at(chunk: Chunk, place: Place) -> u32 {
    return chunk.segment + select(place.row, place.column, COLUMNS);
}

// `applied` where the outcome is LEAVE or APPLY, and neither factor nor element nor product is unusual.
fn quickly_applied_each(bits: u32, segment: u32) -> u32 {
    let outcome = results.outcomes[segment];
    if outcome.action == LEAVE {
        return bits;
    }
    if outcome.action != APPLY || outcome.factor.is_float == 0u {
        largest = INFINITE;
    }
    return quickly_applied(bits, bitcast<f32>(outcome.factor.value));
}

// The same for an element of half precision.
fn quickly_applied_half_each(half: u32, segment: u32) -> u32 {
    let bits = widened(DTYPE, half);
    let result = quickly_applied_each(bits, segment);
    return select(narrowed(DTYPE, result), half, result == bits);
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let row = index_of(group);
    if row >= table.tasks || results.refused != 0u {
        return;
    }
    let chunk = table.chunks[row];
    let run = run_of(chunk);
    let step = WORKGROUP * PER_WORD;
    // The first word may begin with an element that is not the chunk's. It is not written, and the chunk's first takes
    // its place.
    let start = chunk.column + max(lane * PER_WORD, run.skip) - run.skip;
    var place = Place(start / chunk.columns, start % chunk.columns);
    let rows_on = step / chunk.columns;
    let columns_on = step % chunk.columns;
    for (var i = lane; i < run.own_to; i += WORKGROUP) {
        begin_block();
        let word = word_at(run.window, run.word + i);
        let low = segment_at(chunk, place);
        let high = segment_at(chunk, next(place, chunk.columns));
        var after = word;
        if DTYPE == DTYPE_F32 {
            after = quickly_applied_each(word, low);
        } else {
            after = quickly_applied_half_each(word & 0xffffu, low)
                | (quickly_applied_half_each(word >> 16u, high) << 16u);
        }
        for (var again = is_unusual(); again; again = false) {
            if DTYPE == DTYPE_F32 {
                after = applied(word, DTYPE, results.outcomes[low]);
            } else {
                after = applied_half(word & 0xffffu, DTYPE, results.outcomes[low])
                    | (applied_half(word >> 16u, DTYPE, results.outcomes[high]) << 16u);
            }
        }
        if after != word && i >= run.skip {
            set_word(run.window, run.word + i, after);
        }
        // On by `step` elements; by one fewer from a first word that is not wholly the chunk's.
        let skipped = select(0u, run.skip, i == 0u);
        place.column += columns_on;
        place.row += rows_on;
        if place.column >= chunk.columns {
            place.column -= chunk.columns;
            place.row += 1u;
        }
        if skipped == 1u {
            if place.column == 0u {
                place = Place(place.row - 1u, chunk.columns - 1u);
            } else {
                place.column -= 1u;
            }
        }
    }
}

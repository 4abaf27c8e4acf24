// step: takes the step of an optimizer, one workgroup a task: clips each gradient in registers, and writes parameters and
// state. Twin: src/cpu/step.rs. Host side: src/gpu/step.rs, src/gpu/table/steps.rs. Tasks are walked from the last to the
// first: what the norm has read last may still be in a cache.

#import constants
#import step_constants
#import number
#import group
#import outcome
#import half
#import apply
#import quick
#import update

// Consecutive elements of a parameter, their gradients and their state. Twin of `StepRow` in src/gpu/table/rows.rs.
struct Row {
    // The first element, counted from the start of the gradient's and of the parameter's window.
    gradient: u32,
    parameter: u32,
    elements: u32,
    // The word of the first element in its first tensor of state, and the distance to its next tensor.
    state: u32,
    stride: u32,
    // The word of the first element in what is kept of halves.
    kept: u32,
    // The first element's segment, its column, the length of rows, and whether columns are segments.
    segment: u32,
    column: u32,
    columns: u32,
    by_column: u32,
    // The next row of the same task; 0 behind the last.
    next: u32,
}

// Task `i` begins with row `i`.
struct Table {
    tasks: u32,
    rows: array<Row>,
}

@group(1) @binding(0) var<storage, read> table: Table;
// Gradients are only read. They are bound as they are elsewhere, because they may share a buffer with parameters.
@group(1) @binding(1) var<storage, read_write> gradients: array<u32>;
@group(1) @binding(2) var<storage, read_write> parameters: array<u32>;
@group(1) @binding(3) var<storage, read_write> state: array<u32>;

// Elements in a word of parameters, and words for four elements.
const IN_WORD: u32 = select(2u, 1u, PARAMETER == DTYPE_F32);
const WORDS: u32 = 4u / IN_WORD;

// The tensors of state, counted in strides.
const PLACE_OF_C: u32 = select(2u, select(1u, 2u, BUFFERED), ALGORITHM == ALGORITHM_RMSPROP);
const HAS_A: bool = ALGORITHM != ALGORITHM_SGD || BUFFERED;
const HAS_B: bool = ALGORITHM == ALGORITHM_ADAM || (ALGORITHM == ALGORITHM_RMSPROP && BUFFERED);

// Four elements of a row. One that lies outside stands for the nearest inside, and is not written.
struct Four {
    at: vec4<u32>,
    own: vec4<bool>,
    // Words of parameters, counted from the first, at most the last.
    words: vec4<u32>,
    own_words: vec4<bool>,
}

fn four_at(row: Row, first: u32) -> Four {
    let words = first + select(vec4<u32>(0u, 0u, 1u, 1u), vec4<u32>(0u, 1u, 2u, 3u), vec4<bool>(IN_WORD == 1u)) * APART;
    let skip = row.parameter % IN_WORD;
    let end = skip + row.elements;
    let place = words * IN_WORD + select(vec4<u32>(0u, 1u, 0u, 1u), vec4<u32>(0u), vec4<bool>(IN_WORD == 1u));
    let own = (place >= vec4<u32>(skip)) & (place < vec4<u32>(end));
    let at = clamp(place, vec4<u32>(skip), vec4<u32>(end - 1u)) - skip;
    let last = (end - 1u) / IN_WORD;
    return Four(at, own, min(words, vec4<u32>(last)), words <= vec4<u32>(last));
}

fn gradient_at(i: u32) -> u32 {
    if GRADIENT == DTYPE_F32 {
        return gradients[i];
    }
    return widened(GRADIENT, (gradients[i / 2u] >> (16u * (i & 1u))) & 0xffffu);
}

// The factor of the segment that is taken. Where a product with it is not all that the clip does, no element is plain.
var<private> by: Plain;

fn take_factor(segment: u32) {
    let outcome = results.outcomes[segment];
    by = plain(outcome.factor.value);
    if (outcome.action != APPLY && outcome.action != LEAVE) || outcome.factor.is_float == 0u {
        by.reaching_beyond = SIGNS;
    }
}

fn segment_at(row: Row, i: u32) -> u32 {
    if !SEVERAL_SEGMENTS {
        return row.segment;
    }
    let place = row.column + i;
    return row.segment + select(place / row.columns, place % row.columns, row.by_column != 0u);
}

fn quickly_clipped(bits: u32, segment: u32) -> u32 {
    if SEVERAL_SEGMENTS {
        take_factor(segment);
    }
    return multiplied(bits, by);
}

fn clipped(row: Row, at: vec4<u32>) -> vec4<f32> {
    let bits = vec4<u32>(
        gradient_at(row.gradient + at.x),
        gradient_at(row.gradient + at.y),
        gradient_at(row.gradient + at.z),
        gradient_at(row.gradient + at.w),
    );
    let segments =
        vec4<u32>(segment_at(row, at.x), segment_at(row, at.y), segment_at(row, at.z), segment_at(row, at.w));
    begin_block();
    var u = vec4<u32>(
        quickly_clipped(bits.x, segments.x),
        quickly_clipped(bits.y, segments.y),
        quickly_clipped(bits.z, segments.z),
        quickly_clipped(bits.w, segments.w),
    );
    // A loop, because software devices run the body of every branch, but not of every loop.
    for (var again = is_unusual(); again; again = false) {
        u = vec4<u32>(
            applied(bits.x, DTYPE_F32, results.outcomes[segments.x]),
            applied(bits.y, DTYPE_F32, results.outcomes[segments.y]),
            applied(bits.z, DTYPE_F32, results.outcomes[segments.z]),
            applied(bits.w, DTYPE_F32, results.outcomes[segments.w]),
        );
    }
    return bitcast<vec4<f32>>(u);
}

fn state_at(first: u32, at: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(
        vec4<u32>(state[first + at.x], state[first + at.y], state[first + at.z], state[first + at.w]),
    );
}

fn set_state(first: u32, four: Four, to: vec4<f32>) {
    let bits = bitcast<vec4<u32>>(to);
    if four.own.x {
        state[first + four.at.x] = bits.x;
    }
    if four.own.y {
        state[first + four.at.y] = bits.y;
    }
    if four.own.z {
        state[first + four.at.z] = bits.z;
    }
    if four.own.w {
        state[first + four.at.w] = bits.w;
    }
}

// The halves of two words.
fn halves_of(x: u32, z: u32) -> vec4<u32> {
    return vec4<u32>(x & 0xffffu, x >> 16u, z & 0xffffu, z >> 16u);
}

fn parameters_at(row: Row, four: Four) -> vec4<u32> {
    let first = row.parameter / IN_WORD;
    if IN_WORD == 1u {
        return vec4<u32>(
            parameters[first + four.words.x],
            parameters[first + four.words.y],
            parameters[first + four.words.z],
            parameters[first + four.words.w],
        );
    }
    return halves_of(parameters[first + four.words.x], parameters[first + four.words.z]);
}

fn kept_halves_at(row: Row, four: Four) -> vec4<u32> {
    return halves_of(state[row.kept + four.words.x], state[row.kept + four.words.z]);
}

fn widened_four(bits: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(
        widened(PARAMETER, bits.x),
        widened(PARAMETER, bits.y),
        widened(PARAMETER, bits.z),
        widened(PARAMETER, bits.w),
    );
}

// The parameters in float32, given their bits.
fn wide_parameters(row: Row, four: Four, bits: vec4<u32>) -> vec4<f32> {
    let wide = widened_four(bits);
    if HALVES == HALVES_REMAINDER && numbers.fresh == 0u {
        let kept = kept_halves_at(row, four);
        // The half was rounded up if the highest bit of the remainder is set.
        return bitcast<vec4<f32>>(((bits - (kept >> vec4<u32>(15u))) << vec4<u32>(16u)) | kept);
    }
    if HALVES == HALVES_MASTER && numbers.fresh == 0u {
        return state_at(row.kept, four.at);
    }
    return bitcast<vec4<f32>>(wide);
}

// Words of two halves each, where `own`; elsewhere as they were.
fn joined(before: vec4<u32>, now: vec4<u32>, own: vec4<bool>) -> vec2<u32> {
    let chosen = select(before, now, own);
    return chosen.xz | (chosen.yw << vec2<u32>(16u));
}

fn set_parameters(row: Row, four: Four, before: vec4<u32>, to: vec4<f32>) {
    let first = row.parameter / IN_WORD;
    let bits = bitcast<vec4<u32>>(to);
    if IN_WORD == 1u {
        if four.own.x {
            parameters[first + four.words.x] = bits.x;
        }
        if four.own.y {
            parameters[first + four.words.y] = bits.y;
        }
        if four.own.z {
            parameters[first + four.words.z] = bits.z;
        }
        if four.own.w {
            parameters[first + four.words.w] = bits.w;
        }
        return;
    }
    var halves = vec4<u32>(
        narrowed(PARAMETER, bits.x),
        narrowed(PARAMETER, bits.y),
        narrowed(PARAMETER, bits.z),
        narrowed(PARAMETER, bits.w),
    );
    if HALVES == HALVES_REMAINDER {
        // Ties away from zero. A NaN becomes quiet and has no remainder, so that it is not rounded to a number.
        let is_nan = (bits & vec4<u32>(MAGNITUDE)) > vec4<u32>(INFINITE);
        halves = select(bits + vec4<u32>(0x8000u), bits | vec4<u32>(0x400000u), is_nan) >> vec4<u32>(16u);
        let kept = select(bits & vec4<u32>(0xffffu), vec4<u32>(0u), is_nan);
        let remainders = joined(kept_halves_at(row, four), kept, four.own);
        if four.own_words.x {
            state[row.kept + four.words.x] = remainders.x;
        }
        if four.own_words.z {
            state[row.kept + four.words.z] = remainders.y;
        }
    }
    if HALVES == HALVES_MASTER {
        set_state(row.kept, four, to);
    }
    let words = joined(before, halves, four.own);
    if four.own_words.x {
        parameters[first + four.words.x] = words.x;
    }
    if four.own_words.z {
        parameters[first + four.words.z] = words.y;
    }
}

fn step_four(row: Row, four: Four) {
    let bits = parameters_at(row, four);
    let none = vec4<f32>(0.0);
    var before = Elements(wide_parameters(row, four, bits), none, none, none);
    if numbers.fresh != 0u {
        // What the state begins with, whatever it holds.
        before.a = vec4<f32>(settings.initial);
    } else {
        if HAS_A {
            before.a = state_at(row.state, four.at);
        }
        if HAS_B {
            before.b = state_at(row.state + row.stride, four.at);
        }
        if THIRD {
            before.c = state_at(row.state + PLACE_OF_C * row.stride, four.at);
        }
    }
    let now = updated(clipped(row, four.at), before);
    set_parameters(row, four, bits, now.w);
    if HAS_A {
        set_state(row.state, four, now.a);
    }
    if HAS_B {
        set_state(row.state + row.stride, four, now.b);
    }
    if THIRD {
        set_state(row.state + PLACE_OF_C * row.stride, four, now.c);
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(group: Group, @builtin(local_invocation_index) lane: u32) {
    let task = index_of(group);
    if task >= table.tasks || results.refused != 0u {
        return;
    }
    var at = table.tasks - 1u - task;
    loop {
        let row = table.rows[at];
        if !SEVERAL_SEGMENTS {
            take_factor(row.segment);
        }
        let words = (row.parameter % IN_WORD + row.elements + IN_WORD - 1u) / IN_WORD;
        let blocks = (words + WORDS * WORKGROUP - 1u) / (WORDS * WORKGROUP);
        let first = select(lane, WORDS * blocks * lane, CONTIGUOUS);
        for (var block = 0u; block < blocks; block += 1u) {
            let word = first + WORDS * APART * block;
            if word < words {
                step_four(row, four_at(row, word));
            }
        }
        at = row.next;
        if at == 0u {
            break;
        }
    }
}

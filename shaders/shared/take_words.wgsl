// Measures words of a run: whole blocks of quads quickly, and element by element what that does not suffice for.

#import constants
#import number
#import half
#import pair
#import windows
#import chunk
#import measure

// The word of the run, with 0 for elements that are not the run's.
fn own_word(run: Run, chunk: Chunk, i: u32) -> u32 {
    var word = word_at(run.window, run.word + i);
    if DTYPE != DTYPE_F32 {
        word &= select(0xffffffffu, 0xffff0000u, i == 0u && run.skip == 1u);
        word &= select(0xffffffffu, 0x0000ffffu, 2u * i + 1u == run.skip + chunk.elements);
    }
    return word;
}

// The magnitudes in words of float32, or in the halves of words that start at bit `shift`.
fn magnitudes_of_4(words: vec4<u32>, shift: u32) -> vec4<u32> {
    if DTYPE == DTYPE_F32 {
        return words & vec4<u32>(MAGNITUDE);
    }
    let halves = (words >> vec4<u32>(shift)) & vec4<u32>(0x7fffu);
    return vec4<u32>(
        widened(DTYPE, halves.x),
        widened(DTYPE, halves.y),
        widened(DTYPE, halves.z),
        widened(DTYPE, halves.w),
    );
}

fn magnitudes_of(words: Sixteen, shift: u32) -> Sixteen {
    return Sixteen(
        magnitudes_of_4(words.a, shift),
        magnitudes_of_4(words.b, shift),
        magnitudes_of_4(words.c, shift),
        magnitudes_of_4(words.d, shift),
    );
}

// Words without signs.
fn without_signs(words: Sixteen) -> Sixteen {
    let mask = vec4<u32>(select(0x7fff7fffu, MAGNITUDE, DTYPE == DTYPE_F32));
    return Sixteen(words.a & mask, words.b & mask, words.c & mask, words.d & mask);
}

// The first elements of words without signs, and the second; both have to be finite.
fn first_of_4(words: vec4<u32>) -> vec4<u32> {
    if DTYPE == DTYPE_F32 {
        return words;
    }
    return bitcast<vec4<u32>>(vec4<f32>(
        widened_pair(words.x).x,
        widened_pair(words.y).x,
        widened_pair(words.z).x,
        widened_pair(words.w).x,
    ));
}

fn second_of_4(words: vec4<u32>) -> vec4<u32> {
    return bitcast<vec4<u32>>(vec4<f32>(
        widened_pair(words.x).y,
        widened_pair(words.y).y,
        widened_pair(words.z).y,
        widened_pair(words.w).y,
    ));
}

fn first_of(words: Sixteen) -> Sixteen {
    return Sixteen(first_of_4(words.a), first_of_4(words.b), first_of_4(words.c), first_of_4(words.d));
}

fn second_of(words: Sixteen) -> Sixteen {
    return Sixteen(second_of_4(words.a), second_of_4(words.b), second_of_4(words.c), second_of_4(words.d));
}

// Whether the device's conversion is given only finite elements of words without signs. Integers convert any.
fn are_convertible(words: Sixteen) -> bool {
    if DTYPE != DTYPE_F16 || !NATIVE_HALVES {
        return true;
    }
    let finite = vec4<u32>(0x04000400u);
    let reached = ((words.a + finite) | (words.b + finite)) | ((words.c + finite) | (words.d + finite));
    return (((reached.x | reached.y) | (reached.z | reached.w)) & 0x80008000u) == 0u;
}

// Takes words of the run: `count` quads from word `i` on, `apart` quads apart, or with a count of 0 that word alone.
fn take_words(run: Run, chunk: Chunk, words: Sixteen, i: u32, count: u32, apart: u32) {
    let plain = without_signs(words);
    let convertible = are_convertible(plain);
    // The halves of a word are not neighbours here, but no sum depends on which elements share a tree.
    let first_again = take(first_of(plain), convertible);
    var second_again = false;
    if PER_WORD == 2u {
        second_again = take(second_of(plain), convertible);
    }
    // Loops, because software devices run the body of every branch, but not of every loop.
    for (var half = select(1u, 0u, first_again); half < select(1u, 2u, second_again); half += 1u) {
        let magnitudes = magnitudes_of(words, 16u * half);
        let one_by_one = take_again(magnitudes);
        for (var k = 0u; k < max(4u * count, 1u) && one_by_one; k += 1u) {
            let j = i + 4u * apart * (k / 4u) + k % 4u;
            let word = own_word(run, chunk, j);
            let bits = select((word >> (16u * half)) & 0xffffu, word, DTYPE == DTYPE_F32);
            let element = PER_WORD * j + half - run.skip;
            take_one(widened(DTYPE, bits) & MAGNITUDE, chunk.origin, chunk.origin_element + element);
        }
    }
}

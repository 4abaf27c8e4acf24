// Partial: what is known of some elements of a segment. Twin of `Partial` in src/partial.rs.

#import number

struct Partial {
    // Σ |g|^p over the finite elements.
    sum: Number,
    // The bits of the largest finite |g|.
    max: u32,
    // How many elements are NaN or infinite: low and high word.
    non_finite: u32,
    non_finite_high: u32,
    // Where the first of them is: an origin, and the element from there. NOWHERE if there is none.
    first_origin: u32,
    first_element: u32,
    flags: u32,
}

const NOWHERE: u32 = 0xffffffffu;

// Some element is NaN; some element lies outside the bounds of a value clip.
const HAS_NAN: u32 = 1u;
const OUTSIDE: u32 = 2u;

const EMPTY_PARTIAL = Partial(ZERO_NUMBER, 0u, 0u, 0u, NOWHERE, NOWHERE, 0u);

fn merge(a: Partial, b: Partial) -> Partial {
    var both = a;
    both.sum = add(a.sum, b.sum);
    both.max = max(a.max, b.max);
    both.non_finite = a.non_finite + b.non_finite;
    both.non_finite_high = a.non_finite_high + b.non_finite_high + select(0u, 1u, both.non_finite < a.non_finite);
    if b.first_origin < a.first_origin || (b.first_origin == a.first_origin && b.first_element < a.first_element) {
        both.first_origin = b.first_origin;
        both.first_element = b.first_element;
    }
    both.flags = a.flags | b.flags;
    return both;
}

// The partial with one more non-finite element, `element` elements from `origin`.
fn with_non_finite(partial: Partial, magnitude: u32, origin: u32, element: u32) -> Partial {
    var more = partial;
    more.non_finite += 1u;
    let earlier = select(NOWHERE, partial.first_element, partial.first_origin == origin);
    if origin <= partial.first_origin {
        more.first_origin = origin;
        more.first_element = min(earlier, element);
    }
    more.flags |= select(0u, HAS_NAN, magnitude > INFINITE);
    return more;
}

fn is_bad(partial: Partial) -> bool {
    return (partial.non_finite | partial.non_finite_high) != 0u;
}

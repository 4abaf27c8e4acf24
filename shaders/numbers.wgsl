// numbers: counts a step, unless it is skipped, and computes what depends on the count, for each group of parameters.
// Twin: src/optimizer/numbers.rs.
//
// The count lives here, so that nobody waits to learn whether a step was skipped. There is no float64, and float32 would
// lose 1 - β₂ᵗ: 1 - 0.999 is off by 1e-5 of itself. So powers of a beta are integers, in units of 2^-64. Each product is
// cut off, by less than a unit. By induction βⁿ is then less than 2 (1 + β + … + βⁿ⁻¹) units too small, and 1 - βⁿ, which
// is (1 - β) (1 + β + … + βⁿ⁻¹), is too large by less than 2^-63 / (1 - β) of itself.

#import constants
#import number
#import outcome
#import settings

@group(0) @binding(2) var<storage, read> results: Results;

// The number of steps taken, and whether the state holds anything.
struct Count {
    low: u32,
    high: u32,
    begun: u32,
    padding: u32,
}

@group(1) @binding(0) var<storage, read> settings: array<Settings>;
@group(1) @binding(1) var<storage, read_write> numbers: array<Numbers>;
@group(1) @binding(2) var<storage, read_write> count: Count;

const ONE_NUMBER = Number(0x80000000u, -31);

// The number in units of 2^exponent, cut off after 32 bits.
fn number_of_wide(wide: vec2<u32>, exponent: i32) -> Number {
    if wide.y == 0u {
        return normalised(wide.x, exponent);
    }
    let shift = countLeadingZeros(wide.y);
    // In two parts, because a shift by 32 is none.
    let low = (wide.x >> 1u) >> (31u - shift);
    return Number((wide.y << shift) | low, exponent + 32 - i32(shift));
}

fn with_carry(sum: u32, addend: u32) -> u32 {
    return select(0u, 1u, sum < addend);
}

// a · b for fractions in units of 2^-64, cut off.
fn product_of_fractions(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low_high = wide_product(a.x, b.y);
    let high_low = wide_product(a.y, b.x);
    let high = wide_product(a.y, b.y);
    // The third word of the product, which only carries.
    let first = wide_product(a.x, b.x).y + low_high.x;
    let third = first + high_low.x;
    let carried = with_carry(first, low_high.x) + with_carry(third, high_low.x);
    let once = high.x + low_high.y;
    let twice = once + high_low.y;
    let low = twice + carried;
    let upper = high.y + with_carry(once, low_high.y) + with_carry(twice, high_low.y) + with_carry(low, carried);
    return vec2<u32>(low, upper);
}

// 1 - βⁿ for n from 1 on, by the bits of n.
fn correction(beta: vec2<u32>, n: vec2<u32>) -> Number {
    var power = vec2<u32>(0u);
    var begun = false;
    var square = beta;
    for (var rest = n; (rest.x | rest.y) != 0u; rest = vec2<u32>((rest.x >> 1u) | (rest.y << 31u), rest.y >> 1u)) {
        if (rest.x & 1u) != 0u {
            power = select(square, product_of_fractions(power, square), vec2<bool>(begun));
            begun = true;
        }
        square = product_of_fractions(square, square);
    }
    if (power.x | power.y) == 0u {
        return ONE_NUMBER;
    }
    return number_of_wide(vec2<u32>(0u - power.x, 0u - power.y - select(0u, 1u, power.x != 0u)), -64);
}

@compute @workgroup_size(1)
fn main() {
    if results.refused != 0u {
        return;
    }
    let before = vec2<u32>(count.low, count.high);
    let step = vec2<u32>(before.x + 1u, before.y + select(0u, 1u, before.x == 0xffffffffu));
    let first = select(0u, 1u, step.x == 1u && step.y == 0u);
    let fresh = 1u - count.begun;
    count = Count(step.x, step.y, 1u, 0u);
    for (var group = 0u; group < arrayLength(&settings); group += 1u) {
        let own = settings[group];
        var lr = number(own.lr);
        var root = ZERO_NUMBER;
        if own.algorithm == ALGORITHM_ADAGRAD {
            let decayed = multiply(number_of_wide(before, 0), number(own.lr_decay));
            lr = divide(lr, add(ONE_NUMBER, decayed));
        } else if own.algorithm == ALGORITHM_ADAM {
            lr = divide(lr, correction(own.mean_beta, step));
            root = divide(ONE_NUMBER, square_root(correction(own.square_beta, step)));
        }
        numbers[group].lr = bitcast<f32>(float_of(lr));
        numbers[group].root = bitcast<f32>(float_of(root));
        numbers[group].first = first;
        numbers[group].fresh = fresh;
    }
}

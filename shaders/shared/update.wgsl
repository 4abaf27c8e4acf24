// The update of an optimizer for four elements at once. Twin: src/cpu/update.rs, which says why averages and decay are
// computed as they are.

#import step_constants
#import settings

@group(1) @binding(4) var<uniform> settings: Settings;
@group(1) @binding(5) var<uniform> numbers: Numbers;

// Parameters and up to three tensors of state.
struct Elements {
    w: vec4<f32>,
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
}

const LARGEST_FLOAT: f32 = 3.4028234663852886e38;
// Its square is the largest that is finite.
const LARGEST_ROOT: f32 = 1.8446742974197924e19;
const SMALLEST_FLOAT: f32 = 1.1754943508222875e-38;

// u², at most the largest finite number.
fn squares(u: vec4<f32>) -> vec4<f32> {
    return select(u * u, vec4<f32>(LARGEST_FLOAT), abs(u) > vec4<f32>(LARGEST_ROOT));
}

// A driver may compute a root as 1 / inverseSqrt, and take what is below the normal range for 0. That would be no root.
fn roots(x: vec4<f32>) -> vec4<f32> {
    return select(sqrt(x), vec4<f32>(0.0), x < vec4<f32>(SMALLEST_FLOAT));
}

fn average(part: f32, of_old: u32, old: vec4<f32>, latest: vec4<f32>) -> vec4<f32> {
    let swaps = vec4<bool>(of_old != 0u);
    let start = select(old, latest, swaps);
    return start + part * (select(latest, old, swaps) - start);
}

fn mean_of(old: vec4<f32>, latest: vec4<f32>) -> vec4<f32> {
    return average(settings.mean_part, settings.mean_of_old, old, latest);
}

fn square_mean_of(old: vec4<f32>, latest: vec4<f32>) -> vec4<f32> {
    return average(settings.square_part, settings.square_of_old, old, latest);
}

// Takes the step by clipped gradients.
fn updated(clipped: vec4<f32>, before: Elements) -> Elements {
    var now = before;
    var u = settings.sign * clipped;
    if settings.coupled_decay != 0.0 {
        u += settings.coupled_decay * before.w;
    }
    if ALGORITHM == ALGORITHM_SGD {
        var direction = u;
        if BUFFERED {
            now.a = settings.momentum * before.a + settings.undampened * u;
            if numbers.first != 0u {
                now.a = u;
            }
            direction = now.a;
            if settings.nesterov != 0u {
                direction = u + settings.momentum * now.a;
            }
        }
        now.w = before.w - numbers.lr * direction;
    } else if ALGORITHM == ALGORITHM_ADAGRAD {
        now.a = before.a + squares(u);
        now.w = before.w - numbers.lr * (u / (roots(now.a) + settings.eps));
    } else if ALGORITHM == ALGORITHM_RMSPROP {
        now.a = square_mean_of(before.a, squares(u));
        var variance = now.a;
        if THIRD {
            now.c = square_mean_of(before.c, u);
            variance -= now.c * now.c;
            variance = select(variance, vec4<f32>(0.0), variance < vec4<f32>(0.0));
        }
        var direction = u / (roots(variance) + settings.eps);
        if BUFFERED {
            now.b = settings.momentum * before.b + direction;
            direction = now.b;
        }
        now.w = before.w - numbers.lr * direction;
    } else {
        now.a = mean_of(before.a, u);
        now.b = square_mean_of(before.b, squares(u));
        var square = now.b;
        if THIRD {
            now.c = select(now.b, before.c, now.b < before.c);
            square = now.c;
        }
        let divisor = numbers.root * roots(square) + settings.eps;
        now.w = before.w - (settings.decay * before.w + numbers.lr * (now.a / divisor));
    }
    return now;
}

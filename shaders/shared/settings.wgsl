// What a step needs to know of an optimizer: what the host sets, and what depends on the number of steps. Twins:
// `Settings` in src/gpu/step.rs, `Numbers` in src/optimizer/numbers.rs. Both fill 256 bytes, so that each group of
// parameters can bind its own as a uniform.

// Twin of `algorithm_code` in src/gpu/kernels.rs. Adam is also AdamW.
const ALGORITHM_SGD: u32 = 0u;
const ALGORITHM_ADAGRAD: u32 = 1u;
const ALGORITHM_RMSPROP: u32 = 2u;
const ALGORITHM_ADAM: u32 = 3u;

struct Settings {
    // As mantissa and exponent.
    lr: vec2<u32>,
    lr_decay: vec2<u32>,
    // The betas of the averages in units of 2^-64, low word first.
    mean_beta: vec2<u32>,
    square_beta: vec2<u32>,
    algorithm: u32,
    // 1, or -1 to maximize.
    sign: f32,
    // What is added to a gradient, times its parameter.
    coupled_decay: f32,
    // AdamW's, times the learning rate.
    decay: f32,
    eps: f32,
    momentum: f32,
    undampened: f32,
    nesterov: u32,
    // How far each average moves, and whether from the new value to the old.
    mean_part: f32,
    mean_of_old: u32,
    square_part: f32,
    square_of_old: u32,
    // What Adagrad's sums begin with.
    initial: f32,
    padding_0: u32,
    padding_1: u32,
    padding_2: u32,
    padding: array<vec4<u32>, 10>,
}

struct Numbers {
    // The learning rate, corrected or decayed.
    lr: f32,
    // 1 / √(1 - β₂ᵗ).
    root: f32,
    // Whether this is step number 1, and whether the state still holds nothing.
    first: u32,
    fresh: u32,
    padding: array<vec4<u32>, 15>,
}

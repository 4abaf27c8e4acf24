// The constants of `step`. src/gpu/kernels.rs puts a value in each pair of braces.

// The dtypes of gradients and parameters. Gradients are clipped as float32.
const GRADIENT: u32 = {gradient}u;
const PARAMETER: u32 = {parameter}u;
// What is kept of parameters in half precision. Twin of `Halves` in src/optimizer/description.rs.
const HALVES: u32 = {halves}u;
const HALVES_REMAINDER: u32 = 1u;
const HALVES_MASTER: u32 = 2u;
// The update, by the codes in `settings`.
const ALGORITHM: u32 = {algorithm}u;
// Whether SGD or RMSprop has momentum, and whether there is a third average: centered, or amsgrad.
const BUFFERED: bool = {buffered};
const THIRD: bool = {third};
// Whether elements of a row belong to several segments.
const SEVERAL_SEGMENTS: bool = {each};

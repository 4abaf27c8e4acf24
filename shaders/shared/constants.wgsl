// The constants of kernels. Each kernel uses some. src/gpu/kernels.rs puts a value in each pair of braces.

// Invocations in a workgroup.
const WORKGROUP: u32 = {workgroup}u;
// Whether each invocation takes a contiguous stretch; otherwise neighbours take neighbouring quads.
const CONTIGUOUS: bool = {contiguous};
// How far apart the quads of an invocation are.
const APART: u32 = select(WORKGROUP, 1u, CONTIGUOUS);
// How many windows an array of them binds.
const WINDOWS: u32 = {windows}u;

// The most subgroups that a workgroup has.
const SUBGROUPS: u32 = {subgroups}u;
// Whether the device multiplies float32s, and converts float16, with the right rounding (`probe`); otherwise both are
// done in integer arithmetic.
const NATIVE_PRODUCTS: bool = {native_products};
const NATIVE_HALVES: bool = {native_halves};

// The dtype of the gradients. Twin of `dtype_code` in src/gpu/table/rows.rs.
const DTYPE: u32 = {dtype}u;
const DTYPE_F32: u32 = 0u;
const DTYPE_F16: u32 = 1u;
// Elements in a word.
const PER_WORD: u32 = select(2u, 1u, DTYPE == DTYPE_F32);

// The norm that is measured. Twin of `Norm` in src/gpu/kernels.rs.
const NORM: u32 = {norm}u;
const NORM_L1: u32 = 0u;
const NORM_L2: u32 = 1u;
const NORM_INF: u32 = 2u;
const NORM_P: u32 = 3u;

// The formula of `threshold`. Twin of `Formula` in src/gpu/threshold.rs.
const THRESHOLD: u32 = {threshold}u;
const AGC: u32 = 0u;
const ZCLIP: u32 = 1u;
const ADAGC: u32 = 2u;
const FIXED: u32 = 3u;

// Whether the clip is one by value.
const VALUE: bool = {value};
// Whether an outcome was decided before.
const GUARDED: bool = {guarded};
// Whether `clamp` does more than look.
const WRITES: bool = {writes};
// Whether the segments of `scale_each` are columns; else they are rows.
const COLUMNS: bool = {columns};
// Whether `finalise` takes given norms.
const GIVEN: bool = {given};
// Whether to count what rounding loses, and where the counts are bound: behind the windows.
const COUNTS: bool = {counts};
const LOSSES: u32 = {losses}u;
// Whether `accumulate` hands the running partial over.
const MOVES: bool = {moves};

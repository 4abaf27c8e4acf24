//! Instruction sets: each kernel is written once and compiled once for each set; which one runs is decided at run time.
//!
//! ```text
//! run(kernel)                         asks once what the CPU has
//!   avx512(kernel), avx2(kernel)      the kernel, inlined into a function with `#[target_feature]`
//!     kernel.on(isa)                  written in terms of LANES numbers side by side
//! ```
//!
//! 1. There are always [`LANES`] lanes, whatever the width of the machine's registers, and nothing is fused. So every
//!    instruction set computes the same bits.
//! 2. Sums and products of floats are written in operations of [`Isa`], each an intrinsic or two: their order is given, so
//!    that the compiler may not choose it, and does not always find the vectors in loops. Comparisons of integers are plain
//!    loops over elements, which it turns into vectors reliably.
//! 3. What became of either is held by a test that counts the instructions an element takes (`tests/instructions.rs`).
//!
//! On other CPUs than x86-64 it is the portable set, compiled for what each of them has; on aarch64 that is NEON.

mod portable;
// Asks for intrinsics and target features, each with the proof that they are there.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

#[cfg(not(target_arch = "x86_64"))]
use portable::Portable;
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) use x86::Set;

/// How many numbers are computed side by side.
pub(super) const LANES: usize = 16;

/// What can be done with [`LANES`] numbers at once. A value exists only where the CPU has the instruction set.
pub(super) trait Isa: Copy {
    /// float32.
    type F: Copy;
    /// float64.
    type D: Copy;

    fn f(self, numbers: [f32; LANES]) -> Self::F;
    fn d(self, numbers: [f64; LANES]) -> Self::D;
    fn floats(self, x: Self::F) -> [f32; LANES];
    fn doubles(self, x: Self::D) -> [f64; LANES];

    /// Exactly; a NaN becomes quiet and keeps its payload.
    fn widen_f16(self, bits: [u16; LANES]) -> Self::F;
    /// To nearest, ties to even; a NaN becomes quiet and keeps its upper payload.
    fn narrow_f16(self, x: Self::F) -> [u16; LANES];
    /// Exactly.
    fn widen_bf16(self, bits: [u16; LANES]) -> Self::F;
    /// To nearest, ties to even; a NaN becomes quiet and keeps its upper payload.
    fn narrow_bf16(self, x: Self::F) -> [u16; LANES];
    /// Exactly.
    fn widen(self, x: Self::F) -> Self::D;

    fn add_f(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul_f(self, a: Self::F, b: Self::F) -> Self::F;
    /// 0 in place of NaN and infinity.
    fn finite_or_zero_f(self, x: Self::F) -> Self::F;

    fn add(self, a: Self::D, b: Self::D) -> Self::D;
    fn sub(self, a: Self::D, b: Self::D) -> Self::D;
    fn mul(self, a: Self::D, b: Self::D) -> Self::D;
    fn div(self, a: Self::D, b: Self::D) -> Self::D;
    fn sqrt(self, x: Self::D) -> Self::D;
    fn abs(self, x: Self::D) -> Self::D;
    /// `x` where a < b, `y` where it is not or a comparison has no answer.
    fn if_less(self, a: Self::D, b: Self::D, x: Self::D, y: Self::D) -> Self::D;

    // Of the 64 bits of each number.
    fn and_bits(self, a: Self::D, b: Self::D) -> Self::D;
    fn or_bits(self, a: Self::D, b: Self::D) -> Self::D;
    fn add_bits(self, a: Self::D, b: Self::D) -> Self::D;
    /// To where the exponent ends.
    fn down_52(self, x: Self::D) -> Self::D;
    /// To where the exponent begins.
    fn up_52(self, x: Self::D) -> Self::D;
}

/// A loop over elements, compiled for each instruction set. All that it calls must be inlined.
pub(super) trait Kernel {
    type Output;
    fn on<I: Isa>(self, isa: I) -> Self::Output;
}

/// Runs a kernel on the best instruction set that the CPU has.
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(all(test, target_arch = "x86_64"))]
    if let Some(set) = CHOSEN.get() {
        return set.run(kernel);
    }
    #[cfg(target_arch = "x86_64")]
    return x86::run(kernel);
    #[cfg(not(target_arch = "x86_64"))]
    kernel.on(Portable)
}

#[cfg(all(test, target_arch = "x86_64"))]
thread_local! {
    static CHOSEN: std::cell::Cell<Option<Set>> = const { std::cell::Cell::new(None) };
}

/// Lets the kernels that this thread runs in `f` run on one instruction set.
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) fn on<R>(set: Set, f: impl FnOnce() -> R) -> R {
    let before = CHOSEN.replace(Some(set));
    let result = f();
    CHOSEN.set(before);
    result
}

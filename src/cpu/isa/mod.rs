//! Instruction sets. Each kernel is written once and compiled for each set; the program chooses the set at run time.
//!
//! ```text
//! run(kernel)                         asks once what the CPU has
//!   avx512(kernel), avx2(kernel)      the kernel, inlined into a function with `#[target_feature]`
//!     kernel.on(isa)                  written in terms of LANES numbers side by side
//! ```
//!
//! 1. There are always [`LANES`] lanes, whatever the width of the machine's registers, and no operations are fused. So
//!    every instruction set computes the same bits.
//! 2. Sums and products of floats are written in operations of [`Isa`], each an intrinsic or two. Their order is fixed,
//!    so the compiler may not reorder them, and it does not always find the vectors in such loops. Comparisons are
//!    plain loops over elements, which it vectorises reliably if they select numbers or gather bits.
//! 3. A test counts the instructions per element, for both kinds (`tests/instructions.rs`).
//!
//! Other CPUs than x86-64 use the portable set, compiled for what each of them has; on aarch64 that is NEON.

mod lanes;
mod portable;
// Asks for intrinsics and target features, each with the proof that they are there.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

pub(super) use lanes::{Isa, Kernel, LANES};
#[cfg(not(target_arch = "x86_64"))]
use portable::Portable;
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) use x86::Set;

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

/// Runs `f`, in which the kernels of this thread use one instruction set.
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) fn on<R>(set: Set, f: impl FnOnce() -> R) -> R {
    let before = CHOSEN.replace(Some(set));
    let result = f();
    CHOSEN.set(before);
    result
}

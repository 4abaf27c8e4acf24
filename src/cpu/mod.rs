//! The CPU path: the fallback, and the check on the GPU.
//!
//! ```text
//! partials = for each task of each tensor, in parallel: norm             cpu/norm.rs, cpu/columns.rs
//! segments = partials merged from first to last                          partial.rs
//! outcomes = the coefficients that follow                                partial.rs
//! for each chunk of each tensor, in parallel: scale or clamp             cpu/scale.rs, cpu/clamp.rs
//! ```
//!
//! Tasks have fixed shapes and their partials merge in list order, so the answer does not depend on the number of
//! threads. Work runs on rayon's current pool: the global one, or the caller's through `ThreadPool::install`.
//!
//! Within a task, elements are taken in blocks that fit the first-level cache. A block is widened once (half precision
//! to float32; a misaligned one is copied) so that each kernel is written for float32 and float64 only.

mod clamp;
mod columns;
pub(crate) mod count;
pub(crate) mod decide;
mod element;
mod isa;
mod map;
mod norm;
// Lends borrowed work to threads of the pool, with the proof that they give it back in time.
#[allow(unsafe_code)]
pub(crate) mod pool;
mod power;
mod scale;
mod sum;
mod task;
mod terms;
#[cfg(test)]
mod tests;
mod tuning;
pub(crate) mod write;

/// Calls `$body` with `$T` standing for the Rust type of `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::Dtype::F32 => {
                type $T = f32;
                $body
            }
            $crate::Dtype::F64 => {
                type $T = f64;
                $body
            }
            $crate::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::Dtype::BF16 => {
                type $T = half::bf16;
                $body
            }
        }
    };
}

use with_element;

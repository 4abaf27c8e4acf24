//! The CPU path: the fallback, and the reference for the GPU.
//!
//! ```text
//! partials = for each task of each tensor, in parallel: norm             cpu/norm.rs, cpu/columns.rs
//! segments = partials merged from first to last                          partial.rs
//! outcomes = the coefficients that follow                                decision.rs
//! for each chunk of each tensor, in parallel: scale or clamp             cpu/scale.rs, cpu/clamp.rs
//! ```
//!
//! Tasks have fixed shapes and their partials merge in list order, so the answer does not depend on the number of
//! threads. Work runs on rayon's current pool: the global one, or the caller's through `ThreadPool::install`.
//!
//! Within a task, elements are processed in blocks that fit the first-level cache. A block is widened once (half
//! precision to float32; a misaligned one is copied), so each kernel is written for float32 and float64 only.

mod clamp;
mod columns;
pub(crate) mod count;
pub(crate) mod decide;
mod element;
pub(crate) mod histogram;
mod isa;
pub(crate) mod lost;
mod map;
mod norm;
// Hands borrowed work to threads of the pool, with the proof that it outlives them.
#[allow(unsafe_code)]
pub(crate) mod pool;
mod power;
mod scale;
pub(crate) mod step;
mod sum;
mod task;
mod terms;
#[cfg(test)]
mod tests;
mod tuning;
mod update;
mod widen;
pub(crate) mod write;

//! Optimizers: a step that clips on its way, and the state that it keeps.
//!
//! ```text
//! Optimizer        which update, with which settings             description.rs
//! OptimizerState   groups of parameters, what is kept of each    state.rs
//!                  element, the number of steps                  saved.rs: the same as a safetensors file
//! DecidedStep      a decided clip and the numbers of one step    step.rs, numbers.rs
//!   each piece     reads g, w and state; writes w and state      cpu/step.rs, cpu/update.rs; on a GPU gpu/step.rs
//! ```
//!
//! The norm is read first, as for any clip. The step then multiplies each gradient by its coefficient in registers, so
//! a clipped gradient is never written.

mod description;
mod numbers;
#[cfg(feature = "safetensors")]
mod saved;
mod state;
mod step;

pub use description::{Algorithm, Halves, Optimizer, StateTensor};
pub(crate) use numbers::{Numbers, Rule};
pub use state::OptimizerState;
#[cfg(feature = "gpu")]
pub(crate) use state::check_halves;
pub use step::DecidedStep;

//! Everything that needs burn, in one program because each one takes long to link. Files are named after the hazard that
//! they guard against. `scripts/test.sh` provides a software Vulkan device; without any, tests fail.

mod adaptive;
mod bad_input;
mod common;
mod global_norm;
mod half_precision;
mod lost_device;
mod optimizers;
mod ordering;
mod per_tensor_like_burn;
mod shared_memory;
mod training;

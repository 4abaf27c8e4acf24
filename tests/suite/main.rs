//! The tests that can share a process, and so a device whose kernels are compiled once. There is one file for each
//! hazard. Tests that count what the process does, or fill it, are files beside this folder.

#[path = "../common/mod.rs"]
mod common;

mod adaptive;
mod bad_clips;
mod bad_optimizers;
mod bad_plans;
mod cut_into_pieces;
mod damaged_bytes;
mod device_adaptive;
mod device_optimizer_states;
mod device_outside;
mod device_scopes;
mod device_steps;
mod faults;
mod half_conversions;
mod huge_and_tiny;
mod kernel_variants;
mod large_offsets;
mod larger_than_device;
mod licences;
mod long_sums;
mod lost_by_rounding;
mod many_tiny;
mod misaligned;
mod non_finite;
mod odd_lengths;
mod optimizer_properties;
mod optimizers;
mod oracles;
mod outside_norms;
mod own_device;
mod peers;
mod plan_update;
mod pools;
mod processes;
mod profile;
mod properties;
mod reliability;
mod repeats;
mod saved_optimizers;
mod scopes;
mod semantics;
mod skipped_steps;
mod small_updates;
mod stepped_in_pieces;
mod tune;
mod unsafe_inventory;
mod untouched;
mod verify_finds_differences;

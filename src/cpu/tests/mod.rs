//! Tests of internals.

// With overflow checks the compiler cannot vectorise every kernel.
#[cfg(all(target_os = "linux", target_arch = "x86_64", not(debug_assertions)))]
mod instructions;
#[cfg(target_arch = "x86_64")]
mod sets_agree;

//! Tests of what no caller sees.

// In a build with checks of overflow the compiler cannot make vectors of everything.
#[cfg(all(target_os = "linux", target_arch = "x86_64", not(debug_assertions)))]
mod instructions;
#[cfg(target_arch = "x86_64")]
mod sets_agree;

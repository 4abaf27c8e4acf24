//! The page for browsers: `page/` is what they load first, and this crate, as wasm, is what it then calls.
//!
//! [`clock`] times steps where the device's clock is coarse or missing, [`norms`] measures a file piece by piece. Both are
//! plain arithmetic and are tested anywhere. The rest runs in a browser alone: `gpu` is the device with everything that
//! the page asks of it, `timer` reads its clocks, `file` reads a file, `suite` has the library's tests for the web.

pub mod clock;
pub mod norms;

#[cfg(target_arch = "wasm32")]
pub mod file;
#[cfg(target_arch = "wasm32")]
pub mod gpu;
#[cfg(target_arch = "wasm32")]
mod page;
#[cfg(all(target_arch = "wasm32", feature = "suite"))]
pub mod suite;
#[cfg(target_arch = "wasm32")]
mod timer;

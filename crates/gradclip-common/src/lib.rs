//! What the program `gradclip` and its page for browsers share: [`header`] reads the header of a safetensors file,
//! [`generated`] makes gradients and clips of them, [`difference`] says how two backends differ, [`plot`] draws norms and
//! [`throughput`] speeds, [`text`] writes numbers and names. Nothing here opens a file, prints, waits or starts a thread.
//!
//! It is a crate only so that both can use it. To clip in your own program, use the library `gradclip`.

pub mod description;
#[cfg(feature = "gpu")]
pub mod difference;
pub mod generated;
pub mod header;
pub mod plot;
pub mod text;
pub mod throughput;

//! The tests of the program, in one process, because each process links all of the library; one file for each thing to guard
//! against. They can share it: what is limited, stopped, killed or given another environment is a child of its own, and the
//! ranks of `processes`, which are threads here, change nothing that a child inherits.

mod common;

mod bad_files;
mod bad_tensors;
mod bench;
mod by_name;
#[cfg(target_os = "linux")]
mod changing_inputs;
#[cfg(target_os = "linux")]
mod closed_stdout;
mod exit_codes;
#[cfg(target_os = "linux")]
mod full_disk;
mod given_norms;
#[cfg(feature = "gpu")]
mod gpu;
mod groups;
mod history;
#[cfg(unix)]
mod hugging_face_cache;
mod json;
#[cfg(unix)]
mod killed;
#[cfg(target_os = "linux")]
mod larger_than_memory;
mod largest;
mod lost_by_rounding;
mod output_whole_or_not_at_all;
mod passes_through;
mod peers;
mod pieces;
mod processes;
mod readme;
mod same_name_twice;
mod sharded;
mod sums;
#[cfg(feature = "gpu")]
mod tune;

//! Every number of the CPU path that was tuned, beside the measurement that earned it. Medians of 31 runs on two cores of
//! an AMD EPYC (family 26), float32, the norm.

/// Elements in a block. 4 KiB of float32: block and widened copy stay in the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// Elements in a chunk, the unit of parallel work: 24 us of one core, against about 1 us to hand out a task. Small
/// enough that 2 Mi elements feed 16 threads.
pub(super) const CHUNK: usize = 128 * BLOCK;

/// Sets of fewer elements stay on the calling thread, because waking a pool costs more than it saves. Time on two
/// threads by that on one: 256 Ki elements 1.14 to 1.55, 512 Ki 0.62 to 0.70, 1 Mi 0.49 to 0.73.
pub(super) const PARALLEL_FROM: usize = 4 * CHUNK;

/// Columns that are measured or summed side by side: their float64 sums, 8 KiB, stay in the first-level cache beside the
/// block that is read.
pub(super) const COLUMNS: usize = BLOCK;

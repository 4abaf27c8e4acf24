//! Every tuned number of the CPU path, beside the measurement behind it. Measurements are medians of hundreds of runs
//! on two cores of an AMD EPYC 9004 (family 25, AVX-512), in float32, unless stated.

/// Elements in a block. Sums that cannot be trusted are walked by blocks, and what has a loss scale is clamped by blocks.
/// 4 KiB of float32 stay in the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// Bytes that are looked at, and then clamped if an element changes: they stay in the first-level cache. Before, a block
/// of 1024 elements was written whole if the one before it had changed. Time over that (AVX2, 2 threads, 64 Mi elements):
///
/// | outside | dtype | 512 bytes | 1 KiB | 2 KiB |
/// |---|---|---|---|---|
/// | a tenth | float32 | 0.97 | 1.01 | 0.98 |
/// | | bfloat16 | 1.09 | 1.03 | 1.05 |
/// | a thousandth | float32 | 0.86 | 0.84 | 0.84 |
/// | | bfloat16 | 0.85 | 0.92 | 0.92 |
pub(super) const CLAMPED_AT_ONCE: usize = 1024;

/// Elements in a chunk, the unit of parallel work: 12 us of one core to measure, against about 1 us to hand out a task.
/// Small enough that 2 Mi elements feed 16 threads.
pub(super) const CHUNK: usize = 128 * 1024;

/// Elements of float16 that are looked at for what rounding loses, and then written: 32 KiB stay in the first- or
/// second-level cache meanwhile. The time of a clip relative to one that does not look (AVX2, 2 threads): 1 Mi elements
/// 1.06, 64 Mi 1.00.
pub(super) const WRITTEN_AT_ONCE: usize = 16 * 1024;

/// Sets of fewer elements stay on the calling thread, because waking a pool costs more than it saves. The time of a
/// norm on two threads relative to one, with the pool awake and after it has slept for 2 ms: 256 Ki elements 1.0 and
/// 1.9, 512 Ki 0.8 and 1.4, 1 Mi 0.72 and 1.2, 2 Mi 0.60 and 1.3, 4 Mi 0.56 and 1.3 (virtual machine, slow to wake a
/// core).
pub(super) const PARALLEL_FROM: usize = 8 * CHUNK;

/// Columns that are measured or summed side by side. Their float64 sums, 8 KiB, stay in the first-level cache beside
/// four rows.
pub(super) const COLUMNS: usize = 1024;

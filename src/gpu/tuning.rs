//! Every number that was tuned, beside the measurement that earned it. Records of whole runs are in `benches/records`.

use crate::Error;

/// How kernels are compiled for a device, and how much work a workgroup gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tuning {
    /// Invocations in a workgroup: a power of two from 8 on.
    pub workgroup: u32,
    /// Whether an invocation reads a stretch of its own; else what lies next to what the others read.
    pub contiguous: bool,
    /// Whether a workgroup's partials merge by operations of subgroups, where the device has them; else by a tree in
    /// workgroup memory.
    pub subgroups: bool,
    /// How many windows (parts of buffers) a dispatch binds at most, a binding each; on a device with arrays of bindings,
    /// how many in an array.
    pub windows: u32,
    /// See `windows`.
    pub array_windows: u32,
    /// The number of chunks that a large set is cut into, if the two limits below allow.
    pub chunks: u64,
    /// Words (4 bytes) in the shortest chunk that a tensor is cut into.
    pub min_chunk_words: u32,
    /// Words in the longest chunk: at most 2^14 for each invocation. Those are 1,024 blocks, of at most 35 iterations (of
    /// 16-bit elements that are all taken one by one), and llvmpipe silently ends the loops of an invocation after
    /// 65,535 iterations together.
    pub max_chunk_words: u32,
}

/// The smallest workgroup that kernels are compiled with.
pub const SMALLEST_WORKGROUP: u32 = 8;

/// Software devices: llvmpipe and SwiftShader.
///
/// The norm of float32 on llvmpipe with two cores, unclipped, medians of 9 in ms; 2,000 tensors of 2,100 elements in one
/// buffer beside one tensor of as many:
///
/// | workgroup | chunks | shortest | 64 Ki | 1 Mi | 16 Mi | 64 Mi | 2,000 | one |
/// |---|---|---|---|---|---|---|---|---|
/// | 8 | 64 | 32 Ki | 0.34 | 0.96 | 10.2 | 40 | 3.5 | 2.9 |
/// | 16 | 64 | 32 Ki | 0.32 | 1.0 | 10.3 | 40 | 4.5 | 2.9 |
/// | 32 | 64 | 32 Ki | 0.35 | 1.2 | 10.7 | 42 | 5.6 | 3.1 |
/// | 32 | 256 | 16 Ki | 0.34 | 1.4 | 12.2 | 43 | 5.9 | 3.7 |
/// | 64 | 256 | 16 Ki | 0.36 | 1.7 | 13.8 | 44 | 7.7 | 4.7 |
/// | 128 | 256 | 16 Ki | 0.64 | 3.0 | 18.4 | | 13 | 6.6 |
///
/// A plain sum of 16 Mi takes 55 ms there if invocations read quads next to each other's, and 11 if each reads a stretch
/// of its own. Eight windows at once, each a binding, take ten times as long as one after another.
pub const SOFTWARE: Tuning = Tuning {
    workgroup: 8,
    contiguous: true,
    subgroups: false,
    windows: 1,
    array_windows: 256,
    chunks: 64,
    min_chunk_words: 1 << 15,
    max_chunk_words: 1 << 17,
};

/// Everything else. Not measured yet: the shape that CUB uses, an even share for some workgroups per core.
pub const HARDWARE: Tuning = Tuning {
    workgroup: 256,
    contiguous: false,
    subgroups: true,
    windows: 8,
    array_windows: 1024,
    chunks: 4096,
    min_chunk_words: 1 << 12,
    max_chunk_words: 1 << 20,
};

/// How large a window may be to share a dispatch with others where each is a binding of its own: choosing among them
/// costs more than the dispatch that it saves when there is much to read. Not measured on hardware.
pub const SHARED_WINDOW_BYTES: u64 = 1 << 18;

/// How many partials one workgroup merges. At most 16 one after another for each of 64 invocations.
pub const MERGED_PARTIALS: u32 = 1024;

/// Segments of so many partials and fewer are merged by one invocation each: a workgroup's tree has 6 to 8 steps
/// anyway.
pub const LANE_PARTIALS: u32 = 16;

/// Rows of so many elements and fewer are measured by one invocation each; longer ones by a workgroup. Not measured yet.
pub const LANE_ROW: u32 = 64;

/// So many elements of a column are measured by one invocation: 1,024 bytes read for the 64 that a partial costs. Not
/// measured against other lengths yet.
pub const LANE_COLUMN: u32 = 256;

/// The size of the pieces in which host tensors are uploaded and read back, in bytes.
pub const STAGING_BYTES: u64 = 64 << 20;

impl Tuning {
    /// The row for a device.
    #[must_use]
    pub fn of(device: &wgpu::AdapterInfo) -> Self {
        match device.device_type {
            wgpu::DeviceType::Cpu => SOFTWARE,
            _ => HARDWARE,
        }
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if !self.workgroup.is_power_of_two() || self.workgroup < SMALLEST_WORKGROUP {
            return Err(Error::Unfit("a workgroup must be a power of two from 8 on"));
        }
        if self.chunks == 0 || self.min_chunk_words < 4 || self.max_chunk_words < self.min_chunk_words {
            return Err(Error::Unfit(
                "chunks must be at least one, of at least 4 words, the shortest below the longest",
            ));
        }
        if u64::from(self.max_chunk_words) > u64::from(self.workgroup) << 14 {
            return Err(Error::Unfit("a chunk must have at most 2^14 words for each invocation"));
        }
        Ok(())
    }

    /// The length of chunks for a set of so many words: an even share of them, rounded up to a multiple of the shortest.
    #[must_use]
    pub fn chunk_words(&self, words: u64) -> u32 {
        let share = words.div_ceil(self.chunks).next_multiple_of(u64::from(self.min_chunk_words));
        u32::try_from(share).unwrap_or(u32::MAX).clamp(self.min_chunk_words, self.max_chunk_words)
    }
}

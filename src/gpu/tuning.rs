//! Every number that was tuned, beside the measurement that earned it. Records of whole runs are in `benches/records`.

/// How much work a workgroup gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Invocations in a workgroup.
    pub workgroup: u32,
    /// The number of chunks that a large set is cut into, if the two limits below allow.
    pub chunks: u64,
    /// Words (4 bytes) in the shortest chunk that a tensor is cut into.
    pub min_chunk_words: u32,
    /// Words in the longest chunk. The loops of one invocation stay far below the 65,535 iterations after which
    /// llvmpipe silently ends them: 2^20 words are 2,048 blocks of 4 words for each of 128 invocations.
    pub max_chunk_words: u32,
}

/// Software devices: llvmpipe and SwiftShader.
///
/// An unclipped step of float32 on llvmpipe with two cores, medians in ms by elements, workgroup and shortest chunk:
///
/// | workgroup | shortest chunk | 64 Ki | 1 Mi | 16 Mi |
/// |---|---|---|---|---|
/// | 64 | 16 Ki | 0.41 | 2.7 | 41 |
/// | 64 | 64 Ki | 0.32 | 2.3 | 48 |
/// | 128 | 16 Ki | 0.34 | 3.8 | 26 |
/// | 128 | 64 Ki | 0.41 | 2.6 | 30 |
/// | 256 | 4 Ki | 0.93 | 10.0 | 25 |
///
/// A workgroup of 256 costs about 40 us by itself there, its tree of barriers most of all. 64 or 1,024 chunks in place of
/// 256 were no faster at 16 Mi.
pub const SOFTWARE: Tuning = Tuning { workgroup: 128, chunks: 256, min_chunk_words: 1 << 14, max_chunk_words: 1 << 20 };

/// Everything else. Not measured yet: the shape that CUB uses, an even share for some workgroups per core.
pub const HARDWARE: Tuning =
    Tuning { workgroup: 256, chunks: 4096, min_chunk_words: 1 << 12, max_chunk_words: 1 << 20 };

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

/// How a plain pass over memory is shared out, for [`GpuClipper::speeds`](super::GpuClipper::speeds).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// Invocations in a workgroup.
    pub workgroup: u32,
    /// Workgroups, each with an even share.
    pub workgroups: u32,
    /// Whether an invocation takes a run of its own; otherwise neighbours take turns.
    pub runs: bool,
}

/// Runs of each pass that speeds are the medians of, beside one that warms up.
pub const SPEED_RUNS: usize = 12;

impl Sweep {
    /// The row for a kind of device.
    #[must_use]
    pub fn of(device_type: wgpu::DeviceType) -> Self {
        match device_type {
            wgpu::DeviceType::Cpu => SOFTWARE_SWEEP,
            _ => HARDWARE_SWEEP,
        }
    }
}

/// Software devices: what one invocation reads should be one run.
///
/// 128 MiB on llvmpipe with two cores, medians in GB/s of what is read, and read and written by the copy kernel
/// (`copy_buffer_to_buffer`: 23 to 28):
///
/// | workgroup | workgroups | runs | read | copy |
/// |---|---|---|---|---|
/// | 32 | 64 | yes | 12.1 | 9.6 |
/// | 32 | 256 | yes | 11.8 | 9.1 |
/// | 32 | 1,024 | yes | 10.8 | 10.1 |
/// | 64 | 256 | yes | 11.4 | 10.1 |
/// | 128 | 256 | yes | 10.9 | 9.7 |
/// | 32 | 256 | no | 3.9 | 3.7 |
/// | 256 | 256 | no | 2.1 | 2.4 |
pub const SOFTWARE_SWEEP: Sweep = Sweep { workgroup: 32, workgroups: 256, runs: true };

/// Everything else. Not measured yet: the shape that CUB uses.
pub const HARDWARE_SWEEP: Sweep = Sweep { workgroup: 256, workgroups: 4096, runs: false };

impl Tuning {
    /// The row for a kind of device.
    #[must_use]
    pub fn of(device_type: wgpu::DeviceType) -> Self {
        match device_type {
            wgpu::DeviceType::Cpu => SOFTWARE,
            _ => HARDWARE,
        }
    }

    /// The length of chunks for a set of so many words: an even share of them, rounded up to a multiple of the shortest.
    #[must_use]
    pub fn chunk_words(&self, words: u64) -> u32 {
        let share = words.div_ceil(self.chunks).next_multiple_of(u64::from(self.min_chunk_words));
        u32::try_from(share).unwrap_or(u32::MAX).clamp(self.min_chunk_words, self.max_chunk_words)
    }
}

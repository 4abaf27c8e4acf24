//! Every number that was tuned, beside the measurement that earned it. Records of whole runs are in `benches/records`.

use crate::Error;

/// How kernels are compiled for a device, and how much work a workgroup gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Tuning {
    /// Invocations in a workgroup: a power of two of at least 8.
    pub workgroup: u32,
    /// Whether each invocation reads a contiguous stretch. Otherwise neighbours read neighbouring quads (16 bytes).
    pub contiguous: bool,
    /// Whether a workgroup's partials merge by subgroup operations, if the device has them. Otherwise they merge by a
    /// tree in workgroup memory.
    pub subgroups: bool,
    /// Whether elements are multiplied by the device's float32 multiplication, if that rounds to the nearest, ties to
    /// even, as is found out when the device is opened. Otherwise they are multiplied in integers, which is far slower.
    pub native_products: bool,
    /// The same of the conversions between float32 and float16.
    pub native_halves: bool,
    /// The most windows (parts of buffers) that a dispatch binds, on devices with arrays of buffers. Others bind one.
    pub windows: u32,
    /// The number of chunks that a large set is cut into, if the two limits below allow.
    pub chunks: u64,
    /// Words (4 bytes) in the shortest chunk that a tensor is cut into.
    pub min_chunk_words: u32,
    /// Words in the longest chunk: at most 2^14 for each invocation, because llvmpipe silently ends the loops of an
    /// invocation after 65,535 iterations in all. 2^14 words are 1,024 blocks of at most 39 iterations. A block of
    /// 16-bit elements, all taken one by one, needs 39; a loop never entered counts as one.
    pub max_chunk_words: u32,
    /// How many partials one workgroup merges. More saves dispatches, but most of the device idles meanwhile.
    pub merged_partials: u32,
}

/// The smallest workgroup that kernels are compiled with.
pub(super) const SMALLEST_WORKGROUP: u32 = 8;

/// Software devices: llvmpipe and SwiftShader.
///
/// The norm of float32 on llvmpipe with two cores, unclipped, medians of 9 in ms. The last two columns are 2,000
/// tensors of 2,100 elements in one buffer, and one tensor of as many elements:
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
/// There a plain sum of 16 Mi takes 55 ms if neighbouring invocations read neighbouring quads, and 11 if each reads a
/// contiguous stretch.
pub const SOFTWARE: Tuning = Tuning {
    workgroup: 8,
    contiguous: true,
    subgroups: false,
    native_products: true,
    native_halves: true,
    windows: 256,
    chunks: 64,
    min_chunk_words: 1 << 15,
    max_chunk_words: 1 << 17,
    merged_partials: 1024,
};

/// All other devices.
///
/// An NVIDIA H200, float32, medians of 9 in µs, of many steps in one submission: a step that clips nothing / everything.
/// Of each, 8 µs are what a pass costs in which no kernel does anything:
///
/// | workgroup | chunks | shortest | 8 Ki | 1 Mi | 4 Mi | 16 Mi | 64 Mi |
/// |---|---|---|---|---|---|---|---|
/// | 256 | 4096 | 4 Ki | 22 / 24 | 24 / 27 | 28 / 35 | 65 / 91 | 109 / 246 |
/// | 256 | 2048 | 8 Ki | 17 / 20 | 24 / 26 | 26 / 32 | 57 / 85 | 102 / 246 |
/// | 256 | 1584 | 8 Ki | 17 / 19 | 24 / 26 | 26 / 33 | 61 / 94 | 101 / 254 |
/// | 256 | 792 | 8 Ki | 18 / 20 | 24 / 27 | 27 / 33 | 54 / 91 | 97 / 250 |
/// | 512 | 2048 | 8 Ki | 18 / 20 | 26 / 29 | 30 / 37 | 67 / 93 | 107 / 237 |
/// | 128 | 4096 | 8 Ki | 18 / 20 | 24 / 28 | 25 / 32 | 56 / 92 | 107 / 256 |
pub const HARDWARE: Tuning = Tuning {
    workgroup: 256,
    contiguous: false,
    subgroups: true,
    native_products: true,
    native_halves: true,
    windows: 1024,
    chunks: 2048,
    min_chunk_words: 1 << 13,
    max_chunk_words: 1 << 20,
    // All chunks of a tensor at once.
    merged_partials: 4096,
};

/// Segments of at most this many partials are merged by one invocation each: a tree has 6 to 8 steps anyway.
pub(super) const LANE_PARTIALS: u32 = 16;

/// Rows of at most this many elements are measured by one invocation each, longer ones by a workgroup. Not measured.
pub(super) const LANE_ROW: u32 = 64;

/// Rows of at least this many words for each invocation of a workgroup are scaled by workgroups of their own: a block
/// each. In shorter rows each element looks up the factor of its row.
///
/// 4 Mi float32 on llvmpipe with two cores, each row clipped, medians of 15 in ms; all elements by one norm take 12:
///
/// | elements in a row | 256 | 1,024 | 4,096 | 32 Ki | 64 Ki |
/// |---|---|---|---|---|---|
/// | factor by factor | 36 to 57 | 39 | 31 | 31 | 32 |
/// | row by row | 29 to 47 | 21 | 14 | 12 | 12 |
pub(super) const LONG_ROW: u32 = 16;

/// One invocation measures this many elements of a column: it reads 1,024 bytes for the 64 that a partial costs. Not
/// measured against other lengths yet.
pub(super) const LANE_COLUMN: u32 = 256;

/// How a plain pass over memory is divided, for [`GpuClipper::speeds`](super::GpuClipper::speeds).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sweep {
    /// Invocations in a workgroup.
    pub(super) workgroup: u32,
    /// Workgroups, each with an even share.
    pub(super) workgroups: u32,
    /// Whether an invocation takes a run of its own; otherwise neighbours take turns.
    pub(super) runs: bool,
}

/// Each speed is the median of this many runs, after one that warms up.
pub(super) const SPEED_RUNS: usize = 12;

impl Sweep {
    /// The row for a kind of device.
    pub(super) fn of(device_type: wgpu::DeviceType) -> Self {
        match device_type {
            wgpu::DeviceType::Cpu => SOFTWARE_SWEEP,
            _ => HARDWARE_SWEEP,
        }
    }

    /// This row, with no more invocations than the device runs and than have room for their sums in `bindable` bytes.
    pub(super) fn fitted(self, limits: &wgpu::Limits, bindable: u64) -> Self {
        let invocations = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
        let workgroup = self.workgroup.min(invocations);
        let room = u32::try_from(bindable / (SUM_BYTES * u64::from(workgroup))).unwrap_or(u32::MAX).max(1);
        let workgroups = self.workgroups.min(limits.max_compute_workgroups_per_dimension).min(room);
        Self { workgroup, workgroups, ..self }
    }
}

/// Each invocation of a plain read writes a sum.
pub(super) const SUM_BYTES: u64 = 16;

/// Software devices: each invocation should read one run.
///
/// 128 MiB on llvmpipe with two cores, medians in GB/s of bytes read and, for the copy kernel, bytes read and written
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
pub(super) const SOFTWARE_SWEEP: Sweep = Sweep { workgroup: 32, workgroups: 256, runs: true };

/// All other devices: the shape that CUB uses. An NVIDIA H200 copies 3,830 GB/s and reads 4,115 this way; PyTorch's `copy_`
/// makes 4,075 there, and `copy_buffer_to_buffer` 844.
pub(super) const HARDWARE_SWEEP: Sweep = Sweep { workgroup: 256, workgroups: 4096, runs: false };

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
            return Err(Error::usage("a workgroup must be a power of two of at least 8"));
        }
        if self.chunks == 0 || self.min_chunk_words < 4 || self.max_chunk_words < self.min_chunk_words {
            return Err(Error::usage(
                "chunks must be at least one, and the shortest must have at least 4 words and not exceed the longest",
            ));
        }
        if !(2..=self.most_merged()).contains(&self.merged_partials) {
            return Err(Error::usage(
                "a workgroup must merge at least 2 partials, and at most 4,096 for each invocation",
            ));
        }
        if self.max_chunk_words > self.longest_chunk() {
            return Err(Error::usage("a chunk must have at most 2^14 words for each invocation"));
        }
        Ok(())
    }

    /// The longest chunk that loops can walk.
    fn longest_chunk(&self) -> u32 {
        self.workgroup.saturating_mul(1 << 14)
    }

    /// The most partials that a workgroup can merge.
    fn most_merged(&self) -> u32 {
        self.workgroup.saturating_mul(1 << 12)
    }

    /// This row, with chunks and merges that its workgroup can do.
    pub(super) fn fitted(self) -> Self {
        Self {
            max_chunk_words: self.max_chunk_words.min(self.longest_chunk()),
            merged_partials: self.merged_partials.min(self.most_merged()),
            ..self
        }
    }

    /// Takes smaller workgroups, of at most `invocations` invocations (8 or more), and gives each less work.
    pub(super) fn narrow(&mut self, invocations: u32) {
        while self.workgroup > invocations {
            self.workgroup /= 2;
            self.max_chunk_words = (self.max_chunk_words / 2).max(self.min_chunk_words).min(self.longest_chunk());
            self.min_chunk_words = self.min_chunk_words.min(self.max_chunk_words);
            self.merged_partials = self.merged_partials.min(self.most_merged());
        }
    }

    /// The length of chunks for a set of this many words: an even share, rounded up to a multiple of the shortest.
    pub(super) fn chunk_words(&self, words: u64) -> u32 {
        let share = words.div_ceil(self.chunks).next_multiple_of(u64::from(self.min_chunk_words));
        u32::try_from(share).unwrap_or(u32::MAX).clamp(self.min_chunk_words, self.max_chunk_words)
    }
}

/// The size of the pieces in which host tensors pass through the device, in bytes.
///
/// 64 Mi elements of float32 through llvmpipe on two cores, medians of 5 in ms, unclipped and clipped, by this size and the
/// device memory that the tensors may take (measured with two staging buffers for each direction; there is one now):
///
/// | size | 64 MiB | all |
/// |---|---|---|
/// | 4 MiB | 429, 775 | 521, 838 |
/// | 8 MiB | 272, 488 | 381, 563 |
/// | 16 MiB | 292, 540 | 363, 592 |
/// | 32 MiB | 267, 526 | 344, 556 |
/// | 64 MiB | 378, 841 | 572, 1079 |
pub(super) const STAGING_BYTES: u64 = 16 << 20;

/// How much device memory host tensors take unless the caller says it, in bytes.
///
/// A software device uses the host's memory, fresh from the system, which clears it page by page. Keeping a set there
/// costs more than it saves, even if everything is clipped and has to come twice. 16 Mi elements of float32 through
/// llvmpipe, medians of 7 in ms, unclipped and clipped: 87 and 167 with 16 MiB, 96 and 167 with 32, 121 and 183 with
/// 64, which is all of them ([`STAGING_BYTES`] has a longer set). Elsewhere what is kept need not cross the bus again;
/// that is not measured.
pub(super) const fn memory_budget(device_type: wgpu::DeviceType) -> u64 {
    match device_type {
        wgpu::DeviceType::Cpu => 2 * STAGING_BYTES,
        _ => u64::MAX,
    }
}

/// The smallest piece of host tensors, in bytes, for a budget below [`STAGING_BYTES`].
pub(super) const SMALLEST_LOAD: u64 = 64 << 10;

/// Bytes that one thread copies to or from a staging buffer, or clips where the device cannot, before it asks for more.
pub(super) const COPIED_AT_ONCE: usize = 64 << 10;

/// A plan that gets one buffer after another cuts each as if it were alone, but into no more chunks in all than this
/// many buffers would have: 32 MiB of partials on hardware for host tensors of any size. Not measured against others.
pub(super) const BUFFERS_OF_CHUNKS: u64 = 256;

/// The elements of the largest tensor that [`GpuClipper::tune`](super::GpuClipper::tune) measures: 256 MiB on hardware,
/// more than caches hold.
pub(super) const LARGE_ON_HARDWARE: u64 = 64 << 20;
pub(super) const LARGE_ON_SOFTWARE: u64 = 16 << 20;

/// How many times a round of `tune` runs each case for each of two rows.
pub(super) const ROUND: usize = 5;

/// Seconds that steps timed together take at least: 100 times what a submission costs.
pub(super) const STEPS_TAKE: f64 = 2e-3;

/// `tune` takes a row whose steps take less than this of the time of the best row before it, in each of two rounds.
pub(super) const TAKEN_BELOW: f64 = 0.95;

#[cfg(test)]
#[path = "tests/tuning.rs"]
mod tests;

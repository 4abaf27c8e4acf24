//! What can go wrong, and what the caller can do about it.

use crate::{Dtype, NonFiniteElements};

/// Every error of this library. None of them leaves a gradient half written: checks come before the first write.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A threshold is negative or not a number. A negative `max_norm` would turn the gradients round.
    #[error("{what} is {value}; it must be {must}")]
    BadParameter {
        /// The parameter's name.
        what: &'static str,
        /// What was given.
        value: f64,
        /// What is accepted.
        must: &'static str,
    },
    /// The bounds of a value clip are the wrong way round, or not numbers.
    #[error("the clip range is {min} to {max}; it needs min <= max, both of them numbers")]
    BadRange {
        /// The lower bound given.
        min: f64,
        /// The upper bound given.
        max: f64,
    },
    /// A byte view does not hold a whole number of elements.
    #[error("{bytes} bytes do not hold a whole number of {dtype} elements")]
    PartialElement {
        /// The dtype of the view.
        dtype: Dtype,
        /// The length of the view in bytes.
        bytes: usize,
    },
    /// A tensor's shape does not fit its elements, or the scope that was asked for.
    #[error("{tensor}: {reason}")]
    Shape {
        /// The tensor: its name, or its place in the list.
        tensor: String,
        /// What does not fit.
        reason: String,
    },
    /// Adaptive gradient clipping lacks the parameter of a gradient, or was given that of another.
    #[error("{tensor}: {reason}")]
    Parameter {
        /// The tensor: its name, or its place in the list.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// A piece is none of its tensor: there is no such tensor, it ends before the piece does, or its dtype is another.
    #[error("{tensor}: {reason}")]
    Piece {
        /// The tensor: its name, or its place in the list.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// A list has another length than what it belongs to.
    #[error("{what}: {found} given, {expected} needed")]
    Length {
        /// What the list is.
        what: &'static str,
        /// How many there must be.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// The clips of one call do not go together, or a clip does not do what was asked of it.
    #[error("{0}")]
    Unfit(&'static str),
    /// A threshold's state is that of other tensors, or of another version.
    #[error("the threshold's state does not fit: {reason}")]
    ThresholdState {
        /// What differs.
        reason: String,
    },
    /// The gradients hold NaN or infinity and the clip's policy is [`NonFinite::Error`](crate::NonFinite::Error).
    /// Nothing was written. Mend the step that made them, or choose another policy.
    #[error("{0}; nothing was written (another non-finite policy would go on: propagate, skip, zero or drop)")]
    NonFinite(NonFiniteElements),
    /// A range reaches past the end of its buffer.
    #[error("{tensor}: elements {start}..{end} of {dtype} end past the buffer, which holds {capacity}")]
    OutOfBounds {
        /// The tensor: its name, or its place in the list.
        tensor: String,
        /// The tensor's dtype.
        dtype: Dtype,
        /// The first element.
        start: u64,
        /// One past the last element.
        end: u64,
        /// How many elements of this dtype the buffer holds.
        capacity: u64,
    },
    /// A buffer cannot be bound by a compute shader. Create it with `BufferUsages::STORAGE`.
    #[error("{tensor}: its buffer has no STORAGE usage; create it with wgpu::BufferUsages::STORAGE")]
    NotStorage {
        /// The tensor: its name, or its place in the list.
        tensor: String,
    },
    /// The tensor's last bytes lie in a word that the buffer does not hold whole, so no shader can reach them.
    /// Round the buffer's size up to a multiple of four bytes.
    #[error(
        "{tensor}: it ends in the last {trailing} bytes of a buffer whose size is not a multiple of 4; make the buffer larger"
    )]
    UnreachableTail {
        /// The tensor: its name, or its place in the list.
        tensor: String,
        /// The bytes past the last whole word.
        trailing: u64,
    },
    /// Two tensors share elements, which would be scaled twice.
    #[error("{first} and {second} overlap in the same buffer; each element may belong to one tensor only")]
    Overlap {
        /// The tensor that begins first.
        first: String,
        /// The tensor that begins inside it.
        second: String,
    },
    /// The GPU has no arithmetic for this dtype. Clip the tensor on the CPU.
    #[error("{tensor} is {dtype}, which WGSL cannot compute with; clip it on the CPU (Clipper::cpu, --backend cpu)")]
    UnsupportedDtype {
        /// The tensor: its name, or its place in the list.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// No adapter fits. Install a driver, or use the CPU path.
    #[error("no GPU adapter found{wanted}; install a Vulkan driver (Debian: mesa-vulkan-drivers) or use the CPU")]
    NoAdapter {
        /// Which adapter was asked for, as a phrase; empty for any.
        wanted: String,
    },
    /// The device lacks a limit that the kernels need. Request the device with at least this limit.
    #[error("the device's limit {limit} is {have}; gradclip needs at least {need}")]
    Limit {
        /// The field of `wgpu::Limits`.
        limit: &'static str,
        /// What the device has.
        have: u64,
        /// What is needed.
        need: u64,
    },
    /// The device ran out of memory. The gradients are as they were; free memory or clip in smaller sets.
    #[error("the GPU is out of memory ({0}); the gradients are untouched: free memory, or use the CPU")]
    OutOfMemory(String),
    /// The device refused what we recorded: a bug here, or a buffer that was destroyed or belongs to another device.
    #[error("the GPU device refused the work: {0}")]
    Device(String),
    /// The device is gone (unplugged, reset or destroyed). Make a new device and new plans.
    #[error("the GPU device was lost ({0}); create a new device and new plans")]
    DeviceLost(String),
    /// A report was asked for, but nothing that this plan encoded has run since the last one.
    #[error("nothing to report: no encoded step of this plan has run; submit the encoder before asking for the report")]
    NotSubmitted,
    /// Another process of the group failed before anything was decided, and says why itself. Nothing was written.
    #[error("rank {rank} of the process group failed, and tells why itself; nothing was written")]
    PeerFailed {
        /// One that did.
        rank: u32,
    },
    /// A tensor does not count exactly once in a group of processes: [`check_counted_once`](crate::processes::check_counted_once).
    #[error("{tensor}: {reason}")]
    Counted {
        /// The tensor's name.
        tensor: String,
        /// How often it counts, or what else is wrong.
        reason: String,
    },
    /// The processes of a group were not called with the same clip and the same segments. Nothing was written.
    #[error("rank {rank} of the process group {reason}; nothing was written")]
    Disagreement {
        /// The first rank that differs from rank 0.
        rank: u32,
        /// In what it differs.
        reason: String,
    },
    /// The other processes of a group cannot be heard.
    #[error("the process group: {0}")]
    ProcessGroup(String),
    /// The plan would need more rows than a table can address.
    #[error("{what} is {value}, more than the {limit} that the GPU path can address")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How large it is.
        value: u64,
        /// The most that works.
        limit: u64,
    },
}

/// How messages call tensor number `index`: by its name, or by its place.
pub(crate) fn tensor_label(name: Option<&str>, index: usize) -> String {
    name.map_or_else(|| format!("tensor {index}"), |name| format!("tensor {name:?}"))
}

//! What can go wrong, and what the caller can do about it.

use std::borrow::Cow;

use crate::Dtype;

/// Every error of this library. None of them leaves a gradient half written: checks come before the first write.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has an invalid value, or the mode or the scope does not use it.
    #[error("{name} is {value}; {reason}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// The given value.
        value: String,
        /// Which values are accepted, or what uses the setting.
        reason: &'static str,
    },
    /// A tensor does not fit its use. Its shape or its range does not fit its elements, its buffer or the scope; it
    /// lacks the parameter that adaptive gradient clipping or an optimizer needs, or has that of another tensor; an
    /// optimizer's state is of another parameter; it shares elements with another tensor; a piece is not part of it; or
    /// it counts twice in a group of processes.
    #[error("{tensor}: {reason}")]
    Tensor {
        /// The tensor: its name, or its place in the list.
        tensor: String,
        /// What is wrong, and what to do about it.
        reason: String,
    },
    /// A call does not fit together: the clips of one call differ, norms or sums are missing, the clip cannot do this,
    /// or bytes are not those of a running partial.
    #[error("{0}")]
    Usage(Cow<'static, str>),
    /// A threshold's state belongs to other tensors, or to another version.
    #[error("the threshold's state does not fit: {0}")]
    ThresholdState(String),
    /// An optimizer's state belongs to another optimizer, to other parameters or to another version, or a part of it is
    /// missing. Nothing was written.
    #[error("the optimizer's state does not fit: {0}")]
    OptimizerState(String),
    /// The gradients hold NaN or infinity and the clip's policy is [`NonFinite::Error`](crate::NonFinite::Error).
    /// Nothing was written. Correct the step that made them, or choose another policy.
    #[error("{0}; nothing was written (another non-finite policy would go on: propagate, skip, zero or drop)")]
    NonFinite(NonFiniteElements),
    /// Too many steps in a row were skipped ([`ConsecutiveSkips`](crate::ConsecutiveSkips)). Nothing was written.
    #[error("{count} steps in a row were skipped: the run has diverged, or the limit is too low; go back or raise it")]
    SkippedInARow {
        /// How many.
        count: u32,
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
    #[error("no GPU adapter found{0}; install a Vulkan driver (Debian: mesa-vulkan-drivers) or use the CPU")]
    NoAdapter(String),
    /// A limit is too low: one of the device, which must be requested with a higher one, or one of this library.
    #[error("{0}")]
    Limit(String),
    /// The device ran out of memory. The gradients are as they were; free memory or clip in smaller sets.
    #[error("the GPU is out of memory ({0}); the gradients are untouched: free memory, or use the CPU")]
    OutOfMemory(String),
    /// The device refused the work: a bug in this library, or a buffer that is destroyed or belongs to another device.
    #[error("the GPU device refused the work: {0}")]
    Device(String),
    /// The device is gone (unplugged, reset or destroyed). Make a new device and new plans.
    #[error("the GPU device was lost ({0}); create a new device and new plans")]
    DeviceLost(String),
    /// A report was asked for, but nothing that this plan encoded has run since the last one.
    #[error("nothing to report: no encoded step of this plan has run; submit the encoder before asking for the report")]
    NotSubmitted,
    /// Another process of the group failed before the decision, and reports the reason itself. Nothing was written.
    #[error("rank {rank} of the process group failed and reports the reason itself; nothing was written")]
    PeerFailed {
        /// A rank that failed.
        rank: u32,
    },
    /// The processes of a group were not called with the same clip and the same segments. Nothing was written.
    #[error("rank {rank} of the process group {reason}; nothing was written")]
    Disagreement {
        /// The first rank that differs from rank 0.
        rank: u32,
        /// How it differs.
        reason: String,
    },
    /// The other processes of a group cannot be reached.
    #[error("the process group: {0}")]
    ProcessGroup(String),
}

impl Error {
    pub(crate) fn too_large(what: &str, value: u64, limit: u64) -> Self {
        Self::Limit(format!("{what} is {value}, more than the {limit} that the GPU path can address"))
    }

    pub(crate) fn usage(why: impl Into<Cow<'static, str>>) -> Self {
        Self::Usage(why.into())
    }
}

/// How many elements are NaN or infinite, and where the first one is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NonFiniteElements {
    /// How many there are in all tensors.
    pub count: u64,
    /// The first process of a group that holds one; None outside a group ([`processes`](crate::processes)).
    pub rank: Option<u32>,
    /// The first tensor that holds one: its place in the list of that process.
    pub tensor: usize,
    /// That tensor's name, if it has one.
    pub name: Option<String>,
    /// The first such element in that tensor, counted from 0 in memory order.
    pub index: u64,
}

impl std::fmt::Display for NonFiniteElements {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.count == 1 { "" } else { "s" };
        let tensor = tensor_label(self.name.as_deref(), self.tensor);
        write!(f, "{} non-finite element{plural}, the first at index {} of {tensor}", self.count, self.index)?;
        self.rank.map_or(Ok(()), |rank| write!(f, " on rank {rank}"))
    }
}

/// What messages call tensor number `index`: its name, or its place.
pub(crate) fn tensor_label(name: Option<&str>, index: usize) -> String {
    name.map_or_else(|| format!("tensor {index}"), |name| format!("tensor {name:?}"))
}

//! What a clip gets besides its description and the tensors.

use std::sync::Arc;

use crate::Clip;
use crate::processes::ProcessGroup;

#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) progress: &'a Progress,
    /// The processes whose parts of the gradients count too.
    pub(crate) processes: &'a dyn ProcessGroup,
}

impl Context<'_> {
    /// No progress function and no other processes.
    #[cfg(feature = "gpu")]
    pub(crate) fn alone() -> Self {
        static NO_PROGRESS: Progress = Progress(None);
        Self { progress: &NO_PROGRESS, processes: &**crate::processes::single_process() }
    }

    /// Whether the tensors are read before anything is written. If another process fails, none may write.
    pub(crate) fn reads_first(self, clip: &Clip) -> bool {
        clip.reads_first() || self.processes.size() > 1
    }
}

/// A function to call with the number of bytes measured since the last call, if there is one.
#[derive(Clone, Default)]
pub(crate) struct Progress(Option<Arc<dyn Fn(u64) + Send + Sync>>);

impl Progress {
    pub(crate) fn new(f: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(f)))
    }

    pub(crate) fn measured(&self, bytes: usize) {
        if let Some(f) = &self.0 {
            f(bytes as u64);
        }
    }
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Progress(Some(..))" } else { "Progress(None)" })
    }
}

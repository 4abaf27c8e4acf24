//! Telling how far a long clip of host tensors is.

use std::sync::Arc;

/// A function to call with the number of bytes that were measured since the last call, if anyone wants to know.
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

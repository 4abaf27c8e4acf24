//! The errors of the program, and their exit codes.

use std::io;
use std::path::{Path, PathBuf};

use gradclip::NonFiniteElements;

/// Why the program stops. OUT is then as it was before.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A file cannot be read or written, or its contents are wrong.
    #[error("{}: {problem}", path.display())]
    File { path: PathBuf, problem: String },
    /// The gradients hold NaN or infinity under the policy `error`. `place` is empty, or ` in FILE`.
    #[error("{found}{place}; nothing was written. To go on: --non-finite propagate, skip, zero or drop")]
    NonFinite { found: NonFiniteElements, place: String },
    /// GPU and CPU disagree.
    #[cfg(feature = "gpu")]
    #[error("{0}")]
    Mismatch(String),
    /// A GPU was asked for.
    #[cfg(not(feature = "gpu"))]
    #[error(
        "this program was built without GPU support; build it with the cargo feature \"gpu\", which is on by default"
    )]
    BuiltWithoutGpu,
    /// The computation could not be set up.
    #[error("{0}")]
    Setup(String),
    /// Any other error of the library.
    #[error(transparent)]
    Library(gradclip::Error),
}

impl Failure {
    pub(crate) fn file(path: &Path, problem: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into() }
    }

    /// For `map_err`: `doing` is what could not be done to the file.
    pub(crate) fn io(path: &Path, doing: &str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::file(path, format!("cannot {doing}: {error}"))
    }

    /// The message on one line, because messages of drivers may span many.
    pub(crate) fn message(&self) -> String {
        self.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::NonFinite { .. } => 3,
            #[cfg(feature = "gpu")]
            Self::Mismatch(_) => 4,
            _ => 1,
        }
    }
}

impl From<gradclip::Error> for Failure {
    fn from(error: gradclip::Error) -> Self {
        match error {
            gradclip::Error::NonFinite(found) => Self::NonFinite { found, place: String::new() },
            gradclip::Error::Setting { .. } => Self::Usage(error.to_string()),
            other => Self::Library(other),
        }
    }
}

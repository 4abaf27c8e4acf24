//! [`AdaptiveThreshold`]: a threshold that follows the norms of a run.

use gradclip::{AdaGc, AutoClip, Threshold, ZClip};

/// A threshold that follows the norms of a run. With the feature `serde` it can be saved in a checkpoint. In a browser, where
/// nothing may wait for a GPU, it starts again when other parameters have gradients.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum AdaptiveThreshold {
    /// Follows the global norm, on a GPU without a wait.
    ZClip(ZClip),
    /// Follows the norm of each tensor (scope `Tensor`), on a GPU without a wait. The same parameters must have a gradient at
    /// each step.
    AdaGc(AdaGc),
    /// Follows the history of the global norm, on the host. Each step waits for the norm of a GPU, so in a browser it is an
    /// error.
    AutoClip(AutoClip),
}

impl AdaptiveThreshold {
    pub(crate) fn on_host(&mut self) -> &mut dyn Threshold {
        match self {
            Self::ZClip(zclip) => zclip,
            Self::AdaGc(adagc) => adagc,
            Self::AutoClip(autoclip) => autoclip,
        }
    }
}

impl From<ZClip> for AdaptiveThreshold {
    fn from(threshold: ZClip) -> Self {
        Self::ZClip(threshold)
    }
}

impl From<AdaGc> for AdaptiveThreshold {
    fn from(threshold: AdaGc) -> Self {
        Self::AdaGc(threshold)
    }
}

impl From<AutoClip> for AdaptiveThreshold {
    fn from(threshold: AutoClip) -> Self {
        Self::AutoClip(threshold)
    }
}

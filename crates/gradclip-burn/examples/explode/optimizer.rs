//! What takes a step: a clip and an optimizer of burn's, or one of the library's with the clip folded in.

use std::sync::Arc;

use burn::module::ParamGroup;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdaGradConfig, AdamConfig, RmsPropConfig, SgdConfig};
use burn::optim::{DynOptimizer, DynState, GradientsParams, LearningRate, ModuleOptimizer, StateSink, StateSource};
use burn::tensor::{Bytes, Device, kind::BridgeTensor};
use gradclip_burn::gradclip::{self, Clip, ClipReport};
use gradclip_burn::{AdaptiveThreshold, Error, GradClipper, GradOptimizer};

use super::Result;
use super::model::Rnn;
use super::settings::Optimizer;

pub(crate) enum Stepper {
    Apart(Box<GradClipper>, ModuleOptimizer),
    /// A threshold that adapts has a clipper of its own.
    Folded(Option<Box<GradClipper>>, Box<GradOptimizer>),
}

impl Stepper {
    /// burn's optimizer, behind a clipper. Its state lies on `device`.
    pub(crate) fn apart(clipper: GradClipper, kind: Optimizer, device: &Device) -> Self {
        Self::Apart(clipper.into(), burns(kind, device))
    }

    /// Clips and steps in one.
    pub(crate) fn folded(clipper: Option<GradClipper>, clip: Clip, kind: Optimizer) -> Self {
        Self::Folded(clipper.map(Box::new), GradOptimizer::new(clip, own(kind)).into())
    }

    pub(crate) fn step(&mut self, lr: f64, model: Rnn, mut grads: GradientsParams) -> Result<Rnn> {
        match self {
            Self::Apart(clipper, optimizer) => {
                clipper.clip(&mut grads, &model)?;
                Ok(optimizer.step(lr, model, grads))
            }
            Self::Folded(clipper, optimizer) => {
                if let Some(clipper) = clipper {
                    clipper.clip(&mut grads, &model)?;
                }
                Ok(optimizer.step(lr, model, grads).map_err(|failed| failed.error)?)
            }
        }
    }

    pub(crate) fn report(&self) -> Result<ClipReport> {
        Ok(match self {
            Self::Apart(clipper, _) | Self::Folded(Some(clipper), _) => clipper.report().wait()?,
            Self::Folded(None, optimizer) => optimizer.report().wait()?,
        })
    }

    pub(crate) fn threshold(&self) -> Result<Option<AdaptiveThreshold>> {
        match self {
            Self::Apart(clipper, _) | Self::Folded(Some(clipper), _) => Ok(clipper.threshold().wait()?),
            Self::Folded(None, _) => Ok(None),
        }
    }

    /// The optimizer's state; nothing before the first step of one of the library's.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        match self {
            Self::Apart(_, optimizer) => Ok(optimizer.into_bytes()?.to_vec()),
            Self::Folded(_, optimizer) => match optimizer.to_safetensors().wait() {
                Err(Error::NotClipped) => Ok(Vec::new()),
                saved => Ok(saved?),
            },
        }
    }

    /// The same, going on from a state.
    pub(crate) fn resumed(self, state: Vec<u8>) -> Result<Self> {
        Ok(match self {
            Self::Apart(clipper, optimizer) => {
                Self::Apart(clipper, optimizer.from_bytes(Bytes::from_bytes_vec(state))?)
            }
            Self::Folded(clipper, optimizer) if !state.is_empty() => {
                Self::Folded(clipper, optimizer.from_safetensors(state).into())
            }
            new => new,
        })
    }
}

/// The library's optimizer with burn's defaults. Each step brings its learning rate.
fn own(kind: Optimizer) -> gradclip::Optimizer {
    match kind {
        Optimizer::Sgd => gradclip::Optimizer::sgd(0.0).momentum(0.9),
        Optimizer::Adagrad => gradclip::Optimizer::adagrad(0.0).eps(1e-5),
        Optimizer::Rmsprop => gradclip::Optimizer::rmsprop(0.0).momentum(0.9).eps(1e-5),
        Optimizer::Adam => gradclip::Optimizer::adam(0.0).eps(1e-5),
    }
}

/// burn's optimizer, with its state on `device`.
fn burns(kind: Optimizer, device: &Device) -> ModuleOptimizer {
    let momentum = MomentumConfig::new().with_momentum(0.9).with_dampening(0.0);
    let sgd = SgdConfig::new().with_momentum(Some(momentum)).build();
    let chosen: Arc<dyn DynOptimizer> = match kind {
        Optimizer::Sgd => Arc::new(sgd.clone()),
        Optimizer::Adagrad => Arc::new(AdaGradConfig::new().build()),
        Optimizer::Rmsprop => Arc::new(RmsPropConfig::new().build()),
        Optimizer::Adam => Arc::new(AdamConfig::new().build()),
    };
    // The first optimizer of a `ModuleOptimizer` is the one for what no group holds; here that is nothing.
    ModuleOptimizer::from(sgd).with_group(ParamGroup::all(), OnDevice { chosen, device: device.clone() }, None)
}

/// burn loads the state of an optimizer to its default device first, which may be a GPU that is not there; this loads
/// it where it belongs.
struct OnDevice {
    chosen: Arc<dyn DynOptimizer>,
    device: Device,
}

impl DynOptimizer for OnDevice {
    fn step_dyn(
        &self,
        rank: usize,
        lr: LearningRate,
        tensor: BridgeTensor,
        grad: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        self.chosen.step_dyn(rank, lr, tensor, grad, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.chosen.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        self.chosen.state_flatten(prefix, state, out);
    }

    fn state_unflatten(&self, rank: usize, prefix: &str, src: &mut StateSource, _: &Device) -> Option<DynState> {
        self.chosen.state_unflatten(rank, prefix, src, &self.device)
    }
}

//! burn's optimizers, as options.

use std::sync::Arc;

use burn::module::ParamGroup;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdaGradConfig, AdamConfig, RmsPropConfig, SgdConfig};
use burn::optim::{DynOptimizer, DynState, LearningRate, ModuleOptimizer, StateSink, StateSource};
use burn::tensor::{Device, kind::BridgeTensor};

use super::settings::Optimizer;

/// An optimizer whose state lies on `device`.
pub(crate) fn optimizer(kind: Optimizer, device: &Device) -> ModuleOptimizer {
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

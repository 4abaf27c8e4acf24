//! Guards against updates, defaults and bias corrections that differ from PyTorch's: 19 settings over 30 steps with
//! spikes, zeros and skipped steps, as torch.optim answers them in float64.

use crate::common::optimizers::Rounding;
use crate::common::torch_cases::{Parameter, Promise, Steps, ULPS, run_all};
use gradclip::{Clip, ClipReport, Clipper, Dtype, Optimizer, OptimizerState, Tensor};

/// Steps on the CPU.
struct OnTheCpu {
    clip: Clip,
    dtype: Dtype,
    state: OptimizerState<'static>,
}

impl OnTheCpu {
    fn new(dtype: Dtype, parameters: &[Parameter], clip: &Clip, settings: &[Optimizer; 2]) -> Self {
        let views = [0, 1]
            .map(|group| parameters.iter().filter(|p| p.group == group).map(|p| p.view(dtype)).collect::<Vec<_>>());
        let groups = [(settings[0], &views[0][..]), (settings[1], &views[1][..])];
        Self { clip: *clip, dtype, state: OptimizerState::new(&groups).expect("valid settings") }
    }
}

impl Steps for OnTheCpu {
    fn step(&mut self, settings: &[Optimizer; 2], parameters: &mut [Parameter], gradients: &[Vec<f32>]) -> ClipReport {
        self.state.optimizers_mut().copy_from_slice(settings);
        let shapes: Vec<_> = parameters.iter().map(|p| p.shape.clone()).collect();
        let views = gradients.iter().zip(&shapes).map(|(g, shape)| Tensor::new(g).shape(shape).expect("it fits"));
        let views: Vec<_> = views.collect();
        let mut own: Vec<_> = parameters.iter_mut().map(|p| p.view_mut(self.dtype)).collect();
        Clipper::cpu().step(&self.clip, &mut self.state, &mut own, &views).expect("a valid step")
    }

    fn state(&mut self, _: &mut [Parameter]) -> &OptimizerState<'static> {
        &self.state
    }
}

#[test]
fn every_update_is_that_of_torch() {
    for dtype in [Dtype::F64, Dtype::F32] {
        let promise = Promise { dtype, rounding: Rounding::of(dtype), norm: 1e-12 };
        let moved = run_all(promise, |parameters, clip, settings| OnTheCpu::new(dtype, parameters, clip, settings));
        assert!(moved <= 1e-6, "{dtype}: {ULPS} ulp and {moved:e} of the way");
    }
}

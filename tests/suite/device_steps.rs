//! Guards against an optimizer's step on the device that differs from torch's, that loses or repeats a step, that writes
//! what is not its own, or whose state is not given back as it was.
#![cfg(feature = "gpu")]

use crate::common::gpu::{Held, step, stepper, with_parameter_each};
use crate::common::numbers::Random;
use crate::common::optimizers::{Element, Near, Rounding, contents};
use crate::common::torch_cases::{Parameter, Promise, Steps, ULPS, run_all};
use crate::common::{Data, Path, assert_same_bits, repeats};
use crate::optimizer_properties::{
    check_elements, clip, clipped, decided, optimizer, place, run_cases, shape, share, spoil,
};
use gradclip::gpu::{GpuPlan, PlanOptions};
use gradclip::{Clip, ClipReport, Dtype, Error, Halves, Mode, Optimizer, OptimizerState};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// Random numbers of a shape.
fn drawn(random: &mut Random, dtype: Dtype, shape: &[usize]) -> Data {
    Data::rounded(dtype, random.normals(shape.iter().product(), 1.0)).shaped(shape)
}

/// Steps of torch's cases on the device.
struct OnTheDevice {
    plan: GpuPlan,
    gradients: Held,
    parameters: Held,
    state: OptimizerState<'static>,
}

impl OnTheDevice {
    fn new(parameters: &[Parameter], clip: &Clip, settings: &[Optimizer; 2]) -> Self {
        let gpu = stepper();
        let own = |p: &Parameter| Data::of(&p.single).named(&p.name).shaped(&p.shape);
        let parameters: Vec<_> = parameters.iter().map(|p| (own(p), p.group)).collect();
        let of_first = parameters.iter().filter(|(_, group)| *group == 0).count();
        let groups = [(settings[0], of_first), (settings[1], parameters.len() - of_first)];
        let parameters: Vec<_> = parameters.into_iter().map(|(data, _)| data).collect();
        let (gradients, parameters) = (Held::new(gpu, parameters.clone(), 1), Held::new(gpu, parameters, 0));
        let tensors = with_parameter_each(gradients.views(), parameters.views());
        let options = PlanOptions::default().optimizers(&groups);
        let plan = gpu.plan_with(&[(*clip, &tensors)], options).expect("valid");
        let state = plan.optimizer_state().wait().expect("the device works");
        Self { plan, gradients, parameters, state }
    }
}

impl Steps for OnTheDevice {
    fn step(&mut self, settings: &[Optimizer; 2], _: &mut [Parameter], gradients: &[Vec<f32>]) -> ClipReport {
        let own = gradients.iter().zip(&self.gradients.data);
        let own: Vec<_> = own.map(|(g, of)| Data { bytes: bytemuck::cast_slice(g).to_vec(), ..of.clone() }).collect();
        self.gradients.write(own);
        self.plan.set_optimizers(settings).expect("valid settings");
        step(stepper(), &self.plan);
        self.plan.report().wait().expect("the device works")
    }

    fn state(&mut self, parameters: &mut [Parameter]) -> &OptimizerState<'static> {
        for (parameter, data) in parameters.iter_mut().zip(self.parameters.read()) {
            parameter.single = bytemuck::pod_collect_to_vec(&data.bytes);
        }
        assert_same_bits(&self.gradients.read(), &self.gradients.data, "gradients are only read");
        self.state = self.plan.optimizer_state().wait().expect("the device works");
        &self.state
    }
}

#[test]
fn every_update_on_the_device_is_that_of_torch() {
    let promise = Promise { dtype: Dtype::F32, rounding: Rounding::of_wgsl(), norm: 1e-6 };
    let moved = run_all(promise, OnTheDevice::new);
    assert!(moved <= 1e-6, "{ULPS} ulp and {moved:e} of the way");
}

/// A random case, and how far it has come.
struct Case {
    plan: GpuPlan,
    optimizers: Vec<Optimizer>,
    clips: Vec<Clip>,
    /// The group of each parameter, and what its elements must be near to.
    groups: Vec<usize>,
    near: Vec<Vec<Element>>,
    /// Gradients and then parameters in one buffer, or each in its own.
    held: Vec<Held>,
}

impl Case {
    fn drawn(random: &mut Random) -> Self {
        let groups = 1 + random.below(2);
        let optimizers: Vec<_> = (0..groups).map(|_| optimizer(random)).collect();
        let (mut of, mut parameters) = (Vec::new(), Vec::new());
        for (group, optimizer) in optimizers.iter().enumerate() {
            for _ in 0..random.below(4) {
                let shape = shape(random);
                let drawn = DTYPES[random.below(3)];
                let remains = (optimizer.halves, drawn) == (Halves::Remainder, Dtype::F16);
                parameters.push(self::drawn(random, if remains { Dtype::BF16 } else { drawn }, &shape));
                of.push(group);
            }
        }
        let (policy, scale, skips) = (random.below(5), random.below(3), random.below(3) == 0);
        let clips = if random.below(2) == 0 { 1 } else { groups };
        let clips: Vec<_> = (0..clips).map(|_| share(clip(random), policy, scale, skips)).collect();
        let near = |(p, group): (&Data, &usize)| {
            p.numbers().map(|w| Element::new(&optimizers[*group], w, Rounding::of_wgsl())).collect()
        };
        let near = parameters.iter().zip(&of).map(near).collect();
        let of_dtype = |p: &Data| Data::rounded(DTYPES[random.below(3)], vec![0.0; p.len()]).shaped(&p.dims());
        let gradients: Vec<_> = parameters.iter().map(of_dtype).collect();
        let (gpu, count) = (stepper(), parameters.len());
        let held = if random.below(2) == 0 {
            vec![Held::new(gpu, gradients.into_iter().chain(parameters).collect(), random.below(4))]
        } else {
            vec![Held::new(gpu, gradients, random.below(4)), Held::new(gpu, parameters, random.below(4))]
        };
        let mut views: Vec<_> = held.iter().flat_map(Held::views).collect();
        let parameters = views.split_off(count);
        let tensors = with_parameter_each(views, parameters);
        let sizes: Vec<_> = (0..groups).map(|group| of.iter().filter(|own| **own == group).count()).collect();
        let each: Vec<_> = optimizers.iter().copied().zip(sizes.iter().copied()).collect();
        let by_clip =
            if clips.len() == 1 { vec![&tensors[..]] } else { vec![&tensors[..sizes[0]], &tensors[sizes[0]..]] };
        let all: Vec<_> = clips.iter().copied().zip(by_clip).collect();
        let plan = gpu.plan_with(&all, PlanOptions::default().optimizers(&each)).expect("valid");
        Self { plan, optimizers, clips, groups: of, near, held }
    }

    /// Gradients and parameters as they are.
    fn read(&self) -> (Vec<Data>, Vec<Data>) {
        let mut all: Vec<_> = self.held.iter().flat_map(Held::read).collect();
        let parameters = all.split_off(self.groups.len());
        (all, parameters)
    }

    /// Writes other gradients beside the parameters.
    fn write(&mut self, random: &mut Random) {
        let size = 10f64.powi(random.below(5) as i32 - 3);
        let (mut gradients, parameters) = self.read();
        for gradient in &mut gradients {
            *gradient = Data::rounded(gradient.dtype, random.normals(gradient.len(), size)).shaped(&gradient.dims());
        }
        spoil(random, &mut gradients);
        if let [gradients_of, parameters_of] = &mut self.held[..] {
            gradients_of.write(gradients);
            parameters_of.write(parameters);
        } else {
            self.held[0].write(gradients.into_iter().chain(parameters).collect());
        }
    }

    /// Takes a step, and checks it. Returns the largest part of its bound that an error took.
    fn check(&mut self) -> f64 {
        let (gradients, before) = self.read();
        let state = || self.plan.optimizer_state().wait().expect("the device works");
        let count = self.groups.len();
        let kept_before = state();
        step(stepper(), &self.plan);
        let reports = self.plan.reports().wait();
        let (unchanged, after) = self.read();
        assert_same_bits(&unchanged, &gradients, "gradients are only read");
        let state = state();
        let decided = decided(&self.clips, &self.groups, &gradients, before.iter());
        let (decided, skipped) = match (decided, reports) {
            (Ok(decided), Ok(reports)) => {
                assert_eq!(reports[0].skipped, decided[0].report().skipped);
                (decided, reports[0].skipped.is_some())
            }
            (Err(Error::NonFinite(expected)), Err(Error::NonFinite(found))) => {
                assert_eq!(expected, found);
                (Vec::new(), true)
            }
            (expected, found) => panic!("decided {expected:?}, stepped {found:?}"),
        };
        if skipped {
            assert_same_bits(&after, &before, "a skipped step");
            assert!(contents(&state, count) == contents(&kept_before, count), "a skipped step");
            return 0.0;
        }
        assert_eq!(state.steps(), kept_before.steps() + 1);
        let r = Rounding::of_wgsl();
        let mut worst = 0.0f64;
        for i in 0..gradients.len() {
            let (clip, tensor) = place(&self.clips, &self.groups, i);
            let (own, optimizer) = (&after[i], &self.optimizers[self.groups[i]]);
            // A norm, or two under AGC, is off by so much, and so are coefficients.
            let by_value = matches!(self.clips[clip].mode, Mode::Value { .. });
            let off = if by_value { 0.0 } else { 2.0 * Path::GpuBuffers.tolerance_of(self.clips[clip].norm_type) };
            let us = clipped(&decided[clip], tensor, &gradients[i], own.dtype).into_iter().map(|u| {
                let mut u = if u.is_finite() { r.given(u) } else { Near { x: u, error: f64::INFINITY } };
                u.error += off * u.x.abs();
                u
            });
            worst = worst.max(check_elements(optimizer, (&state, i), own, &mut self.near[i], us, r));
        }
        worst
    }
}

#[test]
fn random_steps_on_the_device() {
    run_cases("random_steps_on_the_device", repeats(16, 40) as u32, |seed| {
        let random = &mut Random(seed);
        let (mut case, mut worst) = (Case::drawn(random), 0.0f64);
        for _ in 0..4 {
            case.write(random);
            worst = worst.max(case.check());
        }
        worst
    });
}

//! A model with some 200 parameters: not clipped, clipped by burn per tensor, clipped by the global norm; and the same with
//! AdamW's step, burn's and ours. These alternate in one process on one wgpu device: the time until the call returns on the
//! host, and the time until the device is done. Prints medians and minima in milliseconds.
//!
//! `cargo bench -p gradclip-burn --features wgpu`, with `-- --quick` for a few rounds.

use std::time::{Duration, Instant};

use burn::grad_clipping::GradientClippingConfig;
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use gradclip_burn::gradclip::{Clip, Optimizer};
use gradclip_burn::{GradClipper, GradOptimizer};

/// 100 linear layers: 200 parameters, 6.6 million elements.
const LAYERS: usize = 100;
const WIDTH: usize = 256;
const LR: f64 = 1e-3;

#[derive(Module, Debug)]
struct Model {
    layers: Vec<Linear>,
}

/// Gradients as a backward pass leaves them: each just computed by a kernel.
struct Backward<'a>(&'a mut GradientsParams);

impl ModuleVisitor for Backward<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.register(param.id, param.val().mul_scalar(0.5));
    }
}

struct PerTensor<'a>(&'a mut GradientsParams, GradientClippingConfig);

impl ModuleVisitor for PerTensor<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.0.remove::<D>(param.id).expect("each has one");
        self.0.register(param.id, self.1.init().clip_gradient(gradient));
    }
}

/// Reads the gradients that are left, as an optimizer does.
struct Descent<'a>(&'a mut GradientsParams);

impl ModuleVisitor for Descent<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.0.remove::<D>(param.id) {
            drop(param.val() - gradient.mul_scalar(1e-3));
        }
    }
}

fn main() {
    let rounds = if std::env::args().any(|arg| arg == "--quick") { 5 } else { 31 };
    let device = gradclip_burn::open_wgpu(Device::wgpu_options()).unwrap_or_else(|error| panic!("{error}"));
    let differentiated = device.clone().autodiff();
    let layer = |_| LinearConfig::new(WIDTH, WIDTH).init(&differentiated);
    let start = Model { layers: (0..LAYERS).map(layer).collect() };
    let model = start.valid();
    // Computes what is initialised lazily.
    drop(Tensor::<1>::random([1], Distribution::Default, &device).into_data());
    let mut global = GradClipper::new(Clip::norm(1e-3));
    let mut unclipped = GradClipper::new(Clip::norm(1e9));
    let per_tensor = GradientClippingConfig::Norm(1e-3);
    let adamw = AdamWConfig::new();
    let (mut plain, mut clipping) = (adamw.clone().init(), adamw.with_grad_clipping(Some(per_tensor.clone())).init());
    // burn's defaults.
    let settings = Optimizer::adamw(LR).eps(1e-5).weight_decay(1e-4);
    let mut folded = GradOptimizer::new(Clip::norm(1e-3), settings);
    let trained = || Some(start.clone());
    let (mut a, mut b, mut c) = (trained(), trained(), trained());
    type Act<'a> = Box<dyn FnMut(&mut GradientsParams) + 'a>;
    let mut kinds: Vec<(&str, Act<'_>)> = vec![
        ("no clip", Box::new(|_| ())),
        ("burn, per tensor", Box::new(|grads| model.visit(&mut PerTensor(grads, per_tensor.clone())))),
        ("global norm, clipped", Box::new(|grads| global.clip(grads, &model).expect("finite"))),
        ("global norm, not exceeded", Box::new(|grads| unclipped.clip(grads, &model).expect("finite"))),
        ("burn's AdamW", Box::new(|grads| a = a.take().map(|model| plain.step(LR, model, std::mem::take(grads))))),
        (
            "burn's AdamW, per tensor",
            Box::new(|grads| b = b.take().map(|model| clipping.step(LR, model, std::mem::take(grads)))),
        ),
        (
            "AdamW, global norm",
            Box::new(|grads| c = c.take().map(|model| folded.step(LR, model, std::mem::take(grads)).expect("it fits"))),
        ),
    ];
    let mut host = vec![Vec::new(); kinds.len()];
    let mut whole = vec![Vec::new(); kinds.len()];
    for round in 0..rounds + 2 {
        for (kind, (_, clip)) in kinds.iter_mut().enumerate() {
            let mut grads = GradientsParams::new();
            model.visit(&mut Backward(&mut grads));
            device.sync().expect("the device works");
            let start = Instant::now();
            clip(&mut grads);
            let returned = start.elapsed();
            device.sync().expect("the device works");
            let done = start.elapsed();
            model.visit(&mut Descent(&mut grads));
            device.sync().expect("the device works");
            // The first rounds compile.
            if round >= 2 {
                host[kind].push(returned);
                whole[kind].push(done);
            }
        }
    }
    println!("{} parameters, {} elements, {rounds} rounds", 2 * LAYERS, LAYERS * WIDTH * (WIDTH + 1));
    for (kind, (name, _)) in kinds.iter().enumerate() {
        println!(
            "{name:26} host {}   until done {}",
            median_and_minimum(&mut host[kind]),
            median_and_minimum(&mut whole[kind])
        );
    }
}

fn median_and_minimum(times: &mut [Duration]) -> String {
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    format!("{:8.2} ms (least {:8.2})", ms(times[times.len() / 2]), ms(times[0]))
}

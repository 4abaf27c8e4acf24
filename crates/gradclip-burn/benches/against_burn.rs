//! A step on a model with some 200 parameters: not clipped, clipped by burn per tensor, clipped by the global norm. These
//! alternate in one process on one wgpu device: the time until the call returns on the host, and the time until the device
//! is done. Prints medians and minima in milliseconds.
//!
//! `cargo bench -p gradclip-burn --features wgpu`, with `-- --quick` for a few rounds.

use std::time::{Duration, Instant};

use burn::grad_clipping::GradientClippingConfig;
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Tensor};
use gradclip_burn::GradClipper;
use gradclip_burn::gradclip::Clip;

/// 100 linear layers: 200 parameters, 6.6 million elements.
const LAYERS: usize = 100;
const WIDTH: usize = 256;

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

/// Reads the gradients, as an optimizer does.
struct Optimizer<'a>(&'a mut GradientsParams);

impl ModuleVisitor for Optimizer<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.0.remove::<D>(param.id).expect("each has one");
        drop(param.val() - gradient.mul_scalar(1e-3));
    }
}

fn main() {
    let rounds = if std::env::args().any(|arg| arg == "--quick") { 5 } else { 31 };
    let device = gradclip_burn::open_wgpu(Device::wgpu_options()).unwrap_or_else(|error| panic!("{error}"));
    let layer = |_| LinearConfig::new(WIDTH, WIDTH).init(&device);
    let model = Model { layers: (0..LAYERS).map(layer).collect() };
    // Computes what is initialised lazily.
    drop(Tensor::<1>::random([1], Distribution::Default, &device).into_data());
    let mut global = GradClipper::new(Clip::norm(1e-3));
    let mut unclipped = GradClipper::new(Clip::norm(1e9));
    let per_tensor = GradientClippingConfig::Norm(1e-3);
    type Act<'a> = Box<dyn FnMut(&mut GradientsParams) + 'a>;
    let mut kinds: Vec<(&str, Act<'_>)> = vec![
        ("no clip", Box::new(|_| ())),
        ("burn, per tensor", Box::new(|grads| model.visit(&mut PerTensor(grads, per_tensor.clone())))),
        ("global norm, clipped", Box::new(|grads| global.clip(grads, &model).expect("finite"))),
        ("global norm, not exceeded", Box::new(|grads| unclipped.clip(grads, &model).expect("finite"))),
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
            model.visit(&mut Optimizer(&mut grads));
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

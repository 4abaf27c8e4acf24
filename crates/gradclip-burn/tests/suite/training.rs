//! Guards against a clip that trains another model: burn's whole loop, clipped on the host and on the GPU.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, SgdConfig};
use burn::tensor::{Device, Tensor, TensorData};
use gradclip_burn::GradClipper;
use gradclip_burn::gradclip::{Clip, Scope, ZClip};

use crate::common::{Random, norm, weights, wgpu};

#[derive(Module, Debug)]
struct Mlp {
    hidden: Linear,
    output: Linear,
}

impl Mlp {
    /// The same weights on every device.
    fn new(device: &Device) -> Self {
        let device = device.clone().autodiff();
        let mut random = Random(21);
        let mut linear = |from: usize, to: usize| {
            let mut layer = LinearConfig::new(from, to).init(&device);
            let numbers: Vec<_> = random.normals(from * to).iter().map(|x| *x as f32 / (from as f32).sqrt()).collect();
            let weight = Tensor::<2>::from_data(TensorData::new(numbers, [from, to]), &device);
            layer.weight = layer.weight.map(|_| weight.require_grad());
            layer.bias = layer.bias.map(|bias| bias.map(|bias| bias.zeros_like().require_grad()));
            layer
        };
        Self { hidden: linear(8, 32), output: linear(32, 1) }
    }

    fn loss(&self, step: u64, device: &Device) -> Tensor<1> {
        let device = device.clone().autodiff();
        let mut random = Random(1000 + step);
        let numbers: Vec<f32> = random.normals(16 * 8).iter().map(|x| *x as f32).collect();
        let targets: Vec<f32> = numbers.chunks(8).map(|x| 3.0 * x[0] - x[1] * x[2]).collect();
        let input = Tensor::<2>::from_data(TensorData::new(numbers, [16, 8]), &device);
        let target = Tensor::<2>::from_data(TensorData::new(targets, [16, 1]), &device);
        let out = self.output.forward(burn::tensor::activation::tanh(self.hidden.forward(input)));
        (out - target).square().mean()
    }
}

fn train(device: &Device, mut clipper: GradClipper, adam: bool) -> (Vec<f64>, usize) {
    let mut model = Mlp::new(device);
    let mut adam = adam.then(|| AdamConfig::new().init());
    let mut sgd = SgdConfig::new().init();
    let mut clipped = 0;
    for step in 0..60 {
        let loss = model.loss(step, device);
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        clipper.clip(&mut grads, &model).expect("finite");
        clipped += usize::from(clipper.report().wait().expect("clipped").clipped);
        model = match &mut adam {
            Some(adam) => adam.step(1e-2, model, grads),
            None => sgd.step(0.1, model, grads),
        };
    }
    (weights(&model).concat(), clipped)
}

#[test]
fn the_same_weights_on_host_and_gpu() {
    let gpu = wgpu();
    let norm_clip = Clip::norm(0.5);
    let make: [(&str, &dyn Fn() -> GradClipper); 4] = [
        ("norm", &|| GradClipper::new(norm_clip)),
        ("tensor", &|| GradClipper::new(norm_clip.scope(Scope::Tensor))),
        ("agc", &|| GradClipper::new(Clip::agc(0.05))),
        ("zclip", &|| GradClipper::adaptive(norm_clip, ZClip::new().warm_up(5))),
    ];
    for (what, make) in make {
        for adam in [false, true] {
            // The same arithmetic around the clip, so that only the clip differs.
            let (on_gpu, clipped) = train(&gpu, make(), adam);
            let (on_host, clipped_too) = train(&gpu, make().through_host(), adam);
            assert!(clipped > 5, "{what}: clipped {clipped} times");
            assert_eq!(clipped, clipped_too, "{what}");
            let difference: Vec<_> = on_gpu.iter().zip(&on_host).map(|(a, b)| a - b).collect();
            let relative = norm(&difference) / norm(&on_host);
            assert!(relative < 1e-4, "{what}, adam {adam}: weights differ by {relative:e}");
        }
    }
}

/// Between backends burn's own arithmetic differs too.
#[test]
fn nearly_the_same_weights_on_burns_cpu_backend() {
    let clipper = || GradClipper::new(Clip::norm(0.5));
    let ((on_gpu, _), (on_cpu, _)) = (train(&wgpu(), clipper(), false), train(&Device::flex(), clipper(), false));
    let difference: Vec<_> = on_gpu.iter().zip(&on_cpu).map(|(a, b)| a - b).collect();
    let relative = norm(&difference) / norm(&on_cpu);
    assert!(relative < 1e-3, "weights differ by {relative:e}");
}

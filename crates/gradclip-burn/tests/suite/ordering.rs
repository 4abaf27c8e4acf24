//! Guards against a clip that runs before the gradients are there, or after something that reads them.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use gradclip_burn::GradClipper;
use gradclip_burn::gradclip::Clip;

use crate::common::wgpu;

#[derive(Module, Debug)]
struct Two {
    first: Param<Tensor<2>>,
    second: Param<Tensor<1>>,
}

impl Two {
    fn new(shape: [usize; 2], len: usize, device: &Device) -> Self {
        let first = Param::from_tensor(Tensor::<2>::ones(shape, device));
        Self { first, second: Param::from_tensor(Tensor::<1>::ones([len], device)) }
    }
}

/// What makes the gradients is a chain of kernels on tensors that take their time, recorded just before; what reads them is
/// recorded just after. In each of 1,000 steps both must see the clip where it belongs. A clip ahead of the chain would
/// scale the numbers of the step before, of another size.
#[test]
fn a_thousand_steps_in_order() {
    let device = wgpu();
    let two = Two::new([64, 256], 3, &device);
    let mut clipper = GradClipper::new(Clip::norm(1.0).eps(0.0));
    let chain = |scale: f32| {
        let mut x = Tensor::<2>::full([64, 256], scale / 1.1f32.powi(8), &device);
        for _ in 0..8 {
            x = x.mul_scalar(1.1).sub_scalar(scale).add_scalar(scale);
        }
        x
    };
    let mut sums: Vec<Tensor<1>> = Vec::new();
    for step in 0..1000u32 {
        // Changes each time, so that numbers of an earlier step show.
        let scale = 1.0 + (step % 7) as f32;
        let mut grads = GradientsParams::new();
        grads.register(two.first.id, chain(scale));
        grads.register(two.second.id, Tensor::<1>::zeros([3], &device));
        clipper.clip(&mut grads, &two).expect("finite");
        let clipped: Tensor<2> = grads.remove(two.first.id).expect("there");
        sums.push(clipped.square().sum());
        if step % 50 == 0 {
            let norm = clipper.report().wait().expect("clipped").total_norm;
            let expected = f64::from(scale) * f64::from(64 * 256).sqrt();
            assert!((norm / expected - 1.0).abs() < 1e-5, "step {step}: the norm is {norm}, not {expected}");
        }
    }
    for (step, sum) in Tensor::cat(sums, 0).into_data().iter::<f64>().enumerate() {
        assert!((sum - 1.0).abs() < 1e-4, "step {step}: after the clip the squares add up to {sum}");
    }
}

/// Threads that train models of their own on one device.
#[test]
fn several_threads_on_one_device() {
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let device: Device = wgpu();
                let module = Two::new([8, 8], 2, &device);
                let mut clipper = GradClipper::new(Clip::norm(1.0).eps(0.0));
                for step in 0..30 {
                    let size = (1 + thread * 30 + step) as f32;
                    let mut grads = GradientsParams::new();
                    grads.register(module.first.id, Tensor::<2>::full([8, 8], size, &device).mul_scalar(2.0));
                    clipper.clip(&mut grads, &module).expect("finite");
                    let norm = clipper.report().wait().expect("clipped").total_norm;
                    assert!((norm / f64::from(size * 16.0) - 1.0).abs() < 1e-5, "thread {thread}, step {step}: {norm}");
                    let clipped: Tensor<2> = grads.remove(module.first.id).expect("there");
                    let sum: f64 = clipped.square().sum().into_scalar();
                    assert!((sum - 1.0).abs() < 1e-4, "thread {thread}, step {step}: {sum}");
                }
            });
        }
    });
}

/// Gradients that another thread has computed.
#[test]
fn gradients_of_another_thread() {
    let device = wgpu();
    let two = Two::new([64, 256], 3, &device);
    let mut clipper = GradClipper::new(Clip::norm(1.0).eps(0.0));
    for step in 1..40 {
        let (first, second) = (two.first.id, two.second.id);
        let device = device.clone();
        let make = move || {
            let mut grads = GradientsParams::new();
            let mut x = Tensor::<2>::full([64, 256], step as f32, &device);
            for _ in 0..20 {
                x = x.mul_scalar(2.0).mul_scalar(0.5);
            }
            grads.register(first, x);
            grads.register(second, Tensor::<1>::zeros([3], &device));
            grads
        };
        let mut grads = std::thread::spawn(make).join().expect("made");
        clipper.clip(&mut grads, &two).expect("finite");
        let norm = clipper.report().wait().expect("clipped").total_norm;
        let expected = f64::from(step) * 128.0;
        assert!((norm / expected - 1.0).abs() < 1e-5, "step {step}: the norm is {norm}, not {expected}");
    }
}

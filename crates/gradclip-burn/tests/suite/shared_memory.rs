//! Guards against a neighbour that changes because it shares memory with a gradient: clones, views, slices, broadcasts.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use gradclip_burn::clip_grad_norm;
use gradclip_burn::gradclip::Clip;

use crate::common::{Random, all_numbers, assert_close, devices, norm, rounded};

#[derive(Module, Debug)]
struct Pair {
    first: Param<Tensor<2>>,
    second: Param<Tensor<2>>,
}

impl Pair {
    fn new(shapes: [[usize; 2]; 2], device: &Device) -> Self {
        let parameter = |shape| Param::from_tensor(Tensor::<2>::ones(shape, device));
        Self { first: parameter(shapes[0]), second: parameter(shapes[1]) }
    }

    fn with(&self, first: Tensor<2>, second: Tensor<2>) -> GradientsParams {
        let mut grads = GradientsParams::new();
        grads.register(self.first.id, first);
        grads.register(self.second.id, second);
        grads
    }
}

fn tensor(numbers: &[f64], shape: [usize; 2], device: &Device) -> Tensor<2> {
    let numbers: Vec<_> = numbers.iter().map(|x| *x as f32).collect();
    Tensor::from_data(TensorData::new(numbers, shape), device)
}

fn read(tensor: &Tensor<2>) -> Vec<f64> {
    tensor.clone().into_data().iter::<f64>().collect()
}

fn clipped(numbers: &[f64], all: &[f64]) -> Vec<f64> {
    numbers.iter().map(|x| x / (norm(all) + 1e-6)).collect()
}

#[test]
fn a_clone_that_the_caller_keeps() {
    for (name, device) in devices() {
        let pair = Pair::new([[4, 6], [4, 6]], &device);
        let numbers = rounded(&Random(1).normals(24));
        let gradient = tensor(&numbers, [4, 6], &device);
        // Both gradients and the caller's are one piece of memory.
        let mut grads = pair.with(gradient.clone(), gradient.clone());
        clip_grad_norm(&mut grads, &pair, 1.0).expect("finite");
        assert_eq!(read(&gradient), numbers, "{name}: the caller's own");
        let all = [&numbers[..], &numbers].concat();
        for found in all_numbers(&pair, &grads) {
            assert_close(&found, &clipped(&numbers, &all), 2e-6, name);
        }
    }
}

#[test]
fn a_transposed_view() {
    for (name, device) in devices() {
        let pair = Pair::new([[6, 4], [4, 6]], &device);
        let numbers = rounded(&Random(2).normals(24));
        let kept = tensor(&numbers, [4, 6], &device);
        let mut grads = pair.with(kept.clone().transpose(), tensor(&numbers, [4, 6], &device));
        clip_grad_norm(&mut grads, &pair, 1.0).expect("finite");
        assert_eq!(read(&kept), numbers, "{name}: the caller's own");
        let expected = clipped(&numbers, &[&numbers[..], &numbers].concat());
        let transposed: Vec<_> = (0..24).map(|i| expected[i % 4 * 6 + i / 4]).collect();
        assert_close(&all_numbers(&pair, &grads)[0], &transposed, 2e-6, name);
        assert_close(&all_numbers(&pair, &grads)[1], &expected, 2e-6, name);
        // The only one of its memory, but not in order.
        let mut grads = pair.with(tensor(&numbers, [4, 6], &device).transpose(), tensor(&numbers, [4, 6], &device));
        clip_grad_norm(&mut grads, &pair, 1.0).expect("finite");
        assert_close(&all_numbers(&pair, &grads)[0], &transposed, 2e-6, name);
    }
}

/// Halves of one allocation, of which one is a gradient and one is not.
#[test]
fn slices_of_one_tensor() {
    for (name, device) in devices() {
        let pair = Pair::new([[3, 5], [2, 5]], &device);
        let numbers = rounded(&Random(3).normals(50));
        let whole = tensor(&numbers, [10, 5], &device);
        let (first, second, rest) =
            (whole.clone().slice([0..3, 0..5]), whole.clone().slice([3..5, 0..5]), whole.slice([5..10, 0..5]));
        let mut grads = pair.with(first, second);
        clip_grad_norm(&mut grads, &pair, 1.0).expect("finite");
        assert_eq!(read(&rest), numbers[25..], "{name}: what is no gradient");
        let all = &numbers[..25];
        assert_close(&all_numbers(&pair, &grads)[0], &clipped(&all[..15], all), 2e-6, name);
        assert_close(&all_numbers(&pair, &grads)[1], &clipped(&all[15..], all), 2e-6, name);
    }
}

/// One row that stands for all, as the gradient of a sum is: each element counts, and is clipped once.
#[test]
fn a_broadcast_gradient() {
    for (name, device) in devices() {
        let pair = Pair::new([[7, 3], [1, 3]], &device);
        let row = tensor(&[1.0, -2.0, 0.5], [1, 3], &device);
        let mut grads = pair.with(row.clone().expand([7, 3]), row.clone());
        clip_grad_norm(&mut grads, &pair, 1.0).expect("finite");
        assert_eq!(read(&row), [1.0, -2.0, 0.5], "{name}: the caller's own");
        let all: Vec<_> = (0..24).map(|i| [1.0, -2.0, 0.5][i % 3]).collect();
        assert_close(&all_numbers(&pair, &grads)[0], &clipped(&all[..21], &all), 2e-6, name);
        assert_close(&all_numbers(&pair, &grads)[1], &clipped(&all[21..], &all), 2e-6, name);
    }
}

/// A clip that is refused leaves shared and unshared gradients as they were.
#[test]
fn nothing_is_half_clipped_by_an_error() {
    for (name, device) in devices() {
        let pair = Pair::new([[4, 6], [4, 6]], &device);
        let mut numbers = rounded(&Random(4).normals(24));
        let first = tensor(&numbers, [4, 6], &device);
        numbers[7] = f64::INFINITY;
        let mut grads = pair.with(first, tensor(&numbers, [4, 6], &device));
        let before = all_numbers(&pair, &grads);
        let mut clipper = gradclip_burn::GradClipper::new(Clip::norm(1e-3));
        let result = clipper.clip(&mut grads, &pair).and_then(|()| clipper.report().wait());
        let message = result.expect_err("infinite").to_string();
        assert!(message.contains("second") && message.contains('7'), "{name}: {message}");
        assert_eq!(all_numbers(&pair, &grads), before, "{name}");
    }
}

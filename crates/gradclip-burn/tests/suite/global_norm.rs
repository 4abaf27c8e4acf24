//! Guards against a norm that is not that of all gradients, or a clip that is not the one asked for: every mode and scope
//! beside plain loops in float64.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};
use gradclip_burn::gradclip::{Clip, NormType, Scope, Skipped};
use gradclip_burn::{GradClipper, clip_grad_norm, clip_grad_value};

use crate::common::{NET, Net, Random, all_numbers, assert_close, devices, gradients, norm, numbers, rounded, weights};

fn filled(seed: u64) -> impl FnMut(usize, usize) -> Vec<f64> {
    let mut random = Random(seed);
    move |at, n| rounded(&random.normals(n).iter().map(|x| x * (1.0 + at as f64)).collect::<Vec<_>>())
}

fn expected(f: impl Fn(usize, &[usize], &[f64]) -> Vec<f64>) -> Vec<Vec<f64>> {
    let mut filled = filled(7);
    let each = |(at, (_, shape)): (usize, &(&str, &[usize]))| f(at, shape, &filled(at, shape.iter().product()));
    NET.iter().enumerate().map(each).collect()
}

fn check(clip: Clip, what: &str, expected: &[Vec<f64>]) {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let mut grads = gradients(&net, &device, DType::F32, filled(7));
        let mut clipper = GradClipper::new(clip);
        clipper.clip(&mut grads, &net).expect("finite");
        assert!(clipper.report().wait().expect("clipped").clipped, "{name} {what}");
        for (at, (found, expected)) in all_numbers(&net, &grads).iter().zip(expected).enumerate() {
            assert_close(found, expected, 2e-6, &format!("{name} {what} {}", NET[at].0));
        }
    }
}

fn times(numbers: &[f64], factor: f64) -> Vec<f64> {
    numbers.iter().map(|x| x * factor).collect()
}

#[test]
fn of_all_gradients_together() {
    let all = expected(|_, _, x| x.to_vec()).concat();
    let clip = Clip::norm(1.0).eps(0.0);
    let by = |c: f64| expected(|_, _, x| times(x, c));
    check(clip, "norm", &by(1.0 / norm(&all)));
    check(clip.norm_type(NormType::L1), "L1", &by(1.0 / all.iter().map(|x| x.abs()).sum::<f64>()));
    check(clip.norm_type(NormType::Inf), "inf", &by(1.0 / all.iter().fold(0.0f64, |most, x| most.max(x.abs()))));
    check(Clip::rms(0.1), "rms", &by(0.1 / (norm(&all) / (all.len() as f64).sqrt())));
    check(Clip::average_norm(1e-4), "average norm", &by(1e-4 / (norm(&all) / all.len() as f64)));
    let scaled = Clip::norm(1e-3).eps(0.0).grad_scale(1024.0);
    check(scaled, "unscaled", &by(1e-3 / norm(&all)));
}

#[test]
fn above_its_limit_skips_the_step() {
    let all = expected(|_, _, x| x.to_vec());
    let total = norm(&all.concat()) / 2.0;
    for (name, device) in devices() {
        let net = Net::new(&device);
        for (limit, skipped) in [(0.9 * total, Some(Skipped::Above)), (1.1 * total, None)] {
            let mut grads = gradients(&net, &device, DType::F32, filled(7));
            let mut clipper = GradClipper::new(Clip::norm(1.0).grad_scale(2.0).skip_above(limit));
            clipper.clip(&mut grads, &net).expect("finite");
            assert_eq!(clipper.report().wait().expect("a step").skipped, skipped, "{name}");
            assert_eq!(all_numbers(&net, &grads) == all, skipped.is_some(), "{name} {skipped:?}");
        }
    }
}

#[test]
fn of_each_element() {
    check(Clip::value(0.5), "value", &expected(|_, _, x| x.iter().map(|x| x.clamp(-0.5, 0.5)).collect()));
    let range = Clip::range(-0.25, 0.75);
    check(range, "range", &expected(|_, _, x| x.iter().map(|x| x.clamp(-0.25, 0.75)).collect()));
}

#[test]
fn of_each_tensor() {
    let clip = Clip::norm(2.0).eps(0.0).scope(Scope::Tensor);
    check(clip, "tensor", &expected(|_, _, x| times(x, (2.0 / norm(x)).min(1.0))));
}

/// Units are columns for `Linear`, whose weights are `[in, out]`, and rows for every other layer.
fn by_unit(at: usize, shape: &[usize], numbers: &[f64], factor: impl Fn(usize, &[usize]) -> f64) -> Vec<f64> {
    let (rows, columns) = (shape[0], numbers.len() / shape[0]);
    let indices = |unit: &dyn Fn(usize) -> bool| (0..numbers.len()).filter(|i| unit(*i)).collect::<Vec<_>>();
    let units: Vec<Vec<usize>> = match shape.len() {
        1 => vec![(0..numbers.len()).collect()],
        _ if NET[at].0.starts_with("hidden") => (0..columns).map(|c| indices(&|i| i % columns == c)).collect(),
        _ => (0..rows).map(|r| indices(&|i| i / columns == r)).collect(),
    };
    let mut out = numbers.to_vec();
    for unit in units {
        let c = factor(at, &unit);
        unit.iter().for_each(|i| out[*i] *= c);
    }
    out
}

#[test]
fn of_each_unit() {
    let clip = Clip::norm(3.0).eps(0.0).scope(Scope::Unit);
    let one = |at, shape: &[usize], x: &[f64]| {
        by_unit(at, shape, x, |_, unit| (3.0 / norm(unit.iter().map(|i| &x[*i]))).min(1.0))
    };
    check(clip, "unit", &expected(one));
}

#[test]
fn of_each_unit_beside_its_parameter() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let parameters = weights(&net);
        let mut grads = gradients(&net, &device, DType::F32, filled(7));
        let mut clipper = GradClipper::new(Clip::agc(0.01));
        clipper.clip(&mut grads, &net).expect("finite");
        let expected = expected(|at, shape, x| {
            by_unit(at, shape, x, |at, unit| {
                let of = |numbers: &[f64]| norm(unit.iter().map(|i| &numbers[*i]));
                (0.01 * of(&parameters[at]).max(1e-3) / of(x).max(1e-6)).min(1.0)
            })
        });
        for (at, (found, expected)) in all_numbers(&net, &grads).iter().zip(&expected).enumerate() {
            assert_close(found, expected, 2e-6, &format!("{name} {}", NET[at].0));
        }
        assert_eq!(weights(&net), parameters, "parameters are only read");
    }
}

#[test]
fn parameters_without_a_gradient_are_skipped() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let mut grads = gradients(&net, &device, DType::F32, filled(7));
        drop(grads.remove::<2>(net.embedding_id()));
        let rest = expected(|_, _, x| x.to_vec())[1..].concat();
        let mut clipper = GradClipper::new(Clip::norm(1.0));
        clipper.clip(&mut grads, &net).expect("finite");
        let found = clipper.report().wait().expect("clipped").total_norm;
        assert_close(&[found], &[norm(&rest)], 1e-6, name);
        assert!(numbers(&net, &grads)[0].is_none());
        // Nothing at all: a frozen model.
        clipper.clip(&mut GradientsParams::new(), &net).expect("nothing to clip");
        assert_eq!(clipper.report().wait().expect("clipped").total_norm, 0.0);
    }
}

/// A tied parameter is one parameter, wherever it occurs.
#[test]
fn a_shared_parameter_counts_once() {
    #[derive(Module, Debug)]
    struct Tied {
        first: Param<Tensor<2>>,
        second: Param<Tensor<2>>,
    }
    for (name, device) in devices() {
        let first = Param::from_tensor(Tensor::<2>::ones([3, 5], &device));
        let tied = Tied { second: first.clone(), first };
        let mut grads = gradients(&tied, &device, DType::F32, |_, n| vec![2.0; n]);
        let mut clipper = GradClipper::new(Clip::norm(1e9));
        clipper.clip(&mut grads, &tied).expect("finite");
        let report = clipper.report().wait().expect("clipped");
        assert_eq!(report.elements, 15, "{name}");
        assert_close(&[report.total_norm], &[60f64.sqrt()], 1e-6, name);
    }
}

#[test]
fn several_optimizers_share_a_norm_or_have_their_own() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let all = expected(|_, _, x| x.to_vec());
        let halves = || {
            let mut first = gradients(&net, &device, DType::F32, filled(7));
            let mut second = GradientsParams::new();
            second.register(net.embedding_id(), first.remove::<2>(net.embedding_id()).expect("it has one"));
            (first, second)
        };
        let clip = Clip::norm(1.0).eps(0.0);
        let (mut first, mut second) = halves();
        let mut clipper = GradClipper::new(clip);
        clipper.clip_all(&mut [&mut first, &mut second], &net).expect("finite");
        let c = 1.0 / norm(&all.concat());
        assert_eq!((first.len(), second.len()), (NET.len() - 1, 1), "each went back to where it was");
        assert_close(&numbers(&net, &second)[0].clone().expect("there"), &times(&all[0], c), 2e-6, name);
        assert_close(&numbers(&net, &first)[1].clone().expect("there"), &times(&all[1], c), 2e-6, name);

        let (mut first, mut second) = halves();
        let (mut of_first, mut of_second) = (GradClipper::new(clip), GradClipper::new(clip));
        of_first.clip(&mut first, &net).expect("finite");
        of_second.clip(&mut second, &net).expect("finite");
        let own = |of: &[f64], x: &[f64]| times(x, 1.0 / norm(of));
        assert_close(&numbers(&net, &second)[0].clone().expect("there"), &own(&all[0], &all[0]), 2e-6, name);
        let rest = all[1..].concat();
        assert_close(&numbers(&net, &first)[1].clone().expect("there"), &own(&rest, &all[1]), 2e-6, name);
    }
}

/// Two losses share a part of the model, whose gradients of both count and are clipped.
#[test]
fn a_parameter_with_two_gradients_counts_with_both() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let mut first = gradients(&net, &device, DType::F32, filled(7));
        let mut second = gradients(&net, &device, DType::F32, filled(7));
        let clip = Clip::norm(1.0).eps(0.0);
        GradClipper::new(clip).clip_all(&mut [&mut first, &mut second], &net).expect("finite");
        let c = 1.0 / (2f64.sqrt() * norm(&expected(|_, _, x| x.to_vec()).concat()));
        for grads in [first, second] {
            for (found, expected) in all_numbers(&net, &grads).iter().zip(&expected(|_, _, x| times(x, c))) {
                assert_close(found, expected, 2e-6, name);
            }
        }
    }
}

/// Whoever changes a gradient by a tensor on the device that the model is trained on, gets one that is part of a graph.
#[test]
fn gradients_of_the_training_device_are_clipped_too() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let mut grads = gradients(&net, &device, DType::F32, filled(7));
        let id = net.embedding_id();
        let masked = grads.remove::<2>(id).expect("it has one");
        let mask = Tensor::<2>::ones(masked.dims(), &device.clone().autodiff());
        grads.register(id, masked * mask);
        let clip = Clip::norm(1.0).eps(0.0);
        GradClipper::new(clip).clip(&mut grads, &net).expect("finite");
        let c = 1.0 / norm(&expected(|_, _, x| x.to_vec()).concat());
        for (found, expected) in all_numbers(&net, &grads).iter().zip(&expected(|_, _, x| times(x, c))) {
            assert_close(found, expected, 2e-6, name);
        }
    }
}

#[test]
fn in_one_line() {
    for (name, device) in devices() {
        let (net, other) = (Net::new(&device), Net::new(&device));
        for round in 0..3 {
            for (net, max_norm) in [(&net, 1.0), (&other, 1.0), (&net, 0.5)] {
                let mut grads = gradients(net, &device, DType::F32, filled(7));
                clip_grad_norm(&mut grads, net, max_norm).expect("finite");
                let c = max_norm / (norm(&expected(|_, _, x| x.to_vec()).concat()) + 1e-6);
                let expected = expected(|_, _, x| times(x, c));
                for (found, expected) in all_numbers(net, &grads).iter().zip(&expected) {
                    assert_close(found, expected, 2e-6, &format!("{name} round {round}"));
                }
            }
            let mut grads = gradients(&net, &device, DType::F32, filled(7));
            clip_grad_value(&mut grads, &net, 0.5).expect("finite");
            let expected = expected(|_, _, x| x.iter().map(|x| x.clamp(-0.5, 0.5)).collect());
            assert_eq!(all_numbers(&net, &grads), expected, "{name} round {round}");
        }
    }
}

/// Where nothing is clipped, gradients keep their bits, denormals and zeros included.
#[test]
fn nothing_to_clip_changes_nothing() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let odd = |at: usize, n: usize| (0..n).map(|i| [0.0, -0.0, 1e-40, -3.0, 1e-3][(i + at) % 5]).collect();
        let mut grads = gradients(&net, &device, DType::F32, odd);
        let before: Vec<Vec<u64>> = bits(&all_numbers(&net, &grads));
        clip_grad_norm(&mut grads, &net, 1e6).expect("finite");
        assert_eq!(bits(&all_numbers(&net, &grads)), before, "{name}");
    }
}

fn bits(numbers: &[Vec<f64>]) -> Vec<Vec<u64>> {
    numbers.iter().map(|numbers| numbers.iter().map(|x| x.to_bits()).collect()).collect()
}

/// One larger than burn's own norm gets right on llvmpipe.
#[test]
fn of_a_large_tensor() {
    #[derive(Module, Debug)]
    struct Large {
        weight: Param<Tensor<2>>,
    }
    for (name, device) in devices() {
        let large = Large { weight: Param::from_tensor(Tensor::<2>::ones([2048, 2048], &device)) };
        let numbers = rounded(&Random(3).normals(2048 * 2048));
        let mut grads = gradients(&large, &device, DType::F32, |_, _| numbers.clone());
        let mut clipper = GradClipper::new(Clip::norm(1.0));
        clipper.clip(&mut grads, &large).expect("finite");
        let report = clipper.report().wait().expect("clipped");
        assert_close(&[report.total_norm], &[norm(&numbers)], 1e-6, name);
        assert_close(&[norm(&all_numbers(&large, &grads)[0])], &[1.0], 1e-6, name);
    }
}

/// A model on two devices is clipped by the norm over both.
#[test]
fn over_several_devices() {
    #[derive(Module, Debug)]
    struct Two {
        here: Param<Tensor<1>>,
        there: Param<Tensor<1>>,
    }
    let parameter = |device: &Device| Param::from_tensor(Tensor::<1>::ones([4], device));
    let two = Two { here: parameter(&Device::flex()), there: parameter(&crate::common::wgpu()) };
    let mut grads = GradientsParams::new();
    grads.register(two.here.id, Tensor::<1>::from_floats([3.0, 0.0, 0.0, 0.0], &Device::flex()));
    grads.register(two.there.id, Tensor::<1>::from_floats([0.0, 4.0, 0.0, 0.0], &crate::common::wgpu()));
    clip_grad_norm(&mut grads, &two, 1.0).expect("finite");
    assert_close(&all_numbers(&two, &grads).concat(), &[0.6, 0.0, 0.0, 0.0, 0.0, 0.8, 0.0, 0.0], 2e-6, "two devices");
    let of = |id, device: &Device| grads.get::<1>(id).expect("there").device() == *device;
    assert!(of(two.here.id, &Device::flex()) && of(two.there.id, &crate::common::wgpu()));
}

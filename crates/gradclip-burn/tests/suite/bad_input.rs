//! Guards against bad input that is clipped, lost, or answered with a panic.

use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::wgpu::WgpuOptions;
use burn::tensor::{DType, Device, DeviceKind, Tensor};
use gradclip_burn::gradclip::{Clip, Scope, UnitAxis};
use gradclip_burn::{Error, GradClipper, clip_grad_norm, clip_grad_value};

use crate::common::{Net, all_numbers, devices, gradients};

fn ones(net: &Net, device: &Device) -> GradientsParams {
    gradients(net, device, DType::F32, |_, n| vec![1.0; n])
}

#[test]
fn gradients_of_another_module() {
    for (_, device) in devices() {
        let (net, other) = (Net::new(&device), Net::new(&device));
        let mut grads = ones(&net, &device);
        let error = clip_grad_norm(&mut grads, &other, 1.0).expect_err("none is the module's");
        assert!(matches!(error, Error::OtherModule { gradients: 9, parameters: 9 }), "{error}");
        assert!(error.to_string().contains("none of the 9 gradients"), "{error}");
        assert_eq!(all_numbers(&net, &grads).concat(), vec![1.0; all_numbers(&net, &grads).concat().len()]);
    }
}

#[test]
fn a_gradient_of_another_shape() {
    for (_, device) in devices() {
        let net = Net::new(&device);
        let mut grads = ones(&net, &device);
        grads.register(net.embedding_id(), Tensor::<2>::ones([8, 23], &device));
        let error = clip_grad_norm(&mut grads, &net, 1.0).expect_err("the shapes differ").to_string();
        assert!(
            error.contains("embedding.weight") && error.contains("[8, 23]") && error.contains("[23, 8]"),
            "{error}"
        );
        assert!(all_numbers(&net, &grads).concat().iter().all(|x| *x == 1.0), "nothing lost, nothing clipped");
    }
}

#[test]
fn a_module_without_parameters() {
    #[derive(Module, Debug)]
    struct Empty {
        size: usize,
    }
    let error = clip_grad_norm(&mut GradientsParams::new(), &Empty { size: 3 }, 1.0).expect_err("empty");
    assert!(matches!(error, Error::EmptyModule), "{error}");
    let mut clipper = GradClipper::new(Clip::norm(1.0));
    assert!(matches!(clipper.clip(&mut GradientsParams::new(), &Empty { size: 3 }), Err(Error::EmptyModule)));
}

#[test]
fn thresholds_that_are_none() {
    let device = Device::flex();
    let net = Net::new(&device);
    for bad in [-1.0, f64::NAN] {
        assert!(clip_grad_norm(&mut ones(&net, &device), &net, bad).is_err());
        assert!(clip_grad_value(&mut ones(&net, &device), &net, bad).is_err());
    }
}

#[test]
fn a_scope_that_does_not_fit() {
    for (_, device) in devices() {
        let net = Net::new(&device);
        let mut grads = ones(&net, &device);
        let clip = Clip::norm(1.0).scope(Scope::Example);
        let error = GradClipper::new(clip).clip(&mut grads, &net).expect_err("no examples").to_string();
        assert!(error.contains("convolution.weight") && error.contains("examples"), "{error}");
        // A choice of rows holds for all but `Linear`.
        let clip = Clip::norm(1e9).scope(Scope::Unit).unit_axis(UnitAxis::First);
        GradClipper::new(clip).clip(&mut grads, &net).expect("rows and columns");
        assert!(all_numbers(&net, &grads).concat().iter().all(|x| *x == 1.0), "nothing lost, nothing clipped");
    }
}

#[test]
fn integers_and_quantised_numbers() {
    #[derive(Module, Debug)]
    struct One {
        weight: Param<Tensor<1>>,
    }
    let device = Device::flex();
    let one = One { weight: Param::from_tensor(Tensor::<1>::ones([4], &device)) };
    // burn's types keep integers out; its extension interface does not.
    let integers = Tensor::<1, burn::tensor::Int>::from_ints([1, 2, 3, 4], &device).into_dispatch();
    assert!(matches!(integers.kind, DispatchTensorKind::Flex(BackendTensor::Int(_))));
    let quantised = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0], &device)
        .quantize_dynamic(&burn::tensor::quantization::QuantScheme::default());
    let mut grads = GradientsParams::new();
    grads.register(one.weight.id, quantised);
    let error = clip_grad_norm(&mut grads, &one, 1.0).expect_err("quantised").to_string();
    assert!(error.contains("weight") && error.contains("cast"), "{error}");
    assert_eq!(grads.len(), 1, "it is still there");
}

#[test]
fn nothing_to_report() {
    let clipper = GradClipper::new(Clip::norm(1.0));
    assert!(matches!(clipper.report().wait(), Err(Error::NotClipped)));
}

/// burn keeps the handles of devices that it opens to itself.
#[test]
fn a_wgpu_device_that_is_not_registered() {
    let (_, setup) = WgpuOptions::default().device_kind(DeviceKind::Cpu).init_with_setup().expect("lavapipe");
    let device = Device::wgpu_options().setup(setup.clone()).init().expect("a device of its own");
    let net = Net::new(&device);
    let mut grads = ones(&net, &device);
    let error = clip_grad_norm(&mut grads, &net, 1.0).expect_err("not registered").to_string();
    assert!(error.contains("open_wgpu") && error.contains("through_host"), "{error}");
    assert!(all_numbers(&net, &grads).concat().iter().all(|x| *x == 1.0), "nothing lost, nothing clipped");
    // Either way out works.
    GradClipper::new(Clip::norm(1.0)).through_host().clip(&mut grads, &net).expect("by the host");
    let norm = |grads: &GradientsParams| crate::common::norm(&all_numbers(&net, grads).concat());
    assert!((norm(&grads) - 1.0).abs() < 1e-5);
    gradclip_burn::register_wgpu(&device, &setup).expect("it can clip");
    clip_grad_norm(&mut grads, &net, 0.5).expect("by the GPU");
    assert!((norm(&grads) - 0.5).abs() < 1e-5);
    let error = gradclip_burn::register_wgpu(&Device::flex(), &setup).expect_err("no wgpu device").to_string();
    assert!(error.contains("no wgpu device"), "{error}");
}

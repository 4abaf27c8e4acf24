//! Guards against a threshold that follows another run on the GPU than on the host, or that a checkpoint forgets.

use burn::tensor::{DType, Device};
use gradclip_burn::gradclip::{AdaGc, AutoClip, Clip, Scope, ZClip};
use gradclip_burn::{AdaptiveThreshold, GradClipper};

use crate::common::{Net, Random, assert_close, devices, gradients, rounded, wgpu};

/// Norms that wander, with a spike now and then.
fn step(net: &Net, device: &Device, step: u64) -> burn::optim::GradientsParams {
    let mut random = Random(step);
    let scale = (1.0 + random.uniform()) * if step % 9 == 8 { 30.0 } else { 1.0 };
    gradients(net, device, DType::F32, |_, n| rounded(&random.normals(n).iter().map(|x| x * scale).collect::<Vec<_>>()))
}

fn thresholds() -> [(Scope, AdaptiveThreshold); 3] {
    [
        (Scope::Global, ZClip::new().warm_up(5).into()),
        (Scope::Global, AutoClip::new().warm_up(5).into()),
        (Scope::Tensor, AdaGc::new().into()),
    ]
}

fn coefficients(clipper: &mut GradClipper, net: &Net, device: &Device, steps: std::ops::Range<u64>) -> Vec<f64> {
    let each = steps.map(|number| {
        let mut grads = step(net, device, number);
        clipper.clip(&mut grads, net).expect("finite");
        clipper.report().wait().expect("clipped").clip_coef
    });
    each.collect()
}

#[test]
fn the_same_on_every_backend() {
    let clip = Clip::norm(f64::INFINITY);
    for (scope, threshold) in thresholds() {
        let of_device = devices().map(|(_, device)| {
            let mut clipper = GradClipper::adaptive(clip.scope(scope), threshold.clone());
            coefficients(&mut clipper, &Net::new(&device), &device, 0..40)
        });
        assert_close(&of_device[1], &of_device[0], 1e-4, &format!("{threshold:?}"));
        assert!(of_device[0].iter().any(|c| *c < 0.5), "nothing was clipped: {:?}", of_device[0]);
    }
}

#[test]
fn a_saved_threshold_goes_on_to_the_bit() {
    let clip = Clip::norm(f64::INFINITY);
    for (name, device) in devices() {
        for (scope, threshold) in thresholds() {
            let net = Net::new(&device);
            let mut clipper = GradClipper::adaptive(clip.scope(scope), threshold.clone());
            let whole = coefficients(&mut clipper, &net, &device, 0..30);
            let mut clipper = GradClipper::adaptive(clip.scope(scope), threshold);
            let mut parts = coefficients(&mut clipper, &net, &device, 0..17);
            let saved = clipper.threshold().wait().expect("readable").expect("adaptive");
            let mut clipper = GradClipper::adaptive(clip.scope(scope), saved);
            parts.extend(coefficients(&mut clipper, &net, &device, 17..30));
            assert_eq!(parts, whole, "{name} {scope:?}");
        }
    }
}

/// A run that goes from the GPU to the host and back, as when a device is registered late, keeps one threshold.
#[test]
fn a_threshold_moves_with_the_gradients() {
    let (gpu, host) = (wgpu(), Device::flex());
    let net = Net::new(&gpu);
    for (scope, threshold) in thresholds() {
        let clip = Clip::norm(f64::INFINITY).scope(scope);
        let mut clipper = GradClipper::adaptive(clip, threshold.clone());
        let mut there_and_back = coefficients(&mut clipper, &net, &gpu, 0..12);
        there_and_back.extend(coefficients(&mut clipper, &net, &host, 12..20));
        there_and_back.extend(coefficients(&mut clipper, &net, &gpu, 20..30));
        let mut clipper = GradClipper::adaptive(clip, threshold);
        assert_close(&there_and_back, &coefficients(&mut clipper, &net, &host, 0..30), 1e-4, &format!("{scope:?}"));
    }
}

/// Containers without gradients, as of a step that only other models took part in.
#[test]
fn steps_without_gradients_change_no_threshold() {
    let clip = Clip::norm(f64::INFINITY);
    for (name, device) in devices() {
        for (scope, threshold) in thresholds() {
            let net = Net::new(&device);
            let new = || GradClipper::adaptive(clip.scope(scope), threshold.clone());
            let whole = coefficients(&mut new(), &net, &device, 0..20);
            let mut clipper = new();
            let mut parts = Vec::new();
            for steps in [0..10, 10..20] {
                clipper.clip(&mut burn::optim::GradientsParams::new(), &net).expect("nothing to clip");
                assert_eq!(clipper.report().wait().expect("clipped").elements, 0);
                parts.extend(coefficients(&mut clipper, &net, &device, steps));
            }
            assert_eq!(parts, whole, "{name} {scope:?}");
        }
    }
}

/// Layers that begin to train, or stop, change the set of gradients: the global threshold goes on.
#[test]
fn a_threshold_outlives_a_change_of_the_parameters() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let zclip = ZClip::new().warm_up(3);
        let mut clipper = GradClipper::adaptive(Clip::norm(f64::INFINITY), zclip);
        coefficients(&mut clipper, &net, &device, 0..10);
        let mut grads = step(&net, &device, 10);
        drop(grads.remove::<2>(net.embedding_id()));
        clipper.clip(&mut grads, &net).expect("finite");
        let Some(AdaptiveThreshold::ZClip(zclip)) = clipper.threshold().wait().expect("readable") else { panic!() };
        let steps = format!("{zclip:?}");
        assert!(steps.contains("steps: 11"), "{name}: {steps}");
    }
}

//! Guards against a step that is not burn's, that changes a clone of the model, or that does not go on where it was saved.

use burn::module::ParamGroup;
use burn::nn::LinearConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device};
use gradclip_burn::gradclip::{Clip, NonFinite, Optimizer};
use gradclip_burn::{Error, GradClipper, GradOptimizer};

use crate::common::{Net, Random, devices, gradients, weights, wgpu};

/// burn's defaults.
fn adamw() -> Optimizer {
    Optimizer::adamw(1e-3).eps(1e-5).weight_decay(1e-4)
}

fn drawn(model: &Net, device: &Device, random: &mut Random) -> GradientsParams {
    gradients(model, device, DType::F32, |_, count| random.normals(count))
}

fn copied(model: &Net, device: &Device, seed: u64) -> GradientsParams {
    drawn(model, device, &mut Random(seed))
}

/// burn computes 1 - β₂ᵗ in float32, which is off by up to 2^-25 / 0.001 of itself, and its moments likewise. So an update is off by
/// some 3e-5 of the learning rate times its size, which is at most about 3 of them here.
#[test]
fn a_model_is_trained_as_by_burns_adamw() {
    const STEPS: u64 = 30;
    const LR: f64 = 1e-2;
    for (name, device) in devices() {
        for clip in [Clip::norm(f64::INFINITY), Clip::norm(1.0)] {
            let start = Net::new(&device.clone().autodiff());
            let (mut model, mut burns) = (start.clone(), start.clone());
            let before = weights(&start);
            let mut own = GradOptimizer::new(clip, adamw());
            let (mut optimizer, mut clipper) = (AdamWConfig::new().init(), GradClipper::new(clip));
            for step in 0..STEPS {
                model = own.step(LR, model, copied(&start, &device, step)).expect("finite");
                let mut grads = copied(&start, &device, step);
                clipper.clip(&mut grads, &burns).expect("finite");
                burns = optimizer.step(LR, burns, grads);
            }
            let (model, burns) = (weights(&model), weights(&burns));
            let (mut moved, mut worst) = (0.0f64, 0.0f64);
            for ((own, burns), before) in
                model.iter().flatten().zip(burns.iter().flatten()).zip(before.iter().flatten())
            {
                let size = before.abs() + STEPS as f64 * LR * 3.0;
                let bound = STEPS as f64 * (1e-4 * LR + 2f64.powi(-23) * size);
                assert!((own - burns).abs() <= bound, "{name}, {clip}: {own}, burn {burns}");
                (moved, worst) = (moved.max((own - before).abs()), worst.max((own - burns).abs() / bound));
            }
            assert!(moved > 10.0 * LR, "{name}, {clip}: moved by {moved}");
            println!("{name}, {clip}: off by {worst:.2} of the bound at most");
            assert_eq!(weights(&start), before, "{name}: a clone has changed");
        }
    }
}

#[test]
fn host_and_gpu_take_the_same_steps() {
    let device = wgpu();
    let start = Net::new(&device.clone().autodiff());
    let clip = Clip::norm(1.0);
    let make = || GradOptimizer::new(clip, adamw()).with_group(ParamGroup::from_predicate("bias"), Optimizer::sgd(1.0));
    let (mut on_gpu, mut on_host) = (make(), make().through_host());
    let (mut model, mut other) = (start.clone(), start.clone());
    for step in 0..10 {
        model = on_gpu.step(1e-2, model, copied(&start, &device, step)).expect("finite");
        other = on_host.step(1e-2, other, copied(&start, &device, step)).expect("finite");
        let reports = [&on_gpu, &on_host].map(|own| own.report().wait().expect("finite"));
        assert!((reports[0].total_norm / reports[1].total_norm - 1.0).abs() < 1e-6);
    }
    for (own, other) in weights(&model).iter().flatten().zip(weights(&other).iter().flatten()) {
        assert!(
            (own - other).abs() <= 10.0 * (1e-2 * 4e-6 + 8.0 * 2f64.powi(-23) * own.abs().max(1.0)),
            "{own}, {other}"
        );
    }
}

#[test]
fn a_saved_run_gives_the_bits_of_one_that_was_not_stopped() {
    for (name, device) in devices() {
        let start = Net::new(&device.clone().autodiff());
        let make = || GradOptimizer::new(Clip::norm(1.0), adamw());
        let mut through = make();
        let mut model = start.clone();
        let (mut saved, mut half) = (Vec::new(), None);
        for step in 0..6 {
            if step == 3 {
                saved = through.to_safetensors().wait().expect("three steps");
                half = Some(model.clone());
            }
            model = through.step(1e-2, model, copied(&start, &device, step)).expect("finite");
        }
        let mut restored = make().from_safetensors(saved.clone());
        assert_eq!(restored.to_safetensors().wait().expect("it is kept"), saved);
        let mut other = half.expect("saved after three steps");
        for step in 3..6 {
            other = restored.step(1e-2, other, copied(&start, &device, step)).expect("finite");
        }
        assert_eq!(weights(&other), weights(&model), "{name}");

        // Of another module.
        let linear = LinearConfig::new(3, 2).init(&device.clone().autodiff());
        let grads = gradients(&linear, &device, DType::F32, |_, count| vec![1.0; count]);
        let failed = make().from_safetensors(saved).step(1e-2, linear.clone(), grads).expect_err("another module");
        assert!(failed.to_string().contains("the optimizer's state does not fit"), "{failed}");
        assert_eq!(weights(&failed.module), weights(&linear));
    }
}

#[test]
fn what_fails_or_is_skipped_leaves_the_model() {
    for (name, device) in devices() {
        let start = Net::new(&device.clone().autodiff());
        let before = weights(&start);
        let bad = || gradients(&start, &device, DType::F32, |i, n| vec![if i == 1 { f64::NAN } else { 1.0 }; n]);
        let mut own = GradOptimizer::new(Clip::norm(1.0).non_finite(NonFinite::Skip), adamw());
        assert!(matches!(own.report().wait(), Err(Error::NotClipped)));
        assert!(matches!(own.to_safetensors().wait(), Err(Error::NotClipped)));
        let model = own.step(1.0, start.clone(), bad()).expect("skipped");
        assert_eq!(weights(&model), before, "{name}: skipped");
        assert!(own.report().wait().expect("skipped").skipped.is_some());

        // By default on the host an error at once, on a GPU one of the report.
        let mut own = GradOptimizer::new(Clip::norm(1.0), adamw());
        match own.step(1.0, start.clone(), bad()) {
            Ok(model) => {
                assert_eq!(weights(&model), before, "{name}");
                own.report().wait().expect_err("not finite");
            }
            Err(failed) => assert_eq!(weights(&failed.module), before, "{name}: {failed}"),
        }
        let model = own.step(1e-3, start.clone(), copied(&start, &device, 1)).expect("finite");

        let mut fewer = copied(&start, &device, 2);
        fewer.remove::<2>(start.embedding_id());
        let failed = own.step(1e-3, model.clone(), fewer).expect_err("one has no gradient");
        assert!(matches!(failed.error, Error::OtherParameters), "{name}: {failed}");
        assert_eq!(weights(&failed.module), weights(&model), "{name}");
        let other = own.step(-1.0, model.clone(), copied(&start, &device, 2)).expect_err("a negative rate");
        assert!(other.to_string().contains("lr is -1"), "{name}: {other}");
        own.step(1e-3, model, copied(&start, &device, 3)).expect("it goes on");
    }
}

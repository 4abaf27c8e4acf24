//! Guards against a state on the device that is not given back or restored as it was, that a skipped step or another
//! place of the tensors changes, or that is not of the plan's parameters.
#![cfg(feature = "gpu")]

use std::sync::Arc;

use crate::common::gpu::{Held, encoder, step, stepper, stepper_with, upload, with_parameter_each};
use crate::common::numbers::Random;
use crate::common::optimizers::contents;
use crate::common::{Data, assert_norm, assert_same_bits, assert_says};
use crate::optimizer_properties::joined;
use gradclip::gpu::{DeviceThreshold, GpuClipper, GpuPlan, GpuTensor, PlanOptions};
use gradclip::processes::thread_group;
use gradclip::{
    Clip, Clipper, Dtype, Error, Halves, NonFinite, Optimizer, OptimizerState, Skipped, Tensor, TensorMut, ZClip,
};

fn drawn(random: &mut Random, dtype: Dtype, shape: &[usize]) -> Data {
    Data::rounded(dtype, random.normals(shape.iter().product(), 1.0)).shaped(shape)
}

type Contents = (Vec<Optimizer>, u64, Vec<Option<Vec<u8>>>);

/// A plan, its gradients and its parameters.
struct Run {
    gpu: GpuClipper,
    plan: GpuPlan,
    gradients: Held,
    parameters: Held,
}

impl Run {
    fn new(gpu: &GpuClipper, clip: &Clip, optimizer: Optimizer, gradients: Vec<Data>, parameters: Vec<Data>) -> Self {
        let (gradients, parameters) = (Held::new(gpu, gradients, 2), Held::new(gpu, parameters, 0));
        let tensors = with_parameter_each(gradients.views(), parameters.views());
        let options = PlanOptions::default().optimizer(optimizer);
        let plan = gpu.plan_with(&[(*clip, &tensors)], options).expect("valid");
        Self { gpu: gpu.clone(), plan, gradients, parameters }
    }

    fn step(&mut self, gradients: Vec<Data>) {
        self.gradients.write(gradients);
        step(&self.gpu, &self.plan);
    }

    fn state(&self) -> OptimizerState<'static> {
        self.plan.optimizer_state().wait().expect("the device works")
    }

    /// What the state holds, and the parameters.
    fn everything(&self) -> (Contents, Vec<Data>) {
        (contents(&self.state(), self.parameters.data.len()), self.parameters.read())
    }
}

const SHAPES: [&[usize]; 5] = [&[40, 7], &[33], &[], &[0], &[5, 3]];

/// Parameters of every dtype, and gradients of other dtypes for them.
fn model(random: &mut Random, halves: Halves) -> (Vec<Data>, Vec<Data>) {
    let second = if halves == Halves::Remainder { Dtype::BF16 } else { Dtype::F16 };
    let dtypes = [(Dtype::BF16, Dtype::F32), (second, Dtype::BF16), (Dtype::F32, Dtype::BF16)];
    let mut all = (Vec::new(), Vec::new());
    for (i, shape) in SHAPES.iter().enumerate() {
        let (parameter, gradient) = dtypes[i % 3];
        let name = format!("layer.{i}");
        all.0.push(drawn(random, parameter, shape).named(&name));
        all.1.push(drawn(random, gradient, shape).named(&name));
    }
    all
}

/// Other gradients of the same kind.
fn again(random: &mut Random, gradients: &[Data]) -> Vec<Data> {
    let new = |of: &Data| Data { bytes: drawn(random, of.dtype, &of.dims()).bytes, ..of.clone() };
    gradients.iter().map(new).collect()
}

fn optimizers() -> Vec<Optimizer> {
    let (sgd, rmsprop, adam) = (Optimizer::sgd(0.1), Optimizer::rmsprop(1e-2), Optimizer::adamw(1e-2));
    let mut all = vec![
        sgd,
        sgd.momentum(0.9).nesterov(true),
        Optimizer::adagrad(0.1).initial_accumulator_value(0.5).lr_decay(0.1),
        rmsprop.momentum(0.9).centered(true),
        adam.amsgrad(true).maximize(true),
    ];
    for halves in [Halves::Remainder, Halves::Master] {
        all.extend([sgd.halves(halves), rmsprop.momentum(0.5).halves(halves), adam.halves(halves)]);
    }
    all
}

#[test]
fn a_restored_run_gives_the_bits_of_one_that_was_not_stopped() {
    let clip = Clip::norm(1.0);
    for optimizer in optimizers() {
        let random = &mut Random(5);
        let (parameters, gradients) = model(random, optimizer.halves);
        let mut run = Run::new(stepper(), &clip, optimizer, gradients.clone(), parameters.clone());
        // Before the first step too, with the parameters as they are.
        let of_the_host = {
            let views: Vec<_> = parameters.iter().map(Data::view).collect();
            contents(&optimizer.state(&views).expect("valid"), views.len())
        };
        assert!(run.everything().0 == of_the_host, "{optimizer}: a new state");
        let steps: Vec<_> = (0..6).map(|_| again(random, &gradients)).collect();
        for gradients in &steps[..3] {
            run.step(gradients.clone());
        }
        let ((kept, parameters), saved) = (run.everything(), run.state().to_safetensors().expect("names differ"));
        for gradients in &steps[3..] {
            run.step(gradients.clone());
        }
        let through = run.everything();

        let mut other = Run::new(stepper(), &clip, optimizer.lr(7.0), gradients, parameters);
        let mut state = other.state();
        state.restore_safetensors(&saved).expect("it fits");
        other.plan.set_optimizer_state(&state).expect("it fits");
        assert!(other.everything().0 == kept, "{optimizer}: restored");
        assert_eq!(other.plan.optimizers(), [optimizer]);
        for gradients in &steps[3..] {
            other.step(gradients.clone());
        }
        let restored = other.everything();
        assert_same_bits(&restored.1, &through.1, &format!("{optimizer}: restored"));
        assert!(restored.0 == through.0, "{optimizer}: restored and gone on");
        assert_eq!(other.state().steps(), 6);

        // Begun anew, with what the state holds left over.
        other.plan.restart_optimizer().expect("the device works");
        let mut fresh = Run::new(stepper(), &clip, optimizer, steps[0].clone(), through.1);
        for run in [&mut other, &mut fresh] {
            run.step(steps[0].clone());
        }
        assert!(other.everything() == fresh.everything(), "{optimizer}: begun anew");
    }
}

/// A state may begin on the device, go on on the CPU, and come back.
#[test]
fn a_state_moves_between_device_and_host() {
    let (clip, optimizer, random) = (Clip::norm(1.0), Optimizer::adamw(1e-2), &mut Random(9));
    let parameters = vec![drawn(random, Dtype::F32, &[50])];
    let gradients = vec![drawn(random, Dtype::F32, &[50])];
    let mut run = Run::new(stepper(), &clip, optimizer, gradients.clone(), parameters);
    run.step(gradients.clone());
    let (mut state, mut own) = (run.state(), run.parameters.read());
    let before = own[0].clone();
    Clipper::cpu().step(&clip, &mut state, &mut [own[0].view_mut()], &[gradients[0].view()]).expect("a valid step");
    run.plan.set_optimizer_state(&state).expect("it fits");
    assert_eq!(contents(&run.state(), 1), contents(&state, 1));
    run.step(gradients);
    assert_eq!(run.state().steps(), 3);
    assert_ne!(run.parameters.read(), [before]);
}

/// A device that is destroyed under a step: no half of it is ever read, and the run goes on elsewhere from what was saved.
#[test]
fn a_run_goes_on_after_its_device_is_lost() {
    let (clip, optimizer, random) = (Clip::norm(1.0), Optimizer::adamw(1e-2).halves(Halves::Remainder), &mut Random(4));
    let (parameters, gradients) = model(random, optimizer.halves);
    let open = || GpuClipper::open().wait().expect("there is a device");
    let mut run = Run::new(&open(), &clip, optimizer, gradients.clone(), parameters);
    run.step(gradients.clone());
    let (kept, parameters) = (run.state(), run.parameters.read());
    run.step(gradients.clone());
    let wanted = run.everything();
    run.step(gradients.clone());
    run.gpu.device().destroy();
    let lost = |result: Result<(), Error>, what: &str| {
        assert!(matches!(result, Err(Error::DeviceLost(_))), "{what}: {result:?}");
    };
    lost(run.plan.optimizer_state().wait().map(drop), "the state");
    lost(run.plan.report().wait().map(drop), "the report");
    lost(run.plan.set_optimizer_state(&kept), "setting the state");
    lost(run.plan.restart_optimizer(), "beginning anew");
    lost(run.plan.set_optimizers(&[optimizer.lr(0.5)]), "the learning rate");

    let mut run = Run::new(&open(), &clip, optimizer, gradients.clone(), parameters);
    run.plan.set_optimizer_state(&kept).expect("it fits");
    run.step(gradients);
    assert!(run.everything() == wanted, "it goes on otherwise");
}

#[test]
fn a_skipped_step_changes_nothing() {
    let (optimizer, random) = (Optimizer::adamw(1e-2).halves(Halves::Remainder), &mut Random(1));
    let (parameters, gradients) = model(random, optimizer.halves);
    for (clip, expected) in [
        (Clip::norm(1.0).non_finite(NonFinite::Skip), Some(Skipped::NonFinite)),
        (Clip::value(1.0).non_finite(NonFinite::Skip), Some(Skipped::NonFinite)),
        (Clip::norm(1.0).skip_above(100.0), Some(Skipped::Above)),
        (Clip::norm(1.0), None),
    ] {
        let mut run = Run::new(stepper(), &clip, optimizer, gradients.clone(), parameters.clone());
        let mut bad = gradients.clone();
        bad[1].set(7, if expected == Some(Skipped::Above) { 1e4 } else { f64::NAN });
        // Before the first step, and after one.
        for taken in 0..2 {
            let before = run.everything();
            run.step(bad.clone());
            let report = run.plan.report().wait();
            match expected {
                Some(reason) => assert_eq!(report.expect("skipped").skipped, Some(reason)),
                None => assert!(matches!(report, Err(Error::NonFinite(_)))),
            }
            assert!(run.everything() == before, "{clip}: {taken} steps were taken");
            run.step(gradients.clone());
            assert_eq!(run.state().steps(), taken + 1, "{clip}");
        }
    }
}

/// Where tensors lie, in which windows and blocks their elements are bound, is not to be seen in any bit.
#[test]
fn places_and_limits_change_no_bit() {
    let clip = Clip::norm(f64::INFINITY);
    let small = stepper_with(wgpu::Limits { max_storage_buffer_binding_size: 1 << 16, ..wgpu::Limits::default() });
    for optimizer in [Optimizer::adamw(1e-2).amsgrad(true), Optimizer::sgd(0.1)] {
        for halves in [Halves::Rounded, Halves::Remainder, Halves::Master] {
            let (optimizer, random) = (optimizer.halves(halves), &mut Random(2));
            let mut all = Vec::new();
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::BF16] {
                all.push((drawn(random, dtype, &[30_001]), drawn(random, Dtype::BF16, &[30_001])));
            }
            let (parameters, gradients): (Vec<_>, Vec<_>) = all.into_iter().unzip();
            let mut ends = Vec::new();
            for gpu in [stepper(), &small] {
                let mut run = Run::new(gpu, &clip, optimizer, gradients.clone(), parameters.clone());
                run.step(gradients.clone());
                // Elsewhere, but in the same halves of words.
                let moved = Held::new(gpu, run.gradients.data.clone(), 1);
                let shift = if halves == Halves::Remainder { 4 } else { 3 };
                run.parameters = Held::new(gpu, run.parameters.read(), shift);
                run.gradients = moved;
                let tensors = with_parameter_each(run.gradients.views(), run.parameters.views());
                run.plan.update(&[&tensors]).expect("the same shapes");
                run.step(gradients.clone());
                ends.push(run.everything());
            }
            assert_same_bits(&ends[1].1, &ends[0].1, &format!("{optimizer}"));
            assert!(ends[1].0 == ends[0].0, "{optimizer}");
        }
    }
}

/// A thousand steps of AdamW at 1e-3 on ones, which bfloat16 alone would lose.
#[test]
fn halves_on_the_device_follow_float32_to_the_bit() {
    let random = &mut Random(3);
    let steps: Vec<_> =
        (0..1000).map(|_| Data::rounded(Dtype::BF16, (0..10).map(|_| 1.0 + 0.5 * random.normal()))).collect();
    let trained = |dtype, halves| {
        let (ones, optimizer) = (Data::rounded(dtype, [1.0; 10]), Optimizer::adamw(1e-3).halves(halves));
        let mut run = Run::new(stepper(), &Clip::norm(1.0), optimizer, vec![steps[0].clone()], vec![ones]);
        steps.iter().for_each(|gradient| run.step(vec![gradient.clone()]));
        (run.parameters.read().swap_remove(0), run.state())
    };
    let (single, _) = trained(Dtype::F32, Halves::Rounded);
    assert!(single.numbers().all(|x| x.abs() < 0.2), "float32 goes from 1 to about 0: {single:?}");
    let (half, state) = trained(Dtype::BF16, Halves::Remainder);
    let exact = joined(&half, state.bytes(0, "remainder").expect("it is kept"));
    assert_same_bits(&[exact], std::slice::from_ref(&single), "with a remainder");
    for dtype in [Dtype::BF16, Dtype::F16] {
        let (half, state) = trained(dtype, Halves::Master);
        assert_eq!(state.bytes(0, "master"), Some(&single.bytes[..]), "{dtype}");
        assert_same_bits(&[half], &[Data::rounded(dtype, single.numbers())], "the rounded copy");
    }
    let (half, _) = trained(Dtype::BF16, Halves::Rounded);
    assert!(half.numbers().all(|x| x == 1.0), "as in PyTorch: {half:?}");
}

/// Each rank steps its own shard, by one norm; all skip or none.
#[test]
fn ranks_step_by_one_norm() {
    let (clip, optimizer, random) =
        (Clip::norm(1.0).non_finite(NonFinite::Skip), Optimizer::adamw(1e-2), &mut Random(8));
    let parameters: Vec<_> = (0..2).map(|_| drawn(random, Dtype::F32, &[60])).collect();
    let mut steps: Vec<_> = (0..3).map(|_| again(random, &parameters)).collect();
    steps[1][1].set(3, f64::NAN);
    let groups = thread_group(2, Some(std::time::Duration::from_secs(60)));
    let of_rank = |(rank, group): (usize, Arc<dyn gradclip::processes::ProcessGroup>)| {
        let gpu = stepper();
        let mut run = Run::new(gpu, &clip, optimizer, vec![steps[0][rank].clone()], vec![parameters[rank].clone()]);
        let mut norms = Vec::new();
        for gradients in &steps {
            run.gradients.write(vec![gradients[rank].clone()]);
            let mut commands = encoder(gpu);
            run.plan.encode_measure(&mut commands).expect("the device works");
            gpu.queue().submit([commands.finish()]);
            run.plan.merge_across(&*group).wait().expect("both take part");
            let mut commands = encoder(gpu);
            run.plan.encode_scale(&mut commands).expect("the device works");
            gpu.queue().submit([commands.finish()]);
            let report = run.plan.report().wait().expect("skipped or not");
            norms.push((report.total_norm, report.skipped));
        }
        (norms, run.parameters.read().swap_remove(0), run.state().steps())
    };
    let ends: Vec<_> = std::thread::scope(|scope| {
        let ranks = groups.into_iter().enumerate().map(|(rank, group)| scope.spawn(move || of_rank((rank, group))));
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
    });
    let mut own = parameters.clone();
    let mut state = {
        let views: Vec<_> = own.iter().map(Data::view).collect();
        optimizer.state(&views).expect("valid")
    };
    for (i, gradients) in steps.iter().enumerate() {
        let views: Vec<_> = gradients.iter().map(Data::view).collect();
        let mut parameters: Vec<TensorMut<'_>> = own.iter_mut().map(Data::view_mut).collect();
        let report = Clipper::cpu().step(&clip, &mut state, &mut parameters, &views).expect("skipped or not");
        for (norms, ..) in &ends {
            assert_eq!(norms[i].1, report.skipped);
            if report.skipped.is_none() {
                assert_norm(norms[i].0, report.total_norm, 1e-6, "the norm of all");
            }
        }
    }
    for ((_, got, steps), want) in ends.iter().zip(&own) {
        assert_eq!(*steps, state.steps());
        let off = got.numbers().zip(want.numbers()).map(|(got, want)| (got - want).abs());
        // Two steps of at most the learning rate, off by 2e-6 of them, and a few roundings.
        assert!(off.fold(0.0, f64::max) <= 2.0 * 1e-2 * 2e-6 + 8.0 * 2f64.powi(-23) * 4.0, "{got:?}, {want:?}");
    }
}

/// The step takes the coefficient that the threshold sets, as a clip does.
#[test]
fn an_adaptive_threshold_clips_what_is_stepped() {
    let (gpu, random) = (stepper(), &mut Random(4));
    let shape = drawn(random, Dtype::F32, &[200]);
    let mut gradients = Held::new(gpu, vec![shape.clone()], 1);
    let parameters = Held::new(gpu, vec![shape.clone()], 0);
    let tensors = with_parameter_each(gradients.views(), parameters.views());
    let zclip = || PlanOptions::default().threshold(DeviceThreshold::ZClip(ZClip::new().warm_up(2)));
    let group = [(Clip::norm(f64::INFINITY), &tensors[..])];
    let stepped = gpu.plan_with(&group, zclip().optimizer(Optimizer::sgd(1.0))).expect("valid");
    let measured = gpu.plan_with(&group, zclip().measure_only()).expect("valid");
    let mut clipped = 0;
    for size in [1.0, 2.0, 1.5, 900.0, 1.0] {
        gradients.write(vec![Data::rounded(Dtype::F32, shape.numbers().map(|x| size * x)).shaped(&[200])]);
        let before = parameters.read().swap_remove(0);
        step(gpu, &measured);
        step(gpu, &stepped);
        let reports = [&measured, &stepped].map(|plan| plan.report().wait().expect("finite"));
        assert_eq!(reports[0], reports[1]);
        clipped += usize::from(reports[0].clipped);
        let after = parameters.read().swap_remove(0);
        for ((before, after), g) in before.numbers().zip(after.numbers()).zip(gradients.data[0].numbers()) {
            let want = before - g * reports[0].clip_coef;
            assert!((after - want).abs() <= 2f64.powi(-21) * (want.abs() + before.abs()) + 1e-30, "{after}, {want}");
        }
    }
    assert!((1..4).contains(&clipped), "{clipped} of 5 were clipped");
}

/// Thousands of tensors of one dtype in one buffer take one dispatch, and each its own step.
#[test]
fn two_thousand_tensors_are_stepped_at_once() {
    let random = &mut Random(6);
    let parameters: Vec<_> = (0..2000).map(|i| drawn(random, Dtype::F32, &[1 + i % 97])).collect();
    let gradients = again(random, &parameters);
    let (clip, optimizer) = (Clip::norm(1.0).scope(gradclip::Scope::Tensor), Optimizer::sgd(0.5));
    let mut run = Run::new(stepper(), &clip, optimizer, gradients.clone(), parameters.clone());
    run.step(gradients.clone());
    for ((before, after), g) in parameters.iter().zip(run.parameters.read()).zip(&gradients) {
        let norm = g.numbers().map(|x| x * x).sum::<f64>().sqrt();
        let coefficient = (1.0 / (norm + 1e-6)).min(1.0);
        for ((before, after), g) in before.numbers().zip(after.numbers()).zip(g.numbers()) {
            let want = before - 0.5 * g * coefficient;
            assert!((after - want).abs() <= 2f64.powi(-22) * (before.abs() + g.abs()), "{after}, {want}");
        }
    }
}

fn message(result: Result<impl Sized, Error>) -> String {
    result.err().expect("it must not be accepted").to_string()
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let gpu = stepper();
    let buffer = upload(gpu, &[0; 64]);
    let f32 = |range: std::ops::Range<u64>| GpuTensor::f32(&buffer, range).expect("it fits");
    let (gradient, parameter) = (f32(0..4).named("w"), f32(8..12));
    let sgd = Optimizer::sgd(0.1);
    let plan = |tensors: &[GpuTensor], options: PlanOptions| gpu.plan_with(&[(Clip::norm(1.0), tensors)], options);
    let with = |optimizer| PlanOptions::default().optimizer(optimizer);
    let refused = |tensor: GpuTensor, optimizer| message(plan(&[tensor], with(optimizer)));

    assert_eq!(
        refused(gradient.clone(), sgd),
        "tensor \"w\": the clip or the optimizer needs its parameter; give it with parameter(..)"
    );
    let other = gradient.clone().parameter(f32(8..13));
    assert_eq!(refused(other, sgd), "tensor \"w\": its shape is [4], but that of its parameter is [5]");
    let other = gradient.clone().parameter(parameter.clone().named("b"));
    assert_eq!(refused(other, sgd), "tensor \"w\": it was given the parameter of \"b\"");
    let over = gradient.clone().parameter(f32(3..7));
    assert!(refused(over, sgd).contains("tensor \"w\": overlaps tensor \"w\" in the same buffer"));
    let twice = [gradient.clone().parameter(parameter.clone()), f32(4..8).named("v").parameter(f32(11..15))];
    assert!(message(plan(&twice, with(sgd))).contains("overlaps"));
    let half = GpuTensor::f16(&buffer, 16..20).expect("it fits");
    let remains = refused(gradient.clone().parameter(half), sgd.halves(Halves::Remainder));
    assert_eq!(remains, "tensor \"w\": float16 and 16 bits are no float32; keep a master copy (Halves::Master)");
    assert_says(&GpuTensor::new(&buffer, Dtype::F64, ..).expect_err("no float64 in WGSL"), &["float64", "CPU"]);

    let own = [gradient.clone().parameter(parameter)];
    assert_eq!(message(plan(&own, with(sgd.lr(-1.0)))), "lr is -1; it must be a finite number, 0 or more");
    for options in [with(sgd).measure_only(), with(sgd).norms(&f32(0..1)), with(sgd).sums(&[f32(0..1)])] {
        assert!(message(plan(&own, options)).contains("choose one"));
    }
    let two = PlanOptions::default().optimizers(&[(sgd, 1), (sgd, 1)]);
    assert_eq!(message(plan(&own, two)), "optimizers are set for 2 tensors, and there are 1");

    let mut fitting = plan(&own, with(sgd.momentum(0.9))).expect("valid");
    assert!(message(fitting.set_optimizers(&[])).contains("0 given, 1 needed"));
    assert!(message(fitting.set_optimizers(&[sgd.lr(f64::NAN)])).contains("lr is NaN"));
    assert!(message(fitting.set_optimizers(&[sgd])).contains("group 0 is of SGD, the optimizer is SGD, momentum"));
    assert_eq!(fitting.optimizers(), [sgd.momentum(0.9)]);
    let (own, longer) = ([0.0f32; 4], [0.0f32; 5]);
    for (state, expected) in [
        (Optimizer::adam(0.1).state(&[Tensor::new(&own)]), "group 0 is of Adam"),
        (sgd.state(&[Tensor::new(&own)]), "group 0 is of SGD, the optimizer is SGD, momentum"),
        (sgd.momentum(0.9).state(&[Tensor::new(&longer)]), "its shape is [4], but the state is of shape [5]"),
        (sgd.momentum(0.9).state(&[Tensor::new(&own).named("v")]), "the state is of \"v\""),
        (sgd.momentum(0.9).state(&[Tensor::new(&own), Tensor::new(&own)]), "[2] parameters, and there are [1]"),
        (OptimizerState::elsewhere(&[(sgd.momentum(0.9), &[Tensor::new(&own)])]), "its tensors are elsewhere"),
    ] {
        let error = message(fitting.set_optimizer_state(&state.expect("valid")));
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
    let without = gpu.plan(&Clip::norm(1.0), &[gradient]).expect("valid");
    assert!(without.optimizers().is_empty());
    assert!(message(without.optimizer_state().wait()).contains("the plan has no optimizer"));
    assert!(message(without.restart_optimizer()).contains("the plan has no optimizer"));
}

#[test]
fn devices_and_buffers_that_do_not_suffice_are_named() {
    let limits = wgpu::Limits::downlevel_defaults();
    let few = crate::common::gpu::clipper(limits);
    let tensor = |gpu: &GpuClipper, dtype| {
        let descriptor = |usage| wgpu::BufferDescriptor { label: None, size: 64, usage, mapped_at_creation: false };
        let buffer = gpu.device().create_buffer(&descriptor(wgpu::BufferUsages::STORAGE));
        let view = |range| GpuTensor::new(&buffer, dtype, range).expect("it fits").named("w");
        view(0..3).parameter(view(5..8))
    };
    let master = PlanOptions::default().optimizer(Optimizer::sgd(0.1).halves(Halves::Master));
    let error = few.plan_with(&[(Clip::norm(1.0), &[tensor(&few, Dtype::F32)])], master.clone());
    let error = error.expect_err("four storage buffers");
    assert!(matches!(error, Error::Limit(_)));
    assert_says(&error, &["max_storage_buffers_per_shader_stage is 4", "an optimizer needs at least 5"]);

    let gpu = stepper();
    let plan = gpu.plan_with(&[(Clip::norm(1.0), &[tensor(gpu, Dtype::F16)])], master).expect("valid");
    let error = plan.optimizer_state().wait().expect_err("it cannot be read");
    assert_says(&error, &["tensor \"w\"", "COPY_SRC", "take a step first"]);
    step(gpu, &plan);
    assert_eq!(plan.optimizer_state().wait().expect("now it can").steps(), 1);
}

/// Parameters with remainders share words with them, and so keep their place in them.
#[test]
fn remainders_stay_in_their_halves_of_words() {
    let gpu = stepper();
    let (gradients, parameters) = (upload(gpu, &[0; 64]), upload(gpu, &[0; 64]));
    let at = |first: u64| {
        let parameter = GpuTensor::bf16(&parameters, first..first + 5).expect("it fits");
        [GpuTensor::bf16(&gradients, 0..5).expect("it fits").parameter(parameter)]
    };
    let plan = |halves| {
        let options = PlanOptions::default().optimizer(Optimizer::sgd(0.1).halves(halves));
        gpu.plan_with(&[(Clip::norm(1.0), &at(2))], options).expect("valid")
    };
    assert!(message(plan(Halves::Remainder).update(&[&at(5)])).contains("moves by a multiple of 4 bytes only"));
    plan(Halves::Remainder).update(&[&at(6)]).expect("the same half");
    plan(Halves::Master).update(&[&at(5)]).expect("any place");
}

//! Guards against plans with new buffers that still touch the old ones, forget their state, or end half updated by an
//! error.
#![cfg(feature = "gpu")]

use std::slice::from_ref;

use crate::common::gpu::{Layout, download, encoder, gpu, step, upload, with_parameters, write};
use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::gpu::{DeviceThreshold, GpuTensor, PlanOptions};
use gradclip::{AdaGc, Clip, Dtype, Error, Mode, NonFinite, NormType, Scope, ZClip, wgpu};

fn set(seed: u64, scale: f64) -> Vec<Data> {
    let mut random = Random(seed);
    [(Dtype::F16, 1001), (Dtype::F32, 70_003), (Dtype::BF16, 33), (Dtype::F32, 0), (Dtype::F16, 40_000)]
        .map(|(dtype, n)| Data::rounded(dtype, random.normals(n, scale)))
        .to_vec()
}

/// The tensors somewhere in buffers, as many as asked for, by turns.
struct Placed {
    parts: Vec<(Vec<Data>, Layout, wgpu::Buffer)>,
}

impl Placed {
    fn new(set: &[Data], buffers: usize, gap: usize) -> Self {
        let part = |b| {
            let part: Vec<_> = set.iter().skip(b).step_by(buffers).cloned().collect();
            let layout = Layout::with_gaps(&part, |i| (i + b) * gap % 9);
            let buffer = upload(gpu(), &layout.bytes(&part));
            (part, layout, buffer)
        };
        Self { parts: (0..buffers).map(part).collect() }
    }

    fn tensors(&self) -> Vec<GpuTensor> {
        let views: Vec<_> = self.parts.iter().map(|(part, layout, buffer)| layout.tensors(buffer, part)).collect();
        let count = views.iter().map(Vec::len).sum();
        (0..count).map(|i| views[i % views.len()][i / views.len()].clone()).collect()
    }

    /// Puts the numbers back.
    fn restore(&self) {
        self.parts.iter().for_each(|(part, layout, buffer)| write(gpu(), buffer, 0, &layout.bytes(part)));
    }

    fn now(&self) -> Vec<Data> {
        let parts = self.parts.iter().map(|(part, layout, buffer)| layout.taken_from(&download(gpu(), buffer), part));
        let parts: Vec<_> = parts.collect();
        let count = parts.iter().map(Vec::len).sum();
        (0..count).map(|i| parts[i % parts.len()][i / parts.len()].clone()).collect()
    }
}

#[test]
fn other_buffers_and_offsets() {
    let (first, second) = (set(1, 1.0), set(2, 3.0));
    for scope in [Scope::Global, Scope::Tensor] {
        for (buffers, gap) in [(1, 0), (1, 1), (1, 4), (3, 1), (5, 2)] {
            let (old, new) = (Placed::new(&first, 1, 0), Placed::new(&second, buffers, gap));
            let norm = exact_norm(NormType::L2, numbers_of(&second));
            let clip = Clip::norm(norm / 4.0).eps(0.0).scope(scope);
            let mut plan = gpu().plan(&clip, &old.tensors()).expect("valid");
            let coefficients = plan.coefficients().clone();
            plan.update(&[&new.tensors()]).expect("the same shapes");
            assert_eq!(*plan.coefficients(), coefficients, "a caller's kernel has bound it");
            step(gpu(), &plan);
            let report = plan.report().wait().expect("finite");
            assert_norm(report.total_norm, norm, 1e-6, "updated");
            assert_same_bits(&old.now(), &first, "the old buffers");
            let after = new.now();
            if scope == Scope::Global {
                assert_scaled(&second, &after, 0.25, 1e-6, "updated");
            } else {
                for ((segment, before), after) in report.segments.iter().zip(&second).zip(&after) {
                    assert_norm(segment.norm, exact_norm(NormType::L2, before.numbers()), 1e-6, "updated");
                    assert_scaled(from_ref(before), from_ref(after), segment.clip_coef, 1e-6, "updated");
                }
            }
            // And back.
            plan.update(&[&old.tensors()]).expect("the same shapes");
            step(gpu(), &plan);
            assert_norm(
                plan.report().wait().expect("finite").total_norm,
                exact_norm(NormType::L2, numbers_of(&first)),
                1e-6,
                "back",
            );
            assert_same_bits(&new.now(), &after, "the new buffers");
        }
    }
}

#[test]
fn steps_encoded_before_do_what_they_were_encoded_for() {
    let (first, second) = (set(3, 1.0), set(4, 1.0));
    let (old, new) = (Placed::new(&first, 1, 0), Placed::new(&second, 2, 1));
    let mut plan = gpu().plan(&Clip::norm(f64::MAX).grad_scale(2.0), &old.tensors());
    let plan = plan.as_mut().expect("valid");
    let mut pending = encoder(gpu());
    plan.encode(&mut pending).expect("the device works");
    plan.update(&[&new.tensors()]).expect("the same shapes");
    gpu().queue().submit([pending.finish()]);
    assert_scaled(&first, &old.now(), 0.5, 0.0, "encoded before");
    assert_same_bits(&new.now(), &second, "not encoded yet");
}

#[test]
fn a_threshold_goes_on() {
    let clip = Clip::norm(f64::INFINITY);
    let zclip = || DeviceThreshold::ZClip(ZClip::new().warm_up(3));
    let places: Vec<_> = (0..6).map(|i| Placed::new(&set(10 + i, 1.0 + i as f64), 1 + i as usize % 3, 1)).collect();
    let mut moving =
        gpu().plan_with(&[(clip, &places[0].tensors())], PlanOptions::default().threshold(zclip())).expect("valid");
    for place in &places {
        moving.update(&[&place.tensors()]).expect("the same shapes");
        step(gpu(), &moving);
    }
    // The same steps in one place.
    let mut staying = zclip();
    for i in 0..6 {
        let place = Placed::new(&set(10 + i, 1.0 + i as f64), 1, 1);
        let plan =
            gpu().plan_with(&[(clip, &place.tensors())], PlanOptions::default().threshold(staying)).expect("valid");
        step(gpu(), &plan);
        staying = plan.threshold().wait().expect("the device works").expect("it has one");
    }
    let moved = moving.threshold().wait().expect("the device works").expect("it has one");
    let (DeviceThreshold::ZClip(a), DeviceThreshold::ZClip(b)) = (&moved, &staying) else { panic!("another kind") };
    // What a spike would be clipped to.
    let threshold = |z: &ZClip| z.clone().max_norm(1e9);
    let (a, b) = (threshold(a), threshold(b));
    assert!(a.is_finite() && (a / b - 1.0).abs() < 1e-8, "{a} {b}");
}

/// Thresholds that clip something, nothing, everything; the infinite one from the start, and again.
const THRESHOLDS: [f64; 6] = [f64::INFINITY, 0.3, 1e9, 0.0, f64::INFINITY, 0.01];

/// Checks that a plan gives the bits of one that was made for this clip.
fn assert_as_new(plan: &mut gradclip::gpu::GpuPlan, place: &Placed, clip: &Clip, options: PlanOptions, of: &[Data]) {
    let fresh = Placed::new(of, 1, 1);
    let new = gpu().plan_with(&[(*clip, &with_parameters(gpu(), fresh.tensors(), of))], options).expect("valid");
    place.restore();
    step(gpu(), plan);
    step(gpu(), &new);
    let reports = [plan.report(), new.report()].map(|report| format!("{:?}", report.wait()));
    assert_eq!(reports[0], reports[1], "{clip}");
    assert_same_bits(&place.now(), &fresh.now(), &clip.to_string());
}

#[test]
fn another_threshold_and_scale_are_as_if_planned_with_them() {
    let mut numbers = set(6, 1.0);
    for data in &mut numbers {
        *data = data.clone().with_parameter(data.clone());
    }
    let place = Placed::new(&numbers, 1, 1);
    for clip in [
        Clip::norm(1.0),
        Clip::norm(f64::INFINITY).norm_type(NormType::Inf).non_finite(NonFinite::Skip).scope(Scope::Tensor),
        Clip::rms(1.0).scope(Scope::Tensor),
        Clip::average_norm(1.0),
        Clip::agc(1.0),
    ] {
        let mut plan = gpu().plan(&clip, &with_parameters(gpu(), place.tensors(), &numbers)).expect("valid");
        for (i, threshold) in
            THRESHOLDS.into_iter().enumerate().filter(|(_, t)| t.is_finite() || !clip.needs_parameters())
        {
            let scale = [1.0, 4.0, 65536.0][i % 3];
            plan.set_max_norm(threshold).expect("valid");
            plan.set_grad_scale(scale).expect("valid");
            let mut asked = clip.grad_scale(scale);
            asked.mode = match clip.mode {
                Mode::Norm(_) => Mode::Norm(threshold),
                Mode::Rms(_) => Mode::Rms(threshold),
                Mode::AverageNorm(_) => Mode::AverageNorm(threshold),
                _ => Mode::Agc(threshold),
            };
            assert_as_new(&mut plan, &place, &asked, PlanOptions::default(), &numbers);
        }
    }
    // A value clip has a scale alone.
    let mut plan = gpu().plan(&Clip::value(0.1), &place.tensors()).expect("valid");
    plan.set_grad_scale(2.0).expect("valid");
    assert_as_new(&mut plan, &place, &Clip::value(0.1).grad_scale(2.0), PlanOptions::default(), &numbers);
    assert!(matches!(plan.set_max_norm(1.0), Err(Error::Usage(_))));
}

#[test]
fn a_threshold_on_the_device_keeps_its_bound_and_its_state() {
    let numbers = set(7, 1.0);
    let place = Placed::new(&numbers, 1, 1);
    let thresholds =
        [(Scope::Global, DeviceThreshold::ZClip(ZClip::new())), (Scope::Tensor, DeviceThreshold::AdaGc(AdaGc::new()))];
    for (scope, mut state) in thresholds {
        let clip = Clip::norm(f64::INFINITY).scope(scope);
        let options = |state: &DeviceThreshold| PlanOptions::default().threshold(state.clone());
        let mut plan = gpu().plan_with(&[(clip, &place.tensors())], options(&state)).expect("valid");
        for max_norm in THRESHOLDS {
            plan.set_max_norm(max_norm).expect("valid");
            assert_as_new(&mut plan, &place, &Clip::norm(max_norm).scope(scope), options(&state), &numbers);
            state = plan.threshold().wait().expect("the device works").expect("it has one");
        }
    }
}

#[test]
fn groups_have_thresholds_of_their_own() {
    let numbers = set(8, 1.0);
    let (kept, fresh) = (Placed::new(&numbers, 1, 1), Placed::new(&numbers, 1, 1));
    let planned = |place: &Placed, max_norms: [f64; 2]| {
        let tensors = place.tensors();
        let (first, second) = tensors.split_at(2);
        let [first, second] = [(max_norms[0], first), (max_norms[1], second)].map(|(m, t)| (Clip::norm(m), t));
        gpu().plan_with(&[first, second], PlanOptions::default()).expect("valid")
    };
    let mut plan = planned(&kept, [1.0, 2.0]);
    plan.set_max_norms(&[0.5, 1e9]).expect("as many as groups");
    step(gpu(), &plan);
    step(gpu(), &planned(&fresh, [0.5, 1e9]));
    assert_same_bits(&kept.now(), &fresh.now(), "two groups");
    assert!(matches!(plan.set_max_norms(&[1.0]), Err(Error::Usage(_))));
    // What is refused changes nothing, not even for the groups that it is right for.
    assert!(matches!(plan.set_max_norms(&[0.1, -1.0]), Err(Error::Setting { name: "max_norm", .. })));
    assert!(matches!(plan.set_grad_scale(0.0), Err(Error::Setting { name: "grad_scale", .. })));
    kept.restore();
    step(gpu(), &plan);
    assert_same_bits(&kept.now(), &fresh.now(), "two groups");
}

#[test]
fn options_that_do_not_go_together() {
    let numbers = set(9, 1.0);
    let tensors = Placed::new(&numbers, 1, 1).tensors();
    let clip = Clip::norm(1.0);
    let (group, of_none) = ((clip, &tensors[..]), (clip, &[][..]));
    let options = PlanOptions::default;
    for (groups, options) in [
        (&[group][..], options().measure_only().norms(&tensors[1])),
        (&[group], options().measure_only().sums(&[])),
        (&[group], options().norms(&tensors[1]).sums(&[])),
        (&[group], options().norms(&tensors[1]).threshold(DeviceThreshold::ZClip(ZClip::new()))),
        (&[group, of_none], options().norms(&tensors[1])),
        (&[group, of_none], options().threshold(DeviceThreshold::ZClip(ZClip::new()))),
        (&[], options()),
    ] {
        assert!(matches!(gpu().plan_with(groups, options), Err(Error::Usage(_))));
    }
    // A threshold for an optimizer that scales by itself.
    let adaptive = options().threshold(DeviceThreshold::ZClip(ZClip::new())).measure_only();
    step(gpu(), &gpu().plan_with(&[group], adaptive).expect("they do"));
}

#[test]
fn what_does_not_fit_leaves_the_plan_as_it_was() {
    let numbers = set(5, 1.0);
    let place = Placed::new(&numbers, 1, 0);
    let tensors = place.tensors();
    let norm = exact_norm(NormType::L2, numbers_of(&numbers));
    let mut plan = gpu().plan(&Clip::norm(norm * 2.0), &tensors).expect("valid");
    let buffer = upload(gpu(), &vec![0; 1 << 20]);
    let mut wrong = Vec::new();
    wrong.push(tensors[1..].to_vec());
    wrong.push([&tensors[..], &tensors[..1]].concat());
    for other in [
        GpuTensor::bf16(&buffer, 0..1001).expect("it fits"),
        GpuTensor::f16(&buffer, 0..1000).expect("it fits"),
        GpuTensor::f32(&buffer, 0..1001).expect("it fits"),
    ] {
        let mut tensors = tensors.clone();
        tensors[0] = other;
        wrong.push(tensors);
    }
    for tensors in &wrong {
        assert!(matches!(plan.update(&[tensors]), Err(Error::Usage(_))), "{tensors:?}");
    }
    assert!(matches!(plan.update(&[&tensors, &tensors]), Err(Error::Usage(_))));
    let mut uncounted = tensors.clone();
    uncounted[1] = uncounted[1].clone().replica(true);
    assert!(matches!(plan.update(&[&uncounted]), Err(Error::Usage(_))));
    let empty = |rows| GpuTensor::f32(&buffer, 0..0).and_then(|t| t.shape(&[rows, 0])).expect("no elements");
    let by_unit = Clip::norm(1.0).scope(Scope::Unit);
    let mut of_none = gpu().plan(&by_unit, &[empty(4)]).expect("valid");
    assert!(matches!(of_none.update(&[&[empty(1 << 20)]]), Err(Error::Usage(_))));
    of_none.update(&[&[empty(4)]]).expect("the same");
    step(gpu(), &of_none);
    assert_eq!(of_none.report().wait().expect("finite").segments.len(), 4);
    // Half of the last tensor is half of the first.
    let mut overlapping = tensors.clone();
    overlapping[4] = GpuTensor::f16(&buffer, 0..40_000).expect("it fits");
    overlapping[0] = GpuTensor::f16(&buffer, 39_500..40_501).expect("it fits");
    assert!(matches!(plan.update(&[&overlapping]), Err(Error::Tensor { .. })));
    step(gpu(), &plan);
    assert_norm(plan.report().wait().expect("finite").total_norm, norm, 1e-6, "as it was");
}

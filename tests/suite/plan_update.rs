//! Guards against plans that, once they were given other buffers, still touch the old ones, forget what they had learnt, or
//! are left between the two by an error.
#![cfg(feature = "gpu")]

use std::slice::from_ref;

use crate::common::gpu::{Layout, download, encoder, gpu, step, upload};
use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::gpu::{DeviceThreshold, GpuTensor};
use gradclip::{Clip, Dtype, Error, NormType, Scope, ZClip, wgpu};

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
            let clip = Clip::norm(norm / 4.0).expect("valid").eps(0.0).expect("valid").scope(scope);
            let mut plan = gpu().plan(&clip, &old.tensors()).expect("valid");
            let coefficients = plan.coefficients().clone();
            plan.update(&new.tensors()).expect("the same shapes");
            assert_eq!(*plan.coefficients(), coefficients, "a caller's kernel has bound it");
            step(gpu(), &plan);
            let report = plan.report_blocking().expect("finite");
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
            plan.update(&old.tensors()).expect("the same shapes");
            step(gpu(), &plan);
            assert_norm(
                plan.report_blocking().expect("finite").total_norm,
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
    let mut plan = gpu().plan(&Clip::norm(f64::MAX).expect("valid").grad_scale(2.0).expect("valid"), &old.tensors());
    let plan = plan.as_mut().expect("valid");
    let mut pending = encoder(gpu());
    plan.encode(&mut pending).expect("the device works");
    plan.update(&new.tensors()).expect("the same shapes");
    gpu().queue().submit([pending.finish()]);
    assert_scaled(&first, &old.now(), 0.5, 0.0, "encoded before");
    assert_same_bits(&new.now(), &second, "not encoded yet");
}

#[test]
fn a_threshold_goes_on() {
    let clip = Clip::norm(f64::INFINITY).expect("valid");
    let zclip = || DeviceThreshold::ZClip(ZClip::new().warm_up(3).expect("valid"));
    let places: Vec<_> = (0..6).map(|i| Placed::new(&set(10 + i, 1.0 + i as f64), 1 + i as usize % 3, 1)).collect();
    let mut moving = gpu().plan_adaptive(&clip, zclip(), &places[0].tensors()).expect("valid");
    for place in &places {
        moving.update(&place.tensors()).expect("the same shapes");
        step(gpu(), &moving);
    }
    // The same steps in one place.
    let mut staying = zclip();
    for i in 0..6 {
        let place = Placed::new(&set(10 + i, 1.0 + i as f64), 1, 1);
        let plan = gpu().plan_adaptive(&clip, staying, &place.tensors()).expect("valid");
        step(gpu(), &plan);
        staying = plan.threshold_blocking().expect("the device works").expect("it has one");
    }
    let moved = moving.threshold_blocking().expect("the device works").expect("it has one");
    let (DeviceThreshold::ZClip(a), DeviceThreshold::ZClip(b)) = (&moved, &staying) else { panic!("another kind") };
    // What a spike would be clipped to.
    let threshold = |z: &ZClip| z.clone().max_norm(1e9);
    let (a, b) = (threshold(a), threshold(b));
    assert!(a.is_finite() && (a / b - 1.0).abs() < 1e-8, "{a} {b}");
}

#[test]
fn what_does_not_fit_leaves_the_plan_as_it_was() {
    let numbers = set(5, 1.0);
    let place = Placed::new(&numbers, 1, 0);
    let tensors = place.tensors();
    let norm = exact_norm(NormType::L2, numbers_of(&numbers));
    let mut plan = gpu().plan(&Clip::norm(norm * 2.0).expect("valid"), &tensors).expect("valid");
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
        assert!(matches!(plan.update(tensors), Err(Error::Unfit(_))), "{tensors:?}");
    }
    assert!(matches!(plan.update_groups(&[&tensors, &tensors]), Err(Error::Unfit(_))));
    let mut uncounted = tensors.clone();
    uncounted[1] = uncounted[1].clone().counted(false);
    assert!(matches!(plan.update(&uncounted), Err(Error::Unfit(_))));
    let empty = |rows| GpuTensor::f32(&buffer, 0..0).and_then(|t| t.shape(&[rows, 0])).expect("no elements");
    let by_unit = Clip::norm(1.0).expect("valid").scope(Scope::Unit);
    let mut of_none = gpu().plan(&by_unit, &[empty(4)]).expect("valid");
    assert!(matches!(of_none.update(&[empty(1 << 20)]), Err(Error::Unfit(_))));
    of_none.update(&[empty(4)]).expect("the same");
    step(gpu(), &of_none);
    assert_eq!(of_none.report_blocking().expect("finite").segments.len(), 4);
    // Half of the last tensor is half of the first.
    let mut overlapping = tensors.clone();
    overlapping[4] = GpuTensor::f16(&buffer, 0..40_000).expect("it fits");
    overlapping[0] = GpuTensor::f16(&buffer, 39_500..40_501).expect("it fits");
    assert!(matches!(plan.update(&overlapping), Err(Error::Overlap { .. })));
    step(gpu(), &plan);
    assert_norm(plan.report_blocking().expect("finite").total_norm, norm, 1e-6, "as it was");
}

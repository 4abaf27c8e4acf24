//! Guards against a library that works only on its own device: the caller's device, queue, encoder and threads must do.
#![cfg(feature = "gpu")]

use crate::common::gpu::{OwnKernel, block_on, device, download, encoder, gpu_tensor, shared, step, upload};
use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, assert_norm, assert_same_bits, assert_scaled};
use gradclip::gpu::{GpuClipper, GpuPlan, GpuTensor};
use gradclip::{Clip, Clipper, Error, NormType};
use std::sync::Arc;

/// On a device that a caller made with wgpu's default limits and no features.
fn own() -> GpuClipper {
    shared(wgpu::Limits::default())
}

fn normals(n: usize, seed: u64) -> Data {
    Data::of(&Random(seed).normals(n, 1.0).iter().map(|x| *x as f32).collect::<Vec<_>>())
}

#[test]
fn types_can_be_sent_and_shared() {
    fn check<T: Send + Sync + 'static>() {}
    check::<GpuClipper>();
    check::<GpuPlan>();
    check::<GpuTensor>();
    check::<Clipper>();
    check::<Error>();
    fn check_future<F: Future + Send>(_: impl FnOnce(&'static GpuPlan) -> F) {}
    check_future(GpuPlan::report);
}

/// The caller's kernel writes gradients, the clip follows in the same encoder, and a copy of what it left.
#[test]
fn behind_the_callers_own_pass() {
    const N: u64 = 70_000;
    let gpu = own();
    let grads = upload(&gpu, &vec![0xff; 4 * N as usize]);
    let copy = upload(&gpu, &vec![0; 4 * N as usize]);
    let source = "@group(0) @binding(0) var<storage, read_write> grads: array<f32>;
         @compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) {
             if id.x < arrayLength(&grads) { grads[id.x] = f32(id.x % 7u) - 3.0; }
         }";
    let kernel = OwnKernel::new(&gpu, source, &[&grads]);
    let clip = Clip::norm(2.0).eps(0.0);
    let plan = gpu.plan(&clip, &[GpuTensor::f32(&grads, ..).expect("it fits")]).expect("valid");
    let made: Vec<f32> = (0..N).map(|i| (i % 7) as f32 - 3.0).collect();
    let norm = exact_norm(NormType::L2, made.iter().map(|x| f64::from(*x)));
    for _ in 0..3 {
        let mut encoder = encoder(&gpu);
        kernel.encode(&mut encoder, N.div_ceil(64) as u32);
        plan.encode(&mut encoder).expect("the device works");
        encoder.copy_buffer_to_buffer(&grads, 0, &copy, 0, None);
        gpu.queue().submit([encoder.finish()]);
        let report = plan.report().wait().expect("finite");
        assert_norm(report.total_norm, norm, 1e-6, "made by a kernel");
        let after = Data { bytes: download(&gpu, &copy), ..Data::of(&made) };
        assert_scaled(&[Data::of(&made)], &[after], 2.0 / norm, 1e-6, "made by a kernel");
    }
}

/// Gradients arrive by a copy in the same encoder.
#[test]
fn behind_the_callers_own_copy() {
    let gpu = own();
    let set = normals(5001, 1);
    let (source, grads) = (upload(&gpu, &set.bytes), upload(&gpu, &vec![0; set.bytes.len()]));
    let plan = gpu.plan(&Clip::value(0.5), &[gpu_tensor(&grads, &set, 0)]).expect("valid");
    let mut encoder = encoder(&gpu);
    encoder.copy_buffer_to_buffer(&source, 0, &grads, 0, None);
    plan.encode(&mut encoder).expect("the device works");
    gpu.queue().submit([encoder.finish()]);
    let want = Data::rounded(set.dtype, set.numbers().map(|x| x.clamp(-0.5, 0.5)));
    assert_same_bits(&[Data { bytes: download(&gpu, &grads), ..set }], &[want], "clamped");
    assert!(plan.report().wait().expect("finite").clipped);
}

/// Plans over parts of one buffer and over the same part, one after another in one encoder.
#[test]
fn several_plans_in_one_encoder() {
    let gpu = own();
    let set = normals(3000, 2);
    let buffer = upload(&gpu, &set.bytes);
    let part = |start: usize, end: usize| GpuTensor::f32(&buffer, start as u64..end as u64).expect("it fits");
    let halve = |start, end| {
        let clip = Clip::norm(f64::MAX).grad_scale(2.0);
        gpu.plan(&clip, &[part(start, end)]).expect("valid")
    };
    let (a, b, all) = (halve(1, 1000), halve(1000, 2999), halve(0, 3000));
    let mut encoder = encoder(&gpu);
    for plan in [&a, &b, &all, &a] {
        plan.encode(&mut encoder).expect("the device works");
    }
    gpu.queue().submit([encoder.finish()]);
    let times = |i| [1, 3, 2, 1][[1, 1000, 2999].iter().filter(|edge| i >= **edge).count()];
    let want = Data::rounded(set.dtype, set.numbers().enumerate().map(|(i, x)| x * 2f64.powi(-times(i))));
    let after = Data { bytes: download(&gpu, &buffer), ..set.clone() };
    assert_same_bits(&[after], &[want], "halved");
    let norm = |start, end| exact_norm(NormType::L2, set.numbers().skip(start).take(end - start));
    assert_norm(a.report().wait().expect("finite").total_norm, norm(1, 1000) / 8.0, 1e-6, "a, at its second step");
    assert_norm(b.report().wait().expect("finite").total_norm, norm(1000, 2999) / 2.0, 1e-6, "b");
    all.report().wait().expect("finite");
}

#[test]
fn clones_work_in_threads_of_their_own() {
    let gpu = own();
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let gpu = gpu.clone();
            scope.spawn(move || {
                for round in 0..10 {
                    let set = normals(1000 + 777 * thread, (thread * 10 + round) as u64);
                    let norm = exact_norm(NormType::L2, set.numbers());
                    let buffer = upload(&gpu, &set.bytes);
                    let clip = Clip::norm(norm / 2.0).eps(0.0);
                    let plan = gpu.plan(&clip, &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
                    step(&gpu, &plan);
                    let report = plan.report().wait().expect("finite");
                    assert_norm(report.total_norm, norm, 1e-6, "in a thread");
                    let after = Data { bytes: download(&gpu, &buffer), ..set.clone() };
                    assert_scaled(&[set], &[after], 0.5, 1e-6, "in a thread");
                }
            });
        }
    });
}

/// A plan may be encoded by one thread and reported by another.
#[test]
fn a_plan_is_shared_by_threads() {
    let gpu = own();
    let set = normals(5000, 3);
    let buffer = upload(&gpu, &set.bytes);
    let plan = Arc::new(gpu.plan(&Clip::norm(1e9), &[gpu_tensor(&buffer, &set, 0)]).expect("valid"));
    let (other, clone) = (Arc::clone(&plan), gpu.clone());
    let encoders = std::thread::spawn(move || {
        for _ in 0..50 {
            step(&clone, &other);
        }
    });
    let norm = exact_norm(NormType::L2, set.numbers());
    let mut reports = 0;
    while !encoders.is_finished() {
        match plan.report().wait() {
            Ok(report) => assert_norm(report.total_norm, norm, 1e-6, "meanwhile"),
            Err(Error::NotSubmitted) => {}
            Err(error) => panic!("{error}"),
        }
        reports += 1;
    }
    encoders.join().expect("no panic");
    assert!(reports > 0);
    assert_same_bits(&[Data { bytes: download(&gpu, &buffer), ..set.clone() }], &[set], "unclipped");
}

#[test]
fn reports_are_awaited_on_any_executor() {
    let gpu = own();
    let set = normals(100_000, 4);
    let buffer = upload(&gpu, &set.bytes);
    let plan = gpu.plan(&Clip::norm(1e9), &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
    step(&gpu, &plan);
    let report = block_on(plan.report()).expect("finite");
    assert_norm(report.total_norm, exact_norm(NormType::L2, set.numbers()), 1e-6, "awaited");
    assert_eq!(plan.report().wait().expect("finite"), report);
    // And so is the path of host tensors.
    let measured = block_on(gpu.measure(&Clip::norm(1e9), &[set.view()])).expect("finite");
    assert_norm(measured.total_norm, report.total_norm, 1e-6, "of host tensors");
}

#[test]
fn two_reports_are_awaited_at_once() {
    let gpu = own();
    let set = normals(100_000, 5);
    let buffer = upload(&gpu, &set.bytes);
    let plan = |max_norm| {
        let plan = gpu.plan(&Clip::norm(max_norm), &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
        step(&gpu, &plan);
        plan
    };
    let (a, b) = (plan(1e8), plan(1e9));
    let (mut first, mut second) = (Box::pin(a.report()), Box::pin(b.report()));
    let (mut first_done, mut second_done) = (None, None);
    let both = std::future::poll_fn(|context| {
        if second_done.is_none()
            && let std::task::Poll::Ready(report) = second.as_mut().poll(context)
        {
            second_done = Some(report);
        }
        if first_done.is_none()
            && let std::task::Poll::Ready(report) = first.as_mut().poll(context)
        {
            first_done = Some(report);
        }
        if first_done.is_some() && second_done.is_some() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    });
    block_on(both);
    assert_eq!(first_done.expect("done").expect("finite"), second_done.expect("done").expect("finite"));
}

#[test]
fn a_dropped_report_does_no_harm() {
    let gpu = own();
    let set = normals(100_000, 6);
    let buffer = upload(&gpu, &set.bytes);
    let plan = gpu.plan(&Clip::norm(1e9), &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
    for polls in 0..3 {
        step(&gpu, &plan);
        let mut report = Box::pin(plan.report());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        for _ in 0..polls {
            // Whether it is ready does not matter.
            let _ = report.as_mut().poll(&mut context);
        }
        drop(report);
    }
    let report = plan.report().wait().expect("finite");
    assert_norm(report.total_norm, exact_norm(NormType::L2, set.numbers()), 1e-6, "after dropped ones");
}

/// A plan keeps what it needs alive: the clipper, the views and the caller's handles may go.
#[test]
fn a_plan_outlives_what_it_was_made_from() {
    let set = normals(1000, 7);
    let (device, queue) = device(wgpu::Limits::default());
    let plan = {
        let gpu = GpuClipper::new(&device, &queue).expect("default limits suffice");
        let buffer = upload(&gpu, &set.bytes);
        gpu.plan(&Clip::norm(1e9), &[gpu_tensor(&buffer, &set, 0)]).expect("valid")
    };
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    plan.encode(&mut encoder).expect("the device works");
    queue.submit([encoder.finish()]);
    let report = plan.report().wait().expect("finite");
    assert_norm(report.total_norm, exact_norm(NormType::L2, set.numbers()), 1e-6, "alone");
}

/// wgpu panics where threads use the OpenGL adapters of one instance at once; opening must not lead there.
#[test]
fn opening_from_many_threads_at_once() {
    std::thread::scope(|threads| {
        for _ in 0..8 {
            threads.spawn(|| {
                for _ in 0..3 {
                    GpuClipper::open().wait().expect("an adapter, as every other test needs");
                    assert!(!gradclip::gpu::adapters().wait().is_empty());
                }
            });
        }
    });
}

//! Guards against failures around a clip: threads that share a device, a queue or a plan, a device that is lost while
//! they use it, futures and plans that are dropped early, callbacks that panic. Nothing may hang or be half clipped.
#![cfg(feature = "gpu")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Barrier};
use std::task::{Context, Waker};
use std::time::Duration;

use crate::common::gpu::{download, encoder, gpu, gpu_tensor, open, step, upload};
use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, Path, assert_norm, assert_same_bits, numbers_of, parameters, views_mut};
use gradclip::{Clip, Clipper, Dtype, Error, NonFinite, NormType, Scope, wgpu};

const THREADS: usize = 8;

/// Longer than any of these takes on a busy machine, and shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(120);

fn normals(dtype: Dtype, len: usize, seed: usize) -> Data {
    Data::rounded(dtype, Random(seed as u64).normals(len, 1.0))
}

/// Divides by 2 whatever the norm is.
fn halving() -> Clip {
    Clip::norm(f64::MAX).grad_scale(2.0)
}

/// Runs `f` in this number of threads at once, and fails if one has not ended in time. Panics are passed on.
fn in_threads<T: Send + 'static>(f: impl Fn(usize) -> T + Send + Sync + 'static) -> Vec<T> {
    let (f, begin) = (Arc::new(f), Arc::new(Barrier::new(THREADS)));
    let (sender, receiver) = mpsc::channel();
    let threads: Vec<_> = (0..THREADS)
        .map(|i| {
            let (f, begin, sender) = (Arc::clone(&f), Arc::clone(&begin), sender.clone());
            std::thread::spawn(move || {
                begin.wait();
                let result = catch_unwind(AssertUnwindSafe(|| f(i)));
                sender.send(i).expect("the test waits");
                result
            })
        })
        .collect();
    for done in 0..THREADS {
        receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("only {done} of {THREADS} threads have ended"));
    }
    let result = |thread: std::thread::JoinHandle<std::thread::Result<T>>| thread.join().expect("its panic is caught");
    threads.into_iter().map(|thread| result(thread).unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
}

/// Each thread compiles, plans, records, submits and reports on one device and one queue.
#[test]
fn eight_threads_with_plans_of_their_own() {
    let gpu = open();
    in_threads(move |i| {
        let dtype = [Dtype::F32, Dtype::F16, Dtype::BF16][i % 3];
        let before: Vec<_> = (0..3).map(|t| normals(dtype, 4000 + 991 * i + t, 10 * i + t)).collect();
        let clips = [
            Clip::norm(1.0),
            Clip::norm(0.5).scope(Scope::Tensor),
            Clip::value(0.25),
            Clip::norm(1.0).norm_type(NormType::L1),
        ];
        let clip = clips[i % clips.len()];
        let (want, clipped) = Path::GpuHost.clip(&clip, &before).ok();
        for _ in 0..3 {
            let buffers: Vec<_> = before.iter().map(|t| upload(&gpu, &t.bytes)).collect();
            let tensors: Vec<_> = buffers.iter().zip(&before).map(|(b, t)| gpu_tensor(b, t, 0)).collect();
            let plan = gpu.plan(&clip, &tensors).expect("valid");
            step(&gpu, &plan);
            let report = plan.report().wait().expect("finite");
            let close = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a / b - 1.0).abs() < 1e-6;
            assert!(close(report.total_norm, want.total_norm), "{report:?} {want:?}");
            let after: Vec<_> = buffers
                .iter()
                .zip(&before)
                .map(|(b, t)| Data::from_bytes(dtype, download(&gpu, b)[..t.bytes.len()].to_vec()))
                .collect();
            // Host tensors lie elsewhere, so sums may differ in their last bits; a value clip has none.
            if clip == clips[2] {
                assert_same_bits(&after, &clipped, "clamped");
            }
            assert_norm(
                exact_norm(NormType::L2, numbers_of(&after)),
                exact_norm(NormType::L2, numbers_of(&clipped)),
                if dtype == Dtype::F32 { 2e-6 } else { 1e-2 },
                "clipped",
            );
        }
    });
}

/// One plan, recorded and submitted by all threads, while each also asks for reports: every step happens once.
#[test]
fn eight_threads_with_one_plan() {
    const STEPS: usize = 12;
    let gpu = gpu();
    let numbers: Vec<f32> = (0..5000).map(|i| (1.0 + i as f32) * 2f32.powi(60)).collect();
    let buffer = upload(gpu, bytemuck::cast_slice(&numbers));
    let data = Data::of(&numbers);
    let plan = Arc::new(gpu.plan(&halving(), &[gpu_tensor(&buffer, &data, 0)]).expect("valid"));
    let norm = exact_norm(NormType::L2, data.numbers());
    let shared = Arc::clone(&plan);
    in_threads(move |_| {
        let plan = &shared;
        for _ in 0..STEPS {
            step(gpu, plan);
            let report = match plan.report().wait() {
                Ok(report) => report,
                // Another thread's step was counted as recorded and has not been submitted yet.
                Err(Error::NotSubmitted) => continue,
                Err(error) => panic!("{error}"),
            };
            // Of some step: the norm is the first one halved once or more.
            let halved = (norm / report.total_norm).log2();
            assert!((halved - halved.round()).abs() < 1e-5 && halved > 0.5, "{report:?}");
        }
    });
    let steps = (THREADS * STEPS) as i32;
    let want: Vec<f32> = numbers.iter().map(|x| x * 2f32.powi(-steps)).collect();
    let after = download(gpu, &buffer);
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&after), want, "{steps} steps");
    assert_norm(plan.report().wait().expect("finite").total_norm, norm * 2f64.powi(-steps), 1e-6, "the last step");
}

/// The device is destroyed while all threads plan, step and wait: each ends with an error, and none hangs or panics.
#[test]
fn a_device_destroyed_under_eight_threads() {
    let mut errors = 0;
    // Some rounds while kernels are being compiled, some while steps run.
    let rounds = [0, 1, 2, 5];
    for round in rounds {
        let gpu = open();
        let (device, ended) = (gpu.device().clone(), Arc::new(AtomicUsize::new(0)));
        let at_work = Arc::new(AtomicUsize::new(0));
        let (progress, count) = (Arc::clone(&at_work), Arc::clone(&ended));
        let destroyer = std::thread::spawn(move || {
            while progress.load(Ordering::Relaxed) < round * THREADS {
                std::thread::yield_now();
            }
            device.destroy();
        });
        in_threads(move |i| {
            let data = normals(Dtype::F32, 3000, i);
            let buffer = upload(&gpu, &data.bytes);
            for turn in 0.. {
                assert!(turn < 100_000, "the device is gone and nobody has noticed");
                at_work.fetch_add(1, Ordering::Relaxed);
                let clip = Clip::norm(1.0 + i as f64);
                let done = gpu.plan(&clip, &[gpu_tensor(&buffer, &data, 0)]).and_then(|plan| {
                    let mut encoder = encoder(&gpu);
                    plan.encode(&mut encoder)?;
                    gpu.queue().submit([encoder.finish()]);
                    plan.report().wait()
                });
                match done {
                    Ok(_) => {}
                    Err(Error::DeviceLost(_) | Error::Device(_) | Error::OutOfMemory(_)) => break,
                    // The step was refused by a device that was gone by then.
                    Err(Error::NotSubmitted) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            count.fetch_add(1, Ordering::Relaxed);
        });
        destroyer.join().expect("it only destroys");
        errors += ended.load(Ordering::Relaxed);
    }
    println!(
        "faults: a device destroyed {} times under {THREADS} threads, {errors} errors told, no hang",
        rounds.len()
    );
    assert_eq!(errors, rounds.len() * THREADS);
}

#[test]
fn report_futures_that_are_dropped() {
    let gpu = gpu();
    let data = normals(Dtype::F32, 100_000, 3);
    let buffer = upload(gpu, &data.bytes);
    let plan = gpu.plan(&Clip::norm(f64::INFINITY), &[gpu_tensor(&buffer, &data, 0)]).expect("valid");
    let mut pending = 0;
    for polls in (0..4).cycle().take(200) {
        step(gpu, &plan);
        let mut future = Box::pin(plan.report());
        let mut poll = || future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
        pending += (0..polls).take_while(|_| poll()).count();
    }
    assert!(pending > 0, "no future was ever dropped before its end");
    step(gpu, &plan);
    let report = plan.report().wait().expect("finite");
    assert_norm(report.total_norm, exact_norm(NormType::L2, data.numbers()), 1e-6, "after dropped futures");
}

/// What was recorded is done, whether the plan is dropped before the submission or while it runs.
#[test]
fn plans_that_are_dropped_before_their_step_has_run() {
    let gpu = gpu();
    let data = normals(Dtype::F32, 300_000, 4);
    let mut want = data.clone();
    (0..data.len()).for_each(|i| want.set(i, data.get(i) / 2.0));
    for before_submission in [true, false] {
        let buffer = upload(gpu, &data.bytes);
        let plan = gpu.plan(&halving(), &[gpu_tensor(&buffer, &data, 0)]).expect("valid");
        let mut encoder = encoder(gpu);
        plan.encode(&mut encoder).expect("the device works");
        if before_submission {
            drop(plan);
            gpu.queue().submit([encoder.finish()]);
        } else {
            gpu.queue().submit([encoder.finish()]);
            drop(plan);
        }
        let after = Data::from_bytes(Dtype::F32, download(gpu, &buffer));
        assert_same_bits(&[after], &[want.clone()], "halved");
    }
}

/// A callback of the caller's that panics while a report polls the device: the panic is the caller's, and the device and the
/// plan work on.
#[test]
fn a_callback_of_the_callers_that_panics() {
    let gpu = open();
    let data = normals(Dtype::F32, 1000, 5);
    let buffer = upload(&gpu, &data.bytes);
    let plan = gpu.plan(&Clip::norm(f64::INFINITY), &[gpu_tensor(&buffer, &data, 0)]).expect("valid");
    step(&gpu, &plan);
    gpu.queue().on_submitted_work_done(|| panic!("on purpose"));
    let panic = catch_unwind(AssertUnwindSafe(|| plan.report().wait())).expect_err("it panics");
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
    step(&gpu, &plan);
    let report = plan.report().wait().expect("finite");
    assert_norm(report.total_norm, exact_norm(NormType::L2, data.numbers()), 1e-6, "after a panic");
}

/// A progress callback that panics at any of its calls: a clip by norm has written nothing by then, on any path, and what
/// comes from the GPU comes all or not at all. A value clip that writes as it reads has written everything.
#[test]
fn a_progress_callback_that_panics() {
    let before = [normals(Dtype::F32, 400_000, 6), normals(Dtype::F16, 400_001, 7), normals(Dtype::F32, 9, 8)];
    // In several loads, of which each is told.
    let gpu = Clipper::gpu(gpu().clone().with_memory_budget(1 << 20));
    let value = Clip::value(0.1);
    let clips = [Clip::norm(1.0), value.non_finite(NonFinite::Error), value];
    for path in Path::HOST {
        for clip in &clips {
            for call in [1, 2, 3] {
                let calls = AtomicUsize::new(0);
                let panicked = Arc::new(AtomicBool::new(false));
                let told = Arc::clone(&panicked);
                let clipper = if *path == Path::Cpu { Clipper::cpu() } else { gpu.clone() };
                let clipper = clipper.on_progress(move |_| {
                    if calls.fetch_add(1, Ordering::Relaxed) + 1 == call {
                        told.store(true, Ordering::Relaxed);
                        panic!("on purpose");
                    }
                });
                let mut after = before.to_vec();
                let none = parameters(&before);
                let done = catch_unwind(AssertUnwindSafe(|| clipper.apply(clip, &mut views_mut(&mut after, &none))));
                assert_eq!(
                    done.is_err(),
                    panicked.load(Ordering::Relaxed),
                    "{path:?} {clip:?}: the panic is the caller's"
                );
                assert!(call > 1 || done.is_err(), "{path:?} {clip:?}: never called");
                if done.is_err() && matches!(path, Path::Cpu) && *clip == value {
                    let (_, clipped) = path.clip(clip, &before).ok();
                    assert_same_bits(&after, &clipped, &format!("{path:?} {clip:?} panicked at call {call}"));
                } else if done.is_err() {
                    assert_same_bits(&after, &before, &format!("{path:?} {clip:?} panicked at call {call}"));
                }
                drop(Clipper::cpu().apply(clip, &mut views_mut(&mut after, &none)).expect("it works on"));
            }
        }
    }
}

/// Work of the caller's on the same queue, from other threads, while clips run: nothing is lost and nothing waits for ever.
#[test]
fn a_queue_that_other_threads_submit_to() {
    let gpu = gpu();
    in_threads(move |i| {
        let data = normals(Dtype::F32, 20_000, i);
        let (from, to) = (upload(gpu, &data.bytes), upload(gpu, &vec![0; data.bytes.len()]));
        let plan = gpu.plan(&halving(), &[gpu_tensor(&to, &data, 0)]).expect("valid");
        for _ in 0..10 {
            let mut encoder = encoder(gpu);
            encoder.copy_buffer_to_buffer(&from, 0, &to, 0, None);
            if i % 2 == 0 {
                plan.encode(&mut encoder).expect("the device works");
            }
            gpu.queue().submit([encoder.finish()]);
            if i % 4 == 1 {
                gpu.device().poll(wgpu::PollType::Poll).expect("the device works");
            }
        }
        let by = if i % 2 == 0 { 2.0 } else { 1.0 };
        let mut want = data.clone();
        (0..data.len()).for_each(|k| want.set(k, data.get(k) / by));
        assert_same_bits(&[Data::from_bytes(Dtype::F32, download(gpu, &to))], &[want], "its own");
    });
}

//! Guards against host tensors that are clipped differently, or only in part, where the device cannot hold them all at
//! once: loads that take turns in one buffer or a few, tensors that span loads, and devices that fail on the way.
#![cfg(feature = "gpu")]

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::common::gpu::{block_on, clipper, device, gpu, shared, small_limits};
use crate::common::numbers::Random;
use crate::common::{
    Data, POLICIES, as_measured, assert_norm, assert_same_bits, clip_host, numbers_of, parameters, repeats,
    unwritten_sums, views, views_mut,
};
use gradclip::gpu::GpuClipper;
use gradclip::{
    AdaGc, AutoClip, Budget, Clip, ClipReport, Clipper, Dtype, Error, NonFinite, NormType, Scope, Tensor, TensorMut,
    Threshold, UnitAxis, ZClip,
};

/// With bindings of so few bytes, that is the size of a load.
const LOAD: u64 = 64 << 10;

fn small() -> GpuClipper {
    shared(small_limits())
}

/// What holds everything, and what holds one load, two and three at a time.
fn clippers() -> (Clipper, [(u64, Clipper); 3]) {
    let with = |loads: u64| (loads, Clipper::gpu(small().with_memory_budget(loads * LOAD)));
    (Clipper::gpu(small().with_memory_budget(u64::MAX)), [with(1), with(2), with(3)])
}

fn of(dtype: Dtype, shape: &[usize], seed: u64) -> Data {
    let len = shape.iter().product();
    let data = Data::rounded(dtype, Random(seed).normals(len, 1.0)).shaped(shape);
    let parameter = Data::rounded(Dtype::F32, Random(seed + 1000).normals(len, 0.3)).shaped(shape);
    data.named(&format!("{dtype} {shape:?}")).with_parameter(parameter)
}

/// Some ten loads: odd lengths, every dtype, empty ones, several in one load and several loads for one.
fn units() -> Vec<Data> {
    vec![
        of(Dtype::BF16, &[7], 1),
        of(Dtype::F32, &[300, 257], 2),
        of(Dtype::F32, &[0, 4], 3),
        of(Dtype::F16, &[131, 333], 4),
        of(Dtype::BF16, &[50_001], 5),
        of(Dtype::F32, &[1], 6),
        of(Dtype::F16, &[35, 11, 303], 7),
        of(Dtype::BF16, &[3, 1], 8),
    ]
}

/// The same for units that are columns, of which each load has a partial of its own.
fn columns() -> Vec<Data> {
    vec![
        of(Dtype::BF16, &[7], 21),
        of(Dtype::F32, &[2003, 33], 22),
        of(Dtype::F32, &[4, 0], 23),
        of(Dtype::F16, &[6667, 3, 5], 24),
        of(Dtype::BF16, &[50_001], 25),
    ]
}

/// The same for units of which a tensor has columns of several matrices, or rows that occur in several.
fn matrices() -> [Vec<Data>; 2] {
    let columns = vec![
        of(Dtype::F32, &[5, 2003, 7], 26),
        of(Dtype::F32, &[4, 0, 3], 27),
        of(Dtype::F16, &[3, 6001, 3], 28),
        of(Dtype::BF16, &[2, 1001, 3, 3], 29),
    ];
    let rows = vec![
        of(Dtype::F32, &[3, 50, 457], 26),
        of(Dtype::F32, &[4, 3, 0], 27),
        of(Dtype::F16, &[5, 31, 301], 28),
        of(Dtype::BF16, &[3, 7, 11, 99], 29),
    ];
    [columns, rows]
}

/// Five loads of two dtypes, for tests that take a device, with kernels to compile, for each step.
fn few() -> Vec<Data> {
    vec![
        of(Dtype::BF16, &[7], 31),
        of(Dtype::F32, &[150, 257], 32),
        of(Dtype::BF16, &[50_001], 33),
        of(Dtype::F32, &[60, 211], 34),
    ]
}

/// The same for examples.
fn examples() -> Vec<Data> {
    vec![
        of(Dtype::F32, &[13, 5003], 11),
        of(Dtype::F16, &[13, 7], 12),
        of(Dtype::F16, &[13, 0], 13),
        of(Dtype::BF16, &[13, 3, 1999], 14),
        of(Dtype::F32, &[13], 15),
        of(Dtype::F16, &[13, 10_001], 16),
    ]
}

/// The norms of some segments lie below this one and those of others above.
fn norm() -> Clip {
    Clip::norm(16.5)
}

fn scopes() -> Vec<(Clip, Vec<Data>)> {
    let unit = |axis| norm().scope(Scope::Unit).unit_axis(axis);
    let [columns_of_several, rows_of_several] = matrices();
    vec![
        (norm(), units()),
        (norm().scope(Scope::Tensor), units()),
        (unit(UnitAxis::First), units()),
        (unit(UnitAxis::Last), columns()),
        (unit(UnitAxis::axes(&[0, -1])), columns_of_several),
        (unit(UnitAxis::over(&[0, -1])), rows_of_several),
        (norm().scope(Scope::Example), examples()),
        (norm().scope(Scope::ExampleTensor), examples()),
        (norm().scope(Scope::ExampleTensor).budget(Budget::Sized), examples()),
    ]
}

/// Checks that a clip leaves the same bits and reports the same, no matter how much the device holds at a time.
#[track_caller]
fn check(clip: &Clip, set: &[Data], what: &str) {
    let (all_at_once, few) = clippers();
    let want = clip_host(&all_at_once, clip, set);
    let on_cpu = clip_host(&Clipper::cpu(), clip, set);
    match (&want.report, &on_cpu.report) {
        (Ok(report), Ok(on_cpu)) => {
            assert_norm(report.total_norm, on_cpu.total_norm, 1e-6, what);
            assert_eq!(report.clipped, on_cpu.clipped, "{what}");
        }
        (Err(Error::NonFinite(found)), Err(Error::NonFinite(on_cpu))) => assert_eq!(found, on_cpu, "{what}"),
        reports => panic!("{what}: {reports:?}"),
    }
    for (loads, clipper) in few {
        let what = format!("{what}, {loads} at a time");
        let got = clip_host(&clipper, clip, set);
        assert_eq!(format!("{:?}", got.report), format!("{:?}", want.report), "{what}");
        assert_same_bits(&got.after, &want.after, &what);
        let measured = clipper.measure(clip, &views(set, &parameters(set)));
        let want = all_at_once.measure(clip, &views(set, &parameters(set)));
        assert_eq!(format!("{measured:?}"), format!("{want:?}"), "{what}");
    }
}

#[test]
fn every_scope() {
    for (clip, set) in scopes() {
        check(&clip, &set, &format!("{clip:?}"));
        check(&clip.grad_scale(3.0), &set, &format!("{clip:?} and a loss scale"));
    }
}

#[test]
fn every_mode_and_norm_type() {
    let p = |p| norm().norm_type(NormType::p(p));
    let agc = Clip::agc(0.5);
    for clip in [
        p(1.0),
        p(f64::INFINITY),
        p(3.0),
        Clip::rms(0.5),
        Clip::rms(0.99).scope(Scope::Tensor),
        Clip::average_norm(1e-3),
        agc,
        Clip::value(0.5),
        Clip::value(0.5).grad_scale(3.0),
        Clip::range(-0.25, 1.5).non_finite(NonFinite::Error),
    ] {
        check(&clip, &units(), &format!("{clip:?}"));
    }
    check(&agc.unit_axis(UnitAxis::Last), &columns(), "AGC by columns");
}

#[test]
fn non_finite_elements_in_the_first_load_and_the_last() {
    let clips = [norm(), norm().scope(Scope::Tensor), Clip::value(0.5)];
    for clip in clips {
        for policy in POLICIES {
            for (tensor, element, bad) in [(1, 5, f64::NAN), (6, 116_000, f64::INFINITY), (7, 2, f64::NAN)] {
                let mut set = units();
                set[tensor].set(element, bad);
                let clip = clip.non_finite(policy);
                check(&clip, &set, &format!("{bad} in tensor {tensor}, {clip:?}"));
                if policy == NonFinite::Error {
                    let (_, few) = clippers();
                    let got = clip_host(&few[0].1, &clip, &set);
                    let Err(Error::NonFinite(found)) = got.report else { panic!("{bad} was missed") };
                    assert_eq!((found.tensor, found.index), (tensor, element as u64));
                    assert_same_bits(&got.after, &set, "refused");
                }
            }
        }
    }
}

/// Groups share loads; one of them is written while it is measured, and the other is not.
#[test]
fn groups_of_different_clips() {
    let value = Clip::value(0.5).non_finite(NonFinite::Propagate);
    let clips = [value, norm().non_finite(NonFinite::Propagate), Clip::value(100.0)];
    let run = |clipper: &Clipper| {
        let mut sets = [units(), examples(), units()];
        let given = sets.clone();
        let parameters = given.each_ref().map(|set| parameters(set));
        let mut views: Vec<_> = sets.iter_mut().zip(&parameters).map(|(set, p)| views_mut(set, p)).collect();
        let mut groups: Vec<_> = clips.into_iter().zip(views.iter_mut().map(|v| &mut v[..])).collect();
        let reports = clipper.apply_groups(&mut groups).expect("finite");
        drop(groups);
        drop(views);
        (reports, sets.concat(), given.concat())
    };
    let (all_at_once, few) = clippers();
    let (want, clipped, given) = run(&all_at_once);
    assert_eq!(want.iter().map(|r| r.clipped).collect::<Vec<_>>(), [true, true, false]);
    let untouched = units().len() + examples().len();
    assert_same_bits(&clipped[untouched..], &given[untouched..], "nothing outside the bounds");
    for (loads, clipper) in few {
        let (got, after, _) = run(&clipper);
        assert_eq!(format!("{got:?}"), format!("{want:?}"), "{loads} at a time");
        assert_same_bits(&after, &clipped, &format!("{loads} at a time"));
    }
}

/// Steps of an adaptive threshold; a spike is clipped.
fn adaptive<T: Threshold + PartialEq + std::fmt::Debug>(clip: &Clip, threshold: impl Fn() -> T) {
    let run = |clipper: &Clipper| {
        let mut threshold = threshold();
        let mut steps: Vec<(ClipReport, Vec<Data>)> = Vec::new();
        for step in 0..6 {
            let mut set = units();
            for t in &mut set {
                let size = if step == 4 { 9.0 } else { 1.0 + f64::from(step) / 10.0 };
                let scaled: Vec<_> = t.numbers().map(|x| x * size).collect();
                t.bytes = Data::rounded(t.dtype, scaled).bytes;
            }
            let report = clipper.apply_adaptive(clip, &mut threshold, &mut views_mut(&mut set, &[const { None }; 8]));
            steps.push((report.expect("finite"), set));
        }
        (steps, threshold)
    };
    let (all_at_once, few) = clippers();
    let (want, state) = run(&all_at_once);
    assert!(want[4].0.clipped, "the spike");
    for (loads, clipper) in few {
        let (got, reached) = run(&clipper);
        assert_eq!(reached, state, "{loads} at a time");
        for ((report, set), (want, wanted)) in got.iter().zip(&want) {
            assert_eq!(format!("{report:?}"), format!("{want:?}"), "{loads} at a time");
            assert_same_bits(set, wanted, &format!("{loads} at a time"));
        }
    }
}

#[test]
fn thresholds_that_follow_the_norms() {
    let unlimited = Clip::norm(f64::INFINITY);
    adaptive(&unlimited, || AutoClip::new().percentile(50.0).warm_up(0));
    adaptive(&unlimited, || ZClip::new().warm_up(3));
    adaptive(&unlimited.scope(Scope::Tensor), || AdaGc::new().warm_up(2));
}

#[test]
fn sums_of_examples() {
    let sum = |clipper: &Clipper, clip: &Clip, set: &[Data]| {
        let mut sums = unwritten_sums(set);
        let mut into: Vec<_> = sums.iter_mut().map(Data::view_mut).collect();
        let report = clipper.sum_examples(clip, &views(set, &parameters(set)), &mut into);
        (format!("{report:?}"), sums)
    };
    let (all_at_once, few) = clippers();
    // Parameters are in loads as well, which are not summed.
    let agc = Clip::agc(0.5).scope(Scope::Example);
    for clip in [norm().scope(Scope::Example), norm().scope(Scope::ExampleTensor), agc] {
        for bad in [false, true] {
            for policy in [NonFinite::Error, NonFinite::Zero] {
                let (clip, mut set) = (clip.non_finite(policy), examples());
                if bad {
                    set[5].set(130_000, f64::NAN);
                }
                let (want, sums) = sum(&all_at_once, &clip, &set);
                assert_eq!(want.starts_with("Err"), bad && policy == NonFinite::Error);
                for (loads, clipper) in &few {
                    let (got, after) = sum(clipper, &clip, &set);
                    assert_eq!(got, want, "{loads} at a time");
                    assert_same_bits(&after, &sums, &format!("{loads} at a time"));
                }
                if !bad {
                    let (_, on_cpu) = sum(&Clipper::cpu(), &clip, &set);
                    for (x, y) in numbers_of(&sums).zip(numbers_of(&on_cpu)) {
                        assert!((x - y).abs() < 1e-4, "{x} on the device, {y} on the CPU");
                    }
                }
            }
        }
    }
}

/// Loads of their real size, on a device with all its limits.
#[test]
fn loads_of_16_mib() {
    let gpu = gpu();
    let pattern = Random(31).normals(65_521, 1.0);
    let long = |dtype, len| Data::rounded(dtype, pattern.iter().copied().cycle().take(len));
    let set = [long(Dtype::F32, 9_000_001), long(Dtype::BF16, 10_000_003), Data::of(&[3.0f32; 5])];
    let clip = Clip::norm(100.0);
    let all_at_once = Clipper::gpu(gpu.clone().with_memory_budget(u64::MAX));
    let (want, clipped) = clip_host(&all_at_once, &clip, &set).ok();
    assert!(want.clipped);
    for budget in [16 << 20, (40 << 20) + 5] {
        let (report, after) = clip_host(&Clipper::gpu(gpu.clone().with_memory_budget(budget)), &clip, &set).ok();
        assert_eq!(report, want);
        assert_same_bits(&after, &clipped, "16 MiB at a time");
    }
}

/// A budget below the size of a load, down to nothing: loads are smaller, and the norm is as good.
#[test]
fn budgets_below_anything_sensible() {
    let gpu = gpu();
    let set = units();
    let (want, clipped) = clip_host(&Clipper::cpu(), &norm(), &set).ok();
    for budget in [0, 1, 65_537, 200_001] {
        let (report, after) = clip_host(&Clipper::gpu(gpu.clone().with_memory_budget(budget)), &norm(), &set).ok();
        assert_norm(report.total_norm, want.total_norm, 1e-6, "a small budget");
        for (x, y) in numbers_of(&after).zip(numbers_of(&clipped)) {
            assert!((x - y).abs() <= 1e-2 * x.abs(), "{x} on the device, {y} on the CPU");
        }
    }
}

/// What the tensors take on the device, as wgpu's own allocator tells while they pass.
#[test]
fn the_budget_is_kept() {
    // A device of its own: others would hold loads too.
    let gpu = clipper(small_limits());
    for loads in [1, 2, 5] {
        // What the last call held is free now.
        gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device works");
        let gpu = gpu.clone().with_memory_budget(loads * LOAD + 9);
        let (device, most) = (gpu.device().clone(), Arc::new(AtomicU64::new(0)));
        let seen = Arc::clone(&most);
        let clipper = Clipper::gpu(gpu).on_progress(move |_| {
            let report = device.generate_allocator_report().expect("Vulkan's allocator reports");
            // An allocation may be a few bytes larger than its buffer.
            let bytes = |size: u64| size / LOAD * LOAD;
            let loads = report.allocations.iter().filter(|a| a.name == "gradclip load");
            let held = loads.map(|a| bytes(a.size)).sum();
            seen.fetch_max(held, Ordering::Relaxed);
        });
        clip_host(&clipper, &norm(), &units()).ok();
        assert_eq!(most.load(Ordering::Relaxed), loads * LOAD);
    }
}

#[test]
fn progress_counts_each_byte_once() {
    let told = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&told);
    let gpu = small().with_memory_budget(LOAD);
    let clipper = Clipper::gpu(gpu).on_progress(move |bytes| {
        counter.fetch_add(bytes, Ordering::Relaxed);
    });
    for clip in [norm(), Clip::value(0.5), Clip::agc(0.1)] {
        told.store(0, Ordering::Relaxed);
        assert!(clip_host(&clipper, &clip, &units()).ok().0.clipped);
        let bytes: usize = units().iter().map(|t| t.bytes.len()).sum();
        assert_eq!(told.load(Ordering::Relaxed), bytes as u64, "{clip:?}");
    }
}

/// What the library logs in this thread, and what is done when it does.
struct Logs;

thread_local! {
    static HEARD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    #[expect(clippy::type_complexity, reason = "a hook")]
    static HOOK: RefCell<Option<Box<dyn FnMut(&str)>>> = const { RefCell::new(None) };
}

impl log::Log for Logs {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("gradclip")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = record.args().to_string();
            HOOK.with_borrow_mut(|hook| {
                if let Some(hook) = hook {
                    hook(&line);
                    HEARD.with_borrow_mut(|heard| heard.push(line));
                }
            });
        }
    }

    fn flush(&self) {}
}

/// Runs `f`, calling `hook` with each line that is logged, and returns the lines too.
fn heard<T>(hook: impl FnMut(&str) + 'static, f: impl FnOnce() -> T) -> (T, Vec<String>) {
    static LOGS: std::sync::Once = std::sync::Once::new();
    LOGS.call_once(|| {
        log::set_logger(&Logs).expect("the only logger");
        log::set_max_level(log::LevelFilter::Trace);
    });
    HEARD.take();
    HOOK.set(Some(Box::new(hook)));
    let result = f();
    HOOK.set(None);
    (result, HEARD.take())
}

/// Bytes to the device and back, as the library counts them.
fn moved(lines: &[String]) -> (u64, u64) {
    let line = lines.iter().find(|line| line.starts_with("host tensors:")).expect("it tells");
    let numbers: Vec<_> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

#[test]
fn nothing_comes_back_that_was_not_clipped() {
    let gpu = small().with_memory_budget(2 * LOAD);
    let clipper = Clipper::gpu(gpu);
    let set = units();
    let bytes: u64 = set.iter().map(|t| t.bytes.len().next_multiple_of(16) as u64).sum();
    let run = |clip: &Clip| {
        let (done, lines) = heard(|_| {}, || clip_host(&clipper, clip, &set));
        (moved(&lines), done)
    };
    let far = [
        Clip::norm(1e9),
        Clip::norm(f64::INFINITY),
        Clip::value(1e9),
        Clip::value(1e9).non_finite(NonFinite::Drop),
        Clip::value(1e9).non_finite(NonFinite::Error),
        Clip::rms(1e9).scope(Scope::Tensor),
    ];
    for clip in far {
        let (moved, done) = run(&clip);
        assert_eq!(moved, (bytes, 0), "{clip:?}");
        let (report, after) = done.ok();
        assert!(!report.clipped);
        assert_same_bits(&after, &set, "unclipped");
    }
    // Of clipped ones all comes back, and two loads need not go there again.
    for clip in [norm(), Clip::value(0.5)] {
        let ((there, back), _) = run(&clip);
        assert_eq!(back, bytes, "{clip:?}");
        assert!(there < 2 * bytes - LOAD && there > bytes, "{there} of {bytes}, {clip:?}");
    }
    // One tensor in ten loads is clipped: it comes back, and what shares a load with it.
    let mut one = units();
    let far = Clip::norm(1e4).scope(Scope::Tensor);
    one[4].set(40_000, 1e5);
    let (done, lines) = heard(|_| {}, || clip_host(&clipper, &far, &one));
    assert!(done.ok().0.clipped);
    assert!(moved(&lines).1 <= 3 * LOAD, "{:?}", moved(&lines));
    // A refused one does not even begin.
    let mut bad = units();
    bad[7].set(0, f64::NAN);
    let (done, lines) = heard(|_| {}, || clip_host(&clipper, &norm(), &bad));
    assert!(matches!(done.report, Err(Error::NonFinite(_))));
    assert_eq!(moved(&lines), (bytes, 0));
}

/// The device is destroyed after every `stride`th step on the way there and on the way back: all or nothing.
fn gone_midway(clip: &Clip, bad: Option<f64>, mut set: Vec<Data>, stride: usize) {
    if let Some(bad) = bad {
        set.iter_mut().find(|t| t.len() == 50_001).expect("it is in each set").set(11, bad);
    }
    let (want, clipped) = clip_host(&clippers().0, clip, &set).ok();
    let (mut refused, mut finished) = (0, 0);
    // By night at more moments.
    for step in (1..).step_by(repeats(stride + stride.div_ceil(2), stride)) {
        // One of its own each time.
        let gpu = clipper(small_limits()).with_memory_budget(2 * LOAD);
        gpu.device().on_uncaptured_error(Arc::new(|_| {}));
        let device = gpu.device().clone();
        let mut steps = 0;
        let hook = move |line: &str| {
            steps += usize::from(line.starts_with("load "));
            if steps == step {
                device.destroy();
            }
        };
        let (done, lines) = heard(hook, || clip_host(&Clipper::gpu(gpu), clip, &set));
        match done.report {
            Ok(report) => {
                assert_eq!(format!("{report:?}"), format!("{want:?}"), "{clip:?}, {step}");
                assert_same_values(&done.after, &clipped, &format!("{clip:?}, gone after step {step}"));
                finished += usize::from(lines.iter().any(|line| line.contains("the CPU clips the rest")));
            }
            Err(Error::DeviceLost(_) | Error::Device(_) | Error::OutOfMemory(_)) => {
                refused += 1;
                assert_same_bits(&done.after, &set, &format!("{clip:?}, gone after step {step}"));
            }
            Err(error) => panic!("{clip:?}, gone after step {step}: {error}"),
        }
        if lines.iter().filter(|line| line.starts_with("load ")).count() < step {
            break;
        }
    }
    assert!(refused > 1 && finished > 1, "{clip:?}: {refused} times refused, {finished} times finished by the CPU");
}

#[test]
fn a_device_that_is_gone_midway() {
    gone_midway(&norm(), None, few(), 1);
    gone_midway(&Clip::agc(0.1), None, few(), 2);
}

#[test]
fn a_device_that_is_gone_midway_of_other_clips() {
    let by_column = norm().scope(Scope::Unit).unit_axis(UnitAxis::Last).grad_scale(3.0);
    let value = Clip::value(0.5);
    for (clip, bad, set, stride) in [
        (by_column.non_finite(NonFinite::Drop), f64::NAN, columns(), 4),
        (norm().non_finite(NonFinite::Propagate), f64::INFINITY, few(), 2),
        (norm().scope(Scope::Tensor).non_finite(NonFinite::Propagate), f64::NAN, few(), 2),
        (value, f64::INFINITY, few(), 2),
        (value.non_finite(NonFinite::Zero), f64::NAN, few(), 2),
    ] {
        gone_midway(&clip, Some(bad), set, stride);
    }
}

/// The same bits, but that one NaN is as good as another.
#[track_caller]
fn assert_same_values(got: &[Data], want: &[Data], what: &str) {
    let mut got = got.to_vec();
    for (got, want) in got.iter_mut().zip(want) {
        for i in 0..got.len() {
            if got.get(i).is_nan() && want.get(i).is_nan() {
                got.set_bits(i, want.bits(i));
            }
        }
    }
    assert_same_bits(&got, want, what);
}

/// A future that is dropped while clipped gradients come back leaves all of them clipped, and one dropped before none.
#[test]
fn a_dropped_future_leaves_no_half() {
    let gpu = small().with_memory_budget(LOAD);
    let set = units();
    let (_, clipped) = clip_host(&Clipper::gpu(gpu.clone()), &norm(), &set).ok();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    for (word, want) in [("gone to", &set), ("come back", &clipped)] {
        let dropped = (0..20).any(|_| {
            let mut after = set.clone();
            let given = set.clone();
            let parameters = parameters(&given);
            let mut tensors = views_mut(&mut after, &parameters);
            let clip = norm();
            let mut future = Box::pin(gpu.apply(&clip, &mut tensors));
            let seen = std::rc::Rc::new(std::cell::Cell::new(false));
            let told = std::rc::Rc::clone(&seen);
            let (pending, _) = heard(
                move |line| told.set(told.get() || line.contains(word)),
                || {
                    loop {
                        let ready = future.as_mut().poll(&mut context).is_ready();
                        if ready || seen.get() {
                            break !ready;
                        }
                    }
                },
            );
            drop(future);
            drop(tensors);
            if pending {
                assert_same_bits(&after, want, word);
            }
            pending
        });
        assert!(dropped, "never dropped after {word:?}");
    }
}

#[test]
fn futures_can_be_sent() {
    fn check<F: Future + Send>(_: F) {}
    let gpu = gpu();
    let mut grads = [3.0f32, 4.0];
    check(gpu.measure(&norm(), &[Tensor::new(&grads)]));
    check(gpu.apply(&norm(), &mut [TensorMut::new(&mut grads)]));
}

#[test]
fn awaited_on_any_executor() {
    let gpu = small().with_memory_budget(2 * LOAD);
    let set = units();
    let (want, clipped) = clip_host(&Clipper::gpu(gpu.clone()), &norm(), &set).ok();
    let mut after = set.clone();
    let report = block_on(gpu.apply(&norm(), &mut views_mut(&mut after, &[const { None }; 8]))).expect("finite");
    assert_eq!(report, want);
    assert_same_bits(&after, &clipped, "awaited");
    assert_eq!(block_on(gpu.measure(&norm(), &views(&set, &[const { None }; 8]))).expect("finite"), as_measured(want));
}

/// What no plan holds is refused before anything moves.
#[test]
fn more_than_a_plan_can_address() {
    let gpu = small().with_memory_budget(LOAD);
    let (mut rows, before) = (vec![1.0f32; 3000], vec![1.0f32; 3000]);
    let clip = norm().scope(Scope::Unit);
    let mut tensors = [TensorMut::new(&mut rows).shape(&[3000, 1]).expect("it fits")];
    let (error, lines) = heard(|_| {}, || Clipper::gpu(gpu.clone()).apply(&clip, &mut tensors));
    assert!(matches!(error, Err(Error::Limit(_))), "{error:?}");
    assert_eq!(rows, before);
    assert!(lines.iter().all(|line| !line.starts_with("load ")), "{lines:?}");
    // And a device that is gone from the start.
    let (device, queue) = device(small_limits());
    device.on_uncaptured_error(Arc::new(|_| {}));
    let gpu = GpuClipper::new(&device, &queue).expect("these limits suffice").with_memory_budget(LOAD);
    device.destroy();
    assert!(Clipper::gpu(gpu.clone()).apply(&norm(), &mut [TensorMut::new(&mut rows)]).is_err());
    assert!(Clipper::gpu(gpu).measure(&norm(), &[Tensor::new(&rows)]).is_err());
    assert_eq!(rows, before);
}

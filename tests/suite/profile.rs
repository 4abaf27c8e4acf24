//! Guards against a profile of another step than the one that ran, or of bytes that were not moved.
#![cfg(feature = "gpu")]

use crate::common::gpu::{block_on, clipper, device, download, gpu, gpu_tensor, shared, step, upload};
use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, assert_norm, assert_same_bits, assert_scaled};
use gradclip::gpu::{GpuClipper, GpuTensor, Pass, PlanOptions, Profile};
use gradclip::{Clip, Dtype, Error, NonFinite, NormType, Scope, wgpu};

const N: usize = 300_001;

fn normals(n: usize) -> Data {
    Data::of(&Random(7).normals(n, 1.0).iter().map(|x| *x as f32).collect::<Vec<_>>())
}

fn has_timestamps() -> bool {
    gpu().device().features().contains(wgpu::Features::TIMESTAMP_QUERY)
}

fn pass<'a>(profile: &'a Profile, name: &str) -> &'a Pass {
    let found = profile.passes.iter().find(|pass| pass.name == name);
    found.unwrap_or_else(|| panic!("no pass {name} in {profile:?}"))
}

/// Names in order, times positive, and a whole that is no less than its parts.
#[track_caller]
fn assert_ordered(profile: &Profile, names: &[&str], device_clock: bool) {
    assert_eq!(profile.passes.iter().map(|pass| pass.name).collect::<Vec<_>>(), names, "{profile:?}");
    assert_eq!(profile.device_clock, device_clock);
    assert!(profile.passes.iter().all(|pass| pass.seconds > 0.0 && pass.seconds < 60.0), "{profile:?}");
    let parts: f64 = profile.passes.iter().map(|pass| pass.seconds).sum();
    assert!(profile.seconds >= 0.999 * parts && profile.seconds < 60.0, "{parts}: {profile:?}");
}

/// Clippers, and whether the device's clock is theirs.
fn clocks() -> [(GpuClipper, bool); 2] {
    [(gpu().clone(), has_timestamps()), (shared(wgpu::Limits::default()), false)]
}

#[test]
fn a_profiled_step_is_a_step() {
    let set = normals(N);
    let norm = exact_norm(NormType::L2, set.numbers());
    let clip = Clip::norm(2.0).eps(0.0);
    for (gpu, clock) in clocks() {
        let normal = {
            let buffer = upload(&gpu, &set.bytes);
            let plan = gpu.plan(&clip, &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
            step(&gpu, &plan);
            (plan.report().wait().expect("finite"), download(&gpu, &buffer))
        };
        for whole in [false, true] {
            let buffer = upload(&gpu, &set.bytes);
            let plan = gpu.plan(&clip, &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
            let profile = if whole { plan.time().wait() } else { plan.profile().wait() }.expect("finite");
            let names: &[&str] = if whole { &["step"] } else { &["measure", "merge", "decide", "apply"] };
            assert_ordered(&profile, names, clock);
            assert_eq!(profile.reports, std::slice::from_ref(&normal.0));
            assert_norm(profile.reports[0].total_norm, norm, 1e-6, "profiled");
            let after = Data { bytes: download(&gpu, &buffer), ..set.clone() };
            assert_same_bits(
                std::slice::from_ref(&after),
                &[Data { bytes: normal.1.clone(), ..set.clone() }],
                "profiled",
            );
            assert_scaled(std::slice::from_ref(&set), &[after], 2.0 / norm, 1e-6, "profiled");
            // A report on a step that ran, and a next step that finds what this one left.
            assert_eq!(plan.report().wait().expect("finite"), normal.0);
            let again = plan.profile().wait().expect("finite");
            assert_norm(again.reports[0].total_norm, 2.0, 1e-5, "profiled again");
        }
    }
}

#[test]
fn bytes_are_those_that_must_move() {
    let set = normals(N);
    let bytes = set.bytes.len() as u64;
    let of = |clip: &Clip| {
        let buffer = upload(gpu(), &set.bytes);
        gpu().plan(clip, &[gpu_tensor(&buffer, &set, 0)]).expect("valid").profile().wait().expect("finite")
    };
    let clipped = of(&Clip::norm(1.0));
    assert_eq!((pass(&clipped, "measure").bytes, pass(&clipped, "apply").bytes), (bytes, 2 * bytes));
    assert_eq!((pass(&clipped, "merge").bytes, pass(&clipped, "decide").bytes), (0, 0));
    assert_eq!((pass(&clipped, "measure").kernels[0], pass(&clipped, "apply").kernels[0]), ("norm", "scale"));

    let unclipped = of(&Clip::norm(1e6));
    assert_eq!((pass(&unclipped, "measure").bytes, pass(&unclipped, "apply").bytes), (bytes, 0));
    let unscaled = of(&Clip::norm(1e6).grad_scale(2.0));
    assert_eq!(pass(&unscaled, "apply").bytes, 2 * bytes);

    let (inside, outside) = (Clip::value(1e6), Clip::value(0.5));
    assert_eq!((pass(&of(&inside), "measure").bytes, pass(&of(&outside), "measure").bytes), (bytes, 2 * bytes));
    let with_norm = of(&outside.report_norm(true));
    assert_eq!((pass(&with_norm, "measure").bytes, pass(&with_norm, "apply").bytes), (2 * bytes, 2 * bytes));
    // A first look decides for all elements here.
    let looked = of(&outside.non_finite(NonFinite::Zero));
    assert_eq!((pass(&looked, "measure").bytes, pass(&looked, "apply").bytes), (bytes, 2 * bytes));

    let buffer = upload(gpu(), &set.bytes);
    let plan = gpu().plan(&Clip::norm(1.0), &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
    assert_eq!(pass(&plan.time().wait().expect("finite"), "step").bytes, 3 * bytes);
}

#[test]
fn bytes_of_scopes_dtypes_and_jobs() {
    // 3 of 4 rows are scaled.
    let rows =
        Data::of(&(0..4000).map(|i| if i < 1000 { 1e-6f32 } else { 1.0 }).collect::<Vec<_>>()).shaped(&[4, 1000]);
    let buffer = upload(gpu(), &rows.bytes);
    let clip = Clip::norm(1.0).scope(Scope::Unit);
    let plan = gpu().plan(&clip, &[gpu_tensor(&buffer, &rows, 0)]).expect("valid");
    let profile = plan.profile().wait().expect("finite");
    assert_eq!((pass(&profile, "measure").bytes, pass(&profile, "apply").bytes), (16_000, 2 * 12_000));

    let half = Data::rounded(Dtype::BF16, (0..1001).map(f64::from));
    let halves = upload(gpu(), &half.bytes);
    let mixed = [gpu_tensor(&buffer, &rows, 0), gpu_tensor(&halves, &half, 0)];
    let profile = gpu().plan(&Clip::norm(1.0), &mixed).expect("valid").profile().wait();
    let profile = profile.expect("finite");
    assert_eq!((pass(&profile, "measure").bytes, pass(&profile, "apply").bytes), (18_002, 2 * 18_002));

    let measured = gpu().plan_with(&[(Clip::norm(1.0), &mixed)], PlanOptions::default().measure_only()).expect("valid");
    let profile = measured.profile().wait().expect("finite");
    assert!(profile.passes.iter().all(|pass| pass.name != "apply"), "{profile:?}");
    assert_eq!(pass(&profile, "measure").bytes, 18_002);

    let norms = upload(gpu(), &4f32.to_le_bytes());
    let norms = GpuTensor::f32(&norms, ..).expect("it fits");
    let scaled = gpu().plan_with(&[(Clip::norm(1.0), &mixed)], PlanOptions::default().norms(&norms)).expect("valid");
    let profile = scaled.profile().wait().expect("finite");
    assert_eq!((pass(&profile, "measure").bytes, pass(&profile, "apply").bytes), (0, 2 * 18_002));

    let sum = upload(gpu(), &[0; 4000]);
    let sum = GpuTensor::f32(&sum, ..).expect("it fits");
    let examples = Clip::norm(1.0).scope(Scope::Example);
    let summed = gpu().plan_with(&[(examples, &mixed[..1])], PlanOptions::default().sums(&[sum])).expect("valid");
    assert_eq!(pass(&summed.profile().wait().expect("finite"), "apply").bytes, 16_000 + 4000);
}

#[test]
fn nothing_to_clip_can_be_profiled() {
    for (gpu, clock) in clocks() {
        let profile = gpu.plan(&Clip::norm(1.0), &[]).expect("valid").profile().wait().expect("empty");
        assert_eq!((profile.device_clock, profile.reports[0].total_norm), (clock, 0.0));
        assert!(profile.passes.iter().all(|pass| pass.bytes == 0), "{profile:?}");
    }
}

#[test]
fn errors_come_back_as_from_a_step() {
    let bad = Data::of(&[1.0f32, f32::NAN, 2.0]);
    for (gpu, _) in clocks() {
        let buffer = upload(&gpu, &bad.bytes);
        let plan = gpu.plan(&Clip::norm(1.0), &[gpu_tensor(&buffer, &bad, 0)]).expect("valid");
        assert!(matches!(plan.profile().wait(), Err(Error::NonFinite(found)) if found.index == 1));
        assert_eq!(download(&gpu, &buffer), bad.bytes);

        buffer.destroy();
        let error = plan.profile().wait().expect_err("the buffer is gone");
        assert!(matches!(error, Error::Device(_)), "{error:?}");
    }
    let (lost, queue) = device(wgpu::Limits::default());
    let gpu = GpuClipper::new(&lost, &queue).expect("default limits suffice");
    let buffer = upload(&gpu, &bad.bytes);
    let plan = gpu.plan(&Clip::norm(1.0), &[gpu_tensor(&buffer, &bad, 0)]).expect("valid");
    lost.destroy();
    assert!(plan.profile().wait().is_err() && plan.time().wait().is_err() && gpu.speeds(1 << 20).wait().is_err());
}

#[test]
fn a_profile_can_be_awaited() {
    fn sendable<F: Future + Send>(future: F) -> F {
        future
    }
    let set = normals(1000);
    for (gpu, clock) in clocks() {
        let buffer = upload(&gpu, &set.bytes);
        let plan = gpu.plan(&Clip::norm(1.0), &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
        assert_eq!(block_on(sendable(plan.profile())).expect("finite").device_clock, clock);
        assert!(block_on(sendable(plan.time())).expect("finite").seconds > 0.0);
        assert_eq!(block_on(sendable(gpu.speeds(1 << 16))).expect("the device works").device_clock, clock);
    }
}

#[test]
fn speeds_are_of_what_was_moved_and_bounded_by_what_can_be_bound() {
    for (gpu, clock) in clocks() {
        // Odd sizes end within a share; small ones leave most workgroups without one.
        for (asked, moved) in [(0, 16), (17, 16), (1 << 20, 1 << 20), ((1 << 22) + 48, (1 << 22) + 48)] {
            let speeds = gpu.speeds(asked).wait().expect("the device works");
            assert_eq!((speeds.bytes, speeds.device_clock), (moved, clock));
            for speed in [speeds.copy, speeds.read] {
                assert!(speed > 0.0, "{speeds:?}");
            }
        }
    }
    let small = wgpu::Limits { max_storage_buffer_binding_size: 1 << 20, ..wgpu::Limits::downlevel_defaults() };
    assert_eq!(clipper(small).speeds(u64::MAX).wait().expect("the device works").bytes, 1 << 20);
}

/// By the rule in its documentation, at any speed of the copy.
#[test]
fn the_pass_that_holds_a_step_back_is_the_slowest_beyond_a_copy() {
    let set = normals(N);
    let buffer = upload(gpu(), &set.bytes);
    let plan = gpu().plan(&Clip::norm(2.0), &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
    let profile = plan.profile().wait().expect("finite");
    let shares: f64 = profile.passes.iter().map(|pass| profile.share(pass)).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{profile:?}");
    let mut speeds = gpu().speeds(1 << 20).wait().expect("right");
    let slowest = |of: &[&Pass]| of.iter().map(|pass| pass.seconds).fold(0.0, f64::max);
    speeds.copy = f64::INFINITY;
    let all: Vec<_> = profile.passes.iter().collect();
    assert_eq!(profile.held_back_by(&speeds).map(|pass| pass.seconds), Some(slowest(&all)));
    // So slow a copy excuses every pass that moves bytes.
    speeds.copy = f64::MIN_POSITIVE;
    let without: Vec<_> = profile.passes.iter().filter(|pass| pass.bytes == 0).collect();
    assert_eq!(profile.held_back_by(&speeds).map(|pass| pass.seconds), Some(slowest(&without)));
}

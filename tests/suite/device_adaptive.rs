//! Guards against a threshold on the device that drifts from the host's, forgets, or learns from a step that it should
//! ignore: runs of 1,000 steps with spikes, a NaN and an infinity.
#![cfg(feature = "gpu")]

use crate::common::gpu::{Interleaved, download, encoder, gpu, gpu_tensor, step, upload};
use crate::common::numbers::Random;
use crate::common::{Data, assert_norm, assert_same_bits, assert_says, assert_scaled};
use gradclip::gpu::{DeviceThreshold, GpuPlan, PlanOptions};
use gradclip::{AdaGc, Clip, ClipReport, Clipper, Dtype, Error, NonFinite, Scope, Threshold, ZClip};

/// How far the device's norms, coefficients and states may be from the host's.
const TOLERANCE: f64 = 1e-5;

/// The number of steps from one spike to the next.
const SPIKES: usize = 47;

/// A step with a NaN, one with an infinity, both in the warm-up of AdaGC, and the same again behind it.
const BAD: [(usize, f64); 4] = [(12, f64::NAN), (61, f64::INFINITY), (352, f64::NAN), (700, f64::NEG_INFINITY)];

/// What a run is of.
#[derive(Clone)]
struct Run {
    threshold: DeviceThreshold,
    policy: NonFinite,
    /// The clip's own threshold.
    max_norm: f64,
    grad_scale: f64,
    skip_above: f64,
    dtypes: [Dtype; 3],
    /// The size of the gradients, as they are stored.
    size: f64,
}

impl Run {
    fn zclip(policy: NonFinite) -> Self {
        Self::new(policy, DeviceThreshold::ZClip(ZClip::new()))
    }

    fn adagc(policy: NonFinite) -> Self {
        Self::new(policy, DeviceThreshold::AdaGc(AdaGc::new().lambda_abs(20.0)))
    }

    fn new(policy: NonFinite, threshold: DeviceThreshold) -> Self {
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::BF16];
        Self {
            threshold,
            policy,
            max_norm: f64::INFINITY,
            grad_scale: 1.0,
            skip_above: f64::INFINITY,
            dtypes,
            size: 1.0,
        }
    }

    fn clip(&self) -> Clip {
        let scope = if matches!(self.threshold, DeviceThreshold::ZClip(_)) { Scope::Global } else { Scope::Tensor };
        let clip = Clip::norm(self.max_norm).eps(0.0).grad_scale(self.grad_scale).skip_above(self.skip_above);
        clip.scope(scope).non_finite(self.policy)
    }

    /// The gradients of a step: their norms wander, each by itself, and some steps spike or are bad.
    fn gradients(&self, step: usize) -> Vec<Data> {
        let mut random = Random(step as u64);
        let spike = if step > 0 && step.is_multiple_of(SPIKES) { 40.0 } else { 1.0 };
        let wander = 1.0 + (step as f64 / 300.0).sin().abs();
        let mut tensor = |(name, n, dtype)| {
            let size = self.size * spike * wander * (0.2 * random.normal()).exp();
            Data::rounded(dtype, random.normals(n, size)).named(name)
        };
        let [a, b, c] = self.dtypes;
        let mut set: Vec<_> = [("w", 60, a), ("b", 7, b), ("empty", 0, a), ("head", 33, c)].map(&mut tensor).into();
        if let Some((_, bad)) = BAD.iter().find(|(at, _)| *at == step) {
            set[3].set(20, *bad);
        }
        set
    }

    fn plan(&self, placed: &Interleaved) -> GpuPlan {
        let views = placed.views(&[self.gradients(0)]).remove(0);
        gpu()
            .plan_with(&[(self.clip(), &views)], PlanOptions::default().threshold(self.threshold.clone()))
            .expect("valid")
    }

    fn placed(&self) -> Interleaved {
        Interleaved::new(gpu(), &[self.gradients(0)], |i| (i + 1) % 2)
    }

    /// A step of the host.
    fn on_host(&mut self, set: &[Data]) -> ClipReport {
        let clip = self.clip();
        let mut after = set.to_vec();
        let mut views: Vec<_> = after.iter_mut().map(Data::view_mut).collect();
        let threshold: &mut dyn Threshold = match &mut self.threshold {
            DeviceThreshold::ZClip(zclip) => zclip,
            DeviceThreshold::AdaGc(adagc) => adagc,
            other => panic!("{other:?}"),
        };
        Clipper::cpu().apply_adaptive(&clip, threshold, &mut views).expect("the policy goes on")
    }

    /// Runs this number of steps on both, and returns which were clipped.
    #[track_caller]
    fn check(mut self, steps: usize) -> Vec<usize> {
        let placed = self.placed();
        let plan = self.plan(&placed);
        let mut clipped = Vec::new();
        for number in 0..steps {
            let what = format!("{:?}, step {number}", self.threshold);
            let set = self.gradients(number);
            let bad = BAD.iter().any(|(at, _)| *at == number);
            // `Drop` measures the finite elements, and the threshold follows.
            let before = (bad && self.policy == NonFinite::Skip).then(|| state(&plan));
            placed.write(std::slice::from_ref(&set));
            step(gpu(), &plan);
            let report = plan.report().wait().expect("the policy goes on");
            let on_host = self.on_host(&set);
            compare_reports(&report, &on_host, &what);
            // The coefficients decide how the gradients end.
            let after = placed.read(std::slice::from_ref(&set)).remove(0);
            let refused = on_host.skipped.is_some();
            for (t, (before, after)) in set.iter().zip(&after).enumerate() {
                let mut finite = before.clone();
                (0..finite.len()).filter(|i| !before.get(*i).is_finite() && !refused).for_each(|i| finite.set(i, 0.0));
                let coef = on_host.segments.get(t).map_or(on_host.clip_coef, |segment| segment.clip_coef);
                let factor = coef / if refused { 1.0 } else { self.grad_scale };
                let (finite, after) = (std::slice::from_ref(&finite), std::slice::from_ref(after));
                if factor == 1.0 {
                    assert_same_bits(after, finite, &what);
                } else {
                    assert_scaled(finite, after, factor, TOLERANCE, &what);
                }
            }
            if let Some(before) = before {
                assert_eq!(state(&plan), before, "{what}: a bad step entered");
            }
            if number % 50 == 0 || bad || number == steps - 1 {
                compare_states(&state(&plan), &self.threshold, &what);
            }
            if report.clipped {
                clipped.push(number);
            }
        }
        clipped
    }
}

fn state(plan: &GpuPlan) -> DeviceThreshold {
    plan.threshold().wait().expect("the device works").expect("it has one")
}

/// Checks that a device's state is nearly the host's, by what both print, because the fields are private.
#[track_caller]
fn compare_states(device: &DeviceThreshold, host: &DeviceThreshold, what: &str) {
    let numbers = |state: &DeviceThreshold| -> Vec<f64> {
        let text = format!("{state:?}");
        text.split([' ', ',', '[', ']', '(', ')']).filter_map(|word| word.parse().ok()).collect()
    };
    let (got, want) = (numbers(device), numbers(host));
    assert!(got.len() == want.len() && want.len() >= 6, "{what}: {device:?}, {host:?}");
    for (got, want) in got.iter().zip(want) {
        assert_norm(*got, want, TOLERANCE, &format!("{what}: the state is {device:?}"));
    }
}

#[track_caller]
fn compare_reports(device: &ClipReport, host: &ClipReport, what: &str) {
    assert_norm(device.total_norm, host.total_norm, 1e-6, &format!("{what}, total"));
    assert_norm(device.clip_coef, host.clip_coef, TOLERANCE, &format!("{what}, clip_coef"));
    assert_eq!((device.elements, &device.non_finite), (host.elements, &host.non_finite), "{what}");
    assert_eq!(device.skipped, host.skipped, "{what}");
    assert_eq!(device.segments.len(), host.segments.len(), "{what}");
    for (device, host) in device.segments.iter().zip(&host.segments) {
        assert_norm(device.norm, host.norm, 1e-6, what);
        assert_norm(device.clip_coef, host.clip_coef, TOLERANCE, what);
        assert_eq!((device.tensor, device.clipped), (host.tensor, host.clipped), "{what}");
    }
    assert_eq!(device.clipped, host.clipped, "{what}");
}

fn spikes(steps: std::ops::Range<usize>) -> impl Iterator<Item = usize> {
    steps.filter(|step| step % SPIKES == 0)
}

#[test]
fn zclip_agrees_with_the_host_at_every_step() {
    for policy in [NonFinite::Skip, NonFinite::Drop] {
        let clipped = Run::zclip(policy).check(1000);
        assert!(spikes(26..1000).all(|step| clipped.contains(&step)), "{clipped:?}");
        assert!(clipped.len() < 250 && !clipped.contains(&0), "{clipped:?}");
    }
}

/// A spike is skipped, and the state goes on without it.
#[test]
fn zclip_skips_as_the_host_does() {
    for policy in [NonFinite::Skip, NonFinite::Drop] {
        let threshold = DeviceThreshold::ZClip(ZClip::new().skip_above_z(8.0));
        let clipped = Run { threshold, grad_scale: 4.0, ..Run::zclip(policy) }.check(200);
        assert!(!clipped.is_empty() && spikes(26..200).all(|step| !clipped.contains(&step)), "{clipped:?}");
    }
}

/// A clip's own limit keeps a spike from the state, too.
#[test]
fn adagc_does_not_follow_a_skipped_step() {
    let run = Run { skip_above: 60.0, ..Run::adagc(NonFinite::Skip) };
    let clipped = run.check(120);
    assert!(spikes(1..120).all(|step| !clipped.contains(&step)), "{clipped:?}");
}

#[test]
fn adagc_agrees_with_the_host_at_every_step() {
    for policy in [NonFinite::Skip, NonFinite::Drop] {
        let clipped = Run::adagc(policy).check(1000);
        // In the warm-up by the global norm, then by each tensor's own.
        assert!(spikes(1..1000).all(|step| clipped.contains(&step)), "{clipped:?}");
        assert!(!clipped.contains(&0) && clipped.len() < 1000, "{clipped:?}");
    }
}

/// Their squares, and the squares of their deviations, are no float32.
#[test]
fn norms_of_1e_30_and_1e30() {
    for size in [1e-30, 1e30] {
        for run in [Run::zclip(NonFinite::Skip), Run::adagc(NonFinite::Skip)] {
            let mut run = Run { size, dtypes: [Dtype::F32, Dtype::BF16, Dtype::F32], ..run };
            if let DeviceThreshold::AdaGc(adagc) = &mut run.threshold {
                *adagc = adagc.clone().warm_up(20).lambda_abs(20.0 * size);
            }
            let clipped = run.check(150);
            assert!(spikes(26..150).all(|step| clipped.contains(&step)), "{clipped:?}");
        }
    }
}

/// The loss scale is divided out before the threshold sees the norm.
#[test]
fn states_do_not_know_the_loss_scale() {
    for run in [Run::zclip(NonFinite::Drop), Run::adagc(NonFinite::Drop)] {
        // The numbers of a float16 would not do.
        let plain = Run { dtypes: [Dtype::F32, Dtype::BF16, Dtype::F32], ..run };
        let scaled = Run { grad_scale: 1024.0, size: 1024.0, ..plain.clone() };
        let clipped = [plain, scaled].map(|run| run.check(150));
        assert_eq!(clipped[0], clipped[1]);
    }
}

#[test]
fn the_clips_own_threshold_is_an_upper_bound() {
    for (run, max_norm) in [(Run::zclip(NonFinite::Skip), 9.0), (Run::adagc(NonFinite::Skip), 7.0)] {
        let clipped = Run { max_norm, ..run }.check(120);
        assert!(clipped.iter().any(|step| *step < 20), "the warm-up clips nothing of that size: {clipped:?}");
        assert!(clipped.len() < 120, "{clipped:?}");
    }
}

/// All steps in one submission: nothing waits for the host, and each step sees the state of the one before.
#[test]
fn a_run_in_one_encoder() {
    for mut run in [Run::zclip(NonFinite::Skip), Run::adagc(NonFinite::Skip)] {
        let steps = 130;
        let placed = run.placed();
        let plan = run.plan(&placed);
        let staged: Vec<_> = (0..steps)
            .map(|number| {
                placed.write(&[run.gradients(number)]);
                upload(gpu(), &download(gpu(), &placed.buffer))
            })
            .collect();
        let mut encoder = encoder(gpu());
        for gradients in &staged {
            encoder.copy_buffer_to_buffer(gradients, 0, &placed.buffer, 0, None);
            plan.encode(&mut encoder).expect("the device works");
        }
        gpu().queue().submit([encoder.finish()]);
        let last = (0..steps).map(|number| run.on_host(&run.gradients(number))).last();
        let on_host = last.expect("there are steps");
        compare_reports(&plan.report().wait().expect("finite"), &on_host, "the last step");
        compare_states(&state(&plan), &run.threshold, "after the last step");
    }
}

/// A checkpoint: through a file and into a new plan, in the warm-up and behind it. To the bit, since the state is small
/// enough for float64.
#[cfg(feature = "serde")]
#[test]
fn a_restored_run_goes_on_as_the_unbroken_one() {
    let text = |state: &DeviceThreshold| match state {
        DeviceThreshold::ZClip(zclip) => serde_json::to_string(zclip),
        DeviceThreshold::AdaGc(adagc) => serde_json::to_string(adagc),
        other => panic!("{other:?}"),
    };
    for run in [Run::zclip(NonFinite::Skip), Run::adagc(NonFinite::Skip)] {
        let breaks = [0, 10, 62, 200];
        let (placed, placed_again) = (run.placed(), run.placed());
        let unbroken = run.plan(&placed);
        let mut restored = run.plan(&placed_again);
        for number in 0..260 {
            if breaks.contains(&number) {
                let saved = text(&state(&restored)).expect("plain data");
                let loaded = match &run.threshold {
                    DeviceThreshold::ZClip(_) => serde_json::from_str(&saved).map(DeviceThreshold::ZClip),
                    _ => serde_json::from_str(&saved).map(DeviceThreshold::AdaGc),
                };
                let threshold = loaded.expect("just saved");
                assert_eq!(threshold, state(&restored));
                restored = Run { threshold, ..run.clone() }.plan(&placed_again);
                assert_eq!(state(&restored), state(&unbroken), "before the first step");
            }
            let set = [run.gradients(number)];
            for (placed, plan) in [(&placed, &unbroken), (&placed_again, &restored)] {
                placed.write(&set);
                step(gpu(), plan);
            }
            let report = |plan: &GpuPlan| format!("{:?}", plan.report().wait());
            assert_eq!(report(&restored), report(&unbroken), "step {number}, some norms are NaN, so by text");
        }
        assert_eq!(state(&restored), state(&unbroken));
        assert_same_bits(
            &placed_again.read(&[run.gradients(259)])[0],
            &placed.read(&[run.gradients(259)])[0],
            "restored",
        );
    }
}

/// The host and the device hand a run to each other.
#[test]
fn a_state_moves_between_host_and_device() {
    for mut run in [Run::zclip(NonFinite::Skip), Run::adagc(NonFinite::Skip)] {
        let mut on_host = run.clone();
        for number in 0..220 {
            on_host.on_host(&on_host.gradients(number));
            // By turns of 20 steps.
            if number / 20 % 2 == 0 {
                run.on_host(&run.gradients(number));
            } else {
                let placed = run.placed();
                let plan = run.plan(&placed);
                placed.write(&[run.gradients(number)]);
                step(gpu(), &plan);
                run.threshold = state(&plan);
            }
        }
        compare_states(&run.threshold, &on_host.threshold, "handed to and fro");
    }
}

#[test]
fn thresholds_that_do_not_fit() {
    let names = ["w", "b"].map(|name| Data::of(&[3.0f32, 4.0]).named(name));
    let buffer = upload(gpu(), &[0; 64]);
    let views: Vec<_> = names.iter().zip([0, 3]).map(|(t, at)| gpu_tensor(&buffer, t, at)).collect();
    let norm = Clip::norm(1.0);
    let by_tensor = norm.scope(Scope::Tensor);
    let plan = |clip: &Clip, threshold: &DeviceThreshold, views| {
        gpu().plan_with(&[(*clip, views)], PlanOptions::default().threshold(threshold.clone()))
    };
    let zclip = DeviceThreshold::ZClip(ZClip::new());
    let mut started = AdaGc::new();
    started.bind(&[r#"tensor "w""#, r#"tensor "b""#].map(String::from)).expect("any will do");
    started.max_norms(5.0, &[3.0, 4.0]);
    let adagc = DeviceThreshold::AdaGc(started);
    plan(&norm, &zclip, &views).expect("one norm");
    plan(&by_tensor, &adagc, &views).expect("the same tensors");

    let swapped = [views[1].clone(), views[0].clone()];
    for (clip, threshold, views, words) in [
        (by_tensor, &zclip, &views[..], &["ZClip follows one norm", "AdaGc"][..]),
        (norm.scope(Scope::Unit), &zclip, &views, &["ZClip follows one norm"]),
        (by_tensor, &zclip, &[], &["there is none"]),
        (norm, &adagc, &views, &[r#"where the state has tensor "w", the gradients have all tensors"#]),
        (by_tensor, &adagc, &swapped, &[r#"where the state has tensor "w", the gradients have tensor "b""#]),
        (by_tensor, &adagc, &views[..1], &[r#"the state has tensor "b", which the gradients lack"#]),
    ] {
        let error = plan(&clip, threshold, views).expect_err("unfit");
        assert!(matches!(error, Error::ThresholdState { .. }), "{error}");
        assert_says(&error, words);
    }
    for (threshold, words) in [
        (DeviceThreshold::ZClip(ZClip::new().warm_up(0)), "warm_up is 0; it must be 1 or more"),
        (DeviceThreshold::AdaGc(AdaGc::new().beta(1.0)), "beta is 1; it must be 0 or more and below 1"),
    ] {
        assert_says(&plan(&norm, &threshold, &views).expect_err("a bad setting"), &[words]);
    }
    for clip in [Clip::rms(1.0), Clip::average_norm(1.0), Clip::value(1.0)] {
        let error = plan(&clip, &zclip, &views).expect_err("no norm to follow");
        assert!(matches!(error, Error::Usage(_)), "{error}");
    }
    let with_parameters: Vec<_> = views.iter().map(|view| view.clone().parameter(view.clone())).collect();
    let error = plan(&Clip::agc(1.0), &zclip, &with_parameters).expect_err("AGC has its own");
    assert!(matches!(error, Error::Usage(_)), "{error}");
    let twice = [views[0].clone(), views[0].clone()];
    assert!(matches!(plan(&norm, &zclip, &twice), Err(Error::Tensor { .. })));
    // Any other plan has none.
    assert_eq!(gpu().plan(&norm, &views).expect("valid").threshold().wait().expect("the device works"), None);
}

//! Guards against an adaptive threshold that uses another norm than it was given, or learns from a step that it should
//! ignore: runs of 1,000 steps with spikes and a NaN.

use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::{AdaGc, AutoClip, Clip, ClipReport, Mode, NonFinite, NormType, Scope, TensorMut, Threshold, ZClip};

const NAN_STEP: usize = 61;
/// The number of steps from one spike to the next.
const SPIKES: usize = 47;

/// The steps of a run; a GPU that is software takes long over each.
fn steps(path: Path) -> usize {
    if path == Path::Cpu { 1000 } else { 150 }
}

/// The gradients of a step: their norms wander, with a spike now and then and one NaN.
fn gradients(path: Path, step: usize, random: &mut Random) -> Vec<Data> {
    let spike = if step > 0 && step.is_multiple_of(SPIKES) { 40.0 } else { 1.0 };
    let dtypes = path.dtypes();
    let tensor = |(i, (name, n)): (usize, (&str, usize))| {
        let size = spike * (0.2 * random.normal()).exp() * (1.0 + (step as f64 / 300.0).sin().abs());
        Data::rounded(dtypes[(step + i) % dtypes.len()], random.normals(n, size)).named(name)
    };
    let mut set: Vec<_> =
        [("w", 60), ("b", 7), ("empty", 0), ("head", 33)].into_iter().enumerate().map(tensor).collect();
    if step == NAN_STEP {
        set[3].set(20, f64::NAN);
    }
    set
}

/// One run: at each step the gradients must be scaled to what `by_hand` says of the norms that were reported, and the
/// states be the same. Returns which steps were clipped.
#[track_caller]
fn run<T: Threshold + Clone + PartialEq + std::fmt::Debug>(
    path: Path,
    clip: &Clip,
    mut threshold: T,
    labels: &[&str],
    norms_of: impl Fn(&ClipReport) -> Vec<f64>,
    max_norm: f64,
) -> Vec<usize> {
    let mut random = Random(101);
    let mut by_hand = threshold.clone();
    let labels: Vec<_> = labels.iter().map(|label| (*label).to_owned()).collect();
    let mut clipped = Vec::new();
    for step in 0..steps(path) {
        let set = gradients(path, step, &mut random);
        let what = format!("{path:?} {threshold:?}, step {step}");
        let before = threshold.clone();
        let mut after = set.clone();
        let mut views: Vec<_> = after.iter_mut().map(Data::view_mut).collect();
        let report = path.clipper().apply_adaptive(clip, &mut threshold, &mut views).expect("the policy goes on");
        if step == NAN_STEP {
            assert_eq!(threshold, before, "{what}");
            assert!(report.has_non_finite() && !report.clipped, "{what}");
            assert_same_bits(&after, &set, &what);
            continue;
        }
        let norms = norms_of(&report);
        by_hand.bind(&labels).expect("the same tensors");
        let max_norms = by_hand.max_norms(report.total_norm, &norms);
        assert_eq!(threshold, by_hand, "{what}");
        let coefs: Vec<_> = norms.iter().zip(&max_norms).map(|(n, t)| (t.min(max_norm) / n).min(1.0)).collect();
        // One for all tensors, or one each.
        for t in 0..set.len() {
            let coef = coefs[t.min(coefs.len() - 1)];
            let one = t..=t;
            if coef < 1.0 {
                assert_scaled(&set[one.clone()], &after[one], coef, path.norm_tolerance(), &what);
            } else {
                assert_same_bits(&after[one.clone()], &set[one], &what);
            }
        }
        let least = coefs.iter().copied().fold(1.0, f64::min);
        assert_norm(report.clip_coef, least, 2e-7, &what);
        assert_eq!(report.clipped, least < 1.0, "{what}");
        if report.clipped {
            clipped.push(step);
        }
    }
    clipped
}

fn measuring(clip: Clip) -> Clip {
    let clip = clip.non_finite(NonFinite::Skip);
    if let Mode::Norm(_) = clip.mode { clip.eps(0.0) } else { clip }
}

fn global(report: &ClipReport) -> Vec<f64> {
    vec![report.total_norm]
}

fn by_tensor(report: &ClipReport) -> Vec<f64> {
    report.segments.iter().map(|segment| segment.norm).collect()
}

const LABELS: [&str; 4] = [r#"tensor "w""#, r#"tensor "b""#, r#"tensor "empty""#, r#"tensor "head""#];

/// The steps with a spike from `from` on.
fn spikes(path: Path, from: usize) -> impl Iterator<Item = usize> {
    (from..steps(path)).filter(|step| step % SPIKES == 0)
}

#[test]
fn zclip_follows_the_reported_norms_and_clips_the_spikes() {
    for path in Path::HOST {
        for clip in [Clip::norm(f64::INFINITY), Clip::rms(f64::INFINITY), Clip::average_norm(f64::INFINITY)] {
            let clip = measuring(clip);
            let clipped = run(*path, &clip, ZClip::new(), &["all tensors"], global, f64::INFINITY);
            assert!(spikes(*path, 26).all(|step| clipped.contains(&step)), "{clipped:?}");
            assert!(clipped.len() < steps(*path) / 4, "{clipped:?}");
        }
    }
}

#[test]
fn autoclip_follows_the_reported_norms_and_clips_the_spikes() {
    for path in Path::HOST {
        let clip = measuring(Clip::norm(f64::INFINITY));
        let median = AutoClip::new().percentile(50.0).history(100);
        let clipped = run(*path, &clip, median, &["all tensors"], global, f64::INFINITY);
        assert!(spikes(*path, 2).all(|step| clipped.contains(&step)), "{clipped:?}");
        assert!((steps(*path) / 4..steps(*path) * 3 / 4).contains(&clipped.len()), "{}", clipped.len());
    }
}

#[test]
fn adagc_follows_the_norm_of_each_tensor() {
    for path in Path::HOST {
        let clip = measuring(Clip::norm(f64::INFINITY).scope(Scope::Tensor));
        for threshold in [AdaGc::new().warm_up(20), AdaGc::new().warm_up(90).lambda_abs(1e3)] {
            let clipped = run(*path, &clip, threshold, &LABELS, by_tensor, f64::INFINITY);
            assert!(spikes(*path, 91).all(|step| clipped.contains(&step)), "{clipped:?}");
        }
    }
}

/// The clip's own threshold holds too, from the first step on, and the state follows the norms as they were measured.
#[test]
fn the_clips_own_threshold_is_an_upper_bound() {
    for path in Path::HOST {
        let bound = 12.0;
        let clip = measuring(Clip::norm(bound));
        let clipped = run(*path, &clip, ZClip::new(), &["all tensors"], global, bound);
        assert!(clipped.iter().any(|step| *step < 25), "the warm-up clips nothing by itself: {clipped:?}");
    }
}

/// A loss scale is divided out before the threshold sees the norm.
#[test]
fn norms_are_followed_without_the_loss_scale() {
    for path in Path::HOST {
        let (mut plain, mut scaled) = (ZClip::new(), ZClip::new());
        let clip = measuring(Clip::norm(f64::INFINITY));
        let mut random = Random(102);
        for step in 0..NAN_STEP {
            let set = gradients(*path, step, &mut random);
            let mut scaled_set = set.clone();
            for t in &mut scaled_set {
                // A power of two, so that nothing is rounded.
                (0..t.len()).for_each(|i| t.set(i, t.get(i) * 4.0));
            }
            let apply = |clip: &Clip, threshold: &mut ZClip, set: &mut [Data]| {
                let mut views: Vec<_> = set.iter_mut().map(Data::view_mut).collect();
                path.clipper().apply_adaptive(clip, threshold, &mut views).expect("finite")
            };
            let norm = exact_norm(NormType::L2, numbers_of(&set));
            let report = apply(&clip, &mut plain, &mut set.clone());
            assert_norm(report.total_norm, norm, path.norm_tolerance(), "plain");
            let scaled_report = apply(&clip.grad_scale(4.0), &mut scaled, &mut scaled_set);
            assert_eq!(scaled_report.total_norm, report.total_norm);
        }
        assert_eq!(plain, scaled);
    }
}

/// `Drop` measures the finite elements.
#[test]
fn a_bad_step_leaves_the_state_unless_its_norm_is_finite() {
    for path in Path::HOST {
        for policy in [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop] {
            let clip = measuring(Clip::norm(f64::INFINITY)).non_finite(policy);
            let (mut z, mut auto, mut ada) = (ZClip::new(), AutoClip::new(), AdaGc::new().warm_up(3));
            let mut random = Random(103);
            for step in NAN_STEP - 30..NAN_STEP + 1 {
                let set = gradients(*path, step, &mut random);
                let before = (z.clone(), auto.clone(), ada.clone());
                for (scope, threshold) in [
                    (Scope::Global, &mut z as &mut dyn Threshold),
                    (Scope::Global, &mut auto),
                    (Scope::Tensor, &mut ada),
                ] {
                    let mut after = set.clone();
                    let mut views: Vec<_> = after.iter_mut().map(Data::view_mut).collect();
                    let report = path.clipper().apply_adaptive(&clip.scope(scope), threshold, &mut views);
                    assert_eq!(report.is_err(), step == NAN_STEP && policy == NonFinite::Error, "{policy:?}");
                }
                assert_eq!(
                    (z.clone(), auto.clone(), ada.clone()) == before,
                    step == NAN_STEP && policy != NonFinite::Drop,
                    "{policy:?}, step {step}"
                );
            }
        }
    }
}

/// A NaN in each step does not keep a threshold from its warm-up's end, and a spike from being clipped.
#[test]
fn a_run_with_a_nan_in_each_step_clips_the_spike_under_drop() {
    for path in Path::HOST {
        let clip = measuring(Clip::norm(f64::INFINITY)).non_finite(NonFinite::Drop);
        for (scope, threshold) in [
            (Scope::Global, &mut ZClip::new().warm_up(4) as &mut dyn Threshold),
            (Scope::Global, &mut AutoClip::new().percentile(50.0)),
            (Scope::Tensor, &mut AdaGc::new().warm_up(4).lambda_abs(10.0)),
        ] {
            for step in 0..8 {
                let norm = if step == 7 { 1.4e6 } else { [1.0f32, 2.0][step % 2] };
                let mut gradient = [norm, f32::NAN];
                let views = &mut [TensorMut::new(&mut gradient)];
                let report = path.clipper().apply_adaptive(&clip.scope(scope), threshold, views).expect("dropped");
                assert_norm(report.total_norm, norm.into(), path.norm_tolerance(), "the norm of the rest");
                assert!(report.has_non_finite() && gradient[1] == 0.0, "{report:?}");
                assert!(gradient[0] < 3.0, "{path:?} {scope:?}, step {step}: {}", gradient[0]);
            }
        }
    }
}

/// Gradients that lie on the device, and a threshold that lies on the host.
#[cfg(feature = "gpu")]
#[test]
fn a_threshold_on_the_host_follows_gradients_on_the_device() {
    let clip = measuring(Clip::norm(f64::INFINITY));
    for clip in [clip, clip.non_finite(NonFinite::Drop)] {
        follows_on_the_device(&clip);
    }
}

#[cfg(feature = "gpu")]
fn follows_on_the_device(clip: &Clip) {
    use crate::common::gpu::{Layout, download, encoder, gpu, upload, write};
    use gradclip::gpu::{DeviceThreshold, PlanOptions};
    use gradclip::{Dtype, Error, wgpu};
    let mut random = Random(104);
    let mut gradients = |step| {
        let mut set = [Data::rounded(Dtype::F32, random.normals(100, 1.0 + (step % 7) as f64))];
        if step == NAN_STEP / 2 {
            set[0].set(20, f64::NAN);
        }
        set
    };
    let shape = gradients(0);
    let layout = Layout::with_gaps(&shape, |_| 1);
    let buffer = upload(gpu(), &layout.bytes(&shape));
    let tensors = layout.tensors(&buffer, &shape);
    let plan = gpu().plan(clip, &tensors).expect("valid");
    let (mut on_device, mut by_hand) = (AutoClip::new(), AutoClip::new());
    for step in 0..60 {
        let set = gradients(step);
        write(gpu(), &buffer, 0, &layout.bytes(&set));
        let submit = |record: &dyn Fn(&mut wgpu::CommandEncoder)| {
            let mut encoder = encoder(gpu());
            record(&mut encoder);
            gpu().queue().submit([encoder.finish()]);
        };
        submit(&|e| plan.encode_measure(e).expect("the device works"));
        plan.follow(&mut on_device).wait().expect("one norm");
        submit(&|e| plan.encode_scale(e).expect("the device works"));
        let after = layout.taken_from(&download(gpu(), &buffer), &set);
        let report = plan.report().wait().expect("it ran");
        let max_norm = by_hand.max_norm(report.total_norm);
        assert_eq!(on_device, by_hand, "step {step}");
        // 1 for a NaN.
        let coef = (max_norm / report.total_norm).min(1.0);
        let mut set = set;
        if clip.non_finite == NonFinite::Drop && report.has_non_finite() {
            set[0].set(20, 0.0);
        }
        if coef < 1.0 {
            assert_scaled(&set, &after, coef, 1e-6, &format!("step {step}"));
        } else {
            assert_same_bits(&after, &set, &format!("step {step}"));
        }
    }
    let of_the_device = PlanOptions::default().threshold(DeviceThreshold::ZClip(ZClip::new()));
    for other in [gpu().plan(&Clip::value(1.0), &tensors), gpu().plan_with(&[(*clip, &tensors)], of_the_device)] {
        let followed = other.expect("valid").follow(&mut on_device).wait();
        assert!(matches!(followed, Err(Error::Usage(_))), "{followed:?}");
    }
}

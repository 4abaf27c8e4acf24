//! Guards against answers that depend on timing, threads or what ran before: the same input gives the same bits.

use crate::common::numbers::Random;
use crate::common::reference::{Asked, Mode, SCOPES, uneven};
use crate::common::{Data, Path, assert_same_bits};
use gradclip::{Clip, ClipReport, Dtype, NonFinite, NormType};

/// Long and short tensors of all dtypes of the path.
fn set(path: Path) -> Vec<Data> {
    let mut random = Random(41);
    let mut set = Vec::new();
    for (i, n) in [700_001, 5, 131_073, 0, 40_000].into_iter().chain((0..500).map(|i| i % 40)).enumerate() {
        let spread = random.normal();
        set.push(Data::rounded(path.dtypes()[i % path.dtypes().len()], random.normals(n, spread.exp())));
    }
    set
}

fn clips() -> Vec<Clip> {
    let norm = |norm_type| Clip::norm(0.3).norm_type(norm_type);
    let value = Clip::value(0.4).grad_scale(1.7);
    vec![norm(NormType::L2), norm(NormType::L1), norm(NormType::Inf), value, value.non_finite(NonFinite::Error)]
}

#[test]
fn twenty_repeats_give_the_same_bits() {
    for path in Path::ALL {
        let set = set(*path);
        for (c, clip) in clips().iter().enumerate() {
            let (first_report, first) = path.clip(clip, &set).ok();
            for _ in 1..if c == 0 { 20 } else { 5 } {
                let (report, after) = path.clip(clip, &set).ok();
                assert_same_bits(&after, &first, &format!("{path:?} {clip:?}"));
                assert_eq!(report.total_norm.to_bits(), first_report.total_norm.to_bits());
                assert_eq!(report.clip_coef.to_bits(), first_report.clip_coef.to_bits());
            }
        }
    }
}

/// Scopes cut tensors in other pieces than the global norm: they too must not depend on the number of threads.
#[test]
fn every_number_of_threads_gives_the_same_bits() {
    let set = set(Path::Cpu);
    let mut random = Random(70);
    let shapes: [(Dtype, &[usize]); 4] =
        [(Dtype::F32, &[640, 2049]), (Dtype::F16, &[640, 3]), (Dtype::F64, &[640]), (Dtype::BF16, &[640, 129])];
    let shaped = shapes.map(|(dtype, shape)| uneven(dtype, shape, &mut random));
    let scoped = |(scope, axis, budget)| Asked { scope, axis, budget, ..Asked::new(Mode::Norm, 1.0) }.clip();
    let of_scopes = SCOPES.into_iter().map(|of| (scoped(of), &shaped[..]));
    let cases: Vec<_> = clips().into_iter().map(|clip| (clip, &set[..])).chain(of_scopes).collect();
    let mut first: Vec<(ClipReport, Vec<Data>)> = Vec::new();
    for threads in [1, 2, 3, 5, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        for (i, (clip, set)) in cases.iter().enumerate() {
            let done = pool.install(|| Path::Cpu.clip(clip, set)).ok();
            assert!(done.0.clipped, "{clip:?}: a clip that never clips tests nothing");
            let Some((report, after)) = first.get(i) else {
                first.push(done);
                continue;
            };
            // By text: a value clip has no norm, which is NaN.
            assert_eq!(format!("{:?}", done.0), format!("{report:?}"), "{threads} threads, {clip:?}");
            assert_same_bits(&done.1, after, &format!("{threads} threads, {clip:?}"));
        }
    }
}

#[cfg(feature = "gpu")]
mod plans {
    use super::*;
    use crate::common::assert_norm;
    use crate::common::gpu::{Layout, download, encoder, gpu, step, upload, write};
    use crate::common::numbers::exact_norm;
    use crate::common::numbers_of;
    use gradclip::gpu::{GpuPlan, GpuTensor, PlanOptions};
    use gradclip::{Error, Scope};

    /// A plan that halves a tensor at each step, without ever clipping it.
    fn halving() -> (Data, wgpu::Buffer, GpuPlan) {
        let set = Data::of(&Random(1).normals(10_001, 1.0).iter().map(|x| *x as f32).collect::<Vec<_>>());
        let buffer = upload(gpu(), &set.bytes);
        let clip = Clip::norm(f64::MAX).grad_scale(2.0);
        let plan = gpu().plan(&clip, &[crate::common::gpu::gpu_tensor(&buffer, &set, 0)]).expect("valid");
        (set, buffer, plan)
    }

    #[track_caller]
    fn assert_halved(buffer: &wgpu::Buffer, set: &Data, times: i32) {
        let mut want = set.clone();
        for i in 0..want.len() {
            let x = want.get(i) * 2f64.powi(-times);
            want.set(i, x);
        }
        let got = Data { bytes: download(gpu(), buffer), ..set.clone() };
        assert_same_bits(&[got], &[want], &format!("halved {times} times"));
    }

    #[test]
    fn fifty_steps_in_one_encoder() {
        let (set, buffer, plan) = halving();
        let mut encoder = encoder(gpu());
        for _ in 0..50 {
            plan.encode(&mut encoder).expect("the device works");
        }
        gpu().queue().submit([encoder.finish()]);
        assert_halved(&buffer, &set, 50);
        let report = plan.report().wait().expect("it ran");
        let norm = exact_norm(NormType::L2, set.numbers()) * 2f64.powi(-50);
        assert_norm(report.total_norm, norm, 1e-6, "the last step's");
        assert!(!report.clipped);
    }

    #[test]
    fn fifty_steps_in_encoders_of_their_own() {
        let (set, buffer, plan) = halving();
        let norm = exact_norm(NormType::L2, set.numbers());
        for i in 1..=50 {
            step(gpu(), &plan);
            if i % 7 == 0 {
                let report = plan.report().wait().expect("it ran");
                assert_norm(report.total_norm, norm * 2f64.powi(-i), 1e-6, "each step's");
            }
        }
        assert_halved(&buffer, &set, 50);
    }

    /// New gradients in the same buffers, step after step, as in training; some are clipped, some are not, some bad.
    #[test]
    fn steps_on_new_gradients() {
        let mut set = set(Path::GpuBuffers);
        let layout = Layout::with_gaps(&set, |i| i % 2);
        let buffer = upload(gpu(), &layout.bytes(&set));
        let clip = Clip::norm(30.0);
        let plan = gpu().plan(&clip, &layout.tensors(&buffer, &set)).expect("valid");
        let mut random = Random(6);
        for round in 0..12 {
            let size = [1e-3, 1.0, 1.0, 1e-2][round % 4];
            for t in &mut set {
                for i in 0..t.len() {
                    t.set(i, (random.uniform() - 0.5) * size);
                }
            }
            if round % 4 == 2 {
                set[2].set(77, f64::NAN);
            }
            write(gpu(), &buffer, 0, &layout.bytes(&set));
            step(gpu(), &plan);
            let after = layout.taken_from(&download(gpu(), &buffer), &set);
            let norm = exact_norm(NormType::L2, numbers_of(&set));
            match plan.report().wait() {
                Err(Error::NonFinite(found)) => {
                    assert_eq!((round % 4, found.count, found.tensor, found.index), (2, 1, 2, 77));
                    assert_same_bits(&after, &set, "refused");
                }
                Err(error) => panic!("{error}"),
                Ok(report) => {
                    assert_norm(report.total_norm, norm, 1e-6, "each step's");
                    assert_eq!((report.clipped, report.non_finite), (norm > 30.0, None), "round {round}");
                    if norm > 30.0 {
                        crate::common::assert_scaled(&set, &after, 30.0 / (norm + 1e-6), 1e-6, "clipped");
                    } else {
                        assert_same_bits(&after, &set, "unclipped");
                    }
                }
            }
        }
    }

    #[test]
    fn a_report_can_be_asked_for_twice() {
        let (_, _, plan) = halving();
        step(gpu(), &plan);
        let first = plan.report().wait().expect("it ran");
        assert_eq!(plan.report().wait().expect("it is still there"), first);
    }

    /// Whatever groups there are: one without segments is no step of its own.
    #[test]
    fn a_step_counts_once() {
        let buffer = upload(gpu(), &[0; 16]);
        let tensors = [GpuTensor::f32(&buffer, ..).expect("fits")];
        let by_tensor = Clip::norm(1.0).scope(Scope::Tensor);
        let plan = gpu()
            .plan_with(&[(by_tensor, &[]), (by_tensor, &tensors), (by_tensor, &[])], PlanOptions::default())
            .expect("valid");
        for _ in 0..2 {
            step(gpu(), &plan);
            plan.report().wait().expect("it ran");
            let mut pending = encoder(gpu());
            plan.encode(&mut pending).expect("the device works");
            assert!(matches!(plan.report().wait(), Err(Error::NotSubmitted)));
        }
    }

    #[test]
    fn no_report_before_a_step_has_run() {
        let (set, buffer, plan) = halving();
        assert!(matches!(plan.report().wait(), Err(Error::NotSubmitted)), "never encoded");
        let mut pending = encoder(gpu());
        plan.encode(&mut pending).expect("the device works");
        let error = plan.report().wait().expect_err("not submitted");
        assert!(matches!(error, Error::NotSubmitted));
        assert!(error.to_string().contains("submit"), "{error}");
        gpu().queue().submit([pending.finish()]);
        plan.report().wait().expect("it ran");
        // After a report: another step is encoded, and not submitted.
        let mut pending = encoder(gpu());
        plan.encode(&mut pending).expect("the device works");
        assert!(matches!(plan.report().wait(), Err(Error::NotSubmitted)));
        assert!(matches!(plan.report().wait(), Err(Error::NotSubmitted)), "asking does not change it");
        assert_halved(&buffer, &set, 1);
        gpu().queue().submit([pending.finish()]);
        plan.report().wait().expect("it ran");
        assert_halved(&buffer, &set, 2);
    }
}

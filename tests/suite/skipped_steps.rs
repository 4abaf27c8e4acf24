//! Guards against a step that is taken although its norm is too large, that is taken in part, or that is skipped
//! without a word.

use crate::common::numbers::Random;
use crate::common::reference::{Asked, Mode, SCOPES, uneven};
use crate::common::{Data, POLICIES, Path, assert_same_bits, assert_says};
use gradclip::{Clip, Clipper, Dtype, Error, NonFinite, NormAccumulator, NormType, Scope, Skipped, TensorMut, ZClip};

/// Tensors of all dtypes of a path, with their parameters.
fn set(path: Path) -> Vec<Data> {
    let mut random = Random(1);
    let shapes: [&[usize]; 5] = [&[6, 70], &[6], &[6, 0], &[6, 3, 3], &[6, 1]];
    let tensor = |(i, shape): (usize, &&[usize])| {
        let dtypes = path.dtypes();
        let parameter = uneven(Dtype::F32, shape, &mut random);
        uneven(dtypes[i % dtypes.len()], shape, &mut random).named(&format!("t{i}")).with_parameter(parameter)
    };
    shapes.iter().enumerate().map(tensor).collect()
}

#[test]
fn a_step_above_is_left_and_one_below_is_clipped() {
    for path in Path::ALL {
        let set = set(*path);
        for (scope, axis, budget) in SCOPES {
            for (mode, norm_type, grad_scale) in [
                (Mode::Norm, NormType::L2, 1.0),
                (Mode::Norm, NormType::L1, 8.0),
                (Mode::Norm, NormType::Inf, 0.3),
                (Mode::Norm, NormType::p(3.0), 1.0),
                (Mode::Rms, NormType::L2, 8.0),
                (Mode::AverageNorm, NormType::L2, 1.0),
                (Mode::Agc, NormType::L2, 8.0),
            ] {
                let asked = Asked { scope, axis, budget, norm_type, grad_scale, ..Asked::new(mode, 1.0) };
                let asked = asked.at_the_middle(&set);
                let norm = asked.expected(&set).total_norm;
                for (part, skipped) in [(0.0, Some(Skipped::Above)), (0.999, Some(Skipped::Above)), (1.001, None)] {
                    let asked = Asked { skip_above: part * norm, ..asked };
                    let expected = asked.check(*path, &set, "a set");
                    assert_eq!(expected.skipped, skipped, "{asked:?}");
                    if matches!(scope, Scope::Example | Scope::ExampleTensor) && *path != Path::ALL[Path::ALL.len() - 1]
                    {
                        asked.check_sums(*path, &set, "examples");
                    }
                }
            }
        }
    }
}

/// The norm that is reported is not above itself.
#[test]
fn an_equal_norm_is_not_above() {
    for path in Path::ALL {
        for set in [set(*path), vec![Data::of(&[3.0f32, 4.0])], vec![Data::of(&[0.0f32])]] {
            for clip in [Clip::norm(0.5), Clip::norm(0.5).norm_type(NormType::L1), Clip::norm(0.5).grad_scale(8.0)] {
                let (report, _) = path.clip(&clip, &set).ok();
                let (again, _) = path.clip(&clip.skip_above(report.total_norm), &set).ok();
                assert_eq!(format!("{again:?}"), format!("{report:?}"), "{path:?} {clip}");
            }
        }
    }
}

/// Zero gradients are above nothing.
#[test]
fn what_is_not_finite_follows_its_policy_first() {
    for path in Path::ALL {
        let mut set = set(*path);
        set[0].set(5, f64::NAN);
        for policy in POLICIES {
            let asked = Asked { policy, skip_above: 0.0, ..Asked::new(Mode::Norm, 0.5) };
            let expected = asked.check(*path, &set, "a NaN");
            let skipped = match policy {
                NonFinite::Error | NonFinite::Skip => Some(Skipped::NonFinite),
                // The norm of the rest.
                NonFinite::Drop => Some(Skipped::Above),
                _ => None,
            };
            assert_eq!(expected.skipped, skipped, "{path:?} {policy:?}");
        }
    }
}

/// A norm of float64 that exceeds float64 is above every number.
#[test]
fn a_norm_that_exceeds_float64_is_above() {
    let set = [Data::of(&[f64::MAX; 4])];
    let (report, after) = Path::Cpu.clip(&Clip::norm(1.0).skip_above(f64::MAX), &set).ok();
    assert_eq!((report.total_norm, report.skipped), (f64::INFINITY, Some(Skipped::Above)));
    assert_same_bits(&after, &set, "skipped");
    assert_eq!(Path::Cpu.clip(&Clip::norm(1.0), &set).ok().0.skipped, None);
}

/// One group above leaves all, a value clip of one pass too.
#[test]
fn one_group_above_skips_the_step_of_all() {
    for path in Path::HOST {
        for (spike, skipped) in [(300.0f32, Some(Skipped::Above)), (30.0, None)] {
            for turn in [[0, 1, 2], [2, 1, 0]] {
                let before = [[3.0f32, 4.0], [spike, f32::MIN_POSITIVE], [9.0, -9.0]];
                let mut after = before;
                let mut views = after.each_mut().map(|of| TensorMut::new(of));
                let clips = [Clip::norm(1.0), Clip::norm(1.0).skip_above(100.0), Clip::value(1.0)];
                let clips = clips.map(|clip| clip.non_finite(NonFinite::Drop));
                let mut groups: Vec<_> = clips.into_iter().zip(views.chunks_mut(1)).collect();
                groups
                    .sort_by_key(|(clip, _)| turn[clips.iter().position(|other| other == clip).expect("one of them")]);
                let reports = path.clipper().apply_groups(&mut groups).expect("finite");
                assert!(reports.iter().all(|report| report.skipped == skipped), "{path:?}: {reports:?}");
                assert_eq!(after == before, skipped.is_some(), "{path:?}: {after:?}");
                assert!(reports.iter().all(|report| report.clipped == skipped.is_none()), "{path:?}: {reports:?}");
            }
        }
    }
}

#[test]
fn pieces_and_running_partials_are_skipped_whole() {
    let set = [Data::of(&[3.0f32, 4.0])];
    for (limit, skipped) in [(4.9, Some(Skipped::Above)), (5.1, None)] {
        let clip = Clip::norm(1.0).skip_above(limit);
        let decided = Clipper::cpu().decide(&clip, &[set[0].view()]).expect("finite");
        assert_eq!(decided.report().skipped, skipped);
        assert_eq!(decided.is_unchanged(0, 0..2).expect("within"), skipped.is_some());
        let mut running = NormAccumulator::new(&clip).expect("a global norm");
        Clipper::cpu().accumulate(&mut running, &[set[0].view()]).expect("open");
        assert_eq!(running.report().expect("finite").skipped, skipped);
        let mut after = set.clone();
        let report = Clipper::cpu().finish(&running, &mut [after[0].view_mut()]).expect("finite");
        assert_eq!((report.skipped, after[0].bytes == set[0].bytes), (skipped, skipped.is_some()));
    }
}

/// By the running norms, which a skipped step does not enter, beside a fixed threshold.
#[test]
fn a_z_score_skips_and_leaves_the_state() {
    for path in Path::HOST {
        let clip = Clip::norm(1.5).eps(0.0);
        let mut threshold = ZClip::new().warm_up(4).z_threshold(f64::MAX).skip_above_z(3.0);
        for norm in [1.0f32, 3.0, 1.0, 3.0, 2.5, 100.0, 100.0, 2.0] {
            let before = threshold.clone();
            let mut gradient = [norm, 0.0];
            let views = &mut [TensorMut::new(&mut gradient)];
            let report = path.clipper().apply_adaptive(&clip, &mut threshold, views).expect("finite");
            let skipped = norm == 100.0;
            assert_eq!((report.skipped, threshold == before), (skipped.then_some(Skipped::Above), skipped), "{norm}");
            assert_eq!(gradient[0] == norm, skipped || norm == 1.0, "{path:?} {norm}: {gradient:?}");
        }
    }
}

#[test]
fn what_cannot_be_compared_is_an_error() {
    let mut gradient = [3.0f32];
    for (clip, words) in [
        (Clip::norm(1.0).skip_above(f64::NAN), "skip_above is NaN; it must be 0 or more"),
        (Clip::rms(1.0).skip_above(-1.0), "skip_above is -1; it must be 0 or more"),
        (Clip::value(1.0).skip_above(1.0), "skip_above is 1; a value clip measures no norm to compare it with"),
    ] {
        let error = Clipper::cpu().apply(&clip, &mut [TensorMut::new(&mut gradient)]).expect_err(words);
        assert!(matches!(error, Error::Setting { .. }), "{error}");
        assert_says(&error, &[words]);
    }
    let clip = Clip::norm(1.0).skip_above(1.0);
    assert_eq!(clip.to_string(), "norm 1 (L2), skip_above 1");
    let error = Clipper::cpu().scale(&clip, &[3.0], &mut [TensorMut::new(&mut gradient)]).expect_err("given");
    assert_says(&error, &["skip_above needs a norm that is measured here"]);
}

#[cfg(feature = "gpu")]
mod on_the_device {
    use super::*;
    use crate::common::gpu::{Interleaved, download, encoder, gpu, step, upload, write};
    use gradclip::gpu::{GpuTensor, PlanOptions};

    /// No report is asked for: the coefficients of a caller's own kernel say so too, and the next step is taken.
    #[test]
    fn groups_of_a_plan_are_skipped_step_by_step() {
        let clips = [Clip::norm(1.0), Clip::norm(1.0).skip_above(100.0), Clip::value(1.0)];
        let of = |size: f32| [[3.0, 4.0], [size, 0.0], [9.0, -9.0]].map(|x| vec![Data::of(&x)]);
        let placed = Interleaved::new(gpu(), &of(1.0), |i| i % 2);
        let views = placed.views(&of(1.0));
        for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1]] {
            let clips = order.map(|i| (clips[i].non_finite(NonFinite::Drop), &views[i][..]));
            let plan = gpu().plan_with(&clips, PlanOptions::default()).expect("valid");
            for (size, skipped) in [(30.0, false), (300.0, true), (400.0, true), (30.0, false)] {
                placed.write(&of(size));
                step(gpu(), &plan);
                let after = placed.read(&of(size));
                for (before, after) in of(size).iter().zip(&after) {
                    assert_eq!(before[0].bytes == after[0].bytes, skipped, "{order:?} {size}: {after:?}");
                }
                let coefficients = download(gpu(), plan.coefficients());
                assert_eq!(coefficients[..4], u32::from(skipped).to_le_bytes());
                assert!(!skipped || coefficients[4..16] == [1f32; 3].map(f32::to_le_bytes).concat());
                let reports = plan.reports().wait().expect("finite");
                let wanted = skipped.then_some(Skipped::Above);
                assert!(reports.iter().all(|report| report.skipped == wanted), "{reports:?}");
            }
        }
    }

    /// The limit is on N, so another loss scale moves it, and another threshold does not.
    #[test]
    fn a_limit_stays_when_a_plans_numbers_change() {
        let buffer = upload(gpu(), bytemuck::cast_slice(&[3.0f32, 4.0]));
        let views = [GpuTensor::f32(&buffer, ..).expect("it fits")];
        let clip = Clip::norm(f64::INFINITY).skip_above(6.0);
        let mut plan = gpu().plan(&clip, &views).expect("valid");
        let mut skipped = |change: &dyn Fn(&mut gradclip::gpu::GpuPlan) -> Result<(), Error>| {
            change(&mut plan).expect("valid");
            let mut encoder = encoder(gpu());
            plan.encode_measure(&mut encoder).expect("the device works");
            gpu().queue().submit([encoder.finish()]);
            plan.report().wait().expect("finite").skipped
        };
        assert_eq!(skipped(&|_| Ok(())), None);
        assert_eq!(skipped(&|plan| plan.set_grad_scale(0.5)), Some(Skipped::Above));
        assert_eq!(skipped(&|plan| plan.set_max_norm(1.0)), Some(Skipped::Above));
        assert_eq!(skipped(&|plan| plan.set_grad_scale(2.0)), None);
        let given = PlanOptions::default().norms(&views[0]);
        let error = gpu().plan_with(&[(clip, &views)], given).expect_err("given");
        assert_says(&error, &["skip_above needs a norm that is measured here"]);
    }

    #[test]
    fn a_plan_that_follows_a_threshold_on_the_host_skips_by_it() {
        let buffer = upload(gpu(), &[0; 8]);
        let views = [GpuTensor::f32(&buffer, ..).expect("it fits")];
        let plan = gpu().plan(&Clip::norm(1.5).skip_above(f64::MAX), &views).expect("valid");
        let mut threshold = ZClip::new().warm_up(4).z_threshold(f64::MAX).skip_above_z(3.0);
        for norm in [1.0f32, 3.0, 1.0, 3.0, 2.5, 100.0, 100.0, 2.0] {
            write(gpu(), &buffer, 0, bytemuck::cast_slice(&[norm, 0.0]));
            let submit = |record: &dyn Fn(&mut wgpu::CommandEncoder)| {
                let mut encoder = encoder(gpu());
                record(&mut encoder);
                gpu().queue().submit([encoder.finish()]);
            };
            let before = threshold.clone();
            submit(&|e| plan.encode_measure(e).expect("the device works"));
            plan.follow(&mut threshold).wait().expect("one norm");
            submit(&|e| plan.encode_scale(e).expect("the device works"));
            let skipped = norm == 100.0;
            let report = plan.report().wait().expect("finite");
            assert_eq!((report.skipped, threshold == before), (skipped.then_some(Skipped::Above), skipped), "{norm}");
            let after: f32 = bytemuck::pod_read_unaligned(&download(gpu(), &buffer)[..4]);
            assert_eq!(after == norm, skipped || norm == 1.0, "{norm}: {after}");
        }
        let plan = gpu().plan(&Clip::norm(1.5), &views).expect("valid");
        step(gpu(), &plan);
        let error = plan.follow(&mut threshold).wait().expect_err("it decides by no limit");
        assert_says(&error, &["skip_above; f64::MAX will do"]);
    }

    #[test]
    fn a_running_norm_skips_all_its_sets() {
        let clip = Clip::norm(1.0).skip_above(4.5);
        let running = gpu().accumulator(&clip).expect("a global norm");
        let buffers = [3.0f32, 4.0].map(|x| upload(gpu(), &x.to_le_bytes()));
        let sets = buffers
            .each_ref()
            .map(|buffer| running.plan(&[GpuTensor::f32(buffer, ..).expect("it fits")]).expect("valid"));
        for (used, skipped) in [(2, true), (1, false), (2, true)] {
            let mut encoder = encoder(gpu());
            sets[..used].iter().for_each(|set| set.accumulate(&mut encoder).expect("the device works"));
            running.finish(&mut encoder).expect("the device works");
            gpu().queue().submit([encoder.finish()]);
            assert_eq!(running.report().wait().expect("finite").skipped, skipped.then_some(Skipped::Above));
            assert_eq!(download(gpu(), running.coefficients())[0], u8::from(skipped));
        }
        let mut encoder = encoder(gpu());
        sets.iter().for_each(|set| set.scale(&mut encoder).expect("the device works"));
        gpu().queue().submit([encoder.finish()]);
        assert_eq!(download(gpu(), &buffers[0]), 3f32.to_le_bytes());
    }
}

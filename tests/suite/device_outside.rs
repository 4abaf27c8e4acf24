//! Guards against a clip on the device that changes when its parts run alone: the norm without the scaling, the scaling
//! without the norm, or a norm that is measured set by set.
#![cfg(feature = "gpu")]

use crate::common::gpu::{Interleaved, OwnKernel, download, encoder, gpu, gpu_tensor, step, upload};
use crate::common::numbers::Random;
use crate::common::reference::{Asked, Mode, SCOPES, uneven};
use crate::common::{
    Data, Done, POLICIES, Path, assert_norm, assert_same_bits, assert_says, assert_scaled, numbers_of,
};
use gradclip::gpu::{GpuAccumulatorPlan, GpuNormAccumulator, GpuTensor, PlanOptions};
use gradclip::{Clip, ClipReport, Dtype, Error, NonFinite, NormType, Scope};

const MODES: [(Mode, NormType); 4] = [
    (Mode::Norm, NormType::L2),
    (Mode::Norm, NormType::Inf),
    (Mode::Rms, NormType::L2),
    (Mode::AverageNorm, NormType::L2),
];

fn set(seed: u64) -> Vec<Data> {
    let mut random = Random(seed);
    let shapes: [&[usize]; 5] = [&[5, 7], &[5], &[5, 67], &[5, 0], &[5, 3, 3]];
    let tensor = |(i, shape): (usize, &&[usize])| {
        let dtype = Path::GpuBuffers.dtypes()[(seed as usize + i) % 3];
        let parameter = uneven(Dtype::F32, shape, &mut random);
        uneven(dtype, shape, &mut random).named(&format!("t{i}")).with_parameter(parameter)
    };
    shapes.iter().enumerate().map(tensor).collect()
}

fn in_one_buffer(sets: &[Vec<Data>]) -> Interleaved {
    Interleaved::new(gpu(), sets, |i| (i + 1) % 2)
}

/// `skip`, and `count` factors.
fn coefficients(buffer: &wgpu::Buffer, count: usize) -> (u32, Vec<f64>) {
    let bytes = download(gpu(), buffer);
    let factors: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes[4..4 + 4 * count]);
    (bytemuck::pod_read_unaligned(&bytes[..4]), factors.into_iter().map(f64::from).collect())
}

/// Checks the factors that the gradients of each segment should be multiplied by.
#[track_caller]
fn check_coefficients(buffer: &wgpu::Buffer, asked: &Asked, set: &[Data], what: &str) {
    let expected = asked.expected(set);
    let (skip, factors) = coefficients(buffer, expected.segments.len());
    assert_eq!(skip, u32::from(expected.refused()), "{what} {asked:?}");
    for (i, (got, want)) in factors.iter().zip(expected.factors()).enumerate() {
        assert_norm(*got, want, asked.tolerance(Path::GpuBuffers) + 1e-7, &format!("{what} {asked:?}: factor {i}"));
    }
}

#[test]
fn measuring_leaves_factors_and_writes_nothing() {
    let mut turn = 0;
    for (scope, axis, budget) in SCOPES {
        for (mode, norm_type) in MODES.into_iter().chain([(Mode::Agc, NormType::L2)]) {
            turn += 1;
            let sets = [set(turn)];
            let grad_scale = [1.0, 8.0, 0.3][turn as usize % 3];
            let asked = Asked { scope, axis, budget, norm_type, grad_scale, ..Asked::new(mode, 1.0) };
            let asked = asked.at_the_middle(&sets[0]);
            let placed = in_one_buffer(&sets);
            let views = &placed.views(&sets)[0];
            let measuring =
                gpu().plan_with(&[(asked.clip(), views)], PlanOptions::default().measure_only()).expect("valid");
            step(gpu(), &measuring);
            check_coefficients(measuring.coefficients(), &asked, &sets[0], "measured");
            assert_same_bits(&placed.read(&sets)[0], &sets[0], "measured only");
            // A clip leaves the same, and reports the same.
            let clipping = gpu().plan(&asked.clip(), views).expect("valid");
            step(gpu(), &clipping);
            check_coefficients(clipping.coefficients(), &asked, &sets[0], "clipped");
            let report = measuring.report().wait();
            assert_eq!(clipping.report().wait().expect("finite"), *report.as_ref().expect("finite"));
            asked.check_done(&Done { report, after: placed.read(&sets).remove(0) }, Path::GpuBuffers, &sets[0], "both");
        }
    }
}

#[test]
fn factors_follow_the_policy() {
    for policy in POLICIES {
        for (scope, axis, budget) in SCOPES {
            for bad in [f64::NAN, f64::INFINITY] {
                for grad_scale in [1.0, 4.0] {
                    let mut sets = [set(2)];
                    let asked = Asked { scope, axis, budget, policy, grad_scale, ..Asked::new(Mode::Norm, 1.0) };
                    let asked = asked.at_the_middle(&sets[0]);
                    let placed = in_one_buffer(&sets);
                    let plan = gpu()
                        .plan_with(&[(asked.clip(), &placed.views(&sets)[0])], PlanOptions::default().measure_only())
                        .expect("valid");
                    // With a bad element, and then without: `skip` must not stay.
                    for turn in 0..2 {
                        sets[0][2].set(70, if turn == 0 { bad } else { 1.0 });
                        placed.write(&sets);
                        step(gpu(), &plan);
                        check_coefficients(plan.coefficients(), &asked, &sets[0], &format!("{bad} {turn}"));
                        assert_same_bits(&placed.read(&sets)[0], &sets[0], "measured only");
                        assert_eq!(plan.report().wait().is_err(), turn == 0 && policy == NonFinite::Error);
                    }
                }
            }
        }
    }
}

/// Nothing is clipped, but the loss scale is divided out: by the plan, or by a kernel that multiplies by its factors.
#[test]
fn factors_under_an_infinite_threshold() {
    let sets = [set(3)];
    let placed = in_one_buffer(&sets);
    let clip = Clip::norm(f64::INFINITY).grad_scale(65536.0);
    for (options, factor) in [(PlanOptions::default().measure_only(), 1.0), (PlanOptions::default(), 1.0 / 65536.0)] {
        let plan = gpu().plan_with(&[(clip, &placed.views(&sets)[0])], options).expect("valid");
        step(gpu(), &plan);
        assert_eq!(coefficients(plan.coefficients(), 1), (0, vec![1.0 / 65536.0]));
        assert_scaled(&sets[0], &placed.read(&sets)[0], factor, 1e-7, "an infinite threshold");
    }
}

#[test]
fn an_infinite_threshold_of_one_group_unscales_it_on_the_device() {
    let sets = [set(3), set(4)];
    let placed = in_one_buffer(&sets);
    let views = placed.views(&sets);
    let groups = [(Clip::norm(1e9), &views[0][..]), (Clip::norm(f64::INFINITY), &views[1][..])];
    let groups = groups.map(|(clip, views)| (clip.grad_scale(65536.0), views));
    step(gpu(), &gpu().plan_with(&groups, PlanOptions::default()).expect("valid"));
    for (after, before) in placed.read(&sets).iter().zip(&sets) {
        assert_scaled(before, after, 1.0 / 65536.0, 1e-7, "groups");
    }
}

/// A value clip measures no norm; what it would do to each element is told, and not done.
#[test]
fn factors_of_a_value_clip() {
    for policy in POLICIES {
        for bad in [false, true] {
            let mut sets = [set(3)];
            if bad {
                sets[0][0].set(0, f64::NAN);
            }
            let placed = in_one_buffer(&sets);
            let clip = Clip::value(0.1).non_finite(policy).grad_scale(4.0);
            let plan = gpu()
                .plan_with(&[(clip, &placed.views(&sets)[0])], PlanOptions::default().measure_only())
                .expect("valid");
            step(gpu(), &plan);
            assert_same_bits(&placed.read(&sets)[0], &sets[0], "measured only");
            let refused = bad && matches!(policy, NonFinite::Error | NonFinite::Skip);
            let factor = match policy {
                NonFinite::Zero if bad => 0.0,
                _ if refused => 1.0,
                _ => 0.25,
            };
            assert_eq!(coefficients(plan.coefficients(), 1), (refused.into(), vec![factor]), "{policy:?} {bad}");
            match plan.report().wait() {
                Ok(report) => assert!(report.clipped != refused && report.has_non_finite() == bad, "{policy:?}"),
                Err(error) => assert!(refused && matches!(error, Error::NonFinite(_)), "{error}"),
            }
        }
    }
}

/// Behind one another, in the order of the groups.
#[test]
fn factors_of_groups() {
    let sets = [set(4), set(5), set(6)];
    let scopes = [Scope::Tensor, Scope::Global, Scope::Example];
    let asked: Vec<_> = scopes
        .iter()
        .zip(&sets)
        .map(|(s, set)| Asked { scope: *s, ..Asked::new(Mode::Norm, 1.0) }.at_the_middle(set))
        .collect();
    let placed = in_one_buffer(&sets);
    let views = placed.views(&sets);
    let groups: Vec<_> = asked.iter().zip(&views).map(|(asked, views)| (asked.clip(), &views[..])).collect();
    let plan = gpu().plan_with(&groups, PlanOptions::default()).expect("valid");
    step(gpu(), &plan);
    let want: Vec<_> = asked.iter().zip(&sets).flat_map(|(asked, set)| asked.expected(set).factors()).collect();
    let (skip, got) = coefficients(plan.coefficients(), want.len());
    assert_eq!((skip, got.len()), (0, 5 + 1 + 5));
    for (got, want) in got.iter().zip(&want) {
        assert_norm(*got, *want, 1e-6, "factors of groups");
    }
}

/// What a plan writes nothing of may be seen twice.
#[test]
fn views_that_overlap_can_be_measured() {
    let data = Data::of(&[3.0f32, 4.0, 12.0]);
    let buffer = upload(gpu(), &data.bytes);
    let views = [GpuTensor::f32(&buffer, 0..2).expect("it fits"), GpuTensor::f32(&buffer, ..).expect("it fits")];
    let clip = Clip::norm(1.0).scope(Scope::Tensor);
    assert!(matches!(gpu().plan(&clip, &views), Err(Error::Tensor { .. })));
    let plan = gpu().plan_with(&[(clip, &views)], PlanOptions::default().measure_only()).expect("nothing is written");
    step(gpu(), &plan);
    let norms: Vec<_> = plan.report().wait().expect("finite").segments.iter().map(|s| s.norm).collect();
    assert_eq!(norms, [5.0, 13.0]);
}

/// Norms as a caller has them: float32, somewhere in a buffer.
struct Norms {
    buffer: wgpu::Buffer,
    count: usize,
}

impl Norms {
    const FIRST: u64 = 3;

    fn new(count: usize) -> Self {
        Self { buffer: upload(gpu(), &vec![0xff; 4 * (count + 5)]), count }
    }

    fn write(&self, norms: &[f64]) {
        let norms: Vec<_> = norms.iter().map(|n| *n as f32).collect();
        gpu().queue().write_buffer(&self.buffer, 4 * Self::FIRST, bytemuck::cast_slice(&norms));
    }

    fn view(&self) -> GpuTensor {
        GpuTensor::f32(&self.buffer, Self::FIRST..Self::FIRST + self.count as u64).expect("it fits")
    }
}

/// Checks that the report has the norms of the segments as they were given.
#[track_caller]
fn check_given(report: &ClipReport, norms: &[f64], what: &str) {
    let told: Vec<_> = report.segments.iter().map(|s| s.norm).collect();
    if told.is_empty() {
        assert_norm(report.total_norm, f64::from(norms[0] as f32), 1e-9, what);
    } else {
        assert!(report.total_norm.is_nan(), "{what}: nobody knows the norm of all");
        assert_eq!(told.len(), norms.len(), "{what}");
        for (got, want) in told.iter().zip(norms) {
            assert_norm(*got, f64::from(*want as f32), 1e-9, what);
        }
    }
}

#[test]
fn norms_written_by_the_host() {
    let mut turn = 0;
    for (scope, axis, budget) in SCOPES {
        for (mode, norm_type) in MODES {
            turn += 1;
            let grad_scale = [1.0, 8.0, 0.3][turn as usize % 3];
            let mut sets = [set(turn)];
            let asked = Asked { scope, axis, budget, norm_type, grad_scale, ..Asked::new(mode, 1.0) };
            let asked = asked.at_the_middle(&sets[0]);
            let placed = in_one_buffer(&sets);
            let given = Norms::new(asked.expected(&sets[0]).segments.len());
            let plan = gpu()
                .plan_with(&[(asked.clip(), &placed.views(&sets)[0])], PlanOptions::default().norms(&given.view()))
                .expect("valid");
            // The second time with other gradients and other norms.
            for _ in 0..2 {
                let what = format!("{asked:?}");
                let expected = asked.expected(&sets[0]);
                let norms: Vec<_> = expected.segments.iter().map(|s| s.norm).collect();
                given.write(&norms);
                placed.write(&sets);
                step(gpu(), &plan);
                let report = plan.report().wait().expect("finite");
                check_given(&report, &norms, &what);
                assert_eq!(report.clipped, expected.clipped().contains(&true), "{what}");
                let tolerance = asked.tolerance(Path::GpuBuffers);
                expected.check_elements(&sets[0], &placed.read(&sets)[0], tolerance, &what);
                check_coefficients(plan.coefficients(), &asked, &sets[0], "given");
                sets = [set(turn + 30)];
            }
        }
    }
}

/// In the encoder of the clip, without the host: the caller's kernel measures, here the largest element of each tensor.
#[test]
fn norms_written_by_a_kernel() {
    let sets: Vec<_> = [31, 32].map(|seed| vec![uneven(Dtype::F32, &[900], &mut Random(seed)).named("w")]).into();
    let placed = Interleaved::new(gpu(), &sets, |_| 0);
    let given = Norms::new(2);
    let source = "@group(0) @binding(0) var<storage, read> grads: array<f32>;
        @group(0) @binding(1) var<storage, read_write> norms: array<f32>;
        @compute @workgroup_size(1) fn main(@builtin(global_invocation_id) id: vec3<u32>) {
            var largest = 0.0;
            for (var i = 900u * id.x; i < 900u * (id.x + 1u); i += 1u) { largest = max(largest, abs(grads[i])); }
            norms[3u + id.x] = largest;
        }";
    let kernel = OwnKernel::new(gpu(), source, &[&placed.buffer, &given.buffer]);
    let both: Vec<_> = sets.concat();
    let asked = Asked { scope: Scope::Tensor, norm_type: NormType::Inf, ..Asked::new(Mode::Norm, 1.0) };
    let asked = asked.at_the_middle(&both);
    let views = placed.views(&sets).concat();
    let plan = gpu().plan_with(&[(asked.clip(), &views)], PlanOptions::default().norms(&given.view())).expect("valid");
    let mut encoder = encoder(gpu());
    kernel.encode(&mut encoder, 2);
    plan.encode(&mut encoder).expect("the device works");
    gpu().queue().submit([encoder.finish()]);
    let expected = asked.expected(&both);
    assert!(expected.clipped().contains(&true));
    expected.check_elements(&both, &placed.read(&sets).concat(), 2e-7, "by a kernel");
    check_given(
        &plan.report().wait().expect("finite"),
        &expected.segments.iter().map(|s| s.norm).collect::<Vec<_>>(),
        "by a kernel",
    );
}

/// A norm may lie among the gradients that it is the norm of.
#[test]
fn norms_in_the_buffer_of_the_gradients() {
    let sets = [vec![Data::of(&[3.0f32, 4.0])], vec![Data::of(&[5.0f32])]];
    let placed = Interleaved::new(gpu(), &sets, |_| 0);
    let views = placed.views(&sets);
    let clip = Clip::norm(1.0).eps(0.0);
    let plan = gpu().plan_with(&[(clip, &views[0])], PlanOptions::default().norms(&views[1][0])).expect("valid");
    step(gpu(), &plan);
    let after = placed.read(&sets);
    assert_scaled(&sets[0], &after[0], 0.2, 1e-7, "by a neighbour");
    assert_same_bits(&after[1], &sets[1], "the norm");
}

#[test]
fn given_norms_that_are_not_finite_follow_the_policy() {
    for policy in POLICIES {
        for bad in [f64::NAN, f64::INFINITY] {
            let what = format!("{policy:?} {bad}");
            let mut sets = [set(33)];
            // The gradients are not finite either. That is found where they are written, and not counted.
            sets[0][4].set(44, f64::NAN);
            let before = &sets[0];
            let clip = Clip::norm(1.0).eps(0.0).scope(Scope::Tensor).non_finite(policy);
            let placed = in_one_buffer(&sets);
            let given = Norms::new(5);
            let plan = gpu()
                .plan_with(&[(clip, &placed.views(&sets)[0])], PlanOptions::default().norms(&given.view()))
                .expect("valid");
            given.write(&[2.0, 0.5, bad, 0.0, 4.0]);
            step(gpu(), &plan);
            let after = &placed.read(&sets)[0];
            let report = plan.report().wait();
            let (skip, factors) = coefficients(plan.coefficients(), 5);
            let refused = matches!(policy, NonFinite::Error | NonFinite::Skip);
            assert_eq!(skip, u32::from(refused), "{what}");
            let found = match report {
                Err(Error::NonFinite(found)) if policy == NonFinite::Error => found,
                report => report.expect("the policy goes on").non_finite.expect("it was met"),
            };
            let place = "1 non-finite element, the first at index 2 of tensor \"the given norms\"";
            assert_eq!((found.count, found.tensor, found.to_string()), (1, 5, place.to_owned()), "{what}");
            if refused {
                assert_same_bits(after, before, &what);
                assert_eq!(factors, [1.0; 5], "{what}");
                continue;
            }
            assert_scaled(&before[..1], &after[..1], 0.5, 1e-7, &what);
            assert_same_bits(&after[1..2], &before[1..2], &what);
            let factor = match policy {
                NonFinite::Propagate => {
                    if bad.is_nan() {
                        f64::NAN
                    } else {
                        0.0
                    }
                }
                NonFinite::Zero => 0.0,
                _ => 1.0,
            };
            assert_eq!(format!("{factors:?}"), format!("{:?}", [0.5, 1.0, factor, 1.0, 0.25]), "{what}");
            if factor == 1.0 {
                assert_same_bits(&after[2..3], &before[2..3], &what);
            } else {
                assert!(after[2].numbers().all(|x| x == factor || x.is_nan() && factor.is_nan()), "{what}");
            }
            let mut last = before[4].clone();
            if policy == NonFinite::Drop {
                last.set(44, 0.0);
            }
            assert_scaled(&[last], &after[4..], 0.25, 1e-7, &what);
        }
    }
}

#[test]
fn given_norms_that_do_not_fit() {
    let data = set(34);
    let placed = in_one_buffer(std::slice::from_ref(&data));
    let views = &placed.views(std::slice::from_ref(&data))[0];
    let norms = upload(gpu(), &[0; 64]);
    let f32 = |n: u64| GpuTensor::f32(&norms, ..n).expect("it fits");
    let clip = Clip::norm(1.0);
    for (clip, count) in [(clip, 1), (clip.scope(Scope::Tensor), 5), (clip.scope(Scope::Example), 5)] {
        for wrong in [0, count - 1, count + 1] {
            let error = gpu()
                .plan_with(&[(clip, views)], PlanOptions::default().norms(&f32(wrong)))
                .expect_err("another number");
            assert!(matches!(error, Error::Usage(_)), "{error}");
            assert_says(&error, &["norms by segment", &format!("{wrong} given, {count} needed")]);
        }
        gpu().plan_with(&[(clip, views)], PlanOptions::default().norms(&f32(count))).expect("as many");
    }
    for halves in [GpuTensor::f16(&norms, ..1), GpuTensor::bf16(&norms, ..1)] {
        let error = gpu()
            .plan_with(&[(clip, views)], PlanOptions::default().norms(&halves.expect("it fits")))
            .expect_err("no float32");
        assert!(matches!(error, Error::Usage(_)), "{error}");
        assert_says(&error, &["float32"]);
    }
    for unfit in [Clip::value(1.0), Clip::agc(1.0)] {
        let error =
            gpu().plan_with(&[(unfit, views)], PlanOptions::default().norms(&f32(1))).expect_err("no norm decides");
        assert!(matches!(error, Error::Usage(_)), "{error}");
    }
    let twice = [views[0].clone(), views[0].clone()];
    assert!(matches!(
        gpu().plan_with(&[(clip, &twice)], PlanOptions::default().norms(&f32(1))),
        Err(Error::Tensor { .. })
    ));
}

/// Sets of one running norm, which lie between each other in one buffer.
struct Running {
    running: GpuNormAccumulator,
    placed: Interleaved,
    plans: Vec<GpuAccumulatorPlan>,
}

impl Running {
    fn new(clip: &Clip, sets: &[Vec<Data>]) -> Self {
        let running = gpu().accumulator(clip).expect("fit");
        let placed = in_one_buffer(sets);
        let plans = placed.views(sets).iter().map(|views| running.plan(views).expect("valid")).collect();
        Self { running, placed, plans }
    }

    fn submit(record: impl FnOnce(&mut wgpu::CommandEncoder) -> Result<(), Error>) {
        let mut encoder = encoder(gpu());
        record(&mut encoder).expect("the device works");
        gpu().queue().submit([encoder.finish()]);
    }

    /// Scales all sets by what has been accumulated.
    fn finish(&self) {
        Self::submit(|encoder| {
            self.running.finish(encoder)?;
            self.plans.iter().try_for_each(|plan| plan.scale(encoder))
        });
    }

    /// A step with new contents: sets in an order, each in a submission of its own.
    fn step(&self, sets: &[Vec<Data>], order: &[usize]) -> Done {
        self.placed.write(sets);
        for set in order {
            Self::submit(|encoder| self.plans[*set].accumulate(encoder));
        }
        self.finish();
        Done { report: self.running.report().wait(), after: self.placed.read(sets).concat() }
    }
}

/// Sets of a running norm; one is empty, and one is not scaled by much.
fn pieces(seed: u64) -> Vec<Vec<Data>> {
    vec![set(seed), Vec::new(), vec![uneven(Dtype::BF16, &[1001], &mut Random(seed)).named("alone")], set(seed + 3)]
}

#[test]
fn sets_add_up_to_one_clip() {
    for norm_type in [NormType::L2, NormType::L1, NormType::Inf, NormType::p(3.0)] {
        for grad_scale in [1.0, 4.0] {
            let first = pieces(41);
            let asked = Asked { norm_type, grad_scale, ..Asked::new(Mode::Norm, 1.0) };
            let running = Running::new(&asked.clip(), &first);
            // One step after another, in any order: nothing of the last one is left. In the third nothing is clipped.
            for (turn, order) in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [0, 1, 2, 3]].iter().enumerate() {
                let mut sets = pieces(41 + 3 * turn as u64);
                if turn == 2 {
                    for t in sets.iter_mut().flatten() {
                        (0..t.len()).for_each(|i| t.set(i, t.get(i) * 2f64.powi(-20)));
                    }
                }
                let done = running.step(&sets, order);
                let expected = asked.check_done(&done, Path::GpuBuffers, &sets.concat(), &format!("running, {turn}"));
                assert_eq!(expected.clipped(), [turn != 2]);
                check_coefficients(running.running.coefficients(), &asked, &sets.concat(), "running");
                // As by one plan of all.
                let placed = in_one_buffer(&sets);
                let plan = gpu().plan(&asked.clip(), &placed.views(&sets).concat()).expect("valid");
                step(gpu(), &plan);
                let (one, many) = (plan.report().wait().expect("finite"), done.report.expect("finite"));
                assert_norm(many.total_norm, one.total_norm, 1e-6, "one plan of all");
                assert_eq!((many.elements, many.clipped), (one.elements, one.clipped));
            }
        }
    }
}

/// All of it in one encoder does the same.
#[test]
fn sets_in_one_encoder() {
    let sets = pieces(51);
    let asked = Asked::new(Mode::Norm, 1.0);
    let running = Running::new(&asked.clip(), &sets);
    for _ in 0..2 {
        running.placed.write(&sets);
        Running::submit(|encoder| {
            running.plans.iter().try_for_each(|plan| plan.accumulate(encoder))?;
            running.running.finish(encoder)?;
            running.plans.iter().try_for_each(|plan| plan.scale(encoder))
        });
        let done = Done { report: running.running.report().wait(), after: running.placed.read(&sets).concat() };
        asked.check_done(&done, Path::GpuBuffers, &sets.concat(), "in one encoder");
    }
}

/// One buffer, whose contents change between the micro-batches: the norm is that of all of them, the report counts each
/// element once, and what is scaled are the contents at the end.
#[test]
fn micro_batches_in_the_same_buffer() {
    let asked = Asked { grad_scale: 2.0, ..Asked::new(Mode::Norm, 3.0) };
    let batches = [[set(61)], [set(64)], [set(67)]];
    let running = Running::new(&asked.clip(), &batches[0]);
    for _ in 0..2 {
        for batch in &batches {
            running.placed.write(batch);
            Running::submit(|encoder| running.plans[0].accumulate(encoder));
        }
        running.finish();
        let report = running.running.report().wait().expect("finite");
        let norm = asked.expected(&batches.concat().concat()).total_norm;
        assert_norm(report.total_norm, norm, 1e-6, "of all batches");
        assert_eq!(report.elements, numbers_of(&batches[2][0]).count() as u64);
        let factor = 3.0 / (norm + 1e-6) / 2.0;
        assert_scaled(&batches[2][0], &running.placed.read(&batches[2])[0], factor, 1e-6, "the last batch");
    }
}

#[test]
fn a_bad_element_in_one_set_decides_in_all() {
    for policy in POLICIES {
        let asked = Asked { policy, ..Asked::new(Mode::Norm, 1.0) };
        let running = Running::new(&asked.clip(), &pieces(71));
        for bad in [f64::NAN, f64::NEG_INFINITY] {
            for (places, order) in [
                (&[(2, 0, 1000)][..], [0, 1, 2, 3]),
                (&[(0, 4, 44)], [3, 1, 0, 2]),
                // The first in the order of the plans, whenever it was accumulated.
                (&[(0, 2, 70), (2, 0, 3), (3, 0, 0)], [3, 2, 0, 1]),
                (&[(3, 4, 7), (3, 4, 6)], [0, 1, 2, 3]),
                (&[], [0, 1, 2, 3]),
            ] {
                let mut sets = pieces(71);
                for (set, tensor, index) in places {
                    sets[*set][*tensor].set(*index, bad);
                }
                let what = format!("{bad} at {places:?}");
                let done = running.step(&sets, &order);
                asked.check_done(&done, Path::GpuBuffers, &sets.concat(), &what);
                check_coefficients(running.running.coefficients(), &asked, &sets.concat(), &what);
            }
        }
    }
}

#[test]
fn nothing_to_report_before_the_first_finish() {
    let sets = pieces(81);
    let running = Running::new(&Clip::norm(1.0), &sets);
    let not_yet = |when: &str| {
        let report = running.running.report().wait();
        assert!(matches!(report, Err(Error::NotSubmitted)), "{when}: {report:?}");
    };
    not_yet("planned");
    Running::submit(|encoder| running.plans[0].accumulate(encoder));
    not_yet("accumulated");
    let mut pending = encoder(gpu());
    running.running.finish(&mut pending).expect("the device works");
    not_yet("not submitted");
    gpu().queue().submit([pending.finish()]);
    assert!(running.running.report().wait().expect("it ran").clipped);
    // A finish of nothing is a norm of 0.
    running.finish();
    let report = running.running.report().wait().expect("it ran");
    assert_eq!((report.total_norm, report.clip_coef, report.clipped), (0.0, 1.0, false));
}

#[test]
fn sets_and_clips_that_do_not_fit_a_running_norm() {
    let norm = Clip::norm(1.0);
    let by_tensor = Clip::norm(1.0).scope(Scope::Tensor);
    for clip in [Clip::rms(1.0), Clip::average_norm(1.0), Clip::value(1.0), Clip::agc(1.0), by_tensor] {
        let error = gpu().accumulator(&clip).expect_err("unfit");
        assert!(matches!(error, Error::Usage(_)), "{error}");
    }
    let running = gpu().accumulator(&norm).expect("fit");
    let data = Data::of(&[3.0f32, 4.0]);
    let buffer = upload(gpu(), &data.bytes);
    let view = gpu_tensor(&buffer, &data, 0);
    assert!(matches!(running.plan(&[view.clone(), view.clone()]), Err(Error::Tensor { .. })));
    // What could not be planned leaves no trace.
    let plan = running.plan(&[view]).expect("valid");
    Running::submit(|encoder| {
        plan.accumulate(encoder)?;
        running.finish(encoder)
    });
    let report = running.report().wait().expect("finite");
    assert_eq!((report.total_norm, report.elements), (5.0, 2));
    assert_same_bits(&[Data { bytes: download(gpu(), &buffer), ..data.clone() }], &[data], "nothing was scaled");
}

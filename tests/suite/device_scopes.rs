//! Guards against errors of a scope that only GPU memory allows: a word, a binding, a dispatch or a buffer that several
//! segments, groups or parameters share, and data left there by an earlier step.
#![cfg(feature = "gpu")]

use crate::common::gpu::{Interleaved, clip_tensors, gpu, shared, small_limits, step};
use crate::common::numbers::Random;
use crate::common::reference::{Asked, Mode, uneven};
use crate::common::{Data, Done, Path, assert_same_bits, numbers_of, unwritten_sums};
use gradclip::gpu::{GpuClipper, PlanOptions};
use gradclip::{Clip, ClipReport, Dtype, Error, NonFinite, NormType, Scope, UnitAxis};

const SCOPES: [(Scope, Option<UnitAxis>); 7] = [
    (Scope::Global, None),
    (Scope::Tensor, None),
    (Scope::Unit, None),
    (Scope::Unit, Some(UnitAxis::Last)),
    (Scope::Unit, Some(UnitAxis::Optax)),
    (Scope::Example, None),
    (Scope::ExampleTensor, None),
];

/// Rows and tensors of odd lengths, which every scope takes.
const SHAPES: [&[usize]; 6] = [&[3, 5], &[3], &[3, 67], &[3, 1, 7], &[3, 0], &[3, 3, 3]];

/// A set in dtypes by turns; the parameters are of other dtypes.
fn set(shapes: &[&[usize]], dtypes: &[Dtype], seed: u64) -> Vec<Data> {
    let mut random = Random(seed);
    let tensor = |(i, shape): (usize, &&[usize])| {
        let dtype = dtypes[(seed as usize + i) % dtypes.len()];
        let other = if dtype == Dtype::BF16 { Dtype::F16 } else { Dtype::BF16 };
        let parameter = uneven(other, shape, &mut random);
        uneven(dtype, shape, &mut random).named(&format!("t{i}")).with_parameter(parameter)
    };
    shapes.iter().enumerate().map(tensor).collect()
}

const HALVES: [Dtype; 2] = [Dtype::F16, Dtype::BF16];
const ALL: [Dtype; 3] = [Dtype::F16, Dtype::F32, Dtype::BF16];

/// Clips the first of some sets that lie between each other; the others must stay as they are.
#[track_caller]
fn check_first(gpu: &GpuClipper, asked: &Asked, sets: &[Vec<Data>], gap: impl Fn(usize) -> usize) {
    let placed = Interleaved::new(gpu, sets, gap);
    let report = clip_tensors(gpu, &asked.clip(), &placed.views(sets)[0]);
    let mut after = placed.read(sets);
    let done = Done { report, after: after.remove(0) };
    asked.check_done(&done, Path::GpuBuffers, &sets[0], "between others");
    for (after, before) in after.iter().zip(&sets[1..]) {
        assert_same_bits(after, before, "a bystander");
    }
}

/// Back to back from both halves of a word on, with parameters and foreign tensors between.
#[test]
fn halves_share_words_with_parameters_and_strangers() {
    for (turn, (scope, axis)) in SCOPES.into_iter().enumerate() {
        for (mode, norm_type) in [(Mode::Norm, NormType::L2), (Mode::Norm, NormType::Inf), (Mode::Agc, NormType::L2)] {
            for (dtypes, first) in [(&HALVES[..], 0), (&HALVES, 1), (&ALL, 1)] {
                let sets = [set(&SHAPES, dtypes, turn as u64), set(&SHAPES, dtypes, 100)];
                let asked = Asked { scope, axis, norm_type, ..Asked::new(mode, 1.0) }.at_the_middle(&sets[0]);
                check_first(gpu(), &asked, &sets, |i| if i == 0 { first } else { 0 });
                // And where nothing is clipped but the loss scale is divided out, or not even that.
                check_first(gpu(), &Asked { threshold: 1e30, grad_scale: 4.0, ..asked }, &sets, |i| (i + first) % 2);
                check_first(gpu(), &Asked { threshold: 1e30, ..asked }, &sets, |i| (i + first) % 2);
            }
        }
    }
}

/// Bindings of 64 KiB, and dispatches of at most this number of workgroups in each of two dimensions.
fn small(workgroups: u32) -> GpuClipper {
    shared(wgpu::Limits { max_compute_workgroups_per_dimension: workgroups, ..small_limits() })
}

/// Sets whose rows, columns and examples begin in one binding and end in another.
fn large_shapes(scope: Scope, axis: Option<UnitAxis>) -> [&'static [usize]; 4] {
    match (scope, axis) {
        (Scope::Unit, Some(UnitAxis::Last | UnitAxis::Optax)) => [&[701, 67], &[3], &[1101, 31], &[1]],
        (Scope::Unit, _) => [&[3, 20_001], &[401, 67], &[7], &[31, 33]],
        _ => [&[5, 9001], &[5], &[5, 3, 2501], &[5, 1]],
    }
}

#[test]
fn segments_across_bindings_and_dispatch_dimensions() {
    let gpu = small(32);
    for (scope, axis) in SCOPES {
        for (dtypes, mode) in [(&HALVES[..], Mode::Norm), (&ALL, Mode::Agc)] {
            let mut sets = [set(&large_shapes(scope, axis), dtypes, 1)];
            let asked = Asked { scope, axis, ..Asked::new(mode, 1.0) }.at_the_middle(&sets[0]);
            check_first(&gpu, &asked, &sets, |i| (i + 1) % 2);
            // In the middle of a tensor and at the end of another: located in windows that are not the first.
            let (middle, end) = (sets[0][0].len() / 2 + 1, sets[0][2].len() - 1);
            for (t, i, policies) in
                [(2, end, &[NonFinite::Error][..]), (0, middle, &[NonFinite::Error, NonFinite::Zero, NonFinite::Drop])]
            {
                sets[0][t].set(i, f64::NAN);
                for &policy in policies {
                    check_first(&gpu, &Asked { policy, ..asked }, &sets, |i| (i + 1) % 2);
                }
            }
        }
    }
}

/// Matrices of odd lengths, which share words, and long ones, which begin in one binding and end in another.
#[test]
fn units_along_any_axes() {
    let odd: &[&[usize]] = &[&[3, 5, 7], &[3, 3, 3], &[5, 3, 1, 3, 3], &[3, 0, 3], &[3]];
    let (numbered, over) = (UnitAxis::axes(&[0, -1]), UnitAxis::over(&[0, -1]));
    for (gpu, axes, shapes) in [
        (gpu().clone(), numbered, odd),
        (gpu().clone(), over, odd),
        (small(32), numbered, &[&[5, 401, 13], &[3, 901, 3], &[3, 31, 67, 5]]),
        (small(32), over, &[&[3, 7, 5001], &[5, 31, 67], &[3, 5, 31, 9]]),
    ] {
        for (dtypes, mode) in [(&HALVES[..], Mode::Norm), (&ALL, Mode::Agc)] {
            for first in [0, 1] {
                let sets = [set(shapes, dtypes, first as u64), set(&SHAPES, dtypes, 100)];
                let asked = Asked { scope: Scope::Unit, axis: Some(axes), ..Asked::new(mode, 1.0) };
                check_first(&gpu, &asked.at_the_middle(&sets[0]), &sets, |i| if i == 0 { first } else { 0 });
            }
        }
    }
}

/// `finalise` tells of several units at a time whether all are left as they are, and such a chunk is passed over. One unit
/// that changes must be found wherever it is.
#[test]
fn one_clipped_unit_among_many() {
    for (axis, shape) in [(UnitAxis::First, [301, 37]), (UnitAxis::Last, [37, 301])] {
        for (unit, dtype) in [0, 7, 8, 150, 299, 300].into_iter().zip(ALL.into_iter().cycle()) {
            let mut random = Random(unit as u64);
            let mut tensor =
                |shape: &[usize]| Data::rounded(dtype, random.normals(shape.iter().product(), 0.1)).shaped(shape);
            // The units of the second tensor begin at no round number.
            let mut set = vec![tensor(&[1, 5]), tensor(&shape)];
            set[1].set(if axis == UnitAxis::First { unit * 37 + 11 } else { 11 * 301 + unit }, 100.0);
            let asked = Asked { scope: Scope::Unit, axis: Some(axis), ..Asked::new(Mode::Norm, 5.0) };
            check_first(gpu(), &asked, &[set], |i| i);
        }
    }
}

#[test]
fn more_units_than_a_dispatch_dimension_holds() {
    // Short rows and columns, 8 of them for each workgroup, or 256; and rows too long for one invocation each.
    let lowered = small(32);
    for (axis, shape) in [(UnitAxis::First, [1901, 33]), (UnitAxis::Last, [3, 1901]), (UnitAxis::First, [901, 65])] {
        let sets = [set(&[&shape], &[Dtype::F16], 2)];
        let asked = Asked { scope: Scope::Unit, axis: Some(axis), ..Asked::new(Mode::Norm, 1.0) };
        check_first(&lowered, &asked.at_the_middle(&sets[0]), &sets, |_| 1);
    }
}

#[test]
fn three_thousand_tensors_of_one_norm_each() {
    let mut random = Random(3);
    let shapes: Vec<_> = (0..3000).map(|_| [random.below(64)]).collect();
    let sets = [set(&shapes.iter().map(|shape| &shape[..]).collect::<Vec<_>>(), &ALL, 3)];
    for mode in [Mode::Norm, Mode::Rms, Mode::Agc] {
        let asked = Asked { scope: Scope::Tensor, ..Asked::new(mode, 1.0) }.at_the_middle(&sets[0]);
        check_first(gpu(), &asked, &sets, |_| 0);
    }
}

/// Sums lie between the examples, which are only read.
#[track_caller]
fn check_sums(gpu: &GpuClipper, asked: &Asked, examples: &[Data], gap: impl Fn(usize) -> usize) {
    let bare: Vec<_> = examples.iter().map(|t| Data { parameter: None, ..t.clone() }).collect();
    let sets = [bare, unwritten_sums(examples)];
    let placed = Interleaved::new(gpu, &sets, gap);
    let views = placed.views(&sets);
    let plan = gpu.plan_with(&[(asked.clip(), &views[0])], PlanOptions::default().sums(&views[1])).expect("valid");
    // A second step must not add to the first.
    step(gpu, &plan);
    step(gpu, &plan);
    let [after, sums] = <[_; 2]>::try_from(placed.read(&sets)).expect("as many as there were");
    assert_same_bits(&after, &sets[0], "examples");
    let done = Done { report: plan.report().wait(), after: sums };
    asked.expected(examples).check_sums(&done, examples, asked.tolerance(Path::GpuBuffers), &format!("{asked:?}"));
}

#[test]
fn sums_between_their_examples() {
    let shapes: [&[&[usize]]; 3] = [&SHAPES, &[&[1, 9], &[1], &[1, 0]], &[&[130, 3], &[130]]];
    for scope in [Scope::Example, Scope::ExampleTensor] {
        for (turn, shapes) in shapes.iter().enumerate() {
            for grad_scale in [1.0, 4.0] {
                let mut examples = set(shapes, &ALL, turn as u64);
                let asked = Asked { scope, grad_scale, ..Asked::new(Mode::Norm, 1.0) }.at_the_middle(&examples);
                check_sums(gpu(), &asked, &examples, |i| (i + turn) % 2);
                examples[0].set(2, f64::INFINITY);
                for policy in [NonFinite::Error, NonFinite::Skip, NonFinite::Drop] {
                    check_sums(gpu(), &Asked { policy, ..asked }, &examples, |i| (i + turn) % 2);
                }
            }
        }
    }
}

/// Examples longer than a binding, whose sums are longer too; and sums that are added to from one binding after another.
#[test]
fn sums_across_bindings_and_dispatch_dimensions() {
    let gpu = small(64);
    for scope in [Scope::Example, Scope::ExampleTensor] {
        for shapes in [&large_shapes(scope, None)[..], &[&[1901, 33]], &[&[301, 701]]] {
            for dtypes in [&HALVES[..], &[Dtype::F32]] {
                let examples = set(shapes, dtypes, 4);
                let asked = Asked { scope, ..Asked::new(Mode::Norm, 1.0) }.at_the_middle(&examples);
                check_sums(&gpu, &asked, &examples, |i| (i + 1) % 2);
            }
        }
    }
}

/// What a step leaves in a plan's buffers must not reach the next: norms, outcomes, counts, refusals, parameters.
#[test]
fn steps_of_one_plan_know_nothing_of_each_other() {
    for (scope, axis) in SCOPES {
        for mode in [Mode::Norm, Mode::Agc] {
            for policy in [NonFinite::Error, NonFinite::Zero, NonFinite::Drop] {
                let first = [set(&SHAPES, &ALL, 5)];
                let asked = Asked { scope, axis, policy, ..Asked::new(mode, 1.0) }.at_the_middle(&first[0]);
                let placed = Interleaved::new(gpu(), &first, |i| i % 2);
                let plan = gpu().plan(&asked.clip(), &placed.views(&first)[0]).expect("valid");
                for turn in 0..6 {
                    // The dtypes must stay.
                    let mut sets = [set(&SHAPES, &ALL, 5 + 3 * turn)];
                    match turn {
                        1 => sets[0][2].set(70, f64::NAN),
                        3 => sets[0][5].set(26, f64::NEG_INFINITY),
                        // Nothing to clip, and nothing to write.
                        4 => {
                            for t in &mut sets[0] {
                                (0..t.len()).for_each(|i| t.set(i, 0.0));
                            }
                        }
                        _ => {}
                    }
                    placed.write(&sets);
                    step(gpu(), &plan);
                    let report = plan.report().wait();
                    let done = Done { report, after: placed.read(&sets).remove(0) };
                    asked.check_done(&done, Path::GpuBuffers, &sets[0], &format!("step {turn}"));
                }
            }
        }
    }
}

/// Clips of every mode, and a set for each.
fn groups(policy: NonFinite, grad_scale: f64) -> (Vec<Asked>, Vec<Vec<Data>>) {
    let kinds = [
        (Mode::Norm, NormType::L2, Scope::Global, None),
        (Mode::Norm, NormType::L1, Scope::Tensor, None),
        (Mode::Norm, NormType::Inf, Scope::Unit, Some(UnitAxis::Last)),
        (Mode::Rms, NormType::L2, Scope::Tensor, None),
        (Mode::Agc, NormType::L2, Scope::Unit, None),
        (Mode::AverageNorm, NormType::L2, Scope::Example, None),
    ];
    let group = |(i, (mode, norm_type, scope, axis))| {
        let set = set(&SHAPES, if i % 2 == 0 { &HALVES } else { &ALL }, 20 + i as u64);
        let asked = Asked { norm_type, scope, axis, policy, grad_scale, ..Asked::new(mode, 1.0) };
        (asked.at_the_middle(&set), set)
    };
    kinds.into_iter().enumerate().map(group).unzip()
}

/// Where the group that is clipped by value comes in.
const BY_VALUE: usize = 3;

fn clips(asked: &[Asked]) -> Vec<Clip> {
    let mut clips: Vec<_> = asked.iter().map(Asked::clip).collect();
    let value = Clip::range(-0.5, 0.25).non_finite(asked[0].policy);
    clips.insert(BY_VALUE, value.grad_scale(asked[0].grad_scale));
    clips
}

/// Clips groups in one plan, whose tensors lie between each other.
fn clip_together(clips: &[Clip], sets: &[Vec<Data>], first: usize) -> (Result<Vec<ClipReport>, Error>, Vec<Vec<Data>>) {
    let placed = Interleaved::new(gpu(), sets, |i| if i == 0 { first } else { 0 });
    let views = placed.views(sets);
    let groups: Vec<_> = clips.iter().zip(&views).map(|(clip, views)| (*clip, &views[..])).collect();
    let plan = gpu().plan_with(&groups, PlanOptions::default()).expect("valid");
    step(gpu(), &plan);
    let reports = plan.reports().wait();
    if let Ok(reports) = &reports {
        let first = plan.report().wait().expect("as before");
        assert_eq!(format!("{first:?}"), format!("{:?}", reports[0]), "some norms are NaN, so by text");
    }
    (reports, placed.read(sets))
}

#[test]
fn groups_that_share_words_are_clipped_as_by_plans_of_their_own() {
    for policy in [NonFinite::Error, NonFinite::Propagate, NonFinite::Drop] {
        for (first, grad_scale) in [(0, 1.0), (1, 1.0), (1, 4.0)] {
            let (asked, mut sets) = groups(policy, grad_scale);
            let by_value = set(&SHAPES, &ALL, 30);
            sets.insert(BY_VALUE, by_value.iter().map(|t| Data { parameter: None, ..t.clone() }).collect());
            let clips = clips(&asked);
            let (reports, mut after) = clip_together(&clips, &sets, first);
            let mut reports = reports.expect("finite");
            // Alone.
            let placed = Interleaved::new(gpu(), &sets, |i| if i == 0 { first } else { 0 });
            for ((clip, views), report) in clips.iter().zip(placed.views(&sets)).zip(&reports) {
                let alone = clip_tensors(gpu(), clip, &views).expect("finite");
                assert_eq!(format!("{alone:?}"), format!("{report:?}"), "{clip:?}");
            }
            for (together, alone) in after.iter().zip(placed.read(&sets)) {
                assert_same_bits(together, &alone, "together and alone");
            }
            // And rightly.
            let (clamped, report) = (after.remove(BY_VALUE), reports.remove(BY_VALUE));
            let bounded = |t: &Data| Data::rounded(t.dtype, t.numbers().map(|x| (x / grad_scale).clamp(-0.5, 0.25)));
            assert_same_bits(&clamped, &by_value.iter().map(bounded).collect::<Vec<_>>(), "by value");
            assert!(report.clipped && report.elements == numbers_of(&by_value).count() as u64);
            sets.remove(BY_VALUE);
            for (((asked, set), report), after) in asked.iter().zip(&sets).zip(reports).zip(after) {
                asked.check_done(&Done { report: Ok(report), after }, Path::GpuBuffers, set, "a group");
            }
        }
    }
}

#[test]
fn a_bad_element_in_one_group_keeps_every_bit_of_all() {
    for policy in [NonFinite::Error, NonFinite::Skip] {
        for bad in 0..7 {
            let (asked, mut sets) = groups(policy, 1.0);
            sets.insert(BY_VALUE, set(&SHAPES, &ALL, 30));
            sets[BY_VALUE].iter_mut().for_each(|t| t.parameter = None);
            // In the word that it shares with another group.
            sets[bad][3].set(20, f64::NAN);
            sets[bad][5].set(0, f64::INFINITY);
            let (reports, after) = clip_together(&clips(&asked), &sets, 1);
            for (after, before) in after.iter().zip(&sets) {
                assert_same_bits(after, before, &format!("{policy:?}, bad in group {bad}"));
            }
            let found = match reports {
                Err(Error::NonFinite(found)) if policy == NonFinite::Error => found,
                Err(error) => panic!("{error}"),
                Ok(mut reports) => {
                    assert!(reports.iter().all(|report| !report.clipped && report.clip_coef == 1.0));
                    let found = reports.remove(bad).non_finite.expect("it was met");
                    assert!(policy == NonFinite::Skip && reports.iter().all(|report| !report.has_non_finite()));
                    found
                }
            };
            assert_eq!((found.count, found.tensor, found.index, found.name.as_deref()), (2, 3, 20, Some("t3")));
        }
    }
}

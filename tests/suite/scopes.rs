//! Guards against an element that is clipped by another segment's norm: every scope, unit axis, budget, mode and norm
//! type on shapes of every kind must match the plain loops of `common/reference.rs`.

use crate::common::numbers::Random;
use crate::common::reference::{Asked, Mode};
use crate::common::{Data, Path, as_measured, assert_same_bits, parameters, views};
use gradclip::{Budget, Clip, Clipper, NonFinite, NormType, Scope, UnitAxis};

/// A scope with what it asks for: units by axis, budgets by tensor.
const SCOPES: [(Scope, Option<UnitAxis>, Budget); 10] = [
    (Scope::Global, None, Budget::Each),
    (Scope::Tensor, None, Budget::Each),
    (Scope::Unit, None, Budget::Each),
    (Scope::Unit, Some(UnitAxis::First), Budget::Each),
    (Scope::Unit, Some(UnitAxis::Last), Budget::Each),
    (Scope::Unit, Some(UnitAxis::Optax), Budget::Each),
    (Scope::Example, None, Budget::Each),
    (Scope::ExampleTensor, None, Budget::Each),
    (Scope::ExampleTensor, None, Budget::Uniform),
    (Scope::ExampleTensor, None, Budget::Sized),
];

/// The modes; those that measure by any norm once for each norm type.
fn modes() -> Vec<(Mode, NormType)> {
    let powers = [1.0, 2.0, f64::INFINITY, 3.0, 0.5, 1.7, 8.0];
    let norms = |mode| powers.map(|p| (mode, NormType::p(p)));
    let others = [Mode::Rms, Mode::AverageNorm].map(|mode| (mode, NormType::L2));
    [&norms(Mode::Norm)[..], &norms(Mode::Agc), &others].concat()
}

/// A gradient of this shape with its parameter. Rows, columns and tensors differ in size, so that a segment mistaken for
/// its neighbour shows.
fn shaped(path: Path, shape: &[usize], random: &mut Random) -> Data {
    let dtypes = path.dtypes();
    let len: usize = shape.iter().product();
    let last = shape.last().copied().unwrap_or(1).max(1);
    let row = len.checked_div(shape.first().copied().unwrap_or(1)).unwrap_or(0).max(1);
    let scale = random.normal().exp();
    let numbers: Vec<_> = (0..len)
        .map(|i| random.normal() * scale * (1.0 + (i % last % 7) as f64) * (1.0 + (i / row % 5) as f64))
        .collect();
    let grad = Data::rounded(dtypes[random.below(dtypes.len())], numbers).shaped(shape);
    let parameter = Data::rounded(dtypes[random.below(dtypes.len())], random.normals(len, 0.5)).shaped(shape);
    grad.named(&format!("of {shape:?}")).with_parameter(parameter)
}

fn set(path: Path, shapes: &[&[usize]], seed: u64) -> Vec<Data> {
    let mut random = Random(seed);
    shapes.iter().map(|shape| shaped(path, shape, &mut random)).collect()
}

fn of_examples(scope: Scope) -> bool {
    matches!(scope, Scope::Example | Scope::ExampleTensor)
}

/// Shapes that a scope takes: all kinds, or all that agree on the number of examples.
fn small_shapes(scope: Scope) -> Vec<Vec<&'static [usize]>> {
    if of_examples(scope) {
        return vec![
            vec![&[7, 3], &[7], &[7, 0, 2], &[7, 2, 3, 5], &[7, 1], &[7, 65]],
            vec![&[1, 9], &[1], &[1, 2, 2]],
            vec![&[130, 4], &[130, 1, 3]],
        ];
    }
    vec![
        vec![&[5, 7], &[], &[17], &[0], &[3, 5, 7], &[4, 0], &[1, 9], &[9, 1], &[2, 3, 4, 5], &[1], &[1, 1, 9]],
        vec![&[0, 4], &[2, 0, 3], &[33, 67], &[1, 1, 1], &[1], &[300, 3], &[2, 129], &[2, 3, 2, 3, 5]],
    ]
}

/// Every combination on small sets; eps and loss scale take turns.
#[test]
fn every_scope_mode_and_norm_type_agrees_with_the_plain_loops() {
    for path in Path::ALL {
        let mut turn = 0;
        for (scope, axis, budget) in SCOPES {
            for (mode, norm_type) in modes() {
                for shapes in small_shapes(scope) {
                    turn += 1;
                    let set = set(*path, &shapes, turn);
                    let grad_scale = [1.0, 4.0, 0.37, 1.0, 65536.0][turn as usize % 5];
                    let eps = [0.0, 1e-6, 0.5 / grad_scale][turn as usize % 3];
                    let agc_eps = [1e-3, 0.0, 0.7][turn as usize % 3];
                    let asked =
                        Asked { scope, axis, budget, norm_type, eps, agc_eps, grad_scale, ..Asked::new(mode, 1.0) };
                    let asked = asked.at_the_middle(&set);
                    let clipped = asked.check(*path, &set, "small").clipped();
                    if of_examples(scope) && mode != Mode::Agc {
                        assert!(clipped.len() < 2 || clipped.contains(&false) && clipped.contains(&true), "{asked:?}");
                    }
                }
            }
        }
    }
}

/// Rows longer than a chunk, more columns than a pass takes, more rows than a task: segments in pieces.
#[test]
fn long_rows_and_many_columns() {
    let shapes: [&[usize]; 6] = [&[2, 140_001], &[2, 2049], &[5, 1025], &[140, 1027], &[70_001, 2], &[100_001]];
    for path in Path::ALL {
        let set = set(*path, &shapes, 62);
        for (scope, axis, mode, norm_type) in [
            (Scope::Unit, None, Mode::Norm, NormType::L2),
            (Scope::Unit, Some(UnitAxis::Last), Mode::Norm, NormType::L2),
            (Scope::Unit, Some(UnitAxis::Last), Mode::Norm, NormType::Inf),
            (Scope::Unit, Some(UnitAxis::Last), Mode::Agc, NormType::L2),
        ] {
            let asked = Asked { scope, axis, norm_type, ..Asked::new(mode, 1.0) }.at_the_middle(&set);
            assert!(asked.check(*path, &set, "large").clipped().contains(&true));
        }
        let examples = self::set(*path, &[&[2, 140_001], &[2, 5, 1025], &[2]], 63);
        for scope in [Scope::Example, Scope::ExampleTensor] {
            let asked = Asked { scope, ..Asked::new(Mode::Norm, 1.0) }.at_the_middle(&examples);
            assert!(asked.check(*path, &examples, "large").clipped().contains(&true));
        }
    }
}

#[test]
fn measuring_reports_what_clipping_does() {
    for path in Path::HOST {
        for (scope, axis, budget) in SCOPES {
            for (mode, norm_type) in modes() {
                let set = set(*path, &small_shapes(scope)[0], 72);
                let clip = Asked { scope, axis, budget, norm_type, ..Asked::new(mode, 1.0) }.at_the_middle(&set).clip();
                let parameters = parameters(&set);
                let measured = path.clipper().measure(&clip, &views(&set, &parameters)).expect("finite");
                assert_eq!(measured, as_measured(path.clip(&clip, &set).ok().0), "{path:?} {clip:?}");
            }
        }
    }
}

#[test]
fn nothing_is_written_where_nothing_is_clipped() {
    for path in Path::ALL {
        for (scope, axis, budget) in SCOPES {
            for (mode, norm_type) in modes() {
                for (i, shapes) in small_shapes(scope).iter().enumerate() {
                    // The empty tensor's share of a budget by size is 0, which clips it.
                    let shapes: Vec<_> =
                        shapes.iter().filter(|s| budget != Budget::Sized || !s.contains(&0)).copied().collect();
                    let set = set(*path, &shapes, i as u64);
                    let asked = Asked { scope, axis, budget, norm_type, ..Asked::new(mode, 1e30) };
                    let expected = asked.check(*path, &set, "loose");
                    assert!(!expected.clipped().contains(&true), "{asked:?}");
                    let done = path.clip(&asked.clip(), &set);
                    assert_same_bits(&done.after, &set, "loose");
                }
            }
        }
    }
}

/// Scopes of nothing, or of tensors without elements: no segment, or empty ones, and no harm.
#[test]
fn sets_without_elements_are_welcome() {
    let sets: [&[&[usize]]; 7] =
        [&[], &[&[0]], &[&[0, 3]], &[&[4, 0]], &[&[0, 3], &[0]], &[&[2, 3], &[0, 4]], &[&[2, 3], &[2, 0, 5]]];
    for path in Path::ALL {
        for (scope, axis, budget) in SCOPES {
            for shapes in sets {
                let agree = shapes.windows(2).all(|pair| pair[0].first() == pair[1].first());
                if of_examples(scope) && !agree {
                    continue;
                }
                let set = set(*path, shapes, 64);
                for mode in [Mode::Norm, Mode::Rms, Mode::AverageNorm, Mode::Agc] {
                    for grad_scale in [1.0, 2.0] {
                        let asked = Asked { scope, axis, budget, grad_scale, ..Asked::new(mode, 0.3) };
                        asked.check(*path, &set, &format!("{shapes:?}"));
                    }
                }
            }
        }
    }
}

#[test]
fn thresholds_of_0_and_infinity_by_segment() {
    for path in Path::ALL {
        for (scope, axis, budget) in SCOPES {
            for mode in [Mode::Norm, Mode::Rms, Mode::AverageNorm, Mode::Agc] {
                let set = set(*path, &small_shapes(scope)[0], 65);
                for (threshold, eps, grad_scale) in [(0.0, 1e-6, 1.0), (0.0, 0.0, 4.0), (f64::INFINITY, 0.0, 4.0)] {
                    if mode == Mode::Agc && threshold == f64::INFINITY {
                        continue;
                    }
                    let asked = Asked { scope, axis, budget, eps, grad_scale, ..Asked::new(mode, threshold) };
                    asked.check(*path, &set, "extreme");
                }
            }
        }
    }
}

/// A NaN or an infinity does what the policy says to its own segment, and nothing to the others, except where one element
/// decides for all.
#[test]
fn non_finite_elements_by_segment() {
    let bads = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    for path in Path::ALL {
        let mut random = Random(66);
        let mut turn = 0;
        for (scope, axis, budget) in SCOPES {
            for mode in [Mode::Norm, Mode::Rms, Mode::Agc] {
                for policy in
                    [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop]
                {
                    for shapes in small_shapes(scope) {
                        turn += 1;
                        let mut set = set(*path, &shapes, turn);
                        let grad_scale = [1.0, 2.0][turn as usize % 2];
                        let asked = Asked { scope, axis, budget, grad_scale, policy, ..Asked::new(mode, 1.0) };
                        let asked = asked.at_the_middle(&set);
                        for bad in bads.iter().take(1 + turn as usize % 3) {
                            let t = random.below(set.len());
                            if let Some(i) = set[t].len().checked_sub(1).map(|last| random.below(last + 1)) {
                                set[t].set(i, *bad);
                            }
                        }
                        asked.check(*path, &set, "bad");
                    }
                }
            }
        }
    }
}

/// The first in the order of memory, not of the segments: in columns the later column's may come first.
#[test]
fn the_first_bad_element_is_the_first_in_memory() {
    for path in Path::ALL {
        for (scope, axis, budget) in SCOPES {
            let mut set = set(*path, &[&[40, 3], &[40, 1030], &[40, 2, 5]], 67);
            for (t, i) in [(2, 1), (1, 38 * 1030), (1, 2 * 1030 + 1029), (1, 2 * 1030 + 1028), (1, 3 * 1030)] {
                set[t].set(i, f64::NAN);
                for policy in [NonFinite::Error, NonFinite::Zero] {
                    let asked = Asked { scope, axis, budget, policy, ..Asked::new(Mode::Norm, 0.5) };
                    asked.check(*path, &set, "first");
                }
            }
            let done = path.clip(&Clip::norm(0.5).scope(scope), &set);
            let message = done.report.expect_err("not finite").to_string();
            assert!(
                message.contains("5 non-finite elements, the first at index 3088 of tensor \"of [40, 1030]\""),
                "{message}"
            );
        }
    }
}

/// The clip of one example or unit takes nothing from the norm of the others, however large they are.
#[test]
fn a_huge_segment_leaves_the_others_alone() {
    for path in Path::ALL {
        for (scope, axis, budget) in SCOPES.into_iter().filter(|(scope, ..)| *scope != Scope::Global) {
            for numbers in [[1e20, 3.0, 1e-20], [1e-20, 1e20, 3.0]] {
                let grid = |rows: usize| {
                    let number = |i: usize| numbers[if axis == Some(UnitAxis::Last) { i % 3 } else { i / 3 % 3 }];
                    Data::rounded(gradclip::Dtype::F32, (0..rows * 3).map(number)).shaped(&[rows, 3])
                };
                let set = [grid(3), grid(3)];
                Asked { scope, axis, budget, eps: 0.0, ..Asked::new(Mode::Norm, 5.0) }.check(*path, &set, "huge");
            }
        }
    }
}

#[test]
fn sums_of_clipped_examples_agree_with_the_plain_loops() {
    for path in Path::HOST {
        let mut turn = 0;
        for (scope, axis, budget) in SCOPES.into_iter().filter(|(scope, ..)| of_examples(*scope)) {
            let mut all = small_shapes(scope);
            all.extend([vec![&[0, 3][..], &[0]], vec![&[3, 1030], &[3]], vec![&[2, 140_001]], vec![&[1500, 5]]]);
            for shapes in all {
                turn += 1;
                let set = set(*path, &shapes, turn);
                let (mode, norm_type) = modes()[turn as usize % modes().len()];
                let grad_scale = [1.0, 4.0, 0.37][turn as usize % 3];
                let asked = Asked { scope, axis, budget, norm_type, grad_scale, ..Asked::new(mode, 1.0) };
                asked.at_the_middle(&set).check_sums(*path, &set, "shapes");
                // Nothing clipped: the plain sum.
                Asked { threshold: 1e30, budget: Budget::Each, ..asked }.check_sums(*path, &set, "loose");
            }
        }
    }
}

/// The gradients are only read, and a bad element does to the sum what the policy says.
#[test]
fn sums_follow_the_policy() {
    for path in Path::HOST {
        for scope in [Scope::Example, Scope::ExampleTensor] {
            for policy in [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop] {
                for bad in [f64::NAN, f64::NEG_INFINITY] {
                    let mut set = set(*path, &small_shapes(scope)[0], 69);
                    set[3].set(100, bad);
                    let asked = Asked { scope, policy, ..Asked::new(Mode::Norm, 3.0) };
                    asked.check_sums(*path, &set, "bad");
                }
            }
        }
    }
}

/// Columns are measured in strips, which overlap in memory: progress must count no byte twice.
#[test]
fn progress_adds_up_under_every_scope() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let mut set = set(Path::Cpu, &[&[4, 2500], &[4, 3], &[4]], 71);
    let bytes: u64 = set.iter().map(|t| t.bytes.len() as u64).sum();
    for (scope, axis, budget) in SCOPES {
        let told = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&told);
        let clipper = Clipper::cpu().on_progress(move |bytes| {
            counter.fetch_add(bytes, Ordering::Relaxed);
        });
        let clip = Asked { scope, axis, budget, ..Asked::new(Mode::Norm, 1.0) }.clip();
        let mut views: Vec<_> = set.iter_mut().map(Data::view_mut).collect();
        clipper.apply(&clip, &mut views).expect("finite");
        assert_eq!(told.load(Ordering::Relaxed), bytes, "{clip:?}");
    }
}

/// Every set of axes of shapes of several sizes, of all dtypes by turns.
#[test]
fn units_along_any_axes() {
    let shapes: [&[usize]; 6] = [&[], &[9], &[5, 7], &[3, 5, 7], &[2, 33, 3, 5], &[3, 2, 5, 2, 3]];
    for &path in Path::ALL {
        let mut random = Random(81);
        let mut all = Vec::new();
        for shape in shapes {
            for chosen in 0..1usize << shape.len() {
                let axes: Vec<_> = (0..shape.len() as isize).filter(|i| chosen >> i & 1 == 1).collect();
                let from_the_end: Vec<_> = axes.iter().map(|axis| axis - shape.len() as isize).collect();
                all.push(shaped(path, shape, &mut random).with_unit_axis(UnitAxis::axes(&axes)));
                all.push(shaped(path, shape, &mut random).with_unit_axis(UnitAxis::over(&from_the_end)));
            }
        }
        for (mode, norm_type) in [(Mode::Norm, NormType::L2), (Mode::Norm, NormType::Inf), (Mode::Agc, NormType::L1)] {
            let clean = Asked { scope: Scope::Unit, norm_type, ..Asked::new(mode, 1.0) }.at_the_middle(&all);
            let clipped = clean.check(path, &all, "any axes").clipped();
            assert!(clipped.contains(&false) && clipped.contains(&true));
            let mut spoilt = all.clone();
            let last = spoilt.len() - 1;
            spoilt[last].set(100, f64::NAN);
            for policy in [NonFinite::Error, NonFinite::Zero, NonFinite::Drop] {
                Asked { policy, ..clean }.check(path, &spoilt, "any axes of a NaN");
            }
        }
    }
}

/// Matrices longer than a chunk, and long rows and many columns in each.
#[test]
fn long_matrices() {
    let axes = |shape: &'static [usize], axes: &'static [isize]| (shape, UnitAxis::axes(axes));
    let all = [
        axes(&[3, 70, 1027], &[0, 2]),
        axes(&[3, 2, 70_001], &[1]),
        axes(&[2, 3, 140_001], &[1]),
        axes(&[5, 40, 3, 301], &[0, 2]),
        axes(&[5, 40, 3, 301], &[1, 3]),
        axes(&[20_001, 2, 3], &[1]),
        axes(&[4001, 3, 2], &[0, 2]),
    ];
    for &path in Path::ALL {
        let mut random = Random(82);
        let set: Vec<_> =
            all.iter().map(|(shape, axes)| shaped(path, shape, &mut random).with_unit_axis(*axes)).collect();
        for (mode, norm_type) in [(Mode::Norm, NormType::L2), (Mode::Agc, NormType::Inf)] {
            let asked = Asked { scope: Scope::Unit, norm_type, ..Asked::new(mode, 1.0) }.at_the_middle(&set);
            assert!(asked.check(path, &set, "long").clipped().contains(&true));
        }
    }
}

/// Layers differ in where they keep their outputs; each then is clipped as by a clip for it alone.
#[test]
fn units_along_an_axis_of_a_tensors_own() {
    for &path in Path::ALL {
        for mode in [Mode::Norm, Mode::Agc] {
            let clip = Asked { scope: Scope::Unit, ..Asked::new(mode, 0.9) }.clip().unit_axis(UnitAxis::First);
            let axes = [Some(UnitAxis::Last), None, Some(UnitAxis::First), Some(UnitAxis::Last)];
            let own = |(t, axis): (Data, Option<UnitAxis>)| match axis {
                Some(axis) => t.with_unit_axis(axis),
                None => t,
            };
            let set = set(path, &[&[5, 7], &[7, 5], &[3, 4, 6], &[9]], 51);
            let together = path.clip(&clip, &set.iter().cloned().zip(axes).map(own).collect::<Vec<_>>());
            for (i, axis) in axes.into_iter().enumerate() {
                let alone = path.clip(&axis.map_or(clip, |axis| clip.unit_axis(axis)), &set[i..=i]);
                assert_same_bits(&together.after[i..=i], &alone.after, &format!("{path:?} {mode:?} {axis:?}"));
                assert!(alone.report.expect("finite").clipped);
            }
        }
    }
}

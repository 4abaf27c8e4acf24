//! Guards against a clip that changes when its norm is measured elsewhere, in pieces, or together with other groups.

use crate::common::numbers::Random;
use crate::common::reference::{Asked, Mode, SCOPES};
use crate::common::{
    Data, Done, POLICIES, Path, as_measured, assert_norm, assert_same_bits, assert_scaled, clip_host, numbers_of,
};
use gradclip::{Clip, ClipReport, Clipper, Dtype, Error, NonFinite, NormAccumulator, NormType, Scope, TensorMut};

fn set(seed: u64) -> Vec<Data> {
    let mut random = Random(seed);
    let shapes: [&[usize]; 5] = [&[6, 7], &[6], &[6, 0], &[6, 1, 30], &[6, 110]];
    let tensor = |(i, shape): (usize, &&[usize])| {
        let dtypes = Path::Cpu.dtypes();
        let scale = random.normal().exp();
        let numbers = random.normals(shape.iter().product(), scale);
        Data::rounded(dtypes[i % dtypes.len()], numbers).shaped(shape).named(&format!("t{i}"))
    };
    shapes.iter().enumerate().map(tensor).collect()
}

fn scale(clip: &Clip, norms: &[f64], set: &[Data]) -> Done {
    let mut after = set.to_vec();
    let report = Clipper::cpu().scale(clip, norms, &mut after.iter_mut().map(Data::view_mut).collect::<Vec<_>>());
    Done { report, after }
}

fn norms_of(report: &ClipReport, scope: Scope) -> Vec<f64> {
    match scope {
        Scope::Global => vec![report.total_norm],
        _ => report.segments.iter().map(|s| s.norm).collect(),
    }
}

#[test]
fn a_clip_by_its_own_norms_is_the_clip() {
    let set = set(81);
    let p3 = NormType::p(3.0);
    for (scope, axis, budget) in SCOPES {
        for (mode, norm_type) in [
            (Mode::Norm, NormType::L2),
            (Mode::Norm, NormType::Inf),
            (Mode::Norm, p3),
            (Mode::Rms, NormType::L2),
            (Mode::AverageNorm, NormType::L2),
        ] {
            for grad_scale in [1.0, 8.0, 0.3] {
                let asked = Asked { scope, axis, budget, norm_type, grad_scale, ..Asked::new(mode, 1.0) };
                let asked = asked.at_the_middle(&set);
                let what = format!("{asked:?}");
                let (report, after) = Path::Cpu.clip(&asked.clip(), &set).ok();
                assert!(report.clipped, "{what}");
                let (given, scaled) = scale(&asked.clip(), &norms_of(&report, scope), &set).ok();
                asked.expected(&set).check_elements(&set, &scaled, asked.tolerance(Path::Cpu), &what);
                assert_eq!(given.segments.len(), report.segments.len(), "{what}");
                for (got, want) in given.segments.iter().zip(&report.segments) {
                    assert_eq!((got.tensor, got.index, got.clipped), (want.tensor, want.index, want.clipped), "{what}");
                    assert_norm(got.norm, want.norm, 1e-14, &what);
                    assert_norm(got.clip_coef, want.clip_coef, 1e-14, &what);
                }
                assert_eq!((given.clipped, given.elements), (report.clipped, report.elements), "{what}");
                assert_norm(given.clip_coef, report.clip_coef, 1e-14, &what);
                // Where N is the measured norm itself, nothing is rounded on the way.
                if mode == Mode::Norm {
                    assert_same_bits(&scaled, &after, &what);
                }
            }
        }
    }
}

#[test]
fn an_infinite_given_norm_follows_the_policy() {
    let set = set(82);
    let clip = Clip::norm(1.0).scope(Scope::Tensor);
    for policy in [NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero] {
        let (report, after) = scale(&clip.non_finite(policy), &[0.5, f64::INFINITY, 0.0, 2.0, 0.5], &set).ok();
        let what = format!("{policy:?}");
        if policy == NonFinite::Skip {
            assert!(!report.clipped, "{what}");
            assert_same_bits(&after, &set, &what);
            continue;
        }
        assert!(after[1].numbers().all(|x| x == 0.0), "{what}");
        assert_scaled(&set[3..4], &after[3..4], 1.0 / (2.0 + 1e-6), 1e-7, &what);
        for t in [0, 2, 4] {
            assert_same_bits(&after[t..=t], &set[t..=t], &what);
        }
    }
    // A finite norm says nothing of single elements: those that the policy drops are found on the way.
    let mut bad = set.clone();
    bad[4].set(577, f64::NAN);
    let mut dropped = bad.clone();
    dropped[4].set(577, 0.0);
    let (_, after) = scale(&clip.non_finite(NonFinite::Drop), &[0.5; 5], &bad).ok();
    assert_same_bits(&after, &dropped, "dropped, not clipped");
}

/// The running partial of pieces: one after the other, or each by itself and then merged.
fn running(clip: &Clip, pieces: &[&[Data]], merged: bool) -> NormAccumulator {
    let new = || NormAccumulator::new(clip).expect("fit");
    let mut all = new();
    for piece in pieces {
        let views: Vec<_> = piece.iter().map(Data::view).collect();
        let mut own = new();
        let into = if merged { &mut own } else { &mut all };
        Clipper::cpu().accumulate(into, &views).expect("fit");
        if merged {
            all.merge(&own).expect("the same clip");
        }
    }
    all
}

/// Clips each piece by what all of them accumulated.
fn finish(running: &NormAccumulator, pieces: &[&[Data]]) -> Vec<Done> {
    let of = |piece: &&[Data]| {
        let mut after = piece.to_vec();
        let report = Clipper::cpu().finish(running, &mut after.iter_mut().map(Data::view_mut).collect::<Vec<_>>());
        Done { report, after }
    };
    pieces.iter().map(of).collect()
}

/// Every way to cut a list into at most this number of pieces, empty ones too.
fn cuts(set: &[Data]) -> Vec<Vec<&[Data]>> {
    let n = set.len();
    let two = (0..=n).map(|i| vec![&set[..i], &set[i..]]);
    let three = (0..=n).flat_map(|i| (i..=n).map(move |j| vec![&set[..i], &set[i..j], &set[j..]]));
    two.chain(three).chain([vec![set], set.chunks(1).collect()]).collect()
}

#[test]
fn pieces_in_any_grouping_are_one_clip() {
    let set = set(83);
    for (mode, norm_type) in [
        (Mode::Norm, NormType::L2),
        (Mode::Norm, NormType::L1),
        (Mode::Norm, NormType::Inf),
        (Mode::Norm, NormType::p(0.5)),
        (Mode::Rms, NormType::L2),
        (Mode::AverageNorm, NormType::L2),
    ] {
        for grad_scale in [1.0, 4.0] {
            for loose in [false, true] {
                let mut asked = Asked { norm_type, grad_scale, ..Asked::new(mode, 1.0) }.at_the_middle(&set);
                asked.threshold *= if loose { 1e9 } else { 1.0 };
                let expected = asked.expected(&set);
                for pieces in cuts(&set) {
                    for merged in [false, true] {
                        let running = running(&asked.clip(), &pieces, merged);
                        let done = finish(&running, &pieces);
                        let after = done.iter().flat_map(|done| done.after.clone()).collect();
                        for Done { report, .. } in done {
                            let report = report.expect("finite");
                            assert_eq!(as_measured(report.clone()), running.report().expect("finite"));
                            let all = Done { report: Ok(report), after: Vec::clone(&after) };
                            expected.check(&all, &set, asked.tolerance(Path::Cpu), &format!("{asked:?}"));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_running_partial_knows_nothing_at_first() {
    for clip in [Clip::norm(1.0), Clip::rms(1.0), Clip::average_norm(1.0)] {
        let empty = NormAccumulator::new(&clip).expect("fit");
        let report = empty.report().expect("nothing is finite");
        assert_eq!((report.total_norm, report.clip_coef, report.elements), (0.0, 1.0, 0));
        assert!(!report.clipped && report.non_finite.is_none());
        assert!(Clipper::cpu().finish(&empty, &mut []).is_ok());
    }
}

/// Neither a huge piece nor a tiny one is lost on the way: partials merge beyond the range of a float64's square.
#[test]
fn pieces_of_every_size_merge() {
    let set = [Data::of(&[3e-200f64; 4]), Data::of(&[1e200f64; 4]), Data::of(&[3e-200f64; 5])];
    let clip = Clip::norm(1.0);
    for (pieces, want) in [(&set[..1], 6e-200), (&set[1..2], 2e200), (&set[..], 2e200)] {
        for merged in [false, true] {
            let report = running(&clip, &pieces.chunks(1).collect::<Vec<_>>(), merged).report().expect("finite");
            assert_norm(report.total_norm, want, 1e-12, "merged");
        }
    }
}

#[test]
fn a_bad_element_in_one_piece_decides_in_all() {
    for policy in POLICIES {
        for (t, i) in [(0, 3), (3, 17), (4, 6 * 110 - 1)] {
            for second in [false, true] {
                let mut set = set(84);
                set[t].set(i, f64::NAN);
                if second {
                    set[4].set(6 * 110 - 1, f64::INFINITY);
                }
                let asked = Asked { policy, ..Asked::new(Mode::Norm, 1.0) };
                let expected = asked.expected(&set);
                for pieces in cuts(&set) {
                    for merged in [false, true] {
                        let what = format!("{policy:?}, element {i} of tensor {t}, second {second}");
                        let running = running(&asked.clip(), &pieces, merged);
                        let done = finish(&running, &pieces);
                        let after: Vec<_> = done.iter().flat_map(|done| done.after.clone()).collect();
                        let reports = done.into_iter().map(|done| done.report).chain([running.report()]);
                        for report in reports {
                            // The names and places are those of the list of all pieces.
                            expected.check(&Done { report, after: after.clone() }, &set, 1e-7, &what);
                        }
                    }
                }
            }
        }
    }
}

/// Clips copies of groups together.
fn clip_groups(clipper: &Clipper, groups: &[(Clip, Vec<Data>)]) -> (Result<Vec<ClipReport>, Error>, Vec<Vec<Data>>) {
    let mut after: Vec<_> = groups.iter().map(|(_, set)| set.clone()).collect();
    let mut views: Vec<Vec<TensorMut<'_>>> =
        after.iter_mut().map(|set| set.iter_mut().map(Data::view_mut).collect()).collect();
    let mut groups: Vec<_> = groups.iter().zip(&mut views).map(|((clip, _), views)| (*clip, &mut views[..])).collect();
    let reports = clipper.apply_groups(&mut groups);
    (reports, after)
}

/// Sets for a path, each of other tensors.
fn sets(path: Path) -> [Vec<Data>; 4] {
    [91, 92, 93, 94].map(|seed| {
        let mut set = set(seed);
        set.retain(|t| path.dtypes().contains(&t.dtype));
        set
    })
}

/// By norm, by RMS and tensor, by unit, and a group in which nothing is clipped.
fn groups_by_norm(sets: &[Vec<Data>; 4], policy: NonFinite) -> [Asked; 4] {
    [
        Asked { policy, ..Asked::new(Mode::Norm, 0.5) },
        Asked { policy, scope: Scope::Tensor, ..Asked::new(Mode::Rms, 1.0) }.at_the_middle(&sets[1]),
        Asked { policy, scope: Scope::Unit, ..Asked::new(Mode::Norm, 1.0) }.at_the_middle(&sets[2]),
        Asked { policy, ..Asked::new(Mode::Norm, 1e9) },
    ]
}

#[test]
fn groups_are_clipped_as_if_they_were_alone() {
    for path in Path::HOST {
        let sets = sets(*path);
        for policy in POLICIES {
            let asked = groups_by_norm(&sets, policy);
            let value = Clip::value(0.1).non_finite(policy);
            let mut groups: Vec<_> = asked.iter().map(Asked::clip).zip(sets.clone()).collect();
            groups.insert(2, (value, sets[3].clone()));
            groups.push((value, Vec::new()));
            let (reports, mut after) = clip_groups(&path.clipper(), &groups);
            let mut reports = reports.expect("finite");
            assert_eq!((reports.len(), reports.pop().map(|report| report.elements)), (6, Some(0)));
            let alone = clip_host(&path.clipper(), &value, &sets[3]).ok();
            assert_eq!(format!("{:?}", reports.remove(2)), format!("{:?}", alone.0), "the norm is NaN, so by text");
            assert_same_bits(&after.remove(2), &alone.1, "by value");
            for (i, ((asked, report), after)) in asked.iter().zip(reports).zip(after).enumerate() {
                let done = Done { report: Ok(report), after };
                asked.expected(&sets[i]).check(&done, &sets[i], asked.tolerance(*path), &format!("{path:?} {asked:?}"));
            }
        }
        assert!(path.clipper().apply_groups(&mut []).expect("nothing to do").is_empty());
    }
}

#[test]
fn a_bad_element_in_one_group_decides_as_the_policy_says() {
    for path in Path::HOST {
        for bad_group in 0..4 {
            for policy in POLICIES {
                let mut sets = sets(*path);
                let asked = groups_by_norm(&sets, policy);
                let (t, i) = (3.min(sets[bad_group].len() - 1), 21);
                sets[bad_group][t].set(i, f64::NAN);
                let mut groups: Vec<_> = asked.iter().map(Asked::clip).zip(sets.clone()).collect();
                let value = Clip::value(0.1).non_finite(policy);
                groups.insert(0, (value, sets[(bad_group + 1) % 4].clone()));
                let (reports, after) = clip_groups(&path.clipper(), &groups);
                let what = format!("{path:?} {policy:?}, bad in group {bad_group}");
                let refused = matches!(policy, NonFinite::Error | NonFinite::Skip);
                if refused {
                    for (after, (_, before)) in after.iter().zip(&groups) {
                        assert_same_bits(after, before, &what);
                    }
                } else {
                    let alone = clip_host(&path.clipper(), &value, &groups[0].1);
                    assert_same_bits(&after[0], &alone.after, &what);
                    for (g, (asked, after)) in asked.iter().zip(&after[1..]).enumerate() {
                        asked.expected(&sets[g]).check_elements(&sets[g], after, asked.tolerance(*path), &what);
                    }
                }
                let name = sets[bad_group][t].name.clone();
                let found = match reports {
                    Err(Error::NonFinite(found)) if policy == NonFinite::Error => Some(found),
                    Err(error) => panic!("{what}: {error}"),
                    Ok(reports) => {
                        assert_ne!(policy, NonFinite::Error, "{what}");
                        assert!(!refused || reports.iter().all(|report| !report.clipped), "{what}");
                        let with = |report: &&ClipReport| report.non_finite.is_some();
                        assert_eq!(reports.iter().filter(with).count(), 1, "{what}");
                        reports[bad_group + 1].non_finite.clone()
                    }
                };
                // The place is that in its group.
                let found = found.map(|found| (found.count, found.tensor, found.index, found.name));
                assert_eq!(found, Some((1, t, i as u64, name)), "{what}");
            }
        }
    }
}

/// The shard of a larger gradient: two processes that agree on the norm clip as one would.
#[test]
fn shards_are_clipped_as_the_whole() {
    let whole = [Data::rounded(Dtype::F32, Random(95).normals(1000, 1.0))];
    let clip = Clip::norm(1.0);
    let (report, after) = Path::Cpu.clip(&clip, &whole).ok();
    let shards = [0..300, 300..1000]
        .map(|range| Data::rounded(Dtype::F32, whole[0].numbers().skip(range.start).take(range.len())));
    let clipped: Vec<_> = shards
        .iter()
        .flat_map(|shard| scale(&clip, &[report.total_norm], std::slice::from_ref(shard)).ok().1)
        .collect();
    assert_eq!(numbers_of(&clipped).collect::<Vec<_>>(), numbers_of(&after).collect::<Vec<_>>());
}

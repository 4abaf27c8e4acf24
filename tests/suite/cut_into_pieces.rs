//! Guards against an element that is clipped by another's coefficient, twice or not at all, because its tensor came in
//! pieces. Pieces of odd sizes, in any order and from several threads, must give the same as one clip of the whole.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::numbers::Random;
use crate::common::reference::{Asked, Mode, SCOPES, uneven};
use crate::common::{Data, POLICIES, Path, assert_same_bits, assert_says, parameters, views};
use gradclip::{
    AdaGc, Clip, ClipReport, Clipper, DecidedClip, Dtype, Error, NonFinite, NormType, Scope, Tensor, TensorMut,
    Threshold, UnitAxis, ZClip,
};

/// The elements of each tensor in pieces of this length, in a random order.
fn pieces(set: &[Data], most: usize, random: &mut Random) -> Vec<(usize, Range<usize>)> {
    let of = |(i, t): (usize, &Data)| {
        let len = t.len();
        (0..len).step_by(most).map(move |first| (i, first..len.min(first + most))).collect::<Vec<_>>()
    };
    let mut pieces: Vec<_> = set.iter().enumerate().flat_map(of).collect();
    for i in (1..pieces.len()).rev() {
        pieces.swap(i, random.below(i + 1));
    }
    pieces
}

/// Clips copies of the pieces on three threads, those that are not left as they are.
fn clip_pieces(decided: &DecidedClip, set: &[Data], pieces: &[(usize, Range<usize>)]) -> Vec<Data> {
    let clip = |(tensor, range): &(usize, Range<usize>)| {
        let t = &set[*tensor];
        let size = t.dtype.size();
        // One byte off, so that some pieces are misaligned.
        let mut copy = vec![0; range.len() * size + 1];
        copy[1..].copy_from_slice(&t.bytes[range.start * size..range.end * size]);
        let first = range.start as u64;
        if !decided.is_unchanged(*tensor, first..range.end as u64).expect("within") {
            let mut piece = TensorMut::from_bytes(t.dtype, &mut copy[1..]).expect("whole elements");
            decided.apply(*tensor, first, &mut piece).expect("within");
        }
        (*tensor, range.start * size, copy.split_off(1))
    };
    let mut after = set.to_vec();
    std::thread::scope(|scope| {
        let shares = pieces.chunks(pieces.len().div_ceil(3).max(1));
        let threads: Vec<_> = shares.map(|share| scope.spawn(|| share.iter().map(clip).collect::<Vec<_>>())).collect();
        for (tensor, start, bytes) in threads.into_iter().flat_map(|thread| thread.join().expect("no panic")) {
            after[tensor].bytes[start..start + bytes.len()].copy_from_slice(&bytes);
        }
    });
    after
}

fn decide(clip: &Clip, set: &[Data]) -> Result<DecidedClip, Error> {
    Clipper::cpu().decide(clip, &views(set, &parameters(set)))
}

/// NaN is as good as itself.
fn told(report: &ClipReport) -> String {
    format!("{report:?}")
}

/// Checks that pieces are clipped as they are within the whole.
#[track_caller]
fn check(clip: &Clip, set: &[Data], sizes: &[usize], random: &mut Random) {
    let whole = Path::Cpu.clip(clip, set);
    let decided = decide(clip, set);
    let report = match &whole.report {
        Ok(report) => report,
        Err(error) => {
            assert_eq!(decided.expect_err("the whole fails").to_string(), error.to_string(), "{clip:?}");
            return;
        }
    };
    drop(decided);
    for size in sizes {
        // Again for each size, because some count what they are given.
        let decided = decide(clip, set).expect("the whole is clipped");
        let after = clip_pieces(&decided, set, &pieces(set, *size, random));
        assert_same_bits(&after, &whole.after, &format!("{clip:?} in pieces of {size}"));
        assert_eq!(told(&decided.report()), told(report), "{clip:?} in pieces of {size}");
    }
}

fn set(shapes: &[&[usize]], seed: u64) -> Vec<Data> {
    let mut random = Random(seed);
    let dtypes = Path::Cpu.dtypes();
    let of = |(i, shape): (usize, &&[usize])| {
        let parameter = uneven(Dtype::F32, shape, &mut random);
        uneven(dtypes[i % dtypes.len()], shape, &mut random).named(&format!("of {shape:?}")).with_parameter(parameter)
    };
    shapes.iter().enumerate().map(of).collect()
}

/// A NaN and two infinities, none of them in a first tensor.
fn spoil(mut set: Vec<Data>) -> Vec<Data> {
    let places = [(1, 5, f64::NEG_INFINITY), (3, 2, f64::NAN), (3, 7, f64::INFINITY)];
    for (tensor, index, x) in places {
        set[tensor].set(index, x);
    }
    set
}

#[test]
fn every_scope_mode_and_policy() {
    let mut random = Random(1);
    for (scope, axis, budget) in SCOPES {
        let by_example = matches!(scope, Scope::Example | Scope::ExampleTensor);
        let shapes: [&[usize]; 6] = if by_example {
            [&[11, 3], &[11], &[11, 0], &[11, 2, 3, 5], &[11, 1], &[11, 65]]
        } else {
            [&[5, 7], &[17], &[0, 4], &[3, 5, 7], &[40, 9], &[129, 31]]
        };
        let clean = set(&shapes, 2);
        let spoilt = spoil(clean.clone());
        for (mode, norm_type) in [
            (Mode::Norm, NormType::L2),
            (Mode::Norm, NormType::Inf),
            (Mode::Rms, NormType::L2),
            (Mode::AverageNorm, NormType::L2),
            (Mode::Agc, NormType::L2),
        ] {
            for policy in POLICIES {
                for grad_scale in [1.0, 3.0] {
                    let asked = Asked { scope, axis, budget, norm_type, policy, grad_scale, ..Asked::new(mode, 1.0) };
                    let clip = asked.at_the_middle(&clean).clip();
                    check(&clip, &clean, &[7, 64], &mut random);
                    check(&clip, &spoilt, &[7, 64], &mut random);
                }
            }
        }
    }
}

/// The norms' pieces cut long rows and many columns in every way; a task of the library is shorter than a piece here,
/// or as long, or longer.
#[test]
fn long_rows_and_many_columns() {
    let mut random = Random(3);
    let set = set(&[&[2, 140_001], &[5, 2049], &[20_001, 2]], 4);
    for (scope, axis) in
        [(Scope::Global, None), (Scope::Unit, None), (Scope::Unit, Some(UnitAxis::Last)), (Scope::Tensor, None)]
    {
        let asked = Asked { scope, axis, ..Asked::new(Mode::Norm, 1.0) }.at_the_middle(&set);
        check(&asked.clip(), &set, &[999, 131_072, 200_003], &mut random);
    }
    let set = self::set(&[&[3, 70, 1027], &[2, 3, 70_001], &[401, 3, 2]], 5);
    for axes in [UnitAxis::axes(&[0, 2]), UnitAxis::axes(&[1])] {
        let asked = Asked { scope: Scope::Unit, axis: Some(axes), ..Asked::new(Mode::Norm, 1.0) }.at_the_middle(&set);
        check(&asked.clip(), &set, &[999, 131_072, 200_003], &mut random);
    }
}

#[test]
fn values_under_every_policy() {
    let mut random = Random(5);
    let clean = set(&[&[5, 7], &[17], &[0, 4], &[3, 5, 7], &[40, 9]], 6);
    let spoilt = spoil(clean.clone());
    for policy in POLICIES {
        for (min, max) in [(-0.5, 0.25), (f64::NEG_INFINITY, f64::INFINITY), (-1e30, 1e30)] {
            for grad_scale in [1.0, 3.0] {
                let clip = Clip::range(min, max).grad_scale(grad_scale);
                let clip = clip.non_finite(policy);
                check(&clip, &clean, &[1, 7, 64], &mut random);
                check(&clip, &spoilt, &[1, 7, 64], &mut random);
            }
        }
    }
}

/// A clamp that needs no first look has none, and tells of what it was given so far.
#[test]
fn a_clamp_reads_once() {
    let mut data = [0.0f32, 2.0, f32::NAN];
    let read = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&read);
    let clipper = Clipper::cpu().on_progress(move |_| told.store(true, Ordering::Relaxed));
    let decided = clipper.decide(&Clip::value(1.0), &[Tensor::new(&data).named("w")]).expect("valid");
    assert!(!read.load(Ordering::Relaxed));
    assert!(!decided.report().clipped && decided.report().non_finite.is_none());
    assert!(!decided.is_unchanged(0, 0..1).expect("within"));
    decided.apply(0, 2, &mut TensorMut::new(&mut data[2..])).expect("within");
    let found = decided.report().non_finite.expect("a NaN");
    assert_eq!((found.count, found.tensor, found.name.as_deref(), found.index), (1, 0, Some("w"), 2));
    assert!(!decided.report().clipped);
    decided.apply(0, 0, &mut TensorMut::new(&mut data[..2])).expect("within");
    assert!(decided.report().clipped);
    assert_eq!(data[..2], [0.0, 1.0]);
}

/// The same run of steps, whole and in pieces: the state follows, and the elements become the same.
#[track_caller]
fn check_adaptive<T: Threshold + Clone + PartialEq + std::fmt::Debug>(clip: &Clip, mut whole: T) {
    let mut random = Random(11);
    let mut in_pieces = whole.clone();
    let mut clipped = 0;
    for step in 0..20 {
        let mut set = set(&[&[40], &[3, 5], &[0], &[2, 9]], 100 + step);
        if step % 7 == 5 {
            set = spoil(set);
        }
        let clipper = Clipper::cpu();
        let mut after = set.clone();
        let mut tensors: Vec<_> = after.iter_mut().map(Data::view_mut).collect();
        let report = clipper.apply_adaptive(clip, &mut whole, &mut tensors);
        let decided = clipper.decide_adaptive(clip, &mut in_pieces, &views(&set, &parameters(&set)));
        let what = format!("{clip:?}, {whole:?}, step {step}");
        assert_eq!(whole, in_pieces, "{what}");
        match (report, decided) {
            (Ok(report), Ok(decided)) => {
                clipped += usize::from(report.clipped);
                assert_same_bits(&clip_pieces(&decided, &set, &pieces(&set, 4, &mut random)), &after, &what);
                assert_eq!(told(&decided.report()), told(&report), "{what}");
            }
            (Err(whole), Err(in_pieces)) => assert_eq!(whole.to_string(), in_pieces.to_string(), "{what}"),
            (whole, in_pieces) => panic!("{what}: {whole:?}, {in_pieces:?}"),
        }
    }
    assert!(clipped > 0, "{clip:?}: a clip that never clips tests nothing");
}

#[test]
fn a_threshold_follows_what_is_decided() {
    let zclip = || ZClip::new().warm_up(3).z_threshold(0.1);
    let adagc = || AdaGc::new().warm_up(2).lambda_rel(0.9);
    for policy in POLICIES {
        let measuring = Clip::norm(f64::INFINITY).eps(0.0).non_finite(policy);
        check_adaptive(&measuring, zclip());
        check_adaptive(&measuring.grad_scale(4.0).scope(Scope::Tensor), adagc());
        check_adaptive(&Clip::norm(0.5).non_finite(policy), zclip());
    }
    let mut threshold = zclip();
    for clip in [Clip::value(1.0), Clip::agc(0.1)] {
        let error = Clipper::cpu().decide_adaptive(&clip, &mut threshold, &[]);
        assert!(matches!(error, Err(Error::Usage(_))), "{error:?}");
        assert_eq!(threshold, zclip());
    }
}

#[test]
fn what_is_left_is_told() {
    // Only the second row and the first column exceed 2.
    let data = [1.0f32, 0.0, 0.0, 10.0, 0.0, 0.0];
    let tensors = [Tensor::new(&data).shape(&[2, 3]).expect("fits"), Tensor::new(&data[..3])];
    let clip = Clip::norm(2.0).eps(0.0);
    let decide = |clip: Clip| Clipper::cpu().decide(&clip, &tensors).expect("valid");
    let all = |decided: &DecidedClip, ranges: &[(usize, Range<u64>)]| {
        ranges
            .iter()
            .map(|(tensor, range)| decided.is_unchanged(*tensor, range.clone()).expect("within"))
            .collect::<Vec<_>>()
    };
    let ranges = [(0, 0..3), (0, 3..6), (0, 2..4), (0, 1..3), (0, 4..6), (0, 2..5), (0, 3..3), (1, 0..3), (1, 3..3)];
    let none = [true; 9];
    assert_eq!(all(&decide(Clip::norm(100.0)), &ranges), none);
    assert_eq!(all(&decide(Clip::norm(f64::INFINITY)), &ranges), none);
    let but_empty = [false, false, false, false, false, false, true, false, true];
    assert_eq!(all(&decide(clip), &ranges), but_empty);
    assert_eq!(all(&decide(Clip::norm(100.0).grad_scale(2.0)), &ranges), but_empty);
    let by_tensor = [false, false, false, false, false, false, true, true, true];
    assert_eq!(all(&decide(clip.scope(Scope::Tensor)), &ranges), by_tensor);
    let by_row = [true, false, false, true, false, false, true, true, true];
    assert_eq!(all(&decide(clip.scope(Scope::Unit)), &ranges), by_row);
    let by_column = [false, false, false, true, true, false, true, true, true];
    assert_eq!(all(&decide(clip.scope(Scope::Unit).unit_axis(UnitAxis::Last)), &ranges), by_column);
    // The middle axis of [2, 2, 3]: of its two units, twice six elements in turns of three, the first is clipped.
    let cube = [3.0f32, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 3.0, 0.0, 1.0, 0.0, 0.0];
    let per_unit = clip.scope(Scope::Unit).unit_axis(UnitAxis::axes(&[1]));
    let cube = [Tensor::new(&cube).shape(&[2, 2, 3]).expect("fits")];
    let by_middle = Clipper::cpu().decide(&per_unit, &cube).expect("valid");
    for (range, is_unchanged) in
        [(0..3, false), (3..6, true), (4..7, false), (6..9, false), (9..12, true), (0..12, false), (12..12, true)]
    {
        assert_eq!(by_middle.is_unchanged(0, range).expect("within"), is_unchanged);
    }

    let bad = [f32::NAN, 5.0];
    let skip = Clip::value(1.0).non_finite(NonFinite::Skip);
    let decided = Clipper::cpu().decide(&skip, &[Tensor::new(&bad)]).expect("valid");
    assert!(decided.is_unchanged(0, 0..2).expect("within"));
}

#[test]
fn pieces_that_are_none() {
    let data = [3.0f32, 4.0];
    let tensors = [Tensor::new(&data).named("w"), Tensor::new(&data)];
    for clip in [Clip::norm(1.0), Clip::value(1.0)] {
        let decided = Clipper::cpu().decide(&clip, &tensors).expect("valid");
        let two = Data::of(&[9.0f32; 2]);
        let cases: [(usize, u64, Data, &[&str]); 5] = [
            (2, 0, two.clone(), &["tensor 2", "only 2 tensors"]),
            (0, 1, two.clone(), &["\"w\"", "elements 1..3", "it has 2"]),
            (1, u64::MAX, two, &["tensor 1", "it has 2"]),
            (0, 0, Data::of(&[half::f16::ONE; 2]), &["\"w\"", "float16", "float32"]),
            (0, 3, Data::of::<f32>(&[]), &["\"w\"", "elements 3..3"]),
        ];
        for (tensor, first, piece, says) in cases {
            let mut after = piece.clone();
            let error = decided.apply(tensor, first, &mut after.view_mut()).expect_err("it does not fit");
            assert!(matches!(error, Error::Tensor { .. }), "{error:?}");
            assert_says(&error, says);
            assert_same_bits(&[after], &[piece], "a piece of nothing");
        }
        for (tensor, range) in [(2, 0..0), (0, 1..3), (1, 0..u64::MAX), (0, Range { start: 2, end: 1 })] {
            assert!(matches!(decided.is_unchanged(tensor, range), Err(Error::Tensor { .. })));
        }
        assert!(!decided.report().has_non_finite());
    }
}

#[test]
fn no_tensors_at_all() {
    for clip in [Clip::norm(1.0), Clip::value(1.0)] {
        let decided = decide(&clip, &[]).expect("valid");
        assert_eq!((decided.report().elements, decided.report().clipped), (0, false));
    }
}

/// Groups in pieces are the groups as a whole, and a NaN in one is refused for all.
#[test]
fn groups_are_decided_together() {
    let mut random = Random(8);
    let clipper = Clipper::cpu();
    for policy in POLICIES {
        for bad in [false, true] {
            let first = set(&[&[3, 50], &[7], &[1], &[2, 9]], 1);
            let sets = [if bad { spoil(first) } else { first }, set(&[&[40], &[2, 90]], 2)];
            let clips = [Clip::norm(0.5), Clip::norm(0.25).scope(Scope::Tensor)].map(|clip| clip.non_finite(policy));
            let mut whole = sets.clone();
            let mut groups: Vec<Vec<_>> =
                whole.iter_mut().map(|set| set.iter_mut().map(Data::view_mut).collect()).collect();
            let mut groups: Vec<_> = clips.into_iter().zip(groups.iter_mut().map(|group| &mut group[..])).collect();
            let reports = clipper.apply_groups(&mut groups);
            let parameters = sets.each_ref().map(|set| parameters(set));
            let views = [0, 1].map(|i| views(&sets[i], &parameters[i]));
            match (reports, clipper.decide_groups(&[(clips[0], &views[0]), (clips[1], &views[1])])) {
                (Ok(reports), Ok(decided)) => {
                    for (i, (report, decided)) in reports.iter().zip(&decided).enumerate() {
                        let after = clip_pieces(decided, &sets[i], &pieces(&sets[i], 11, &mut random));
                        assert_same_bits(&after, &whole[i], &format!("{policy:?} {bad}"));
                        assert_eq!(told(&decided.report()), told(report), "{policy:?} {bad}");
                    }
                }
                (reports, decided) => {
                    let errors = (reports.expect_err("refused").to_string(), decided.expect_err("refused").to_string());
                    assert_eq!(errors.0, errors.1);
                    assert!(bad && policy == NonFinite::Error && whole == sets);
                }
            }
        }
    }
}

/// By norms from outside, pieces are scaled as the whole is.
#[test]
fn norms_from_outside() {
    let (mut random, set) = (Random(9), set(&[&[3, 50], &[7], &[90]], 3));
    let (parameters, clipper) = (parameters(&set), Clipper::cpu());
    let tensors = views(&set, &parameters);
    for policy in POLICIES {
        let clip = Clip::norm(0.5).scope(Scope::Tensor).grad_scale(4.0).non_finite(policy);
        let norms = [2.0, 0.25, 3.0];
        let mut whole = set.clone();
        let report = clipper.scale(&clip, &norms, &mut whole.iter_mut().map(Data::view_mut).collect::<Vec<_>>());
        let decided = clipper.decide_scale(&clip, &norms, &tensors).expect("valid");
        assert_same_bits(&clip_pieces(&decided, &set, &pieces(&set, 11, &mut random)), &whole, &format!("{policy:?}"));
        assert_eq!(told(&decided.report()), told(&report.expect("valid")), "{policy:?}");
        let error = clipper.decide_scale(&clip, &norms[..2], &tensors).expect_err("too few");
        assert_says(&error, &["2 given, 3 needed"]);
    }
}

//! Guards against a NaN or infinity that is missed, misplaced, or treated differently from its policy.

use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, POLICIES, Path, assert_norm, assert_same_bits, assert_scaled, numbers_of};
use gradclip::{Clip, Dtype, Error, NonFinite, NormType};

const MAX_NORM: f64 = 0.7;
const BOUND: f64 = 0.5;

/// What a set of gradients holds that is not finite: (count, tensor, index), or None.
fn bad_elements(set: &[Data]) -> Option<(u64, usize, u64)> {
    let places = |(t, data): (usize, &Data)| {
        let bad: Vec<_> =
            data.numbers().enumerate().filter(|(_, x)| !x.is_finite()).map(|(i, _)| (t, i as u64)).collect();
        bad
    };
    let bad: Vec<_> = set.iter().enumerate().flat_map(places).collect();
    bad.first().map(|(tensor, index)| (bad.len() as u64, *tensor, *index))
}

fn changed(set: &[Data], f: impl Fn(f64) -> f64) -> Vec<Data> {
    let mut after = set.to_vec();
    for t in &mut after {
        for i in 0..t.len() {
            let x = f(t.get(i));
            t.set(i, x);
        }
    }
    after
}

fn without_bad(set: &[Data]) -> Vec<Data> {
    changed(set, |x| if x.is_finite() { x } else { 0.0 })
}

/// Checks that a clip by norm or by value does what its policy says, and reports it.
#[track_caller]
fn check(path: Path, set: &[Data], policy: NonFinite, by_norm: bool, what: &str) {
    let (clip, what) = if by_norm {
        (Clip::norm(MAX_NORM), format!("{what}: {path:?} norm {policy:?}"))
    } else {
        (Clip::value(BOUND), format!("{what}: {path:?} value {policy:?}"))
    };
    let done = path.clip(&clip.non_finite(policy), set);
    let (count, tensor, index) = bad_elements(set).expect("a set with non-finite elements");
    let after = &done.after;
    let found = match &done.report {
        Err(Error::NonFinite(found)) => {
            assert_eq!(policy, NonFinite::Error, "{what}");
            let message = done.report.as_ref().expect_err("an error").to_string();
            let name = set[tensor].name.as_deref().expect("named");
            assert!(message.contains(name) && message.contains(&index.to_string()), "{what}: {message}");
            found.clone()
        }
        Err(error) => panic!("{what}: {error}"),
        Ok(report) => {
            assert_ne!(policy, NonFinite::Error, "{what}");
            report.non_finite.clone().unwrap_or_else(|| panic!("{what}: nothing found"))
        }
    };
    assert_eq!((found.count, found.tensor, found.index), (count, tensor, index), "{what}");
    assert_eq!(found.name, set[tensor].name, "{what}");
    let Ok(report) = &done.report else {
        assert_same_bits(after, set, &what);
        return;
    };
    let has_nan = numbers_of(set).any(f64::is_nan);
    let rest = without_bad(set);
    if !by_norm {
        assert!(report.total_norm.is_nan(), "{what}");
    } else if policy == NonFinite::Drop {
        let norm = exact_norm(NormType::L2, numbers_of(&rest));
        assert_norm(report.total_norm, norm, path.norm_tolerance(), &what);
    } else {
        assert_eq!(report.total_norm.is_nan(), has_nan, "{what}");
        assert!(!report.total_norm.is_finite(), "{what}");
    }
    let clamped = |x: f64| if x.is_nan() { x } else { x.clamp(-BOUND, BOUND) };
    match (policy, by_norm) {
        (NonFinite::Error, _) => unreachable!("it is an error"),
        (NonFinite::Skip, _) => {
            assert_same_bits(after, set, &what);
            assert_eq!((report.clipped, report.clip_coef), (false, 1.0), "{what}");
        }
        (NonFinite::Zero, _) => {
            assert_same_bits(after, &changed(set, |_| 0.0), &what);
            assert_eq!((report.clipped, report.clip_coef), (true, 0.0), "{what}");
        }
        (NonFinite::Drop, true) => {
            let coefficient = (MAX_NORM / (exact_norm(NormType::L2, numbers_of(&rest)) + 1e-6)).min(1.0);
            assert_norm(report.clip_coef, coefficient, path.norm_tolerance(), &what);
            assert_eq!(report.clipped, coefficient < 1.0, "{what}");
            assert_scaled(&rest, after, coefficient, path.norm_tolerance(), &what);
        }
        (NonFinite::Drop, false) => {
            assert_same_bits(after, &changed(&rest, clamped), &what);
            assert_eq!(report.clipped, numbers_of(&rest).any(|x| clamped(x) != x), "{what}");
        }
        (NonFinite::Propagate, true) => {
            for (x, got) in numbers_of(set).zip(numbers_of(after)) {
                let is_right = if has_nan || !x.is_finite() { got.is_nan() } else { got == 0.0 };
                assert!(is_right, "{what}: {x} became {got}");
            }
            assert!(report.clipped, "{what}");
            assert!(if has_nan { report.clip_coef.is_nan() } else { report.clip_coef == 0.0 }, "{what}");
        }
        (NonFinite::Propagate, false) => {
            let mut want = changed(set, clamped);
            let mut got = after.clone();
            for (want, got) in want.iter_mut().zip(&mut got) {
                for i in (0..want.len()).filter(|i| want.get(*i).is_nan()).collect::<Vec<_>>() {
                    assert!(got.get(i).is_nan(), "{what}");
                    want.set(i, 0.0);
                    got.set(i, 0.0);
                }
            }
            assert_same_bits(&got, &want, &what);
            assert_eq!(report.clip_coef, 1.0, "{what}");
            assert_eq!(report.clipped, numbers_of(set).any(|x| !x.is_nan() && clamped(x) != x), "{what}");
        }
    }
}

#[track_caller]
fn check_all(set: &[Data], what: &str) {
    for path in Path::ALL {
        if set.iter().any(|t| !path.dtypes().contains(&t.dtype)) {
            continue;
        }
        for policy in POLICIES {
            for by_norm in [true, false] {
                check(*path, set, policy, by_norm, what);
            }
        }
    }
}

fn set(dtypes: [Dtype; 3], scale: f64) -> Vec<Data> {
    let mut random = Random(3);
    let lens = [1001, 6, 515];
    let tensors = dtypes.iter().zip(lens).zip(["first", "middle", "last"]);
    tensors.map(|((dtype, len), name)| Data::rounded(*dtype, random.normals(len, scale)).named(name)).collect()
}

/// The bits of NaN, of a NaN with nothing but its lowest bit, and of both infinities.
fn bad_bits(dtype: Dtype) -> [u64; 4] {
    match dtype {
        Dtype::F16 => [0x7e00, 0xfc01, 0x7c00, 0xfc00],
        Dtype::BF16 => [0x7fc0, 0xff81, 0x7f80, 0xff80],
        Dtype::F32 => [0x7fc0_0000, 0xff80_0001, 0x7f80_0000, 0xff80_0000],
        _ => [0x7ff8 << 48, (0xfff0 << 48) | 1, 0x7ff0 << 48, 0xfff0 << 48],
    }
}

#[test]
fn one_bad_element_at_each_end_of_each_tensor() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
        for (tensor, index) in [(0, 0), (0, 1000), (2, 0), (2, 514)] {
            for bits in bad_bits(dtype) {
                let mut set = set([dtype; 3], 1.0);
                set[tensor].set_bits(index, bits);
                check_all(&set, &format!("{dtype} {bits:#x} at {tensor}, {index}"));
            }
        }
    }
}

#[test]
fn bad_elements_in_mixed_dtypes() {
    for dtypes in [[Dtype::F16, Dtype::F32, Dtype::BF16], [Dtype::BF16, Dtype::F16, Dtype::F32]] {
        for (tensor, index) in [(0, 1000), (1, 0), (1, 5), (2, 0)] {
            for which in [0, 2] {
                let mut set = set(dtypes, 1.0);
                let bits = bad_bits(set[tensor].dtype)[which];
                set[tensor].set_bits(index, bits);
                check_all(&set, &format!("{dtypes:?} at {tensor}, {index}"));
            }
        }
    }
}

/// Small enough that nothing else would have to be clipped.
#[test]
fn bad_elements_among_gradients_below_the_threshold() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
        for bits in bad_bits(dtype) {
            let mut set = set([dtype; 3], 1e-3);
            set[1].set_bits(3, bits);
            check_all(&set, &format!("{dtype} {bits:#x}"));
        }
    }
}

#[test]
fn many_bad_elements_are_counted_and_the_first_is_found() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
        let mut random = Random(9);
        let mut set: Vec<_> = [70_001, 3, 0, 20_000]
            .iter()
            .map(|n| Data::rounded(dtype, random.normals(*n, 1.0)).named(&format!("of {n}")))
            .collect();
        for _ in 0..500 {
            let t = [0, 3][random.below(2)];
            let i = 100 + random.below(set[t].len() - 100);
            set[t].set_bits(i, bad_bits(dtype)[random.below(4)]);
        }
        check_all(&set, &format!("many, {dtype}"));
        for t in &mut set {
            for i in 0..t.len() {
                t.set_bits(i, bad_bits(dtype)[i % 4]);
            }
        }
        check_all(&set, &format!("nothing but, {dtype}"));
    }
}

/// "First" means first in the list, not in memory; and an infinity before a NaN does not hide it.
#[cfg(feature = "gpu")]
#[test]
fn the_first_bad_element_is_the_first_in_the_list() {
    use crate::common::gpu::{Layout, clip_laid_out, gpu};
    for dtype in [Dtype::F32, Dtype::F16] {
        let mut random = Random(4);
        let mut set: Vec<_> =
            (0..5).map(|i| Data::rounded(dtype, random.normals(9001, 1.0)).named(&format!("number {i}"))).collect();
        for (t, i) in [(1, 9000), (2, 5), (4, 0)] {
            set[t].set(i, if t == 1 { f64::INFINITY } else { f64::NAN });
        }
        // The last of the list comes first in memory.
        let mut layout = Layout::with_gaps(&set, |_| 1);
        layout.starts.reverse();
        let clip = Clip::norm(1.0);
        let done = clip_laid_out(gpu(), &clip, &set, &layout);
        let Err(Error::NonFinite(found)) = done.report else { panic!("{:?}", done.report) };
        assert_eq!((found.count, found.tensor, found.index), (3, 1, 9000));
        assert_eq!(found.name.as_deref(), Some("number 1"));
        let done = clip_laid_out(gpu(), &clip.non_finite(NonFinite::Skip), &set, &layout);
        assert!(done.report.expect("skipped").total_norm.is_nan());
    }
}

#[test]
fn unnamed_tensors_are_told_by_their_place() {
    for path in Path::ALL {
        let set = [Data::of(&[1.0f32]), Data::of(&[1.0f32, f32::NAN])];
        let error = path.clip(&Clip::norm(1.0), &set).report.expect_err("a NaN");
        assert!(error.to_string().contains("index 1 of tensor 1"), "{error}");
        assert!(error.to_string().contains("nothing was written"), "{error}");
    }
}

/// Dropping with a loss scale: the rest is divided, and counts as clipped only if the norm of the rest says so.
#[test]
fn dropping_goes_with_a_loss_scale() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let mut set = set([*dtype; 3], 1.0);
            set[0].set(7, f64::INFINITY);
            set[2].set(514, f64::NAN);
            let rest = without_bad(&set);
            let clip = Clip::norm(1e9).non_finite(NonFinite::Drop).grad_scale(8.0);
            let (report, after) = path.clip(&clip, &set).ok();
            assert!(!report.clipped && report.clip_coef == 1.0);
            assert_same_bits(&after, &changed(&rest, |x| x / 8.0), &format!("{path:?} {dtype}"));
            for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
                let clip = Clip::norm(0.1).norm_type(norm_type).non_finite(NonFinite::Drop);
                let (report, after) = path.clip(&clip.grad_scale(8.0), &set).ok();
                let norm = exact_norm(norm_type, numbers_of(&rest)) / 8.0;
                assert!(report.clipped);
                assert_norm(report.total_norm, norm, path.norm_tolerance(), "the rest");
                assert_scaled(&rest, &after, 0.1 / (norm + 1e-6) / 8.0, path.norm_tolerance(), "the rest");
            }
        }
    }
}

/// Every norm meets them, whichever it is.
#[test]
fn every_norm_type_finds_them() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
                for bits in bad_bits(*dtype) {
                    let mut set = set([*dtype; 3], 1.0);
                    set[0].set_bits(1000, bits);
                    set[2].set_bits(0, bits);
                    let clip = Clip::norm(1.0).norm_type(norm_type);
                    let done = path.clip(&clip, &set);
                    let Err(Error::NonFinite(found)) = done.report else {
                        panic!("{path:?} {dtype} {bits:#x}: missed")
                    };
                    assert_eq!((found.count, found.tensor, found.index), (2, 0, 1000));
                    let (report, _) = path.clip(&clip.non_finite(NonFinite::Skip), &set).ok();
                    assert_eq!(report.total_norm.is_nan(), set[0].get(1000).is_nan());
                    assert!(!report.total_norm.is_finite());
                }
            }
        }
    }
}

/// What is dropped is 0, even where 0 lies outside the bounds, and even if a tiny loss scale makes a finite neighbour
/// infinite; the rest is clamped. A segment that is zeroed is 0 as well.
#[test]
fn what_is_dropped_is_0_outside_the_bounds_too() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            for n in [4, 2051] {
                let most = if *dtype == Dtype::F16 { 65504.0 } else { 3e38 };
                let numbers = [f64::INFINITY, f64::NAN, most, 0.25].into_iter().cycle().take(n);
                let set = [Data::rounded(*dtype, numbers)];
                for (grad_scale, last) in [(1.0, 0.5), (0.125, 2.0)] {
                    let clip = Clip::range(0.5, 8.0).grad_scale(grad_scale);
                    let (report, after) = path.clip(&clip.non_finite(NonFinite::Drop), &set).ok();
                    for (i, x) in after[0].numbers().enumerate() {
                        assert_eq!(x, [0.0, 0.0, 8.0, last][i % 4], "{path:?} {dtype}, element {i} of {n}");
                    }
                    assert!(report.clipped && report.non_finite.is_some());
                    let (_, after) = path.clip(&clip.non_finite(NonFinite::Zero), &set).ok();
                    assert!(after[0].numbers().all(|x| x == 0.0), "{path:?} {dtype}");
                }
            }
        }
    }
}

/// Infinities have a bound to go to; NaN has none.
#[test]
fn infinities_go_to_the_bounds() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let set = [Data::rounded(*dtype, [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.25])];
            let (report, after) = path.clip(&Clip::range(-2.0, 0.5), &set).ok();
            assert_eq!([after[0].get(0), after[0].get(1), after[0].get(3)], [0.5, -2.0, 0.25]);
            assert!(after[0].get(2).is_nan() && report.clipped);
            assert_eq!(report.non_finite.expect("three").count, 3);
        }
    }
}

//! What a clip should do, computed slowly: it finds the segment of an element from the element's place in its shape,
//! measures by [`exact_norm`], and uses the formulas in the documentation of [`Clip`].

use std::collections::HashMap;

use gradclip::{Budget, Clip, ClipReport, Dtype, NonFinite, NormType, Scope, Skipped, UnitAxis};

use super::numbers::{Random, Sum, exact_norm, rounded, smallest_normal, ulp};
use super::{Data, Done, Path, UNWRITTEN, assert_norm, assert_same_bits, is_scaled, numbers_of};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Norm,
    Rms,
    AverageNorm,
    Agc,
    Value,
}

/// Every scope, with every axis and every budget that makes different segments.
pub(crate) const SCOPES: [(Scope, Option<UnitAxis>, Budget); 8] = [
    (Scope::Global, None, Budget::Each),
    (Scope::Tensor, None, Budget::Each),
    (Scope::Unit, None, Budget::Each),
    (Scope::Unit, Some(UnitAxis::Last), Budget::Each),
    (Scope::Unit, Some(UnitAxis::Optax), Budget::Each),
    (Scope::Example, None, Budget::Each),
    (Scope::ExampleTensor, None, Budget::Uniform),
    (Scope::ExampleTensor, None, Budget::Sized),
];

/// A clip whose settings the reference reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) mode: Mode,
    /// The threshold of the mode; the upper bound of a value clip.
    pub(crate) threshold: f64,
    /// The lower bound of a value clip.
    pub(crate) min: f64,
    pub(crate) norm_type: NormType,
    pub(crate) scope: Scope,
    pub(crate) axis: Option<UnitAxis>,
    pub(crate) budget: Budget,
    pub(crate) eps: f64,
    pub(crate) agc_eps: f64,
    pub(crate) grad_scale: f64,
    pub(crate) policy: NonFinite,
    /// The total norm above which the step is skipped.
    pub(crate) skip_above: f64,
    /// Whether a value clip reports the norm.
    pub(crate) report_norm: bool,
}

/// The tensor of a segment, and its number there or among all examples.
type Place = (Option<usize>, Option<u64>);

/// What happens to a segment.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Left,
    Zeroed,
    Times(f64),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) tensor: Option<usize>,
    pub(crate) index: Option<u64>,
    /// N.
    pub(crate) norm: f64,
    pub(crate) clip_coef: f64,
    /// The threshold on N.
    pub(crate) limit: f64,
    /// The threshold that this segment just does not exceed.
    pub(crate) load: f64,
    fate: Fate,
}

/// What a clip should do to a set.
#[derive(Debug)]
pub(crate) struct Expected {
    asked: Asked,
    pub(crate) total_norm: f64,
    pub(crate) segments: Vec<Segment>,
    /// The segment of each element of each tensor.
    pub(crate) of: Vec<Vec<usize>>,
    /// How many elements are not finite, and the tensor and place of the first.
    pub(crate) bad: Option<(u64, usize, u64)>,
    /// Whether an element lies outside the bounds of a value clip.
    outside: bool,
    pub(crate) skipped: Option<Skipped>,
}

/// How far results are off. The tests print it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Errors {
    /// The largest relative error of a norm.
    pub(crate) norm: f64,
    /// The largest distance of an element from the one nearest to the exact result, in units of its last place. Float64
    /// does not count, because a norm is not right to its last bit.
    pub(crate) ulps: f64,
}

impl Errors {
    pub(crate) fn merge(self, other: Self) -> Self {
        Self { norm: self.norm.max(other.norm), ulps: self.ulps.max(other.ulps) }
    }
}

/// Whether two numbers are so close that rounding decides which is larger.
fn is_tie(a: f64, b: f64) -> bool {
    a != b && ((a / b - 1.0).abs() <= 1e-5 || (a < f64::MIN_POSITIVE && b < f64::MIN_POSITIVE))
}

/// A gradient of this shape. Rows, columns and tensors differ in size, so that a segment mistaken for its neighbour
/// shows.
pub(crate) fn uneven(dtype: Dtype, shape: &[usize], random: &mut Random) -> Data {
    let len: usize = shape.iter().product();
    let last = shape.last().copied().unwrap_or(1).max(1);
    let row = len.checked_div(shape.first().copied().unwrap_or(1)).unwrap_or(0).max(1);
    let scale = random.normal().exp();
    let size = |i: usize| scale * (1.0 + (i % last % 7) as f64) * (1.0 + (i / row % 5) as f64);
    let numbers: Vec<_> = (0..len).map(|i| random.normal() * size(i)).collect();
    Data::rounded(dtype, numbers).shaped(shape)
}

/// A place in a shape, row-major.
fn set_multi_index(place: &mut [usize], shape: &[usize], mut i: usize) {
    for (at, size) in place.iter_mut().zip(shape).rev() {
        *at = i % size;
        i /= size;
    }
}

impl Asked {
    pub(crate) fn new(mode: Mode, threshold: f64) -> Self {
        let scope = if mode == Mode::Agc { Scope::Unit } else { Scope::Global };
        Self {
            mode,
            threshold,
            min: -threshold,
            norm_type: NormType::L2,
            scope,
            axis: None,
            budget: Budget::Each,
            eps: 1e-6,
            agc_eps: 1e-3,
            grad_scale: 1.0,
            policy: NonFinite::Error,
            skip_above: f64::INFINITY,
            report_norm: false,
        }
    }

    /// With the settings that the mode and the scope use.
    pub(crate) fn clip(&self) -> Clip {
        let mut clip = match self.mode {
            Mode::Norm => Clip::norm(self.threshold).norm_type(self.norm_type).eps(self.eps),
            Mode::Rms => Clip::rms(self.threshold),
            Mode::AverageNorm => Clip::average_norm(self.threshold),
            Mode::Agc => Clip::agc(self.threshold).norm_type(self.norm_type).agc_eps(self.agc_eps),
            Mode::Value => Clip::range(self.min, self.threshold),
        };
        clip.scope = self.scope();
        match clip.scope {
            Scope::Unit => clip.unit_axis = self.axis,
            Scope::ExampleTensor if self.mode != Mode::Agc => clip.budget = self.budget,
            _ => {}
        }
        clip = match self.mode {
            Mode::Value => clip.report_norm(self.report_norm),
            _ => clip.skip_above(self.skip_above),
        };
        clip.grad_scale(self.grad_scale).non_finite(self.policy)
    }

    /// The same with a threshold that some segments exceed and others do not, none of them nearly. For one segment, a
    /// part of its norm.
    pub(crate) fn at_the_middle(mut self, set: &[Data]) -> Self {
        let mut loads: Vec<_> = self.loads(set).collect();
        loads.retain(|load| load.is_normal());
        loads.sort_by(f64::total_cmp);
        let third = loads.len() / 3;
        let gaps = loads[third..].windows(2).take(third + 1).map(|pair| (pair[1] / pair[0], pair));
        // Equal norms have no middle.
        let widest = gaps.filter(|(gap, _)| *gap > 1.0001).max_by(|a, b| a.0.total_cmp(&b.0));
        self.threshold = match widest {
            Some((_, pair)) => pair[0].sqrt() * pair[1].sqrt(),
            None => loads.first().map_or(1.0, |load| load * 0.7),
        };
        self
    }

    /// The threshold that each segment just does not exceed.
    pub(crate) fn loads(mut self, set: &[Data]) -> impl Iterator<Item = f64> {
        self.threshold = f64::MAX;
        self.expected(set).segments.into_iter().map(|s| s.load)
    }

    /// What is promised of a norm, and so of a coefficient.
    pub(crate) fn tolerance(&self, path: Path) -> f64 {
        match self.mode {
            Mode::Norm => path.tolerance_of(self.norm_type),
            Mode::Rms | Mode::AverageNorm => path.norm_tolerance(),
            // The parameter's norm has an error of its own.
            Mode::Agc => 2.0 * path.tolerance_of(self.norm_type),
            Mode::Value => 0.0,
        }
    }

    /// The scope; a value clip has no segments.
    fn scope(&self) -> Scope {
        if self.mode == Mode::Value { Scope::Global } else { self.scope }
    }

    /// Whether each axis of a tensor numbers segments.
    fn numbering(&self, t: &Data) -> Vec<bool> {
        let shape = t.dims();
        let rank = shape.len();
        let only = |range: std::ops::Range<usize>| (0..rank).map(|i| range.contains(&i)).collect();
        match self.scope() {
            Scope::Global | Scope::Tensor => return only(0..0),
            Scope::Example | Scope::ExampleTensor => return only(0..1),
            _ => {}
        }
        let axis = t.unit_axis.or(self.axis).unwrap_or_default();
        match (axis, rank) {
            (UnitAxis::First | UnitAxis::Last, 0 | 1) => only(0..0),
            (UnitAxis::First, _) => only(0..1),
            (UnitAxis::Last, _) => only(rank - 1..rank),
            (UnitAxis::Optax, _) if shape.iter().filter(|n| **n != 1).count() <= 1 => only(0..0),
            (UnitAxis::Optax, 2 | 3) => only(1..rank),
            (UnitAxis::Optax, _) => only(rank - 1..rank),
            (axis, _) => {
                // As it is told: `0,-1`, or `over:0,-1`.
                let told = axis.to_string();
                let (is_over, axes) = told.strip_prefix("over:").map_or((false, &*told), |axes| (true, axes));
                let axes: Vec<isize> = axes.split(',').filter_map(|axis| axis.parse().ok()).collect();
                let is_told = |i: usize| axes.contains(&(i as isize)) || axes.contains(&(i as isize - rank as isize));
                (0..rank).map(|i| is_told(i) != is_over).collect()
            }
        }
    }

    /// The segment of an element, as its tensor and its unit or example: the place along the axes that number them.
    fn place(&self, tensor: usize, (shape, numbering): &(Vec<usize>, Vec<bool>), at: &[usize]) -> Place {
        let along = (0..shape.len()).filter(|i| numbering[*i]);
        let number = along.fold(None, |n: Option<u64>, i| Some(n.unwrap_or(0) * shape[i] as u64 + at[i] as u64));
        let is_shared = matches!(self.scope(), Scope::Global | Scope::Example);
        ((!is_shared).then_some(tensor), number)
    }

    /// All segments in order, including those without elements.
    fn places(&self, shapes: &[(Vec<usize>, Vec<bool>)]) -> Vec<Place> {
        let of_tensor = |t: usize| {
            let (shape, numbering) = &shapes[t];
            let own: Vec<_> = (0..shape.len()).map(|i| if numbering[i] { shape[i] } else { 1 }).collect();
            let mut at = own.clone();
            let place = move |i| {
                set_multi_index(&mut at, &own, i);
                self.place(t, &shapes[t], &at)
            };
            let count = shape.iter().zip(numbering).map(|(n, numbers)| if *numbers { *n } else { 1 }).product();
            (0..count).map(place).collect::<Vec<_>>()
        };
        match self.scope() {
            Scope::Global => vec![(None, None)],
            Scope::Example => (0..shapes.len().min(1)).flat_map(of_tensor).collect(),
            _ => (0..shapes.len()).flat_map(of_tensor).collect(),
        }
    }

    /// N of some elements.
    fn norm_of(&self, numbers: impl Iterator<Item = f64> + Clone) -> f64 {
        if self.mode == Mode::Value { f64::NAN } else { self.reported(numbers) }
    }

    /// N over everything, as it is reported.
    fn reported(&self, numbers: impl Iterator<Item = f64> + Clone) -> f64 {
        let measured = match self.mode {
            Mode::Norm | Mode::Agc => self.norm_type,
            Mode::Value if !self.report_norm => return f64::NAN,
            Mode::Rms | Mode::AverageNorm | Mode::Value => NormType::L2,
        };
        let norm = if self.policy == NonFinite::Drop || numbers.clone().all(f64::is_finite) {
            exact_norm(measured, numbers.clone()) / self.grad_scale
        } else if numbers.clone().any(f64::is_nan) {
            f64::NAN
        } else {
            f64::INFINITY
        };
        let n = numbers.count().max(1) as f64;
        match self.mode {
            Mode::Norm | Mode::Agc | Mode::Value => norm,
            Mode::Rms => norm / n.sqrt(),
            Mode::AverageNorm => norm / n,
        }
    }

    pub(crate) fn expected(&self, set: &[Data]) -> Expected {
        let (expected, is_decisive) = self.expected_or_tie(set);
        assert!(is_decisive, "a tie tells nothing: {self:?}");
        expected
    }

    /// Whether no norm is so close to its threshold that rounding decides.
    pub(crate) fn is_decisive(&self, set: &[Data]) -> bool {
        self.expected_or_tie(set).1
    }

    /// The bounds of a value clip for a dtype, rounded to it through float32, like every element.
    pub(crate) fn bounds(&self, dtype: Dtype) -> (f64, f64) {
        let stored = |x| if dtype == Dtype::F64 { x } else { rounded(dtype, rounded(Dtype::F32, x)) };
        (stored(self.min), stored(self.threshold))
    }

    /// Whether an element lies outside the bounds of a value clip, and whether this is certain.
    fn is_outside(&self, dtype: Dtype, x: f64) -> (bool, bool) {
        if x.is_nan() || (x.is_infinite() && self.policy == NonFinite::Drop) {
            return (false, true);
        }
        let ((min, max), exact) = (self.bounds(dtype), x / self.grad_scale);
        // Compared in float32, where numbers that are too large are infinite.
        let unscaled = if dtype == Dtype::F64 { exact } else { rounded(Dtype::F32, exact) };
        let near = |bound: f64| match dtype {
            // It may round to 0, which is within a bound of 0.
            Dtype::F32 | Dtype::F16 | Dtype::BF16 if exact.abs() < 2f64.powi(-148) => exact != 0.0,
            _ => (unscaled / bound - 1.0).abs() < 1e-5,
        };
        let unsure = self.grad_scale != 1.0 && (near(min) || near(max));
        (unscaled < min || unscaled > max, !unsure)
    }

    /// What a clip should do to a set, and whether this is certain.
    pub(crate) fn expected_or_tie(&self, set: &[Data]) -> (Expected, bool) {
        let mut is_decisive = true;
        let mut outside = false;
        let shapes: Vec<_> = set.iter().map(|t| (t.dims(), self.numbering(t))).collect();
        let places = self.places(&shapes);
        let number: HashMap<_, _> = places.iter().enumerate().map(|(i, place)| (*place, i)).collect();
        assert_eq!(number.len(), places.len());
        let mut members = vec![Vec::new(); places.len()];
        let mut parameters = vec![Vec::new(); places.len()];
        let mut bad = None;
        let mut of = Vec::new();
        for (t, (data, shape)) in set.iter().zip(&shapes).enumerate() {
            let (mut own, mut at) = (Vec::new(), shape.0.clone());
            for (i, x) in data.numbers().enumerate() {
                set_multi_index(&mut at, &shape.0, i);
                let segment = number[&self.place(t, shape, &at)];
                members[segment].push(x);
                if let Some(parameter) = &data.parameter {
                    parameters[segment].push(parameter.get(i));
                }
                if self.mode == Mode::Value {
                    let (is_outside, is_sure) = self.is_outside(data.dtype, x);
                    (outside, is_decisive) = (outside || is_outside, is_decisive && is_sure);
                }
                if !x.is_finite() {
                    bad.get_or_insert((0, t, i as u64)).0 += 1;
                }
                own.push(segment);
            }
            of.push(own);
        }
        let total_norm = self.reported(numbers_of(set));
        let skipped = if bad.is_some() && matches!(self.policy, NonFinite::Error | NonFinite::Skip) {
            Some(Skipped::NonFinite)
        } else {
            // A value clip compares none.
            (self.mode != Mode::Value && total_norm.is_finite() && total_norm > self.skip_above)
                .then_some(Skipped::Above)
        };
        is_decisive &= !is_tie(total_norm, self.skip_above);
        let elements = numbers_of(set).count().max(1) as f64;
        let share = |tensor: Option<usize>| match (self.scope(), self.budget, tensor) {
            (Scope::ExampleTensor, Budget::Uniform, _) => 1.0 / (set.len() as f64).sqrt(),
            (Scope::ExampleTensor, Budget::Sized, Some(t)) if set[t].len() > 0 => {
                (set[t].len() as f64 / elements).sqrt()
            }
            _ => 1.0,
        };
        let segment = |(((tensor, index), members), parameter): (((_, _), &Vec<f64>), &Vec<f64>)| {
            let norm = self.norm_of(members.iter().copied());
            let by = match self.mode {
                Mode::Agc if parameter.iter().any(|x| !x.is_finite()) => f64::INFINITY,
                Mode::Agc => exact_norm(self.norm_type, parameter.iter().copied()).max(self.agc_eps),
                _ => share(tensor),
            };
            let limit = self.threshold * by;
            let ratio = match self.mode {
                Mode::Norm => limit / (norm + self.eps),
                Mode::Rms | Mode::AverageNorm => limit / norm,
                Mode::Agc if norm > limit => limit / norm.max(1e-6),
                Mode::Agc | Mode::Value => 1.0,
            };
            let is_bad = members.iter().any(|x| !x.is_finite());
            let wanted = match (norm.is_nan(), ratio.is_nan()) {
                _ if self.mode == Mode::Value => 1.0,
                (true, _) => f64::NAN,
                _ if is_bad && norm == f64::INFINITY && limit == f64::INFINITY => f64::NAN,
                // 0 / 0: nothing is above the threshold.
                (false, true) => 1.0,
                (false, false) => ratio.min(1.0),
            };
            is_decisive &= match self.mode {
                Mode::Value => true,
                Mode::Agc => !is_tie(norm, limit),
                _ => !is_tie(ratio, 1.0),
            };
            let fate = if skipped.is_some() {
                Fate::Left
            } else if is_bad && self.policy == NonFinite::Zero {
                Fate::Zeroed
            } else if self.mode != Mode::Value
                && wanted == 1.0
                && self.grad_scale == 1.0
                && !(is_bad && self.policy == NonFinite::Drop)
            {
                Fate::Left
            } else {
                Fate::Times(wanted / self.grad_scale)
            };
            let clip_coef = match fate {
                Fate::Left => 1.0,
                Fate::Zeroed => 0.0,
                Fate::Times(_) => wanted,
            };
            let eps = if self.mode == Mode::Norm { self.eps } else { 0.0 };
            Segment { tensor, index, norm, clip_coef, limit, load: (norm + eps) / by, fate }
        };
        let segments = places.into_iter().zip(&members).zip(&parameters).map(segment).collect();
        (Expected { asked: *self, total_norm, segments, of, bad, outside, skipped }, is_decisive)
    }

    /// Asserts that a report, and the set after a clip on a path, are as expected.
    #[track_caller]
    pub(crate) fn check_done(&self, done: &Done, path: Path, set: &[Data], what: &str) -> Expected {
        let expected = self.expected(set);
        expected.check(done, set, self.tolerance(path), &format!("{what} {path:?} {self:?}"));
        expected
    }

    /// Asserts that a path clips a set as expected.
    #[track_caller]
    pub(crate) fn check(&self, path: Path, set: &[Data], what: &str) -> Expected {
        self.check_done(&path.clip(&self.clip(), set), path, set, what)
    }

    /// Asserts that a path sums examples as expected.
    #[track_caller]
    pub(crate) fn check_sums(&self, path: Path, set: &[Data], what: &str) -> Expected {
        let expected = self.expected(set);
        let done = path.sum_examples(&self.clip(), set);
        expected.check_sums(&done, set, self.tolerance(path), &format!("the sum of {what} {path:?} {self:?}"));
        expected
    }
}

impl Expected {
    pub(crate) fn clipped(&self) -> Vec<bool> {
        self.segments.iter().map(|s| s.clip_coef != 1.0).collect()
    }

    /// The factor of the gradients of each segment.
    pub(crate) fn factors(&self) -> Vec<f64> {
        let factor = |s: &Segment| match s.fate {
            Fate::Left => 1.0,
            Fate::Zeroed => 0.0,
            Fate::Times(factor) => factor,
        };
        self.segments.iter().map(factor).collect()
    }

    pub(crate) fn refused(&self) -> bool {
        self.skipped.is_some()
    }

    /// The expected element; None if it keeps its bits.
    fn want(&self, dtype: Dtype, x: f64, segment: usize) -> Option<f64> {
        match self.segments[segment].fate {
            Fate::Left => None,
            Fate::Zeroed => Some(0.0),
            Fate::Times(_) if self.asked.policy == NonFinite::Drop && !x.is_finite() => Some(0.0),
            Fate::Times(factor) if self.asked.mode == Mode::Value => {
                let (min, max) = self.asked.bounds(dtype);
                let stays = self.asked.grad_scale == 1.0 && (x.is_nan() || (min <= x && x <= max));
                (!stays).then_some((x * factor).max(min).min(max)).map(|y| if x.is_nan() { x } else { y })
            }
            Fate::Times(factor) => Some(x * factor),
        }
    }

    /// How far off a report and the gradients afterwards are.
    pub(crate) fn errors(&self, done: &Done, before: &[Data]) -> Errors {
        let Ok(report) = &done.report else { return Errors::default() };
        let off = |got: f64, want: f64| if got.is_finite() && want > 0.0 { (got / want - 1.0).abs() } else { 0.0 };
        let mut errors = Errors { norm: off(report.total_norm, self.total_norm), ulps: 0.0 };
        for (got, want) in report.segments.iter().zip(&self.segments) {
            errors.norm = errors.norm.max(off(got.norm, want.norm));
        }
        for (t, (before, after)) in before.iter().zip(&done.after).enumerate() {
            for (i, x) in before.numbers().enumerate().filter(|_| before.dtype != Dtype::F64) {
                let Some(want) = self.want(before.dtype, x, self.of[t][i]) else { continue };
                let off = (after.get(i) - rounded(before.dtype, want)).abs() / ulp(before.dtype, want);
                errors.ulps = errors.ulps.max(if off.is_finite() { off } else { 0.0 });
            }
        }
        errors
    }

    /// Asserts that the report, and the gradients afterwards, are right.
    #[track_caller]
    pub(crate) fn check(&self, done: &Done, before: &[Data], tolerance: f64, what: &str) {
        self.check_report(done, before, tolerance, what);
        self.check_elements(before, &done.after, tolerance, what);
        if let Ok(ClipReport { lost: Some(lost), .. }) = &done.report {
            assert_eq!((lost.zero, lost.infinite), self.lost(before, &done.after), "{what}");
        }
    }

    /// Asserts that the report and the sums are right.
    #[track_caller]
    pub(crate) fn check_sums(&self, done: &Done, before: &[Data], tolerance: f64, what: &str) {
        if self.check_report(done, before, tolerance, what) && self.refused() {
            assert!(numbers_of(&done.after).all(|x| x == UNWRITTEN), "{what}: written");
        } else if done.report.is_ok() {
            self.check_summed(before, &done.after, tolerance, what);
        }
    }

    /// Checks the report or the error. True if it is a report, or if the step is skipped.
    #[track_caller]
    fn check_report(&self, done: &Done, before: &[Data], tolerance: f64, what: &str) -> bool {
        let found = match &done.report {
            Ok(report) => {
                assert!(self.bad.is_none() || self.asked.policy != NonFinite::Error, "{what}: no error");
                self.check_told(report, before, tolerance, what);
                report.non_finite.clone()
            }
            Err(gradclip::Error::NonFinite(found)) if self.asked.policy == NonFinite::Error => Some(found.clone()),
            Err(error) => panic!("{what}: {error}"),
        };
        let name = found.as_ref().and_then(|found| found.name.clone());
        assert_eq!(found.map(|found| (found.count, found.tensor, found.index)), self.bad, "{what}");
        assert_eq!(name, self.bad.and_then(|(_, tensor, _)| before[tensor].name.clone()), "{what}");
        done.report.is_ok() || self.refused()
    }

    #[track_caller]
    fn check_told(&self, report: &ClipReport, before: &[Data], tolerance: f64, what: &str) {
        assert_eq!(report.elements, numbers_of(before).count() as u64, "{what}");
        assert_eq!(report.skipped, self.skipped, "{what}");
        // The tolerance is that of elements, and no element of a value clip depends on its norm.
        let of_norm = if self.asked.mode == Mode::Value { 1e-6 } else { tolerance };
        assert_norm(report.total_norm, self.total_norm, of_norm, &format!("{what}, total"));
        let coefs = || self.segments.iter().map(|s| s.clip_coef);
        let least = if coefs().any(f64::is_nan) { f64::NAN } else { coefs().fold(1.0, f64::min) };
        assert_norm(report.clip_coef, least, tolerance, &format!("{what}, clip_coef"));
        let bounded = self.outside && matches!(self.segments[0].fate, Fate::Times(_));
        assert_eq!(report.clipped, self.clipped().contains(&true) || bounded, "{what}");
        if self.asked.scope() == Scope::Global {
            assert!(report.segments.is_empty(), "{what}");
            return;
        }
        assert_eq!(report.segments.len(), self.segments.len(), "{what}");
        for (got, want) in report.segments.iter().zip(&self.segments) {
            let what = format!("{what}, segment {:?} {:?}", want.tensor, want.index);
            assert_eq!((got.tensor, got.index), (want.tensor, want.index), "{what}");
            assert_norm(got.norm, want.norm, tolerance, &what);
            assert_norm(got.clip_coef, want.clip_coef, tolerance, &format!("{what}, clip_coef"));
            assert_eq!(got.clipped, want.clip_coef != 1.0, "{what}");
        }
        assert_eq!(report.num_clipped(), self.clipped().iter().filter(|clipped| **clipped).count(), "{what}");
    }

    #[track_caller]
    pub(crate) fn check_elements(&self, before: &[Data], after: &[Data], tolerance: f64, what: &str) {
        // An element that is left alone keeps every bit, the payload of a NaN too.
        let mut kept = before.to_vec();
        assert_eq!(before.len(), after.len(), "{what}");
        for (t, (before, after)) in before.iter().zip(after).enumerate() {
            for (i, x) in before.numbers().enumerate() {
                let Some(want) = self.want(before.dtype, x, self.of[t][i]) else { continue };
                let got = after.get(i);
                assert!(
                    is_scaled(before.dtype, got, want, tolerance),
                    "{what}: element {i} of tensor {t} ({} {:?}) was {x:e}; it is {got:e} and should be {want:e}",
                    before.dtype,
                    before.shape
                );
                kept[t].set_bits(i, after.bits(i));
            }
        }
        assert_same_bits(after, &kept, what);
    }

    /// How many elements became 0 or infinite and would be neither if nothing were rounded.
    fn lost(&self, before: &[Data], after: &[Data]) -> (u64, u64) {
        let (mut zero, mut infinite) = (0, 0);
        for (t, (before, after)) in before.iter().zip(after).enumerate() {
            let (min, max) = match self.asked.mode {
                Mode::Value => self.asked.bounds(before.dtype),
                _ => (f64::NEG_INFINITY, f64::INFINITY),
            };
            for (i, (x, y)) in before.numbers().zip(after.numbers()).enumerate() {
                let multiplied = matches!(self.segments[self.of[t][i]].fate, Fate::Times(factor) if factor != 0.0);
                let bound = if x < 0.0 { min } else { max };
                // Subnormal elements count in float16 only.
                let counts = before.dtype == Dtype::F16 || x.abs() >= smallest_normal(before.dtype);
                zero += u64::from(multiplied && counts && x.is_finite() && x != 0.0 && y == 0.0 && bound != 0.0);
                infinite += u64::from(multiplied && x.is_finite() && y.is_infinite() && min != max);
            }
        }
        (zero, infinite)
    }

    #[track_caller]
    fn check_summed(&self, before: &[Data], sums: &[Data], tolerance: f64, what: &str) {
        for (t, (data, sum)) in before.iter().zip(sums).enumerate() {
            for column in 0..sum.len() {
                let (mut want, mut size) = (Sum::default(), 0.0);
                let mut rows = 0;
                for i in (column..data.len()).step_by(sum.len()) {
                    let x = data.get(i);
                    let x = self.want(data.dtype, x, self.of[t][i]).unwrap_or(x);
                    want.add(x);
                    size += x.abs();
                    rows += 1;
                }
                if sum.dtype == Dtype::F32 && size > 1e38 && size.is_finite() {
                    // An intermediate sum may be infinite, and so may the terms that should cancel it.
                    continue;
                }
                let (got, want) = (sum.get(column), if size.is_finite() { want.total() } else { f64::NAN });
                // Terms that cancel leave their rounding errors, so the bound depends on their sizes: each product is
                // rounded as often as in a clip, and the GPU adds in float32.
                let rounding = if data.dtype == Dtype::F64 { f64::from(rows + 2) * f64::EPSILON } else { 3e-7 };
                // A product below the normal numbers is rounded to a multiple of the smallest.
                let rounded_away = f64::from(rows) * ulp(sum.dtype, 0.0) / 2.0;
                // On a GPU it may instead be flushed to 0.
                let is_gpu = tolerance > 5e-7;
                let smallest = if is_gpu { f64::from(rows) * f64::from(f32::MIN_POSITIVE) } else { rounded_away };
                let slack = size * (tolerance + rounding) + ulp(sum.dtype, want) * 0.5001 + smallest;
                assert!(
                    (got - want).abs() <= slack || (got.is_nan() && want.is_nan()),
                    "{what}: element {column} of sum {t} ({} {:?}) is {got:e} and should be {want:e}",
                    data.dtype,
                    data.shape
                );
            }
        }
    }
}

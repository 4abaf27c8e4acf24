//! Counts the elements that a clip makes 0 or infinite only because products are rounded to the stored type.
//!
//! A product grows with its element's magnitude. So a factor below 1 loses the magnitudes up to some number, and one
//! above 1 those from some number on: a range of bits. Looking for it costs one comparison for each element.
//!
//! Subnormal elements count only in float16. In the other types they are below 1.2e-38, so a step never misses them, and
//! if they counted, every factor below 1 would need the comparisons. So the range is empty, and free, unless a factor
//! is at most 2^-24 in float32, 2^-53 in float64 or 2^-8 in bfloat16.

use super::element::{Bits, Wide, Widen, elements};
use super::isa::{Isa, Kernel, run};
use super::tuning::BLOCK;
use crate::clip::Mode;
use crate::decision::{Action, Outcome};
use crate::dtype::with_element;
use crate::report::LostElements;
use crate::segment::{By, Matrices, SegmentLayout};
use crate::{Clip, Dtype};

/// Counts what [`write_piece`](super::write::write_piece) would lose of these elements, which are not written yet.
pub(crate) fn lost(
    clip: &Clip,
    first: u64,
    dtype: Dtype,
    (matrices, outcomes): (&Matrices, &[Outcome]),
    mut data: &[u8],
) -> LostElements {
    let mut lost = LostElements::default();
    if let Mode::Value { min, max } = clip.mode {
        if outcomes[0].action == Action::Apply {
            lost = with_element!(dtype, T => lost_within::<T>(1.0 / clip.grad_scale, (min, max), data));
        }
        return lost;
    }
    let end = first + (data.len() / dtype.size()) as u64;
    for (layout, elements) in matrices.within(first..end) {
        let (own, rest) = data.split_at((elements.end - elements.start) as usize * dtype.size());
        lost = lost.and(with_element!(dtype, T => lost_by_segment::<T>(outcomes, layout, elements.start, own)));
        data = rest;
    }
    lost
}

/// By products with the factors of the segments of a matrix. The first element is number `first` of the tensor.
/// `outcomes` are those of all segments.
pub(super) fn lost_by_segment<T: Widen>(
    outcomes: &[Outcome],
    layout: SegmentLayout,
    first: u64,
    data: &[u8],
) -> LostElements {
    let Some(last) = ((data.len() / size_of::<T>()) as u64).checked_sub(1) else { return LostElements::default() };
    let own = match layout.by {
        By::Columns => &outcomes[layout.segment as usize..][..layout.columns as usize],
        By::Whole | By::Rows => &outcomes[layout.segment_of(first) as usize..=layout.segment_of(first + last) as usize],
    };
    let extremes = own.iter().map(factor).fold([1.0, 1.0], |[least, most], f| [f.min(least), f.max(most)]);
    // The most that any segment can lose; for a single one, what it loses.
    let most = extremes.iter().fold(LostElements::default(), |lost, f| lost.and(Range::of::<T>(*f).lost::<T>(data)));
    if layout.by == By::Whole || most == LostElements::default() {
        return most;
    }
    let mut lost = LostElements::default();
    let (mut rest, mut at) = (data, first);
    let ranges: Vec<_> = match layout.by {
        By::Columns => own.iter().map(|outcome| Range::of::<T>(factor(outcome))).collect(),
        _ => Vec::new(),
    };
    while !rest.is_empty() {
        let left = (layout.columns - at % layout.columns).min((rest.len() / size_of::<T>()) as u64);
        let (row, others) = rest.split_at(left as usize * size_of::<T>());
        lost = lost.and(match layout.by {
            By::Columns => lost_by_column::<T>(&ranges[(at % layout.columns) as usize..], row),
            _ => Range::of::<T>(factor(&outcomes[layout.segment_of(at) as usize])).lost::<T>(row),
        });
        (rest, at) = (others, at + left);
    }
    lost
}

/// By a product with one factor, clamped to bounds: an element that a bound makes 0 or infinite is not lost.
fn lost_within<T: Widen>(factor: f64, bounds: (f64, f64), data: &[u8]) -> LostElements {
    let range = Range::of::<T>(factor);
    let (min, max): (f64, f64) = (T::round(bounds.0).wide().into(), T::round(bounds.1).wide().into());
    let counts = match range.to_infinity {
        true => [min < max && max == f64::INFINITY, min < max && min == f64::NEG_INFINITY],
        false => [min <= 0.0 && max > 0.0, min < 0.0 && max >= 0.0],
    };
    match counts {
        [true, true] => range.lost::<T>(data),
        [false, false] => LostElements::default(),
        [positive, _] => {
            let all = T::Bits::of_u64(u64::MAX);
            let sign = if positive { T::Bits::ZERO } else { all.minus(all.magnitude()) };
            range.of_count(range.count::<T>(all, sign, data))
        }
    }
}

/// The number that elements of a segment are multiplied by: 1 if they are not. Products with 0 are not rounded.
fn factor(outcome: &Outcome) -> f64 {
    let multiplies = outcome.action == Action::Apply && outcome.factor > 0.0;
    if multiplies { outcome.factor } else { 1.0 }
}

/// The magnitudes that products with a factor lose, as bits from `start` up to but not including `end`.
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    end: u64,
    to_infinity: bool,
}

impl Range {
    fn of<T: Widen>(factor: f64) -> Self {
        let factor = T::Wide::factor(factor).map_or(factor, Into::into);
        let number = |magnitude: u64| T::of_bits(T::Bits::of_u64(magnitude));
        let product = |magnitude| T::round(number(magnitude).wide().times(factor).into()).bits();
        let (infinity, to_infinity) = (T::INFINITY.to_u64(), factor > 1.0);
        let is_beyond = |magnitude: u64| match to_infinity {
            true => product(magnitude) >= T::INFINITY,
            false => product(magnitude) > T::Bits::ZERO,
        };
        let least = if T::DTYPE == Dtype::F16 { 1 } else { infinity & infinity.wrapping_neg() };
        if factor == 1.0 || (!to_infinity && is_beyond(least)) {
            return Self { start: 0, end: 0, to_infinity };
        }
        // A guess of the first that survives, or of the first that becomes infinite; a few steps then lead to it.
        let guess: f64 = if to_infinity {
            number(infinity - 1).wide().into() / factor
        } else {
            // Up to half of the smallest number is rounded to 0.
            0.5 * (number(1).wide().into() / factor)
        };
        let mut edge = T::round(guess).bits().to_u64().clamp(1, infinity);
        while edge > 1 && is_beyond(edge - 1) {
            edge -= 1;
        }
        while edge < infinity && !is_beyond(edge) {
            edge += 1;
        }
        let (start, end) = if to_infinity { (edge, infinity) } else { (least, edge.max(least)) };
        Self { start, end, to_infinity }
    }

    fn of_count(self, count: u64) -> LostElements {
        let (zero, infinite) = if self.to_infinity { (0, count) } else { (count, 0) };
        LostElements { zero, infinite }
    }

    /// What the factor loses of these elements.
    fn lost<T: Widen>(self, data: &[u8]) -> LostElements {
        self.of_count(self.count::<T>(T::Bits::of_u64(u64::MAX).magnitude(), T::Bits::ZERO, data))
    }

    /// How many elements are in the range, with `sign` set in it. Only the bits of `mask` are compared.
    fn count<T: Widen>(self, mask: T::Bits, sign: T::Bits, data: &[u8]) -> u64 {
        if self.start == self.end {
            return 0;
        }
        let start = T::Bits::of_u64(self.start).or(sign);
        let len = T::Bits::of_u64(self.end - self.start);
        data.chunks(BLOCK * size_of::<T>()).map(|block| run(Count::<T> { mask, start, len, block })).sum()
    }
}

/// Counts the elements of a block in a range. Integers of an element's size suffice for a block.
struct Count<'a, T: Widen> {
    mask: T::Bits,
    start: T::Bits,
    len: T::Bits,
    block: &'a [u8],
}

impl<T: Widen> Kernel for Count<'_, T> {
    type Output = u64;
    #[inline(always)]
    fn on<I: Isa>(self, _: I) -> u64 {
        let mut count = T::Bits::ZERO;
        for x in elements::<T>(self.block) {
            count = count.plus(T::Bits::count(x.bits().and(self.mask).minus(self.start) < self.len));
        }
        count.to_u64()
    }
}

/// What the columns of a row lose, given a range for each.
fn lost_by_column<T: Widen>(ranges: &[Range], row: &[u8]) -> LostElements {
    let mut lost = LostElements::default();
    for (range, x) in ranges.iter().zip(row.chunks_exact(size_of::<T>())) {
        let magnitude = elements::<T>(x).next().map_or(0, |x| x.bits().magnitude().to_u64());
        let is_lost = (range.start..range.end).contains(&magnitude);
        lost = lost.and(range.of_count(is_lost.into()));
    }
    lost
}

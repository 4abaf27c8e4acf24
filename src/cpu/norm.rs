//! The norms of runs of elements, in one read. Twin of `shaders/norm.wgsl`.
//!
//! ```text
//! for each step of 4 groups of 16 elements:       widened in registers
//!     terms of the 4 groups add up as a tree
//!     16 lanes += the tree's root
//! sum = the lanes, as a tree
//! if the sum cannot be trusted: block by block, exactly
//! ```
//!
//! 1. Each lane has one chain of additions, with a tree before it. So the chain is a quarter as long: the latency of an
//!    addition does not bound the speed, and rounding errors stay small.
//! 2. Detecting NaN and infinity costs nothing. Squares of float32 values neither overflow nor underflow in float64, so
//!    a sum is finite exactly if every element is. Only a run whose sum is not finite is walked again, to count and
//!    locate such elements.
//! 3. Float64 sums may overflow or underflow by themselves. A run whose sum leaves 1e±270 is walked again in blocks,
//!    and blocks that still leave that range are scaled by the power of two of their largest element.
//! 4. Squares of half-precision values are exact in float32. Four of them are added there, before the result goes into
//!    a lane of float64: two roundings, 2^-24 of the norm at most, for a third of the work. If a bfloat16 is too large
//!    or too small for that, the sum shows it, and the run is walked again.

use std::marker::PhantomData;

use super::count::count;
use super::element::{Wide, Widen, elements, group_size, largest_magnitude};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::Map;
use super::power::{Cube, Fourth, Magnitude, Power, Root, Square};
use super::terms::{self, Matrix, STEP, tree};
use super::tuning::BLOCK;
use crate::NormType;
use crate::magnitude::ldexp;
use crate::partial::{Location, Partial};

/// The partials of consecutive runs of `len` elements each. The first run begins at `at`.
pub(super) fn norms<T: Widen>(norm_type: NormType, at: Location, data: &[u8], len: usize, slots: &mut [Partial]) {
    let size = len * size_of::<T>();
    if norm_type == NormType::Inf {
        run(Maxima::<T> { data, size, slots, of: PhantomData });
    } else {
        sums::<T>(norm_type, data, size, slots);
    }
    for (i, (data, slot)) in data.chunks_exact(size).zip(slots).enumerate() {
        if !trusts::<T>(norm_type, slot) {
            *slot = walked::<T>(norm_type, data, |k| at.ahead(i * len + k));
        }
    }
}

/// Whether a plain sum of |x|^p, or a maximum, is right: all was finite, nothing overflowed, and nothing important
/// underflowed.
pub(super) fn trusts<T: Widen>(norm_type: NormType, found: &Partial) -> bool {
    match (norm_type, T::SQUARES_IN_F32_FROM) {
        (NormType::Inf, _) => found.max.is_finite(),
        (NormType::L2, Some(least)) => found.sum.is_finite() && found.sum >= least,
        // Neither squares nor absolute values of float32 leave the range of float64.
        (NormType::L1 | NormType::L2, _) if size_of::<T::Wide>() < size_of::<f64>() => found.sum.is_finite(),
        _ => SAFE.contains(&found.sum),
    }
}

/// Sums of float64 or of powers outside this range (and 0) are computed again, scaled. Inside it, 2^64 of them add up
/// without overflow, and what underflowed is below 2^-100 of the sum.
const SAFE: std::ops::RangeInclusive<f64> = 1e-270..=1e270;

/// The partial of a run whose plain sum cannot be trusted. Element number i is at `place(i)`.
fn walked<T: Widen>(norm_type: NormType, data: &[u8], place: impl Fn(usize) -> Location) -> Partial {
    let mut block = Vec::with_capacity(BLOCK);
    let blocks = data.chunks(BLOCK * size_of::<T>()).enumerate();
    blocks.fold(Partial::EMPTY, |partial, (i, bytes)| {
        block.clear();
        block.extend(elements::<T>(bytes).map(T::wide));
        partial.merge(of_block(norm_type, &block, |k| place(i * BLOCK + k)))
    })
}

/// The partial of a few elements of any kind. Element number i is at `place(i)`.
pub(super) fn of_block<W: Wide>(norm_type: NormType, block: &[W], place: impl Fn(usize) -> Location) -> Partial {
    of_finite(norm_type, block).unwrap_or_else(|| {
        let finite: Vec<_> = block.iter().map(|x| if x.is_finite() { *x } else { W::ZERO }).collect();
        count::<W>(bytemuck::cast_slice(block))
            .partial(place)
            .merge(of_finite(norm_type, &finite).unwrap_or(Partial::EMPTY))
    })
}

/// The partial of a few elements, or None if one is not finite.
fn of_finite<W: Wide>(norm_type: NormType, block: &[W]) -> Option<Partial> {
    let (data, mut slot) = (bytemuck::cast_slice(block), [Partial::EMPTY]);
    run(Maxima::<W> { data, size: data.len(), slots: &mut slot, of: PhantomData });
    let top = slot[0].max;
    if norm_type == NormType::Inf || top == 0.0 || !top.is_finite() {
        return top.is_finite().then_some(slot[0]);
    }
    sums::<W>(norm_type, data, data.len(), &mut slot);
    if trusts::<W>(norm_type, &slot[0]) {
        return Some(slot[0]);
    }
    let exponent = if let NormType::P(p) = norm_type {
        // Scales by the largest element itself, so that its term is 1 for any p.
        let log2_top = top.log2();
        let sum = sum_of_powers::<W>(Power { p, log2_top }, data);
        let whole = (log2_top * p).floor();
        slot[0] = Partial { sum: sum * (log2_top * p - whole).exp2(), ..Partial::EMPTY };
        whole as i64
    } else {
        let exponent = exponent_of(top);
        // Two powers of two, because one may be out of float64's range.
        let half = exponent / 2;
        let [first, second] = [-half, half - exponent].map(|n| ldexp(1.0, n));
        let scaled: Vec<f64> = block.iter().map(|x| (*x).into() * first * second).collect();
        let data = bytemuck::cast_slice(&scaled);
        sums::<f64>(norm_type, data, data.len(), &mut slot);
        if norm_type == NormType::L2 { 2 * exponent } else { exponent }
    };
    Some(Partial { exponent, ..slot[0] })
}

/// The exponent of a finite magnitude; for a subnormal that of the smallest normal number.
fn exponent_of(x: f64) -> i64 {
    ((x.to_bits() >> 52) as i64 - 1023).max(-1022)
}

/// Sums |x|^p over each run of `size` bytes.
fn sums<T: Widen>(norm_type: NormType, data: &[u8], size: usize, slots: &mut [Partial]) {
    match norm_type.power() {
        1.0 => sum_terms::<T, _>(Magnitude, data, size, slots),
        2.0 => sum_terms::<T, _>(Square, data, size, slots),
        3.0 => sum_terms::<T, _>(Cube, data, size, slots),
        4.0 => sum_terms::<T, _>(Fourth, data, size, slots),
        0.5 => sum_terms::<T, _>(Root, data, size, slots),
        p => {
            for (run, slot) in data.chunks_exact(size).zip(slots) {
                *slot = Partial { sum: sum_of_powers::<T>(Power { p, log2_top: 0.0 }, run), ..Partial::EMPTY };
            }
        }
    }
}

fn sum_terms<T: Widen, M: Map<T>>(term: M, data: &[u8], size: usize, slots: &mut [Partial]) {
    run(Sums::<T, M> { data, size, slots, term, of: PhantomData });
}

/// Sums powers of any kind.
fn sum_of_powers<T: Widen>(power: Power, data: &[u8]) -> f64 {
    let mut lanes = [[0.0; LANES]];
    let matrix = Matrix { data, stride: LANES, width: LANES };
    terms::in_blocks::<T>(matrix, &mut lanes, |block, lanes| run(Powers { data: block.data, lanes, power }));
    total(lanes[0])
}

/// Adds the powers of float64 to the lanes. It has a loop of its own: within that of [`terms`] over columns, an element
/// takes a sixth more instructions on AVX-512.
struct Powers<'a> {
    data: &'a [u8],
    lanes: &'a mut [[f64; LANES]],
    power: Power,
}

impl Kernel for Powers<'_> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        for lanes in self.lanes {
            *lanes = isa.doubles(add::<f64, I, _>(isa, isa.d(*lanes), self.data, self.power));
        }
    }
}

/// Sums the terms of each run of `size` bytes.
struct Sums<'a, T, M> {
    data: &'a [u8],
    size: usize,
    slots: &'a mut [Partial],
    term: M,
    of: PhantomData<T>,
}

impl<T: Widen, M: Map<T>> Kernel for Sums<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        for (run, slot) in self.data.chunks_exact(self.size).zip(self.slots) {
            let lanes = add::<T, I, M>(isa, isa.d([0.0; LANES]), run, self.term);
            *slot = Partial { sum: total(isa.doubles(lanes)), ..Partial::EMPTY };
        }
    }
}

/// Adds the terms of a run to the lanes.
#[inline(always)]
fn add<T: Widen, I: Isa, M: Map<T>>(isa: I, mut lanes: I::D, run: &[u8], term: M) -> I::D {
    let size = const { STEP * group_size::<T>() };
    let (whole, rest) = run.split_at(run.len() - run.len() % size);
    // Zeros after the elements add nothing.
    let mut last = [0; STEP * group_size::<f64>()];
    last[..rest.len()].copy_from_slice(rest);
    let padded = if rest.is_empty() { 0 } else { size };
    for part in [whole, &last[..padded]] {
        for step in part.chunks_exact(size) {
            lanes = isa.add(lanes, tree::<T, I, M>(isa, step, group_size::<T>(), term));
        }
    }
    lanes
}

fn total(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest |x| of each run of `size` bytes, NaN or infinite if one is.
struct Maxima<'a, T> {
    data: &'a [u8],
    size: usize,
    slots: &'a mut [Partial],
    of: PhantomData<T>,
}

impl<T: Widen> Kernel for Maxima<'_, T> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, _: I) {
        for (run, slot) in self.data.chunks_exact(self.size).zip(self.slots) {
            *slot = Partial { max: T::of_bits(largest_magnitude::<T>(run)).wide().into(), ..Partial::EMPTY };
        }
    }
}

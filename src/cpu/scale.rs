//! Multiplies a chunk by the factors of its segments. Twin of `shaders/scale.wgsl`.

use std::marker::PhantomData;

use super::element::{Wide, Widen, update_groups};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::{Map, Product, write_exact_products};
use super::tuning::BLOCK;
use crate::decision::{Action, Outcome};
use crate::segment::{By, SegmentLayout};

/// Scales elements of a matrix, of which the first is number `first` of its tensor. `outcomes` are those of all segments.
pub(super) fn scale<T: Widen>(outcomes: &[Outcome], layout: SegmentLayout, first: u64, drop: bool, data: &mut [u8]) {
    let size = size_of::<T>() as u64;
    match layout.by {
        By::Whole => scale_run::<T>(&outcomes[layout.segment as usize], drop, data),
        By::Rows => {
            let (mut rest, mut at) = (data, first);
            while !rest.is_empty() {
                let left = (layout.columns - at % layout.columns).min(rest.len() as u64 / size);
                let (run, others) = rest.split_at_mut((left * size) as usize);
                scale_run::<T>(&outcomes[layout.segment_of(at) as usize], drop, run);
                (rest, at) = (others, at + left);
            }
        }
        By::Columns => {
            let outcomes = &outcomes[layout.segment as usize..][..layout.columns as usize];
            // The last group needs as many factors as there are lanes.
            let mut factors = Vec::with_capacity(outcomes.len() + LANES);
            factors.extend(outcomes.iter().map_while(plain_factor::<T::Wide>));
            let plain = factors.len() == outcomes.len();
            factors.resize(outcomes.len() + LANES, T::Wide::ZERO);
            let column = (first % layout.columns) as usize;
            let row_left = (outcomes.len() - column) * size_of::<T>();
            let (row, rows) = data.split_at_mut(row_left.min(data.len()));
            for (column, data) in [(column, row), (0, rows)] {
                if plain {
                    run(ByColumn::<T> { factors: &factors[column..], width: outcomes.len() - column, drop, data });
                } else {
                    let columns = outcomes[column..].iter().cycle();
                    for (outcome, x) in columns.zip(data.chunks_exact_mut(size_of::<T>())) {
                        scale_run::<T>(outcome, drop, x);
                    }
                }
            }
        }
    }
}

/// The factor of all elements of a segment, if they are only multiplied.
fn plain_factor<W: Wide>(outcome: &Outcome) -> Option<W> {
    match outcome.action {
        // If other segments are scaled, a segment that is left alone holds finite elements only.
        Action::Leave => W::factor(1.0),
        Action::Apply => W::factor(outcome.factor),
        Action::Zero => None,
    }
}

fn scale_run<T: Widen>(outcome: &Outcome, drop: bool, data: &mut [u8]) {
    match outcome.action {
        Action::Leave => {}
        Action::Zero => data.fill(0),
        Action::Apply => match T::Wide::factor(outcome.factor) {
            Some(factor) if drop => run(Update::<T, _> { data, map: Product::<_, true>(factor), of: PhantomData }),
            Some(factor) => run(Update::<T, _> { data, map: Product::<_, false>(factor), of: PhantomData }),
            None => {
                let mut wide = [[T::Wide::ZERO; LANES]; BLOCK / LANES];
                for block in data.chunks_mut(BLOCK * size_of::<T>()) {
                    write_exact_products::<T>(outcome.factor, drop, block, &mut wide);
                    run(Round::<T> { wide: &wide, block });
                }
            }
        },
    }
}

struct Update<'a, T, M> {
    data: &'a mut [u8],
    map: M,
    of: PhantomData<T>,
}

impl<T: Widen, M: Map<T, To = T::Wide>> Kernel for Update<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        update_groups::<T>(self.data, |group| T::narrow(isa, self.map.of(isa, T::widen(isa, group))));
    }
}

/// Rounds a block that was computed in the wider type.
pub(super) struct Round<'a, T: Widen> {
    pub(super) wide: &'a [[T::Wide; LANES]],
    pub(super) block: &'a mut [u8],
}

impl<T: Widen> Kernel for Round<'_, T> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let mut groups = self.wide.iter();
        update_groups::<T>(self.block, |group| {
            groups.next().map_or(group, |wide| T::narrow(isa, T::Wide::lanes(isa, *wide)))
        });
    }
}

/// Multiplies each element of some rows by the factor of its column. [`LANES`] more factors follow the last one.
struct ByColumn<'a, T: Widen> {
    factors: &'a [T::Wide],
    width: usize,
    drop: bool,
    data: &'a mut [u8],
}

impl<T: Widen> Kernel for ByColumn<'_, T> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        for row in self.data.chunks_mut(self.width * size_of::<T>()) {
            let mut factors = self.factors.as_chunks::<LANES>().0.iter();
            update_groups::<T>(row, |group| {
                let Some(factors) = factors.next() else { return group };
                let wide = T::widen(isa, group);
                let wide = if self.drop { T::Wide::finite_or_zero(isa, wide) } else { wide };
                T::narrow(isa, T::Wide::mul(isa, wide, T::Wide::lanes(isa, *factors)))
            });
        }
    }
}

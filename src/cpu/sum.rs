//! Sums scaled examples. Twin of `shaders/sum.wgsl`.

use std::marker::PhantomData;

use super::element::{Lanes, Wide, Widen, for_groups, load};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::{Map, ToF64};
use super::tuning::COLUMNS;
use crate::Dtype;
use crate::decision::{Action, Outcome};

/// Sums columns of `data` over its rows, from column `left` on, with each element multiplied by its row's factor.
/// Products and sums are float64, and a sum is rounded once. `sums` holds float64 for gradients of float64 and float32
/// for all others, at any alignment.
pub(super) fn sum<T: Widen>(
    outcomes: &[Outcome],
    drop: bool,
    data: &[u8],
    columns: usize,
    left: usize,
    sums: &mut [u8],
) {
    let size = size_of::<T>();
    let wide = if T::DTYPE == Dtype::F64 { 8 } else { 4 };
    let width = sums.len() / wide;
    let mut totals = [[0f64; LANES]; COLUMNS / LANES];
    for (row, outcome) in outcomes.iter().enumerate() {
        let row = &data[(row * columns + left) * size..][..width * size];
        let totals = &mut totals[..];
        match outcome.action {
            Action::Zero => {}
            Action::Leave => run(Add::<T, _> { row, totals, map: ToF64, of: PhantomData }),
            Action::Apply => {
                run(Add::<T, _> { row, totals, map: Product { factor: outcome.factor, drop }, of: PhantomData });
            }
        }
    }
    for (sum, total) in sums.chunks_mut(wide).zip(totals.as_flattened()) {
        if wide == 8 {
            sum.copy_from_slice(&total.to_ne_bytes());
        } else {
            sum.copy_from_slice(&(*total as f32).to_ne_bytes());
        }
    }
}

/// x · factor in float64. With `drop`, a non-finite x becomes 0.
#[derive(Clone, Copy)]
struct Product {
    factor: f64,
    drop: bool,
}

impl<T: Widen> Map<T> for Product {
    type To = f64;
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, x: Lanes<I, T>) -> I::D {
        let x = if self.drop { T::Wide::finite_or_zero(isa, x) } else { x };
        isa.mul(T::Wide::to_f64(isa, x), isa.d([self.factor; LANES]))
    }
}

/// Adds a row's mapped elements to the totals of their columns.
struct Add<'a, T, M> {
    row: &'a [u8],
    totals: &'a mut [[f64; LANES]],
    map: M,
    of: PhantomData<T>,
}

impl<T: Widen, M: Map<T, To = f64>> Kernel for Add<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let mut rest = self.totals;
        // Zeros after the elements add nothing.
        for_groups::<T>(self.row, |group| {
            if let Some((totals, others)) = std::mem::take(&mut rest).split_first_mut() {
                let scaled = self.map.of(isa, T::widen(isa, load(group)));
                *totals = isa.doubles(isa.add(isa.d(*totals), scaled));
                rest = others;
            }
        });
    }
}

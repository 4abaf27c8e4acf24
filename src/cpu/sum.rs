//! Sums scaled examples. Twin of `shaders/sum.wgsl`.

use std::marker::PhantomData;

use super::element::{Wide, Widen, for_groups, load};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::{Map, Product, Same, write_exact_products};
use super::tuning::COLUMNS;
use crate::Dtype;
use crate::decision::{Action, Outcome};

/// Sums columns of `data` over its rows, from column `left` on, with each element multiplied by its row's factor.
/// Products are rounded as a clip rounds them in the type to compute in, and summed in float64. `sums` holds float64
/// for gradients of float64 and float32 for all others, at any alignment.
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
        match (outcome.action, T::Wide::factor(outcome.factor)) {
            (Action::Zero, _) => {}
            (Action::Leave, _) => run(Add::<T, _> { row, totals, map: Same, of: PhantomData }),
            (Action::Apply, Some(factor)) if drop => {
                run(Add::<T, _> { row, totals, map: Product::<_, true>(factor), of: PhantomData });
            }
            (Action::Apply, Some(factor)) => {
                run(Add::<T, _> { row, totals, map: Product::<_, false>(factor), of: PhantomData });
            }
            (Action::Apply, None) => {
                let mut scaled = [[T::Wide::ZERO; LANES]; COLUMNS / LANES];
                write_exact_products::<T>(outcome.factor, drop, row, &mut scaled);
                let row = bytemuck::cast_slice(&scaled.as_flattened()[..width]);
                run(Add::<T::Wide, _> { row, totals, map: Same, of: PhantomData });
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

/// Adds a row's mapped elements to the totals of their columns.
struct Add<'a, T, M> {
    row: &'a [u8],
    totals: &'a mut [[f64; LANES]],
    map: M,
    of: PhantomData<T>,
}

impl<T: Widen, M: Map<T, To = T::Wide>> Kernel for Add<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let mut rest = self.totals;
        // Zeros after the elements add nothing.
        for_groups::<T>(self.row, |group| {
            if let Some((totals, others)) = std::mem::take(&mut rest).split_first_mut() {
                let scaled = T::Wide::to_f64(isa, self.map.of(isa, T::widen(isa, load(group))));
                *totals = isa.doubles(isa.add(isa.d(*totals), scaled));
                rest = others;
            }
        });
    }
}

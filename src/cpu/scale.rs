//! Multiplies a chunk by the factors of its segments. Twin of `shaders/scale.wgsl`.

use std::marker::PhantomData;

use super::element::{Wide, Widen, load, update_groups};
use super::isa::{Isa, Kernel, LANES, run};
use crate::partial::{Action, Outcome};
use crate::segment::{By, Layout};

/// Scales the elements of a chunk, of which the first is number `first` of its tensor. `outcomes` are the tensor's.
pub(super) fn scale<T: Widen>(outcomes: &[Outcome], layout: Layout, first: u64, drop: bool, data: &mut [u8]) {
    let size = size_of::<T>() as u64;
    match layout.by {
        By::Whole => scale_run::<T>(&outcomes[0], drop, data),
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
            let mut factors: Option<Vec<_>> = outcomes.iter().map(plain_factor::<T::Wide>).collect();
            if let Some(factors) = &mut factors {
                // So that the last group finds as many factors as there are lanes.
                factors.resize(factors.len() + LANES, T::Wide::ZERO);
            }
            let (mut rest, mut column) = (data, (first % layout.columns) as usize);
            while !rest.is_empty() {
                let left = (outcomes.len() - column).min(rest.len() / size_of::<T>());
                let (data, others) = rest.split_at_mut(left * size_of::<T>());
                match &factors {
                    Some(factors) => run(ByColumn::<T> { factors: &factors[column..], drop, data }),
                    None => {
                        for (outcome, x) in outcomes[column..].iter().zip(data.chunks_exact_mut(size_of::<T>())) {
                            scale_run::<T>(outcome, drop, x);
                        }
                    }
                }
                (rest, column) = (others, 0);
            }
        }
    }
}

/// What all elements of a segment are multiplied by, if that is all that is done with them.
fn plain_factor<W: Wide>(outcome: &Outcome) -> Option<W> {
    match outcome.action {
        // Where others are scaled, a segment that is left alone holds finite elements only.
        Action::Leave => W::factor(1.0),
        Action::Apply => W::factor(outcome.factor),
        Action::Zero => None,
    }
}

fn scale_run<T: Widen>(outcome: &Outcome, drop: bool, data: &mut [u8]) {
    match outcome.action {
        Action::Leave => {}
        Action::Zero => data.fill(0),
        Action::Apply => {
            with_product!(T::Wide, outcome.factor, drop, map => update::<T>(data, map));
        }
    }
}

/// What becomes of each element.
pub(super) trait Map<W: Wide>: Copy {
    fn of<I: Isa>(self, isa: I, x: W::Lanes<I>) -> W::Lanes<I>;
}

#[derive(Clone, Copy)]
pub(super) struct Same;

impl<W: Wide> Map<W> for Same {
    #[inline(always)]
    fn of<I: Isa>(self, _: I, x: W::Lanes<I>) -> W::Lanes<I> {
        x
    }
}

/// x · factor, with 0 for an x that is dropped.
#[derive(Clone, Copy)]
pub(super) struct Product<W, const DROP: bool>(pub(super) W);

impl<W: Wide, const DROP: bool> Map<W> for Product<W, DROP> {
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, x: W::Lanes<I>) -> W::Lanes<I> {
        let x = if DROP { W::finite_or_zero(isa, x) } else { x };
        W::mul(isa, x, W::lanes(isa, [self.0; LANES]))
    }
}

/// The same for a factor that is no normal number of the type that is computed in.
#[derive(Clone, Copy)]
pub(super) struct ExactProduct<const DROP: bool>(pub(super) f64);

impl<W: Wide, const DROP: bool> Map<W> for ExactProduct<DROP> {
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, x: W::Lanes<I>) -> W::Lanes<I> {
        let x = if DROP { W::finite_or_zero(isa, x) } else { x };
        W::mul_by_f64(isa, x, self.0)
    }
}

/// Calls `$body` with `$map` standing for what multiplies elements, and drops them if they are to be dropped. It is
/// compiled once for each.
macro_rules! with_product {
    ($wide:ty, $factor:expr, $drop:expr, $map:ident => $body:expr) => {
        match (<$wide>::factor($factor), $drop) {
            (Some(factor), false) => {
                let $map = Product::<$wide, false>(factor);
                $body
            }
            (Some(factor), true) => {
                let $map = Product::<$wide, true>(factor);
                $body
            }
            (None, false) => {
                let $map = ExactProduct::<false>($factor);
                $body
            }
            (None, true) => {
                let $map = ExactProduct::<true>($factor);
                $body
            }
        }
    };
}
pub(super) use with_product;

/// Puts what becomes of each element in its place.
pub(super) fn update<T: Widen>(data: &mut [u8], map: impl Map<T::Wide>) {
    run(Update::<T, _> { data, map, of: PhantomData });
}

struct Update<'a, T, M> {
    data: &'a mut [u8],
    map: M,
    of: PhantomData<T>,
}

impl<T: Widen, M: Map<T::Wide>> Kernel for Update<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        update_groups::<T>(self.data, |group| T::narrow(isa, self.map.of(isa, T::widen(isa, group))));
    }
}

/// Multiplies each element of a row by the factor of its column. Behind the last factor there are as many others as lanes.
struct ByColumn<'a, T: Widen> {
    factors: &'a [T::Wide],
    drop: bool,
    data: &'a mut [u8],
}

impl<T: Widen> Kernel for ByColumn<'_, T> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let mut first = 0;
        update_groups::<T>(self.data, |group| {
            let factors = load(bytemuck::cast_slice(&self.factors[first..][..LANES]));
            first += LANES;
            let wide = T::widen(isa, group);
            let wide = if self.drop { T::Wide::finite_or_zero(isa, wide) } else { wide };
            T::narrow(isa, T::Wide::mul(isa, wide, T::Wide::lanes(isa, factors)))
        });
    }
}

//! Functions of an element, and a kernel that writes their results.

use std::marker::PhantomData;

use super::element::{Lanes, Wide, Widen, for_groups, load};
use super::isa::{Isa, Kernel, LANES, run};

/// A function of a widened element.
pub(super) trait Map<T: Widen>: Copy {
    type To: Wide;
    fn of<I: Isa>(self, isa: I, x: Lanes<I, T>) -> Lanes<I, Self::To>;
}

/// x · factor in the type to compute in. With `DROP`, a non-finite x becomes 0.
#[derive(Clone, Copy)]
pub(super) struct Product<W, const DROP: bool>(pub(super) W);

impl<T: Widen, const DROP: bool> Map<T> for Product<T::Wide, DROP> {
    type To = T::Wide;
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, x: Lanes<I, T>) -> Lanes<I, T> {
        let x = if DROP { T::Wide::finite_or_zero(isa, x) } else { x };
        T::Wide::mul(isa, x, T::Wide::lanes(isa, [self.0; LANES]))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Same;

impl<T: Widen> Map<T> for Same {
    type To = T::Wide;
    #[inline(always)]
    fn of<I: Isa>(self, _: I, x: Lanes<I, T>) -> Lanes<I, T> {
        x
    }
}

#[derive(Clone, Copy)]
pub(super) struct ToF64;

impl<T: Widen> Map<T> for ToF64 {
    type To = f64;
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, x: Lanes<I, T>) -> I::D {
        T::Wide::to_f64(isa, x)
    }
}

/// Writes the results of all elements into `to`, as far as there is room. The result of 0 fills up the last group.
pub(super) fn write<T: Widen, M: Map<T>>(map: M, data: &[u8], to: &mut [[M::To; LANES]]) {
    run(Write::<T, M> { data, map, to, of: PhantomData });
}

struct Write<'a, T: Widen, M: Map<T>> {
    data: &'a [u8],
    map: M,
    to: &'a mut [[M::To; LANES]],
    of: PhantomData<T>,
}

impl<T: Widen, M: Map<T>> Kernel for Write<'_, T, M> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let mut groups = self.to.iter_mut();
        for_groups::<T>(self.data, |group| {
            if let Some(to) = groups.next() {
                *to = M::To::numbers(isa, self.map.of(isa, T::widen(isa, load(group))));
            }
        });
    }
}

/// Multiplies in float64 and rounds once to the type to compute in, for a factor that is no normal number of that type.
/// Rare, so it need not be fast.
pub(super) fn write_exact_products<T: Widen>(factor: f64, drop: bool, data: &[u8], to: &mut [[T::Wide; LANES]]) {
    write::<T, _>(Product::<_, false>(T::Wide::ONE), data, to);
    for x in to.as_flattened_mut() {
        let kept = if drop && !x.is_finite() { T::Wide::ZERO } else { *x };
        *x = kept.times(factor);
    }
}

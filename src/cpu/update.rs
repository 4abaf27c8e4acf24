//! The update of an optimizer: reads gradients, writes parameters and state, in one pass.
//!
//! It computes in the type of the state. Operations and their order are the same on every instruction set, so the bits
//! are too.

use super::element::{Wide, group_size, load};
use super::isa::{Isa, Kernel, LANES, run};
use crate::optimizer::{Numbers, Rule};

/// Some elements: of each array the same ones, in the type that is computed in. State that the rule does not keep is
/// empty.
pub(super) struct Arrays<'a> {
    pub(super) gradient: &'a [u8],
    pub(super) parameter: &'a mut [u8],
    pub(super) state: [&'a mut [u8]; 3],
}

/// Updates elements by their gradients times `factor`.
pub(super) fn update<W: Wide>(numbers: &Numbers, factor: W, arrays: Arrays<'_>) {
    let (factor, decay) = (factor.times(numbers.sign), W::round(numbers.coupled_decay));
    match numbers.rule {
        Rule::Sgd { lr, momentum, undampened, nesterov, first } => {
            let [lr, momentum, undampened] = [lr, momentum, undampened].map(W::round);
            let buffered = momentum != W::ZERO;
            let rule = Sgd { lr, momentum, undampened, nesterov, first, buffered };
            run(Update { arrays, factor, decay, rule });
        }
        Rule::Adagrad { lr, eps } => {
            run(Update { arrays, factor, decay, rule: Adagrad { lr: W::round(lr), eps: W::round(eps) } });
        }
        Rule::RmsProp { lr, square, eps, momentum, centered } => {
            let [lr, eps, momentum] = [lr, eps, momentum].map(W::round);
            let rule = RmsProp { lr, square: Average::new(square), eps, momentum, centered };
            run(Update { arrays, factor, decay, rule });
        }
        Rule::Adam { lr, decay: own, mean, square, root, eps, amsgrad } => {
            let [lr, own, root, eps] = [lr, own, root, eps].map(W::round);
            let (mean, square) = (Average::new(mean), Average::new(square));
            run(Update { arrays, factor, decay, rule: Adam { lr, decay: own, mean, square, root, eps, amsgrad } });
        }
    }
}

/// The numbers of a group in registers.
type Lanes<I, W> = <W as Wide>::Lanes<I>;

/// What an algorithm does with a group of elements.
trait UpdateRule<W: Wide>: Copy {
    /// The new parameters. Takes the gradients, the parameters and the state, which it changes.
    fn of<I: Isa>(self, isa: I, u: Lanes<I, W>, w: Lanes<I, W>, state: &mut [Lanes<I, W>; 3]) -> Lanes<I, W>;
}

#[inline(always)]
fn all<I: Isa, W: Wide>(isa: I, x: W) -> Lanes<I, W> {
    W::lanes(isa, [x; LANES])
}

/// x · y, where x is one number.
#[inline(always)]
fn times<I: Isa, W: Wide>(isa: I, x: W, y: Lanes<I, W>) -> Lanes<I, W> {
    W::mul(isa, all(isa, x), y)
}

/// u², at most the largest finite number. An infinite average would never become finite again.
#[inline(always)]
fn squared<I: Isa, W: Wide>(isa: I, u: Lanes<I, W>) -> Lanes<I, W> {
    W::at_most(isa, W::mul(isa, u, u), all(isa, W::MAX))
}

/// √x + eps.
#[inline(always)]
fn root<I: Isa, W: Wide>(isa: I, x: Lanes<I, W>, eps: W) -> Lanes<I, W> {
    W::add(isa, W::sqrt(isa, x), all(isa, eps))
}

/// A running average. It moves by a part of the distance to the new value, because a coefficient near 1 is rounded to
/// less than its distance from 1 tells: 1 - 0.999 in float32 is off by 1e-5.
#[derive(Clone, Copy)]
struct Average<W> {
    /// At most 0.5, so that neither value is lost beside a larger one.
    part: W,
    /// Whether it is the part of the old value.
    of_old: bool,
}

impl<W: Wide> Average<W> {
    fn new(of: f64) -> Self {
        Self { part: W::round(of.min(1.0 - of)), of_old: of < 0.5 }
    }

    #[inline(always)]
    fn of<I: Isa>(self, isa: I, old: Lanes<I, W>, new: Lanes<I, W>) -> Lanes<I, W> {
        let (from, to) = if self.of_old { (new, old) } else { (old, new) };
        W::add(isa, from, times(isa, self.part, W::sub(isa, to, from)))
    }
}

#[derive(Clone, Copy)]
struct Sgd<W> {
    lr: W,
    momentum: W,
    undampened: W,
    nesterov: bool,
    first: bool,
    buffered: bool,
}

impl<W: Wide> UpdateRule<W> for Sgd<W> {
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, u: Lanes<I, W>, w: Lanes<I, W>, [b, ..]: &mut [Lanes<I, W>; 3]) -> Lanes<I, W> {
        let mut step = u;
        if self.buffered {
            if self.first {
                *b = u;
            } else {
                *b = W::add(isa, times(isa, self.momentum, *b), times(isa, self.undampened, u));
            }
            step = if self.nesterov { W::add(isa, u, times(isa, self.momentum, *b)) } else { *b };
        }
        W::sub(isa, w, times(isa, self.lr, step))
    }
}

#[derive(Clone, Copy)]
struct Adagrad<W> {
    lr: W,
    eps: W,
}

impl<W: Wide> UpdateRule<W> for Adagrad<W> {
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, u: Lanes<I, W>, w: Lanes<I, W>, [s, ..]: &mut [Lanes<I, W>; 3]) -> Lanes<I, W> {
        *s = W::add(isa, *s, squared::<I, W>(isa, u));
        W::sub(isa, w, times(isa, self.lr, W::div(isa, u, root(isa, *s, self.eps))))
    }
}

#[derive(Clone, Copy)]
struct RmsProp<W> {
    lr: W,
    square: Average<W>,
    eps: W,
    momentum: W,
    centered: bool,
}

impl<W: Wide> UpdateRule<W> for RmsProp<W> {
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, u: Lanes<I, W>, w: Lanes<I, W>, state: &mut [Lanes<I, W>; 3]) -> Lanes<I, W> {
        let [s, b, mean] = state;
        *s = self.square.of(isa, *s, squared::<I, W>(isa, u));
        let mut variance = *s;
        if self.centered {
            *mean = self.square.of(isa, *mean, u);
            variance = W::at_least(isa, W::sub(isa, *s, W::mul(isa, *mean, *mean)), all(isa, W::ZERO));
        }
        let mut step = W::div(isa, u, root(isa, variance, self.eps));
        if self.momentum != W::ZERO {
            *b = W::add(isa, times(isa, self.momentum, *b), step);
            step = *b;
        }
        W::sub(isa, w, times(isa, self.lr, step))
    }
}

#[derive(Clone, Copy)]
struct Adam<W> {
    lr: W,
    decay: W,
    mean: Average<W>,
    square: Average<W>,
    root: W,
    eps: W,
    amsgrad: bool,
}

impl<W: Wide> UpdateRule<W> for Adam<W> {
    #[inline(always)]
    fn of<I: Isa>(self, isa: I, u: Lanes<I, W>, w: Lanes<I, W>, state: &mut [Lanes<I, W>; 3]) -> Lanes<I, W> {
        let [m, v, largest] = state;
        *m = self.mean.of(isa, *m, u);
        *v = self.square.of(isa, *v, squared::<I, W>(isa, u));
        let mut square = *v;
        if self.amsgrad {
            *largest = W::at_least(isa, *v, *largest);
            square = *largest;
        }
        let divisor = W::add(isa, times(isa, self.root, W::sqrt(isa, square)), all(isa, self.eps));
        let step = times(isa, self.lr, W::div(isa, *m, divisor));
        // Decay and step are added first, so that w is rounded once.
        W::sub(isa, w, W::add(isa, times(isa, self.decay, w), step))
    }
}

struct Update<'a, W, R> {
    arrays: Arrays<'a>,
    factor: W,
    decay: W,
    rule: R,
}

impl<W: Wide, R: UpdateRule<W>> Kernel for Update<'_, W, R> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        let Self { arrays: Arrays { gradient, parameter, state: [s0, s1, s2] }, factor, decay, rule } = self;
        let size = const { group_size::<W>() };
        let whole = gradient.len() - gradient.len() % size;
        // The last group is copied to where there is room for all of it, so that one loop serves every group.
        let mut last = [[0; group_size::<f64>()]; 5];
        let (gradients, rest) = gradient.split_at(whole);
        last[0][..rest.len()].copy_from_slice(rest);
        let padded = if rest.is_empty() { 0 } else { size };
        let [mut heads, mut rests] = <[[&mut [u8]; 4]; 2]>::default();
        for (i, array) in [parameter, s0, s1, s2].into_iter().enumerate() {
            (heads[i], rests[i]) = array.split_at_mut(whole.min(array.len()));
            last[i + 1][..rests[i].len()].copy_from_slice(rests[i]);
        }
        let [last_gradients, lasts @ ..] = &mut last;
        let lasts = lasts.each_mut().map(|array| &mut array[..padded]);
        for (gradients, arrays) in [(gradients, heads), (&last_gradients[..padded], lasts)] {
            let [parameters, mut state @ ..] = arrays;
            // With `lto = "off"`, `zip` would make calls.
            let mut parameters = parameters.chunks_exact_mut(size);
            for (i, gradient) in gradients.chunks_exact(size).enumerate() {
                let Some(parameter) = parameters.next() else { break };
                let w = W::lanes(isa, load(parameter));
                let mut u = W::mul(isa, W::lanes(isa, load(gradient)), all(isa, factor));
                if decay != W::ZERO {
                    u = W::add(isa, u, times(isa, decay, w));
                }
                let elements = i * size..(i + 1) * size;
                let mut lanes = [all(isa, W::ZERO); 3];
                for (k, array) in state.iter().enumerate() {
                    // There is none where the rule keeps nothing.
                    if let Some(group) = array.get(elements.clone()) {
                        lanes[k] = W::lanes(isa, load(group));
                    }
                }
                let w = rule.of(isa, u, w, &mut lanes);
                W::store_group(W::numbers(isa, w), parameter);
                for (k, array) in state.iter_mut().enumerate() {
                    if let Some(group) = array.get_mut(elements.clone()) {
                        W::store_group(W::numbers(isa, lanes[k]), group);
                    }
                }
            }
        }
        for (rest, last) in rests.into_iter().zip(&last[1..]) {
            let len = rest.len();
            rest.copy_from_slice(&last[..len]);
        }
    }
}

//! Takes the step of an optimizer on pieces of tensors, in parallel.
//!
//! ```text
//! for each piece of a parameter, in parallel:
//!     gradients and parameters of the type that is computed in, with one factor: update       cpu/update.rs
//!     all others, block by block, in the first-level cache:
//!         widen the gradients and clip the copy        cpu/widen.rs, cpu/write.rs
//!             (none is made where a clamp changes nothing and nothing is widened)
//!         widen the parameters, or put them together with what the state keeps of them
//!         update
//!         round the parameters
//! ```

use half::{bf16, f16};

use super::clamp;
use super::element::{Wide, elements, store};
use super::isa::{Isa, Kernel, LANES, run};
use super::map::{self, Same};
use super::pool::in_parallel;
use super::scale::Round;
use super::tuning::{BLOCK, CHUNK, WRITTEN_AT_ONCE};
use super::update::{Arrays, update};
use super::widen::widen_block;
use super::write::apply_block;
use crate::decision::{Action, Outcome};
use crate::dtype::with_element;
use crate::optimizer::{Halves, Numbers};
use crate::partial::{Location, Partial};
use crate::segment::{By, Matrices};
use crate::{Clip, Dtype, NonFinite};

/// Consecutive elements of a parameter, with all that a step reads and writes of them.
pub(crate) struct Piece<'a> {
    pub(crate) parameter: (Dtype, &'a mut [u8]),
    pub(crate) gradient: (Dtype, &'a [u8]),
    /// In the places of [`Optimizer::slots`](crate::Optimizer::slots); empty where nothing is kept.
    pub(crate) state: [&'a mut [u8]; 4],
}

impl<'a> Piece<'a> {
    fn len(&self) -> usize {
        self.gradient.1.len() / self.gradient.0.size()
    }

    /// The size of all arrays.
    fn bytes(&self) -> usize {
        self.gradient.1.len() + self.parameter.1.len() + self.state.iter().map(|array| array.len()).sum::<usize>()
    }

    /// The first elements, at most this many, and the others if there are any.
    fn split(self, most: usize) -> (Self, Option<Self>) {
        let len = self.len();
        if len <= most {
            return (self, None);
        }
        let at = |array: &[u8]| array.len() / len * most;
        let (own, rest) = self.gradient.1.split_at(at(self.gradient.1));
        let cut = |array: &'a mut [u8]| {
            let at = at(array);
            array.split_at_mut(at)
        };
        let (parameter, parameters) = cut(self.parameter.1);
        let [(a, a_rest), (b, b_rest), (c, c_rest), (d, d_rest)] = self.state.map(cut);
        let piece = |parameter, gradient, state| Self {
            parameter: (self.parameter.0, parameter),
            gradient: (self.gradient.0, gradient),
            state,
        };
        (piece(parameter, own, [a, b, c, d]), Some(piece(parameters, rest, [a_rest, b_rest, c_rest, d_rest])))
    }
}

/// What a step does with the elements of a parameter.
#[derive(Clone, Copy)]
pub(crate) struct How<'a> {
    pub(crate) clip: &'a Clip,
    pub(crate) matrices: &'a Matrices,
    /// By segment.
    pub(crate) outcomes: &'a [Outcome],
    pub(crate) numbers: &'a Numbers,
}

/// Calls `task` with each piece of the parameters, in parallel. It gets the parameter's place in the list and the piece's
/// first element.
pub(crate) fn in_pieces<'a>(
    parameters: impl Iterator<Item = Piece<'a>> + Send,
    (count, bytes): (usize, usize),
    task: impl Fn(usize, u64, Piece<'a>) + Send + Sync,
) {
    let work = parameters.enumerate().flat_map(|(i, whole)| {
        let (mut rest, mut next) = (Some(whole).filter(|whole| whole.len() > 0), 0);
        std::iter::from_fn(move || {
            let (piece, first) = (rest.take()?, next);
            let (piece, others) = piece.split(CHUNK);
            (rest, next) = (others, next + piece.len() as u64);
            Some((i, first, piece))
        })
    });
    in_parallel(work, count + bytes / (CHUNK * size_of::<f32>()), bytes, |(i, first, piece)| task(i, first, piece));
}

/// The number of parameters and the bytes of all arrays, for [`in_pieces`].
pub(crate) fn size_of_all<'a>(parameters: impl Iterator<Item = Piece<'a>>) -> (usize, usize) {
    parameters.fold((0, 0), |(count, bytes), piece| (count + 1, bytes + piece.bytes()))
}

/// Takes the step on a piece that begins at this place. Returns what a clamp found.
pub(crate) fn step_piece(how: How<'_>, at: Location, piece: Piece<'_>) -> Partial {
    match piece.parameter.0 {
        Dtype::F64 => step::<f64>(how, at, piece),
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => step::<f32>(how, at, piece),
    }
}

/// Computes in W, which is float32 for halves.
fn step<W: Wide>(how: How<'_>, at: Location, piece: Piece<'_>) -> Partial {
    let len = piece.len();
    let factor = how.single_factor::<W>(piece.gradient.0, at.index..at.index + len as u64);
    if let (Some(factor), true) = (factor, piece.parameter.0 == W::DTYPE && piece.gradient.0 == W::DTYPE) {
        let Piece { parameter: (_, parameter), gradient: (_, gradient), state: [a, b, c, _] } = piece;
        update(how.numbers, factor, Arrays { gradient, parameter, state: [a, b, c] });
        return Partial::EMPTY;
    }
    // A clip of columns looks at the factors of all columns each time.
    let columns = if how.matrices.matrix.by == By::Columns { how.matrices.matrix.columns as usize } else { 0 };
    let block = if columns == 0 { BLOCK } else { columns.clamp(WRITTEN_AT_ONCE, CHUNK) };
    let mut buffers = Buffers::new(block.min(len));
    let (mut rest, mut found, mut next) = (Some(piece), Partial::EMPTY, at);
    while let Some(piece) = rest {
        let (own, others) = piece.split(block);
        let ahead = next.ahead(own.len());
        let factor = factor.or_else(|| how.unclamped::<W>(own.gradient, next));
        found = found.merge(step_block(how, next, factor, own, &mut buffers));
        (rest, next) = (others, ahead);
    }
    found
}

impl How<'_> {
    /// The factor of all these elements, if their gradients are only multiplied, and in W.
    fn single_factor<W: Wide>(self, gradient: Dtype, elements: std::ops::Range<u64>) -> Option<W> {
        let plain = self.clip.measured().is_some() && self.clip.non_finite != NonFinite::Drop;
        if !plain || clipped_in::<W>(gradient) != W::DTYPE {
            return None;
        }
        let mut matrices = self.matrices.within(elements);
        let matrix = matrices.next().map(|(matrix, _)| matrix).filter(|matrix| matrix.by == By::Whole)?;
        let outcome = &self.outcomes[matrix.segment as usize];
        match outcome.action {
            _ if matrices.next().is_some() => None,
            Action::Leave => Some(W::ONE),
            Action::Apply => W::factor(outcome.factor),
            Action::Zero => None,
        }
    }

    /// The factor of a block in W that a value clip leaves inside its bounds, and that is finite.
    fn unclamped<W: Wide>(self, (dtype, gradient): (Dtype, &[u8]), at: Location) -> Option<W> {
        let clamps = self.clip.measured().is_none() && self.outcomes[0].action != Action::Zero && dtype == W::DTYPE;
        let factor = W::factor(1.0 / self.clip.grad_scale).filter(|_| clamps)?;
        (clamp::scan::<W>(self.clip, at, gradient) == Partial::EMPTY).then_some(factor)
    }
}

/// The type in which gradients are clipped: a float64 gradient always in float64.
fn clipped_in<W: Wide>(gradient: Dtype) -> Dtype {
    if gradient == Dtype::F64 { gradient } else { W::DTYPE }
}

/// Copies of a block.
struct Buffers {
    /// Gradients in float32 or float64.
    gradients: Vec<[f64; LANES]>,
    /// Halves in float32.
    parameters: Vec<[f32; LANES]>,
}

impl Buffers {
    fn new(block: usize) -> Self {
        let groups = block.div_ceil(LANES);
        Self { gradients: vec![[0.0; LANES]; groups], parameters: vec![[0.0; LANES]; groups] }
    }
}

fn step_block<W: Wide>(
    how: How<'_>,
    at: Location,
    factor: Option<W>,
    piece: Piece<'_>,
    buffers: &mut Buffers,
) -> Partial {
    let len = piece.len();
    let Piece { parameter: (dtype, parameter), gradient: (from, gradient), state: [a, b, c, kept] } = piece;
    let mut found = Partial::EMPTY;
    let gradient = if let (Some(_), true) = (factor, from == W::DTYPE) {
        gradient
    } else {
        let to = clipped_in::<W>(from);
        if from != to {
            with_element!(from, T => widen_block::<T>(gradient, to, &mut buffers.gradients));
        }
        let all = bytemuck::cast_slice_mut(&mut buffers.gradients);
        let copy = &mut all[..len * to.size()];
        if from == to {
            copy.copy_from_slice(gradient);
        }
        if factor.is_none() {
            found = apply_block(how.clip, at, to, (how.matrices, how.outcomes), copy);
        }
        if to != W::DTYPE {
            narrow_in_place(copy);
        }
        &all[..len * size_of::<W>()]
    };
    let factor = factor.unwrap_or(W::ONE);
    let mut take = |gradient, parameter: &mut [u8]| {
        update(how.numbers, factor, Arrays { gradient, parameter, state: [&mut *a, &mut *b, &mut *c] });
    };
    if dtype == W::DTYPE {
        take(gradient, parameter);
        return found;
    }
    let halves = if kept.is_empty() { Halves::Rounded } else { how.numbers.halves };
    let wide = &mut buffers.parameters[..len.div_ceil(LANES)];
    match (halves, dtype) {
        (Halves::Rounded, Dtype::F16) => map::write::<f16, _>(Same, parameter, wide),
        (Halves::Rounded, _) => map::write::<bf16, _>(Same, parameter, wide),
        (Halves::Remainder, _) => run(Join { halves: parameter, remainders: kept, wide: bytes_of(wide, len) }),
        (Halves::Master, _) => bytes_of(wide, len).copy_from_slice(kept),
    }
    take(gradient, bytes_of(wide, len));
    match halves {
        Halves::Remainder => run(Part { wide: bytes_of(wide, len), halves: parameter, remainders: kept }),
        Halves::Rounded | Halves::Master => {
            if halves == Halves::Master {
                kept.copy_from_slice(bytes_of(wide, len));
            }
            match dtype {
                Dtype::F16 => run(Round::<f16> { wide, block: parameter }),
                _ => run(Round::<bf16> { wide, block: parameter }),
            }
        }
    }
    found
}

/// The first `len` numbers.
fn bytes_of(wide: &mut [[f32; LANES]], len: usize) -> &mut [u8] {
    &mut bytemuck::cast_slice_mut(wide)[..len * size_of::<f32>()]
}

/// Rounds float64 to float32, which begin at the same place.
fn narrow_in_place(doubles: &mut [u8]) {
    for i in 0..doubles.len() / size_of::<f64>() {
        let x: f64 = bytemuck::pod_read_unaligned(&doubles[i * size_of::<f64>()..][..size_of::<f64>()]);
        store((x as f32).to_ne_bytes(), &mut doubles[i * size_of::<f32>()..]);
    }
}

/// Puts halves and remainders together to float32.
struct Join<'a> {
    halves: &'a [u8],
    remainders: &'a [u8],
    wide: &'a mut [u8],
}

impl Kernel for Join<'_> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, _: I) {
        let parts = elements::<u16>(self.halves).zip(elements::<u16>(self.remainders));
        for ((half, remainder), wide) in parts.zip(self.wide.chunks_exact_mut(size_of::<f32>())) {
            // The half was rounded up if the highest bit of the remainder is set.
            let upper = u32::from(half).wrapping_sub(u32::from(remainder >> 15));
            store((upper << 16 | u32::from(remainder)).to_ne_bytes(), wide);
        }
    }
}

/// Takes float32 apart: the upper halves, rounded to nearest with ties away from zero, and the lower ones.
struct Part<'a> {
    wide: &'a [u8],
    halves: &'a mut [u8],
    remainders: &'a mut [u8],
}

impl Kernel for Part<'_> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, _: I) {
        let parts =
            self.halves.chunks_exact_mut(size_of::<u16>()).zip(self.remainders.chunks_exact_mut(size_of::<u16>()));
        for (wide, (half, remainder)) in elements::<u32>(self.wide).zip(parts) {
            // A NaN becomes quiet and has no remainder, so that it is not rounded to a number.
            let nan = u32::from(wide & 0x7fff_ffff > 0x7f80_0000).wrapping_neg();
            let upper = (wide.wrapping_add(0x8000) & !nan | (wide | 0x40_0000) & nan) >> 16;
            store((upper as u16).to_ne_bytes(), half);
            store(((wide & !nan) as u16).to_ne_bytes(), remainder);
        }
    }
}

//! The gradients of a benchmark: a pattern whose norm is known, cut into tensors.

use std::ops::Range;

use gradclip::Dtype;
use half::{bf16, f16};

use crate::values::Cut;

/// Where tensors may begin, in elements: 512 bytes of float32, as PyTorch's allocator has it.
const ALIGNMENT: u64 = 128;

/// How many times a long tensor of [`Cut::Many`] is as long as a short one: 64 x 64 beside 64.
const LONG: u64 = 64;

/// Tensors in one allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorSet {
    /// Where each tensor lies, in elements.
    pub(super) tensors: Vec<Range<u64>>,
    /// How many they hold.
    pub(super) elements: u64,
    /// How many the memory holds, gaps too.
    pub(super) span: u64,
}

impl TensorSet {
    /// Tensors of at most `size` elements together; `None` if that is too few for the cut.
    pub(super) fn new(cut: Cut, size: u64) -> Option<Self> {
        let lengths = match cut {
            Cut::One => vec![size],
            Cut::Transformer => {
                // The smallest divisor of the dimensions that fits; the total falls as the divisor grows.
                let (mut low, mut high) = (1, VOCABULARY);
                while low < high {
                    let middle = (low + high) / 2;
                    if transformer(middle).iter().sum::<u64>() <= size { high = middle } else { low = middle + 1 }
                }
                transformer(low)
            }
            Cut::Many(count) => {
                let short = size / ((count / 2) * (LONG + 1) + (count % 2) * LONG);
                (0..count).map(|i| if i % 2 == 0 { LONG * short } else { short }).collect()
            }
        };
        let elements = lengths.iter().sum();
        if elements > size || elements == 0 {
            return None;
        }
        let mut span = 0u64;
        let mut tensors = Vec::new();
        for length in lengths {
            let start = span.next_multiple_of(ALIGNMENT);
            span = start + length;
            tensors.push(start..span);
        }
        Some(Self { tensors, elements, span })
    }
}

const VOCABULARY: u64 = 32_000;

/// The lengths of a transformer's tensors with dimensions divided by this: 32 layers of four attention matrices, three of
/// the feed-forward part and two norms; embedding, head and the last norm.
fn transformer(divisor: u64) -> Vec<u64> {
    let [hidden, inner, vocabulary] = [4096, 11_008, VOCABULARY].map(|dimension: u64| (dimension / divisor).max(1));
    let (attention, feed_forward) = (hidden * hidden, hidden * inner);
    let layer = [[attention; 4].as_slice(), &[feed_forward; 3], &[hidden; 2]].concat();
    let ends = [vocabulary * hidden, vocabulary * hidden, hidden];
    layer.iter().copied().cycle().take(32 * layer.len()).chain(ends).collect()
}

/// Gradients of any length: one block, repeated.
#[derive(Debug)]
pub(super) struct Pattern {
    pub(super) dtype: Dtype,
    /// The block, little-endian.
    pub(super) bytes: Vec<u8>,
    /// The sums of the squares of the first elements, and of the clamped ones.
    squares: [Vec<f64>; 2],
}

/// Elements of the block.
const BLOCK: u64 = 1 << 20;

/// What the case `value` clamps to: half of the elements lie outside.
pub(super) const BOUND: f64 = 0.5;

impl Pattern {
    pub(super) fn new(dtype: Dtype) -> Self {
        let mut bytes = Vec::new();
        let mut squares = [vec![0.0], vec![0.0]];
        let mut sums = [0.0, 0.0];
        for i in 0..BLOCK as u32 {
            // Between -1 and 1, in scattered order.
            let x = (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 32_768.0 - 1.0;
            let x = match dtype {
                Dtype::F16 => {
                    let x = f16::from_f32(x);
                    bytes.extend(x.to_le_bytes());
                    f64::from(x)
                }
                Dtype::BF16 => {
                    let x = bf16::from_f32(x);
                    bytes.extend(x.to_le_bytes());
                    f64::from(x)
                }
                _ => {
                    bytes.extend(x.to_le_bytes());
                    f64::from(x)
                }
            };
            for ((sum, squares), x) in sums.iter_mut().zip(&mut squares).zip([x, x.clamp(-BOUND, BOUND)]) {
                *sum += x * x;
                squares.push(*sum);
            }
        }
        Self { dtype, bytes, squares }
    }

    /// The norm of the tensors; if `clamped`, that of their elements clamped to [`BOUND`].
    pub(super) fn norm(&self, set: &TensorSet, clamped: bool) -> f64 {
        let squares = &self.squares[usize::from(clamped)];
        let up_to = |n: u64| ((n / BLOCK) as f64, squares[(n % BLOCK) as usize]);
        let of = |tensor: &Range<u64>| {
            let ((blocks, from), (more, to)) = (up_to(tensor.start), up_to(tensor.end));
            (more - blocks) * squares[BLOCK as usize] + (to - from)
        };
        set.tensors.iter().map(of).sum::<f64>().sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_fit_their_size() {
        let of = |cut, size| TensorSet::new(cut, size).map(|set| (set.tensors.len(), set.elements));
        assert_eq!(of(Cut::One, 1), Some((1, 1)));
        assert_eq!(of(Cut::Transformer, 1 << 34), Some((291, 6_738_415_616)));
        assert_eq!(of(Cut::Many(2000), 4_160_000), Some((2000, 4_160_000)));
        assert_eq!(of(Cut::Many(1), 64), Some((1, 64)));
        assert_eq!((of(Cut::Transformer, 290), of(Cut::Many(2000), 64_999), of(Cut::Many(1), 63)), (None, None, None));
        for size in (9..33).map(|power| 1 << power) {
            let set = TensorSet::new(Cut::Transformer, size).expect("it fits");
            assert!(set.elements <= size && set.tensors.len() == 291, "{size}: {}", set.elements);
            // From the divisor 2 to 1 the set grows fourfold.
            assert!(size < 1 << 12 || set.elements > size / 5, "{size}: {}", set.elements);
            assert!(set.tensors.windows(2).all(|pair| pair[0].end <= pair[1].start), "{size}");
        }
    }

    #[test]
    fn norms_are_those_of_what_is_in_memory() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let pattern = Pattern::new(dtype);
            let element = |i: u64| {
                let at = (i % BLOCK) as usize * dtype.size();
                let bytes = &pattern.bytes[at..at + dtype.size()];
                match dtype {
                    Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
                    Dtype::F16 => f64::from(f16::from_le_bytes(bytes.try_into().unwrap())),
                    _ => f64::from(bf16::from_le_bytes(bytes.try_into().unwrap())),
                }
            };
            for (cut, size) in [(Cut::One, 1000), (Cut::One, 2 * BLOCK + 7), (Cut::Many(7), 3 * BLOCK)] {
                let set = TensorSet::new(cut, size).unwrap();
                for clamped in [false, true] {
                    let bound = if clamped { BOUND } else { 1.0 };
                    let squares =
                        set.tensors.iter().cloned().flatten().map(|i| element(i).clamp(-bound, bound).powi(2));
                    let (want, got) = (squares.sum::<f64>().sqrt(), pattern.norm(&set, clamped));
                    assert!((got / want - 1.0).abs() < 1e-10, "{dtype} {cut:?} {size}: {got}, not {want}");
                }
            }
        }
    }
}

//! A model's gradients, whole and cut into slices for the ranks.

use std::ops::Range;

use gradclip_mpi::gradclip::{Dtype, Tensor, TensorMut};
use half::{bf16, f16};

/// A gradient, as bytes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Gradient {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) bytes: Vec<u8>,
    pub(crate) shape: Vec<usize>,
    pub(crate) counted: bool,
}

impl Gradient {
    /// Pseudo-random numbers from -scale to scale.
    pub(crate) fn random(name: &str, dtype: Dtype, shape: &[usize], scale: f64, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = Vec::new();
        for _ in 0..shape.iter().product() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let x = scale * ((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0);
            match dtype {
                Dtype::F16 => bytes.extend(f16::from_f64(x).to_le_bytes()),
                Dtype::BF16 => bytes.extend(bf16::from_f64(x).to_le_bytes()),
                Dtype::F32 => bytes.extend((x as f32).to_le_bytes()),
                _ => bytes.extend(x.to_le_bytes()),
            }
        }
        Self { name: name.to_owned(), dtype, bytes, shape: shape.to_vec(), counted: true }
    }

    pub(crate) fn view(&self) -> Tensor<'_> {
        let tensor = Tensor::from_bytes(self.dtype, &self.bytes).expect("whole elements");
        tensor.named(&self.name).replica(!self.counted).shape(&self.shape).expect("the shape fits")
    }

    pub(crate) fn view_mut(&mut self) -> TensorMut<'_> {
        let tensor = TensorMut::from_bytes(self.dtype, &mut self.bytes).expect("whole elements");
        tensor.named(&self.name).replica(!self.counted).shape(&self.shape).expect("the shape fits")
    }

    /// Its elements.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = f64> {
        self.bytes.chunks_exact(self.dtype.size()).map(|bytes| match *bytes {
            [a, b] if self.dtype == Dtype::F16 => f16::from_le_bytes([a, b]).to_f64(),
            [a, b] => bf16::from_le_bytes([a, b]).to_f64(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).into(),
            _ => f64::from_le_bytes(bytes.try_into().expect("eight bytes")),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Some of its elements, as a tensor of one dimension.
    pub(crate) fn slice(&self, of: Range<usize>) -> Self {
        let size = self.dtype.size();
        let (shape, bytes) = (vec![of.len()], self.bytes[of.start * size..of.end * size].to_vec());
        Self { bytes, shape, ..self.clone() }
    }

    /// Some columns of a matrix.
    pub(crate) fn columns(&self, of: Range<usize>) -> Self {
        let (size, width) = (self.dtype.size(), self.shape[1]);
        let row = |row: &[u8]| row[of.start * size..of.end * size].to_vec();
        let bytes = self.bytes.chunks_exact(width * size).flat_map(row).collect();
        Self { bytes, shape: vec![self.shape[0], of.len()], ..self.clone() }
    }

    /// Sets one float32 element.
    pub(crate) fn set(&mut self, index: usize, value: f32) {
        self.bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// Matrices, a bias and an empty tensor, of every dtype.
pub(crate) fn model() -> Vec<Gradient> {
    vec![
        Gradient::random("embedding", Dtype::F32, &[300, 211], 0.02, 1),
        Gradient::random("attention", Dtype::BF16, &[64, 65], 0.5, 2),
        Gradient::random("empty", Dtype::F32, &[0], 1.0, 3),
        Gradient::random("norm", Dtype::F64, &[77], 3.0, 4),
        Gradient::random("head", Dtype::F16, &[1001], 0.1, 5),
        Gradient::random("bias", Dtype::F32, &[3], 7.0, 6),
    ]
}

/// The elements that a rank holds, of `len`: higher ranks hold more, and the first none.
pub(crate) fn slice_range(len: usize, rank: u32, size: u32) -> Range<usize> {
    let begin = |rank: u32| len * (rank * rank.saturating_sub(1)) as usize / (size * (size - 1)).max(1) as usize;
    if size == 1 { 0..len } else { begin(rank)..begin(rank + 1) }
}

/// The slices of all gradients that a rank holds.
pub(crate) fn slices(of: &[Gradient], rank: u32, size: u32) -> Vec<Gradient> {
    of.iter().map(|whole| whole.slice(slice_range(whole.len(), rank, size))).collect()
}

pub(crate) fn views(of: &[Gradient]) -> Vec<Tensor<'_>> {
    of.iter().map(Gradient::view).collect()
}

pub(crate) fn views_mut(of: &mut [Gradient]) -> Vec<TensorMut<'_>> {
    of.iter_mut().map(Gradient::view_mut).collect()
}

//! What the tests share: generated gradients, and what is true of tensors.

#![allow(dead_code, reason = "each test file uses a part")]

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Shape, Storage, Tensor, TensorId, Var};

pub(crate) const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Numbers that look random, of about this size, the same for the same seed.
pub(crate) fn numbers(seed: u64, count: usize, size: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 / (1u64 << 53) as f64 - 0.5) * 2.0 * size
    };
    (0..count).map(|_| next()).collect()
}

pub(crate) fn tensor(seed: u64, shape: impl Into<Shape>, size: f64, dtype: DType) -> Tensor {
    let shape = shape.into();
    let numbers = numbers(seed, shape.elem_count(), size);
    Tensor::from_vec(numbers, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("a tensor of the CPU")
}

pub(crate) fn var(seed: u64, shape: impl Into<Shape>, dtype: DType) -> Var {
    Var::from_tensor(&tensor(seed, shape, 1.0, dtype)).expect("a var of the CPU")
}

/// A store with these gradients.
pub(crate) fn store<'a>(gradients: impl IntoIterator<Item = (&'a Var, &'a Tensor)>) -> GradStore {
    let mut store = GradStore::default();
    for (var, gradient) in gradients {
        store.insert(var, gradient.clone());
    }
    store
}

/// The elements in row-major order.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)).expect("floats");
    flat.to_vec1().expect("float64")
}

/// The bits of the elements in row-major order, each in a word of its own.
pub(crate) fn bits(tensor: &Tensor) -> Vec<u64> {
    let flat = tensor.flatten_all().expect("a tensor");
    match flat.dtype() {
        DType::F16 => flat.to_vec1::<half::f16>().expect("its dtype").iter().map(|x| x.to_bits().into()).collect(),
        DType::BF16 => flat.to_vec1::<half::bf16>().expect("its dtype").iter().map(|x| x.to_bits().into()).collect(),
        DType::F32 => flat.to_vec1::<f32>().expect("its dtype").iter().map(|x| x.to_bits().into()).collect(),
        DType::F64 => flat.to_vec1::<f64>().expect("its dtype").iter().map(|x| x.to_bits()).collect(),
        dtype => panic!("no test has {dtype:?}"),
    }
}

/// The gradients of vars, their bits: None for a var without one.
pub(crate) fn all_bits(store: &GradStore, vars: &[Var]) -> Vec<Option<Vec<u64>>> {
    vars.iter().map(|var| store.get(var).map(bits)).collect()
}

/// Which tensor each var has as gradient, and where its storage is.
pub(crate) fn identities(store: &GradStore, vars: &[Var]) -> Vec<Option<(TensorId, usize)>> {
    vars.iter().map(|var| store.get(var).map(|t| (t.id(), address(t)))).collect()
}

pub(crate) fn address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// The L2 norm, from squares summed in float64.
pub(crate) fn norm<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> f64 {
    tensors.into_iter().flat_map(values).map(|x| x * x).sum::<f64>().sqrt()
}

#[track_caller]
pub(crate) fn assert_near(found: f64, expected: f64, relative: f64) {
    assert!((found - expected).abs() <= relative * expected.abs(), "{found}, expected {expected}");
}

/// That an error says all of this.
#[track_caller]
pub(crate) fn assert_says<T: std::fmt::Debug>(result: Result<T, gradclip_candle::Error>, words: &[&str]) {
    let message = result.expect_err("this cannot be clipped").to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

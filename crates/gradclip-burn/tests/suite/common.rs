//! Models, gradients of any numbers for them, and the plain loops that a clip is held against.

use std::sync::OnceLock;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};

/// The wgpu device, opened so that gradients are clipped where they lie.
pub(crate) fn wgpu() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        let opened = gradclip_burn::open_wgpu(Device::wgpu_options());
        opened.unwrap_or_else(|error| panic!("{error}. These tests need a Vulkan device (mesa-vulkan-drivers)."))
    };
    DEVICE.get_or_init(open).clone()
}

/// The backends: burn's own CPU and the GPU.
pub(crate) fn devices() -> [(&'static str, Device); 2] {
    [("flex", Device::flex()), ("wgpu", wgpu())]
}

/// Layers of several kinds: embeddings, a convolution, linear layers, a norm, a parameter of its own.
#[derive(Module, Debug)]
pub(crate) struct Net {
    embedding: Embedding,
    convolution: Conv1d,
    hidden: Vec<Linear>,
    norm: LayerNorm,
    scale: Param<Tensor<1>>,
}

impl Net {
    pub(crate) fn new(device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(23, 8).init(device),
            convolution: Conv1dConfig::new(8, 6, 3).init(device),
            hidden: vec![LinearConfig::new(6, 40).init(device), LinearConfig::new(40, 5).with_bias(false).init(device)],
            norm: LayerNormConfig::new(5).init(device),
            scale: Param::from_tensor(Tensor::ones([1], device)),
        }
    }

    pub(crate) fn embedding_id(&self) -> ParamId {
        self.embedding.weight.id
    }
}

/// The paths of [`Net`]'s parameters with their shapes, in order.
pub(crate) const NET: [(&str, &[usize]); 9] = [
    ("embedding.weight", &[23, 8]),
    ("convolution.weight", &[6, 8, 3]),
    ("convolution.bias", &[6]),
    ("hidden.0.weight", &[6, 40]),
    ("hidden.0.bias", &[40]),
    ("hidden.1.weight", &[40, 5]),
    ("norm.gamma", &[5]),
    ("norm.beta", &[5]),
    ("scale", &[1]),
];

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub(crate) fn normals(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// Gradients for each parameter, of a dtype: `numbers` gets the parameter's place and how many there are to be.
pub(crate) fn gradients<M: Module>(
    module: &M,
    device: &Device,
    dtype: DType,
    numbers: impl FnMut(usize, usize) -> Vec<f64>,
) -> GradientsParams {
    struct Fill<'a, F> {
        grads: GradientsParams,
        device: &'a Device,
        dtype: DType,
        numbers: F,
        at: usize,
    }
    impl<F: FnMut(usize, usize) -> Vec<f64>> ModuleVisitor for Fill<'_, F> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let shape = param.lazy_shape();
            let data = TensorData::new((self.numbers)(self.at, shape.num_elements()), shape).convert_dtype(self.dtype);
            self.grads.register(param.id, Tensor::<D>::from_data(data, (self.device, self.dtype)));
            self.at += 1;
        }
    }
    let mut fill = Fill { grads: GradientsParams::new(), device, dtype, numbers, at: 0 };
    module.visit(&mut fill);
    fill.grads
}

/// The gradients as numbers, in the module's order; None for a parameter without.
pub(crate) fn numbers<M: Module>(module: &M, grads: &GradientsParams) -> Vec<Option<Vec<f64>>> {
    struct Read<'a> {
        grads: &'a GradientsParams,
        found: Vec<Option<Vec<f64>>>,
    }
    impl ModuleVisitor for Read<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let read = |grad: Tensor<D>| grad.into_data().convert_dtype(DType::F64).try_to_vec().expect("float64");
            self.found.push(self.grads.get::<D>(param.id).map(read));
        }
    }
    let mut read = Read { grads, found: Vec::new() };
    module.visit(&mut read);
    read.found
}

/// [`numbers`] of a module all of whose parameters have a gradient.
pub(crate) fn all_numbers<M: Module>(module: &M, grads: &GradientsParams) -> Vec<Vec<f64>> {
    numbers(module, grads).into_iter().map(|grad| grad.expect("each has a gradient")).collect()
}

/// The parameters as numbers.
pub(crate) fn weights<M: Module>(module: &M) -> Vec<Vec<f64>> {
    struct Read(Vec<Vec<f64>>);
    impl ModuleVisitor for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.val().inner().into_data().convert_dtype(DType::F64).try_to_vec().expect("float64"));
        }
    }
    let mut read = Read(Vec::new());
    module.visit(&mut read);
    read.0
}

pub(crate) fn norm<'a>(numbers: impl IntoIterator<Item = &'a f64>) -> f64 {
    numbers.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Rounded to float32, as gradients are.
pub(crate) fn rounded(numbers: &[f64]) -> Vec<f64> {
    numbers.iter().map(|x| f64::from(*x as f32)).collect()
}

#[track_caller]
pub(crate) fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let near = (a - b).abs() <= tolerance * b.abs() + 1e-30;
        assert!(near, "{what}: element {i} is {a:e}, expected {b:e}");
    }
}

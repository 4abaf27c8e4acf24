//! What the tests share: gradients as bytes, every path that clips them, and assertions.

#![allow(dead_code, reason = "each test file uses a part")]

#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod numbers;
pub(crate) mod optimizers;
pub(crate) mod reference;
pub(crate) mod torch_cases;

use gradclip::{Clip, ClipReport, Clipper, Dtype, Element, Error, NonFinite, NormType, Tensor, TensorMut, UnitAxis};
use numbers::{from_bits, rounded_bits};

/// Every policy.
pub(crate) const POLICIES: [NonFinite; 5] =
    [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];

/// How often to repeat what takes long: a few times for each change, and often where `GRADCLIP_WHOLE` is set, as by night.
pub(crate) fn repeats(few: usize, often: usize) -> usize {
    if std::env::var_os("GRADCLIP_WHOLE").is_some() { often } else { few }
}

/// A clip's report as measuring gives it: what is not written is not rounded.
pub(crate) fn as_measured(mut report: ClipReport) -> ClipReport {
    report.lost = None;
    report
}

/// A gradient: bytes of one dtype.
#[derive(Clone, PartialEq)]
pub(crate) struct Data {
    pub(crate) name: Option<String>,
    pub(crate) dtype: Dtype,
    pub(crate) bytes: Vec<u8>,
    /// None for one dimension.
    pub(crate) shape: Option<Vec<usize>>,
    pub(crate) unit_axis: Option<UnitAxis>,
    pub(crate) counted: bool,
    pub(crate) parameter: Option<Box<Data>>,
}

/// Only the first few numbers, because sets are long.
impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} {:?}..", self.len(), self.dtype, self.numbers().take(4).collect::<Vec<_>>())
    }
}

impl Data {
    pub(crate) fn of<T: Element>(elements: &[T]) -> Self {
        Self::from_bytes(T::DTYPE, bytemuck::cast_slice(elements).to_vec())
    }

    /// Numbers, each rounded to the dtype.
    pub(crate) fn rounded(dtype: Dtype, numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut bytes = Vec::new();
        for x in numbers {
            bytes.extend_from_slice(&rounded_bits(dtype, x).to_le_bytes()[..dtype.size()]);
        }
        Self::from_bytes(dtype, bytes)
    }

    pub(crate) fn from_bytes(dtype: Dtype, bytes: Vec<u8>) -> Self {
        Self { name: None, dtype, bytes, shape: None, unit_axis: None, counted: true, parameter: None }
    }

    pub(crate) fn named(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    pub(crate) fn shaped(mut self, shape: &[usize]) -> Self {
        self.shape = Some(shape.to_vec());
        self
    }

    pub(crate) fn with_unit_axis(mut self, axis: UnitAxis) -> Self {
        self.unit_axis = Some(axis);
        self
    }

    /// Makes it a replica of a tensor that another rank counts.
    pub(crate) fn uncounted(mut self) -> Self {
        self.counted = false;
        self
    }

    pub(crate) fn with_parameter(mut self, parameter: Self) -> Self {
        self.parameter = Some(Box::new(parameter));
        self
    }

    /// The shape, given or implied.
    pub(crate) fn dims(&self) -> Vec<usize> {
        self.shape.clone().unwrap_or_else(|| vec![self.len()])
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    pub(crate) fn bits(&self, i: usize) -> u64 {
        let size = self.dtype.size();
        let mut word = [0; 8];
        word[..size].copy_from_slice(&self.bytes[i * size..(i + 1) * size]);
        u64::from_le_bytes(word)
    }

    pub(crate) fn set_bits(&mut self, i: usize, bits: u64) {
        let size = self.dtype.size();
        self.bytes[i * size..(i + 1) * size].copy_from_slice(&bits.to_le_bytes()[..size]);
    }

    pub(crate) fn get(&self, i: usize) -> f64 {
        from_bits(self.dtype, self.bits(i))
    }

    pub(crate) fn set(&mut self, i: usize, x: f64) {
        self.set_bits(i, rounded_bits(self.dtype, x));
    }

    /// The numbers after a value clip to these bounds.
    pub(crate) fn clamped(&self, min: f64, max: f64) -> Self {
        let mut after = self.clone();
        for i in 0..self.len() {
            after.set(i, self.get(i).clamp(min, max));
        }
        after
    }

    /// Every element, exactly.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = f64> + Clone {
        (0..self.len()).map(|i| self.get(i))
    }

    pub(crate) fn view(&self) -> Tensor<'_> {
        let mut view = Tensor::from_bytes(self.dtype, &self.bytes).expect("whole elements").replica(!self.counted);
        if let Some(name) = &self.name {
            view = view.named(name);
        }
        if let Some(axis) = self.unit_axis {
            view = view.unit_axis(axis);
        }
        match &self.shape {
            Some(shape) => view.shape(shape).expect("the shape fits"),
            None => view,
        }
    }

    pub(crate) fn view_mut(&mut self) -> TensorMut<'_> {
        let counted = self.counted;
        let mut view = TensorMut::from_bytes(self.dtype, &mut self.bytes).expect("whole elements").replica(!counted);
        if let Some(name) = &self.name {
            view = view.named(name);
        }
        if let Some(axis) = self.unit_axis {
            view = view.unit_axis(axis);
        }
        match &self.shape {
            Some(shape) => view.shape(shape).expect("the shape fits"),
            None => view,
        }
    }
}

/// The views of the parameters, for [`views`] and [`views_mut`] to borrow.
pub(crate) fn parameters(tensors: &[Data]) -> Vec<Option<Tensor<'_>>> {
    tensors.iter().map(|t| t.parameter.as_deref().map(Data::view)).collect()
}

pub(crate) fn views<'a>(tensors: &'a [Data], parameters: &'a [Option<Tensor<'a>>]) -> Vec<Tensor<'a>> {
    let view = |(t, parameter): (&'a Data, &'a Option<_>)| match parameter {
        Some(parameter) => t.view().parameter(parameter),
        None => t.view(),
    };
    tensors.iter().zip(parameters).map(view).collect()
}

pub(crate) fn views_mut<'a>(tensors: &'a mut [Data], parameters: &'a [Option<Tensor<'a>>]) -> Vec<TensorMut<'a>> {
    let view = |(t, parameter): (&'a mut Data, &'a Option<_>)| match parameter {
        Some(parameter) => t.view_mut().parameter(parameter),
        None => t.view_mut(),
    };
    tensors.iter_mut().zip(parameters).map(view).collect()
}

/// Every element of every tensor, exactly.
pub(crate) fn numbers_of(tensors: &[Data]) -> impl Iterator<Item = f64> + Clone {
    tensors.iter().flat_map(Data::numbers)
}

/// A way to clip gradients. Each hazard is tested on all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Cpu,
    /// Host tensors, uploaded and read back.
    #[cfg(feature = "gpu")]
    GpuHost,
    /// Tensors in one buffer of the caller's, at odd places, some back to back and some with a neighbour between.
    #[cfg(feature = "gpu")]
    GpuBuffers,
}

/// What a clip returned, and the gradients afterwards.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) report: Result<ClipReport, Error>,
    pub(crate) after: Vec<Data>,
}

impl Done {
    pub(crate) fn ok(self) -> (ClipReport, Vec<Data>) {
        (self.report.expect("the clip succeeds"), self.after)
    }
}

impl Path {
    #[cfg(feature = "gpu")]
    pub(crate) const ALL: &[Self] = &[Self::Cpu, Self::GpuHost, Self::GpuBuffers];
    #[cfg(not(feature = "gpu"))]
    pub(crate) const ALL: &[Self] = &[Self::Cpu];

    /// The dtypes that this path clips.
    pub(crate) fn dtypes(self) -> &'static [Dtype] {
        if self == Self::Cpu {
            &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64]
        } else {
            &[Dtype::F32, Dtype::F16, Dtype::BF16]
        }
    }

    /// The paths that take host tensors.
    #[cfg(feature = "gpu")]
    pub(crate) const HOST: &[Self] = &[Self::Cpu, Self::GpuHost];
    #[cfg(not(feature = "gpu"))]
    pub(crate) const HOST: &[Self] = &[Self::Cpu];

    /// The clipper for host tensors on this path.
    pub(crate) fn clipper(self) -> Clipper {
        match self {
            Self::Cpu => Clipper::cpu(),
            #[cfg(feature = "gpu")]
            _ => Clipper::gpu(gpu::gpu().clone()),
        }
    }

    /// The promised relative error of the norm.
    pub(crate) fn norm_tolerance(self) -> f64 {
        if self == Self::Cpu { 1e-7 } else { 1e-6 }
    }

    /// The promised relative error of a norm of any p.
    pub(crate) fn tolerance_of(self, norm_type: NormType) -> f64 {
        match norm_type.power() {
            _ if self == Self::Cpu => self.norm_tolerance(),
            p if p > 4e6 && p.is_finite() => 5e-6,
            p => self.norm_tolerance() / p.min(1.0),
        }
    }

    pub(crate) fn clip(self, clip: &Clip, tensors: &[Data]) -> Done {
        match self {
            #[cfg(feature = "gpu")]
            Self::GpuBuffers => gpu::clip_in_one_buffer(gpu::gpu(), clip, tensors),
            _ => clip_host(&self.clipper(), clip, tensors),
        }
    }

    /// Clips, and counts what rounding loses, which a plan does only if asked.
    pub(crate) fn clip_and_count(self, clip: &Clip, tensors: &[Data]) -> Done {
        match self {
            #[cfg(feature = "gpu")]
            Self::GpuBuffers => gpu::clip_and_count(clip, tensors),
            _ => self.clip(clip, tensors),
        }
    }

    /// Sums clipped examples. `after` holds the sums, which begin as [`UNWRITTEN`].
    pub(crate) fn sum_examples(self, clip: &Clip, tensors: &[Data]) -> Done {
        let mut after = unwritten_sums(tensors);
        let parameters = parameters(tensors);
        let mut sums: Vec<_> = after.iter_mut().map(Data::view_mut).collect();
        let report = self.clipper().sum_examples(clip, &views(tensors, &parameters), &mut sums);
        Done { report, after }
    }
}

/// The elements of a sum before it is written.
pub(crate) const UNWRITTEN: f64 = 7.25;

/// The sums of examples before they are written.
pub(crate) fn unwritten_sums(tensors: &[Data]) -> Vec<Data> {
    let sum_of = |t: &Data| {
        let dtype = if t.dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        Data::rounded(dtype, vec![UNWRITTEN; t.dims()[1..].iter().product()])
    };
    tensors.iter().map(sum_of).collect()
}

/// Clips copies of host tensors.
pub(crate) fn clip_host(clipper: &Clipper, clip: &Clip, tensors: &[Data]) -> Done {
    let mut after = tensors.to_vec();
    let report = clipper.apply(clip, &mut views_mut(&mut after, &parameters(tensors)));
    Done { report, after }
}

/// Asserts that `after` is `before` times `factor`, up to a relative error of the factor and the rounding.
#[track_caller]
pub(crate) fn assert_scaled(before: &[Data], after: &[Data], factor: f64, relative: f64, what: &str) {
    assert_eq!(before.len(), after.len(), "{what}");
    for (t, (before, after)) in before.iter().zip(after).enumerate() {
        let dtype = before.dtype;
        assert_eq!((before.len(), dtype), (after.len(), after.dtype), "{what}");
        for (i, (x, got)) in before.numbers().zip(after.numbers()).enumerate() {
            let want = x * factor;
            assert!(
                is_scaled(dtype, got, want, relative),
                "{what}: element {i} of tensor {t} ({dtype}) was {x:e}; it is {got:e} and should be {want:e}"
            );
        }
    }
}

/// Whether a product is `want`, up to a relative error of its factor and the rounding of the result.
pub(crate) fn is_scaled(dtype: Dtype, got: f64, want: f64, relative: f64) -> bool {
    // The factor and the product are rounded to float32 before the result is rounded to the dtype.
    let inner = if dtype == Dtype::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let slack = want.abs() * (relative + inner) + numbers::ulp(dtype, want) * 0.5001;
    // Beyond the largest number, rounding gives infinity.
    let overflows = got.is_infinite() && got == numbers::rounded(dtype, want + slack.copysign(want));
    (got - want).abs() <= slack || got == want || overflows || (got.is_nan() && want.is_nan())
}

/// Asserts that a norm is right within a relative error.
#[track_caller]
pub(crate) fn assert_norm(got: f64, want: f64, tolerance: f64, what: &str) {
    let same = got == want || (got.is_nan() && want.is_nan());
    let error = if same { 0.0 } else { ((got - want) / want).abs() };
    assert!(error <= tolerance, "{what}: the norm is {got:e}, it should be {want:e}: off by {error:e}");
}

/// Asserts that two sets of gradients are the same, bit for bit.
#[track_caller]
pub(crate) fn assert_same_bits(got: &[Data], want: &[Data], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (t, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!((got.len(), got.dtype), (want.len(), want.dtype), "{what}: tensor {t}");
        if got.bytes != want.bytes {
            let i = (0..got.len()).find(|i| got.bits(*i) != want.bits(*i)).expect("bytes differ");
            panic!(
                "{what}: element {i} of tensor {t} ({}) is {:#x} = {:e}; it should be {:#x} = {:e}",
                got.dtype,
                got.bits(i),
                got.get(i),
                want.bits(i),
                want.get(i)
            );
        }
    }
}

/// Asserts that an error is one line and contains all these words.
#[track_caller]
pub(crate) fn assert_says(error: &Error, words: &[&str]) {
    let message = error.to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

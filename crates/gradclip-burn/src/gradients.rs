//! Takes gradients out of their containers, and puts them back.

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use gradclip::{Dtype, UnitAxis};

use crate::Error;

/// A gradient and its parameter.
pub(crate) struct Gradient {
    pub(crate) id: ParamId,
    /// The parameter's path in the module.
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) unit_axis: Option<UnitAxis>,
    /// None while it is being clipped.
    pub(crate) tensor: Option<DispatchTensor>,
    /// The parameter itself, if the clip uses it.
    pub(crate) parameter: Option<DispatchTensor>,
    pub(crate) ranked: Ranked,
    /// Which container it came from.
    pub(crate) source: usize,
}

/// Functions of burn that need the number of dimensions at compile time.
#[derive(Clone, Copy)]
pub(crate) struct Ranked {
    pub(crate) read: fn(DispatchTensor) -> Result<TensorData, Error>,
    pub(crate) make: fn(TensorData, &Device) -> DispatchTensor,
    register: fn(&mut GradientsParams, ParamId, DispatchTensor),
}

impl Ranked {
    const fn of<const D: usize>() -> Self {
        Self {
            read: |tensor| {
                let data = Tensor::<D>::from_dispatch(tensor).try_into_data();
                data.map_err(|error| Error::Burn(error.to_string()))
            },
            make: |data, device| {
                let dtype = data.dtype();
                Tensor::<D>::from_data(data, (device, dtype)).into_dispatch()
            },
            register: |grads, id, tensor| grads.register(id, Tensor::<D>::from_dispatch(tensor)),
        }
    }
}

/// The gradients of a module's parameters. They go back into their containers when this is dropped.
pub(crate) struct Taken<'a, 'b> {
    sources: &'a mut [&'b mut GradientsParams],
    pub(crate) gradients: Vec<Gradient>,
}

impl<'a, 'b> Taken<'a, 'b> {
    /// Takes the gradient of each parameter that has one, in the order of the module; with the parameter itself if asked for.
    pub(crate) fn from<M: Module>(
        sources: &'a mut [&'b mut GradientsParams],
        module: &M,
        with_parameters: bool,
    ) -> Result<Self, Error> {
        let present: usize = sources.iter().map(|source| source.len()).sum();
        let taken = Self { sources, gradients: Vec::new() };
        let mut walk = Walk { taken, with_parameters, path: Vec::new(), parameters: 0, error: None };
        module.visit(&mut walk);
        let Walk { taken, parameters, error, .. } = walk;
        match error {
            Some(error) => Err(error),
            None if parameters == 0 => Err(Error::EmptyModule),
            None if taken.gradients.is_empty() && present > 0 => {
                Err(Error::OtherModule { gradients: present, parameters })
            }
            None => Ok(taken),
        }
    }
}

impl Drop for Taken<'_, '_> {
    fn drop(&mut self) {
        for gradient in self.gradients.drain(..) {
            if let Some(tensor) = gradient.tensor {
                (gradient.ranked.register)(self.sources[gradient.source], gradient.id, tensor);
            }
        }
    }
}

struct Walk<'a, 'b> {
    taken: Taken<'a, 'b>,
    with_parameters: bool,
    /// The names and kinds of the enclosing modules.
    path: Vec<(String, String)>,
    parameters: usize,
    error: Option<Error>,
}

impl ModuleVisitor for Walk<'_, '_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.to_owned(), container_type.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.parameters += 1;
        // A parameter that is visited again has no gradient left to take, so it counts once.
        let sources = self.taken.sources.iter_mut().enumerate();
        let found: Vec<_> =
            sources.filter_map(|(source, grads)| Some((source, grads.remove::<D>(param.id)?))).collect();
        if found.is_empty() {
            return;
        }
        let name = self.path.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(".");
        // burn keeps a linear layer's weight as [in, out]: the weights of one output are a column. Other layers have
        // their outputs, or embeddings, first.
        let is_linear = self.path.last().is_some_and(|(_, kind)| kind == "Struct:Linear");
        let unit_axis = (is_linear && D == 2).then_some(UnitAxis::Last);
        for (source, gradient) in found {
            // A tensor computed on the training device is part of a graph.
            let gradient = gradient.without_autodiff().into_dispatch();
            let (burn_dtype, shape) = (gradient.dtype(), gradient.shape().to_vec());
            let parameter_shape = param.lazy_shape().to_vec();
            let dtype = dtype_of(burn_dtype);
            let wrong = if dtype.is_none() {
                Some(Error::Dtype { name: name.clone(), dtype: format!("{burn_dtype:?}") })
            } else if shape != parameter_shape {
                Some(Error::Shape { name: name.clone(), gradient: shape.clone(), parameter: parameter_shape })
            } else {
                None
            };
            self.error = self.error.take().or(wrong);
            let parameter = self.with_parameters.then(|| param.val().inner().into_dispatch());
            self.taken.gradients.push(Gradient {
                id: param.id,
                name: name.clone(),
                dtype: dtype.unwrap_or(Dtype::F32),
                shape,
                unit_axis,
                tensor: Some(gradient),
                parameter,
                ranked: Ranked::of::<D>(),
                source,
            });
        }
    }
}

/// The first parameter, which identifies a module.
pub(crate) fn first_parameter<M: Module>(module: &M) -> Option<ParamId> {
    struct First(Option<ParamId>);
    impl ModuleVisitor for First {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.get_or_insert(param.id);
        }
    }
    let mut first = First(None);
    module.visit(&mut first);
    first.0
}

/// The dtype of a gradient that was checked, or of a parameter.
pub(crate) fn known_dtype(dtype: DType) -> Result<Dtype, Error> {
    dtype_of(dtype).ok_or_else(|| Error::Burn(format!("a parameter is {dtype:?}")))
}

/// None if such tensors cannot be clipped.
fn dtype_of(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F64 => Some(Dtype::F64),
        // Stored as float32.
        DType::F32 | DType::Flex32 => Some(Dtype::F32),
        DType::F16 => Some(Dtype::F16),
        DType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

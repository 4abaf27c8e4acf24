//! [`GradOptimizer`]: clips the gradients of a model and takes the step of an optimizer, in one.

use std::fmt;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use gradclip::{Clip, ClipReport, Optimizer, OptimizerState, Waiting};

use crate::gradients::{Gradient, Taken};
use crate::{Error, host};

/// Clips the gradients of a module and takes the step of an optimizer in one: one read of the gradients for their norm, and one
/// pass that clips them in registers and updates parameters and state. It takes the place of both
/// [`GradClipper`](crate::GradClipper) and burn's optimizer.
///
/// Updates, settings and defaults are those of [`gradclip::Optimizer`], which are PyTorch's. burn's own defaults differ for Adam
/// and AdamW: `Optimizer::adamw(lr).eps(1e-5).weight_decay(1e-4)` is `AdamWConfig::new()`.
///
/// ```
/// # use burn::{module::Module, nn::{Linear, LinearConfig}, optim::GradientsParams};
/// # use burn::tensor::{Device, Distribution, Tensor};
/// use gradclip_burn::{GradOptimizer, gradclip::{Clip, Optimizer}};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let device = Device::flex().autodiff();
/// # let mut model: Linear = LinearConfig::new(8, 4).init(&device);
/// let mut optimizer = GradOptimizer::new(Clip::norm(1.0), Optimizer::adamw(1e-3));
/// for step in 0..3 {
///     # let input = Tensor::<2>::random([2, 8], Distribution::Default, &device);
///     let loss = model.forward(input).square().sum();
///     let grads = GradientsParams::from_grads(loss.backward(), &model);
///     model = optimizer.step(1e-3, model, grads)?;
/// }
/// let saved = optimizer.to_safetensors().wait()?;
/// # let again = GradOptimizer::new(Clip::norm(1.0), Optimizer::adamw(1e-3)).from_safetensors(saved);
/// # drop(again);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GradOptimizer {
    clip: Clip,
    /// The first is for all parameters, a later one for those of its group.
    optimizers: Vec<(ParamGroup, Optimizer)>,
    through_host: bool,
    state: Held,
    /// The report of the last step, if that was on the host.
    report: Option<ClipReport>,
}

/// Where the state is.
#[derive(Debug)]
enum Held {
    /// Nowhere yet.
    Nothing,
    /// In a file that the first step takes over.
    Saved(Vec<u8>),
    /// On the host, of these parameters.
    Host(OptimizerState<'static>, Vec<ParamId>),
    /// On a device.
    #[cfg(feature = "wgpu")]
    Device(Box<crate::device::PlannedStep>),
}

/// A step that failed. The module is as it was before the step.
pub struct StepFailed<M> {
    /// The module.
    pub module: M,
    /// Why.
    pub error: Error,
}

impl<M> fmt::Debug for StepFailed<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepFailed").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<M> fmt::Display for StepFailed<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<M> std::error::Error for StepFailed<M> {}

impl<M> From<StepFailed<M>> for Error {
    fn from(failed: StepFailed<M>) -> Self {
        failed.error
    }
}

impl GradOptimizer {
    /// One optimizer for all parameters, with a clip over all of them. Units and AGC are as
    /// [`GradClipper::new`](crate::GradClipper::new) says. A learning rate is given to each step, so that of `optimizer` does not
    /// matter. For an adaptive threshold clip with a [`GradClipper`](crate::GradClipper) first.
    #[must_use]
    pub fn new(clip: Clip, optimizer: Optimizer) -> Self {
        let optimizers = vec![(ParamGroup::all(), optimizer)];
        Self { clip, optimizers, through_host: false, state: Held::Nothing, report: None }
    }

    /// Other settings for a group of parameters, such as no weight decay for biases. Of several groups that hold a parameter the
    /// last counts. All groups share one norm. Set groups before the first step.
    #[must_use]
    pub fn with_group(mut self, group: ParamGroup, optimizer: Optimizer) -> Self {
        self.optimizers.push((group, optimizer));
        self
    }

    /// Takes steps on the host even where a GPU could. Use it to check the GPU, and for devices that burn opened.
    #[must_use]
    pub fn through_host(mut self) -> Self {
        self.through_host = true;
        self
    }

    /// Goes on from what [`GradOptimizer::to_safetensors`] returned: its tensors and its number of steps. The settings are those of
    /// this optimizer. The first step takes it over, and fails if it does not fit the module.
    #[must_use]
    pub fn from_safetensors(mut self, saved: Vec<u8>) -> Self {
        self.state = Held::Saved(saved);
        self
    }

    /// Clips the gradients of the module's parameters and takes a step. Returns the module with its new parameters.
    ///
    /// With the feature `wgpu`, on a device that [`open_wgpu`](crate::open_wgpu) opened or
    /// [`register_wgpu`](crate::register_wgpu) registered, this submits the work behind that of burn, in a few dispatches for all
    /// parameters, and does not wait for it. Parameters are written in place, unless a clone of the module shares their memory:
    /// then the new ones are copies. On any other device, or on several, the step is taken on the host.
    ///
    /// The same parameters must have gradients at each step. Others are left as they are, without weight decay.
    ///
    /// # Errors
    /// Those of [`GradClipper::clip`](crate::GradClipper::clip), and [`Error::OtherParameters`]. Nothing has changed then, and
    /// [`StepFailed::module`] is the module; `?` drops it. Non-finite gradients under the policy `Error` are an error here on the
    /// host; on a GPU they skip the step, and are an error of [`GradOptimizer::report`].
    pub fn step<M: Module>(&mut self, lr: f64, module: M, mut grads: GradientsParams) -> Result<M, StepFailed<M>> {
        let mut sources = [&mut grads];
        let taken = match Taken::from(&mut sources, &module, false) {
            Ok(taken) => taken,
            Err(error) => return Err(StepFailed { module, error }),
        };
        match self.prepare(lr, taken) {
            Ok(Prepared::Nothing) => Ok(module),
            Ok(Prepared::Host(all)) => self.step_on_host(module, all),
            #[cfg(feature = "wgpu")]
            Ok(Prepared::Device(gpu, all)) => self.step_on_device(&gpu, module, all),
            Err(error) => Err(StepFailed { module, error }),
        }
    }

    /// Groups the gradients, and says where the step is taken. Groups keep the order of the module.
    fn prepare(&self, lr: f64, mut taken: Taken<'_, '_>) -> Result<Prepared, Error> {
        let mut gradients = std::mem::take(&mut taken.gradients);
        if gradients.is_empty() {
            return Ok(Prepared::Nothing);
        }
        let group_of = |gradient: &Gradient| {
            let matches = |(group, _): &(ParamGroup, Optimizer)| group.matches(&gradient.id, Some(&gradient.name));
            // The first matches all.
            self.optimizers.iter().rposition(matches).unwrap_or(0)
        };
        gradients.sort_by_key(group_of);
        let sizes = (0..self.optimizers.len()).map(|own| gradients.iter().filter(|g| group_of(g) == own).count());
        let optimizers = self.optimizers.iter().zip(sizes).map(|((_, own), count)| (own.lr(lr), count)).collect();
        #[cfg(feature = "wgpu")]
        {
            let gpu = if self.through_host { None } else { crate::device::registered_gpu(&gradients)? };
            if let Some(gpu) = gpu {
                return Ok(Prepared::Device(gpu, All { gradients, optimizers }));
            }
        }
        #[cfg(not(feature = "wgpu"))]
        if !self.through_host {
            host::check_not_wgpu(&gradients)?;
        }
        Ok(Prepared::Host(All { gradients, optimizers }))
    }

    fn step_on_host<M: Module>(&mut self, module: M, all: All) -> Result<M, StepFailed<M>> {
        match self.updated_on_host(&module, all) {
            Ok(updated) => Ok(module.map(&mut Replace { updated })),
            Err(error) => Err(StepFailed { module, error }),
        }
    }

    /// The new parameters.
    fn updated_on_host<M: Module>(&mut self, module: &M, all: All) -> Result<Vec<Gradient>, Error> {
        let All { mut gradients, optimizers } = all;
        module.visit(&mut Parameters { of: &mut gradients });
        let ids: Vec<_> = gradients.iter().map(|gradient| gradient.id).collect();
        let mut tensors = host::Read::new(gradients)?;
        let mut state = match std::mem::replace(&mut self.state, Held::Nothing) {
            Held::Nothing => tensors.state(&optimizers)?,
            Held::Saved(saved) => {
                let restored = tensors.state(&optimizers).and_then(|mut state| {
                    state.restore_safetensors(&saved)?;
                    Ok(state)
                });
                restored.inspect_err(|_| self.state = Held::Saved(saved))?
            }
            Held::Host(state, own) if own == ids => state,
            #[cfg(all(feature = "wgpu", not(target_arch = "wasm32")))]
            Held::Device(planned) if planned.is_of(&ids) => planned.state().wait()?,
            other => {
                self.state = other;
                return Err(Error::OtherParameters);
            }
        };
        for (own, (optimizer, _)) in state.optimizers_mut().iter_mut().zip(&optimizers) {
            *own = *optimizer;
        }
        let outcome = tensors.step(&self.clip, &mut state);
        self.state = Held::Host(state, ids);
        self.report = Some(outcome?);
        Ok(tensors.made())
    }

    #[cfg(feature = "wgpu")]
    fn step_on_device<M: Module>(
        &mut self,
        gpu: &gradclip::gpu::GpuClipper,
        module: M,
        all: All,
    ) -> Result<M, StepFailed<M>> {
        let All { gradients, optimizers } = all;
        let ids: Vec<_> = gradients.iter().map(|gradient| gradient.id).collect();
        let (mut planned, mut restored, mut saved) = (None, None, None);
        match std::mem::replace(&mut self.state, Held::Nothing) {
            Held::Nothing => {}
            Held::Saved(bytes) => saved = Some(bytes),
            Held::Host(state, own) if own == ids => restored = Some(state),
            Held::Device(own) if own.is_of(&ids) => planned = Some(*own),
            other => {
                self.state = other;
                return Err(StepFailed { module, error: Error::OtherParameters });
            }
        }
        let mut own = crate::device::Owned::new(&ids);
        let module = module.map(&mut own);
        let outcome = own.step(gpu, &self.clip, &optimizers, gradients, &mut planned, |plan| {
            #[cfg(not(target_arch = "wasm32"))]
            if let Some(bytes) = &saved {
                let mut state = plan.optimizer_state().wait()?;
                state.restore_safetensors(bytes)?;
                return Ok(plan.set_optimizer_state(&state)?);
            }
            #[cfg(target_arch = "wasm32")]
            if saved.is_some() {
                const WHY: &str = "a saved state is taken over with a wait, which is not possible in a browser";
                return Err(gradclip::Error::Usage(WHY.into()).into());
            }
            match &restored {
                Some(state) => Ok(plan.set_optimizer_state(state)?),
                None => Ok(()),
            }
        });
        self.state = match (planned, saved, restored) {
            (Some(planned), ..) => Held::Device(Box::new(planned)),
            (None, Some(bytes), _) => Held::Saved(bytes),
            (None, None, Some(state)) => Held::Host(state, ids),
            (None, None, None) => Held::Nothing,
        };
        match outcome {
            Ok(()) => {
                self.report = None;
                Ok(module)
            }
            Err(error) => Err(StepFailed { module, error }),
        }
    }

    /// The report on the clip of the last step. On a GPU this waits until the step has finished.
    ///
    /// # Errors
    /// [`Error::NotClipped`] before the first step; [`Error::Clip`] with `NonFinite` under the policy `Error`, and errors of the
    /// device.
    pub fn report(&self) -> Waiting<'_, Result<ClipReport, Error>> {
        Waiting::new(async {
            #[cfg(feature = "wgpu")]
            if let (None, Held::Device(planned)) = (&self.report, &self.state) {
                return Ok(planned.plan.report().await?);
            }
            self.report.clone().ok_or(Error::NotClipped)
        })
    }

    /// The state as a safetensors file: tensors `PARAMETER.NAME`, where PARAMETER is the parameter's path in the module, and the
    /// number of steps. Waits for a GPU. [`GradOptimizer::from_safetensors`] goes on from it, on any device.
    ///
    /// # Errors
    /// [`Error::NotClipped`] before the first step; errors of the device.
    pub fn to_safetensors(&self) -> Waiting<'_, Result<Vec<u8>, Error>> {
        Waiting::new(async {
            match &self.state {
                Held::Nothing => Err(Error::NotClipped),
                Held::Saved(saved) => Ok(saved.clone()),
                Held::Host(state, _) => Ok(state.to_safetensors()?),
                #[cfg(feature = "wgpu")]
                Held::Device(planned) => Ok(planned.state().await?.to_safetensors()?),
            }
        })
    }
}

/// The gradients of a step, sorted by group, and the settings of each group with its number of parameters.
struct All {
    gradients: Vec<Gradient>,
    optimizers: Vec<(Optimizer, usize)>,
}

/// Where a step is taken.
enum Prepared {
    Nothing,
    Host(All),
    #[cfg(feature = "wgpu")]
    Device(gradclip::gpu::GpuClipper, All),
}

/// Sets the parameters of gradients.
struct Parameters<'g> {
    of: &'g mut [Gradient],
}

impl ModuleVisitor for Parameters<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.of.iter_mut().find(|gradient| gradient.id == param.id) {
            gradient.parameter = Some(param.val().inner().into_dispatch());
        }
    }
}

/// Replaces parameters by new ones.
struct Replace {
    updated: Vec<Gradient>,
}

impl ModuleMapper for Replace {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let own = self.updated.iter().find(|gradient| gradient.id == param.id);
        match own.and_then(|gradient| gradient.parameter.clone()) {
            Some(updated) => replaced(param, |_| Tensor::from_dispatch(updated)),
            None => param,
        }
    }
}

/// The parameter with another tensor in place of its own, which `replace` gets without its graph. It trains as before.
pub(crate) fn replaced<const D: usize>(
    param: Param<Tensor<D>>,
    replace: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Param<Tensor<D>> {
    let (id, tensor, mapper) = param.consume();
    let (autodiff, requires) = (tensor.is_autodiff(), tensor.is_require_grad());
    // burn panics where it is asked this of a tensor that does not train.
    let distributed = autodiff && tensor.is_distributed();
    let checkpointing = tensor.gradient_checkpointing_strategy();
    let mut tensor = replace(tensor.inner());
    if autodiff {
        tensor = tensor.autodiff();
    }
    if let Some(strategy) = checkpointing {
        tensor = tensor.with_gradient_checkpointing_strategy(strategy);
    }
    if requires {
        tensor = tensor.require_grad();
    }
    if distributed {
        tensor = tensor.set_distributed(id);
    }
    Param::from_mapped_value(id, tensor, mapper)
}

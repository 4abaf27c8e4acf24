//! Clips gradients, and takes the steps of optimizers, on burn's wgpu devices in place.
//!
//! burn allocates tensors in pages, and records work by stream. So a step: resolves what fusion has not computed yet; asks for
//! the buffer and offset of each gradient, which schedules its computation; flushes, so that this is submitted; and submits
//! the clip to the same queue. What burn submits afterwards sees clipped gradients.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use burn::backend::wgpu::{CubeBackend, CubeTensor};
use burn::backend::{
    BackendTensor, CubeDevice, DispatchAutodiffContext, DispatchDevice, DispatchTensor, DispatchTensorKind,
    TensorMetadata,
};
use burn::cubecl::wgpu::{AutoCompiler, WgpuServer};
use burn::module::{ModuleMapper, Param, ParamId};
use burn::tensor::wgpu::{WgpuOptions, WgpuSetup};
use burn::tensor::{Device, Tensor};
use burn_fusion::{FusionBackend, FusionRuntime, FusionTensor, NoOp, stream::StreamId};
use burn_ir::{InitOperationIr, OperationIr};
use gradclip::gpu::{DeviceThreshold, GpuClipper, GpuPlan, GpuTensor, PlanOptions};
use gradclip::{Clip, Dtype, Optimizer, OptimizerState, UnitAxis, Waiting, wgpu};

use crate::Error;
use crate::gradients::{Gradient, known_dtype};
use crate::optimizer::replaced;
use crate::threshold::AdaptiveThreshold;

/// The registered devices. They live as long as burn's own registry of devices: until the process ends.
static REGISTERED: Mutex<Vec<(CubeDevice, GpuClipper)>> = Mutex::new(Vec::new());

/// Opens a wgpu device for burn, and registers it, so that its gradients are clipped in place. Call it once, before anything
/// else uses the device. Afterwards `Device::default()` or `Device::wgpu(..)` of the same kind is this device.
///
/// ```no_run
/// use burn::tensor::Device;
///
/// let device = gradclip_burn::open_wgpu(Device::wgpu_options())?.autodiff();
/// # Ok::<(), gradclip_burn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Burn`] if there is no such device or it is already in use; [`Error::Clip`] if it cannot run the kernels.
#[cfg(not(target_arch = "wasm32"))]
pub fn open_wgpu(options: WgpuOptions) -> Result<Device, Error> {
    opened(options.init_with_setup())
}

/// [`open_wgpu`] for browsers, and for callers that must not wait.
///
/// # Errors
/// The same.
pub async fn open_wgpu_async(options: WgpuOptions) -> Result<Device, Error> {
    opened(options.init_with_setup_async().await)
}

fn opened<E: std::fmt::Display>(opened: Result<(Device, WgpuSetup), E>) -> Result<Device, Error> {
    let (device, setup) = opened.map_err(|error| failed(&error))?;
    register_wgpu(&device, &setup)?;
    Ok(device)
}

/// Registers the wgpu device and queue of a burn device, so that its gradients are clipped in place. For programs that created
/// them or got them from burn (`Device::wgpu_options().init_with_setup()`, `.setup(..)`).
///
/// # Errors
/// [`Error::Burn`] if it is no wgpu device; [`Error::Clip`] if it cannot run the kernels.
pub fn register_wgpu(device: &Device, setup: &WgpuSetup) -> Result<(), Error> {
    let Some(cube) = cube_device(device.as_dispatch()) else {
        return Err(Error::Burn(format!("{device:?} is no wgpu device")));
    };
    let gpu = GpuClipper::new(&setup.device, &setup.queue)?;
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    registered.retain(|(other, _)| *other != cube);
    registered.push((cube, gpu));
    Ok(())
}

/// The wgpu device, if it is one.
fn cube_device(device: &DispatchDevice) -> Option<CubeDevice> {
    match device {
        DispatchDevice::Cube(cube @ CubeDevice::Wgpu(_)) => Some(cube.clone()),
        #[allow(unreachable_patterns, reason = "features of burn add and remove variants")]
        DispatchDevice::Autodiff(device) => cube_device(&device.clone().inner()),
        #[allow(unreachable_patterns, reason = "features of burn add and remove variants")]
        _ => None,
    }
}

/// The clipper of the device that all gradients are on; `None` if they are to be clipped on the host.
pub(crate) fn registered_gpu(gradients: &[Gradient]) -> Result<Option<GpuClipper>, Error> {
    let mut devices = gradients.iter().filter_map(|gradient| gradient.tensor.as_ref()).map(TensorMetadata::device);
    let Some(device) = devices.next().as_ref().and_then(cube_device) else { return Ok(None) };
    if devices.any(|other| cube_device(&other).as_ref() != Some(&device)) {
        return Ok(None);
    }
    let registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    match registered.iter().find(|(known, _)| *known == device) {
        Some((_, gpu)) => Ok(Some(gpu.clone())),
        None => Err(Error::NotRegistered { device: format!("{device:?}") }),
    }
}

/// A float tensor of the wgpu backend. Its type depends on burn's feature `fusion`, which the program chooses, so both types are
/// handled. `B` is the backend without fusion.
trait Primitive<B> {
    /// Runs what fusion has deferred.
    fn resolve(self) -> CubeTensor;
    fn wrap(tensor: CubeTensor) -> Self;
}

impl<B> Primitive<B> for CubeTensor {
    fn resolve(self) -> CubeTensor {
        self
    }

    fn wrap(tensor: CubeTensor) -> Self {
        tensor
    }
}

impl<B> Primitive<B> for FusionTensor<B::FusionRuntime>
where
    B: FusionBackend<FloatTensorPrimitive = CubeTensor>,
    B::FusionRuntime: FusionRuntime<FusionDevice = CubeDevice>,
{
    fn resolve(self) -> CubeTensor {
        let client = self.client.clone();
        client.resolve_tensor_float::<B>(self)
    }

    fn wrap(tensor: CubeTensor) -> Self {
        let client = burn_fusion::get_client::<B>(&tensor.device);
        let (shape, dtype) = (TensorMetadata::shape(&tensor), tensor.dtype);
        let handle = B::float_tensor_handle(tensor);
        let created = InitOperationIr::create(shape, dtype, || client.register_tensor_handle(handle));
        let mut outputs = client.register(StreamId::current(), OperationIr::Init(created), NoOp::<B>::new());
        outputs.swap_remove(0)
    }
}

/// Takes a float tensor of the wgpu backend out of `tensor`. [`registered_gpu`] has checked that it is one; any other stays.
fn resolved(tensor: &mut Option<DispatchTensor>) -> Result<Option<CubeTensor>, Error> {
    match tensor.take().map(resolved_one).transpose() {
        Ok(found) => Ok(found),
        Err(other) => {
            *tensor = Some(*other);
            Err(other_backend())
        }
    }
}

/// The tensor of the wgpu backend or, if it is of another, the tensor itself.
fn resolved_one(tensor: DispatchTensor) -> Result<CubeTensor, Box<DispatchTensor>> {
    match tensor {
        DispatchTensor { kind: DispatchTensorKind::Cube(BackendTensor::Float(tensor)), .. } => {
            Ok(Primitive::<CubeBackend>::resolve(tensor))
        }
        other => Err(Box::new(other)),
    }
}

fn other_backend() -> Error {
    Error::Burn("a tensor is of another backend than its device's".into())
}

fn wrapped(tensor: CubeTensor) -> DispatchTensor {
    let kind = DispatchTensorKind::Cube(BackendTensor::Float(Primitive::<CubeBackend>::wrap(tensor)));
    DispatchTensor { kind, autodiff: DispatchAutodiffContext::Disabled }
}

/// Turns a panic of burn into an error. A lost device causes one, for example.
fn caught<T>(f: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::Burn(message.unwrap_or("it panicked").to_owned()))
    })
}

fn failed(error: &impl std::fmt::Display) -> Error {
    Error::Burn(error.to_string())
}

/// A plan for the gradients of the last step. It is kept while the same parameters have gradients.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) plan: GpuPlan,
    gpu: GpuClipper,
    placed: Vec<Placed>,
}

/// A gradient in its buffer.
#[derive(Clone, Debug, PartialEq)]
struct Placed {
    id: ParamId,
    unit_axis: Option<UnitAxis>,
    gradient: Place,
    /// If the clip uses it.
    parameter: Option<Place>,
}

#[derive(Clone, Debug, PartialEq)]
struct Place {
    buffer: wgpu::Buffer,
    dtype: Dtype,
    /// In elements.
    start: u64,
    shape: Vec<usize>,
}

impl Planned {
    /// The adaptive threshold, if its state is on the device.
    pub(crate) async fn threshold(&self) -> Result<Option<AdaptiveThreshold>, Error> {
        Ok(match self.plan.threshold().await? {
            Some(DeviceThreshold::ZClip(zclip)) => Some(AdaptiveThreshold::ZClip(zclip)),
            Some(DeviceThreshold::AdaGc(adagc)) => Some(AdaptiveThreshold::AdaGc(adagc)),
            _ => None,
        })
    }

    fn new(
        gpu: &GpuClipper,
        (clip, count_lost): (&Clip, bool),
        threshold: Option<&AdaptiveThreshold>,
        placed: Vec<Placed>,
        tensors: &[GpuTensor],
    ) -> Result<Self, Error> {
        let options = PlanOptions::default();
        let options = if count_lost { options.count_lost() } else { options };
        let options = match threshold {
            Some(AdaptiveThreshold::ZClip(zclip)) => options.threshold(DeviceThreshold::ZClip(zclip.clone())),
            Some(AdaptiveThreshold::AdaGc(adagc)) => options.threshold(DeviceThreshold::AdaGc(adagc.clone())),
            None | Some(AdaptiveThreshold::AutoClip(_)) => options,
        };
        Ok(Self { plan: gpu.plan_with(&[(*clip, tensors)], options)?, gpu: gpu.clone(), placed })
    }

    /// Whether the plan can be updated to these: the same parameters, on the same device.
    fn fits(&self, gpu: &GpuClipper, placed: &[Placed]) -> bool {
        let same = |(a, b): (&Placed, &Placed)| {
            (a.id, a.gradient.dtype, &a.gradient.shape) == (b.id, b.gradient.dtype, &b.gradient.shape)
        };
        self.gpu.device() == gpu.device()
            && self.placed.len() == placed.len()
            && self.placed.iter().zip(placed).all(same)
    }
}

/// Submits a clip of the gradients behind the earlier work of burn, by the earlier plan if it fits. All gradients are put back,
/// clipped, or unchanged after an error. Beside the clip stands whether the device counts what rounding loses.
pub(crate) fn clip(
    planned: &mut Option<Planned>,
    gpu: &GpuClipper,
    clip: (&Clip, bool),
    threshold: &mut Option<AdaptiveThreshold>,
    gradients: &mut [Gradient],
) -> Result<(), Error> {
    let Some(device) = gradients.iter().find_map(|gradient| gradient.tensor.as_ref().map(TensorMetadata::device))
    else {
        return Ok(());
    };
    let device = Device::new(device);
    let mut tensors = Vec::with_capacity(gradients.len());
    let outcome = caught(|| {
        for gradient in gradients.iter_mut() {
            tensors.extend(resolved(&mut gradient.tensor)?.map(exclusive));
        }
        submit(planned, gpu, clip, threshold, gradients, &tensors)
    });
    let put_back = caught(|| {
        for (gradient, tensor) in gradients.iter_mut().zip(tensors) {
            gradient.tensor = Some(wrapped(tensor));
        }
        Ok(())
    });
    outcome.and(put_back).map_err(|error| device_error(&device, error))
}

/// A lost device causes many errors. burn knows whether it is lost, and why.
fn device_error(device: &Device, error: Error) -> Error {
    match caught(|| device.sync().map_err(|error| failed(&error))) {
        Ok(()) => error,
        Err(cause) => cause,
    }
}

/// The same elements, contiguous, in memory that no other tensor shares.
fn exclusive(tensor: CubeTensor) -> CubeTensor {
    if tensor.can_mut() && tensor.is_contiguous() { tensor } else { tensor.copy() }
}

fn submit(
    planned: &mut Option<Planned>,
    gpu: &GpuClipper,
    clip: (&Clip, bool),
    threshold: &mut Option<AdaptiveThreshold>,
    gradients: &mut [Gradient],
    tensors: &[CubeTensor],
) -> Result<(), Error> {
    let mut parameters = Vec::with_capacity(gradients.len());
    for gradient in gradients.iter_mut() {
        let parameter = resolved(&mut gradient.parameter)?;
        parameters.push(parameter.map(|p| if p.is_contiguous() { p } else { p.copy() }));
    }
    let (placed, _held) = places(gradients, tensors, &parameters)?;
    flush(tensors.iter().chain(parameters.iter().flatten()))?;
    if planned.as_ref().is_none_or(|planned| planned.placed != placed) {
        let views = placed.iter().zip(&*gradients).map(|(placed, gradient)| placed.view(&gradient.name));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        match planned {
            Some(planned) if planned.fits(gpu, &placed) => {
                planned.plan.update(&[&views])?;
                planned.placed = placed;
            }
            _ => {
                #[cfg(not(target_arch = "wasm32"))]
                if let Some(planned) = planned.as_ref()
                    && let Some(followed) = Waiting::new(planned.threshold()).wait()?
                {
                    *threshold = Some(followed);
                }
                *planned = Some(Planned::new(gpu, clip, threshold.as_ref(), placed, &views)?);
            }
        }
    }
    let Some(Planned { plan, .. }) = planned else { return Ok(()) };
    let record = |encode: &dyn Fn(&mut wgpu::CommandEncoder) -> Result<(), gradclip::Error>| {
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encode(&mut encoder)?;
        gpu.queue().submit([encoder.finish()]);
        Ok::<_, Error>(())
    };
    match threshold {
        #[cfg(not(target_arch = "wasm32"))]
        Some(AdaptiveThreshold::AutoClip(autoclip)) => {
            record(&|encoder| plan.encode_measure(encoder))?;
            plan.follow(autoclip).wait()?;
            record(&|encoder| plan.encode_scale(encoder))
        }
        #[cfg(target_arch = "wasm32")]
        Some(AdaptiveThreshold::AutoClip(_)) => {
            const WHY: &str = "AutoClip waits for the norm at each step, which is not possible in a browser; use ZClip";
            Err(gradclip::Error::Usage(WHY.into()).into())
        }
        _ => record(&|encoder| plan.encode(encoder)),
    }
}

/// The places of gradients and of their parameters. While what is returned beside them is held, burn neither moves nor reuses
/// the memory. After the submission it may: only later submissions write to it.
fn places(
    gradients: &[Gradient],
    tensors: &[CubeTensor],
    parameters: &[Option<CubeTensor>],
) -> Result<(Vec<Placed>, impl Sized + use<>), Error> {
    let mut held = Vec::new();
    let mut place = |tensor: &CubeTensor| -> Result<Place, Error> {
        let resource = tensor.client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone());
        let managed = resource.map_err(|error| failed(&error))?;
        let (resource, dtype) = (managed.resource(), known_dtype(tensor.dtype)?);
        let (start, shape) = (resource.offset / dtype.size() as u64, TensorMetadata::shape(tensor).to_vec());
        let place = Place { buffer: resource.buffer.clone(), dtype, start, shape };
        held.push(managed);
        Ok(place)
    };
    let mut placed = Vec::with_capacity(gradients.len());
    for ((gradient, tensor), parameter) in gradients.iter().zip(tensors).zip(parameters) {
        let Gradient { id, unit_axis, .. } = *gradient;
        let (tensor, parameter) = (place(tensor)?, parameter.as_ref().map(&mut place).transpose()?);
        placed.push(Placed { id, unit_axis, gradient: tensor, parameter });
    }
    Ok((placed, held))
}

/// Submits what burn has recorded of these tensors.
fn flush<'t>(tensors: impl Iterator<Item = &'t CubeTensor>) -> Result<(), Error> {
    let mut flushed = Vec::new();
    for tensor in tensors {
        let stream = tensor.handle.stream;
        if !flushed.contains(&stream) {
            stream.executes(|| tensor.client.flush()).map_err(|error| failed(&error))?;
            flushed.push(stream);
        }
    }
    Ok(())
}

/// The plan of an optimizer's step, with its state.
#[derive(Debug)]
pub(crate) struct PlannedStep {
    pub(crate) plan: GpuPlan,
    gpu: GpuClipper,
    placed: Vec<Placed>,
}

impl PlannedStep {
    /// Whether the state is of these parameters, in this order.
    pub(crate) fn is_of(&self, ids: &[ParamId]) -> bool {
        self.placed.iter().map(|placed| &placed.id).eq(ids)
    }

    pub(crate) fn state(&self) -> Waiting<'_, Result<OptimizerState<'static>, gradclip::Error>> {
        self.plan.optimizer_state()
    }
}

/// The parameters of a module, in memory that only the module shares.
pub(crate) struct Owned<'i> {
    ids: &'i [ParamId],
    tensors: Vec<Option<CubeTensor>>,
    error: Option<Error>,
}

impl ModuleMapper for Owned<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(own) = self.ids.iter().position(|id| *id == param.id) else { return param };
        replaced(param, |tensor| {
            // A parameter that comes again is the same tensor.
            let found = match self.tensors[own].take() {
                Some(found) => Ok(found),
                None => resolved_one(tensor.into_dispatch()).map(exclusive),
            };
            Tensor::from_dispatch(match found {
                Ok(found) => wrapped(self.tensors[own].insert(found).clone()),
                Err(other) => {
                    self.error = Some(other_backend());
                    *other
                }
            })
        })
    }
}

impl<'i> Owned<'i> {
    pub(crate) fn new(ids: &'i [ParamId]) -> Self {
        Self { ids, tensors: vec![None; ids.len()], error: None }
    }

    /// Submits a step behind the earlier work of burn, by the earlier plan if it fits. `begin` sets the state of a new one.
    pub(crate) fn step(
        self,
        gpu: &GpuClipper,
        clip: &Clip,
        optimizers: &[(Optimizer, usize)],
        mut gradients: Vec<Gradient>,
        planned: &mut Option<PlannedStep>,
        begin: impl FnOnce(&mut GpuPlan) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Self { tensors: parameters, error, .. } = self;
        let device = gradients.iter().find_map(|gradient| gradient.tensor.as_ref().map(TensorMetadata::device));
        let outcome = error.map_or(Ok(()), Err).and_then(|()| {
            caught(|| {
                let mut tensors = Vec::with_capacity(gradients.len());
                for gradient in &mut gradients {
                    let tensor = resolved(&mut gradient.tensor)?;
                    tensors.extend(tensor.map(|own| if own.is_contiguous() { own } else { own.copy() }));
                }
                let apart = |(tensor, parameter): (&CubeTensor, &Option<CubeTensor>)| {
                    parameter.as_ref().is_none_or(|parameter| parameter.device != tensor.device)
                };
                if tensors.iter().zip(&parameters).any(apart) {
                    return Err(Error::Burn("a parameter is on another device than its gradient".into()));
                }
                let (placed, _held) = places(&gradients, &tensors, &parameters)?;
                flush(tensors.iter().chain(parameters.iter().flatten()))?;
                submit_step(planned, gpu, (clip, optimizers), (placed, &gradients), begin)
            })
        });
        match (outcome, device) {
            (Err(error), Some(device)) => Err(device_error(&Device::new(device), error)),
            (outcome, _) => outcome,
        }
    }
}

fn submit_step(
    planned: &mut Option<PlannedStep>,
    gpu: &GpuClipper,
    (clip, optimizers): (&Clip, &[(Optimizer, usize)]),
    (placed, gradients): (Vec<Placed>, &[Gradient]),
    begin: impl FnOnce(&mut GpuPlan) -> Result<(), Error>,
) -> Result<(), Error> {
    if planned.as_ref().is_none_or(|planned| planned.placed != placed) {
        let views = placed.iter().zip(gradients).map(|(placed, gradient)| placed.view(&gradient.name));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        match planned {
            Some(planned) if planned.gpu.device() == gpu.device() => {
                planned.plan.update(&[&views])?;
                planned.placed = placed;
            }
            _ => {
                let mut plan = gpu.plan_with(&[(*clip, &views)], PlanOptions::default().optimizers(optimizers))?;
                match planned {
                    #[cfg(not(target_arch = "wasm32"))]
                    Some(earlier) => plan.set_optimizer_state(&earlier.state().wait()?)?,
                    _ => begin(&mut plan)?,
                }
                *planned = Some(PlannedStep { plan, gpu: gpu.clone(), placed });
            }
        }
    }
    let Some(PlannedStep { plan, .. }) = planned else { return Ok(()) };
    let settings: Vec<_> = optimizers.iter().map(|(optimizer, _)| *optimizer).collect();
    if plan.optimizers() != settings {
        plan.set_optimizers(&settings)?;
    }
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    plan.encode(&mut encoder)?;
    gpu.queue().submit([encoder.finish()]);
    Ok(())
}

impl Placed {
    fn view(&self, name: &str) -> Result<GpuTensor, Error> {
        let mut view = self.gradient.view()?.named(name);
        if let Some(axis) = self.unit_axis {
            view = view.unit_axis(axis);
        }
        if let Some(parameter) = &self.parameter {
            view = view.parameter(parameter.view()?);
        }
        Ok(view)
    }
}

impl Place {
    fn view(&self) -> Result<GpuTensor, Error> {
        let elements = self.shape.iter().product::<usize>() as u64;
        Ok(GpuTensor::new(&self.buffer, self.dtype, self.start..self.start + elements)?.shape(&self.shape)?)
    }
}

//! Clips gradients of any device on the host, as burn's tensor data.

use burn::backend::TensorMetadata;
use burn::tensor::{Bytes, DType, Device, Shape, TensorData};
use gradclip::{Clip, ClipReport, Clipper, Optimizer, OptimizerState, Tensor, TensorMut, Threshold};

use crate::Error;
use crate::gradients::{Gradient, known_dtype};

/// Clips gradients on the host. burn's CPU backend hands over its memory and takes it back, so a tensor is copied only if it is
/// shared or not contiguous. Gradients of other devices are read and written.
pub(crate) fn clip(
    clip: &Clip,
    threshold: Option<&mut dyn Threshold>,
    gradients: &mut [Gradient],
) -> Result<ClipReport, Error> {
    let mut parameters = Vec::with_capacity(gradients.len());
    for gradient in gradients.iter_mut() {
        parameters.push(gradient.parameter.take().map(gradient.ranked.read).transpose()?);
    }
    let mut read = Vec::with_capacity(gradients.len());
    let mut outcome = Ok(());
    for gradient in gradients.iter_mut() {
        let Some(tensor) = gradient.tensor.take() else { continue };
        let device = Device::new(tensor.device());
        // A device that cannot be read has lost the gradient already.
        match (gradient.ranked.read)(tensor) {
            Ok(data) => read.push((gradient, data.into_parts(), device)),
            Err(error) => outcome = Err(error),
        }
    }
    let report = outcome.and_then(|()| {
        let parameters: Vec<_> =
            parameters.iter().map(|p| p.as_ref().map(view).transpose()).collect::<Result<_, _>>()?;
        let mut tensors = Vec::with_capacity(read.len());
        for ((gradient, (bytes, ..), _), parameter) in read.iter_mut().zip(&parameters) {
            let mut tensor =
                TensorMut::from_bytes(gradient.dtype, bytes)?.named(&gradient.name).shape(&gradient.shape)?;
            if let Some(axis) = gradient.unit_axis {
                tensor = tensor.unit_axis(axis);
            }
            tensors.push(match parameter {
                Some(parameter) => tensor.parameter(parameter),
                None => tensor,
            });
        }
        let clipper = Clipper::cpu();
        Ok(match threshold {
            Some(threshold) => clipper.apply_adaptive(clip, threshold, &mut tensors)?,
            None => clipper.apply(clip, &mut tensors)?,
        })
    });
    for (gradient, (bytes, shape, dtype), device) in read {
        gradient.tensor = Some((gradient.ranked.make)(TensorData::from_bytes(bytes, shape, dtype), &device));
    }
    report
}

/// Gradients and parameters as burn's tensor data, for a step on the host.
pub(crate) struct Read {
    gradients: Vec<Gradient>,
    /// For each its data, the parts of its parameter's, and the parameter's device.
    data: Vec<(TensorData, Parts, Device)>,
}

/// Tensor data that can be written.
type Parts = (Bytes, Shape, DType);

impl Read {
    pub(crate) fn new(mut gradients: Vec<Gradient>) -> Result<Self, Error> {
        let mut data = Vec::with_capacity(gradients.len());
        for gradient in &mut gradients {
            let (Some(tensor), Some(parameter)) = (gradient.tensor.take(), gradient.parameter.take()) else {
                return Err(Error::Burn(format!("{:?} is not in the module", gradient.name)));
            };
            let device = Device::new(parameter.device());
            data.push(((gradient.ranked.read)(tensor)?, (gradient.ranked.read)(parameter)?.into_parts(), device));
        }
        Ok(Self { gradients, data })
    }

    /// A new state of the parameters.
    pub(crate) fn state(&self, optimizers: &[(Optimizer, usize)]) -> Result<OptimizerState<'static>, Error> {
        let mut views = Vec::with_capacity(self.data.len());
        for (gradient, (_, (bytes, _, dtype), _)) in self.gradients.iter().zip(&self.data) {
            let own = Tensor::from_bytes(known_dtype(*dtype)?, bytes)?.named(&gradient.name).shape(&gradient.shape)?;
            views.push(own);
        }
        let (mut groups, mut rest) = (Vec::new(), &views[..]);
        for (optimizer, count) in optimizers {
            let (own, others) = rest.split_at(*count);
            groups.push((*optimizer, own));
            rest = others;
        }
        Ok(OptimizerState::new(&groups)?)
    }

    /// Clips, and takes the step.
    pub(crate) fn step(&mut self, clip: &Clip, state: &mut OptimizerState<'_>) -> Result<ClipReport, Error> {
        let (mut parameters, mut gradients) = (Vec::new(), Vec::new());
        for (gradient, (data, (bytes, _, dtype), _)) in self.gradients.iter().zip(&mut self.data) {
            let shape = &gradient.shape;
            let own = TensorMut::from_bytes(known_dtype(*dtype)?, bytes)?.named(&gradient.name).shape(shape)?;
            let mut of = view(data)?.named(&gradient.name);
            if let Some(axis) = gradient.unit_axis {
                of = of.unit_axis(axis);
            }
            parameters.push(own);
            gradients.push(of);
        }
        Ok(Clipper::cpu().step(clip, state, &mut parameters, &gradients)?)
    }

    /// The gradients, each with its parameter as it is now.
    pub(crate) fn made(self) -> Vec<Gradient> {
        let make = |(gradient, (_, (bytes, shape, dtype), device)): (Gradient, (_, Parts, Device))| {
            let parameter = Some((gradient.ranked.make)(TensorData::from_bytes(bytes, shape, dtype), &device));
            Gradient { parameter, ..gradient }
        };
        self.gradients.into_iter().zip(self.data).map(make).collect()
    }
}

/// Fails if a gradient is on a wgpu device, where it should be clipped in place.
#[cfg(not(feature = "wgpu"))]
pub(crate) fn check_not_wgpu(gradients: &[Gradient]) -> Result<(), Error> {
    let devices = gradients.iter().filter_map(|gradient| Some(Device::new(gradient.tensor.as_ref()?.device())));
    match devices.map(|device| format!("{device:?}")).find(|device| is_wgpu(device)) {
        Some(device) => Err(Error::WithoutWgpu { device }),
        None => Ok(()),
    }
}

/// By the name of the device: its type exists only with a feature of burn, which this crate may not know of.
#[cfg(any(test, not(feature = "wgpu")))]
fn is_wgpu(device: &str) -> bool {
    device.contains("Wgpu(")
}

/// A parameter; it needs no name, because its gradient has it.
fn view(data: &TensorData) -> Result<Tensor<'_>, Error> {
    Ok(Tensor::from_bytes(known_dtype(data.dtype())?, data.as_bytes())?.shape(data.shape())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_distinguished_by_their_names() {
        assert!(!is_wgpu(&format!("{:?}", Device::flex())));
        assert!(!is_wgpu(&format!("{:?}", Device::flex().autodiff())));
        #[cfg(feature = "wgpu")]
        for device in
            [Device::wgpu(burn::tensor::DeviceKind::DefaultDevice), Device::wgpu(burn::tensor::DeviceKind::Cpu)]
        {
            let device = device.autodiff();
            assert!(is_wgpu(&format!("{device:?}")), "{device:?}");
        }
    }
}

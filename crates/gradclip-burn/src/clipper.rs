//! [`GradClipper`]: a clip of a model's gradients, step after step.

use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;
use gradclip::{AdaGc, AutoClip, Clip, ClipReport, Threshold, Waiting, ZClip};

use crate::gradients::{Taken, first_parameter};
use crate::{Error, host};

/// A threshold that follows the norms of a run: part of the run's checkpoint, by the feature `serde`. In a browser, where
/// nothing may wait for a GPU, it begins anew when other parameters have gradients.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum AdaptiveThreshold {
    /// Follows the global norm, on a GPU without a wait.
    ZClip(ZClip),
    /// Follows the norm of each tensor (scope `Tensor`), on a GPU without a wait. The same parameters must have a gradient at
    /// each step.
    AdaGc(AdaGc),
    /// Follows the global norm by its history, on the host: a GPU's norm is waited for at each step, so in a browser it is an
    /// error.
    AutoClip(AutoClip),
}

impl AdaptiveThreshold {
    fn on_host(&mut self) -> &mut dyn Threshold {
        match self {
            Self::ZClip(zclip) => zclip,
            Self::AdaGc(adagc) => adagc,
            Self::AutoClip(autoclip) => autoclip,
        }
    }
}

impl From<ZClip> for AdaptiveThreshold {
    fn from(threshold: ZClip) -> Self {
        Self::ZClip(threshold)
    }
}

impl From<AdaGc> for AdaptiveThreshold {
    fn from(threshold: AdaGc) -> Self {
        Self::AdaGc(threshold)
    }
}

impl From<AutoClip> for AdaptiveThreshold {
    fn from(threshold: AutoClip) -> Self {
        Self::AutoClip(threshold)
    }
}

/// Clips gradients between `GradientsParams::from_grads` and the optimizer's `step`.
///
/// Make one before the training loop and keep it: it holds what a clip on a GPU needs, as long as the parameters stay the
/// same, and the pages of burn's memory that the last gradients lay in. Each optimizer or group of parameters that is to
/// have a norm of its own gets a clipper of its own.
///
/// ```
/// # use burn::{module::Module, nn::{Linear, LinearConfig}, optim::{AdamConfig, GradientsParams}};
/// # use burn::tensor::{Device, Distribution, Tensor};
/// use gradclip_burn::{GradClipper, gradclip::Clip};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let device = Device::flex().autodiff();
/// # let mut model: Linear = LinearConfig::new(8, 4).init(&device);
/// # let mut optimizer = AdamConfig::new().init();
/// let mut clipper = GradClipper::new(Clip::norm(1.0));
/// for step in 0..3 {
///     # let input = Tensor::<2>::random([2, 8], Distribution::Default, &device);
///     let loss = model.forward(input).square().sum();
///     let mut grads = GradientsParams::from_grads(loss.backward(), &model);
///     clipper.clip(&mut grads, &model)?;
///     model = optimizer.step(1e-3, model, grads);
///     if step % 2 == 0 {
///         // This is what waits for a GPU, so not at each step.
///         println!("norm {}", clipper.report().wait()?.total_norm);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GradClipper {
    clip: Clip,
    /// As of the last clip on the host; a GPU has its own.
    threshold: Option<AdaptiveThreshold>,
    through_host: bool,
    /// Of the last clip, if that was on the host.
    report: Option<ClipReport>,
    #[cfg(feature = "wgpu")]
    planned: Option<crate::device::Planned>,
}

impl GradClipper {
    /// Clips as described, whatever the steps before were.
    ///
    /// Units (scope `Unit`, and AGC) are the columns of the weights of burn's `Linear`, which are `[in, out]`; of any other
    /// parameter they are what the clip's `unit_axis` says, rows if nothing. AGC goes by the module's parameters.
    #[must_use]
    pub fn new(clip: Clip) -> Self {
        Self {
            clip,
            threshold: None,
            through_host: false,
            report: None,
            #[cfg(feature = "wgpu")]
            planned: None,
        }
    }

    /// Clips by a norm that follows the run. The clip's own threshold stays an upper bound; `Clip::norm(f64::INFINITY)`
    /// sets none.
    #[must_use]
    pub fn adaptive(clip: Clip, threshold: impl Into<AdaptiveThreshold>) -> Self {
        Self { threshold: Some(threshold.into()), ..Self::new(clip) }
    }

    /// Clips on the host even where a GPU could: with [`gradclip::Clipper::cpu`], after a copy from the device and before
    /// one back. What to compare the GPU with, and what works with devices that burn opened by itself.
    #[must_use]
    pub fn through_host(mut self) -> Self {
        self.through_host = true;
        self
    }

    /// Clips the gradients of the module's parameters.
    ///
    /// With the feature `wgpu`, on a wgpu device that is shared ([`open_wgpu`](crate::open_wgpu)) this records and submits
    /// the work behind burn's own, in place, and does not wait for it. Gradients of any other device, or of several, are clipped on the
    /// host.
    ///
    /// Parameters without a gradient are skipped. A parameter that occurs twice in the module counts once. Gradients of
    /// other modules' parameters stay as they are. A gradient that shares its memory with another tensor is copied first,
    /// one that is not contiguous becomes so.
    ///
    /// # Errors
    /// [`Error::EmptyModule`], [`Error::OtherModule`], [`Error::Shape`], [`Error::Dtype`], [`Error::NotShared`],
    /// [`Error::WithoutWgpu`], [`Error::Burn`]; [`Error::Clip`] with whatever the library finds wrong. The gradients are
    /// then as they were. Non-finite gradients under the policy `Error` are told here by the host, by [`GradClipper::report`] on a GPU.
    pub fn clip<M: Module>(&mut self, grads: &mut GradientsParams, module: &M) -> Result<(), Error> {
        self.clip_all(&mut [grads], module)
    }

    /// [`GradClipper::clip`] for gradients in several containers, as several optimizers need them: one norm over all. A
    /// parameter that has a gradient in several of them counts with each.
    ///
    /// # Errors
    /// The same.
    pub fn clip_all<M: Module>(&mut self, grads: &mut [&mut GradientsParams], module: &M) -> Result<(), Error> {
        let mut taken = Taken::from(grads, module, self.clip.needs_parameters())?;
        let gradients = &mut taken.gradients;
        #[cfg(feature = "wgpu")]
        {
            let gpu = if self.through_host { None } else { crate::device::shared_by(gradients)? };
            if let Some(gpu) = gpu {
                if self.report.take().is_some() && self.threshold.is_some() {
                    // The threshold went on without it.
                    self.planned = None;
                }
                return crate::device::clip(&mut self.planned, &gpu, &self.clip, &mut self.threshold, gradients);
            }
            #[cfg(not(target_arch = "wasm32"))]
            if self.report.is_none() && self.planned.is_some() {
                self.threshold = self.threshold().wait()?;
            }
        }
        #[cfg(not(feature = "wgpu"))]
        if !self.through_host {
            host::check_not_wgpu(gradients)?;
        }
        // No gradients are no step of the run.
        let threshold = self.threshold.as_mut().filter(|_| !gradients.is_empty()).map(AdaptiveThreshold::on_host);
        self.report = Some(host::clip(&self.clip, threshold, gradients)?);
        Ok(())
    }

    /// The report of the last clip. This is what waits, until a GPU has finished it.
    ///
    /// # Errors
    /// [`Error::NotClipped`] before the first clip; [`Error::Clip`] with `NonFinite` under the policy `Error`, and the
    /// device's own errors.
    pub fn report(&self) -> Waiting<'_, Result<ClipReport, Error>> {
        Waiting::new(async {
            #[cfg(feature = "wgpu")]
            if let (None, Some(planned)) = (&self.report, &self.planned) {
                return Ok(planned.plan.report().await?);
            }
            self.report.clone().ok_or(Error::NotClipped)
        })
    }

    /// The adaptive threshold with the state that the last clip left: what a checkpoint keeps, and
    /// [`GradClipper::adaptive`] goes on from. None for a clipper without one. Waits for a GPU.
    ///
    /// # Errors
    /// The device's own.
    pub fn threshold(&self) -> Waiting<'_, Result<Option<AdaptiveThreshold>, Error>> {
        Waiting::new(async {
            #[cfg(feature = "wgpu")]
            if let (None, Some(planned)) = (&self.report, &self.planned)
                && let Some(threshold) = planned.threshold().await?
            {
                return Ok(Some(threshold));
            }
            Ok(self.threshold.clone())
        })
    }
}

/// What [`clip_grad_norm`] and [`clip_grad_value`] keep: a clipper for each clip and module, the latest last.
static KEPT: Mutex<Vec<(Clip, ParamId, GradClipper)>> = Mutex::new(Vec::new());

/// How many there may be: models are few, and what a clipper keeps is small beside one.
const MOST_KEPT: usize = 8;

/// Clips by the global norm of all gradients of the module, as [`GradClipper::clip`] does with `Clip::norm(max_norm)`.
/// What a GPU needs for that is kept from step to step. The norm itself is [`GradClipper`]'s to tell; so is a NaN or an infinity
/// on a GPU, where this leaves the gradients as they are and cannot say so without a wait.
///
/// # Errors
/// Those of [`GradClipper::clip`], and [`Error::Clip`] if `max_norm` is negative or NaN.
pub fn clip_grad_norm<M: Module>(grads: &mut GradientsParams, module: &M, max_norm: f64) -> Result<(), Error> {
    clip_kept(Clip::norm(max_norm), grads, module)
}

/// Clips each element to `-clip_value..=clip_value`, as [`GradClipper::clip`] does with `Clip::value(clip_value)`.
///
/// # Errors
/// Those of [`GradClipper::clip`], and [`Error::Clip`] if `clip_value` is negative or NaN.
pub fn clip_grad_value<M: Module>(grads: &mut GradientsParams, module: &M, clip_value: f64) -> Result<(), Error> {
    clip_kept(Clip::value(clip_value), grads, module)
}

fn clip_kept<M: Module>(clip: Clip, grads: &mut GradientsParams, module: &M) -> Result<(), Error> {
    let first = first_parameter(module).ok_or(Error::EmptyModule)?;
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let known = kept.iter().position(|(of, id, _)| (*of, *id) == (clip, first));
    let (.., mut clipper) = match known {
        Some(place) => kept.remove(place),
        None => (clip, first, GradClipper::new(clip)),
    };
    let outcome = clipper.clip(grads, module);
    if kept.len() == MOST_KEPT {
        kept.remove(0);
    }
    kept.push((clip, first, clipper));
    outcome
}

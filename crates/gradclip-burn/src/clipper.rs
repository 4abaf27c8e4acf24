//! [`GradClipper`]: clips the gradients of a model, step after step.

use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;
use gradclip::{Clip, ClipReport, Waiting};

use crate::gradients::{Taken, first_parameter};
use crate::threshold::AdaptiveThreshold;
use crate::{Error, host};

/// Clips gradients between `GradientsParams::from_grads` and the optimizer's `step`.
///
/// Make one before the training loop and keep it. It holds the plan of a clip on a GPU while the parameters stay the same, and
/// the pages of burn's memory that held the last gradients. For a separate norm of each optimizer or group of parameters, make
/// several.
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
///         // This waits for a GPU, so it is not called at each step.
///         println!("norm {}", clipper.report().wait()?.total_norm);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GradClipper {
    clip: Clip,
    /// The state after the last clip on the host. On a GPU the plan has it.
    threshold: Option<AdaptiveThreshold>,
    through_host: bool,
    #[cfg_attr(not(feature = "wgpu"), expect(dead_code, reason = "the host counts always"))]
    count_lost: bool,
    /// The report of the last clip, if that was on the host.
    report: Option<ClipReport>,
    #[cfg(feature = "wgpu")]
    planned: Option<crate::device::Planned>,
}

impl GradClipper {
    /// Clips as described, independently of earlier steps.
    ///
    /// Units (scope `Unit`, and AGC) are the columns of the weights of burn's `Linear`, which are `[in, out]`. Of any other
    /// parameter they are given by the clip's `unit_axis`, rows by default. AGC uses the parameters of the module.
    #[must_use]
    pub fn new(clip: Clip) -> Self {
        Self {
            clip,
            threshold: None,
            through_host: false,
            count_lost: false,
            report: None,
            #[cfg(feature = "wgpu")]
            planned: None,
        }
    }

    /// Clips by a threshold that follows the norms of the run. The threshold of `clip` stays an upper bound;
    /// `Clip::norm(f64::INFINITY)` sets none.
    #[must_use]
    pub fn adaptive(clip: Clip, threshold: impl Into<AdaptiveThreshold>) -> Self {
        Self { threshold: Some(threshold.into()), ..Self::new(clip) }
    }

    /// Clips on the host even where a GPU could: copies from the device, clips with [`gradclip::Clipper::cpu`], and copies back.
    /// Use it to check the GPU, and for devices that burn opened.
    #[must_use]
    pub fn through_host(mut self) -> Self {
        self.through_host = true;
        self
    }

    /// Counts on a GPU too which elements become 0 or infinite only because they are rounded: [`ClipReport::lost`]. On the
    /// host they are always counted. A device needs six storage buffers for each stage.
    #[must_use]
    pub fn count_lost(mut self) -> Self {
        self.count_lost = true;
        self
    }

    /// Clips the gradients of the module's parameters.
    ///
    /// With the feature `wgpu`, on a device that [`open_wgpu`](crate::open_wgpu) opened or
    /// [`register_wgpu`](crate::register_wgpu) registered, this submits the work behind that of burn, in place, and does not wait
    /// for it. Gradients on any other device, or on several, are clipped on the host.
    ///
    /// Parameters without a gradient are skipped. A parameter that occurs twice in the module counts once. Gradients of
    /// parameters of other modules do not change. A gradient that shares its memory with another tensor, or is not contiguous,
    /// is copied first.
    ///
    /// # Errors
    /// [`Error::EmptyModule`], [`Error::OtherModule`], [`Error::Shape`], [`Error::Dtype`], [`Error::NotRegistered`],
    /// [`Error::WithoutWgpu`], [`Error::Burn`]; [`Error::Clip`] for every error of the library. The gradients are then
    /// unchanged. Non-finite gradients under the policy `Error` are an error here on the host; on a GPU they are an error of
    /// [`GradClipper::report`].
    pub fn clip<M: Module>(&mut self, grads: &mut GradientsParams, module: &M) -> Result<(), Error> {
        self.clip_all(&mut [grads], module)
    }

    /// [`GradClipper::clip`] for gradients in several containers, as several optimizers need them: one norm over all of them. If a
    /// parameter has gradients in several containers, each of them counts.
    ///
    /// # Errors
    /// The same.
    pub fn clip_all<M: Module>(&mut self, grads: &mut [&mut GradientsParams], module: &M) -> Result<(), Error> {
        let mut taken = Taken::from(grads, module, self.clip.needs_parameters())?;
        let gradients = &mut taken.gradients;
        #[cfg(feature = "wgpu")]
        {
            let gpu = if self.through_host { None } else { crate::device::registered_gpu(gradients)? };
            if let Some(gpu) = gpu {
                if self.report.take().is_some() && self.threshold.is_some() {
                    // The threshold has changed on the host since the plan was made.
                    self.planned = None;
                }
                return crate::device::clip(
                    &mut self.planned,
                    &gpu,
                    (&self.clip, self.count_lost),
                    &mut self.threshold,
                    gradients,
                );
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
        // Without gradients the threshold does not change.
        let threshold = self.threshold.as_mut().filter(|_| !gradients.is_empty()).map(AdaptiveThreshold::on_host);
        self.report = Some(host::clip(&self.clip, threshold, gradients)?);
        Ok(())
    }

    /// The report of the last clip. On a GPU this waits until the clip has finished.
    ///
    /// # Errors
    /// [`Error::NotClipped`] before the first clip; [`Error::Clip`] with `NonFinite` under the policy `Error`, and errors of the
    /// device.
    pub fn report(&self) -> Waiting<'_, Result<ClipReport, Error>> {
        Waiting::new(async {
            #[cfg(feature = "wgpu")]
            if let (None, Some(planned)) = (&self.report, &self.planned) {
                return Ok(planned.plan.report().await?);
            }
            self.report.clone().ok_or(Error::NotClipped)
        })
    }

    /// The adaptive threshold with its state after the last clip; `None` for a clipper without one. A checkpoint keeps it, and
    /// [`GradClipper::adaptive`] resumes from it. Waits for a GPU.
    ///
    /// # Errors
    /// Errors of the device.
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

/// The clippers of [`clip_grad_norm`] and [`clip_grad_value`]: one for each clip and module, the latest last.
static CLIPPERS: Mutex<Vec<(Clip, ParamId, GradClipper)>> = Mutex::new(Vec::new());

/// How many clippers are cached: models are few, and a clipper is small beside one.
const MAX_CLIPPERS: usize = 8;

/// Clips by the global norm of all gradients of the module, as [`GradClipper::clip`] does with `Clip::norm(max_norm)`.
/// The plan for a GPU is cached from step to step. Use [`GradClipper`] to get the norm, and on a GPU to learn of a NaN or an
/// infinity: this function leaves such gradients unchanged there, and cannot report them without a wait.
///
/// # Errors
/// Those of [`GradClipper::clip`], and [`Error::Clip`] if `max_norm` is negative or NaN.
pub fn clip_grad_norm<M: Module>(grads: &mut GradientsParams, module: &M, max_norm: f64) -> Result<(), Error> {
    clip_cached(Clip::norm(max_norm), grads, module)
}

/// Clips each element to `-clip_value..=clip_value`, as [`GradClipper::clip`] does with `Clip::value(clip_value)`.
///
/// # Errors
/// Those of [`GradClipper::clip`], and [`Error::Clip`] if `clip_value` is negative or NaN.
pub fn clip_grad_value<M: Module>(grads: &mut GradientsParams, module: &M, clip_value: f64) -> Result<(), Error> {
    clip_cached(Clip::value(clip_value), grads, module)
}

fn clip_cached<M: Module>(clip: Clip, grads: &mut GradientsParams, module: &M) -> Result<(), Error> {
    let first = first_parameter(module).ok_or(Error::EmptyModule)?;
    let mut cached = CLIPPERS.lock().unwrap_or_else(PoisonError::into_inner);
    let known = cached.iter().position(|(of, id, _)| (*of, *id) == (clip, first));
    let (.., mut clipper) = match known {
        Some(place) => cached.remove(place),
        None => (clip, first, GradClipper::new(clip)),
    };
    let outcome = clipper.clip(grads, module);
    if cached.len() == MAX_CLIPPERS {
        cached.remove(0);
    }
    cached.push((clip, first, clipper));
    outcome
}

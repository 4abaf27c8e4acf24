//! One run: forward, backward, clip, step; now and then a checkpoint and its loss on what it was not trained on.

use std::path::PathBuf;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::store::ModuleRecord;
use burn::tensor::{Bytes, Device};
use gradclip_burn::gradclip::{Clip, NonFinite, ZClip};
use gradclip_burn::{AdaptiveThreshold, GradClipper};
use serde::{Deserialize, Serialize};

use super::Result;
use super::checkpoint::{Checkpoint, State};
use super::data::{Data, Random, Split};
use super::model::Rnn;
use super::optimizer::Stepper;
use super::settings::{Clipping, Settings};

/// Batches that a validation takes.
const VALIDATION: usize = 8;

/// What a run has measured, step by step.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Figures {
    pub(crate) loss: Vec<f32>,
    /// Global norms before clipping; none where it was not finite.
    pub(crate) norm: Vec<Option<f32>>,
    /// How many steps were clipped.
    pub(crate) clipped: usize,
    /// Steps done, and the loss on held-out data then; none where it was not finite.
    pub(crate) validation: Vec<(usize, Option<f32>)>,
    /// The step whose loss was not finite, with which the run stopped.
    pub(crate) diverged_at: Option<usize>,
}

pub(crate) struct Run {
    pub(crate) clipping: Clipping,
    pub(crate) figures: Figures,
    settings: Settings,
    /// Where its checkpoint lies.
    path: PathBuf,
    device: Device,
    model: Rnn,
    stepper: Stepper,
    /// Clips nothing and reports the norm, also for clips that need none.
    measure: GradClipper,
    random: Random,
}

impl Run {
    /// A run from these weights, or from where its checkpoint was made.
    pub(crate) fn new(
        clipping: Clipping,
        settings: &Settings,
        path: PathBuf,
        (model, device): (&Rnn, &Device),
        saved: Option<Checkpoint>,
    ) -> Result<Self> {
        let mut run = Self {
            clipping,
            figures: Figures::default(),
            settings: settings.clone(),
            device: device.clone(),
            model: model.clone(),
            stepper: stepper(clipping, settings, device, None),
            measure: GradClipper::new(only_measure()),
            random: Random(settings.seed),
            path,
        };
        if let Some(Checkpoint { state, model, optimizer }) = saved {
            let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(model))?;
            run.model = run.model.try_load_record(record)?;
            run.stepper = stepper(clipping, settings, device, state.threshold).resumed(optimizer)?;
            run.random = state.random;
            run.figures = state.figures;
        }
        Ok(run)
    }

    /// Saves and validates if it is time to, then takes a step; false once `steps` are done or the loss is no longer
    /// finite. `validated` is called after a validation.
    pub(crate) fn advance(
        &mut self,
        data: &Data,
        steps: usize,
        every: usize,
        validated: impl Fn(&Self),
    ) -> Result<bool> {
        let done = self.steps();
        if done.is_multiple_of(every) || done == steps {
            self.save()?;
            self.validate(data);
            validated(self);
        }
        if done < steps {
            self.step(data)?;
        }
        Ok(done < steps && self.figures.diverged_at.is_none())
    }

    /// How many steps it has done.
    pub(crate) fn steps(&self) -> usize {
        self.figures.loss.len()
    }

    /// The weights, to the bit.
    pub(crate) fn fingerprint(&self) -> String {
        format!("{:016x}", self.model.fingerprint().0)
    }

    fn step(&mut self, data: &Data) -> Result<()> {
        let batch = data.batch(&mut self.random, Split::Training, &self.device);
        let loss = self.model.loss(batch, self.settings.loss());
        let value = loss.clone().into_scalar::<f32>();
        if !value.is_finite() {
            self.figures.diverged_at = Some(self.steps());
            return Ok(());
        }
        let mut grads = GradientsParams::from_grads(loss.backward(), &self.model);
        self.measure.clip(&mut grads, &self.model)?;
        let rate = self.settings.learning_rate(self.steps());
        self.model = self.stepper.step(rate, self.model.clone(), grads)?;

        // Training needs no reports, for which it waits on a GPU; the picture does.
        self.figures.loss.push(value);
        self.figures.norm.push(finite(self.measure.report().wait()?.total_norm as f32));
        self.figures.clipped += usize::from(self.stepper.report()?.clipped);
        Ok(())
    }

    fn save(&self) -> Result<()> {
        let threshold = match self.stepper.threshold()? {
            Some(AdaptiveThreshold::ZClip(threshold)) => Some(threshold),
            _ => None,
        };
        let state = State {
            settings: self.settings.clone(),
            clipping: self.clipping,
            random: self.random.clone(),
            threshold,
            figures: self.figures.clone(),
        };
        let model = self.model.clone().into_record().into_bytes()?.to_vec();
        let optimizer = self.stepper.to_bytes()?;
        Checkpoint { state, model, optimizer }.write(&self.path)
    }

    /// The same batches each time.
    fn validate(&mut self, data: &Data) {
        let (model, device) = (self.model.valid(), self.device.clone().inner());
        let mut random = Random(!self.settings.seed);
        let mut loss = || {
            let batch = data.batch(&mut random, Split::HeldOut, &device);
            model.loss(batch, self.settings.loss()).into_scalar::<f32>()
        };
        let mean = (0..VALIDATION).map(|_| loss()).sum::<f32>() / VALIDATION as f32;
        self.figures.validation.push((self.steps(), finite(mean)));
    }
}

fn stepper(clipping: Clipping, settings: &Settings, device: &Device, saved: Option<ZClip>) -> Stepper {
    let clip = match clipping {
        Clipping::None | Clipping::Zclip => only_measure(),
        Clipping::Value => Clip::value(settings.clip_value),
        Clipping::Norm => Clip::norm(settings.max_norm).non_finite(NonFinite::Propagate),
    };
    let adaptive = (clipping == Clipping::Zclip).then(|| {
        let new = ZClip::new().z_threshold(settings.z_threshold).warm_up(settings.z_warm_up);
        GradClipper::adaptive(clip, saved.unwrap_or(new))
    });
    if settings.folded {
        return Stepper::folded(adaptive, clip, settings.optimizer);
    }
    Stepper::apart(adaptive.unwrap_or_else(|| GradClipper::new(clip)), settings.optimizer, &device.clone().inner())
}

/// Gradients that are not finite go through here and above, so that a run ends as it would without a check.
fn only_measure() -> Clip {
    Clip::norm(f64::INFINITY).non_finite(NonFinite::Propagate)
}

fn finite(number: f32) -> Option<f32> {
    number.is_finite().then_some(number)
}

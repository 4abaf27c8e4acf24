//! What a training run is made of, as options of the command line and as part of its checkpoints.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// Settings that must agree for a run to go on from a checkpoint.
#[derive(Args, Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Settings {
    /// What is learned: the next character of prose, or the sum of two marked numbers in a long sequence
    #[arg(long, value_enum, default_value_t = Task::Text)]
    pub(crate) task: Task,
    /// The loss: cross-entropy for text, squared or absolute error for regression [default: the task's first]
    #[arg(long, value_enum)]
    pub(crate) loss: Option<Loss>,
    /// The activation of the recurrent cell
    #[arg(long, value_enum, default_value_t = Activation::Relu)]
    pub(crate) activation: Activation,
    /// The optimizer (SGD with momentum 0.9)
    #[arg(long, value_enum, default_value_t = Optimizer::Sgd)]
    pub(crate) optimizer: Optimizer,
    /// Take the step of gradclip's own optimizer, with the clip folded in, in place of burn's
    #[arg(long)]
    pub(crate) folded: bool,
    /// Sequences in a batch
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = count)]
    pub(crate) batch_size: usize,
    /// Time steps that gradients go back through
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = count)]
    pub(crate) unroll: usize,
    /// Hidden units
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = count)]
    pub(crate) hidden: usize,
    /// Spectral radius of the first recurrent weights
    #[arg(long, value_name = "G", default_value_t = 1.0, value_parser = positive)]
    pub(crate) gain: f64,
    /// The learning rate at the first step
    #[arg(long, default_value_t = 0.2, value_parser = positive)]
    pub(crate) lr: f64,
    /// Fraction of the learning rate that is left after 1,000 steps
    #[arg(long, value_name = "F", default_value_t = 0.5, value_parser = fraction)]
    pub(crate) lr_decay: f64,
    /// Value clipping: the largest absolute value of an element
    #[arg(long, value_name = "V", default_value_t = 0.03, value_parser = positive)]
    pub(crate) clip_value: f64,
    /// Norm clipping: the largest global norm
    #[arg(long, value_name = "N", default_value_t = 2.0, value_parser = positive)]
    pub(crate) max_norm: f64,
    /// ZClip: how many standard deviations a norm may be above its mean
    #[arg(long, value_name = "Z", default_value_t = 2.5, value_parser = positive)]
    pub(crate) z_threshold: f64,
    /// ZClip: for how many steps norms are only measured
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) z_warm_up: u32,
    /// Seed of the first weights and of the batches
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// The device to compute on
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    pub(crate) device: Backend,
}

impl Settings {
    pub(crate) fn loss(&self) -> Loss {
        self.loss.unwrap_or(match self.task {
            Task::Text => Loss::CrossEntropy,
            Task::Regression => Loss::Squared,
        })
    }

    /// Checks options that contradict each other.
    pub(crate) fn check(&self, longest: usize) -> Result<(), String> {
        if (self.task == Task::Text) != (self.loss() == Loss::CrossEntropy) {
            return Err(match self.task {
                Task::Text => "the task text is trained by cross-entropy".into(),
                Task::Regression => "the task regression is trained by squared or absolute error".into(),
            });
        }
        if self.unroll > longest || (self.task == Task::Regression && self.unroll < 2) {
            return Err(format!("--unroll {} must be 1 to {longest}, and for regression at least 2", self.unroll));
        }
        Ok(())
    }

    /// The learning rate of a step, from 0.
    pub(crate) fn learning_rate(&self, step: usize) -> f64 {
        self.lr * self.lr_decay.powf(step as f64 / 1000.0)
    }

    /// The first difference between two runs, in words; none if one can resume from the checkpoint of the other.
    pub(crate) fn difference(&self, saved: &Self) -> Option<String> {
        let fields = |settings: &Self| match serde_json::to_value(settings) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (own, saved) = (fields(self), fields(saved));
        let differs = |name: &&String| own.get(*name) != saved.get(*name);
        let name = own.keys().find(differs)?;
        Some(format!("--{} {}, this run has {}", name.replace('_', "-"), saved[name], own[name]))
    }
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Task {
    Text,
    Regression,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Loss {
    CrossEntropy,
    Squared,
    Absolute,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Activation {
    Sigmoid,
    Tanh,
    Relu,
    LeakyRelu,
    Elu,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Optimizer {
    Sgd,
    Adagrad,
    Rmsprop,
    Adam,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Backend {
    /// The CPU
    Flex,
    /// A GPU
    #[cfg(feature = "wgpu")]
    Wgpu,
}

/// The four runs.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Clipping {
    None,
    Value,
    Norm,
    Zclip,
}

impl Clipping {
    pub(crate) const ALL: [Self; 4] = [Self::None, Self::Value, Self::Norm, Self::Zclip];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "no clipping",
            Self::Value => "value clipping",
            Self::Norm => "norm clipping",
            Self::Zclip => "ZClip",
        }
    }

    /// Of its checkpoint.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Self::None => "none.checkpoint",
            Self::Value => "value.checkpoint",
            Self::Norm => "norm.checkpoint",
            Self::Zclip => "zclip.checkpoint",
        }
    }
}

pub(crate) fn count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "must be a whole number above 0".into())
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| *number > 0.0 && number.is_finite());
    number.ok_or_else(|| "must be a finite number above 0".into())
}

fn fraction(text: &str) -> Result<f64, String> {
    positive(text).ok().filter(|number| *number <= 1.0).ok_or_else(|| "must be above 0 and at most 1".into())
}

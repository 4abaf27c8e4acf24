//! The network: one recurrent cell between two linear layers.

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::loss::{CrossEntropyLossConfig, MseLoss, Reduction};
use burn::nn::{Initializer, Linear, LinearConfig, activation as nn};
use burn::tensor::{Device, Tensor};

use super::checkpoint::Fingerprint;
use super::data::{Batch, Targets};
use super::settings::{Activation, Loss, Settings};

/// h = activation(x W + b + h' U), with h' the h of the time before, from 0; the output is h V + c.
#[derive(Module, Debug)]
pub(crate) struct Rnn {
    input: Linear,
    recurrent: Linear,
    output: Linear,
    activation: nn::Activation,
}

impl Rnn {
    pub(crate) fn new(settings: &Settings, (inputs, outputs): (usize, usize), device: &Device) -> Self {
        let hidden = settings.hidden;
        let recurrent = Initializer::Normal { mean: 0.0, std: settings.gain / (hidden as f64).sqrt() };
        let activation = match settings.activation {
            Activation::Sigmoid => nn::ActivationConfig::Sigmoid,
            Activation::Tanh => nn::ActivationConfig::Tanh,
            Activation::Relu => nn::ActivationConfig::Relu,
            Activation::LeakyRelu => nn::ActivationConfig::LeakyRelu(nn::LeakyReluConfig::new()),
            Activation::Elu => nn::ActivationConfig::Elu(nn::EluConfig::new()),
        };
        Self {
            input: LinearConfig::new(inputs, hidden).init(device),
            recurrent: LinearConfig::new(hidden, hidden).with_bias(false).with_initializer(recurrent).init(device),
            output: LinearConfig::new(hidden, outputs).init(device),
            activation: activation.init(device),
        }
    }

    /// The mean loss of a batch.
    pub(crate) fn loss(&self, batch: Batch, loss: Loss) -> Tensor<1> {
        let [unroll, sequences, inputs] = batch.inputs.dims();
        let mut states: Vec<Tensor<2>> = Vec::with_capacity(unroll);
        for time in 0..unroll {
            let input = batch.inputs.clone().narrow(0, time, 1).reshape([sequences, inputs]);
            let mut sum = self.input.forward(input);
            if let Some(state) = states.last() {
                sum = sum + self.recurrent.forward(state.clone());
            }
            states.push(self.activation.forward(sum));
        }
        match batch.targets {
            Targets::Characters(characters) => {
                let outputs = self.output.forward(Tensor::cat(states, 0));
                let device = outputs.device();
                CrossEntropyLossConfig::new().init(&device).forward(outputs, characters)
            }
            Targets::Numbers(numbers) => {
                // Only the end of the sequence is judged.
                let outputs = self.output.forward(states.swap_remove(unroll - 1));
                match loss {
                    Loss::Absolute => (outputs - numbers).abs().mean(),
                    _ => MseLoss::new().forward(outputs, numbers, Reduction::Mean),
                }
            }
        }
    }

    /// A hash of the bits of the weights.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        struct Visitor(Fingerprint);
        impl ModuleVisitor for Visitor {
            fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
                self.0.add(parameter.val().into_data().as_bytes());
            }
        }
        let mut visitor = Visitor(Fingerprint::new());
        self.visit(&mut visitor);
        visitor.0
    }
}

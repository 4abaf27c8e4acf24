//! [`Numbers`]: the numbers of one step, which follow from the settings and the step count. All are float64.

use super::{Algorithm, Halves, Optimizer};

/// The numbers of one step of one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Numbers {
    /// 1, or -1 to maximize.
    pub(crate) sign: f64,
    /// What is added to a gradient, times its parameter.
    pub(crate) coupled_decay: f64,
    pub(crate) rule: Rule,
    pub(crate) halves: Halves,
}

/// The numbers of an algorithm. [`Optimizer`] has the formulas.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rule {
    Sgd { lr: f64, momentum: f64, undampened: f64, nesterov: bool, first: bool },
    Adagrad { lr: f64, eps: f64 },
    RmsProp { lr: f64, square: f64, eps: f64, momentum: f64, centered: bool },
    Adam { lr: f64, decay: f64, mean: f64, square: f64, root: f64, eps: f64, amsgrad: bool },
}

impl Optimizer {
    /// The numbers of step number `t`, from 1.
    pub(crate) fn numbers(&self, t: u64) -> Numbers {
        let Self { lr, weight_decay, .. } = *self;
        let (eps, momentum) = (self.eps.unwrap_or(0.0), self.momentum.unwrap_or(0.0));
        let rule = match self.algorithm {
            Algorithm::Sgd => {
                let undampened = 1.0 - self.dampening.unwrap_or(0.0);
                Rule::Sgd { lr, momentum, undampened, nesterov: self.nesterov, first: t == 1 }
            }
            Algorithm::Adagrad => {
                let before = t.saturating_sub(1) as f64;
                Rule::Adagrad { lr: lr / (1.0 + before * self.lr_decay.unwrap_or(0.0)), eps }
            }
            Algorithm::RmsProp => {
                let square = self.alpha.unwrap_or(0.0);
                Rule::RmsProp { lr, square, eps, momentum, centered: self.centered }
            }
            Algorithm::Adam | Algorithm::AdamW => {
                let [mean, square] = self.betas.unwrap_or_default();
                let corrected = |beta: f64| 1.0 - beta.powf(t as f64);
                Rule::Adam {
                    lr: lr / corrected(mean),
                    decay: if self.algorithm == Algorithm::AdamW { lr * weight_decay } else { 0.0 },
                    mean,
                    square,
                    root: 1.0 / corrected(square).sqrt(),
                    eps,
                    amsgrad: self.amsgrad,
                }
            }
        };
        Numbers {
            sign: if self.maximize { -1.0 } else { 1.0 },
            coupled_decay: if self.algorithm == Algorithm::AdamW { 0.0 } else { weight_decay },
            rule,
            halves: self.halves,
        }
    }
}

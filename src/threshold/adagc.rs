//! [`AdaGc`].

use super::{Threshold, above_0, at_least_1, below_1, is_norm, norm_of_step};
use crate::Error;
use crate::error::tensor_label;

/// Clips each tensor to a multiple of the mean of its own norms.
///
/// With N the norm over all tensors at step t, Nᵢ that of tensor i, and γᵢ the mean of tensor i after step t - 1:
///
/// ```text
/// warm-up     h = min(1, λ_abs / N)          max_normᵢ = h Nᵢ if h < 1, else infinity
///             Nᵢ' = h Nᵢ                     γᵢ ← min(γᵢ, Nᵢ'), from infinity
/// afterwards                                 max_normᵢ = λ_rel γᵢ
///             Nᵢ' = min(Nᵢ, λ_rel γᵢ)        γᵢ ← β γᵢ + (1 - β) Nᵢ'
/// ```
///
/// (Wang, Li, Chen, Zeng, Yang, Yu, Ma, Shen 2025, "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
/// Clipping", arXiv 2502.11034). So the first `warm_up` steps are clipped by the global norm: all tensors by the same
/// factor h. `warm_up` is the paper's `T_start`.
///
/// Defaults: `lambda_rel` 1.04, `beta` 0.99, `lambda_abs` 1, `warm_up` 100, as in the authors' program in PaddlePaddle;
/// other programs have `lambda_rel` 1.05 and `beta` 0.98.
///
/// Two differences:
///
/// - The authors' program takes the norms of the warm-up into γ before clipping. Here it takes the clipped norms, as
///   above.
/// - Here a norm of exactly 0 leaves γ as it was. Otherwise a tensor that got no gradient at one step would have all
///   its later gradients clipped to nothing: for example an idle expert, or the partner of a factor that starts at
///   zero. A tensor's threshold is infinite until its first norm above 0.
///
/// The norms of single tensors may be small beside the `eps` of a [`Clip`](crate::Clip), 1e-6 by default. Here 0 is
/// better.
///
/// ```
/// use gradclip::{AdaGc, Threshold};
/// let mut threshold = AdaGc::new().warm_up(1).lambda_abs(2.5).lambda_rel(2.0);
/// threshold.bind(&["tensor \"w\"".into(), "tensor \"b\"".into()])?;
/// assert_eq!(threshold.max_norms(5.0, &[3.0, 4.0]), [1.5, 2.0]);
/// assert_eq!(threshold.max_norms(13.0, &[5.0, 12.0]), [3.0, 4.0]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(into = "super::saved::AdaGc", try_from = "super::saved::AdaGc")
)]
pub struct AdaGc {
    pub(crate) lambda_rel: f64,
    pub(crate) lambda_abs: f64,
    pub(crate) beta: f64,
    pub(crate) warm_up: u32,
    /// The tensors that the gammas belong to.
    pub(crate) labels: Vec<String>,
    /// γ of each tensor: above 0, and infinite until its first norm above 0.
    pub(crate) gammas: Vec<f64>,
    /// How many steps have entered.
    pub(crate) steps: u64,
}

impl Default for AdaGc {
    fn default() -> Self {
        Self::new()
    }
}

impl AdaGc {
    /// The default parameters, and no state.
    #[must_use]
    pub fn new() -> Self {
        Self {
            lambda_rel: 1.04,
            lambda_abs: 1.0,
            beta: 0.99,
            warm_up: 100,
            labels: Vec::new(),
            gammas: Vec::new(),
            steps: 0,
        }
    }

    /// Sets the largest ratio of a tensor's norm to its mean after the warm-up: a finite number above 0.
    #[must_use]
    pub fn lambda_rel(mut self, lambda_rel: f64) -> Self {
        self.lambda_rel = lambda_rel;
        self
    }

    /// Sets the largest global norm during the warm-up: a finite number above 0.
    #[must_use]
    pub fn lambda_abs(mut self, lambda_abs: f64) -> Self {
        self.lambda_abs = lambda_abs;
        self
    }

    /// Sets the part of a mean that a step keeps: 0 or more, and below 1.
    #[must_use]
    pub fn beta(mut self, beta: f64) -> Self {
        self.beta = beta;
        self
    }

    /// Sets how many steps are clipped by the global norm: 1 or more, because a mean needs a first value.
    #[must_use]
    pub fn warm_up(mut self, steps: u32) -> Self {
        self.warm_up = steps;
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        above_0("lambda_rel", self.lambda_rel)?;
        above_0("lambda_abs", self.lambda_abs)?;
        below_1("beta", self.beta)?;
        at_least_1("warm_up", self.warm_up as usize)
    }

    /// Starts again with these tensors.
    fn begin(&mut self, labels: Vec<String>) {
        self.gammas = vec![f64::INFINITY; labels.len()];
        self.labels = labels;
    }
}

impl Threshold for AdaGc {
    /// Before the first step any tensors are accepted and remembered.
    fn bind(&mut self, labels: &[String]) -> Result<(), Error> {
        self.check()?;
        if self.steps == 0 {
            self.begin(labels.to_vec());
            return Ok(());
        }
        let place = self.labels.iter().zip(labels).take_while(|(ours, theirs)| ours == theirs).count();
        let what = match (self.labels.get(place), labels.get(place)) {
            (None, None) => return Ok(()),
            (Some(ours), Some(theirs)) => format!("where the state has {ours}, the gradients have {theirs}"),
            (Some(ours), None) => format!("the state has {ours}, which the gradients lack"),
            (None, Some(theirs)) => format!("the gradients have {theirs}, which the state lacks"),
        };
        let reason = format!("{what}; give the same tensors in the same order, or begin with AdaGc::new()");
        Err(Error::ThresholdState(reason))
    }

    /// The norms belong to the bound labels. Without a call of `bind` the first step fixes their number. A step with
    /// another number of norms is not taken, and its thresholds are infinite.
    ///
    /// If a norm is not finite, the thresholds are `lambda_abs` during the warm-up and λ_rel γᵢ afterwards.
    fn max_norms(&mut self, total_norm: f64, norms: &[f64]) -> Vec<f64> {
        if self.check().is_err() || (self.steps > 0 && self.gammas.len() != norms.len()) {
            return vec![f64::INFINITY; norms.len()];
        }
        let warming_up = self.steps < u64::from(self.warm_up);
        // A step without tensors is no step, and does not fix the number of norms.
        let enters = !norms.is_empty() && is_norm(norm_of_step(total_norm, norms));
        if self.gammas.len() != norms.len() {
            if !enters {
                return vec![self.lambda_abs; norms.len()];
            }
            self.begin((0..norms.len()).map(|index| tensor_label(None, index)).collect());
        }
        if enters {
            self.steps = self.steps.saturating_add(1);
        }
        let h = if total_norm > self.lambda_abs { self.lambda_abs / total_norm } else { 1.0 };
        let one = |(gamma, &norm): (&mut f64, &f64)| {
            let max_norm = match (warming_up, enters) {
                (false, _) => self.lambda_rel * *gamma,
                (true, false) => self.lambda_abs,
                (true, true) if h < 1.0 => h * norm,
                (true, true) => f64::INFINITY,
            };
            let clipped = norm.min(max_norm);
            if enters && clipped > 0.0 {
                let next = if warming_up || gamma.is_infinite() {
                    gamma.min(clipped)
                } else {
                    *gamma + (1.0 - self.beta) * (clipped - *gamma)
                };
                // At the smallest floats the mean may round to 0, which must not become the state.
                if next > 0.0 {
                    *gamma = next;
                }
            }
            max_norm
        };
        self.gammas.iter_mut().zip(norms).map(one).collect()
    }
}

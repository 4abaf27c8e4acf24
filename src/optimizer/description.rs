//! [`Optimizer`]: which update a step makes, and with which settings, as data. Every use checks it.

use std::fmt;

use crate::clip::{Number, setting};
use crate::{Dtype, Error};

/// Which update is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// Gradient descent, with momentum if wanted: [`Optimizer::sgd`].
    Sgd,
    /// [`Optimizer::adagrad`].
    Adagrad,
    /// [`Optimizer::rmsprop`].
    RmsProp,
    /// [`Optimizer::adam`].
    Adam,
    /// [`Optimizer::adamw`].
    AdamW,
}

/// What is kept of parameters in half precision. A step that changes such a parameter by less than half a unit in its
/// last place is lost when the result is rounded: 1.0 in bfloat16 stays 1.0 under AdamW at a learning rate of 1e-3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Halves {
    /// Nothing: each result is rounded to nearest even, as in PyTorch.
    #[default]
    Rounded,
    /// The state keeps 16 bits beside each bfloat16 parameter (`remainder`). Both together are an exact float32. Its
    /// upper half, rounded to nearest with ties away from zero, is the parameter. float16 has no such remainder.
    Remainder,
    /// The state keeps a float32 copy of each half-precision parameter (`master`). The parameter is its rounded copy.
    Master,
}

/// A tensor that the state keeps beside a parameter, of as many elements ([`Optimizer::state_tensors`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct StateTensor {
    /// Its name: PyTorch's, or `remainder` or `master` ([`Halves`]).
    pub name: &'static str,
    /// The bytes of an element: 8 for a float64, 4 for a float32, 2 for a remainder.
    pub element_size: usize,
}

/// Which update a step makes, and with which settings. Formulas and defaults are those of `torch.optim`.
///
/// w is a parameter, u its clipped gradient, t the number of this step, from 1. With `maximize` u changes its sign.
/// Then u += weight_decay · w, except under AdamW.
///
/// | | update | source |
/// |---|---|---|
/// | [`Optimizer::sgd`] | b = u in the first step, then momentum · b + (1 - dampening) · u; w -= lr · b, with `nesterov` lr · (u + momentum · b) | Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum in deep learning" |
/// | [`Optimizer::adagrad`] | s += u²; w -= lr / (1 + (t - 1) · lr_decay) · u / (√s + eps) | Duchi, Hazan, Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization" |
/// | [`Optimizer::rmsprop`] | s = α · s + (1 - α) · u²; a = √s + eps, if `centered` √(s - mean²) + eps; b = momentum · b + u / a; w -= lr · b | Tieleman, Hinton 2012, lecture 6.5; centered: Graves 2013, "Generating sequences with recurrent neural networks", equations 38 to 45 |
/// | [`Optimizer::adam`] | m = β₁ · m + (1 - β₁) · u; v = β₂ · v + (1 - β₂) · u²; w -= lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps); with `amsgrad` v is the largest so far | Kingma, Ba 2015, "Adam: a method for stochastic optimization", algorithm 1; AMSGrad: Reddi, Kale, Kumar 2018, "On the convergence of Adam and beyond" |
/// | [`Optimizer::adamw`] | the same, and w -= lr · weight_decay · w | Loshchilov, Hutter 2019, "Decoupled weight decay regularization" |
///
/// State and arithmetic are float32, for float64 parameters float64. What depends on t is computed in float64. Two
/// things differ from PyTorch where its numbers leave their range: u² is at most the largest finite number, and
/// s - mean² is at least 0, where rounding might make it negative and its root NaN.
///
/// A description is data, and it is not checked until it is used. Every use then reports what is wrong
/// ([`Error::Setting`]): an invalid number, or a setting that the algorithm does not use.
///
/// ```
/// use gradclip::{Clip, Clipper, Optimizer, Tensor, TensorMut};
/// let (mut w, gradient) = ([1.0f32, -1.0], [30.0f32, 40.0]);
/// let sgd = Optimizer::sgd(0.5).momentum(0.9);
/// let mut state = sgd.state(&[Tensor::new(&w)])?;
/// let (parameters, gradients) = (&mut [TensorMut::new(&mut w)], &[Tensor::new(&gradient)]);
/// let report = Clipper::cpu().step(&Clip::norm(12.5).eps(0.0), &mut state, parameters, gradients)?;
/// assert_eq!((report.total_norm, state.steps()), (50.0, 1));
/// assert_eq!(w, [-2.75, -6.0]); // minus 0.5 times [7.5, 10.0]
/// assert_eq!(sgd.to_string(), "SGD, lr 0.5, momentum 0.9");
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Optimizer {
    /// The update.
    pub algorithm: Algorithm,
    /// The learning rate.
    pub lr: f64,
    /// The weight decay: of u, under AdamW of w.
    pub weight_decay: f64,
    /// Whether the objective is maximized.
    pub maximize: bool,
    /// Of SGD and RMSprop.
    pub momentum: Option<f64>,
    /// Of SGD.
    pub dampening: Option<f64>,
    /// Of SGD.
    pub nesterov: bool,
    /// Of Adagrad.
    pub lr_decay: Option<f64>,
    /// Of Adagrad.
    pub initial_accumulator_value: Option<f64>,
    /// Of RMSprop.
    pub alpha: Option<f64>,
    /// Of RMSprop.
    pub centered: bool,
    /// Of Adam and AdamW.
    pub betas: Option<[f64; 2]>,
    /// Of Adam and AdamW.
    pub amsgrad: bool,
    /// The number beside the root; None for SGD.
    pub eps: Option<f64>,
    /// What is kept of parameters in half precision.
    pub halves: Halves,
}

/// A setter of a number that some algorithms use.
macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident)*) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: f64) -> Self {
            self.$name = Some($name);
            self
        })*
    };
}

/// A setter of what every algorithm has, or of a switch.
macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident: $type:ty)*) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: $type) -> Self {
            self.$name = $name;
            self
        })*
    };
}

impl Optimizer {
    /// Stochastic gradient descent. PyTorch's default of `lr` is 1e-3.
    #[must_use]
    pub fn sgd(lr: f64) -> Self {
        Self { lr, ..Self::new(Algorithm::Sgd) }
    }

    /// Adagrad. PyTorch's default of `lr` is 1e-2.
    #[must_use]
    pub fn adagrad(lr: f64) -> Self {
        Self { lr, ..Self::new(Algorithm::Adagrad) }
    }

    /// RMSprop. PyTorch's default of `lr` is 1e-2.
    #[must_use]
    pub fn rmsprop(lr: f64) -> Self {
        Self { lr, ..Self::new(Algorithm::RmsProp) }
    }

    /// Adam. PyTorch's default of `lr` is 1e-3.
    #[must_use]
    pub fn adam(lr: f64) -> Self {
        Self { lr, ..Self::new(Algorithm::Adam) }
    }

    /// AdamW, with a weight decay of 0.01 unless it is set. PyTorch's default of `lr` is 1e-3.
    #[must_use]
    pub fn adamw(lr: f64) -> Self {
        Self { lr, ..Self::new(Algorithm::AdamW) }
    }

    /// PyTorch's defaults.
    pub(super) fn new(algorithm: Algorithm) -> Self {
        let (sgd, adagrad) = (algorithm == Algorithm::Sgd, algorithm == Algorithm::Adagrad);
        let (rmsprop, adamw) = (algorithm == Algorithm::RmsProp, algorithm == Algorithm::AdamW);
        Self {
            algorithm,
            lr: if adagrad || rmsprop { 1e-2 } else { 1e-3 },
            weight_decay: if adamw { 1e-2 } else { 0.0 },
            maximize: false,
            momentum: (sgd || rmsprop).then_some(0.0),
            dampening: sgd.then_some(0.0),
            nesterov: false,
            lr_decay: adagrad.then_some(0.0),
            initial_accumulator_value: adagrad.then_some(0.0),
            alpha: rmsprop.then_some(0.99),
            centered: false,
            betas: (algorithm == Algorithm::Adam || adamw).then_some([0.9, 0.999]),
            amsgrad: false,
            eps: (!sgd).then_some(if adagrad { 1e-10 } else { 1e-8 }),
            halves: Halves::Rounded,
        }
    }

    plain! {
        /// Sets the learning rate, finite and 0 or more.
        lr: f64
        /// Sets the weight decay, finite and 0 or more.
        weight_decay: f64
        /// Chooses whether the objective is maximized.
        maximize: bool
        /// Chooses Nesterov's momentum, which needs a momentum above 0 and no dampening.
        nesterov: bool
        /// Chooses whether RMSprop divides by the standard deviation, and not by the root mean square.
        centered: bool
        /// Chooses whether Adam and AdamW divide by the largest v so far.
        amsgrad: bool
        /// Chooses what is kept of parameters in half precision. Others are as they are under each choice.
        halves: Halves
    }

    numbers! {
        /// Sets the momentum of SGD and RMSprop, finite and 0 or more.
        momentum
        /// Sets the dampening of SGD's momentum, a finite number.
        dampening
        /// Sets the decay of Adagrad's learning rate, finite and 0 or more.
        lr_decay
        /// Sets the sum of squares that Adagrad begins with, finite and 0 or more.
        initial_accumulator_value
        /// Sets the smoothing of RMSprop, 0 or more and below 1.
        alpha
        /// Sets the number that is added to the root, finite and 0 or more. SGD has none.
        eps
    }

    /// Sets the smoothing of Adam's and AdamW's averages, each 0 or more and below 1.
    #[must_use]
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        self.betas = Some([beta1, beta2]);
        self
    }

    /// Reports what is wrong with the description. Every use of an optimizer runs this check.
    ///
    /// # Errors
    /// [`Error::Setting`] if a setting has an invalid value, or if the algorithm does not use it.
    pub fn check(&self) -> Result<(), Error> {
        use Algorithm::{Adagrad, Adam, AdamW, RmsProp, Sgd};
        let is = |algorithms: &[Algorithm]| algorithms.contains(&self.algorithm);
        let at_least_0 = |name, x: f64| {
            let valid = (0.0..f64::INFINITY).contains(&x);
            setting(valid, name, Number(x), "it must be a finite number, 0 or more")
        };
        let below_1 =
            |name, x: f64| setting((0.0..1.0).contains(&x), name, Number(x), "it must be 0 or more and below 1");
        at_least_0("lr", self.lr)?;
        at_least_0("weight_decay", self.weight_decay)?;
        if let Some(momentum) = self.momentum {
            let users = "only Optimizer::sgd and Optimizer::rmsprop use it";
            setting(is(&[Sgd, RmsProp]), "momentum", Number(momentum), users)?;
            at_least_0("momentum", momentum)?;
        }
        if let Some(dampening) = self.dampening {
            setting(is(&[Sgd]), "dampening", Number(dampening), "only Optimizer::sgd uses it")?;
            setting(dampening.is_finite(), "dampening", Number(dampening), "it must be a finite number")?;
        }
        setting(!self.nesterov || is(&[Sgd]), "nesterov", true, "only Optimizer::sgd uses it")?;
        let fits = self.momentum.is_some_and(|x| x > 0.0) && self.dampening.unwrap_or(0.0) == 0.0;
        setting(!self.nesterov || fits, "nesterov", true, "it needs a momentum above 0 and no dampening")?;
        for (name, x) in [("lr_decay", self.lr_decay), ("initial_accumulator_value", self.initial_accumulator_value)] {
            if let Some(x) = x {
                setting(is(&[Adagrad]), name, Number(x), "only Optimizer::adagrad uses it")?;
                at_least_0(name, x)?;
            }
        }
        if let Some(alpha) = self.alpha {
            setting(is(&[RmsProp]), "alpha", Number(alpha), "only Optimizer::rmsprop uses it")?;
            below_1("alpha", alpha)?;
        }
        setting(!self.centered || is(&[RmsProp]), "centered", true, "only Optimizer::rmsprop uses it")?;
        let of_adam = "only Optimizer::adam and Optimizer::adamw use it";
        for (name, beta) in ["beta1", "beta2"].into_iter().zip(self.betas.into_iter().flatten()) {
            setting(is(&[Adam, AdamW]), name, Number(beta), of_adam)?;
            below_1(name, beta)?;
        }
        setting(!self.amsgrad || is(&[Adam, AdamW]), "amsgrad", true, of_adam)?;
        if let Some(eps) = self.eps {
            setting(!is(&[Sgd]), "eps", Number(eps), "Optimizer::sgd does not use it")?;
            at_least_0("eps", eps)?;
        }
        Ok(())
    }

    /// What the state keeps beside a parameter of this dtype, in the order in which it is taken piece by piece.
    #[must_use]
    pub fn state_tensors(&self, parameter: Dtype) -> Vec<StateTensor> {
        self.slots(parameter).into_iter().flatten().collect()
    }

    /// What the state keeps, in fixed places: three for the update, the last for what rounding takes off.
    pub(crate) fn slots(&self, parameter: Dtype) -> [Option<StateTensor>; 4] {
        let element_size = if parameter == Dtype::F64 { 8 } else { 4 };
        let slot = |kept: bool, name| kept.then_some(StateTensor { name, element_size });
        let momentum = slot(self.momentum.is_some_and(|x| x > 0.0), "momentum_buffer");
        let [first, second, third] = match self.algorithm {
            Algorithm::Sgd => [momentum, None, None],
            Algorithm::Adagrad => [slot(true, "sum"), None, None],
            Algorithm::RmsProp => [slot(true, "square_avg"), momentum, slot(self.centered, "grad_avg")],
            Algorithm::Adam | Algorithm::AdamW => {
                [slot(true, "exp_avg"), slot(true, "exp_avg_sq"), slot(self.amsgrad, "max_exp_avg_sq")]
            }
        };
        let kept = match (self.halves, parameter) {
            (Halves::Remainder, Dtype::BF16) => Some(StateTensor { name: "remainder", element_size: 2 }),
            (Halves::Master, Dtype::F16 | Dtype::BF16) => slot(true, "master"),
            _ => None,
        };
        [first, second, third, kept]
    }

    /// The name of the kind of state, which a description that replaces this one must share.
    pub(super) fn kind(&self) -> String {
        let mut kind = self.algorithm.to_string();
        let parts = [
            (self.momentum.is_some_and(|x| x > 0.0), "momentum"),
            (self.centered, "centered"),
            (self.amsgrad, "amsgrad"),
            (self.halves == Halves::Remainder, "halves with remainder"),
            (self.halves == Halves::Master, "halves with master"),
        ];
        for (_, part) in parts.into_iter().filter(|(is, _)| *is) {
            kind += ", ";
            kind += part;
        }
        kind
    }

    /// The names of all numbers.
    #[cfg(feature = "safetensors")]
    pub(super) const NUMBERS: [&'static str; 10] = [
        "lr",
        "momentum",
        "dampening",
        "lr_decay",
        "initial_accumulator_value",
        "alpha",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
    ];

    /// The names of all switches.
    #[cfg(feature = "safetensors")]
    pub(super) const SWITCHES: [&'static str; 4] = ["nesterov", "centered", "amsgrad", "maximize"];

    /// The number of this name, if it is set.
    #[cfg(feature = "safetensors")]
    pub(super) fn number_mut(&mut self, name: &str) -> Option<&mut f64> {
        match name {
            "lr" => Some(&mut self.lr),
            "momentum" => self.momentum.as_mut(),
            "dampening" => self.dampening.as_mut(),
            "lr_decay" => self.lr_decay.as_mut(),
            "initial_accumulator_value" => self.initial_accumulator_value.as_mut(),
            "alpha" => self.alpha.as_mut(),
            "beta1" => self.betas.as_mut().map(|[beta, _]| beta),
            "beta2" => self.betas.as_mut().map(|[_, beta]| beta),
            "eps" => self.eps.as_mut(),
            "weight_decay" => Some(&mut self.weight_decay),
            _ => None,
        }
    }

    /// The switch of this name.
    #[cfg(feature = "safetensors")]
    pub(super) fn switch_mut(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "nesterov" => Some(&mut self.nesterov),
            "centered" => Some(&mut self.centered),
            "amsgrad" => Some(&mut self.amsgrad),
            "maximize" => Some(&mut self.maximize),
            _ => None,
        }
    }
}

impl fmt::Display for Algorithm {
    /// `SGD`, `Adagrad`, `RMSprop`, `Adam`, `AdamW`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sgd => "SGD",
            Self::Adagrad => "Adagrad",
            Self::RmsProp => "RMSprop",
            Self::Adam => "Adam",
            Self::AdamW => "AdamW",
        })
    }
}

impl fmt::Display for Halves {
    /// `rounded`, `remainder`, `master`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rounded => "rounded",
            Self::Remainder => "remainder",
            Self::Master => "master",
        })
    }
}

/// One line, with the learning rate and without the other settings that have their defaults:
/// `AdamW, lr 0.001, betas 0.9 0.95, weight_decay 0.1`.
impl fmt::Display for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = Self::new(self.algorithm);
        write!(f, "{}, lr {}", self.algorithm, Number(self.lr))?;
        for (name, x, default) in [
            ("momentum", self.momentum, default.momentum),
            ("dampening", self.dampening, default.dampening),
            ("lr_decay", self.lr_decay, default.lr_decay),
            ("initial_accumulator_value", self.initial_accumulator_value, default.initial_accumulator_value),
            ("alpha", self.alpha, default.alpha),
        ] {
            if let Some(x) = x.filter(|_| x != default) {
                write!(f, ", {name} {}", Number(x))?;
            }
        }
        if let Some([beta1, beta2]) = self.betas.filter(|_| self.betas != default.betas) {
            write!(f, ", betas {} {}", Number(beta1), Number(beta2))?;
        }
        for (name, x, default) in
            [("eps", self.eps, default.eps), ("weight_decay", Some(self.weight_decay), Some(default.weight_decay))]
        {
            if let Some(x) = x.filter(|_| x != default) {
                write!(f, ", {name} {}", Number(x))?;
            }
        }
        let switches = [
            (self.nesterov, "nesterov"),
            (self.centered, "centered"),
            (self.amsgrad, "amsgrad"),
            (self.maximize, "maximize"),
        ];
        for (_, name) in switches.into_iter().filter(|(on, _)| *on) {
            write!(f, ", {name}")?;
        }
        if self.halves == Halves::Rounded { Ok(()) } else { write!(f, ", halves: {}", self.halves) }
    }
}

//! Each optimizer in plain float64 loops, which carry beside each number a bound on what rounding may have done to it.

use super::numbers::ulp;
use gradclip::{Algorithm, Dtype, Optimizer, OptimizerState};

/// A number and how far off the library may be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Near {
    pub(crate) x: f64,
    pub(crate) error: f64,
}

/// What one operation of a type loses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounding {
    unit: f64,
    /// Of a division and of a square root.
    division: f64,
    root: f64,
    /// Of what is computed once for a step, and then rounded.
    correction: f64,
    least: f64,
    /// The smallest number that has a root.
    root_from: f64,
    max: f64,
}

impl Rounding {
    /// Of the type that is computed in. The loops round too, so float64 counts twice.
    pub(crate) fn of(dtype: Dtype) -> Self {
        let (unit, least, max) = match dtype {
            Dtype::F64 => (2f64.powi(-52), f64::from_bits(1), f64::MAX),
            _ => (2f64.powi(-24), 2f64.powi(-150), f64::from(f32::MAX)),
        };
        Self { unit, division: unit, root: unit, correction: 0.0, least, root_from: 0.0, max }
    }

    /// What WGSL promises of float32: sums and products off by less than a unit, quotients by 2.5 and roots, which may be
    /// 1 / inverseSqrt, by 4.5 (and 1e-6 of that). What is below the normal range may become 0. Numbers of a step: the
    /// library's own arithmetic, off by some 2^-31.
    pub(crate) fn of_wgsl() -> Self {
        let (unit, least) = (2f64.powi(-23), 2f64.powi(-126));
        Self {
            division: 2.5 * unit,
            root: 4.5001 * unit,
            correction: 2f64.powi(-28),
            unit,
            least,
            root_from: least,
            max: f64::from(f32::MAX),
        }
    }

    /// A number as it is given.
    pub(crate) fn given(self, x: f64) -> Near {
        Near { x, error: if self.root_from > 0.0 { self.least } else { 0.0 } }
    }

    fn rounded(self, x: f64, inherited: f64) -> Near {
        self.rounded_by(self.unit, x, inherited)
    }

    fn rounded_by(self, unit: f64, x: f64, inherited: f64) -> Near {
        let error = inherited + unit * (x.abs() + inherited) + self.least;
        let inside = x.abs() + error <= self.max;
        Near { x, error: if inside { error } else { f64::INFINITY } }
    }

    /// A number that is rounded once.
    pub(crate) fn once(self, x: f64) -> Near {
        self.rounded(x, 0.0)
    }

    fn add(self, a: Near, b: Near) -> Near {
        self.rounded(a.x + b.x, a.error + b.error)
    }

    fn sub(self, a: Near, b: Near) -> Near {
        self.rounded(a.x - b.x, a.error + b.error)
    }

    pub(crate) fn mul(self, a: Near, b: Near) -> Near {
        self.rounded(a.x * b.x, a.x.abs() * b.error + b.x.abs() * a.error + a.error * b.error)
    }

    fn div(self, a: Near, b: Near) -> Near {
        let least = b.x.abs() - b.error;
        let inherited = (a.error + (a.x / b.x).abs() * b.error) / least;
        // WGSL promises nothing beyond 2^126.
        let inside = least > self.root_from && (self.root_from == 0.0 || b.x.abs() + b.error < 1.0 / self.root_from);
        if inside {
            self.rounded_by(self.division, a.x / b.x, inherited)
        } else {
            Near { x: a.x / b.x, error: f64::INFINITY }
        }
    }

    fn sqrt(self, a: Near) -> Near {
        let (root, low, high) = (a.x.sqrt(), a.x - a.error, (a.x + a.error).sqrt());
        let low = if low < self.root_from { 0.0 } else { low.max(0.0).sqrt() };
        // Where the lower end is cut off at 0, the upper end may be farther away.
        self.rounded_by(self.root, root, (root - low).max(high - root))
    }

    fn squared(self, a: Near) -> Near {
        let Near { x, error } = self.mul(a, a);
        Near { x: x.min(self.max), error: if a.error.is_finite() { error.min(self.max) } else { error } }
    }

    fn average(self, of: f64, old: Near, new: Near) -> Near {
        let (from, to) = if of < 0.5 { (new, old) } else { (old, new) };
        self.add(from, self.mul(self.once(of.min(1.0 - of)), self.sub(to, from)))
    }
}

/// A parameter and what is kept of it, in the order of the library's names.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Element {
    pub(crate) w: Near,
    pub(crate) state: [Near; 3],
}

impl Element {
    /// Before the first step.
    pub(crate) fn new(optimizer: &Optimizer, w: f64, rounding: Rounding) -> Self {
        let first = rounding.once(optimizer.initial_accumulator_value.unwrap_or(0.0));
        let first = if first.x == 0.0 { Near::default() } else { first };
        Self { w: rounding.given(w), state: [first, Near::default(), Near::default()] }
    }

    /// Takes step number `t` by the clipped gradient `u`, and returns by how much w moves, its decay left out.
    pub(crate) fn step(&mut self, optimizer: &Optimizer, t: u64, u: Near, r: Rounding) -> f64 {
        let t = t as i32;
        let Self { w, state: [a, b, c] } = self;
        let number = |x: f64| if x == 0.0 || x == 1.0 { Near { x, error: 0.0 } } else { r.once(x) };
        let lr = optimizer.lr;
        let mut u = Near { x: if optimizer.maximize { -u.x } else { u.x }, ..u };
        let decay = optimizer.weight_decay;
        if optimizer.algorithm != Algorithm::AdamW && decay != 0.0 {
            u = r.add(u, r.mul(number(decay), *w));
        }
        let (eps, momentum) = (number(optimizer.eps.unwrap_or(0.0)), number(optimizer.momentum.unwrap_or(0.0)));
        let moved = match optimizer.algorithm {
            Algorithm::Sgd => {
                let mut step = u;
                if momentum.x != 0.0 {
                    let undampened = number(1.0 - optimizer.dampening.unwrap_or(0.0));
                    *a = if t == 1 { u } else { r.add(r.mul(momentum, *a), r.mul(undampened, u)) };
                    step = if optimizer.nesterov { r.add(u, r.mul(momentum, *a)) } else { *a };
                }
                r.mul(number(lr), step)
            }
            Algorithm::Adagrad => {
                *a = r.add(*a, r.squared(u));
                let lr = lr / (1.0 + f64::from(t - 1) * optimizer.lr_decay.unwrap_or(0.0));
                let lr = Near { error: number(lr).error + r.correction * lr, x: lr };
                r.mul(lr, r.div(u, r.add(r.sqrt(*a), eps)))
            }
            Algorithm::RmsProp => {
                let alpha = optimizer.alpha.unwrap_or(0.0);
                *a = r.average(alpha, *a, r.squared(u));
                let mut variance = *a;
                if optimizer.centered {
                    *c = r.average(alpha, *c, u);
                    variance = r.sub(*a, r.mul(*c, *c));
                    variance.x = variance.x.max(0.0);
                }
                let mut step = r.div(u, r.add(r.sqrt(variance), eps));
                if momentum.x != 0.0 {
                    *b = r.add(r.mul(momentum, *b), step);
                    step = *b;
                }
                r.mul(number(lr), step)
            }
            Algorithm::Adam | Algorithm::AdamW => {
                let [beta1, beta2] = optimizer.betas.expect("Adam has betas");
                *a = r.average(beta1, *a, u);
                *b = r.average(beta2, *b, r.squared(u));
                let mut square = *b;
                if optimizer.amsgrad {
                    *c = Near { x: b.x.max(c.x), error: b.error.max(c.error) };
                    square = *c;
                }
                // Of two ways to compute a power each is off by a unit or so, and 1 minus it by as much.
                let correction = |beta: f64| {
                    let power = beta.powi(t);
                    (1.0 - power, 2f64.powi(-51) * power / (1.0 - power) + r.correction)
                };
                let ((first, off_first), (second, off_second)) = (correction(beta1), correction(beta2));
                let off = |x: f64, by: f64| Near { error: r.once(x).error + x * by, x };
                let divisor = r.add(r.mul(off(1.0 / second.sqrt(), off_second), r.sqrt(square)), eps);
                r.mul(off(lr / first, off_first), r.div(*a, divisor))
            }
            other => panic!("{other:?}"),
        };
        let decayed =
            if optimizer.algorithm == Algorithm::AdamW { r.add(r.mul(number(lr * decay), *w), moved) } else { moved };
        *w = r.sub(*w, decayed);
        moved.x
    }

    /// Rounds w to half precision.
    pub(crate) fn round(&mut self, dtype: Dtype) {
        let Near { x, error } = self.w;
        self.w.error += 0.5 * ulp(dtype, x.abs() + error);
        if x.abs() + self.w.error > if dtype == Dtype::F16 { 65504.0 } else { 3.3e38 } {
            self.w.error = f64::INFINITY;
        }
    }
}

/// All that a state of so many parameters holds: settings, the number of steps, and its tensors.
pub(crate) fn contents(state: &OptimizerState<'_>, parameters: usize) -> (Vec<Optimizer>, u64, Vec<Option<Vec<u8>>>) {
    let mut tensors = Vec::new();
    for i in 0..parameters {
        for name in [
            "momentum_buffer",
            "square_avg",
            "grad_avg",
            "sum",
            "exp_avg",
            "exp_avg_sq",
            "max_exp_avg_sq",
            "remainder",
            "master",
        ] {
            tensors.push(state.bytes(i, name).map(<[u8]>::to_vec));
        }
    }
    (state.optimizers().to_vec(), state.steps(), tensors)
}

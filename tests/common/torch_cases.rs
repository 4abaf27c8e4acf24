//! What torch.optim answers in float64 to 19 settings over 30 steps, with spikes, zeros and skipped steps.
//!
//! `GRADCLIP_OPTIMIZER_CASES` names another folder of cases.

use std::path::PathBuf;

use super::optimizers::{Element, Near, Rounding};
use gradclip::{Clip, ClipReport, Dtype, NonFinite, Optimizer, OptimizerState, Tensor, TensorMut};
use safetensors::SafeTensors;
use serde_json::Value;

pub(crate) fn read(path: &str) -> Vec<u8> {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/optimizers");
    let folder = std::env::var_os("GRADCLIP_OPTIMIZER_CASES").map_or_else(own, PathBuf::from);
    let path = folder.join(path);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A named tensor of float32 or float64, widened.
fn numbers(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    match view.dtype() {
        safetensors::Dtype::F32 => {
            view.data().chunks(4).map(|x| f64::from(bytemuck::pod_read_unaligned::<f32>(x))).collect()
        }
        safetensors::Dtype::F64 => view.data().chunks(8).map(bytemuck::pod_read_unaligned).collect(),
        other => panic!("{name} is {other:?}"),
    }
}

/// The optimizer of a case, by torch's names of its arguments.
fn optimizer(case: &Value) -> Optimizer {
    let args = case["args"].as_object().expect("arguments");
    let number = |name: &str| args.get(name).map(|x| x.as_f64().expect("a number"));
    let lr = number("lr").expect("every case sets lr");
    let mut optimizer = match case["optimizer"].as_str() {
        Some("SGD") => Optimizer::sgd(lr),
        Some("Adagrad") => Optimizer::adagrad(lr),
        Some("RMSprop") => Optimizer::rmsprop(lr),
        Some("Adam") => Optimizer::adam(lr),
        Some("AdamW") => Optimizer::adamw(lr),
        other => panic!("{other:?}"),
    };
    for (name, value) in args {
        let x = value.as_f64().unwrap_or(f64::NAN);
        let on = value.as_bool().unwrap_or(false);
        optimizer = match name.as_str() {
            "lr" => optimizer,
            "momentum" => optimizer.momentum(x),
            "dampening" => optimizer.dampening(x),
            "nesterov" => optimizer.nesterov(on),
            "weight_decay" => optimizer.weight_decay(x),
            "maximize" => optimizer.maximize(on),
            "lr_decay" => optimizer.lr_decay(x),
            "initial_accumulator_value" => optimizer.initial_accumulator_value(x),
            "eps" => optimizer.eps(x),
            "alpha" => optimizer.alpha(x),
            "centered" => optimizer.centered(on),
            "amsgrad" => optimizer.amsgrad(on),
            "betas" => optimizer.betas(value[0].as_f64().expect("a beta"), value[1].as_f64().expect("a beta")),
            other => panic!("an argument {other}"),
        };
    }
    optimizer
}

/// A parameter of a case, in both types.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// The place of its group.
    pub(crate) group: usize,
    pub(crate) single: Vec<f32>,
    double: Vec<f64>,
    near: Vec<Element>,
    /// How far each element has moved in all, and how large it was at most.
    moved: Vec<f64>,
    largest: Vec<f64>,
}

impl Parameter {
    pub(crate) fn view(&self, dtype: Dtype) -> Tensor<'_> {
        let view = if dtype == Dtype::F64 { Tensor::new(&self.double) } else { Tensor::new(&self.single) };
        view.named(&self.name).shape(&self.shape).expect("it fits")
    }

    pub(crate) fn view_mut(&mut self, dtype: Dtype) -> TensorMut<'_> {
        let view =
            if dtype == Dtype::F64 { TensorMut::new(&mut self.double) } else { TensorMut::new(&mut self.single) };
        view.named(&self.name).shape(&self.shape).expect("it fits")
    }
}

/// Takes the steps of a case.
pub(crate) trait Steps {
    /// A step by these gradients.
    fn step(&mut self, settings: &[Optimizer; 2], parameters: &mut [Parameter], gradients: &[Vec<f32>]) -> ClipReport;

    /// The state after the last step. Brings the parameters up to date.
    fn state(&mut self, parameters: &mut [Parameter]) -> &OptimizerState<'static>;
}

/// What the arithmetic of a case promises.
#[derive(Clone, Copy)]
pub(crate) struct Promise {
    pub(crate) dtype: Dtype,
    pub(crate) rounding: Rounding,
    /// The relative error of a norm.
    pub(crate) norm: f64,
}

/// What 28 steps may lose by rounding, at half a unit in the last place each, mostly to either side.
pub(crate) const ULPS: f64 = 4.0;

/// Runs a case. Returns the largest error of a parameter in float32 ulp of the largest value that it had, and what the
/// largest error above [`ULPS`] is of the whole way of the parameter.
pub(crate) fn run<S: Steps>(
    case: &Value,
    file: &SafeTensors<'_>,
    promise: Promise,
    begin: impl FnOnce(&[Parameter], &Clip, &[Optimizer; 2]) -> S,
) -> [f64; 2] {
    let id = case["id"].as_str().expect("an id");
    let Promise { dtype, rounding, norm: off_norm } = promise;
    let optimizer = optimizer(case);
    let mut names: Vec<_> = file.names().into_iter().filter_map(|name| name.strip_prefix("start.")).collect();
    names.sort_unstable();
    let mut parameters: Vec<_> = names
        .into_iter()
        .map(|name| {
            let view = file.tensor(&format!("start.{name}")).expect("it is there");
            let double = numbers(file, &format!("start.{name}"));
            let group = usize::from(case["no_decay_1d"] == true && view.shape().len() < 2);
            Parameter {
                name: name.to_owned(),
                shape: view.shape().to_vec(),
                group,
                single: double.iter().map(|x| *x as f32).collect(),
                near: double.iter().map(|x| Element::new(&optimizer, *x, rounding)).collect(),
                moved: vec![0.0; double.len()],
                largest: double.iter().map(|x| x.abs()).collect(),
                double,
            }
        })
        .collect();
    parameters.sort_by_key(|parameter| parameter.group);
    let settings = [optimizer, optimizer.weight_decay(0.0)];
    let max_norm = case["max_norm"].as_f64().unwrap_or(f64::INFINITY);
    let clip = Clip::norm(max_norm).non_finite(NonFinite::Skip);
    let mut steps = begin(&parameters, &clip, &settings);
    let mut taken = 0;
    let expected = read(&format!("expected/{id}.safetensors"));
    let expected = SafeTensors::deserialize(&expected).expect("a safetensors file");
    let mut worst = [0.0f64; 2];
    for step in 0..30 {
        let times = case["lr_times"][step].as_f64().unwrap_or(1.0);
        let own = settings.map(|start| start.lr(start.lr * times));
        let gradients: Vec<_> = parameters.iter().map(|p| numbers(file, &format!("{step}/{}", p.name))).collect();
        let single: Vec<Vec<f32>> = gradients.iter().map(|g| g.iter().map(|x| *x as f32).collect()).collect();
        let skipped = case["skipped"].as_array().is_some_and(|steps| steps.contains(&Value::from(step)));
        let report = steps.step(&own, &mut parameters, &single);
        assert_eq!(report.skipped.is_some(), skipped, "{id}, step {step}");
        if !skipped {
            taken += 1;
            let norm = case["norms"][step].as_f64().expect("a norm");
            assert!((report.total_norm / norm - 1.0).abs() <= off_norm, "{id}, step {step}: {}", report.total_norm);
            let coefficient = (max_norm / (norm + 1e-6)).min(1.0);
            let mut factor = if coefficient == 1.0 { Near { x: 1.0, error: 0.0 } } else { rounding.once(coefficient) };
            factor.error += if coefficient == 1.0 { 0.0 } else { off_norm * coefficient };
            for (p, gradients) in parameters.iter_mut().zip(&gradients) {
                for (k, (near, g)) in p.near.iter_mut().zip(gradients).enumerate() {
                    let u = rounding.mul(rounding.given(*g), factor);
                    p.moved[k] += near.step(&own[p.group], taken, u, rounding).abs();
                    p.largest[k] = p.largest[k].max(near.w.x.abs());
                }
            }
        }
        if ![1, 2, 30].contains(&(step + 1)) {
            continue;
        }
        let state = steps.state(&mut parameters);
        assert_eq!(state.steps(), taken, "{id}, step {step}");
        for (i, p) in parameters.iter().enumerate() {
            let own = p.view(dtype);
            let mut compared = vec![("param", own.bytes().to_vec())];
            for kept in settings[0].state_tensors(dtype) {
                compared.push((kept.name, state.bytes(i, kept.name).expect("it is kept").to_vec()));
            }
            for (kind, bytes) in compared {
                let expected = numbers(&expected, &format!("{}/{kind}/{}", step + 1, p.name));
                let got: Vec<f64> = if dtype == Dtype::F64 {
                    bytes.chunks(8).map(bytemuck::pod_read_unaligned).collect()
                } else {
                    bytes.chunks(4).map(|x| f64::from(bytemuck::pod_read_unaligned::<f32>(x))).collect()
                };
                assert_eq!(got.len(), expected.len(), "{id} {kind}");
                for (k, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let place = format!("{id}, {dtype}, {kind} of {}[{k}] after {} steps", p.name, step + 1);
                    let off = (got - expected).abs();
                    if dtype == Dtype::F64 {
                        assert!(off <= 1e-12 * expected.abs().max(p.moved[k]), "{place}: {got:e}, torch {expected:e}");
                        continue;
                    }
                    let near = match kind {
                        "param" => p.near[k].w,
                        "momentum_buffer" if id.starts_with("rmsprop") => p.near[k].state[1],
                        "exp_avg_sq" => p.near[k].state[1],
                        "max_exp_avg_sq" | "grad_avg" => p.near[k].state[2],
                        _ => p.near[k].state[0],
                    };
                    assert!(
                        (near.x - expected).abs() <= 1e-12 * expected.abs().max(p.moved[k]),
                        "{place}: the loop {:e}",
                        near.x
                    );
                    assert!(off <= near.error, "{place}: {got:e}, torch {expected:e}, bound {:e}", near.error);
                    if kind == "param" {
                        let ulp = 2f64.powi(-23) * p.largest[k];
                        worst[0] = worst[0].max(off / ulp.max(f64::MIN_POSITIVE));
                        worst[1] = worst[1].max((off - ULPS * ulp).max(0.0) / p.moved[k].max(f64::MIN_POSITIVE));
                    }
                }
            }
        }
    }
    assert_eq!(taken, 28, "{id}");
    worst
}

/// Runs every case. Returns what part of the whole way of a parameter an error beyond [`ULPS`] was at most.
pub(crate) fn run_all<S: Steps>(
    promise: Promise,
    mut begin: impl FnMut(&[Parameter], &Clip, &[Optimizer; 2]) -> S,
) -> f64 {
    let (cases, gradients) = (read("cases.json"), read("gradients.safetensors"));
    let cases: Value = serde_json::from_slice(&cases).expect("JSON");
    let cases = cases["cases"].as_array().expect("cases");
    assert!(cases.len() >= 19, "{} cases", cases.len());
    let file = SafeTensors::deserialize(&gradients).expect("a safetensors file");
    let mut worst = 0.0f64;
    for case in cases {
        let [ulps, moved] = run(case, &file, promise, &mut begin);
        println!("{}: {} {ulps:.1} ulp off, {ULPS} ulp and {moved:.1e} of the way", case["id"], promise.dtype);
        worst = worst.max(moved);
    }
    worst
}

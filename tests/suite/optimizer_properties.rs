//! Guards against what nobody expects: random optimizers, clips, sets and dtypes. Each step must match the plain loops of
//! `common/optimizers.rs` within what rounding may do, and the same step in pieces must give the same bits.
//!
//! `PROPTEST_CASES` and `PROPTEST_RNG_SEED` are as in `properties.rs`. A case is a seed.

use crate::common::numbers::{Random, rounded, ulp};
use crate::common::optimizers::{Element, Near, Rounding};
use crate::common::{Data, POLICIES, assert_same_bits};
use gradclip::{
    Algorithm, Clip, Clipper, DecidedClip, DecidedStep, Dtype, Error, Halves, NormType, Optimizer, OptimizerState,
    Scope, Tensor, TensorMut, UnitAxis,
};
use proptest::test_runner::{Config, RngSeed};

const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];

pub(crate) fn optimizer(random: &mut Random) -> Optimizer {
    let lr = 10f64.powf(-4.0 + 4.0 * random.uniform());
    let coin = |random: &mut Random| random.below(2) == 0;
    let beta = |random: &mut Random| [0.0, 0.3, 0.5, 0.9, 0.99, 0.999][random.below(6)];
    let momentum = if coin(random) { 0.0 } else { random.uniform() };
    let mut drawn = match random.below(5) {
        0 if momentum > 0.0 && coin(random) => Optimizer::sgd(lr).momentum(momentum).nesterov(true),
        0 => Optimizer::sgd(lr).momentum(momentum).dampening(random.uniform()),
        1 => Optimizer::adagrad(lr).lr_decay(random.uniform()).initial_accumulator_value(random.uniform()),
        2 => Optimizer::rmsprop(lr).alpha(beta(random)).momentum(momentum).centered(coin(random)),
        3 => Optimizer::adam(lr).betas(beta(random), beta(random)).amsgrad(coin(random)),
        _ => Optimizer::adamw(lr).betas(beta(random), beta(random)).amsgrad(coin(random)),
    };
    if drawn.eps.is_some() && coin(random) {
        drawn = drawn.eps(1e-3);
    }
    drawn = drawn.weight_decay(if coin(random) { 0.0 } else { 0.1 * random.uniform() });
    drawn.maximize(coin(random)).halves([Halves::Rounded, Halves::Remainder, Halves::Master][random.below(3)])
}

pub(crate) fn clip(random: &mut Random) -> Clip {
    let size = 10f64.powf(-2.0 + 3.0 * random.uniform());
    let scope = [Scope::Global, Scope::Tensor, Scope::Unit][random.below(3)];
    let mut drawn = match random.below(6) {
        0 => Clip::value(size),
        1 => Clip::rms(size).scope(scope),
        2 => Clip::agc(size),
        3 => Clip::norm(f64::INFINITY),
        _ => Clip::norm(size).scope(scope).norm_type(NormType::p([1.0, 2.0, 3.0, f64::INFINITY][random.below(4)])),
    };
    if drawn.scope == Scope::Unit && random.below(2) == 0 {
        drawn = drawn.unit_axis(UnitAxis::Last);
    }
    drawn
}

/// The shape of a parameter.
pub(crate) fn shape(random: &mut Random) -> Vec<usize> {
    match random.below(6) {
        0 => vec![],
        1 => vec![0],
        2 => vec![1 + random.below(2000)],
        3 => vec![1 + random.below(5), 1 + random.below(300)],
        _ => vec![1 + random.below(40), 1 + random.below(40)],
    }
}

/// In one of five sets, makes an element non-finite.
pub(crate) fn spoil(random: &mut Random, gradients: &mut [Data]) {
    if let (0, Some(bad)) = (random.below(5), gradients.iter_mut().find(|g| g.len() > 0)) {
        bad.set(random.below(bad.len()), [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][random.below(3)]);
    }
}

/// What all clips of a step share.
pub(crate) fn share(clip: Clip, policy: usize, scale: usize, skips: bool) -> Clip {
    let clip = clip.non_finite(POLICIES[policy]).grad_scale([1.0, 1024.0, 3.0][scale]);
    let measures = !matches!(clip.mode, gradclip::Mode::Value { .. });
    if skips && measures { clip.skip_above(10.0) } else { clip }
}

struct Parameter {
    own: Data,
    near: Vec<Element>,
    group: usize,
}

impl Parameter {
    fn drawn(random: &mut Random, group: usize, optimizer: &Optimizer) -> Self {
        let shape = shape(random);
        let mut dtype = DTYPES[random.below(4)];
        if (optimizer.halves, dtype) == (Halves::Remainder, Dtype::F16) {
            dtype = Dtype::BF16;
        }
        let size = 10f64.powi(random.below(4) as i32 - 2);
        let own = Data::rounded(dtype, random.normals(shape.iter().product(), size)).shaped(&shape);
        let near = own.numbers().map(|w| Element::new(optimizer, w, Rounding::of(dtype))).collect();
        Self { own, near, group }
    }
}

/// A random case, and how far it has come.
struct Case {
    parameters: Vec<Parameter>,
    optimizers: Vec<Optimizer>,
    clips: Vec<Clip>,
    /// Takes whole steps.
    state: OptimizerState<'static>,
    /// Takes steps in pieces, on copies of the parameters.
    cut: OptimizerState<'static>,
    copies: Vec<Data>,
}

impl Case {
    fn drawn(random: &mut Random) -> Self {
        let groups = 1 + random.below(2);
        let optimizers: Vec<_> = (0..groups).map(|_| optimizer(random)).collect();
        let mut parameters = Vec::new();
        for (group, optimizer) in optimizers.iter().enumerate() {
            parameters.extend((0..random.below(4)).map(|_| Parameter::drawn(random, group, optimizer)));
        }
        let (policy, scale, skips) = (random.below(5), random.below(3), random.below(3) == 0);
        let clips = if random.below(2) == 0 { 1 } else { groups };
        let clips = (0..clips).map(|_| share(clip(random), policy, scale, skips)).collect();
        let states = || {
            let of = |group: usize| parameters.iter().filter(move |p| p.group == group).map(|p| p.own.view());
            let views: Vec<Vec<_>> = (0..groups).map(|group| of(group).collect()).collect();
            let all: Vec<_> =
                optimizers.iter().zip(&views).map(|(optimizer, views)| (*optimizer, &views[..])).collect();
            OptimizerState::new(&all).expect("valid settings")
        };
        let (state, cut) = (states(), states());
        let copies = parameters.iter().map(|p| p.own.clone()).collect();
        Self { parameters, optimizers, clips, state, cut, copies }
    }

    fn gradients(&self, random: &mut Random) -> Vec<Data> {
        let size = 10f64.powi(random.below(5) as i32 - 3);
        let of = |p: &Parameter| {
            let numbers = random.normals(p.own.len(), size);
            Data::rounded(DTYPES[random.below(4)], numbers).shaped(&p.own.dims())
        };
        let mut gradients: Vec<_> = self.parameters.iter().map(of).collect();
        spoil(random, &mut gradients);
        gradients
    }

    fn groups(&self) -> Vec<usize> {
        self.parameters.iter().map(|p| p.group).collect()
    }

    fn decided(&self, gradients: &[Data]) -> Result<Vec<DecidedClip>, Error> {
        decided(&self.clips, &self.groups(), gradients, self.parameters.iter().map(|p| &p.own))
    }

    /// Takes the step on the copies, in two pieces of each.
    fn step_in_pieces(&mut self, decided: Vec<DecidedClip>, gradients: &[Data], random: &mut Random) -> DecidedStep {
        let step = self.cut.decided(decided).expect("it fits");
        for (i, data) in self.copies.iter_mut().enumerate() {
            let (dtype, gradient) = (data.dtype, &gradients[i]);
            let kept = self.optimizers[self.parameters[i].group].state_tensors(dtype);
            let mut tensors = self.cut.tensors_mut(i);
            let middle = random.below(data.len() + 1);
            for range in [middle..data.len(), 0..middle] {
                let bytes = |size: usize| range.start * size..range.end * size;
                let elements = &gradient.bytes[bytes(gradient.dtype.size())];
                let gradient = Tensor::from_bytes(gradient.dtype, elements).expect("whole elements");
                let own = &mut data.bytes[bytes(dtype.size())];
                let mut own = TensorMut::from_bytes(dtype, own).expect("whole elements");
                let state = tensors.iter_mut().zip(&kept).map(|(tensor, kept)| &mut tensor[bytes(kept.element_size)]);
                step.apply(i, range.start as u64, &mut own, &gradient, state).expect("it fits");
            }
        }
        step
    }

    /// Checks a step that was taken, and returns the largest part of its bound that an error took.
    fn check(&mut self, decided: &[DecidedClip], gradients: &[Data]) -> f64 {
        let (mut worst, groups) = (0.0f64, self.groups());
        for (i, gradient) in gradients.iter().enumerate() {
            let (clip, tensor) = place(&self.clips, &groups, i);
            let p = &mut self.parameters[i];
            let (dtype, optimizer, r) = (p.own.dtype, &self.optimizers[p.group], Rounding::of(p.own.dtype));
            let u = clipped(&decided[clip], tensor, gradient, dtype);
            let us = u.into_iter().map(|u| Near { x: u, error: if u.is_finite() { 0.0 } else { f64::INFINITY } });
            worst = worst.max(check_elements(optimizer, (&self.state, i), &p.own, &mut p.near, us, r));
        }
        worst
    }
}

/// The clip of parameter number `i`, and its place among that clip's tensors. `groups` has the group of each parameter.
pub(crate) fn place(clips: &[Clip], groups: &[usize], i: usize) -> (usize, usize) {
    if clips.len() == 1 {
        return (0, i);
    }
    (groups[i], i - groups.iter().filter(|group| **group < groups[i]).count())
}

/// Decides the clips, one for all or one for each group.
pub(crate) fn decided<'d>(
    clips: &[Clip],
    groups: &[usize],
    gradients: &[Data],
    parameters: impl Iterator<Item = &'d Data>,
) -> Result<Vec<DecidedClip>, Error> {
    let views: Vec<_> = gradients.iter().zip(parameters).map(|(g, p)| (g.view(), p.view())).collect();
    let mut all = vec![Vec::new(); clips.len()];
    for (i, (gradient, parameter)) in views.iter().enumerate() {
        all[place(clips, groups, i).0].push(gradient.parameter(parameter));
    }
    let all: Vec<_> = clips.iter().zip(&all).map(|(clip, tensors)| (*clip, &tensors[..])).collect();
    Clipper::cpu().decide_groups(&all)
}

/// Checks parameter number `i` of a step that was taken by these clipped gradients, and what is kept of it. Moves `near` on,
/// and returns the largest part of its bound that an error took.
pub(crate) fn check_elements(
    optimizer: &Optimizer,
    (state, i): (&OptimizerState<'_>, usize),
    parameter: &Data,
    near: &mut [Element],
    gradients: impl Iterator<Item = Near>,
    r: Rounding,
) -> f64 {
    let (mut worst, dtype) = (0.0f64, parameter.dtype);
    let half = matches!(dtype, Dtype::F16 | Dtype::BF16);
    let halves = if half { optimizer.halves } else { Halves::Rounded };
    let wide = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    let kept = |name: &str| Data::from_bytes(wide, state.bytes(i, name).expect("it is kept").to_vec());
    let states: Vec<_> = optimizer
        .state_tensors(dtype)
        .iter()
        .filter_map(|tensor| Some((slot(optimizer.algorithm, tensor.name)?, kept(tensor.name))))
        .collect();
    let exact = match halves {
        Halves::Master => kept("master"),
        Halves::Remainder => joined(parameter, state.bytes(i, "remainder").expect("it is kept")),
        _ => parameter.clone(),
    };
    for (k, (near, u)) in near.iter_mut().zip(gradients).enumerate() {
        near.step(optimizer, state.steps(), u, r);
        if halves == Halves::Rounded && half {
            near.round(dtype);
        } else if half {
            let (x, own) = (exact.get(k), parameter.get(k));
            let off = (x - own).abs();
            assert!(off <= 0.5 * ulp(dtype, x) || own.is_infinite() || x.is_nan(), "{own:e} is not near {x:e}");
        }
        let found = std::iter::once((near.w, &exact)).chain(states.iter().map(|(at, data)| (near.state[*at], data)));
        for (near, data) in found {
            let got = data.get(k);
            let off = (got - near.x).abs();
            if near.error.is_finite() {
                assert!(off <= near.error, "{optimizer}: element {k} of {i}, {dtype}: {got:e}, not {near:?}");
                worst = worst.max(off / near.error);
            }
        }
    }
    worst
}

/// The place of a tensor of the state in [`Element::state`].
fn slot(algorithm: Algorithm, name: &str) -> Option<usize> {
    match name {
        "remainder" | "master" => None,
        "max_exp_avg_sq" | "grad_avg" => Some(2),
        "exp_avg_sq" => Some(1),
        "momentum_buffer" => Some(usize::from(algorithm == Algorithm::RmsProp)),
        _ => Some(0),
    }
}

/// The float32 of bfloat16 and remainders.
pub(crate) fn joined(halves: &Data, remainders: &[u8]) -> Data {
    let bits = |(i, low): (usize, &[u8])| {
        let low = u16::from_ne_bytes([low[0], low[1]]);
        let upper = (halves.bits(i) as u32).wrapping_sub(u32::from(low >> 15));
        f32::from_bits(upper << 16 | u32::from(low))
    };
    Data::of(&remainders.chunks(2).enumerate().map(bits).collect::<Vec<_>>())
}

/// The clipped gradients in the type that a step computes in, as the decided clip itself gives them.
pub(crate) fn clipped(decided: &DecidedClip, tensor: usize, gradient: &Data, parameter: Dtype) -> Vec<f64> {
    let double = gradient.dtype == Dtype::F64 || parameter == Dtype::F64;
    let mut wide = Data::rounded(if double { Dtype::F64 } else { Dtype::F32 }, gradient.numbers());
    let mut piece = TensorMut::from_bytes(wide.dtype, &mut wide.bytes).expect("whole elements");
    decided.apply(tensor, 0, &mut piece).expect("it fits");
    let computed = if parameter == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    wide.numbers().map(|x| rounded(computed, x)).collect()
}

/// Runs a case, and returns the largest part of its bound that an error took.
fn check(seed: u64) -> f64 {
    let random = &mut Random(seed);
    let (mut case, mut worst) = (Case::drawn(random), 0.0f64);
    for _ in 0..4 {
        let gradients = case.gradients(random);
        let (decided, again) = (case.decided(&gradients), case.decided(&gradients));
        let own = |case: &Case| case.parameters.iter().map(|p| p.own.clone()).collect::<Vec<_>>();
        let (before, steps) = (own(&case), case.state.steps());
        let reports = {
            let views: Vec<_> = gradients.iter().map(Data::view).collect();
            let mut own: Vec<_> = case.parameters.iter_mut().map(|p| p.own.view_mut()).collect();
            Clipper::cpu().step_groups(&case.clips, &mut case.state, &mut own, &views)
        };
        let after = own(&case);
        let (decided, again, reports) = match (decided, again, reports) {
            (Ok(decided), Ok(again), Ok(reports)) => (decided, again, reports),
            (Err(Error::NonFinite(expected)), _, Err(Error::NonFinite(found))) => {
                assert_eq!(expected, found);
                assert_same_bits(&after, &before, "a refused step");
                continue;
            }
            (expected, _, found) => panic!("decided {expected:?}, stepped {found:?}"),
        };
        let step = case.step_in_pieces(again, &gradients, random);
        assert_same_bits(&case.copies, &after, "in pieces");
        assert_eq!(format!("{reports:?}"), format!("{:?}", step.reports()));
        let counted = steps + u64::from(!step.is_skipped());
        assert_eq!((case.state.steps(), case.cut.steps()), (counted, counted));
        assert_eq!(reports[0].skipped.is_some(), step.is_skipped());
        if step.is_skipped() {
            assert_same_bits(&after, &before, "a skipped step");
        } else {
            worst = worst.max(case.check(&decided, &gradients));
        }
    }
    worst
}

/// Runs random cases, of which a run that does not say otherwise has `cases`. `check` gets a seed, and returns the largest
/// part of its bound that an error took.
pub(crate) fn run_cases(test: &str, cases: u32, check: impl Fn(u64) -> f64 + std::panic::RefUnwindSafe) {
    let asked = Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { asked.cases } else { cases };
    let first = if let RngSeed::Fixed(seed) = asked.rng_seed { seed } else { 0 };
    let mut worst = 0.0f64;
    for seed in (first..).take(cases as usize) {
        match std::panic::catch_unwind(|| check(seed)) {
            Ok(part) => worst = worst.max(part),
            Err(panic) => {
                println!("again: PROPTEST_CASES=1 PROPTEST_RNG_SEED={seed} cargo test --test suite {test}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!(
        "properties: {test}: {cases} cases from seed {first}, 0 failed, the largest error {worst:.2} of its bound"
    );
}

#[test]
fn random_steps_of_random_optimizers() {
    run_cases("random_steps_of_random_optimizers", 200, check);
}

//! What the examples train: a linear model on generated samples. Every process can generate any of them.

use std::ops::Range;

use gradclip_mpi::gradclip::{Clip, Clipper, Error, TensorMut};

/// Weights, and one bias behind them.
pub(crate) const WEIGHTS: usize = 65_536;
/// Samples in a step, over all ranks.
pub(crate) const BATCH: usize = 48;
pub(crate) const STEPS: usize = 12;
pub(crate) const MAX_NORM: f64 = 5.0;
pub(crate) const RATE: f32 = 0.5;

/// A number from -1 to 1: a feature of a sample, or a weight that is to be learnt.
fn number(of: usize, feature: usize) -> f32 {
    let mut bits =
        (of as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (feature as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    bits ^= bits >> 32;
    bits = bits.wrapping_mul(0xd6e8_feb8_6659_fd93);
    bits ^= bits >> 32;
    (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// What some samples of a step contribute to the gradient of the mean squared error, and to the error.
pub(crate) fn gradient(step: usize, samples: Range<usize>, params: &[f32]) -> (Vec<f32>, f32) {
    let (mut gradient, mut loss) = (vec![0.0; params.len()], 0.0);
    for sample in samples {
        let of = 1 + step * BATCH + sample;
        let features: Vec<_> = (0..WEIGHTS).map(|k| number(of, k)).chain([1.0]).collect();
        let error: f32 = features.iter().zip(params).enumerate().map(|(k, (x, w))| x * (w - number(0, k))).sum();
        let each = 2.0 * error / BATCH as f32;
        gradient.iter_mut().zip(&features).for_each(|(g, x)| *g += each * x);
        loss += error * error / BATCH as f32;
    }
    (gradient, loss)
}

/// The range of `count` items that a rank holds.
pub(crate) fn slice_range(count: usize, rank: usize, ranks: usize) -> Range<usize> {
    count * rank / ranks..count * (rank + 1) / ranks
}

pub(crate) fn descend(params: &mut [f32], gradient: &[f32]) {
    params.iter_mut().zip(gradient).for_each(|(p, g)| *p -= RATE * g);
}

/// The same training in one process, with every sample: the norm of each step, and the parameters.
pub(crate) fn by_one_process() -> Result<(Vec<f64>, Vec<f32>), Error> {
    let clip = Clip::norm(MAX_NORM);
    let (mut norms, mut params) = (Vec::new(), vec![0.0; WEIGHTS + 1]);
    for step in 0..STEPS {
        let (mut all, _) = gradient(step, 0..BATCH, &params);
        norms.push(Clipper::cpu().apply(&clip, &mut [TensorMut::new(&mut all)])?.total_norm);
        descend(&mut params, &all);
    }
    Ok((norms, params))
}

/// Whether two runs have come to the same, but for sums in another order: norms and parameters.
pub(crate) fn check(norms: (&[f64], &[f64]), params: (&[f32], &[f32])) -> Result<(), String> {
    let close = |(a, b): (f64, f64), to: f64| (a - b).abs() <= 1e-4 * to;
    if let Some(step) = (0..STEPS).find(|&i| !close((norms.0[i], norms.1[i]), norms.1[i])) {
        return Err(format!("in step {step} the norm is {}, of one process {}", norms.0[step], norms.1[step]));
    }
    let largest = params.1.iter().fold(0f32, |most, p| most.max(p.abs()));
    let differs = |&i: &usize| !close((params.0[i].into(), params.1[i].into()), largest.into());
    match (0..params.0.len()).find(differs) {
        None => Ok(()),
        Some(i) => Err(format!("parameter {i} is {}, of one process {}", params.0[i], params.1[i])),
    }
}

//! Guards against a clip that is right and trains wrong: a recurrent network whose gradients explode, trained with and
//! without, and beside a clip that is made of candle's own operations.

mod common;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use common::{norm, tensor, values};
use gradclip_candle::gradclip::Clip;
use gradclip_candle::{clip_grad_norm, clip_in_place};

/// h becomes h w + x u, without an activation that would bound it, so that gradients grow with the steps. It learns to sum
/// its inputs.
struct Net {
    w: Var,
    u: Var,
    out: Var,
}

const STEPS: usize = 30;
const SIZE: usize = 8;

impl Net {
    fn new() -> Result<Self> {
        // The largest eigenvalue is about 1.3: 30 steps multiply by 2,000 and more.
        let w = (Tensor::eye(SIZE, DType::F32, &Device::Cpu)? * 1.2)?.add(&tensor(1, (SIZE, SIZE), 0.1, DType::F32))?;
        let u = tensor(2, (1, SIZE), 0.1, DType::F32);
        let out = tensor(3, (SIZE, 1), 0.1, DType::F32);
        Ok(Self { w: Var::from_tensor(&w)?, u: Var::from_tensor(&u)?, out: Var::from_tensor(&out)? })
    }

    fn vars(&self) -> [Var; 3] {
        [self.w.clone(), self.u.clone(), self.out.clone()]
    }

    /// The mean squared error on 16 sequences.
    fn loss(&self, seed: u64) -> Result<Tensor> {
        let x = tensor(seed, (16, STEPS), 1.0, DType::F32);
        let mut h = Tensor::zeros((16, SIZE), DType::F32, &Device::Cpu)?;
        for t in 0..STEPS {
            h = (h.matmul(&self.w)? + x.narrow(1, t, 1)?.matmul(&self.u)?)?;
        }
        (h.matmul(&self.out)? - x.sum_keepdim(1)?)?.sqr()?.mean_all()
    }

    /// The losses of training with plain gradient descent.
    fn train(&self, steps: u64, mut clip: impl FnMut(&mut GradStore, &[Var]) -> Result<()>) -> Result<Vec<f32>> {
        let mut losses = Vec::new();
        for step in 0..steps {
            let loss = self.loss(1000 + step)?;
            losses.push(loss.to_scalar()?);
            let mut grads = loss.backward()?;
            clip(&mut grads, &self.vars())?;
            for var in self.vars() {
                let gradient = grads.get(&var).expect("the loss depends on it");
                var.set(&(var.as_tensor() - (gradient * 0.02)?)?)?;
            }
        }
        Ok(losses)
    }

    fn weights(&self) -> Vec<Vec<f64>> {
        self.vars().iter().map(|var| values(var)).collect()
    }
}

/// What candle's users write today.
fn by_hand(grads: &mut GradStore, vars: &[Var], max_norm: f64) -> Result<()> {
    let mut total = 0.0;
    for var in vars {
        total += f64::from(grads.get(var).expect("there").sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let coef = (max_norm / (total.sqrt() + 1e-6)).min(1.0);
    for var in vars {
        let clipped = grads.get(var).expect("there").affine(coef, 0.0)?;
        grads.insert(var, clipped);
    }
    Ok(())
}

fn mean(losses: &[f32]) -> f32 {
    losses.iter().sum::<f32>() / losses.len() as f32
}

#[test]
fn exploding_gradients_are_tamed_and_the_net_learns() {
    let free = Net::new().and_then(|net| net.train(150, |_, _| Ok(()))).expect("it runs");
    assert!(!free[149].is_finite(), "without a clip it should diverge: {free:?}");

    let clipped = Net::new().expect("a net");
    let mut steps = 0;
    let losses = clipped.train(150, |grads, vars| {
        let report = clip_grad_norm(grads, vars, 1.0)?;
        let left = norm(vars.iter().map(|var| grads.get(var).expect("there")));
        assert!(left <= 1.0 + 1e-6, "{left} is left of {}", report.total_norm);
        steps += usize::from(report.clipped);
        Ok(())
    });
    let losses = losses.expect("it runs");
    assert!(steps > 20, "{steps} steps were clipped");
    assert!(mean(&losses[130..]) < 0.5 * mean(&losses[..5]), "{losses:?}");

    // In place, bit by bit the same run.
    let in_place = Net::new().expect("a net");
    let clip = Clip::norm(1.0);
    in_place.train(150, |grads, vars| Ok(clip_in_place(grads, vars, &clip, None).map(|_| ())?)).expect("it runs");
    assert_eq!(in_place.weights(), clipped.weights());

    // By candle's own operations nearly the same for a while; their norm is summed in float32, and the net is chaotic.
    let (ours, theirs) = (Net::new().expect("a net"), Net::new().expect("a net"));
    ours.train(20, |grads, vars| Ok(clip_grad_norm(grads, vars, 1.0).map(|_| ())?)).expect("it runs");
    theirs.train(20, |grads, vars| by_hand(grads, vars, 1.0)).expect("it runs");
    for (ours, theirs) in ours.weights().concat().into_iter().zip(theirs.weights().concat()) {
        assert!((ours - theirs).abs() < 1e-5, "{ours} beside {theirs}");
    }
}

//! Trains with the optimizer's state in host memory: bfloat16 gradients, float32 parameters, a clip folded into the step.
//! `cargo run --example offloaded_adamw`

use gradclip::{Clip, Clipper, NonFinite, Optimizer, OptimizerState, Tensor, TensorMut};
use half::bf16;

fn main() -> Result<(), gradclip::Error> {
    // The host's copy of the parameters, which the device has in bfloat16.
    let (mut weight, mut bias) = (vec![0.5f32; 64 * 64], vec![0.25f32; 64]);
    let adamw = Optimizer::adamw(1e-2).betas(0.9, 0.95);
    let mut state = {
        // No weight decay for biases, as usual.
        let (weights, biases) = ([Tensor::new(&weight).named("weight")], [Tensor::new(&bias).named("bias")]);
        OptimizerState::new(&[(adamw.weight_decay(0.1), &weights), (adamw.weight_decay(0.0), &biases)])?
    };
    let clip = Clip::norm(1.0).non_finite(NonFinite::Skip);
    for step in 0..10 {
        // Gradients as they arrive from the device: here those of half the sum of squares.
        let gradient = |w: &[f32]| w.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
        let gradients = [gradient(&weight), gradient(&bias)];

        // Reads the gradients for their norm; then one pass reads all and writes parameters and state.
        let report = Clipper::cpu().step(
            &clip,
            &mut state,
            &mut [TensorMut::new(&mut weight), TensorMut::new(&mut bias)],
            &[Tensor::new(&gradients[0]), Tensor::new(&gradients[1])],
        )?;
        println!("step {step}: norm {:.3}, scaled by {:.3}", report.total_norm, report.clip_coef);
        for optimizer in state.optimizers_mut() {
            optimizer.lr *= 0.9;
        }
    }
    assert!(weight[0] < 0.45 && state.steps() == 10);
    Ok(())
}

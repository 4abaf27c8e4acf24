//! A step of mixed precision: gradients come multiplied by a loss scale, and a step with overflowed gradients is skipped.
//! `cargo run --example mixed_precision`

use gradclip::{Clip, Clipper, NonFinite, TensorMut};
use half::f16;

fn main() -> Result<(), gradclip::Error> {
    let (mut loss_scale, mut good_steps) = (65536.0, 0);
    for step in 0..4 {
        // Gradients of the scaled loss, as a backward pass makes them. In one step they are too large for float16.
        let size = if step == 1 { f32::INFINITY } else { 1.0 + step as f32 };
        let mut w = vec![f16::from_f32(size * loss_scale as f32 / 16.0); 1024];
        let mut b = vec![size * loss_scale as f32 / 4.0; 32];

        // One call for both dtypes: divides by the scale and clips to norm 1, or leaves all as it is if an element is not finite.
        let clip = Clip::norm(1.0).grad_scale(loss_scale).non_finite(NonFinite::Skip);
        let report = Clipper::cpu().apply(&clip, &mut [TensorMut::new(&mut w), TensorMut::new(&mut b)])?;
        if report.has_non_finite() {
            loss_scale /= 2.0;
            println!("step {step}: skipped, the loss scale is {loss_scale} now");
        } else {
            good_steps += 1;
            println!(
                "step {step}: norm {}, scaled by {}; here the optimizer steps",
                report.total_norm, report.clip_coef
            );
        }
    }
    assert_eq!(good_steps, 3);
    Ok(())
}

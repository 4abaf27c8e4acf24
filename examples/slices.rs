//! Clips gradients in host memory by their global norm: `cargo run --example slices`

fn main() -> Result<(), gradclip::Error> {
    let (mut w, mut b) = (vec![0.5f32; 4096], vec![0.25f32; 64]);
    let report = gradclip::clip_grad_norm(&mut [&mut w, &mut b], 1.0)?;
    println!("norm {}, scaled by {}", report.total_norm, report.clip_coef);

    // The second step has nothing to clip and writes nothing.
    let report = gradclip::clip_grad_norm(&mut [&mut w, &mut b], 2.0)?;
    println!("norm {}, clipped: {}", report.total_norm, report.clipped);
    Ok(())
}

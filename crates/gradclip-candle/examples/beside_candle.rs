//! How long a clip of one gradient takes, beside what candle's users write from its own operations: medians of runs that take
//! turns, on one gradient of as many float32 elements as asked for (16 Mi if not).
//!
//! ```text
//! cargo run --release -p gradclip-candle --example beside_candle -- 16777216
//! ```

use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use gradclip_candle::gradclip::Clip;
use gradclip_candle::{clip, clip_in_place};

const RUNS: usize = 21;

/// The clip by candle's own operations. It multiplies whether or not there is anything to clip, which spares it an `if`.
fn by_candle(grads: &mut GradStore, var: &Var, max_norm: f64) -> Result<f64> {
    let gradient = grads.get(var).expect("there");
    let norm = f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
    let clipped = gradient.affine((max_norm / (norm + 1e-6)).min(1.0), 0.0)?;
    grads.insert(var, clipped);
    Ok(norm)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let elements = std::env::args().nth(1).map_or(Ok(16 << 20), |arg| arg.parse())?;
    let numbers: Vec<f32> = (0..elements).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5).collect();
    let exact = numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let gradient = Tensor::from_vec(numbers, elements, &Device::Cpu)?;
    let var = Var::zeros(elements, DType::F32, &Device::Cpu)?;

    for (what, max_norm) in [("all clipped", exact / 2.0), ("nothing clipped", exact * 2.0)] {
        let mut times = [const { Vec::new() }; 3];
        let mut norms = [0.0; 3];
        let description = Clip::norm(max_norm);
        for _ in 0..RUNS {
            for way in 0..3 {
                // A gradient that nobody else holds.
                let mut grads = GradStore::default();
                grads.insert(&var, gradient.force_contiguous()?);
                let start = Instant::now();
                norms[way] = match way {
                    0 => by_candle(&mut grads, &var, max_norm)?,
                    1 => clip(&mut grads, std::slice::from_ref(&var), &description)?.total_norm,
                    _ => clip_in_place(&mut grads, std::slice::from_ref(&var), &description, None)?.total_norm,
                };
                times[way].push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        let [candle, copy, in_place] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            (times[RUNS / 2], times[0])
        });
        let error = norms.map(|norm| (norm / exact - 1.0).abs());
        println!(
            "{elements} float32, {what}, ms (least): candle {:.1} ({:.1}), clip {:.1} ({:.1}), in place {:.1} ({:.1}); \
             times as fast: {:.1}, {:.1}; error of the norm: candle {:.0e}, ours {:.0e}",
            candle.0,
            candle.1,
            copy.0,
            copy.1,
            in_place.0,
            in_place.1,
            candle.0 / copy.0,
            candle.0 / in_place.0,
            error[0],
            error[1],
        );
    }
    Ok(())
}

//! Measures what `Clipper::auto` goes by: host tensors through a device, beside the CPU path of the same machine. Prints
//! medians of interleaved runs, and the row that they earn in `src/gpu/tuning.rs`.
//!
//! ```sh
//! cargo run --release --example host_route [NAME OF ADAPTER]
//! ```

use std::time::Instant;

use gradclip::gpu::GpuClipper;
use gradclip::{Clip, Clipper, Error, TensorMut};

const RUNS: usize = 7;

/// Seconds that a clip of fresh gradients takes, and whether it clipped.
fn seconds(clipper: &Clipper, clip: &Clip, fresh: &[f32], grads: &mut [f32]) -> Result<(f64, bool), Error> {
    grads.copy_from_slice(fresh);
    let start = Instant::now();
    let report = clipper.apply(clip, &mut [TensorMut::new(grads)])?;
    Ok((start.elapsed().as_secs_f64(), report.clipped))
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<(), Error> {
    let gpu = match std::env::args().nth(1) {
        Some(name) => GpuClipper::open_named_blocking(&name)?,
        None => GpuClipper::open_blocking()?,
    };
    let info = gpu.adapter_info();
    println!("{} ({:?}), float32, medians of {RUNS} in ms\n", info.name, info.device_type);
    println!("| elements | case | device | CPU | device / CPU |\n|---|---|---|---|---|");
    let clippers = [Clipper::gpu(gpu), Clipper::cpu()];
    // The shortest set from which on the device was faster in both cases.
    let mut faster_from = None;
    for shift in [16, 18, 20, 22, 24, 26] {
        let fresh: Vec<_> = (0..1u32 << shift).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 - 8e6).collect();
        let mut grads = fresh.clone();
        let mut is_faster = true;
        for (case, clip) in [("unclipped", Clip::norm(f64::MAX)?), ("clipped", Clip::norm(1.0)?)] {
            let mut times = [Vec::new(), Vec::new()];
            // The first compiles the kernels.
            for run in 0..=RUNS {
                for (clipper, times) in clippers.iter().zip(&mut times) {
                    let (time, clipped) = seconds(clipper, &clip, &fresh, &mut grads)?;
                    assert_eq!(clipped, case == "clipped");
                    if run > 0 {
                        times.push(time * 1e3);
                    }
                }
            }
            let [device, cpu] = times.each_mut().map(|times| median(times));
            println!("| 2^{shift} | {case} | {device:.2} | {cpu:.2} | {:.2} |", device / cpu);
            is_faster &= device < cpu;
        }
        faster_from = if is_faster { faster_from.or(Some(4u64 << shift)) } else { None };
    }
    println!("\nHostRoute {{ device_type: wgpu::DeviceType::{:?}, faster_from: {faster_from:?} }}", info.device_type);
    Ok(())
}

//! Guards against a kernel that a browser compiles otherwise: each runs, and is compared with the CPU.

use std::collections::BTreeSet;

use gradclip::gpu::{DeviceThreshold, GpuTensor, PlanOptions};
use gradclip::{
    Budget, Clip, Clipper, Dtype, NonFinite, NormType, Scope, Tensor, TensorMut, Threshold, UnitAxis, ZClip, verify,
};
use gradclip_common::difference::disagreement;
use gradclip_common::generated::TestCase;

use super::{Outcome, bytes, close, download, encoder, hold, norm, numbers, shared, step, upload};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

pub(super) async fn every_norm_of_every_dtype_and_scope() -> Outcome {
    let gpu = shared().await?;
    let parameter = numbers(300 * 257, 9);
    for dtype in DTYPES {
        let (long, wide) = (bytes(dtype, &numbers(65_537, 1)), bytes(dtype, &numbers(300 * 257, 2)));
        let tensors = [
            Tensor::from_bytes(dtype, &long)?.named("long"),
            Tensor::from_bytes(dtype, &wide)?.named("wide").shape(&[300, 257])?,
        ];
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::p(3.0)] {
            let clip = Clip::norm(0.7).norm_type(norm_type);
            let columns = clip.scope(Scope::Unit).unit_axis(UnitAxis::Last);
            let scopes = [clip, clip.scope(Scope::Tensor), clip.scope(Scope::Unit), columns];
            for clip in scopes {
                let v = verify(&clip, &tensors, &gpu).await?;
                hold!(v.agrees(), "{dtype} {clip}: {:?}", disagreement(&v));
            }
        }
        let parameter = Tensor::new(&parameter).shape(&[300, 257])?;
        let agc = [tensors[1].parameter(&parameter)];
        for clip in [Clip::agc(0.1), Clip::agc(0.01).scope(Scope::Tensor)] {
            let v = verify(&clip, &agc, &gpu).await?;
            hold!(v.agrees() && v.cpu.as_ref().is_ok_and(|report| report.clipped), "{dtype} {clip}: {v:?}");
        }
    }
    Ok(())
}

pub(super) async fn values_and_ranges() -> Outcome {
    let gpu = shared().await?;
    for dtype in DTYPES {
        let mut values = numbers(40_001, 3);
        values[77] = f32::NAN;
        let (plain, bad) = (bytes(dtype, &numbers(40_001, 4)), bytes(dtype, &values));
        for clip in [Clip::value(0.25), Clip::range(-0.5, 0.1), Clip::value(0.5).grad_scale(3.0)] {
            for policy in [NonFinite::Propagate, NonFinite::Error, NonFinite::Drop, NonFinite::Zero] {
                for data in [&plain, &bad] {
                    let clip = clip.non_finite(policy);
                    let v = verify(&clip, &[Tensor::from_bytes(dtype, data)?], &gpu).await?;
                    hold!(v.agrees(), "{dtype} {clip}: {:?}", disagreement(&v));
                }
            }
        }
    }
    Ok(())
}

/// Tensors of halves at odd places of one buffer: their first and last words hold elements of others, or of nobody.
pub(super) async fn words_that_tensors_share() -> Outcome {
    let gpu = shared().await?;
    for dtype in [Dtype::F16, Dtype::BF16] {
        let all = bytes(dtype, &numbers(9001, 5));
        let buffer = upload(&gpu, &all);
        let places = [1..4000, 4000..4003, 4005..9000];
        let tensors: Vec<_> =
            places.iter().map(|place| GpuTensor::new(&buffer, dtype, place.clone())).collect::<Result<_, _>>()?;
        let plan = gpu.plan(&Clip::norm(1.0), &tensors)?;
        step(&gpu, &plan)?;
        let coefficient = plan.report().await?.clip_coef;
        let after = download(&gpu, &buffer).await?;
        let mut expected = all.clone();
        for place in places {
            let own = &mut expected[2 * place.start as usize..2 * place.end as usize];
            let given = &mut [TensorMut::from_bytes(dtype, own)?];
            Clipper::cpu().scale(&Clip::norm(coefficient).eps(0.0), &[1.0], given)?;
        }
        let wrong = expected.iter().zip(&after).position(|(a, b)| a != b);
        hold!(wrong.is_none(), "{dtype}: byte {wrong:?}, coefficient {coefficient}");
    }
    Ok(())
}

pub(super) async fn examples_are_summed() -> Outcome {
    let gpu = shared().await?;
    for dtype in DTYPES {
        let (w, b) = (bytes(dtype, &numbers(33 * 257, 6)), bytes(dtype, &numbers(33 * 5, 7)));
        let tensors =
            [Tensor::from_bytes(dtype, &w)?.shape(&[33, 257])?, Tensor::from_bytes(dtype, &b)?.shape(&[33, 5])?];
        let uniform = Clip::norm(0.5).scope(Scope::ExampleTensor).budget(Budget::Uniform);
        for clip in [Clip::norm(0.5).scope(Scope::Example), uniform] {
            let [mut by_gpu, mut by_cpu] = [(); 2].map(|()| (vec![0f32; 257], vec![0f32; 5]));
            let sums = &mut [TensorMut::new(&mut by_gpu.0), TensorMut::new(&mut by_gpu.1)];
            gpu.sum_examples(&clip, &tensors, sums).await?;
            let sums = &mut [TensorMut::new(&mut by_cpu.0), TensorMut::new(&mut by_cpu.1)];
            Clipper::cpu().sum_examples(&clip, &tensors, sums)?;
            let pairs = by_gpu.0.iter().chain(&by_gpu.1).zip(by_cpu.0.iter().chain(&by_cpu.1));
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            hold!(worst <= 1e-6 && by_gpu.0.iter().any(|x| *x != 0.0), "{dtype} {clip}: {worst}");
        }
    }
    Ok(())
}

pub(super) async fn norms_piece_by_piece() -> Outcome {
    let gpu = shared().await?;
    let parts = [numbers(5000, 8), numbers(321, 9)];
    let buffers = [0, 1].map(|i| upload(&gpu, bytemuck::cast_slice(&parts[i])));
    let running = gpu.accumulator(&Clip::norm(1.0).eps(0.0))?;
    let sets = [running.plan(&[GpuTensor::f32(&buffers[0], ..)?])?, running.plan(&[GpuTensor::f32(&buffers[1], ..)?])?];
    let mut encoder = encoder(&gpu);
    for set in &sets {
        set.accumulate(&mut encoder)?;
    }
    running.finish(&mut encoder)?;
    for set in &sets {
        set.scale(&mut encoder)?;
    }
    gpu.queue().submit([encoder.finish()]);
    let report = running.report().await?;
    let whole = norm(&parts.concat());
    hold!(close(report.total_norm, whole, 1e-6), "{report:?}, not {whole}");
    let mut left = 0.0;
    for buffer in &buffers {
        let after: Vec<f32> = bytemuck::pod_collect_to_vec(&download(&gpu, buffer).await?);
        left += norm(&after).powi(2);
    }
    hold!(close(left.sqrt(), 1.0, 1e-6), "{left}");
    Ok(())
}

pub(super) async fn given_norms() -> Outcome {
    let gpu = shared().await?;
    let before = numbers(2000, 10);
    let (buffer, norms) = (upload(&gpu, bytemuck::cast_slice(&before)), upload(&gpu, &4f32.to_le_bytes()));
    let options = PlanOptions::default().norms(&GpuTensor::f32(&norms, ..)?);
    let plan = gpu.plan_with(&[(Clip::norm(1.0).eps(0.0), &[GpuTensor::f32(&buffer, ..)?])], options)?;
    step(&gpu, &plan)?;
    let report = plan.report().await?;
    let after: Vec<f32> = bytemuck::pod_collect_to_vec(&download(&gpu, &buffer).await?);
    hold!(report.clip_coef == 0.25, "{report:?}");
    hold!(before.iter().zip(&after).all(|(a, b)| a * 0.25 == *b), "powers of two are exact");
    Ok(())
}

pub(super) async fn adaptive_thresholds() -> Outcome {
    let gpu = shared().await?;
    let buffer = upload(&gpu, &[0; 4 * 1000]);
    let mut host = ZClip::new().warm_up(3);
    let options = PlanOptions::default().threshold(DeviceThreshold::ZClip(host.clone()));
    let clip = Clip::norm(f64::INFINITY).eps(0.0);
    let plan = gpu.plan_with(&[(clip, &[GpuTensor::f32(&buffer, ..)?.named("w")])], options)?;
    for (i, factor) in [1.0, 1.1, 0.9, 1.05, 20.0, 1.0].into_iter().enumerate() {
        let gradients: Vec<f32> = numbers(1000, 11 + i as u32).iter().map(|x| x * factor).collect();
        gpu.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(&gradients));
        step(&gpu, &plan)?;
        let (found, mut own) = (plan.report().await?, gradients.clone());
        let wanted = Clipper::cpu().apply_adaptive(
            &clip,
            &mut host as &mut dyn Threshold,
            &mut [TensorMut::new(&mut own).named("w")],
        )?;
        hold!(close(found.clip_coef, wanted.clip_coef, 1e-5), "step {i}: {found:?}, not {wanted:?}");
        hold!(wanted.clipped == (factor == 20.0), "step {i}: {wanted:?}");
    }
    Ok(())
}

/// The kernels by their files in `shaders/`, but those that a profile does not name: `accumulate`, `copy` and `read` run
/// in tests above and below.
const PROFILED: [&str; 10] =
    ["clamp", "edges", "finalise", "merge", "norm", "norm_each", "scale", "scale_each", "sum", "threshold"];

pub(super) async fn every_kernel_ran() -> Outcome {
    let gpu = shared().await?;
    let buffer = upload(&gpu, &bytes(Dtype::F16, &numbers(1 << 18, 12)));
    let sums = upload(&gpu, &[0; 4 * 64]);
    let odd = GpuTensor::f16(&buffer, 1..(1 << 17) + 1)?;
    let matrix = GpuTensor::f16(&buffer, (1 << 17) + 2..(1 << 17) + 2 + 64 * 64)?.shape(&[64, 64])?;
    let by_unit = Clip::norm(0.1).scope(Scope::Unit);
    let summed = PlanOptions::default().sums(&[GpuTensor::f32(&sums, ..)?.shape(&[64])?]);
    let plans = [
        gpu.plan(&Clip::norm(0.1).skip_above(1e9), std::slice::from_ref(&odd))?,
        gpu.plan(&by_unit.unit_axis(UnitAxis::Last), std::slice::from_ref(&matrix))?,
        gpu.plan(&Clip::value(0.1), &[odd, matrix.clone()])?,
        gpu.plan_with(&[(Clip::norm(0.1).scope(Scope::Example), &[matrix])], summed)?,
    ];
    let mut ran = BTreeSet::new();
    for plan in &plans {
        let profile = plan.profile().await?;
        ran.extend(profile.passes.iter().flat_map(|pass| pass.kernels.iter().copied()));
    }
    let left_out: Vec<_> = PROFILED.iter().filter(|kernel| !ran.contains(*kernel)).collect();
    hold!(left_out.is_empty(), "{left_out:?} did not run; {ran:?} did");
    // `copy` and `read` check what they did themselves.
    let speeds = gpu.speeds(16 << 20).await?;
    hold!(speeds.copy > 0.0 && speeds.read > 0.0, "{speeds:?}");
    Ok(())
}

pub(super) async fn random_cases() -> Outcome {
    let gpu = shared().await?;
    for number in 0..15 {
        let case = TestCase::new(23, number)?;
        let parameters = case.parameters()?;
        let v = verify(&case.clip, &case.gradients(&parameters)?, &gpu).await?;
        hold!(v.agrees(), "case {number}, {}: {:?}", case.clip, disagreement(&v));
    }
    Ok(())
}

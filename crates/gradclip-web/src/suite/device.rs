//! Guards against a device that does not shared, is too small, or goes away.

use gradclip::gpu::{GpuClipper, GpuTensor, tuning::Tuning};
use gradclip::{Clip, Clipper, Error, Tensor, TensorMut, verify, wgpu};

use super::{Outcome, close, default_device, encoder, hold, norm, numbers, shared, step, upload};
use crate::timer::{device_step, host_step};

pub(super) async fn opens_with_all_limits() -> Outcome {
    let gpu = shared().await?;
    let (limits, defaults) = (gpu.device().limits(), wgpu::Limits::default());
    hold!(limits.max_storage_buffer_binding_size >= defaults.max_storage_buffer_binding_size, "{limits:?}");
    hold!(limits.max_buffer_size >= defaults.max_buffer_size, "{limits:?}");
    // Two readings of a clock that moves.
    hold!(host_step() > 0.0, "{}", host_step());
    let clock = device_step(&gpu).await?;
    let stamps = gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY);
    hold!(clock.is_none_or(|step| stamps && step > 0.0), "{clock:?}");
    Ok(())
}

pub(super) async fn a_device_of_the_caller() -> Outcome {
    let (device, queue) = default_device().await?;
    let gpu = GpuClipper::new(&device, &queue)?;
    let before = numbers(70_001, 1);
    let mut after = before.clone();
    let report = gpu.apply(&Clip::norm(1.0).eps(0.0), &mut [TensorMut::new(&mut after)]).await?;
    hold!(close(report.total_norm, norm(&before), 1e-6), "{report:?}");
    hold!(report.clipped && close(norm(&after), 1.0, 1e-6), "{}", norm(&after));
    Ok(())
}

/// After `destroy`, as when a driver resets, everything that waits says so, and another device goes on.
pub(super) async fn lost_is_told() -> Outcome {
    let gpu = GpuClipper::open().await?;
    let buffer = upload(&gpu, bytemuck::cast_slice(&[3.0f32, 4.0]));
    let plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&buffer, ..)?])?;
    step(&gpu, &plan)?;
    hold!(close(plan.report().await?.total_norm, 5.0, 1e-6), "before");
    gpu.device().destroy();
    let told = plan.report().await;
    hold!(matches!(told, Err(Error::DeviceLost(_))), "{told:?}");
    let told = plan.encode(&mut encoder(&gpu));
    hold!(matches!(told, Err(Error::DeviceLost(_))), "{told:?}");
    let told = gpu.measure(&Clip::norm(1.0), &[Tensor::new(&[1.0f32])]).await;
    hold!(matches!(told, Err(Error::DeviceLost(_))), "{told:?}");
    let again = GpuClipper::open().await?;
    let report = again.measure(&Clip::norm(1.0), &[Tensor::new(&[3.0f32, 4.0])]).await?;
    hold!(close(report.total_norm, 5.0, 1e-6), "{report:?}");
    Ok(())
}

/// As few invocations as a kernel runs with, so that every merge has many levels.
pub(super) async fn small_workgroups() -> Outcome {
    let (device, queue) = default_device().await?;
    let gpu = GpuClipper::new(&device, &queue)?;
    let mut tuning = Tuning::of(&device.adapter_info());
    (tuning.workgroup, tuning.min_chunk_words) = (8, 256);
    let gpu = gpu.with_tuning(tuning)?;
    let (w, b) = (numbers(200_003, 2), numbers(257, 3));
    let v = verify(&Clip::norm(0.5), &[Tensor::new(&w), Tensor::new(&b)], &gpu).await?;
    hold!(v.agrees(), "{v:?}");
    tuning.workgroup = 4;
    hold!(matches!(gpu.with_tuning(tuning), Err(Error::Usage(_))), "a workgroup of 4");
    Ok(())
}

/// A comparison that finds nothing proves nothing.
pub(super) async fn wrong_results_are_found() -> Outcome {
    let gpu = shared().await?;
    let w = numbers(1000, 4);
    let mut v = verify(&Clip::norm(0.5), &[Tensor::new(&w)], &gpu).await?;
    hold!(v.agrees() && v.elements == 1000, "{v:?}");
    v.norm_error = 1e-3;
    hold!(!v.agrees(), "{v:?}");
    Ok(())
}

/// Long enough that natively several threads would share it.
pub(super) async fn the_cpu_path_stays_on_this_thread() -> Outcome {
    let before = numbers(3 << 20, 5);
    let mut after = before.clone();
    let report = Clipper::cpu().apply(&Clip::norm(2.0).eps(0.0), &mut [TensorMut::new(&mut after)])?;
    hold!(close(report.total_norm, norm(&before), 1e-7), "{report:?}");
    let expected = before.iter().map(|x| (f64::from(*x) * report.clip_coef) as f32);
    hold!(expected.zip(&after).all(|(a, b)| (a - b).abs() <= a.abs() * 2e-7), "{report:?}");
    Ok(())
}

//! Guards against plans that a browser runs otherwise than a native device, or whose errors it keeps to itself.

use gradclip::gpu::{GpuClipper, GpuTensor};
use gradclip::{Clip, Error, Scope};

use super::{Outcome, bytes, close, default_device, download, encoder, hold, norm, numbers, shared, step, upload};
use gradclip::Dtype;

pub(super) async fn left_alone_if_nothing_is_clipped() -> Outcome {
    let gpu = shared().await?;
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let before = bytes(dtype, &numbers(10_001, 1));
        let buffer = upload(&gpu, &before);
        let plan = gpu.plan(&Clip::norm(1e6), &[GpuTensor::new(&buffer, dtype, 0..10_001)?])?;
        plan.ready().await?;
        step(&gpu, &plan)?;
        let report = plan.report().await?;
        let after = download(&gpu, &buffer).await?;
        hold!(!report.clipped && after[..before.len()] == before, "{dtype}: {report:?}");
    }
    Ok(())
}

pub(super) async fn many_steps_of_one_plan() -> Outcome {
    let gpu = shared().await?;
    let before = numbers(50_000, 2);
    let buffer = upload(&gpu, bytemuck::cast_slice(&before));
    let plan = gpu.plan(&Clip::norm(f64::INFINITY).grad_scale(2.0), &[GpuTensor::f32(&buffer, ..)?])?;
    let mut encoder = encoder(&gpu);
    for _ in 0..5 {
        plan.encode(&mut encoder)?;
    }
    gpu.queue().submit([encoder.finish()]);
    // The norm is of what was divided by `grad_scale`.
    let report = plan.report().await?;
    hold!(close(report.total_norm, norm(&before) / 32.0, 1e-6), "{report:?}");
    let after: Vec<f32> = bytemuck::pod_collect_to_vec(&download(&gpu, &buffer).await?);
    hold!(before.iter().zip(&after).all(|(a, b)| a / 32.0 == *b), "powers of two are exact");
    Ok(())
}

/// WebGPU's default limit of a binding is 128 MiB.
pub(super) async fn more_than_a_binding_holds() -> Outcome {
    let (device, queue) = default_device().await?;
    let gpu = GpuClipper::new(&device, &queue)?;
    let binding = device.limits().max_storage_buffer_binding_size;
    let elements = binding / 4 + (1 << 20);
    hold!(4 * elements <= device.limits().max_buffer_size, "{:?}", device.limits());
    let usage = gradclip::wgpu::BufferUsages::STORAGE | gradclip::wgpu::BufferUsages::COPY_DST;
    let buffer = device.create_buffer(&gradclip::wgpu::BufferDescriptor {
        label: None,
        size: 4 * elements,
        usage: usage | gradclip::wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    // Zeros, but for an element in each binding.
    for (index, x) in [(1, 3.0f32), (elements - 2, 4.0)] {
        queue.write_buffer(&buffer, 4 * index, &x.to_le_bytes());
    }
    let plan = gpu.plan(&Clip::norm(2.5).eps(0.0), &[GpuTensor::f32(&buffer, ..)?])?;
    step(&gpu, &plan)?;
    let report = plan.report().await?;
    hold!(close(report.total_norm, 5.0, 1e-6) && close(report.clip_coef, 0.5, 1e-6), "{report:?}");
    let tail = GpuTensor::f32(&buffer, elements - 2..elements)?;
    let plan = gpu.plan(&Clip::norm(f64::INFINITY), &[tail])?;
    step(&gpu, &plan)?;
    let report = plan.report().await?;
    hold!(close(report.total_norm, 2.0, 1e-6), "{report:?}");
    Ok(())
}

/// A buffer of another device is seen while planning; a browser tells it later.
pub(super) async fn errors_while_planning_are_told() -> Outcome {
    let (gpu, other) = (shared().await?, GpuClipper::open().await?);
    let foreign = upload(&other, &[0; 64]);
    let tensors = [GpuTensor::f32(&foreign, ..)?];
    let plan = gpu.plan(&Clip::norm(1.0), &tensors)?;
    let told = plan.ready().await;
    hold!(matches!(&told, Err(Error::Device(why)) if !why.contains('\n')), "{told:?}");
    // The first report tells it too, instead of that nothing was submitted.
    let plan = gpu.plan(&Clip::norm(1.0), &tensors)?;
    drop(step(&gpu, &plan));
    let told = plan.report().await;
    hold!(matches!(told, Err(Error::Device(_))), "{told:?}");
    Ok(())
}

pub(super) async fn an_error_belongs_to_its_plan() -> Outcome {
    let (gpu, other) = (shared().await?, GpuClipper::open().await?);
    let foreign = upload(&other, &[0; 64]);
    let wrong = gpu.plan(&Clip::value(1.0), &[GpuTensor::f32(&foreign, ..)?])?;
    let own = upload(&gpu, bytemuck::cast_slice(&[3.0f32, 4.0]));
    let right = gpu.plan(&Clip::value(1.0), &[GpuTensor::f32(&own, ..)?])?;
    right.ready().await?;
    step(&gpu, &right)?;
    let report = right.report().await?;
    hold!(report.clipped, "{report:?}");
    hold!(wrong.ready().await.is_err(), "the other plan");
    Ok(())
}

pub(super) async fn no_step_no_report() -> Outcome {
    let gpu = shared().await?;
    let buffer = upload(&gpu, &[0; 16]);
    let plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&buffer, ..)?])?;
    plan.ready().await?;
    let told = plan.report().await;
    hold!(matches!(told, Err(Error::NotSubmitted)), "{told:?}");
    Ok(())
}

pub(super) async fn not_finite_is_located() -> Outcome {
    let gpu = shared().await?;
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let mut values = numbers(30_001, 3);
        (values[12_345], values[29_000]) = (f32::NAN, f32::INFINITY);
        let before = bytes(dtype, &values);
        let buffers = [upload(&gpu, &bytes(dtype, &numbers(500, 4))), upload(&gpu, &before)];
        let tensors = [
            GpuTensor::new(&buffers[0], dtype, 0..500)?.named("a"),
            GpuTensor::new(&buffers[1], dtype, 0..30_001)?.named("b"),
        ];
        let plan = gpu.plan(&Clip::norm(1.0), &tensors)?;
        step(&gpu, &plan)?;
        let Err(Error::NonFinite(found)) = plan.report().await else { return Err(format!("{dtype}").into()) };
        hold!((found.count, found.name.as_deref(), found.index) == (2, Some("b"), 12_345), "{dtype}: {found:?}");
        let after = download(&gpu, &buffers[1]).await?;
        hold!(after[..before.len()] == before, "{dtype}: nothing is written");
    }
    Ok(())
}

pub(super) async fn other_buffers_and_limits() -> Outcome {
    let gpu = shared().await?;
    let [a, b] = [[3.0f32, 4.0], [6.0, 8.0]].map(|x| upload(&gpu, bytemuck::cast_slice(&x)));
    let mut plan = gpu.plan(&Clip::norm(1.0).scope(Scope::Tensor), &[GpuTensor::f32(&a, ..)?])?;
    plan.update(&[&[GpuTensor::f32(&b, ..)?]])?;
    plan.set_max_norm(20.0)?;
    step(&gpu, &plan)?;
    let report = plan.report().await?;
    hold!(close(report.total_norm, 10.0, 1e-6) && !report.clipped, "{report:?}");
    plan.set_max_norm(2.0)?;
    step(&gpu, &plan)?;
    hold!(close(plan.report().await?.clip_coef, 0.2, 1e-6), "set anew");
    hold!(download(&gpu, &a).await? == bytemuck::cast_slice::<f32, u8>(&[3.0, 4.0]), "the first tensor is untouched");
    Ok(())
}

//! Throughput of measuring and clipping, on the CPU and on the GPU, beside a plain read and a plain copy of the same
//! size on as many threads. Throughput counts the bytes that a case must move: 4 for each element (float32) to measure,
//! 12 to clip, 8 to scale or clamp. Each timed result is checked.
//!
//! `cargo bench`, or `cargo bench -- cpu` for one backend. The GPU is the adapter that `GpuClipper::open` takes.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gradclip::{Clip, ClipReport, Clipper, Dtype, NormType, Scope, Tensor, TensorMut, UnitAxis};
use rayon::prelude::*;

const SIZES: [usize; 3] = [64 << 10, 1 << 20, 16 << 20];

/// Values between -1 and 1. Their squares sum to nearly a third of their number.
fn gradients(len: usize) -> Vec<f32> {
    let value = |i: usize| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 32768.0 - 1.0;
    (0..len).map(value).collect()
}

fn exact_norm(data: &[f32]) -> f64 {
    data.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

fn assert_close(got: f64, want: f64) {
    assert!((got / want - 1.0).abs() < 1e-6, "the norm is {got}, not {want}");
}

/// Reads the bytes in parallel and adds them up, so that no read can be left out.
fn plain_read(data: &[u8]) -> u64 {
    let words = |bytes: &[u8]| bytes.as_chunks().0.iter().fold(0u64, |sum, w| sum.wrapping_add(u64::from_ne_bytes(*w)));
    data.par_chunks(1 << 19).map(words).sum()
}

fn plain_copy(to: &mut [u8], from: &[u8]) {
    to.par_chunks_mut(1 << 19).zip(from.par_chunks(1 << 19)).for_each(|(to, from)| to.copy_from_slice(from));
}

fn cpu(c: &mut Criterion) {
    let mut group = c.benchmark_group("cpu");
    group.sample_size(20);
    for len in SIZES {
        let data = gradients(len);
        let mut copy = data.clone();
        let norm = exact_norm(&data);
        let bytes = 4 * len as u64;
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::new("plain read", len), |b| {
            b.iter(|| plain_read(bytemuck::cast_slice(&data)));
        });
        let measure = Clip::norm(f64::INFINITY);
        group.bench_function(BenchmarkId::new("norm", len), |b| {
            b.iter(|| {
                let report = Clipper::cpu().measure(&measure, &[Tensor::new(&data)]).expect("finite");
                assert_close(report.total_norm, norm);
            });
        });
        group.throughput(Throughput::Bytes(2 * bytes));
        group.bench_function(BenchmarkId::new("plain copy", len), |b| {
            b.iter(|| plain_copy(bytemuck::cast_slice_mut(&mut copy), bytemuck::cast_slice(&data)));
        });
        group.throughput(Throughput::Bytes(3 * bytes));
        let clip = Clip::norm(1.0);
        group.bench_function(BenchmarkId::new("clip", len), |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    copy.copy_from_slice(&data);
                    let start = Instant::now();
                    let report = Clipper::cpu().apply(&clip, &mut [TensorMut::new(&mut copy)]).expect("finite");
                    spent += start.elapsed();
                    assert!(report.clipped);
                    assert_close(report.total_norm, norm);
                }
                spent
            });
        });
    }
}

/// Each kernel of the CPU path by itself, for each dtype.
fn cpu_kernels(c: &mut Criterion) {
    let numbers = gradients(16 << 20);
    for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16] {
        let mut group = c.benchmark_group(format!("cpu kernels, {dtype}"));
        group.sample_size(10);
        let mut data: Vec<u8> = match dtype {
            Dtype::F32 => numbers.iter().flat_map(|x| x.to_ne_bytes()).collect(),
            Dtype::F64 => numbers.iter().flat_map(|x| f64::from(*x).to_ne_bytes()).collect(),
            Dtype::F16 => numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_ne_bytes()).collect(),
            _ => numbers.iter().flat_map(|x| half::bf16::from_f32(*x).to_ne_bytes()).collect(),
        };
        let mut copy = data.clone();
        let bytes = data.len() as u64;
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function("plain read", |b| b.iter(|| plain_read(&data)));
        for p in [2.0, 1.0, f64::INFINITY, 3.0, 1.5] {
            let clip = Clip::norm(f64::INFINITY).norm_type(NormType::p(p));
            group.bench_function(BenchmarkId::new("norm", format!("p = {p}")), |b| {
                let tensor = Tensor::from_bytes(dtype, &data).expect("whole");
                b.iter(|| assert!(Clipper::cpu().measure(&clip, &[tensor]).expect("finite").total_norm > 0.9));
            });
        }
        group.bench_function("counts", |b| {
            let tensor = Tensor::from_bytes(dtype, &data).expect("whole");
            b.iter(|| assert_eq!(tensor.counts().non_finite, 0));
        });
        group.throughput(Throughput::Bytes(2 * bytes));
        group.bench_function("plain copy", |b| b.iter(|| plain_copy(&mut copy, &data)));
        let mut timed = |name: &str, clip: &dyn Fn(TensorMut<'_>) -> ClipReport| {
            group.bench_function(name, |b| {
                b.iter(|| assert!(clip(TensorMut::from_bytes(dtype, &mut data).expect("whole")).clipped));
            });
        };
        // Scales by so little that many runs hardly change anything.
        let clip = Clip::norm(1.0).eps(0.0);
        timed("scale", &|tensor| Clipper::cpu().scale(&clip, &[1.000_001], &mut [tensor]).expect("finite"));
        // The loss scale brings elements back over the bound of the run before.
        let clip = Clip::value(0.5).grad_scale(0.999);
        timed("unscale and clamp", &|tensor| Clipper::cpu().apply(&clip, &mut [tensor]).expect("clamped"));
        let clip = Clip::value(0.25);
        group.bench_function("clamp", |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    plain_copy(&mut data, &copy);
                    let start = Instant::now();
                    let tensor = TensorMut::from_bytes(dtype, &mut data).expect("whole");
                    assert!(Clipper::cpu().apply(&clip, &mut [tensor]).expect("clamped").clipped);
                    spent += start.elapsed();
                }
                spent
            });
        });
    }
}

/// The side of a square matrix, so that there are as many rows as columns.
const SIDE: usize = 4096;

/// Every way to read and scale a matrix.
fn shapes_of_work() -> Vec<(&'static str, Clip)> {
    let clip = |norm_type| Clip::norm(1e-3).norm_type(norm_type);
    let norm = clip(NormType::L2);
    vec![
        ("L2", norm),
        ("L1", clip(NormType::L1)),
        ("inf", clip(NormType::Inf)),
        ("p = 3", clip(NormType::p(3.0))),
        ("p = 1.5", clip(NormType::p(1.5))),
        ("rows", norm.scope(Scope::Unit)),
        ("columns", norm.scope(Scope::Unit).unit_axis(UnitAxis::Last)),
    ]
}

fn cpu_scopes(c: &mut Criterion) {
    let mut group = c.benchmark_group("cpu scopes");
    group.sample_size(10);
    let data = gradients(SIDE * SIDE);
    let mut copy = data.clone();
    for (name, clip) in shapes_of_work() {
        group.throughput(Throughput::Bytes(4 * data.len() as u64));
        let tensor = Tensor::new(&data).shape(&[SIDE, SIDE]).expect("it fits");
        group.bench_function(BenchmarkId::new("measure", name), |b| {
            b.iter(|| assert!(Clipper::cpu().measure(&clip, &[tensor]).expect("finite").clipped));
        });
        group.throughput(Throughput::Bytes(12 * data.len() as u64));
        group.bench_function(BenchmarkId::new("clip", name), |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    copy.copy_from_slice(&data);
                    let tensor = TensorMut::new(&mut copy).shape(&[SIDE, SIDE]).expect("it fits");
                    let start = Instant::now();
                    assert!(Clipper::cpu().apply(&clip, &mut [tensor]).expect("finite").clipped);
                    spent += start.elapsed();
                }
                spent
            });
        });
    }
}

#[cfg(feature = "gpu")]
fn gpu(c: &mut Criterion) {
    use gradclip::gpu::{GpuClipper, GpuPlan, GpuTensor, PlanOptions};
    use gradclip::wgpu;
    let gpu = GpuClipper::open().wait().expect("the GPU benches need an adapter; `cargo bench -- cpu` needs none");
    let info = gpu.device().adapter_info();
    let mut group = c.benchmark_group(format!("gpu ({}, {})", info.name, info.backend));
    group.sample_size(20);
    let (device, queue) = (gpu.device(), gpu.queue());
    // Timed by the device's timestamps where it has them, else by the host's clock.
    let step = |plan: &GpuPlan| {
        let profile = plan.time().wait().expect("finite");
        (Duration::from_secs_f64(profile.seconds), profile.reports[0].clone())
    };
    let fed = |buffer: &wgpu::Buffer, data: &[f32], plan: &GpuPlan| {
        queue.write_buffer(buffer, 0, bytemuck::cast_slice(data));
        step(plan)
    };
    for len in SIZES {
        let data = gradients(len);
        let norm = exact_norm(&data);
        let bytes = 4 * len as u64;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let grads = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage,
            mapped_at_creation: false,
        });
        let tensors = [GpuTensor::f32(&grads, ..).expect("valid")];
        queue.write_buffer(&grads, 0, bytemuck::cast_slice(&data));

        for (name, moves) in [("plain read", 1), ("plain copy", 2)] {
            group.throughput(Throughput::Bytes(moves * bytes));
            group.bench_function(BenchmarkId::new(name, len), |b| {
                b.iter_custom(|times| {
                    let speeds = gpu.speeds(bytes).wait().expect("the device is there");
                    let speed = if moves == 1 { speeds.read } else { speeds.copy };
                    Duration::from_secs_f64(times as f64 * (moves * bytes) as f64 / speed)
                });
            });
        }
        let unclipped = gpu.plan(&Clip::norm(2.0 * norm), &tensors).expect("planned");
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::new("unclipped", len), |b| {
            b.iter_custom(|times| {
                let one = |_| {
                    let (spent, report) = step(&unclipped);
                    assert!(!report.clipped);
                    assert_close(report.total_norm, norm);
                    spent
                };
                (0..times).map(one).sum()
            });
        });
        // Each step brings the norm to 1, so the original is written again before each.
        let clipped = gpu.plan(&Clip::norm(1.0), &tensors).expect("planned");
        group.throughput(Throughput::Bytes(3 * bytes));
        group.bench_function(BenchmarkId::new("clipped", len), |b| {
            b.iter_custom(|times| {
                let one = |_| {
                    let (spent, report) = fed(&grads, &data, &clipped);
                    assert!(report.clipped);
                    assert_close(report.total_norm, norm);
                    spent
                };
                (0..times).map(one).sum()
            });
        });
    }

    let data = gradients(SIDE * SIDE);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
    let size = 4 * data.len() as u64;
    let grads = device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    queue.write_buffer(&grads, 0, bytemuck::cast_slice(&data));
    for (name, clip) in shapes_of_work() {
        let tensor = GpuTensor::f32(&grads, ..).and_then(|t| t.shape(&[SIDE, SIDE])).expect("valid");
        let (measure, both) = (
            gpu.plan_with(&[(clip, std::slice::from_ref(&tensor))], PlanOptions::default().measure_only()),
            gpu.plan(&clip, std::slice::from_ref(&tensor)),
        );
        let (measure, both) = (measure.expect("planned"), both.expect("planned"));
        group.throughput(Throughput::Bytes(4 * data.len() as u64));
        group.bench_function(BenchmarkId::new("measure", name), |b| {
            b.iter_custom(|times| (0..times).map(|_| step(&measure).0).sum());
        });
        group.throughput(Throughput::Bytes(12 * data.len() as u64));
        group.bench_function(BenchmarkId::new("clip", name), |b| {
            b.iter_custom(|times| {
                let one = |_| {
                    let (spent, report) = fed(&grads, &data, &both);
                    assert!(report.clipped);
                    spent
                };
                (0..times).map(one).sum()
            });
        });
    }
}

/// What a step of AdamW with float32 must at least do: it reads four arrays and writes three.
#[cfg(feature = "gpu")]
const PLAIN_STEP: &str = "
    @group(0) @binding(0) var<storage, read_write> gradients: array<vec4<f32>>;
    @group(0) @binding(1) var<storage, read_write> parameters: array<vec4<f32>>;
    @group(0) @binding(2) var<storage, read_write> means: array<vec4<f32>>;
    @group(0) @binding(3) var<storage, read_write> squares: array<vec4<f32>>;
    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
        for (var i = id.x; i < arrayLength(&gradients); i += 64u * groups.x) {
            let g = gradients[i];
            parameters[i] = parameters[i] - g;
            means[i] = means[i] + g;
            squares[i] = squares[i] + g;
        }
    }";

/// A step of an optimizer beside a plain kernel on arrays of the same sizes, each waited for: by the host's clock.
#[cfg(feature = "gpu")]
fn gpu_step(c: &mut Criterion) {
    use gradclip::gpu::{GpuClipper, GpuTensor, PlanOptions};
    use gradclip::{Optimizer, wgpu};
    let gpu = GpuClipper::open().wait().expect("the GPU benches need an adapter; `cargo bench -- cpu` needs none");
    let (device, queue) = (gpu.device(), gpu.queue());
    let mut group = c.benchmark_group("gpu step");
    group.sample_size(20);
    let software = device.adapter_info().device_type == wgpu::DeviceType::Cpu;
    // A card idles with few invocations, and its caches hold 16 Mi elements of one array.
    let (workgroups, largest) = if software { (256, None) } else { (8192, Some(128 << 20)) };
    for len in SIZES.into_iter().chain(largest) {
        let data = gradients(len);
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let buffers = [(); 4].map(|()| {
            let size = 4 * len as u64;
            let buffer =
                device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
            queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&data));
            buffer
        });
        let source = wgpu::ShaderSource::Wgsl(PLAIN_STEP.into());
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(&buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let layout = &pipeline.get_bind_group_layout(0);
        let bound = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        let waited = |record: &dyn Fn(&mut wgpu::CommandEncoder)| {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            record(&mut encoder);
            let begin = Instant::now();
            queue.submit([encoder.finish()]);
            device.poll(wgpu::PollType::wait_indefinitely()).expect("the device works");
            begin.elapsed()
        };
        group.throughput(Throughput::Bytes(28 * len as u64));
        group.bench_function(BenchmarkId::new("plain kernel", len), |b| {
            let one = |_| {
                waited(&|encoder| {
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                    pass.set_pipeline(&pipeline);
                    pass.set_bind_group(0, &bound, &[]);
                    pass.dispatch_workgroups(workgroups, 1, 1);
                })
            };
            b.iter_custom(|times| (0..times).map(one).sum());
        });
        let [gradient, parameter, ..] = buffers.each_ref().map(|buffer| GpuTensor::f32(buffer, ..).expect("valid"));
        let adamw = PlanOptions::default().optimizer(Optimizer::adamw(1e-9));
        let tensors = [gradient.parameter(parameter)];
        let plan = gpu.plan_with(&[(Clip::norm(f64::MAX), &tensors)], adamw).expect("planned");
        group.bench_function(BenchmarkId::new("norm and AdamW", len), |b| {
            let one = |_| waited(&|encoder| plan.encode(encoder).expect("the device works"));
            b.iter_custom(|times| (0..times).map(one).sum());
        });
        group.bench_function(BenchmarkId::new("AdamW", len), |b| {
            let one = |_| waited(&|encoder| plan.encode_scale(encoder).expect("the device works"));
            b.iter_custom(|times| (0..times).map(one).sum());
        });
    }
}

#[cfg(not(feature = "gpu"))]
fn gpu(_: &mut Criterion) {}

#[cfg(not(feature = "gpu"))]
fn gpu_step(_: &mut Criterion) {}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = cpu, cpu_kernels, cpu_scopes, gpu, gpu_step
}
criterion_main!(benches);

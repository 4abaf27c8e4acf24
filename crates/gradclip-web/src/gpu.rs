//! The device of the page, and what the page asks of it.

use gradclip::gpu::{GpuClipper, GpuPlan, GpuTensor, PlanOptions};
use gradclip::wgpu;
use gradclip::{Clip, Clipper, Dtype, Error, Tensor};
use gradclip_common::difference::{disagreement, ulps};
use gradclip_common::generated::TestCase;
use gradclip_common::text::{number, size_label};
use gradclip_common::throughput::{self, CASES, Case, Row};
use js_sys::Function;
use serde::Serialize;
use serde_json::json;
use wasm_bindgen::prelude::*;

use crate::clock::Clock;
use crate::page::{Progress, json, thrown};
use crate::timer::{Timer, device_step, host_step};

/// A device with everything that gradclip needs of it.
#[wasm_bindgen]
pub struct Gpu(GpuClipper);

/// Elements of the tensors that are timed.
const SIZES: [u64; 4] = [1 << 16, 1 << 20, 1 << 23, 1 << 26];

/// The largest of them on a software device, which would take minutes for more.
const LARGEST_ON_SOFTWARE: u64 = 1 << 20;

/// Divides every gradient in each step that clips, so that the next step has work too.
const GRAD_SCALE: f64 = 1.0001;

/// Elements of the block that fills a buffer.
const BLOCK: u64 = 1 << 16;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

#[wasm_bindgen]
impl Gpu {
    /// Opens the adapter with the highest performance, with all its limits.
    ///
    /// # Errors
    /// An `Error` of JavaScript, named after the variant of [`gradclip::Error`].
    pub async fn open() -> Result<Gpu, JsValue> {
        GpuClipper::open().await.map(Self).map_err(|error| thrown(&error))
    }

    /// The device as JSON: limits, features, and what was probed.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub async fn describe(&self) -> Result<String, JsValue> {
        let device = self.0.device();
        let (info, limits) = (device.adapter_info(), device.limits());
        let clock = device_step(&self.0).await.map_err(|error| thrown(&error))?;
        json(&json!({
            "adapter": info.name,
            "software": info.device_type == wgpu::DeviceType::Cpu,
            "features": device.features().iter_names().map(|(name, _)| name).collect::<Vec<_>>(),
            "limits": {
                "max_buffer_size": limits.max_buffer_size,
                "max_storage_buffer_binding_size": limits.max_storage_buffer_binding_size,
                "max_storage_buffers_per_shader_stage": limits.max_storage_buffers_per_shader_stage,
                "max_compute_invocations_per_workgroup": limits.max_compute_invocations_per_workgroup,
                "max_compute_workgroup_storage_size": limits.max_compute_workgroup_storage_size,
                "max_compute_workgroups_per_dimension": limits.max_compute_workgroups_per_dimension,
                "min_storage_buffer_offset_alignment": limits.min_storage_buffer_offset_alignment,
            },
            "probed": { "timestamp_step": clock, "host_clock_step": host_step() },
        }))
    }

    /// Compiles the kernels of the common clips, while the page is read.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub async fn compile(&self) -> Result<(), JsValue> {
        for dtype in DTYPES {
            for case in CASES {
                let compiled = async { self.plan(&self.buffer(16).await?, dtype, 4, case)?.ready().await };
                compiled.await.map_err(|error| thrown(&error))?;
            }
        }
        Ok(())
    }

    /// Compares random clips of random sets with the CPU. As JSON.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub async fn verify(&self, seed: u32, cases: u32, progress: Function) -> Result<String, JsValue> {
        let (mut norm_error, mut worst_ulps, mut elements) = (0f64, 0, 0);
        let mut differing = Vec::new();
        for number in 0..cases {
            Progress(&progress).tell(number.into(), cases.into(), "").await?;
            let case = TestCase::new(seed.into(), number.into()).map_err(|error| thrown(&error))?;
            let verified = async {
                let parameters = case.parameters()?;
                gradclip::verify(&case.clip, &case.gradients(&parameters)?, &self.0).await
            };
            let v = verified.await.map_err(|error| thrown(&error))?;
            norm_error = norm_error.max(v.norm_error);
            worst_ulps = worst_ulps.max(v.worst_ulps);
            elements += v.elements;
            differing.extend(disagreement(&v).map(|how| format!("case {number}: {:.2}: {how}", case.clip)));
        }
        json(&json!({
            "agrees": differing.is_empty(),
            "cases": cases,
            "seed": seed,
            "elements": elements,
            "norm_error": format!("{norm_error:.1e}"),
            "worst_ulps": ulps(worst_ulps),
            "differing": differing,
        }))
    }

    /// Times every case of every dtype at every size that the device can hold. As JSON.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub async fn measure(&self, progress: Function) -> Result<String, JsValue> {
        let mut found = Speeds::default();
        let limits = self.0.device().limits();
        let software = self.0.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
        let largest = if software { LARGEST_ON_SOFTWARE } else { limits.max_buffer_size / 4 };
        let sizes: Vec<_> = SIZES.into_iter().filter(|size| *size <= largest).collect();
        let total = (1 + CASES.len() * DTYPES.len()) * sizes.len();
        let (mut done, mut left_out) = (0, None);
        'sizes: for size in sizes {
            let label = size_label(size);
            for dtype in [None, Some(Dtype::F32), Some(Dtype::F16), Some(Dtype::BF16)] {
                let what = dtype.map_or_else(|| "copy".to_owned(), |dtype| dtype.to_string());
                let next = format!("{what}, {label} elements");
                Progress(&progress).tell(done as f64, total as f64, &next).await?;
                loop {
                    match self.timed(dtype, size).await {
                        // What was timed in the background is timed again.
                        Ok(_) if Progress(&progress).tell(done as f64, total as f64, &next).await? => {}
                        Ok(timed) => {
                            done += timed.len();
                            found.take(timed);
                            break;
                        }
                        Err(lost @ Error::DeviceLost(_)) => return Err(thrown(&lost)),
                        // Only an attempt shows whether there is room.
                        Err(error) => {
                            left_out = Some(format!("{label} elements of {what} were left out: {error}"));
                            break 'sizes;
                        }
                    }
                }
            }
        }
        // Beside a copy of the same size: small ones fit in caches.
        for row in &mut found.rows {
            let copy = found.copies.iter().find(|(elements, _)| *elements == row.elements);
            row.of_copy = copy.map_or(f64::NAN, |(_, gb_s)| row.gb_s / gb_s);
        }
        let copy = found.copies.last().map_or(0.0, |(_, gb_s)| *gb_s);
        let name = self.0.device().adapter_info().name;
        let title = format!("Throughput of gradclip on {}", if name.is_empty() { "this GPU" } else { &name });
        json(&json!({
            "copy_gb_s": copy,
            "rows": found.rows,
            "by_host_clock": found.by_host_clock,
            "left_out": left_out,
            "plot": throughput::draw(&title, &found.rows, (copy, None)),
        }))
    }

    /// What a plain norm in float32 makes of some gradients, and what this device does. As JSON.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub async fn why(&self) -> Result<String, JsValue> {
        let mut rows = Vec::new();
        for (what, gradients) in puzzles() {
            let report = self.0.measure(&Clip::norm(1.0), &[Tensor::new(&gradients)]).await;
            rows.push(Puzzle::new(what, &gradients, report.map_err(|error| thrown(&error))?.total_norm));
        }
        json(&rows)
    }
}

/// The same on the CPU.
///
/// # Errors
/// As [`Gpu::open`].
#[wasm_bindgen]
pub fn why() -> Result<String, JsValue> {
    let mut rows = Vec::new();
    for (what, gradients) in puzzles() {
        let report = Clipper::cpu().measure(&Clip::norm(1.0), &[Tensor::new(&gradients)]);
        rows.push(Puzzle::new(what, &gradients, report.map_err(|error| thrown(&error))?.total_norm));
    }
    json(&rows)
}

/// Gradients whose norm is easy to tell and hard to compute.
fn puzzles() -> [(&'static str, Vec<f32>); 3] {
    [
        ("100 gradients of 1e20", vec![1e20; 100]),
        ("100 gradients of 1e-25", vec![1e-25; 100]),
        ("a million gradients of 0.1", vec![0.1; 1_000_000]),
    ]
}

#[derive(Serialize)]
struct Puzzle {
    what: &'static str,
    exact: String,
    plain: String,
    ours: String,
    /// What a clip to 1 makes of each element: the plain one divides by the norm that it found.
    plain_clipped: String,
    ours_clipped: String,
}

impl Puzzle {
    fn new(what: &'static str, gradients: &[f32], ours: f64) -> Self {
        let exact = gradients.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let plain = gradients.iter().map(|x| x * x).sum::<f32>().sqrt();
        let first = gradients.first().copied().unwrap_or_default();
        let clipped = |norm: f64| f64::from((f64::from(first) * (1.0 / norm).min(1.0)) as f32);
        Self {
            what,
            exact: number(exact, 8),
            plain: number(plain.into(), 8),
            ours: number(ours, 8),
            plain_clipped: number(clipped(plain.into()), 4),
            ours_clipped: number(clipped(ours), 4),
        }
    }
}

/// What was timed so far.
#[derive(Default)]
struct Speeds {
    rows: Vec<Row>,
    /// The speed of a plain copy by the number of float32 elements.
    copies: Vec<(u64, f64)>,
    /// Rows whose time is by the host's clock.
    by_host_clock: usize,
}

/// What was timed at one size: a plain copy, or the cases of a dtype.
enum Timed {
    Copy(u64, f64),
    Cases(Vec<(Row, Clock)>),
}

impl Timed {
    fn len(&self) -> usize {
        match self {
            Self::Copy(..) => 1,
            Self::Cases(rows) => rows.len(),
        }
    }
}

impl Speeds {
    fn take(&mut self, timed: Timed) {
        match timed {
            Timed::Copy(elements, gb_s) => self.copies.push((elements, gb_s)),
            Timed::Cases(rows) => {
                self.by_host_clock += rows.iter().filter(|(_, clock)| *clock == Clock::Host).count();
                self.rows.extend(rows.into_iter().map(|(row, _)| row));
            }
        }
    }
}

impl Gpu {
    /// A buffer that gradients are clipped in. Only an attempt shows whether there is memory for it.
    async fn buffer(&self, size: u64) -> Result<wgpu::Buffer, Error> {
        let device = self.0.device();
        let filters = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory];
        let scopes = filters.map(|filter| device.push_error_scope(filter));
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let label = Some("gradients");
        let buffer = device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false });
        // Popped before anything else happens.
        let answers: Vec<_> = scopes.into_iter().rev().map(wgpu::ErrorScopeGuard::pop).collect();
        for answer in answers {
            if let Some(error) = answer.await {
                return Err(Error::OutOfMemory(format!("no buffer of {size} bytes: {error}")));
            }
        }
        Ok(buffer)
    }

    /// A plan of one case on one tensor.
    fn plan(&self, buffer: &wgpu::Buffer, dtype: Dtype, elements: u64, case: Case) -> Result<GpuPlan, Error> {
        let tensors = [GpuTensor::new(buffer, dtype, 0..elements)?];
        let by_norm = Clip::norm(f64::INFINITY);
        match case {
            Case::Norm => self.0.plan_with(&[(by_norm, &tensors)], PlanOptions::default().measure_only()),
            Case::Unclipped => self.0.plan(&by_norm, &tensors),
            Case::Clipped => self.0.plan(&by_norm.grad_scale(GRAD_SCALE), &tensors),
            Case::Value => self.0.plan(&Clip::value(2.0).grad_scale(GRAD_SCALE), &tensors),
        }
    }

    /// Times a plain copy of float32, or the cases of a dtype.
    async fn timed(&self, dtype: Option<Dtype>, elements: u64) -> Result<Timed, Error> {
        let timer = Timer::new(&self.0);
        let Some(dtype) = dtype else {
            let (from, to) = (self.filled(Dtype::F32, elements).await?, self.buffer(4 * elements).await?);
            let timing = timer.time(|encoder| {
                encoder.copy_buffer_to_buffer(&from, 0, &to, 0, None);
                Ok(())
            });
            let timing = timing.await?;
            return Ok(Timed::Copy(elements, 2.0 * 4.0 * elements as f64 / 1e9 / timing.seconds));
        };
        let gradients = self.filled(dtype, elements).await?;
        let block = block(dtype);
        let once = Clipper::cpu().measure(&Clip::norm(1.0), &[Tensor::from_bytes(dtype, &block)?])?.total_norm;
        let exact = once * ((elements / BLOCK) as f64).sqrt();
        let mut rows = Vec::new();
        for case in CASES {
            let plan = self.plan(&gradients, dtype, elements, case)?;
            if case == Case::Norm {
                self.check(&plan, exact).await?;
            }
            let timing = timer.time(|encoder| plan.encode(encoder)).await?;
            let gb_s = case.bytes(dtype, elements) as f64 / 1e9 / timing.seconds;
            let row = Row {
                dtype,
                elements,
                tensors: 1,
                case,
                seconds: timing.seconds,
                seconds_min: timing.seconds_min,
                runs: timing.steps as usize,
                gb_s,
                of_copy: 0.0,
            };
            rows.push((row, timing.clock));
        }
        Ok(Timed::Cases(rows))
    }

    /// A speed is worth nothing if the norm is wrong.
    async fn check(&self, plan: &GpuPlan, exact: f64) -> Result<(), Error> {
        let mut encoder = self.0.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        plan.encode(&mut encoder)?;
        self.0.queue().submit([encoder.finish()]);
        let norm = plan.report().await?.total_norm;
        // False for NaN.
        let right = (norm / exact - 1.0).abs() <= 1e-6;
        let wrong = || Error::Device(format!("its norm is {}, not {}", number(norm, 9), number(exact, 9)));
        if right { Ok(()) } else { Err(wrong()) }
    }

    /// A buffer of gradients.
    async fn filled(&self, dtype: Dtype, elements: u64) -> Result<wgpu::Buffer, Error> {
        let buffer = self.buffer(elements * dtype.size() as u64).await?;
        let block = block(dtype);
        let size = block.len() as u64;
        let source = self.buffer(size).await?;
        self.0.queue().write_buffer(&source, 0, &block);
        let mut encoder = self.0.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        (0..elements / BLOCK).for_each(|i| encoder.copy_buffer_to_buffer(&source, 0, &buffer, i * size, Some(size)));
        self.0.queue().submit([encoder.finish()]);
        Ok(buffer)
    }
}

/// Gradients from 0.5 to 1 that look random.
fn block(dtype: Dtype) -> Vec<u8> {
    let x = |i: u32| f32::from_bits(0x3f00_0000 | i.wrapping_mul(2_654_435_761) >> 9);
    let each = (0..BLOCK as u32).map(x);
    match dtype {
        Dtype::F16 => each.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::BF16 => each.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => each.flat_map(f32::to_le_bytes).collect(),
    }
}

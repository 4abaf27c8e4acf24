//! The library's tests for the web: they run in a browser, and on Dawn under node (`scripts/web/suite.mjs`). Each file is
//! named after what it tests; a test is an async function that returns why it failed.

mod device;
mod kernels;
mod plan;

use std::cell::RefCell;
use std::error::Error as StdError;

use gradclip::gpu::{GpuClipper, GpuPlan};
use gradclip::{Dtype, wgpu};
use wasm_bindgen::prelude::*;

use crate::page::sentence;
use crate::timer::mapped;

type Outcome = Result<(), Box<dyn StdError>>;

/// Returns from a test with a message unless a condition holds.
macro_rules! hold {
    ($condition:expr, $($message:tt)+) => {
        // Whatever is compared, NaN holds nothing.
        let held: bool = $condition;
        if !held {
            return Err(format!("{}: {}", stringify!($condition), format!($($message)+)).into());
        }
    };
}
use hold;

macro_rules! tests {
    ($($file:ident: $($test:ident)*;)*) => {
        /// The names of all tests.
        #[wasm_bindgen]
        #[must_use]
        pub fn suite_names() -> Vec<String> {
            [$($(concat!(stringify!($file), "::", stringify!($test))),*),*].map(str::to_owned).into()
        }

        /// Runs one.
        ///
        /// # Errors
        /// Why it failed.
        #[wasm_bindgen]
        pub async fn suite_run(name: String) -> Result<(), JsValue> {
            let outcome = match name.as_str() {
                $($(concat!(stringify!($file), "::", stringify!($test)) => $file::$test().await,)*)*
                _ => Err("there is no such test".into()),
            };
            outcome.map_err(|error| sentence(&error.to_string()))
        }
    };
}

tests! {
    device: opens_with_all_limits a_device_of_the_caller lost_is_told small_workgroups wrong_results_are_found
        the_cpu_path_stays_on_this_thread;
    kernels: every_norm_of_every_dtype_and_scope values_and_ranges words_that_tensors_share examples_are_summed
        norms_piece_by_piece given_norms adaptive_thresholds every_kernel_ran random_cases;
    plan: left_alone_if_nothing_is_clipped many_steps_of_one_plan more_than_a_binding_holds errors_while_planning_are_told
        an_error_belongs_to_its_plan no_step_no_report not_finite_is_located other_buffers_and_limits;
}

thread_local! {
    static SHARED: RefCell<Option<GpuClipper>> = const { RefCell::new(None) };
}

/// A device with all limits, which tests share because it compiles each kernel once.
async fn shared() -> Result<GpuClipper, gradclip::Error> {
    if let Some(gpu) = SHARED.take() {
        SHARED.set(Some(gpu.clone()));
        return Ok(gpu);
    }
    let gpu = GpuClipper::open().await?;
    SHARED.set(Some(gpu.clone()));
    Ok(gpu)
}

/// A device that a caller made, with WebGPU's default limits and no features.
async fn default_device() -> Result<(wgpu::Device, wgpu::Queue), Box<dyn StdError>> {
    let adapters = gradclip::gpu::adapters().await;
    let adapter = adapters.first().ok_or("no adapter")?;
    Ok(adapter.request_device(&wgpu::DeviceDescriptor::default()).await?)
}

/// A buffer that gradients are clipped in.
fn upload(gpu: &GpuClipper, bytes: &[u8]) -> wgpu::Buffer {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    let size = (bytes.len() as u64).next_multiple_of(4).max(4);
    let descriptor = wgpu::BufferDescriptor { label: Some("test"), size, usage, mapped_at_creation: false };
    let buffer = gpu.device().create_buffer(&descriptor);
    let mut padded = bytes.to_vec();
    padded.resize(size as usize, 0);
    gpu.queue().write_buffer(&buffer, 0, &padded);
    buffer
}

async fn download(gpu: &GpuClipper, buffer: &wgpu::Buffer) -> Result<Vec<u8>, gradclip::Error> {
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let descriptor = wgpu::BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
    let staging = gpu.device().create_buffer(&descriptor);
    let mut encoder = encoder(gpu);
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, None);
    gpu.queue().submit([encoder.finish()]);
    mapped(&staging).await
}

fn encoder(gpu: &GpuClipper) -> wgpu::CommandEncoder {
    gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
}

/// Submits one step.
fn step(gpu: &GpuClipper, plan: &GpuPlan) -> Result<(), gradclip::Error> {
    let mut encoder = encoder(gpu);
    plan.encode(&mut encoder)?;
    gpu.queue().submit([encoder.finish()]);
    Ok(())
}

/// Numbers between -1 and 1 that look random.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let number = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
    (0..count as u32).map(|i| number(i ^ seed.wrapping_mul(0x9e37_79b9))).collect()
}

/// The same as bytes of a dtype.
fn bytes(dtype: Dtype, numbers: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::BF16 => numbers.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn norm(numbers: &[f32]) -> f64 {
    numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

fn close(a: f64, b: f64, tolerance: f64) -> bool {
    (a / b - 1.0).abs() <= tolerance
}

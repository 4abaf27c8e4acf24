//! Guards against what only shows after a long time: memory that grows step by step, a norm that drifts, steps that get
//! into each other's way while several are in flight.
//!
//! `GRADCLIP_SOAK_STEPS` sets the number of steps; `scripts/soak.sh` runs 100,000. Each test prints a line of what it found.
#![cfg(feature = "gpu")]

mod common;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::gpu::{Layout, OwnKernel, download, encoder, gpu, step, upload};
use common::numbers::{Random, exact_norm};
use common::{Data, assert_norm, clip_host, numbers_of};
use gradclip::gpu::{GpuPlan, GpuTensor, PlanOptions};
use gradclip::{Clip, Clipper, Dtype, NonFinite, NormType, Scope, wgpu};

fn steps() -> usize {
    std::env::var("GRADCLIP_SOAK_STEPS").map_or(1_000, |steps| steps.parse().expect("GRADCLIP_SOAK_STEPS is a number"))
}

/// Memory is that of the process, so one test runs at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the process and the device's allocator hold, in bytes; what is not told is 0.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: u64,
    on_device: u64,
    allocations: usize,
}

impl Memory {
    fn now() -> Self {
        // wgpu frees what was dropped when it is polled.
        gpu().device().poll(wgpu::PollType::wait_indefinitely()).expect("the device works");
        let report = gpu().device().generate_allocator_report();
        Self {
            resident: resident(),
            on_device: report.as_ref().map_or(0, |report| report.total_allocated_bytes),
            allocations: report.map_or(0, |report| report.allocations.len()),
        }
    }
}

#[cfg(target_os = "linux")]
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux tells it");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Elsewhere only the device's allocator is watched.
#[cfg(not(target_os = "linux"))]
fn resident() -> u64 {
    0
}

/// What the process may grow by in any number of steps. A leak of 100 bytes a step would be 9 MB in the long run; the
/// allocator's own blocks come and go by some hundred kilobytes.
const SLACK: u64 = 4 << 20;

/// What is allocated on the device may differ by: how the last plan's tables lie. One lost allocation every hundred steps
/// would be more.
const DEVICE_SLACK: u64 = 4 << 10;

/// Runs so many steps, and asserts that memory is the same after the first tenth and at the end.
fn soak(what: &str, steps: usize, mut step: impl FnMut(usize)) {
    let warm_up = (steps / 10).max(100).min(steps);
    let started = std::time::Instant::now();
    (0..warm_up).for_each(&mut step);
    let warm = Memory::now();
    (warm_up..steps).for_each(&mut step);
    let end = Memory::now();
    let grown = end.resident as i64 - warm.resident as i64;
    println!(
        "soak: {what}: {steps} steps in {:.0} s on {}, resident memory {:.1} MiB after {warm_up} steps and {grown:+} bytes at \
         the end, on the device {} bytes in {} allocations and {:+} bytes at the end",
        started.elapsed().as_secs_f64(),
        gpu().device().adapter_info().name,
        warm.resident as f64 / f64::from(1 << 20),
        warm.on_device,
        warm.allocations,
        end.on_device as i64 - warm.on_device as i64,
    );
    assert!(end.resident <= warm.resident + SLACK, "{what}: the process grew: {warm:?}, {end:?}");
    assert!(end.on_device <= warm.on_device + DEVICE_SLACK, "{what}: the device's memory grew: {warm:?}, {end:?}");
    assert!(end.allocations <= warm.allocations + 2, "{what}: allocations on the device grew: {warm:?}, {end:?}");
}

/// Steps in flight at most, as a training loop bounds them.
const IN_FLIGHT: usize = 8;

/// The submissions that the device may still be at.
#[derive(Default)]
struct InFlight(VecDeque<wgpu::SubmissionIndex>);

impl InFlight {
    fn submit(&mut self, encoder: wgpu::CommandEncoder) {
        self.0.push_back(gpu().queue().submit([encoder.finish()]));
        if self.0.len() > IN_FLIGHT {
            let wait = wgpu::PollType::Wait { submission_index: self.0.pop_front(), timeout: None };
            gpu().device().poll(wait).expect("the device works");
        }
    }
}

fn set(seed: u64, scale: f64) -> Vec<Data> {
    let mut random = Random(seed);
    [(Dtype::F32, 9_001), (Dtype::F16, 3_333), (Dtype::BF16, 501), (Dtype::F32, 1), (Dtype::F16, 40)]
        .map(|(dtype, len)| Data::rounded(dtype, random.normals(len, scale)))
        .to_vec()
}

fn zeros(words: usize) -> wgpu::Buffer {
    upload(gpu(), &vec![0; 4 * words])
}

/// Counts the words in which two buffers differ.
const COMPARE: &str = "
    @group(0) @binding(0) var<storage, read_write> a: array<u32>;
    @group(0) @binding(1) var<storage, read_write> b: array<u32>;
    @group(0) @binding(2) var<storage, read_write> different: array<atomic<u32>>;
    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3<u32>) {
        if id.x < arrayLength(&a) && a[id.x] != b[id.x] {
            atomicAdd(&different[0], 1u);
        }
    }";

/// The same gradients come again and again: each step must leave the same bits and the same coefficient, which the device
/// compares itself, and each report the same norm.
#[test]
fn the_same_at_each_step_of_one_plan() {
    let _alone = alone();
    let set = set(1, 1.0);
    let layout = Layout::with_gaps(&set, |i| [1, 0, 3][i % 3]);
    let bytes = layout.bytes(&set);
    let (fresh, work) = (upload(gpu(), &bytes), upload(gpu(), &bytes));
    let norm = exact_norm(NormType::L2, numbers_of(&set));
    let clip = Clip::norm(norm / 3.0);
    let plan = gpu().plan(&clip, &layout.tensors(&work, &set)).expect("valid");
    let coefficients_size = plan.coefficients().size();
    let (first, first_coefficients) = (upload(gpu(), &bytes), zeros(coefficients_size as usize / 4));
    step(gpu(), &plan);
    let mut copy = encoder(gpu());
    copy.copy_buffer_to_buffer(&work, 0, &first, 0, None);
    copy.copy_buffer_to_buffer(plan.coefficients(), 0, &first_coefficients, 0, None);
    gpu().queue().submit([copy.finish()]);
    let report = plan.report().wait().expect("finite");
    assert_norm(report.total_norm, norm, 1e-6, "the first step");
    assert_ne!(download(gpu(), &first), bytes, "it was clipped");
    let different = zeros(1);
    let compare = OwnKernel::new(gpu(), COMPARE, &[&work, &first, &different]);
    let compare_coefficients = OwnKernel::new(gpu(), COMPARE, &[plan.coefficients(), &first_coefficients, &different]);
    let workgroups = (bytes.len() as u32 / 4).div_ceil(64);
    let mut in_flight = InFlight::default();
    soak("one plan", steps(), |i| {
        let mut encoder = encoder(gpu());
        encoder.copy_buffer_to_buffer(&fresh, 0, &work, 0, None);
        plan.encode(&mut encoder).expect("the device works");
        compare.encode(&mut encoder, workgroups);
        compare_coefficients.encode(&mut encoder, (coefficients_size as u32 / 4).div_ceil(64));
        in_flight.submit(encoder);
        if i % 50 == 0 {
            assert_eq!(plan.report().wait().expect("it ran"), report, "step {i}");
        }
    });
    assert_eq!(plan.report().wait().expect("it ran"), report, "the last step");
    assert_eq!(download(gpu(), &different), [0; 4], "words that differed from the first step's, over all steps");
}

const WEIGHTS: usize = 5_000;

/// The gradients of a quadratic loss around a target, some of which a spike makes large, and one NaN at some steps.
const BACKWARD: &str = "
    @group(0) @binding(0) var<storage, read_write> weights: array<f32>;
    @group(0) @binding(1) var<storage, read_write> grads: array<f32>;
    @group(0) @binding(2) var<storage, read_write> state: array<u32>;
    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3<u32>) {
        if id.x >= 5000u {
            return;
        }
        let step = state[0];
        let target_weight = f32((id.x * 7919u + step / 64u * 31u) % 1009u) / 512.0;
        var grad = (weights[id.x] - target_weight) * select(1.0, 1024.0, step % 37u == 5u);
        if step % 101u == 17u && id.x == 4321u {
            grad = bitcast<f32>(0x7fc00000u | state[1]);
        }
        grads[id.x] = grad;
    }";

/// Plain gradient descent, which reads the coefficients of its two segments, and notes them down. The first invocation counts
/// the steps.
const SGD: &str = "
    struct Coefficients {
        skip: u32,
        factors: array<f32>,
    }
    @group(0) @binding(0) var<storage, read_write> weights: array<f32>;
    @group(0) @binding(1) var<storage, read_write> grads: array<f32>;
    @group(0) @binding(2) var<storage, read_write> state: array<u32>;
    @group(0) @binding(3) var<storage, read> coefficients: Coefficients;
    @group(0) @binding(4) var<storage, read_write> notes: array<u32>;
    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3<u32>) {
        if id.x < 5000u && coefficients.skip == 0u {
            let segment = select(0u, 1u, id.x >= 3000u);
            weights[id.x] -= 0.125 * (grads[id.x] * coefficients.factors[segment]);
        }
        if id.x == 0u {
            let at = state[2] * 3u;
            notes[at] = coefficients.skip;
            notes[at + 1u] = bitcast<u32>(coefficients.factors[0]);
            notes[at + 2u] = bitcast<u32>(coefficients.factors[1]);
            state[2] += 1u;
        }
    }";

/// The next step, once everyone has read the number of this one.
const ADVANCE: &str = "
    @group(0) @binding(0) var<storage, read_write> state: array<u32>;
    @compute @workgroup_size(1)
    fn main() {
        state[0] += 1u;
    }";

/// The host runs ahead of the device by several steps, each of a backward pass, a clip whose scaling the optimizer folds
/// in, and the optimizer. Afterwards each coefficient is the one that the gradients of its step ask for, and the weights
/// are what a loop on the host makes of them.
#[test]
fn training_runs_ahead_of_the_device() {
    let _alone = alone();
    let steps = steps();
    let (weights, grads) = (zeros(WEIGHTS), zeros(WEIGHTS));
    let (state, notes) = (zeros(3), zeros(3 * steps));
    let max_norm = 8.0;
    let tensors = [GpuTensor::f32(&grads, 0..3000), GpuTensor::f32(&grads, 3000..5000)].map(|t| t.expect("it fits"));
    let clip = Clip::norm(max_norm).scope(Scope::Tensor).non_finite(NonFinite::Skip);
    let plan = gpu().plan_with(&[(clip, &tensors)], PlanOptions::default().measure_only()).expect("valid");
    let backward = OwnKernel::new(gpu(), BACKWARD, &[&weights, &grads, &state]);
    let sgd = OwnKernel::new(gpu(), SGD, &[&weights, &grads, &state, plan.coefficients(), &notes]);
    let advance = OwnKernel::new(gpu(), ADVANCE, &[&state]);
    let workgroups = (WEIGHTS as u32).div_ceil(64);
    let mut in_flight = InFlight::default();
    soak("training", steps, |_| {
        let mut encoder = encoder(gpu());
        backward.encode(&mut encoder, workgroups);
        plan.encode(&mut encoder).expect("the device works");
        sgd.encode(&mut encoder, workgroups);
        advance.encode(&mut encoder, 1);
        in_flight.submit(encoder);
    });
    let notes: Vec<u32> = bytemuck::pod_collect_to_vec(&download(gpu(), &notes));
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&download(gpu(), &weights));
    let (mut want, mut skipped, mut clipped, mut worst) = (vec![0f32; WEIGHTS], 0, 0, 0f64);
    let mut grads = vec![0f32; WEIGHTS];
    for (step, note) in notes.chunks(3).enumerate() {
        for (i, (grad, weight)) in grads.iter_mut().zip(&want).enumerate() {
            let target = ((i * 7919 + step / 64 * 31) % 1009) as f32 / 512.0;
            *grad = (weight - target) * if step % 37 == 5 { 1024.0 } else { 1.0 };
        }
        assert_eq!(note[0] == 1, step % 101 == 17, "step {step}: whether it is skipped");
        if note[0] == 1 {
            skipped += 1;
            continue;
        }
        for (segment, range) in [0..3000, 3000..WEIGHTS].into_iter().enumerate() {
            let factor = f32::from_bits(note[1 + segment]);
            let squares: f64 = grads[range.clone()].iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let right = (max_norm / (squares.sqrt() + 1e-6)).min(1.0);
            worst = worst.max((f64::from(factor) / right - 1.0).abs());
            assert!((f64::from(factor) / right - 1.0).abs() < 2e-6, "step {step}: {factor} and {right}");
            clipped += usize::from(factor < 1.0);
            for i in range {
                want[i] -= 0.125 * (grads[i] * factor);
            }
        }
    }
    let far = want.iter().zip(&got).map(|(want, got)| (want - got).abs()).fold(0f32, f32::max);
    println!(
        "soak: training: {IN_FLIGHT} steps in flight, {skipped} skipped, {clipped} clipped norms, worst coefficient {worst:.1e}, \
         worst weight off by {far:.1e}"
    );
    assert!(skipped > 0 && clipped > steps / 40, "both happen");
    assert!(far <= 1e-6, "the weights differ by {far}");
}

/// A plan that is moved between sets of buffers, while steps that were encoded for the others are in flight.
#[test]
fn one_plan_in_turning_buffers() {
    let _alone = alone();
    let sets: Vec<_> = (0..3).map(|i| set(10 + i, 1.0 + i as f64)).collect();
    let layouts: Vec<_> = sets.iter().zip(0..).map(|(set, i)| Layout::with_gaps(set, |t| (t + i) % 4)).collect();
    let buffers: Vec<_> = layouts.iter().zip(&sets).map(|(l, set)| upload(gpu(), &l.bytes(set))).collect();
    let at = |i: usize| layouts[i].tensors(&buffers[i], &sets[i]);
    // Nothing is written: the norms stay.
    let mut plan = gpu().plan(&Clip::norm(1e9), &at(0)).expect("valid");
    let mut in_flight = InFlight::default();
    soak("buffers by turns", steps() / 5, |i| {
        plan.update(&[&at(i % 3)]).expect("the same shapes");
        let mut encoder = encoder(gpu());
        plan.encode(&mut encoder).expect("the device works");
        in_flight.submit(encoder);
        if i % 50 == 49 {
            let norm = exact_norm(NormType::L2, numbers_of(&sets[i % 3]));
            assert_norm(plan.report().wait().expect("it ran").total_norm, norm, 1e-6, &format!("step {i}"));
        }
    });
}

/// Host tensors through the device: all of its buffers are made for a call.
#[test]
fn host_tensors_again_and_again() {
    let _alone = alone();
    let set = set(20, 1.0);
    let norm = exact_norm(NormType::L2, numbers_of(&set));
    let (clipper, clip) = (Clipper::gpu(gpu().clone()), Clip::norm(norm / 2.0));
    let (report, after) = clip_host(&clipper, &clip, &set).ok();
    assert_norm(report.total_norm, norm, 1e-6, "the first call");
    soak("host tensors", steps() / 5, |i| {
        let (again, bits) = clip_host(&clipper, &clip, &set).ok();
        assert_eq!(again, report, "call {i}");
        assert!(bits == after, "call {i}");
    });
}

/// Plans that are made, submitted and dropped before the device is done with them, and some that are never used.
#[test]
fn plans_made_and_dropped() {
    let _alone = alone();
    let set = set(30, 1.0);
    let layout = Layout::with_gaps(&set, |i| i % 2);
    let buffer = upload(gpu(), &layout.bytes(&set));
    let tensors = layout.tensors(&buffer, &set);
    let norm = exact_norm(NormType::L2, numbers_of(&set));
    let mut in_flight = InFlight::default();
    let mut last: Option<GpuPlan> = None;
    soak("plans made and dropped", steps() / 10, |i| {
        let plan = gpu().plan(&Clip::norm(1e9), &tensors).expect("valid");
        if i % 3 != 0 {
            let mut encoder = encoder(gpu());
            plan.encode(&mut encoder).expect("the device works");
            in_flight.submit(encoder);
        }
        if i % 50 == 49 {
            step(gpu(), &plan);
            assert_norm(plan.report().wait().expect("it ran").total_norm, norm, 1e-6, &format!("plan {i}"));
        }
        // One step late, so that plans are also dropped while another is in use.
        last = Some(plan);
    });
    drop(last);
}

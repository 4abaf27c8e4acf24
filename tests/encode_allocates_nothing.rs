//! Guards against a step that waits, or that allocates more than wgpu itself does for the same dispatches.
//!
//! wgpu records a pass by growing lists of its own, so no recording is free of allocations. What can be shown is that
//! nothing comes on top: a pass written by hand, with the same pattern of pipelines, bind groups and dispatches, allocates
//! exactly as often and as much; and thousands of tensors cost what one costs.
#![cfg(feature = "gpu")]

mod common;

use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::gpu::{Layout, download, encoder, gpu, gpu_tensor, step, stepper, upload};
use common::numbers::Random;
use common::{Data, assert_same_bits};
use gradclip::gpu::{GpuPlan, GpuTensor, PlanOptions};
use gradclip::{Clip, Dtype, Error, Optimizer};

struct Counting;

thread_local! {
    /// How often and how much this thread has allocated.
    static ALLOCATED: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

fn count(bytes: usize) {
    // A thread that is ending has no counter any more.
    let _ = ALLOCATED.try_with(|counted| {
        let (times, sum) = counted.get();
        counted.set((times + 1, sum + bytes as u64));
    });
}

// SAFETY: every method hands its arguments on to the system's allocator, which fulfils the contract; counting touches
// a thread-local cell without a destructor and does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        count(memory.size());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(memory) }
    }

    unsafe fn dealloc(&self, at: *mut u8, memory: Memory) {
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(at, memory) }
    }

    unsafe fn realloc(&self, at: *mut u8, memory: Memory, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.realloc(at, memory, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `record` allocates on this thread when it records into a new encoder: how often, and how many bytes. Nothing is
/// submitted.
fn allocated(record: impl Fn(&mut wgpu::CommandEncoder)) -> (u64, u64) {
    let mut encoder = encoder(gpu());
    let (times, bytes) = ALLOCATED.get();
    record(&mut encoder);
    let (times_after, bytes_after) = ALLOCATED.get();
    // Finished, so that it counts as a recording that works.
    drop(encoder.finish());
    (times_after - times, bytes_after - bytes)
}

fn allocated_by(plan: &GpuPlan) -> (u64, u64) {
    let encode = |encoder: &mut wgpu::CommandEncoder| plan.encode(encoder).expect("the device works");
    allocated(encode);
    let counted = allocated(encode);
    assert_eq!(allocated(encode), counted, "every step costs the same");
    counted
}

/// A pass in which each dispatch sets one of some pipelines and bind groups. wgpu does not record what is set already, so
/// it matters which are the same.
struct ByHand {
    dispatches: Vec<(wgpu::ComputePipeline, wgpu::BindGroup, wgpu::BindGroup)>,
}

/// A kernel, a bind group of the clip, and one of what the dispatch is about.
type Row = (&'static str, usize, usize);

impl ByHand {
    fn new(dispatches: &[Row]) -> Self {
        let device = gpu().device();
        let entry = wgpu::BindGroupLayoutEntry {
            binding: 0,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: false },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let layout =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &[entry] });
        let groups: Vec<_> = (0..8)
            .map(|_| {
                let buffer = upload(gpu(), &[0; 4]);
                let entries = &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }];
                device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries })
            })
            .collect();
        let pipeline = || {
            let source = "@group(0) @binding(0) var<storage, read_write> a: array<u32>;
                @compute @workgroup_size(1) fn main() { a[0] = 1u; }";
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: None,
                source: wgpu::ShaderSource::Wgsl(source.into()),
            });
            let layouts = [Some(&layout), Some(&layout)];
            let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &layouts,
                immediate_size: 0,
            });
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: Some(&layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            })
        };
        let mut pipelines = HashMap::new();
        let dispatch = |(kernel, clip, subject): &Row| {
            let pipeline = pipelines.entry(*kernel).or_insert_with(pipeline).clone();
            (pipeline, groups[*clip].clone(), groups[*subject].clone())
        };
        Self { dispatches: dispatches.iter().map(dispatch).collect() }
    }

    fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("by hand."), timestamp_writes: None });
        for (pipeline, clip, subject) in &self.dispatches {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, clip, &[]);
            pass.set_bind_group(1, subject, &[]);
            pass.dispatch_workgroups(1, 1, 1);
        }
    }

    fn allocated(&self) -> (u64, u64) {
        let record = |encoder: &mut wgpu::CommandEncoder| self.record(encoder);
        allocated(record);
        allocated(record)
    }
}

// Bind groups of a plan: for measuring, finalising and applying; the gradients, what the decision is about, a table for
// each level of merging, and an optimizer's numbers and state.
const MEASURE: usize = 0;
const FINALISE: usize = 1;
const APPLY: usize = 2;
const GRADIENTS: usize = 3;
const DECISION: usize = 4;
const MERGE: usize = 5;
const NUMBERS: usize = 6;
const STATE: usize = 7;

fn plan_of_one(clip: &Clip) -> GpuPlan {
    let buffer = upload(gpu(), &[0; 400]);
    gpu().plan(clip, &[GpuTensor::f32(&buffer, ..).expect("it fits")]).expect("valid")
}

#[test]
fn encoding_costs_what_its_dispatches_cost() {
    let by_norm = plan_of_one(&Clip::norm(1.0));
    let by_hand =
        ByHand::new(&[("norm", MEASURE, GRADIENTS), ("finalise", FINALISE, DECISION), ("scale", APPLY, GRADIENTS)]);
    assert_eq!(allocated_by(&by_norm), by_hand.allocated(), "allocations and bytes: norm, finalise, scale");
    let by_value = plan_of_one(&Clip::value(1.0));
    let by_hand = ByHand::new(&[("clamp", MEASURE, GRADIENTS), ("finalise", FINALISE, DECISION)]);
    assert_eq!(allocated_by(&by_value), by_hand.allocated(), "allocations and bytes: clamp, finalise");
}

#[test]
fn a_step_costs_what_its_dispatches_cost() {
    let gpu = stepper();
    let [gradients, parameters] = [1.0, 2.0].map(|x| upload(gpu, bytemuck::cast_slice(&[x as f32; 100])));
    let tensor = GpuTensor::f32(&gradients, ..).expect("it fits");
    let tensor = tensor.parameter(GpuTensor::f32(&parameters, ..).expect("it fits"));
    let adamw = PlanOptions::default().optimizer(Optimizer::adamw(1e-3));
    let mut plan = gpu.plan_with(&[(Clip::norm(1.0), &[tensor])], adamw).expect("valid");
    let by_hand = ByHand::new(&[
        ("norm", MEASURE, GRADIENTS),
        ("finalise", FINALISE, DECISION),
        ("numbers", APPLY, NUMBERS),
        ("step", APPLY, STATE),
    ]);
    assert_eq!(allocated_by(&plan), by_hand.allocated(), "allocations and bytes: norm, finalise, numbers, step");
    plan.set_optimizers(&[Optimizer::adamw(1e-4)]).expect("the same kind");
    assert_eq!(allocated_by(&plan), by_hand.allocated(), "with another learning rate");
}

#[test]
fn three_thousand_tensors_cost_one_merge() {
    let mut random = Random(1);
    let set: Vec<_> = (0..3000).map(|_| Data::rounded(Dtype::F32, vec![1.0; 1 + random.below(64)])).collect();
    let layout = Layout::with_gaps(&set, |_| 1);
    let buffer = upload(gpu(), &layout.bytes(&set));
    let clip = Clip::norm(1.0);
    let plan = gpu().plan(&clip, &layout.tensors(&buffer, &set)).expect("valid");
    let by_hand = ByHand::new(&[
        ("norm", MEASURE, GRADIENTS),
        ("merge", MEASURE, MERGE),
        ("finalise", FINALISE, DECISION),
        ("scale", APPLY, GRADIENTS),
    ]);
    assert_eq!(allocated_by(&plan), by_hand.allocated(), "allocations and bytes");
}

/// That the counter counts.
#[test]
fn the_counter_counts() {
    let (times, bytes) = ALLOCATED.get();
    let vector = std::hint::black_box(vec![0u8; 1000]);
    let (times_after, bytes_after) = ALLOCATED.get();
    assert_eq!((times_after - times, bytes_after - bytes), (1, 1000));
    drop(vector);
    let reserved = allocated(|_| drop(std::hint::black_box(Vec::<u64>::with_capacity(100))));
    assert_eq!(reserved, (1, 800));
}

#[test]
fn encoding_without_submission_does_nothing() {
    let set = Data::of(&[3.0f32, 4.0]);
    let buffer = upload(gpu(), &set.bytes);
    let plan = gpu().plan(&Clip::norm(1.0), &[gpu_tensor(&buffer, &set, 0)]).expect("valid");
    let mut pending = encoder(gpu());
    plan.encode(&mut pending).expect("the device works");
    let commands = pending.finish();
    assert_same_bits(&[Data { bytes: download(gpu(), &buffer), ..set.clone() }], &[set], "not submitted");
    assert!(matches!(plan.report().wait(), Err(Error::NotSubmitted)));
    gpu().queue().submit([commands]);
    assert!(plan.report().wait().expect("it ran").clipped);
}

/// A finished submission is told to its caller only when somebody polls the device. Encoding must not have done so,
/// however much work is in the queue.
#[test]
fn encoding_does_not_wait_for_the_queue() {
    // A device of its own: other tests poll the shared one.
    let gpu = common::gpu::open();
    let buffer = upload(&gpu, &vec![0; 64 << 20]);
    let tensor = GpuTensor::f32(&buffer, ..).expect("it fits");
    let plan = gpu.plan(&Clip::norm(1.0), &[tensor]).expect("valid");
    step(&gpu, &plan);
    plan.report().wait().expect("it ran");
    let mut busy = encoder(&gpu);
    for _ in 0..20 {
        plan.encode(&mut busy).expect("the device works");
    }
    let submitted = std::time::Instant::now();
    gpu.queue().submit([busy.finish()]);
    let told = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&told);
    gpu.queue().on_submitted_work_done(move || tell.store(true, Ordering::SeqCst));
    let mut pending = encoder(&gpu);
    for _ in 0..100 {
        plan.encode(&mut pending).expect("the device works");
    }
    let encoded = submitted.elapsed();
    assert!(!told.load(Ordering::SeqCst), "encoding has polled the device");
    plan.report().wait().expect("it ran");
    assert!(told.load(Ordering::SeqCst), "now it was polled");
    let done = submitted.elapsed();
    assert!(encoded < done / 2, "100 steps were encoded in {encoded:?}, 20 ran in {done:?}");
    drop(pending);
}

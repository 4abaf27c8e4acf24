//! The tests' device, and buffers on it.

use std::sync::{Mutex, OnceLock, PoisonError};

use gradclip::gpu::tuning::Tuning;
use gradclip::gpu::{GpuClipper, GpuPlan, GpuTensor, PlanOptions};
use gradclip::wgpu;
use gradclip::{Clip, ClipReport, Dtype, Error};

use super::{Data, Done};

const ADVICE: &str = "These tests need a Vulkan device, which may be a software one. On Debian or Ubuntu: \
    apt-get install mesa-vulkan-drivers (or run scripts/test.sh, which does it); or test without a GPU: \
    cargo test --no-default-features.";

/// The device that the tests of a program share.
pub(crate) fn gpu() -> &'static GpuClipper {
    static GPU: OnceLock<GpuClipper> = OnceLock::new();
    GPU.get_or_init(open)
}

/// The settings in `GRADCLIP_TEST_DEVICE`, a list of words separated by commas. They let the same tests run with
/// everything that a device may support or lack (`scripts/test.sh --every-device`). What the adapter lacks is an error.
struct Asked {
    /// `subgroups`: partials merge by subgroups, which software devices do not do by default.
    subgroups: bool,
    /// `small`: small bindings and dispatches and few bindings, so that everything that can be split is split.
    small: bool,
}

impl Asked {
    fn get() -> Self {
        let words = std::env::var("GRADCLIP_TEST_DEVICE").unwrap_or_default();
        let mut asked = Self { subgroups: false, small: false };
        for word in words.split(',').filter(|word| !word.is_empty()) {
            match word {
                "subgroups" => asked.subgroups = true,
                "small" => asked.small = true,
                other => panic!("GRADCLIP_TEST_DEVICE is a list of \"subgroups\" and \"small\"; found {other:?}"),
            }
        }
        asked
    }

    fn features(&self) -> wgpu::Features {
        if self.subgroups { wgpu::Features::SUBGROUP } else { wgpu::Features::empty() }
    }

    fn limits(&self, mut limits: wgpu::Limits) -> wgpu::Limits {
        if self.small {
            let least = |limit: &mut u32, most: u32| *limit = most.min(*limit);
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(1 << 17);
            least(&mut limits.max_storage_buffers_per_shader_stage, 4);
            least(&mut limits.max_compute_workgroups_per_dimension, 60);
        }
        limits
    }

    fn tuned(&self, gpu: GpuClipper) -> GpuClipper {
        if !self.subgroups {
            return gpu;
        }
        let mut tuning = Tuning::of(&gpu.device().adapter_info());
        tuning.subgroups = true;
        gpu.with_tuning(tuning).expect("valid")
    }
}

/// A device for one test alone, which may spoil it.
pub(crate) fn open() -> GpuClipper {
    let asked = Asked::get();
    if asked.small {
        let gpu = clipper(adapter().limits());
        gpu.device().on_uncaptured_error(std::sync::Arc::new(|error| log::error!("{error}")));
        return gpu;
    }
    let gpu = GpuClipper::open().wait().unwrap_or_else(|error| panic!("{error}.\n{ADVICE}"));
    assert!(gpu.device().features().contains(asked.features()), "{:?} has no subgroups", gpu.device().adapter_info());
    asked.tuned(gpu)
}

/// The same as [`gpu`], with as many bindings as an optimizer needs.
pub(crate) fn stepper() -> &'static GpuClipper {
    static GPU: OnceLock<GpuClipper> = OnceLock::new();
    if !Asked::get().small {
        return gpu();
    }
    GPU.get_or_init(|| stepper_with(adapter().limits()))
}

/// The same as [`gpu`], with as many bindings as counting what rounding loses needs.
pub(crate) fn counter() -> &'static GpuClipper {
    static GPU: OnceLock<GpuClipper> = OnceLock::new();
    if !Asked::get().small {
        return gpu();
    }
    GPU.get_or_init(|| with_storage_buffers(6, adapter().limits()))
}

/// A device with as many bindings as an optimizer needs and otherwise these limits.
pub(crate) fn stepper_with(limits: wgpu::Limits) -> GpuClipper {
    with_storage_buffers(5, limits)
}

fn with_storage_buffers(count: u32, limits: wgpu::Limits) -> GpuClipper {
    let asked = Asked::get();
    let required_limits = wgpu::Limits { max_storage_buffers_per_shader_stage: count, ..asked.limits(limits) };
    let required_features = asked.features();
    let descriptor = wgpu::DeviceDescriptor { required_features, required_limits, ..Default::default() };
    let (device, queue) = block_on(adapter().request_device(&descriptor)).expect("the adapter gives a device");
    device.on_uncaptured_error(std::sync::Arc::new(|error| log::error!("{error}")));
    asked.tuned(GpuClipper::new(&device, &queue).expect("these limits suffice"))
}

pub(crate) fn adapter() -> wgpu::Adapter {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
        .unwrap_or_else(|error| panic!("{error}.\n{ADVICE}"))
}

/// A device as a caller would make it, with these limits.
pub(crate) fn device(limits: wgpu::Limits) -> (wgpu::Device, wgpu::Queue) {
    let asked = Asked::get();
    let descriptor = wgpu::DeviceDescriptor {
        required_features: asked.features(),
        required_limits: asked.limits(limits),
        ..Default::default()
    };
    block_on(adapter().request_device(&descriptor)).expect("the adapter gives a device")
}

/// A clipper on a device as a caller would make it, with these limits.
pub(crate) fn clipper(limits: wgpu::Limits) -> GpuClipper {
    let (device, queue) = device(limits);
    Asked::get().tuned(GpuClipper::new(&device, &queue).expect("these limits suffice"))
}

/// The same, shared by all tests with these limits, because each device compiles its kernels anew.
pub(crate) fn shared(limits: wgpu::Limits) -> GpuClipper {
    static DEVICES: Mutex<Vec<(wgpu::Limits, GpuClipper)>> = Mutex::new(Vec::new());
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, gpu)) = devices.iter().find(|(of, _)| *of == limits) {
        return gpu.clone();
    }
    let gpu = clipper(limits.clone());
    devices.push((limits, gpu.clone()));
    gpu
}

/// The lowest limits, and bindings of 64 KiB.
pub(crate) fn small_limits() -> wgpu::Limits {
    wgpu::Limits { max_storage_buffer_binding_size: 1 << 16, ..wgpu::Limits::downlevel_defaults() }
}

/// The smallest executor: it sleeps until woken.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

/// A buffer with these bytes, rounded up to whole words.
pub(crate) fn upload(gpu: &GpuClipper, bytes: &[u8]) -> wgpu::Buffer {
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("gradients of a test"),
        size: bytes.len().next_multiple_of(4) as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    write(gpu, &buffer, 0, bytes);
    buffer
}

/// Writes bytes at an offset that is a multiple of 4.
pub(crate) fn write(gpu: &GpuClipper, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) {
    let whole = bytes.len() & !3;
    let mut at = 0;
    while at < whole {
        let piece = (whole - at).min(32 << 20);
        gpu.queue().write_buffer(buffer, offset + at as u64, &bytes[at..at + piece]);
        gpu.queue().submit([]);
        at += piece;
    }
    if whole < bytes.len() {
        let mut word = [0; 4];
        word[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
        gpu.queue().write_buffer(buffer, offset + whole as u64, &word);
    }
}

/// All bytes of a buffer.
pub(crate) fn download(gpu: &GpuClipper, buffer: &wgpu::Buffer) -> Vec<u8> {
    if buffer.size() == 0 {
        return Vec::new();
    }
    let staging = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("readback of a test"),
        size: buffer.size(),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = encoder(gpu);
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, None);
    gpu.queue().submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |result| result.expect("the buffer can be mapped"));
    gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device works");
    staging.get_mapped_range(..).expect("the buffer is mapped").to_vec()
}

pub(crate) fn encoder(gpu: &GpuClipper) -> wgpu::CommandEncoder {
    gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
}

/// Encodes and submits one step.
pub(crate) fn step(gpu: &GpuClipper, plan: &GpuPlan) {
    let mut encoder = encoder(gpu);
    plan.encode(&mut encoder).expect("the device works");
    gpu.queue().submit([encoder.finish()]);
}

/// A kernel as a caller would write it, bound to whole buffers, in order.
pub(crate) struct OwnKernel {
    pipeline: wgpu::ComputePipeline,
    buffers: wgpu::BindGroup,
}

impl OwnKernel {
    pub(crate) fn new(gpu: &GpuClipper, source: &str, buffers: &[&wgpu::Buffer]) -> Self {
        let device = gpu.device();
        let source = wgpu::ShaderSource::Wgsl(source.into());
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let mut entries = Vec::new();
        for (binding, buffer) in (0..).zip(buffers) {
            entries.push(wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        }
        let layout = &pipeline.get_bind_group_layout(0);
        let buffers = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        Self { pipeline, buffers }
    }

    pub(crate) fn encode(&self, encoder: &mut wgpu::CommandEncoder, workgroups: u32) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.buffers, &[]);
        pass.dispatch_workgroups(workgroups, 1, 1);
    }
}

/// Plans, encodes, submits and reports.
pub(crate) fn clip_tensors(gpu: &GpuClipper, clip: &Clip, tensors: &[GpuTensor]) -> Result<ClipReport, Error> {
    clip_with(gpu, clip, tensors, PlanOptions::default())
}

fn clip_with(gpu: &GpuClipper, clip: &Clip, tensors: &[GpuTensor], options: PlanOptions) -> Result<ClipReport, Error> {
    let plan = gpu.plan_with(&[(*clip, tensors)], options)?;
    step(gpu, &plan);
    plan.report().wait()
}

/// The byte between tensors. As a half it is a number that no clip leaves unchanged by chance.
pub(crate) const GUARD: u8 = 0xc7;

/// The places of tensors in one buffer.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// In bytes, a multiple of the tensor's element size.
    pub(crate) starts: Vec<usize>,
    pub(crate) size: usize,
}

impl Layout {
    /// With a gap of this many elements before each tensor, and of one word after the last.
    pub(crate) fn with_gaps(tensors: &[Data], gap: impl Fn(usize) -> usize) -> Self {
        let mut at = 0;
        let mut starts = Vec::new();
        for (i, t) in tensors.iter().enumerate() {
            at = (at + gap(i) * t.dtype.size()).next_multiple_of(t.dtype.size());
            starts.push(at);
            at += t.bytes.len();
        }
        Self { starts, size: (at + 4).next_multiple_of(4) }
    }

    /// The buffer's bytes: the tensors between guards.
    pub(crate) fn bytes(&self, tensors: &[Data]) -> Vec<u8> {
        let mut bytes = vec![GUARD; self.size];
        for (start, t) in self.starts.iter().zip(tensors) {
            bytes[*start..*start + t.bytes.len()].copy_from_slice(&t.bytes);
        }
        bytes
    }

    pub(crate) fn tensors(&self, buffer: &wgpu::Buffer, tensors: &[Data]) -> Vec<GpuTensor> {
        let view = |(start, t): (&usize, &Data)| {
            let first = (start / t.dtype.size()) as u64;
            gpu_tensor(buffer, t, first)
        };
        self.starts.iter().zip(tensors).map(view).collect()
    }

    /// The tensors in a buffer's bytes. Asserts that nothing else has changed.
    #[track_caller]
    pub(crate) fn taken_from(&self, bytes: &[u8], tensors: &[Data]) -> Vec<Data> {
        let mut after = tensors.to_vec();
        for (start, t) in self.starts.iter().zip(&mut after) {
            let len = t.bytes.len();
            t.bytes.copy_from_slice(&bytes[*start..*start + len]);
        }
        let neighbours_kept = self.bytes(&after) == bytes;
        assert!(neighbours_kept, "bytes outside the tensors have changed");
        after
    }
}

/// A view of a tensor's elements from `first` on.
pub(crate) fn gpu_tensor(buffer: &wgpu::Buffer, t: &Data, first: u64) -> GpuTensor {
    let range = first..first + t.len() as u64;
    let view = match t.dtype {
        Dtype::F32 => GpuTensor::f32(buffer, range),
        Dtype::F16 => GpuTensor::f16(buffer, range),
        Dtype::BF16 => GpuTensor::bf16(buffer, range),
        other => GpuTensor::new(buffer, other, range),
    };
    let mut view = view.expect("the range fits").replica(!t.counted);
    if let Some(name) = &t.name {
        view = view.named(name);
    }
    if let Some(axis) = t.unit_axis {
        view = view.unit_axis(axis);
    }
    match &t.shape {
        Some(shape) => view.shape(shape).expect("the shape fits"),
        None => view,
    }
}

/// Sets of tensors in one buffer: each set in turn gives a tensor, followed by its parameter.
pub(crate) struct Interleaved {
    gpu: GpuClipper,
    pub(crate) buffer: wgpu::Buffer,
    layout: Layout,
    /// For each tensor its set, its place in the set, and whether it is the parameter of that place.
    places: Vec<(usize, usize, bool)>,
}

impl Interleaved {
    /// With gaps as in [`Layout::with_gaps`].
    pub(crate) fn new(gpu: &GpuClipper, sets: &[Vec<Data>], gap: impl Fn(usize) -> usize) -> Self {
        let mut places = Vec::new();
        for i in 0..sets.iter().map(Vec::len).max().unwrap_or(0) {
            for (set, tensors) in sets.iter().enumerate().filter(|(_, tensors)| i < tensors.len()) {
                places.push((set, i, false));
                places.extend(tensors[i].parameter.as_ref().map(|_| (set, i, true)));
            }
        }
        let layout = Layout::with_gaps(&Self::in_order(&places, sets), gap);
        let placed = Self { gpu: gpu.clone(), buffer: upload(gpu, &vec![0; layout.size]), layout, places };
        placed.write(sets);
        placed
    }

    fn in_order(places: &[(usize, usize, bool)], sets: &[Vec<Data>]) -> Vec<Data> {
        let data = |(set, i, is_parameter): &(usize, usize, bool)| {
            let t = &sets[*set][*i];
            if *is_parameter { t.parameter.as_deref().expect("it has one") } else { t }.clone()
        };
        places.iter().map(data).collect()
    }

    /// Writes other numbers, in tensors of the same shapes.
    pub(crate) fn write(&self, sets: &[Vec<Data>]) {
        write(&self.gpu, &self.buffer, 0, &self.layout.bytes(&Self::in_order(&self.places, sets)));
    }

    /// The views of each set.
    pub(crate) fn views(&self, sets: &[Vec<Data>]) -> Vec<Vec<GpuTensor>> {
        let mut views = vec![Vec::new(); sets.len()];
        let all = self.layout.tensors(&self.buffer, &Self::in_order(&self.places, sets));
        for ((set, _, is_parameter), view) in self.places.iter().zip(all) {
            let views = &mut views[*set];
            let view = if *is_parameter { views.pop().map(|of: GpuTensor| of.parameter(view)) } else { Some(view) };
            views.extend(view);
        }
        views
    }

    /// The sets as read from the buffer. Asserts that nothing else has changed.
    #[track_caller]
    pub(crate) fn read(&self, sets: &[Vec<Data>]) -> Vec<Vec<Data>> {
        let before = Self::in_order(&self.places, sets);
        let mut after = vec![Vec::new(); sets.len()];
        let all = self.layout.taken_from(&download(&self.gpu, &self.buffer), &before);
        for (((set, _, is_parameter), now), before) in self.places.iter().zip(all).zip(before) {
            if *is_parameter {
                super::assert_same_bits(&[now], &[before], "a parameter");
            } else {
                after[*set].push(now);
            }
        }
        after
    }
}

/// Tensors in a buffer, at odd places, some back to back.
pub(crate) struct Held {
    gpu: GpuClipper,
    pub(crate) buffer: wgpu::Buffer,
    layout: Layout,
    pub(crate) data: Vec<Data>,
}

impl Held {
    pub(crate) fn new(gpu: &GpuClipper, data: Vec<Data>, shift: usize) -> Self {
        let layout = Layout::with_gaps(&data, |i| [1, 0, 3, 2][(i + shift) % 4]);
        let buffer = upload(gpu, &layout.bytes(&data));
        Self { gpu: gpu.clone(), buffer, layout, data }
    }

    pub(crate) fn views(&self) -> Vec<GpuTensor> {
        self.layout.tensors(&self.buffer, &self.data)
    }

    pub(crate) fn write(&mut self, data: Vec<Data>) {
        self.data = data;
        write(&self.gpu, &self.buffer, 0, &self.layout.bytes(&self.data));
    }

    /// The tensors as they are now. Asserts that nothing between them has changed.
    #[track_caller]
    pub(crate) fn read(&self) -> Vec<Data> {
        self.layout.taken_from(&download(&self.gpu, &self.buffer), &self.data)
    }
}

/// Gradients with their parameters.
pub(crate) fn with_parameter_each(gradients: Vec<GpuTensor>, parameters: Vec<GpuTensor>) -> Vec<GpuTensor> {
    gradients.into_iter().zip(parameters).map(|(gradient, parameter)| gradient.parameter(parameter)).collect()
}

/// Gives views of tensors their parameters, which lie in a separate buffer.
pub(crate) fn with_parameters(gpu: &GpuClipper, mut views: Vec<GpuTensor>, tensors: &[Data]) -> Vec<GpuTensor> {
    let (owners, parameters): (Vec<_>, Vec<_>) =
        tensors.iter().enumerate().filter_map(|(i, t)| Some((i, t.parameter.as_deref()?.clone()))).unzip();
    let layout = Layout::with_gaps(&parameters, |i| [0, 1, 3][i % 3]);
    let buffer = upload(gpu, &layout.bytes(&parameters));
    for (owner, parameter) in owners.into_iter().zip(layout.tensors(&buffer, &parameters)) {
        views[owner] = views[owner].clone().parameter(parameter);
    }
    views
}

fn odd_places(tensors: &[Data]) -> Layout {
    Layout::with_gaps(tensors, |i| [1, 0, 3][i % 3])
}

/// Clips copies that lie in one buffer.
#[track_caller]
pub(crate) fn clip_in_one_buffer(gpu: &GpuClipper, clip: &Clip, tensors: &[Data]) -> Done {
    clip_laid_out(gpu, clip, tensors, &odd_places(tensors))
}

/// The same, and counts what rounding loses.
#[track_caller]
pub(crate) fn clip_and_count(clip: &Clip, tensors: &[Data]) -> Done {
    clip_laid_out_with(counter(), clip, tensors, &odd_places(tensors), PlanOptions::default().count_lost())
}

#[track_caller]
pub(crate) fn clip_laid_out(gpu: &GpuClipper, clip: &Clip, tensors: &[Data], layout: &Layout) -> Done {
    clip_laid_out_with(gpu, clip, tensors, layout, PlanOptions::default())
}

#[track_caller]
fn clip_laid_out_with(gpu: &GpuClipper, clip: &Clip, tensors: &[Data], layout: &Layout, options: PlanOptions) -> Done {
    let buffer = upload(gpu, &layout.bytes(tensors));
    let views = with_parameters(gpu, layout.tensors(&buffer, tensors), tensors);
    let report = clip_with(gpu, clip, &views, options);
    let after = layout.taken_from(&download(gpu, &buffer), tensors);
    Done { report, after }
}

//! The backend: the CPU or a GPU.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::available_parallelism;
#[cfg(feature = "gpu")]
use std::time::{Duration, Instant};

use gradclip::processes::ProcessGroup;
#[cfg(feature = "gpu")]
use gradclip::{
    Clip, Dtype,
    gpu::{GpuClipper, GpuTensor, adapters},
    wgpu,
};
use gradclip::{ClipReport, Clipper, Tensor, TensorMut};
use gradclip_common::text::plural;
use indicatif::ProgressBar;
use rayon::ThreadPool;

use crate::args::{BackendArgs, BackendChoice};
use crate::failure::Failure;
use crate::groups::{Decided, Groups};
use crate::print::remark;
#[cfg(feature = "gpu")]
use crate::tuning;

/// More threads for each core than this only wait for each other, and thousands can stop the machine.
const THREADS_PER_CORE: usize = 4;

/// The chosen backend, and the threads that it uses.
#[derive(Debug)]
pub(crate) struct Backend {
    clipper: Clipper,
    pool: ThreadPool,
    adapter: Option<Adapter>,
    /// Why `auto` did not take a GPU.
    pub(crate) fallback: Option<String>,
    /// That there are fewer threads than were asked for.
    fewer_threads: Option<String>,
}

/// A GPU, and what it is called.
#[derive(Debug)]
struct Adapter {
    name: String,
    /// The name and the graphics API.
    description: String,
    #[cfg(feature = "gpu")]
    gpu: GpuClipper,
}

impl Backend {
    pub(crate) fn choose(args: &BackendArgs, tensors: &[Tensor<'_>]) -> Result<Self, Failure> {
        let named = args.adapter.as_deref();
        let (adapter, fallback) = match args.backend {
            BackendChoice::Cpu if named.is_some() => {
                return Err(Failure::Usage("--adapter names a GPU: leave out --backend cpu".into()));
            }
            BackendChoice::Cpu => (None, None),
            BackendChoice::Auto if named.is_none() => match hardware(tensors, args) {
                Ok(adapter) => (Some(adapter), None),
                Err(why) => (None, Some(why)),
            },
            BackendChoice::Auto | BackendChoice::Gpu => (Some(open(named, tensors, args.local_rank)?), None),
        };
        #[cfg(feature = "gpu")]
        let adapter = match adapter {
            Some(adapter) if !args.no_tuning => Some(adapter.tuned()?),
            adapter => adapter,
        };
        #[cfg(feature = "gpu")]
        let clipper = adapter.as_ref().map_or_else(Clipper::cpu, |adapter| Clipper::gpu(adapter.gpu.clone()));
        #[cfg(not(feature = "gpu"))]
        let clipper = Clipper::cpu();
        let (threads, fewer_threads) = threads(args.threads);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|error| Failure::Setup(format!("cannot start the threads ({error}); try fewer: --threads N")))?;
        Ok(Self { clipper, pool, adapter, fallback, fewer_threads })
    }

    /// Says on stderr how the backend differs from what was asked for; `doing` is what it will do.
    pub(crate) fn explain(&self, doing: &str) {
        let fallback = self.fallback.iter().map(|why| format!("{why}: {doing} on the CPU"));
        fallback.chain(self.fewer_threads.clone()).for_each(|text| remark(&text));
    }

    /// Clips within a process group.
    pub(crate) fn processes(mut self, group: Arc<dyn ProcessGroup>) -> Self {
        self.clipper = self.clipper.processes(group);
        self
    }

    /// The GPU's name; `None` on the CPU.
    pub(crate) fn adapter(&self) -> Option<&str> {
        self.adapter.as_ref().map(|adapter| adapter.name.as_str())
    }

    /// The GPU; `None` on the CPU.
    #[cfg(feature = "gpu")]
    pub(crate) fn gpu(&self) -> Option<&GpuClipper> {
        self.adapter.as_ref().map(|adapter| &adapter.gpu)
    }

    /// Advances a progress bar by the bytes that are measured.
    pub(crate) fn show_progress(&mut self, bar: &ProgressBar) {
        let bar = bar.clone();
        self.clipper = self.clipper.clone().on_progress(move |bytes| bar.inc(bytes));
    }

    /// Whether it can clip piece by piece. A GPU clips whole tensors.
    pub(crate) fn streams(&self) -> bool {
        self.adapter.is_none()
    }

    /// Runs a clip on the backend.
    pub(crate) fn run<T: Send>(
        &self,
        clip: impl FnOnce(&Clipper) -> Result<T, gradclip::Error> + Send,
    ) -> Result<T, Failure> {
        Ok(self.pool.install(|| clip(&self.clipper))?)
    }

    /// Clips groups of tensors in place.
    pub(crate) fn apply(&self, groups: &Groups, tensors: Vec<TensorMut<'_>>) -> Result<Vec<ClipReport>, Failure> {
        let mut divided = groups.divide(tensors);
        let mut of: Vec<_> = groups.clips().zip(divided.iter_mut().map(|tensors| &mut tensors[..])).collect();
        self.run(|clipper| clipper.apply_groups(&mut of))
    }

    /// Decides what [`Backend::apply`] would do, to be done piece by piece.
    pub(crate) fn decide(&self, groups: &Groups, tensors: &[Tensor<'_>]) -> Result<Decided, Failure> {
        let divided = groups.divide(tensors.iter().copied());
        let of: Vec<_> = groups.clips().zip(divided.iter().map(|tensors| &tensors[..])).collect();
        let clips = self.run(|clipper| clipper.decide_groups(&of))?;
        Ok(Decided::new(groups, tensors, clips))
    }

    /// Runs other work on the threads of the backend.
    pub(crate) fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.pool.install(work)
    }

    /// Clips copies of the tensors on the CPU and on a GPU: the chosen one if there is one.
    #[cfg(feature = "gpu")]
    pub(crate) fn verify(&self, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<gradclip::Verification, Failure> {
        if let Some(name) = float64(tensors) {
            return Err(Failure::Setup(format!(
                "tensor {name:?} is float64, which no GPU can clip; leave out --verify"
            )));
        }
        let gpu = self.adapter.as_ref().map_or_else(|| GpuClipper::open().wait(), |adapter| Ok(adapter.gpu.clone()))?;
        Ok(self.pool.install(|| gradclip::verify(clip, tensors, &gpu).wait())?)
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.adapter {
            Some(adapter) => write!(f, "GPU {}", adapter.description),
            None => write!(f, "CPU, {}", plural(self.pool.current_num_threads() as u64, "thread")),
        }
    }
}

/// The number of threads to start, and a remark if more were asked for. 0 leaves the number to rayon: one per core.
fn threads(asked: Option<NonZeroUsize>) -> (usize, Option<String>) {
    let by_environment = || std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok();
    let asked = asked.map(NonZeroUsize::get).or_else(by_environment).unwrap_or(0);
    let most = THREADS_PER_CORE * available_parallelism().map_or(1, NonZeroUsize::get);
    let fewer =
        || format!("{} for {asked}: no more than {THREADS_PER_CORE} for each core", plural(most as u64, "thread"));
    (asked.min(most), (asked > most).then(fewer))
}

/// The name of the first float64 tensor. No GPU can clip it.
#[cfg(feature = "gpu")]
fn float64(tensors: &[Tensor<'_>]) -> Option<String> {
    let tensor = tensors.iter().find(|tensor| tensor.dtype() == Dtype::F64)?;
    Some(tensor.name().unwrap_or_default().to_owned())
}

/// Opens a GPU that was asked for, software or not.
#[cfg(feature = "gpu")]
fn open(named: Option<&str>, tensors: &[Tensor<'_>], local_rank: Option<u32>) -> Result<Adapter, Failure> {
    if let Some(name) = float64(tensors) {
        // The library would return the same error, but only after a copy.
        let tensor = format!("tensor {name:?}");
        return Err(gradclip::Error::UnsupportedDtype { tensor, dtype: Dtype::F64 }.into());
    }
    Ok(Adapter::new(&open_gpu(named, local_rank)?))
}

/// Opens the named GPU, or the fastest. If this process is a rank, the ranks on its machine take turns at all such GPUs.
#[cfg(feature = "gpu")]
pub(crate) fn open_gpu(named: Option<&str>, local_rank: Option<u32>) -> Result<GpuClipper, gradclip::Error> {
    if let Some(rank) = local_rank {
        let found = adapters().wait();
        let infos: Vec<_> = found.iter().map(wgpu::Adapter::get_info).collect();
        if let Some(own) = own_adapter(&infos, named, rank) {
            return GpuClipper::open_on(&found[own]).wait();
        }
    }
    named.map_or_else(|| GpuClipper::open().wait(), |name| GpuClipper::open_named(name).wait())
}

/// The adapter of a rank, by its number among the ranks of its machine: they take turns at the adapters with this name (or
/// all) that are of the fastest kind and have one graphics API, since a GPU is listed once for each.
#[cfg(feature = "gpu")]
fn own_adapter(found: &[wgpu::AdapterInfo], named: Option<&str>, local_rank: u32) -> Option<usize> {
    use wgpu::DeviceType as Kind;
    let name = named.unwrap_or_default().to_lowercase();
    let speed = |i: &usize| match found[*i].device_type {
        Kind::DiscreteGpu => 0,
        Kind::IntegratedGpu => 1,
        Kind::VirtualGpu => 2,
        Kind::Other => 3,
        Kind::Cpu => 4,
    };
    let mut fitting: Vec<_> = (0..found.len()).filter(|&i| found[i].name.to_lowercase().contains(&name)).collect();
    let first = *fitting.iter().min_by_key(|i| speed(i))?;
    let kind = |i: usize| (found[i].device_type, found[i].backend);
    fitting.retain(|&i| kind(i) == kind(first));
    Some(fitting[local_rank as usize % fitting.len()])
}

/// Opens a hardware GPU that can clip these tensors, or returns why there is none.
#[cfg(feature = "gpu")]
fn hardware(tensors: &[Tensor<'_>], args: &BackendArgs) -> Result<Adapter, String> {
    if let Some(name) = float64(tensors) {
        return Err(format!("tensor {name:?} is float64, which GPUs do not support"));
    }
    let software = |info: &wgpu::AdapterInfo| info.device_type == wgpu::DeviceType::Cpu;
    let only_software = |info: &wgpu::AdapterInfo| format!("no GPU found (only the software device {})", info.name);
    let found: Vec<_> = adapters().wait().iter().map(wgpu::Adapter::get_info).collect();
    let first = found.first().ok_or("no GPU found")?;
    // Listing adapters is much quicker than opening a device.
    if found.iter().all(software) {
        return Err(only_software(first));
    }
    let gpu = open_gpu(None, args.local_rank).map_err(|error| format!("the GPU cannot be used ({error})"))?;
    let info = gpu.device().adapter_info();
    if software(&info) {
        return Err(only_software(&info));
    }
    // A broken file is told where the tuning is taken.
    let found = if args.no_tuning { None } else { tuning::kept(&info).ok() };
    let bytes = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    match found.and_then(|found| too_few(bytes, found.host_from)) {
        Some(why) if !tensors.is_empty() => Err(why),
        _ => Ok(Adapter::new(&gpu)),
    }
}

/// Why so many bytes in host memory are better clipped on the CPU, by what `gradclip tune --host` has measured.
#[cfg(feature = "gpu")]
fn too_few(bytes: u64, host_from: Option<u64>) -> Option<String> {
    let told = |when: &str| format!("on this machine the GPU pays {when} for tensors in files (gradclip tune --host)");
    match host_from? {
        tuning::NEVER => Some(told("at no size")),
        from if bytes < from => Some(told(&format!("from {} MiB on", from >> 20))),
        _ => None,
    }
}

/// How long a first clip takes, from its plan to the end of its step: mostly the time of compiling its kernels.
#[cfg(feature = "gpu")]
pub(crate) fn first_plan(gpu: &GpuClipper) -> Result<Duration, Failure> {
    const LEN: u64 = 4096;
    let (device, queue) = (gpu.device(), gpu.queue());
    let gradients = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("gradients of a first plan"),
        size: 4 * LEN,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    queue.write_buffer(&gradients, 0, &[0x3f; 4 * LEN as usize]);
    let start = Instant::now();
    let plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&gradients, 0..LEN)?])?;
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    plan.encode(&mut encoder)?;
    queue.submit([encoder.finish()]);
    plan.report().wait()?;
    Ok(start.elapsed())
}

/// A GPU with the tuning that was kept for it, if there is one.
#[cfg(feature = "gpu")]
pub(crate) fn tuned(gpu: &GpuClipper) -> Result<Option<GpuClipper>, Failure> {
    let kept = tuning::kept(&gpu.device().adapter_info())?;
    Ok(kept.tuning.map(|kept| gpu.with_tuning(kept)).transpose()?)
}

#[cfg(feature = "gpu")]
impl Adapter {
    fn new(gpu: &GpuClipper) -> Self {
        let info = gpu.device().adapter_info();
        let software = if info.device_type == wgpu::DeviceType::Cpu { ", software" } else { "" };
        let description = format!("{} ({:?}{software})", info.name, info.backend);
        Self { name: info.name, description, gpu: tuning::with_pipelines(gpu) }
    }

    /// Takes the tuning that was kept for this GPU.
    fn tuned(mut self) -> Result<Self, Failure> {
        if let Some(gpu) = tuned(&self.gpu)? {
            self.gpu = gpu;
            self.description += ", tuned by gradclip tune";
        }
        Ok(self)
    }
}

#[cfg(feature = "gpu")]
impl Drop for Adapter {
    fn drop(&mut self) {
        tuning::keep_pipelines(&self.gpu);
    }
}

#[cfg(not(feature = "gpu"))]
fn open(_named: Option<&str>, _tensors: &[Tensor<'_>], _local_rank: Option<u32>) -> Result<Adapter, Failure> {
    Err(Failure::BuiltWithoutGpu)
}

#[cfg(not(feature = "gpu"))]
fn hardware(_tensors: &[Tensor<'_>], _args: &BackendArgs) -> Result<Adapter, String> {
    Err("this program was built without GPU support".into())
}

#[cfg(all(test, feature = "gpu"))]
mod tests {
    use wgpu::{AdapterInfo, Backend, DeviceType};

    use super::*;

    #[test]
    fn few_bytes_stay_on_the_cpu_once_that_was_measured() {
        assert_eq!((too_few(0, None), too_few(16 << 20, Some(16 << 20))), (None, None));
        assert!(too_few((16 << 20) - 1, Some(16 << 20)).is_some_and(|why| why.contains("from 16 MiB on")));
        assert!(too_few(u64::MAX >> 1, Some(tuning::NEVER)).is_some_and(|why| why.contains("at no size")));
    }

    #[test]
    fn ranks_take_turns_at_the_gpus_of_their_machine() {
        let adapter = |name: &str, kind, backend| AdapterInfo { name: name.into(), ..AdapterInfo::new(kind, backend) };
        let (software, small, large) = (DeviceType::Cpu, DeviceType::IntegratedGpu, DeviceType::DiscreteGpu);
        let found = [
            adapter("Graphics", small, Backend::Vulkan),
            adapter("Card A", large, Backend::Vulkan),
            adapter("Card B", large, Backend::Vulkan),
            adapter("llvmpipe", software, Backend::Vulkan),
            adapter("Card A", large, Backend::Gl),
        ];
        let turns = |count: usize, name| [0, 1, 2, 3].map(|rank| own_adapter(&found[..count], name, rank));
        assert_eq!(turns(5, None), [1, 2, 1, 2].map(Some));
        assert_eq!(turns(5, Some("card b")), [Some(2); 4]);
        assert_eq!(turns(5, Some("card")), [1, 2, 1, 2].map(Some));
        assert_eq!(turns(5, Some("LLVM")), [Some(3); 4]);
        assert_eq!(turns(1, None), [Some(0); 4]);
        assert_eq!((turns(0, None), turns(5, Some("other"))), ([None; 4], [None; 4]));
    }
}

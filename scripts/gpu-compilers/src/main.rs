//! `count-kernels FOLDER [LISTINGS]`: compiles every kernel in a folder with the compiler of the first Vulkan device, which need not
//! be able to run anything, and prints a row for each hot one, ordered by name. It fails if a kernel is refused, or if one
//! spills registers into memory. The assembly of hot kernels goes to the folder LISTINGS, as NAME.s.
//!
//! A kernel is two files: `NAME.spv`, and `NAME.bindings`, a line `GROUP BINDING KIND COUNT` for each binding. The first
//! line is `hot` if the kernel gets a row.

use std::error::Error;
use std::ffi::CStr;
use std::path::{Path, PathBuf};

use ash::vk;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("usage: count-kernels FOLDER [LISTINGS]")?;
    let listings = std::env::args_os().nth(2).map(PathBuf::from);
    let mut kernels: Vec<PathBuf> = std::fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .filter(|path| path.as_ref().map_or(true, |path| path.extension().is_some_and(|e| e == "spv")))
        .collect::<Result<_, _>>()?;
    kernels.sort();
    let compiler = Compiler::open()?;
    let threads = std::thread::available_parallelism()?.get();
    // Each thread takes every n-th kernel: kernels that are alike stand beside each other.
    let of_thread = |first: usize| {
        kernels.iter().skip(first).step_by(threads).map(|k| row(&compiler, k, listings.as_deref())).collect()
    };
    let rows: Vec<Vec<_>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|first| scope.spawn(move || of_thread(first))).collect();
        running.into_iter().map(|thread| thread.join().expect("a thread that compiles does not panic")).collect()
    });
    let (mut table, mut bad) = (Vec::new(), Vec::new());
    for row in rows.into_iter().flatten() {
        match row {
            Ok(row) => table.extend(row),
            Err(error) => bad.push(error),
        }
    }
    table.sort_by(|(_, a), (_, b)| a.cmp(b));
    println!("VGPRs waves  LDS instructions loads latency kernel");
    for (counts, name) in table {
        println!("{counts} {name}");
    }
    eprintln!("amd: {} kernels compiled, {} spill or are refused", kernels.len(), bad.len());
    if kernels.is_empty() || !bad.is_empty() {
        return Err(format!("{} kernels are bad:\n{}", bad.len(), bad.join("\n")).into());
    }
    Ok(())
}

/// The counts and the name of a kernel, if it is hot; an error if it is refused or spills.
fn row(compiler: &Compiler, file: &Path, listings: Option<&Path>) -> Result<Option<(Counts, String)>, String> {
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let compiled = || -> Result<(Counts, bool), Box<dyn Error>> {
        let Kernel { hot, bindings } = Kernel::read(&file.with_extension("bindings"))?;
        let words = ash::util::read_spv(&mut std::fs::File::open(file)?)?;
        let (counts, assembly) = compiler.compile(&words, &bindings, hot)?;
        if let (Some(folder), true) = (listings, hot) {
            std::fs::write(folder.join(format!("{name}.s")), assembly)?;
        }
        Ok((counts, hot))
    };
    match compiled() {
        Err(error) => Err(format!("{name}: {error}")),
        Ok((counts, _)) if counts.spilled > 0 => Err(format!("{name}: it spills registers")),
        Ok((counts, hot)) => Ok(hot.then_some((counts, name))),
    }
}

struct Binding {
    group: usize,
    binding: u32,
    kind: vk::DescriptorType,
    count: u32,
}

struct Kernel {
    hot: bool,
    bindings: Vec<Binding>,
}

impl Kernel {
    fn read(path: &Path) -> Result<Self, Box<dyn Error>> {
        let text = std::fs::read_to_string(path)?;
        let hot = text.starts_with("hot\n");
        let bindings = text.lines().skip(usize::from(hot)).map(|line| {
            let [group, binding, kind, count] = line.split(' ').collect::<Vec<_>>()[..] else {
                return Err(format!("{}: {line}", path.display()).into());
            };
            let kind = match kind {
                "uniform" => vk::DescriptorType::UNIFORM_BUFFER,
                _ => vk::DescriptorType::STORAGE_BUFFER,
            };
            Ok(Binding { group: group.parse()?, binding: binding.parse()?, kind, count: count.parse()? })
        });
        Ok(Self { hot, bindings: bindings.collect::<Result<_, Box<dyn Error>>>()? })
    }
}

/// What the compiler says of a kernel.
#[derive(Default)]
struct Counts {
    vgprs: u64,
    /// How many subgroups a SIMD holds at once.
    waves: u64,
    /// Bytes of workgroup memory.
    lds: u64,
    instructions: u64,
    /// Registers and bytes that did not fit.
    spilled: u64,
    /// The compiler's own estimate, in cycles.
    latency: u64,
    /// The most loads of 16 bytes that are issued without a wait for memory between them.
    loads: usize,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vgprs, waves, lds, instructions, loads, latency, .. } = self;
        write!(f, "{vgprs:5} {waves:5} {lds:4} {instructions:12} {loads:5} {latency:7}")
    }
}

/// A device that compiles. The process ends with it, so nothing is destroyed.
struct Compiler {
    device: ash::Device,
    statistics: ash::khr::pipeline_executable_properties::Device,
    // Keeps the library loaded.
    _entry: ash::Entry,
}

impl Compiler {
    /// With the features that wgpu asks for where they change what is compiled.
    fn open() -> Result<Self, Box<dyn Error>> {
        // SAFETY: every structure below outlives the call that it is given to, and every handle is of this instance.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let instance =
                entry.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)?;
            let physical = *instance.enumerate_physical_devices()?.first().ok_or("no Vulkan device")?;
            let mut supported12 = vk::PhysicalDeviceVulkan12Features::default();
            let mut supported = vk::PhysicalDeviceFeatures2::default().push_next(&mut supported12);
            instance.get_physical_device_features2(physical, &mut supported);
            let arrays = supported.features.shader_storage_buffer_array_dynamic_indexing;

            let mut executables =
                vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
            let mut robust = vk::PhysicalDeviceRobustness2FeaturesEXT::default().robust_buffer_access2(true);
            let mut wanted12 = vk::PhysicalDeviceVulkan12Features::default()
                .descriptor_indexing(true)
                .shader_storage_buffer_array_non_uniform_indexing(true)
                .vulkan_memory_model(true);
            let wanted = vk::PhysicalDeviceFeatures::default()
                .robust_buffer_access(true)
                .shader_storage_buffer_array_dynamic_indexing(arrays == vk::TRUE);
            let queue = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
            let extensions = [c"VK_KHR_pipeline_executable_properties".as_ptr(), c"VK_EXT_robustness2".as_ptr()];
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queue)
                .enabled_extension_names(&extensions)
                .enabled_features(&wanted)
                .push_next(&mut executables)
                .push_next(&mut robust)
                .push_next(&mut wanted12);
            let device = instance.create_device(physical, &info, None)?;
            let statistics = ash::khr::pipeline_executable_properties::Device::new(&instance, &device);
            Ok(Self { device, statistics, _entry: entry })
        }
    }

    fn compile(
        &self,
        words: &[u32],
        bindings: &[Binding],
        with_assembly: bool,
    ) -> Result<(Counts, String), Box<dyn Error>> {
        // SAFETY: as in `open`; the layouts have every binding that the module has.
        unsafe {
            let groups = bindings.iter().map(|b| b.group + 1).max().unwrap_or(0);
            let mut layouts = Vec::new();
            for group in 0..groups {
                let own = bindings.iter().filter(|b| b.group == group);
                let entries: Vec<_> = own
                    .map(|b| {
                        vk::DescriptorSetLayoutBinding::default()
                            .binding(b.binding)
                            .descriptor_type(b.kind)
                            .descriptor_count(b.count)
                            .stage_flags(vk::ShaderStageFlags::COMPUTE)
                    })
                    .collect();
                let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&entries);
                layouts.push(self.device.create_descriptor_set_layout(&info, None)?);
            }
            let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&layouts);
            let layout = self.device.create_pipeline_layout(&info, None)?;
            let module = self.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(words), None)?;
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(c"main");
            let mut flags = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR;
            if with_assembly {
                flags |= vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
            }
            let info = vk::ComputePipelineCreateInfo::default().flags(flags).stage(stage).layout(layout);
            let pipelines = self.device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None);
            let pipeline = pipelines.map_err(|(_, error)| error)?[0];
            let info = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline);
            let mut counts = Counts::default();
            for statistic in self.statistics.get_pipeline_executable_statistics(&info)? {
                let value = statistic.value.u64;
                match text(&statistic.name).as_ref() {
                    "VGPRs" => counts.vgprs = value,
                    "Subgroups per SIMD" => counts.waves = value,
                    "LDS size" => counts.lds = value,
                    "Instructions" => counts.instructions = value,
                    "Latency" => counts.latency = value,
                    "Spilled SGPRs" | "Spilled VGPRs" | "Scratch size" => counts.spilled += value,
                    _ => {}
                }
            }
            let assembly = if with_assembly { self.assembly(&info)? } else { String::new() };
            counts.loads = loads_at_once(&assembly);
            self.device.destroy_pipeline(pipeline, None);
            Ok((counts, assembly))
        }
    }

    /// # Safety
    /// `info` names a pipeline of this device that was compiled with its representations.
    unsafe fn assembly(&self, info: &vk::PipelineExecutableInfoKHR<'_>) -> Result<String, Box<dyn Error>> {
        let get = self.statistics.fp().get_pipeline_executable_internal_representations_khr;
        let device = self.device.handle();
        let mut count = 0;
        // SAFETY: the first call counts, the second tells sizes, the third fills buffers of these sizes.
        unsafe {
            get(device, info, &mut count, std::ptr::null_mut()).result()?;
            let mut all = vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
            get(device, info, &mut count, all.as_mut_ptr()).result()?;
            let mut texts: Vec<_> = all.iter().map(|one| vec![0_u8; one.data_size]).collect();
            for (one, text) in all.iter_mut().zip(&mut texts) {
                one.p_data = text.as_mut_ptr().cast();
            }
            get(device, info, &mut count, all.as_mut_ptr()).result()?;
            let found = all.iter().zip(texts).find(|(one, _)| text(&one.name).contains("Assembly"));
            let (_, assembly) = found.ok_or("the driver gives no assembly")?;
            Ok(String::from_utf8_lossy(&assembly).into_owned())
        }
    }
}

fn text(name: &[std::ffi::c_char]) -> std::borrow::Cow<'_, str> {
    // SAFETY: Vulkan ends its names with a zero.
    unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy()
}

/// The most loads of 16 bytes in AMD's assembly between two waits for vector memory.
fn loads_at_once(assembly: &str) -> usize {
    let (mut most, mut now) = (0, 0);
    for line in assembly.lines() {
        if line.contains("s_waitcnt") && line.contains("vmcnt") {
            now = 0;
        } else if line.contains("buffer_load") && (line.contains("b128") || line.contains("dwordx4")) {
            now += 1;
            most = most.max(now);
        }
    }
    most
}

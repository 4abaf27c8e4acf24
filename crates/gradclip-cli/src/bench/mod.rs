//! `gradclip bench`: the throughput of clips, beside the device's copy speed.

mod case;
#[cfg(feature = "gpu")]
mod gpu_timer;
mod gradients;
mod timer;

use gradclip::Dtype;
use gradclip_common::text::{number, size_label, table};
use gradclip_common::throughput::{self, CASES, Row};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::args::BenchArgs;
use crate::backend::Backend;
#[cfg(feature = "gpu")]
use crate::backend::first_plan;
use crate::description::refuse;
use crate::failure::Failure;
use crate::output;
use crate::print::{print, print_json, remark};
use crate::progress;
use crate::values::Cut;
use case::Measurement;
#[cfg(feature = "gpu")]
use gpu_timer::{GpuTimer, gpu_speeds};
use gradients::{Pattern, TensorSet};
#[cfg(feature = "gpu")]
pub(crate) use timer::median;
use timer::{Bandwidth, CpuTimer, PassTime, cpu_bandwidth};

/// The fields of `--json`.
#[derive(Serialize)]
struct Json<'a> {
    adapter: Option<&'a str>,
    backend: &'static str,
    copy_gb_s: f64,
    read_gb_s: f64,
    /// The first plan of all, from its beginning to the end of its first step.
    first_plan_seconds: Option<f64>,
    rows: &'a [Row],
}

/// The device to run on.
struct BenchDevice<'a> {
    backend: &'a Backend,
    bandwidth: Bandwidth,
    #[cfg(feature = "gpu")]
    speeds: Option<gradclip::gpu::Speeds>,
    first_plan_seconds: Option<f64>,
    /// Whether steps are timed by the device's own clock.
    device_clock: bool,
}

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    if let Some(plot) = &args.plot.out {
        output::check(std::slice::from_ref(plot), std::iter::empty(), args.plot.force)?;
    }
    let backend = Backend::choose(&args.backend, &[])?;
    refuse(&[(
        args.host_clock && backend.adapter().is_none(),
        "--host-clock is for a GPU: the CPU has no other clock",
    )])?;
    if !args.json {
        backend.explain("measuring");
    }
    let dtypes = if args.dtype.is_empty() { vec![Dtype::F32, Dtype::F16, Dtype::BF16] } else { args.dtype.clone() };
    // Before anything is measured, so that an error comes at once.
    let sets = sets(&backend, args, &dtypes)?;
    let spinner = progress::spinner("measuring copy and read speed", args.json);
    let device = BenchDevice::new(&backend, args.host_clock)?;
    drop(spinner);
    if backend.adapter().is_some() && !device.device_clock {
        let why = if args.host_clock { "by --host-clock" } else { "the device has no timestamps" };
        remark(&format!("timed by the host's clock ({why}): recording, submitting and waiting included"));
    }
    if !args.json {
        print(&device.head())?;
    }

    let bar = progress::count((dtypes.len() * sets.len() * CASES.len()) as u64, "measuring", args.json);
    let mut rows: Vec<Row> = Vec::new();
    let mut passes = String::new();
    let most = sets.iter().map(|set| set.elements).max().unwrap_or_default();
    for dtype in dtypes {
        let pattern = Pattern::new(dtype);
        // The least number of bytes that could not be allocated.
        let mut too_large = u64::MAX;
        for set in &sets {
            let bytes = set.span * dtype.size() as u64;
            if bytes >= too_large {
                continue;
            }
            match device.bench(&pattern, set, args, &bar) {
                Ok((found, times)) => {
                    if !args.json {
                        bar.suspend(|| print(&found.iter().map(line).collect::<String>()))?;
                    }
                    rows.extend(found);
                    // Only the largest: the small ones are many, and alike.
                    if set.elements >= most / 2 {
                        passes += &device.passes(dtype, set, &times);
                    }
                }
                // Without --sizes the sizes grow until memory runs out, which only an attempt shows.
                Err(Failure::Library(gradclip::Error::OutOfMemory(_))) if args.sizes.is_empty() && !rows.is_empty() => {
                    let why = format!("no memory for {} elements of {dtype}: left out", size_label(set.elements));
                    bar.suspend(|| remark(&why));
                    too_large = bytes;
                }
                Err(error) => return Err(error),
            }
        }
    }
    bar.finish_and_clear();

    if let Some(path) = &args.plot.out {
        let limits = (device.bandwidth.copy / 1e9, Some(device.bandwidth.read / 1e9));
        let drawing = throughput::draw(&format!("Throughput of gradclip on {backend}"), &rows, limits);
        output::write_file(drawing.as_bytes(), path, args.plot.force)?;
    }
    if args.json {
        return print_json(&Json {
            adapter: backend.adapter(),
            backend: if backend.adapter().is_some() { "gpu" } else { "cpu" },
            copy_gb_s: device.bandwidth.copy / 1e9,
            read_gb_s: device.bandwidth.read / 1e9,
            first_plan_seconds: device.first_plan_seconds,
            rows: &rows,
        });
    }
    if !passes.is_empty() {
        let title = "passes of a clipped step";
        let [bytes, time, speed, copy, step] = ["bytes", "time", "GB/s", "of copy", "of step"];
        print(&format!("\n{title:<38} {bytes:>9} {time:>9} {speed:>7} {copy:>7} {step:>7}\n{passes}"))?;
    }
    match &args.plot.out {
        Some(path) => print(&format!("\n{}", table(&[("plot", path.display().to_string())]))),
        None => Ok(()),
    }
}

/// How fast a GPU copies, in bytes a second, and how that was measured.
#[cfg(feature = "gpu")]
pub(crate) fn copy_speed(gpu: &gradclip::gpu::GpuClipper) -> Result<(f64, String), Failure> {
    let bandwidth = Bandwidth::of_gpu(&gpu_speeds(gpu)?);
    Ok((bandwidth.copy, bandwidth.method))
}

/// Above this, a sweep on a CPU or a software device would take many minutes.
const SOFTWARE_SWEEP: u64 = 4 * (64 << 20);

/// How many bytes one buffer may have, and how many the largest default size has.
fn room(backend: &Backend) -> (u64, u64) {
    let quarter = available_memory().map_or(2 << 30, |bytes| bytes / 4);
    #[cfg(feature = "gpu")]
    if let Some(gpu) = backend.gpu() {
        use gradclip::wgpu::DeviceType;
        let largest = gpu.device().limits().max_buffer_size;
        let sweep = match gpu.device().adapter_info().device_type {
            DeviceType::Cpu => quarter.min(SOFTWARE_SWEEP),
            // It has memory of its own, and only an attempt shows how much.
            DeviceType::DiscreteGpu => largest,
            _ => quarter,
        };
        return (largest, sweep.min(largest));
    }
    let _ = backend;
    (available_memory().unwrap_or(isize::MAX as u64), quarter.min(SOFTWARE_SWEEP))
}

/// The sets of tensors that are clipped, for each dtype.
fn sets(backend: &Backend, args: &BenchArgs, dtypes: &[Dtype]) -> Result<Vec<TensorSet>, Failure> {
    let (largest, sweep) = room(backend);
    let mut sizes = args.sizes.clone();
    if sizes.is_empty() {
        // The same for all dtypes.
        sizes.extend((5..25).map(|power| 1 << (2 * power)).take_while(|size| *size <= sweep / 4));
    }
    let mut sets = Vec::new();
    for size in &sizes {
        let label = size_label(*size);
        let few = || Failure::Usage(format!("{label} elements are too few for so many tensors: raise --sizes"));
        let set = TensorSet::new(args.tensors.unwrap_or(Cut::One), *size).ok_or_else(few)?;
        let bytes = dtypes.iter().map(|dtype| set.span * dtype.size() as u64).max().unwrap_or_default();
        if bytes > largest {
            let holder = backend.adapter().map_or("this memory".into(), |name| format!("a buffer of {name}"));
            let (bytes, largest) = (bytes >> 20, largest >> 20);
            return Err(Failure::Setup(format!(
                "{label} elements take {bytes} MiB, and {holder} holds at most {largest} MiB; try smaller --sizes"
            )));
        }
        sets.push(set);
    }
    if args.tensors.is_none() {
        let most = sizes.iter().copied().max().unwrap_or_default();
        // Smaller ones would be tensors of a few elements.
        sets.extend(TensorSet::new(Cut::Transformer, most).filter(|_| most >= 1 << 18));
    }
    Ok(sets)
}

impl<'a> BenchDevice<'a> {
    fn new(backend: &'a Backend, host_clock: bool) -> Result<Self, Failure> {
        #[cfg(feature = "gpu")]
        if let Some(gpu) = backend.gpu() {
            let first_plan_seconds = Some(first_plan(gpu)?.as_secs_f64());
            let speeds = gpu_speeds(gpu)?;
            let bandwidth = Bandwidth::of_gpu(&speeds);
            let device_clock = speeds.device_clock && !host_clock;
            return Ok(Self { backend, bandwidth, speeds: Some(speeds), first_plan_seconds, device_clock });
        }
        let _ = host_clock;
        Ok(Self {
            backend,
            bandwidth: cpu_bandwidth(backend)?,
            #[cfg(feature = "gpu")]
            speeds: None,
            first_plan_seconds: None,
            device_clock: false,
        })
    }

    fn head(&self) -> String {
        let Bandwidth { copy, read, method } = &self.bandwidth;
        let speeds = format!("copy {} GB/s, read {} GB/s ({method})", number(copy / 1e9, 3), number(read / 1e9, 3));
        let clock = if self.device_clock { "the device's timestamps" } else { "the host's clock" };
        let mut lines = vec![("ran on", self.backend.to_string()), ("clock", clock.into()), ("speeds", speeds)];
        lines.extend(self.first_plan_seconds.map(|seconds| ("first plan", time(seconds))));
        let columns = format!(
            "{:<8} {:>10} {:>7}  {:<9} {:>9} {:>9} {:>5} {:>7} {:>7}\n",
            "dtype", "elements", "tensors", "case", "median", "least", "runs", "GB/s", "of copy"
        );
        format!("{}\n{columns}", table(&lines))
    }

    /// A line for each pass of a step.
    fn passes(&self, dtype: Dtype, set: &TensorSet, passes: &[PassTime]) -> String {
        let line = |pass: &PassTime| {
            let (mut speed, mut of_copy) = (String::new(), String::new());
            if pass.bytes > 0 {
                let bytes_a_second = pass.bytes as f64 / pass.seconds;
                speed = fixed(bytes_a_second / 1e9);
                of_copy = format!("{:.2}", bytes_a_second / self.bandwidth.copy);
            }
            format!(
                "{:<8} {:>10} {:>7}  {:<9} {:>9} {:>9} {speed:>7} {of_copy:>7} {:>6.0}%\n",
                dtype.to_string(),
                size_label(set.elements),
                set.tensors.len(),
                pass.name,
                size_label(pass.bytes),
                time(pass.seconds),
                100.0 * pass.share,
            )
        };
        let slow = passes.iter().find(|pass| pass.holds_back);
        let told = slow.map(|pass| format!("{:<29}held back by {}\n", "", pass.name));
        passes.iter().map(line).chain(told).collect()
    }

    fn bench(
        &self,
        pattern: &Pattern,
        set: &TensorSet,
        args: &BenchArgs,
        bar: &ProgressBar,
    ) -> Result<(Vec<Row>, Vec<PassTime>), Failure> {
        let (bandwidth, device) = (&self.bandwidth, self.backend.to_string());
        let tolerance = if self.backend.adapter().is_some() { 1e-6 } else { 1e-7 };
        let measurement = Measurement { pattern, set, bandwidth, device, tolerance, seconds: args.seconds };
        let clips = measurement.clips();
        #[cfg(feature = "gpu")]
        if let (Some(gpu), Some(speeds)) = (self.backend.gpu(), &self.speeds) {
            let mut timer = GpuTimer::new(gpu, pattern, set, &clips, speeds, !self.device_clock)?;
            return measurement.run(&mut timer, !args.json, bar);
        }
        measurement.run(&mut CpuTimer::new(self.backend, pattern, set, clips)?, !args.json, bar)
    }
}

/// A line of the table.
fn line(row: &Row) -> String {
    format!(
        "{:<8} {:>10} {:>7}  {:<9} {:>9} {:>9} {:>5} {:>7} {:>7.2}\n",
        row.dtype.to_string(),
        size_label(row.elements),
        row.tensors,
        row.case.name(),
        time(row.seconds),
        time(row.seconds_min),
        row.runs,
        fixed(row.gb_s),
        row.of_copy,
    )
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{} us", fixed(s * 1e6)),
        s if s < 1.0 => format!("{} ms", fixed(s * 1e3)),
        s => format!("{} s", fixed(s)),
    }
}

/// Three digits, trailing zeros included, so that columns align.
fn fixed(x: f64) -> String {
    match x {
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 100.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}

/// The memory that is available without swapping, if the system reports it.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

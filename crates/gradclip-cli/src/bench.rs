//! `gradclip bench`: the throughput of clips, against the machine's own copy speed.

use std::time::Instant;

use gradclip::{Clip, Dtype};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::args::{BenchArgs, refuse};
use crate::backend::Backend;
use crate::contender::{Contender, Limits, OnCpu, Part, cpu_limits, median};
use crate::failure::Failure;
use crate::output;
use crate::progress;
use crate::report::{number, print, print_json, remark, table};
use crate::subject::{BOUND, Cut, Pattern, Set, size_label};
use crate::throughput;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Case {
    /// Measured only.
    Norm,
    /// A clip that finds nothing to do.
    Unclipped,
    Clipped,
    Value,
}

pub(crate) const CASES: [Case; 4] = [Case::Norm, Case::Unclipped, Case::Clipped, Case::Value];

/// Where [`Case::Clipped`] is in [`CASES`].
const CLIPPED: usize = 2;

impl Case {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::Unclipped => "unclipped",
            Self::Clipped => "clipped",
            Self::Value => "value",
        }
    }

    /// How often each byte must be read or written.
    fn moves(self) -> u64 {
        match self {
            Self::Norm | Self::Unclipped => 1,
            Self::Clipped => 3,
            Self::Value => 2,
        }
    }

    fn writes(self) -> bool {
        matches!(self, Self::Clipped | Self::Value)
    }

    fn clip(self, norm: f64) -> Clip {
        match self {
            Self::Norm => Clip::norm(f64::INFINITY),
            Self::Unclipped => Clip::norm(2.0 * norm),
            Self::Clipped => Clip::norm(norm / 2.0).eps(0.0),
            Self::Value => Clip::value(BOUND),
        }
    }
}

/// One line of the outcome.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    #[serde(serialize_with = "as_text")]
    pub(crate) dtype: Dtype,
    pub(crate) elements: u64,
    pub(crate) tensors: usize,
    pub(crate) case: Case,
    seconds: f64,
    seconds_min: f64,
    runs: usize,
    pub(crate) gb_s: f64,
    of_copy: f64,
}

fn as_text<S: serde::Serializer>(dtype: &Dtype, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(dtype)
}

/// The fields of `--json`.
#[derive(Serialize)]
struct Json<'a> {
    adapter: Option<&'a str>,
    backend: &'static str,
    copy_gb_s: f64,
    read_gb_s: f64,
    rows: &'a [Row],
}

/// Where to run, and what it can hold.
struct Machine<'a> {
    backend: &'a Backend,
    limits: Limits,
    /// Whether the device's own clock tells the time.
    device_clock: bool,
}

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    if let Some(plot) = &args.plot.out {
        output::check(std::slice::from_ref(plot), std::iter::empty(), args.plot.force)?;
    }
    let backend = Backend::choose(&args.backend, &[])?;
    refuse(&[(args.host_clock && backend.adapter().is_none(), "--host-clock is for a GPU: the CPU has no other")])?;
    if let Some(why) = backend.fallback.as_ref().filter(|_| !args.json) {
        remark(&format!("{why}: measuring the CPU"));
    }
    let dtypes = if args.dtype.is_empty() { vec![Dtype::F32, Dtype::F16, Dtype::BF16] } else { args.dtype.clone() };
    // Before anything is measured: what cannot be run is told at once.
    let sets = sets(&backend, args, &dtypes)?;
    let spinner = progress::spinner("measuring copy and read speed", args.json);
    let machine = Machine::new(&backend, args.host_clock)?;
    drop(spinner);
    if backend.adapter().is_some() && !machine.device_clock {
        let why = if args.host_clock { "as asked" } else { "the device has no timestamps" };
        remark(&format!("timed by the host's clock ({why}): recording, submitting and waiting included"));
    }
    if !args.json {
        print(&machine.head())?;
    }

    let bar = progress::count((dtypes.len() * sets.len() * CASES.len()) as u64, "measuring", args.json);
    let mut rows: Vec<Row> = Vec::new();
    let mut passes = String::new();
    let most = sets.iter().map(|set| set.elements).max().unwrap_or_default();
    for dtype in dtypes {
        let pattern = Pattern::new(dtype);
        // Bytes that there was no room for.
        let mut room = u64::MAX;
        for set in &sets {
            let bytes = set.span * dtype.size() as u64;
            if bytes >= room {
                continue;
            }
            match machine.bench(&pattern, set, args, &bar) {
                Ok((found, parts)) => {
                    if !args.json {
                        bar.suspend(|| print(&found.iter().map(Row::text).collect::<String>()))?;
                    }
                    rows.extend(found);
                    // Of the largest only: small ones are all alike, and many.
                    if set.elements >= most / 2 {
                        passes += &machine.passes(dtype, set, &parts);
                    }
                }
                // Without --sizes it goes up to what there is room for, which nothing but trying tells.
                Err(Failure::Library(gradclip::Error::OutOfMemory(_))) if args.sizes.is_empty() && !rows.is_empty() => {
                    let why = format!("no memory for {} elements of {dtype}: left out", size_label(set.elements));
                    bar.suspend(|| remark(&why));
                    room = bytes;
                }
                Err(error) => return Err(error),
            }
        }
    }
    bar.finish_and_clear();

    if let Some(path) = &args.plot.out {
        let limits = (machine.limits.copy / 1e9, machine.limits.read / 1e9);
        let drawing = throughput::draw(&format!("Throughput of gradclip on {backend}"), &rows, limits);
        output::write_file(drawing.as_bytes(), path, args.plot.force)?;
    }
    if args.json {
        return print_json(&Json {
            adapter: backend.adapter(),
            backend: if backend.adapter().is_some() { "gpu" } else { "cpu" },
            copy_gb_s: machine.limits.copy / 1e9,
            read_gb_s: machine.limits.read / 1e9,
            rows: &rows,
        });
    }
    if !passes.is_empty() {
        let (median, speed, share) = ("median", "GB/s", "of copy");
        let title = "passes of a clipped step";
        print(&format!("\n{title:<38} {median:>9} {speed:>7} {share:>7}\n{passes}"))?;
    }
    match &args.plot.out {
        Some(path) => print(&format!("\n{}", table(&[("plot", path.display().to_string())]))),
        None => Ok(()),
    }
}

/// Past this, a sweep on a CPU or a software device would take many minutes.
const SOFTWARE_SWEEP: u64 = 4 * (64 << 20);

/// How many bytes one buffer may have, and how many a sweep goes up to by itself.
fn room(backend: &Backend) -> (u64, u64) {
    let quarter = available_memory().map_or(2 << 30, |bytes| bytes / 4);
    #[cfg(feature = "gpu")]
    if let Some(gpu) = backend.gpu() {
        use gradclip::wgpu::DeviceType;
        let largest = gpu.device().limits().max_buffer_size;
        let sweep = match gpu.adapter_info().device_type {
            DeviceType::Cpu => quarter.min(SOFTWARE_SWEEP),
            // It has memory of its own, of which only trying tells the size.
            DeviceType::DiscreteGpu => largest,
            _ => quarter,
        };
        return (largest, sweep.min(largest));
    }
    let _ = backend;
    (available_memory().unwrap_or(isize::MAX as u64), quarter.min(SOFTWARE_SWEEP))
}

/// What is clipped, for each dtype.
fn sets(backend: &Backend, args: &BenchArgs, dtypes: &[Dtype]) -> Result<Vec<Set>, Failure> {
    let (largest, sweep) = room(backend);
    let mut sizes = args.sizes.clone();
    if sizes.is_empty() {
        // Of all dtypes the same.
        sizes.extend((5..25).map(|power| 1 << (2 * power)).take_while(|size| *size <= sweep / 4));
    }
    let mut sets = Vec::new();
    for size in &sizes {
        let label = size_label(*size);
        let few = || Failure::Usage(format!("{label} elements are too few for so many tensors: raise --sizes"));
        let set = Set::new(args.tensors.unwrap_or(Cut::One), *size).ok_or_else(few)?;
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
        sets.extend(Set::new(Cut::Transformer, most).filter(|_| most >= 1 << 18));
    }
    Ok(sets)
}

impl<'a> Machine<'a> {
    fn new(backend: &'a Backend, host_clock: bool) -> Result<Self, Failure> {
        #[cfg(feature = "gpu")]
        if let Some(gpu) = backend.gpu() {
            let (limits, device_clock) = crate::contender::gpu_limits(gpu)?;
            return Ok(Self { backend, limits, device_clock: device_clock && !host_clock });
        }
        let _ = host_clock;
        Ok(Self { backend, limits: cpu_limits(backend)?, device_clock: false })
    }

    fn head(&self) -> String {
        let Limits { copy, read, how } = &self.limits;
        let speeds = format!("copy {} GB/s, read {} GB/s ({how})", number(copy / 1e9, 3), number(read / 1e9, 3));
        let clock = if self.device_clock { "the device's timestamps" } else { "the host's clock" };
        let lines = [("ran on", self.backend.to_string()), ("clock", clock.into()), ("speeds", speeds)];
        let columns = format!(
            "{:<8} {:>10} {:>7}  {:<9} {:>9} {:>9} {:>5} {:>7} {:>7}\n",
            "dtype", "elements", "tensors", "case", "median", "least", "runs", "GB/s", "of copy"
        );
        format!("{}\n{columns}", table(&lines))
    }

    /// A line for each part of a step.
    fn passes(&self, dtype: Dtype, set: &Set, parts: &[Part]) -> String {
        let line = |part: &Part| {
            let text = format!(
                "{:<8} {:>10} {:>7}  {:<9} {:>9}",
                dtype.to_string(),
                size_label(set.elements),
                set.tensors.len(),
                part.name,
                time(part.seconds),
            );
            if part.bytes == 0 {
                return text + "\n";
            }
            let speed = part.bytes as f64 / part.seconds;
            format!("{text} {:>7} {:>7.2}\n", fixed(speed / 1e9), speed / self.limits.copy)
        };
        parts.iter().map(line).collect()
    }

    fn bench(
        &self,
        pattern: &Pattern,
        set: &Set,
        args: &BenchArgs,
        bar: &ProgressBar,
    ) -> Result<(Vec<Row>, Vec<Part>), Failure> {
        let norm = pattern.norm(set, false);
        let clips: Vec<_> = CASES.iter().map(|case| case.clip(norm)).collect();
        #[cfg(feature = "gpu")]
        let mut contender: Box<dyn Contender + '_> = match self.backend.gpu() {
            Some(gpu) => Box::new(crate::contender::OnGpu::new(gpu, pattern, set, &clips, !self.device_clock)?),
            None => Box::new(OnCpu::new(self.backend, pattern, set, clips)?),
        };
        #[cfg(not(feature = "gpu"))]
        let mut contender: Box<dyn Contender + '_> = Box::new(OnCpu::new(self.backend, pattern, set, clips)?);
        let tolerance = if self.backend.adapter().is_some() { 1e-6 } else { 1e-7 };
        contender.restore()?;
        let mut rows = Vec::new();
        for (number, case) in CASES.into_iter().enumerate() {
            let mut seconds = self.time(&mut *contender, (number, case), (pattern, set), tolerance, args.seconds)?;
            let median = median(&mut seconds);
            let bytes = case.moves() * set.elements * pattern.dtype.size() as u64;
            rows.push(Row {
                dtype: pattern.dtype,
                elements: set.elements,
                tensors: set.tensors.len(),
                case,
                seconds: median,
                seconds_min: seconds[0],
                runs: seconds.len(),
                gb_s: bytes as f64 / 1e9 / median,
                of_copy: bytes as f64 / median / self.limits.copy,
            });
            bar.inc(1);
        }
        let parts = if args.json { Vec::new() } else { contender.parts(CLIPPED)? };
        Ok((rows, parts))
    }

    /// The seconds of each run. Every one is checked, and those that write begin with gradients as they were made.
    fn time(
        &self,
        contender: &mut dyn Contender,
        (number, case): (usize, Case),
        (pattern, set): (&Pattern, &Set),
        tolerance: f64,
        budget: f64,
    ) -> Result<Vec<f64>, Failure> {
        let norm = pattern.norm(set, false);
        let mut start = Instant::now();
        let mut seconds = Vec::new();
        for run in 0..=MOST_RUNS {
            let (took, report) = if case == Case::Norm { contender.measure()? } else { contender.apply(number)? };
            if took <= 0.0 {
                return Err(Failure::Setup("the clock of this device stands still: use --host-clock".into()));
            }
            if report.clipped != case.writes() {
                return Err(self.wrong(case, "it says the wrong thing of whether anything was clipped"));
            }
            if case != Case::Value {
                self.check(case, "norm", report.total_norm, norm, tolerance)?;
            }
            if case.writes() {
                let left = contender.measure()?.1.total_norm;
                let want = if case == Case::Value { pattern.norm(set, true) } else { norm / 2.0 };
                // Products are rounded once, to 24, 11 or 8 bits.
                let rounding = match pattern.dtype {
                    Dtype::F16 => 2f64.powi(-11),
                    Dtype::BF16 => 2f64.powi(-8),
                    _ => 2f64.powi(-20),
                };
                self.check(case, "norm of what it leaves", left, want, rounding + tolerance)?;
                contender.restore()?;
            }
            if run == 0 {
                // It warmed up, and compiled.
                start = Instant::now();
            } else {
                seconds.push(took);
            }
            if seconds.len() >= LEAST_RUNS && start.elapsed().as_secs_f64() >= budget {
                break;
            }
        }
        Ok(seconds)
    }

    fn check(&self, case: Case, what: &str, got: f64, want: f64, tolerance: f64) -> Result<(), Failure> {
        // A NaN is not within it.
        let within = (got / want - 1.0).abs() <= tolerance;
        if within { Ok(()) } else { Err(self.wrong(case, &format!("the {what} is {got}, not {want}"))) }
    }

    fn wrong(&self, case: Case, what: &str) -> Failure {
        Failure::Setup(format!(
            "wrong answer of {} in the case {}: {what}; try gradclip verify",
            self.backend,
            case.name()
        ))
    }
}

const LEAST_RUNS: usize = 3;
const MOST_RUNS: usize = 1000;

impl Row {
    fn text(&self) -> String {
        format!(
            "{:<8} {:>10} {:>7}  {:<9} {:>9} {:>9} {:>5} {:>7} {:>7.2}\n",
            self.dtype.to_string(),
            size_label(self.elements),
            self.tensors,
            self.case.name(),
            time(self.seconds),
            time(self.seconds_min),
            self.runs,
            fixed(self.gb_s),
            self.of_copy,
        )
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{} us", fixed(s * 1e6)),
        s if s < 1.0 => format!("{} ms", fixed(s * 1e3)),
        s => format!("{} s", fixed(s)),
    }
}

/// Three digits, zeros too, so that columns stand in line.
fn fixed(x: f64) -> String {
    match x {
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 100.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}

/// The memory that can be had without swapping, where the system tells.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

//! [`StepTimer`]: times steps on one set of gradients. Here on the CPU, with the speed at which it copies and reads.

use std::time::Instant;

use gradclip::{Clip, ClipReport, Dtype, Tensor, TensorMut};
use memmap2::MmapMut;
use rayon::prelude::*;

use super::gradients::{Pattern, TensorSet};
use crate::backend::Backend;
use crate::failure::Failure;

/// How many bytes per second the device copies and reads: medians.
#[derive(Clone, Debug)]
pub(super) struct Bandwidth {
    pub(super) copy: f64,
    pub(super) read: f64,
    /// How it was measured.
    pub(super) method: String,
}

/// Gradients, and clips of them by number. Clip 0 only measures.
pub(super) trait StepTimer {
    /// Restores the gradients as they were generated.
    fn restore(&mut self) -> Result<(), Failure>;
    /// Measures the gradients by clip 0 and writes nothing. Returns the seconds that it took, and the report.
    fn measure(&mut self) -> Result<(f64, ClipReport), Failure>;
    /// Clips the gradients. Returns the same.
    fn apply(&mut self, clip: usize) -> Result<(f64, ClipReport), Failure>;
    /// The passes of a step, the median of a few; empty where there is no profiler.
    fn passes(&mut self, _clip: usize) -> Result<Vec<PassTime>, Failure> {
        Ok(Vec::new())
    }
}

/// The time of one pass of a step.
#[derive(Clone, Debug)]
pub(super) struct PassTime {
    pub(super) name: &'static str,
    pub(super) seconds: f64,
    /// The bytes that it must move; 0 for a pass that only reads tables.
    pub(super) bytes: u64,
    /// The share of the step's time, and whether it is what holds the step back.
    pub(super) share: f64,
    pub(super) holds_back: bool,
}

/// Bytes that are copied and read to measure the bandwidth: more than caches hold.
const BANDWIDTH_BYTES: usize = 256 << 20;
/// The first run warms up.
const BANDWIDTH_RUNS: usize = 10;
/// The bytes that a thread takes at a time.
const CHUNK: usize = 1 << 19;

/// Host memory that is aligned to a page, as large arrays of other libraries are.
fn memory(bytes: usize) -> Result<MmapMut, Failure> {
    MmapMut::map_anon(bytes).map_err(|error| {
        Failure::Setup(format!("no memory for {bytes} bytes of gradients ({error}); try smaller --sizes"))
    })
}

/// Measures by plain loops on the threads of the backend.
pub(super) fn cpu_bandwidth(backend: &Backend) -> Result<Bandwidth, Failure> {
    let (mut from, mut to) = (memory(BANDWIDTH_BYTES)?, memory(BANDWIDTH_BYTES)?);
    backend.install(|| from.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| chunk.fill(i as u8 | 1)));
    let copy = |from: &[u8], to: &mut [u8]| {
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    };
    let words = |chunk: &[u8]| chunk.as_chunks().0.iter().fold(0u64, |sum, w| sum.wrapping_add(u64::from_ne_bytes(*w)));
    let read = |of: &[u8]| of.par_chunks(CHUNK).map(words).reduce(|| 0, u64::wrapping_add);
    let (mut copies, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..BANDWIDTH_RUNS {
        let start = Instant::now();
        backend.install(|| copy(&from, &mut to));
        copies.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let sum = backend.install(|| read(&from));
        reads.push(start.elapsed().as_secs_f64());
        if sum != backend.install(|| read(&to)) {
            return Err(Failure::Setup("a plain copy of memory differs from its source".into()));
        }
    }
    let bytes = BANDWIDTH_BYTES as f64;
    let (copy, read) = (2.0 * bytes / median(&mut copies[1..]), bytes / median(&mut reads[1..]));
    Ok(Bandwidth { copy, read, method: format!("{} MiB, plain loops", BANDWIDTH_BYTES >> 20) })
}

/// The median; sorts the values.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}

/// Times steps on the CPU.
pub(super) struct CpuTimer<'a> {
    backend: &'a Backend,
    pattern: &'a Pattern,
    set: &'a TensorSet,
    memory: MmapMut,
    clips: Vec<Clip>,
}

impl<'a> CpuTimer<'a> {
    pub(super) fn new(
        backend: &'a Backend,
        pattern: &'a Pattern,
        set: &'a TensorSet,
        clips: Vec<Clip>,
    ) -> Result<Self, Failure> {
        let memory = memory(set.span as usize * pattern.dtype.size())?;
        Ok(Self { backend, pattern, set, memory, clips })
    }
}

/// The tensors of the set in this memory.
fn tensors<'a>(set: &TensorSet, dtype: Dtype, memory: &'a mut [u8]) -> Result<Vec<TensorMut<'a>>, Failure> {
    let (mut rest, mut at) = (memory, 0);
    let mut found = Vec::new();
    for tensor in &set.tensors {
        let [start, end] = [tensor.start, tensor.end].map(|element| element as usize * dtype.size());
        let (bytes, behind) = std::mem::take(&mut rest)[start - at..].split_at_mut(end - start);
        found.push(TensorMut::from_bytes(dtype, bytes)?);
        (rest, at) = (behind, end);
    }
    Ok(found)
}

impl StepTimer for CpuTimer<'_> {
    fn restore(&mut self) -> Result<(), Failure> {
        let (memory, block) = (&mut self.memory, &self.pattern.bytes);
        self.backend.install(|| {
            memory.par_chunks_mut(block.len()).for_each(|to| to.copy_from_slice(&block[..to.len()]));
        });
        Ok(())
    }

    fn measure(&mut self) -> Result<(f64, ClipReport), Failure> {
        let tensors = tensors(self.set, self.pattern.dtype, &mut self.memory)?;
        let tensors: Vec<Tensor<'_>> = tensors.iter().map(TensorMut::as_tensor).collect();
        let start = Instant::now();
        let report = self.backend.run(|clipper| clipper.measure(&self.clips[0], &tensors))?;
        Ok((start.elapsed().as_secs_f64(), report))
    }

    fn apply(&mut self, clip: usize) -> Result<(f64, ClipReport), Failure> {
        let mut tensors = tensors(self.set, self.pattern.dtype, &mut self.memory)?;
        let start = Instant::now();
        let report = self.backend.run(|clipper| clipper.apply(&self.clips[clip], &mut tensors))?;
        Ok((start.elapsed().as_secs_f64(), report))
    }
}

//! Measures which [`Tuning`] is fastest on a device: [`GpuClipper::tune`].
//!
//! The search changes one number at a time. It compares each row with the best so far, case by case and in turns, so
//! that a device that changes its clock slows both.

use std::time::{Duration, Instant};

use super::clipper::GpuClipper;
use super::plan::GpuPlan;
use super::profile::fill;
use super::tuning::{LARGE_ON_HARDWARE, LARGE_ON_SOFTWARE, ROUND, STEPS_TAKE, TAKEN_BELOW, Tuning};
use super::{GpuTensor, PlanOptions};
use crate::{Clip, Error, Waiting};

/// What [`GpuClipper::tune`] found.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Tuned {
    /// The fastest row, for [`GpuClipper::with_tuning`]: the clipper's own unless another was faster.
    pub tuning: Tuning,
    /// Every row that was tried, in order. The first is the clipper's own, compared with itself, which shows how much
    /// times vary.
    pub trials: Vec<Trial>,
    /// Whether every row was tried before the time was over.
    pub complete: bool,
}

/// A row that [`GpuClipper::tune`] tried.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Trial {
    /// The row, as far as the device supports it.
    pub tuning: Tuning,
    /// The time of a step over that with the best row before it, in one round or two: the geometric mean over all cases
    /// of the ratio of medians. Empty if a norm was wrong; such a row is never taken.
    pub rounds: Vec<f64>,
    /// Whether it became the best row. The first one does; another needs two rounds, both below 0.95.
    pub taken: bool,
    /// Bytes a second that a norm, a clip by norm and a clip by value must move, at the largest size; they move 4, 12
    /// and 8 bytes an element. Empty if a norm was wrong.
    pub speeds: Vec<f64>,
}

/// Divides every gradient in each step that clips, so that the next step has work too.
const GRAD_SCALE: f64 = 1.0001;

/// Elements of the block that fills the buffer.
const BLOCK: u64 = 1 << 20;

/// What is told of each trial.
type Tried<'a> = Box<dyn FnMut(&Trial) + Send + 'a>;

impl GpuClipper {
    /// Measures which tuning is fastest on this device, for about as long as `budget` says, and calls `tried` after each
    /// row. It starts from the clipper's own row. Another one must be 5 % faster in each of two rounds.
    ///
    /// It measures, clips by norm and clips by value: float32 tensors of 64 Ki, 1 Mi and 64 Mi elements (16 Mi on
    /// software devices, fewer if memory is short), and clips 2,000 small tensors by norm. The host's clock times
    /// them, in submissions of many steps. So the device's clock does not matter. A row whose norms differ is refused.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), gradclip::Error> {
    /// let gpu = gradclip::gpu::GpuClipper::open().wait()?;
    /// let tuned = gpu.tune(std::time::Duration::from_secs(30), |_| ()).wait()?;
    /// let gpu = gpu.with_tuning(tuned.tuning)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] on the web, which has no clock for it; [`Error::Device`] if the norms of the clipper's own row
    /// are wrong; [`Error::DeviceLost`]; [`Error::OutOfMemory`] if not even 1 Mi elements fit.
    pub fn tune<'a>(
        &'a self,
        budget: Duration,
        tried: impl FnMut(&Trial) + Send + 'a,
    ) -> Waiting<'a, Result<Tuned, Error>> {
        self.waiting_search(budget, Box::new(tried))
    }

    /// Without a bound on a type or a lifetime: with one, the compiler takes 20 seconds to see that the future is `Send`.
    fn waiting_search<'a>(&'a self, budget: Duration, tried: Tried<'a>) -> Waiting<'a, Result<Tuned, Error>> {
        Waiting::new(self.search(budget, tried))
    }

    async fn search(&self, budget: Duration, mut tried: Tried<'_>) -> Result<Tuned, Error> {
        if cfg!(target_arch = "wasm32") {
            return Err(Error::usage("the web has no clock to tune a device by"));
        }
        let begin = Instant::now();
        let gradients = self.gradients()?;
        let mut best = Contender::new(self.clone(), &gradients)?;
        best.check_norms().await?;
        best.choose_repeats().await?;
        let mut trials = vec![Trial { taken: true, ..best.compared_with(&best, 1).await? }];
        tried(&trials[0]);
        for alternatives in ALTERNATIVES {
            for tuning in alternatives(best.gpu.tuning) {
                let gpu = match self.with_tuning(tuning) {
                    Ok(gpu) => gpu,
                    // Not on this device.
                    Err(Error::Usage(_) | Error::Limit(_)) => continue,
                    Err(error) => return Err(error),
                };
                if trials.iter().any(|trial| trial.tuning == gpu.tuning) {
                    continue;
                }
                if begin.elapsed() >= budget {
                    return Ok(Tuned { tuning: best.gpu.tuning, trials, complete: false });
                }
                let mut contender = match Contender::new(gpu, &gradients) {
                    Err(Error::OutOfMemory(_) | Error::Limit(_)) => continue,
                    contender => contender?,
                };
                contender.repeats.clone_from(&best.repeats);
                let trial = contender.compared_with(&best, 2).await?;
                tried(&trial);
                if trial.taken {
                    best = contender;
                }
                trials.push(trial);
            }
        }
        Ok(Tuned { tuning: best.gpu.tuning, trials, complete: true })
    }

    /// Gradients from 0.5 to 1, as many as fit.
    fn gradients(&self) -> Result<wgpu::Buffer, Error> {
        let software = self.device.device.adapter_info().device_type == wgpu::DeviceType::Cpu;
        let most = self.device.device.limits().max_buffer_size / 4;
        let mut len = if software { LARGE_ON_SOFTWARE } else { LARGE_ON_HARDWARE };
        while len > most.max(BLOCK) {
            len /= 2;
        }
        loop {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            match self.device.storage("gradclip tune", 4 * len, usage) {
                Err(Error::OutOfMemory(_)) if len > BLOCK => len /= 2,
                buffer => {
                    let buffer = buffer?;
                    fill(&self.device, &buffer, bytemuck::cast_slice(&block()))?;
                    return Ok(buffer);
                }
            }
        }
    }
}

/// A block of gradients that look random.
fn block() -> Vec<f32> {
    (0..BLOCK as u32).map(|i| f32::from_bits(0x3f00_0000 | i.wrapping_mul(2_654_435_761) >> 9)).collect()
}

/// The rows that differ from one in one number or flag.
const ALTERNATIVES: [fn(Tuning) -> Vec<Tuning>; 5] = [
    |best| {
        let workgroups = [best.workgroup * 2, best.workgroup / 2, best.workgroup * 4, best.workgroup / 4];
        workgroups.map(|workgroup| Tuning { workgroup, ..best }.fitted()).to_vec()
    },
    |best| vec![Tuning { contiguous: !best.contiguous, ..best }],
    |best| vec![Tuning { subgroups: !best.subgroups, ..best }],
    |best| [best.chunks * 4, best.chunks / 4].map(|chunks| Tuning { chunks, ..best }).to_vec(),
    |best| {
        let words = [best.min_chunk_words * 4, best.min_chunk_words / 4];
        words.map(|min_chunk_words| Tuning { min_chunk_words, ..best }).to_vec()
    },
];

/// A row with a plan for each case.
struct Contender {
    gpu: GpuClipper,
    cases: Vec<Case>,
    /// How many steps of each case are timed together.
    repeats: Vec<u32>,
}

struct Case {
    plan: GpuPlan,
    /// For a norm, its elements.
    norm_of: Option<u64>,
    /// The bytes that it must move, at the largest size.
    largest: Option<u64>,
}

impl Contender {
    fn new(gpu: GpuClipper, gradients: &wgpu::Buffer) -> Result<Self, Error> {
        let len = gradients.size() / 4;
        let by_norm = Clip::norm(f64::INFINITY);
        let mut cases = Vec::new();
        let mut sizes = vec![1 << 16, BLOCK, len];
        sizes.dedup();
        for size in sizes {
            let tensors = [GpuTensor::f32(gradients, 0..size)?];
            let largest = |bytes: u64| (size == len).then_some(bytes * size);
            let measure = gpu.plan_with(&[(by_norm, &tensors)], PlanOptions::default().measure_only())?;
            cases.push(Case { plan: measure, norm_of: Some(size), largest: largest(4) });
            for (clip, bytes) in [(by_norm, 12), (Clip::value(2.0), 8)] {
                let plan = gpu.plan(&clip.grad_scale(GRAD_SCALE), &tensors)?;
                cases.push(Case { plan, norm_of: None, largest: largest(bytes) });
            }
        }
        // The biases and norms of a model.
        let small = (0..(len / 2100).min(2000)).map(|i| GpuTensor::f32(gradients, 2100 * i..2100 * (i + 1)));
        let small = small.collect::<Result<Vec<_>, _>>()?;
        cases.push(Case { plan: gpu.plan(&by_norm.grad_scale(GRAD_SCALE), &small)?, norm_of: None, largest: None });
        let repeats = vec![1; cases.len()];
        Ok(Self { gpu, cases, repeats })
    }

    /// Compares the norms of the fresh gradients with the CPU's.
    async fn check_norms(&self) -> Result<(), Error> {
        let block = block();
        for (case, len) in self.norms() {
            let part = &block[..len.min(BLOCK) as usize];
            let once = part.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
            let right = (once * (len / part.len() as u64) as f64).sqrt();
            let found = self.norm(case).await?;
            if !is_same(found, right) {
                let message = format!("this device says {found} is the norm of {len} elements; it is {right}");
                return Err(Error::Device(message));
            }
        }
        Ok(())
    }

    fn norms(&self) -> impl Iterator<Item = (usize, u64)> {
        self.cases.iter().enumerate().filter_map(|(i, case)| Some((i, case.norm_of?)))
    }

    async fn norm(&self, case: usize) -> Result<f64, Error> {
        self.steps(case, 1).await?;
        Ok(self.cases[case].plan.report().await?.total_norm)
    }

    /// Takes so many steps together that the host's part of a submission does not matter.
    async fn choose_repeats(&mut self) -> Result<(), Error> {
        for case in 0..self.cases.len() {
            // The first run warms up.
            self.steps(case, 1).await?;
            let alone = self.steps(case, 1).await?;
            self.repeats[case] = (STEPS_TAKE / alone).ceil().clamp(1.0, 256.0) as u32;
        }
        Ok(())
    }

    /// Seconds of some steps that are submitted together.
    async fn steps(&self, case: usize, count: u32) -> Result<f64, Error> {
        let device = &self.gpu.device;
        let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for _ in 0..count {
            self.cases[case].plan.encode(&mut encoder)?;
        }
        let commands = device.scoped(|| encoder.finish())?;
        device.run(None).await?;
        let start = Instant::now();
        device.run(Some(commands)).await?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Runs every case in turns with another row's, in at most so many rounds.
    async fn compared_with(&self, best: &Self, most: usize) -> Result<Trial, Error> {
        let mut trial = Trial { tuning: self.gpu.tuning, rounds: Vec::new(), taken: false, speeds: Vec::new() };
        for (case, _) in self.norms() {
            if !is_same(self.norm(case).await?, best.norm(case).await?) {
                return Ok(trial);
            }
        }
        for round in 0..most {
            let (mut logarithms, mut speeds) = (0.0, Vec::new());
            for (i, case) in self.cases.iter().enumerate() {
                let repeats = self.repeats[i];
                // The first run of a kernel may still have to make it ready.
                self.steps(i, 1).await?;
                let (mut own, mut other) = (Vec::new(), Vec::new());
                for run in 0..ROUND {
                    if (run + round).is_multiple_of(2) {
                        own.push(self.steps(i, repeats).await?);
                        other.push(best.steps(i, repeats).await?);
                    } else {
                        other.push(best.steps(i, repeats).await?);
                        own.push(self.steps(i, repeats).await?);
                    }
                }
                let (own, other) = (median(own), median(other));
                logarithms += (own / other).ln();
                speeds.extend(case.largest.map(|bytes| bytes as f64 * f64::from(repeats) / own));
            }
            trial.rounds.push((logarithms / self.cases.len() as f64).exp());
            trial.speeds = speeds;
            trial.taken = trial.rounds.len() == 2 && trial.rounds.iter().all(|ratio| *ratio < TAKEN_BELOW);
            if trial.rounds.iter().any(|ratio| *ratio >= TAKEN_BELOW) {
                break;
            }
        }
        Ok(trial)
    }
}

/// Whether two norms of the same gradients differ by rounding alone.
fn is_same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * b
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

//! Guards against what nobody expects: random sets of tensors of any shape, dtype and size, random clips, and devices
//! with random limits and tunings. Each must match the plain loops of `common/reference.rs`.
//!
//! `PROPTEST_CASES` sets the number of cases and `PROPTEST_RNG_SEED` the seed of the first one; each next case has the
//! next number. A failing case is reduced and printed, with the command to repeat it. `scripts/properties.sh` runs many
//! on each device.
//!
//! The seed is fixed unless it is set, so that a change is never blamed for a case that it did not cause.
#![cfg(feature = "gpu")]

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use crate::common::gpu::{
    Layout, clip_laid_out, clip_tensors, download, gpu, gpu_tensor, shared, small_limits, upload,
};
use crate::common::numbers::{Random, from_bits, ulp};
use crate::common::reference::{Asked, Errors, Expected, Mode, SCOPES};
use crate::common::{Data, Done, POLICIES, Path, assert_same_bits, clip_host, numbers_of, parameters, views};
use gradclip::gpu::tuning::SOFTWARE;
use gradclip::gpu::{GpuClipper, GpuTensor};
use gradclip::{Clipper, Dtype, Error, NonFinite, NormType, Scope, UnitAxis, wgpu};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{RngSeed, TestError, TestRunner};

/// What numbers a tensor holds. Sizes are places between the smallest and the largest of the dtype, from 0 to 1.
#[derive(Clone, Copy, Debug)]
enum Numbers {
    Zeros,
    Normal {
        size: f64,
    },
    Constant {
        size: f64,
    },
    /// All of one size but one, which is of another.
    OneAmong {
        size: f64,
        one: f64,
    },
    /// Any bits that are a finite number.
    AnyBits,
    /// The smallest number and few times that.
    Denormal,
    /// The largest number and some less.
    NearOverflow,
}

/// Whatever is not finite: the payload of a NaN too.
#[derive(Clone, Copy, Debug)]
enum Bad {
    Infinity { negative: bool },
    NaN { payload: u64, negative: bool },
}

#[derive(Clone, Debug)]
struct DrawnTensor {
    dims: Vec<usize>,
    /// More elements than that are cut off.
    most: usize,
    dtype: usize,
    numbers: Numbers,
    seed: u64,
    bad: Vec<(Index, Bad)>,
    parameter: Numbers,
}

#[derive(Clone, Copy, Debug)]
enum Threshold {
    /// Some segments exceed it and some do not.
    Middle,
    /// Of some segment's norm.
    Part(f64),
    Zero,
    Infinite,
}

#[derive(Clone, Debug)]
struct Drawn {
    tensors: Vec<DrawnTensor>,
    /// Dimension 0 under the scopes by example.
    examples: usize,
    /// Float64 too, which is for the CPU alone.
    doubles: bool,
    scope: usize,
    mode: Mode,
    norm_type: NormType,
    threshold: Threshold,
    /// Of the lower bound to the upper one.
    asymmetry: f64,
    eps: f64,
    agc_eps: f64,
    grad_scale: f64,
    policy: NonFinite,
    /// Times the total norm it is the norm above which the step is skipped.
    skip: f64,
    device: usize,
    gaps: Vec<usize>,
    buffers: usize,
    budget: u64,
    seed: u64,
}

fn sizes() -> impl Strategy<Value = f64> {
    prop_oneof![3 => 0.48..0.54f64, 2 => 0.0..1.0f64]
}

fn numbers() -> impl Strategy<Value = Numbers> {
    prop_oneof![
        1 => Just(Numbers::Zeros),
        10 => sizes().prop_map(|size| Numbers::Normal { size }),
        2 => sizes().prop_map(|size| Numbers::Constant { size }),
        2 => (sizes(), sizes()).prop_map(|(size, one)| Numbers::OneAmong { size, one }),
        2 => Just(Numbers::AnyBits),
        1 => Just(Numbers::Denormal),
        1 => Just(Numbers::NearOverflow),
    ]
}

fn bads() -> impl Strategy<Value = Vec<(Index, Bad)>> {
    let bad = prop_oneof![
        any::<bool>().prop_map(|negative| Bad::Infinity { negative }),
        (any::<u64>(), any::<bool>()).prop_map(|(payload, negative)| Bad::NaN { payload, negative }),
    ];
    prop_oneof![12 => Just(Vec::new()), 1 => prop::collection::vec((any::<Index>(), bad), 1..4)]
}

fn tensors() -> impl Strategy<Value = DrawnTensor> {
    let dim =
        prop_oneof![1 => Just(0usize), 2 => Just(1usize), 6 => 2usize..12, 4 => 12usize..150, 1 => 150usize..5000];
    let most = prop_oneof![5 => Just(200usize), 4 => Just(3000usize), 1 => Just(40_000usize)];
    (prop::collection::vec(dim, 0..6), most, 0..8usize, numbers(), any::<u64>(), bads(), numbers()).prop_map(
        |(dims, most, dtype, numbers, seed, bad, parameter)| DrawnTensor {
            dims,
            most,
            dtype,
            numbers,
            seed,
            bad,
            parameter,
        },
    )
}

fn cases_drawn() -> impl Strategy<Value = Drawn> {
    let modes = prop_oneof![
        6 => Just(Mode::Norm),
        1 => Just(Mode::Rms),
        1 => Just(Mode::AverageNorm),
        2 => Just(Mode::Agc),
        2 => Just(Mode::Value),
    ];
    let p = |p: f64| NormType::p(p);
    let norm_types = prop_oneof![
        6 => Just(NormType::L2),
        2 => Just(NormType::L1),
        2 => Just(NormType::Inf),
        2 => (0.3..8.0f64).prop_map(p),
        1 => (8.0..80.0f64).prop_map(p),
    ];
    let threshold = prop_oneof![
        6 => Just(Threshold::Middle),
        3 => (-6.0..1.0f64).prop_map(|x| Threshold::Part(10f64.powf(x))),
        1 => Just(Threshold::Zero),
        1 => Just(Threshold::Infinite),
    ];
    let grad_scale = prop_oneof![
        4 => Just(1.0),
        2 => (-20..20i32).prop_map(|k| 2f64.powi(k)),
        2 => (-3.0..3.0f64).prop_map(|x| 10f64.powf(x)),
        1 => (-40.0..40.0f64).prop_map(|x| 10f64.powf(x)),
    ];
    let clip = (modes, norm_types, threshold, -1.0..1.5f64, prop_oneof![Just(0.0), Just(1e-6), Just(0.1)]);
    let skip = prop_oneof![6 => Just(f64::INFINITY), 1 => Just(0.0), 1 => 0.01..1.0f64, 2 => 1.0..3.0f64];
    let more = (prop_oneof![Just(1e-3), Just(0.0), Just(0.7)], grad_scale, prop::sample::select(&POLICIES[..]), skip);
    let set = (prop::collection::vec(tensors(), 0..9), 1usize..9, prop::bool::weighted(0.12), 0..SCOPES.len());
    let place = (0..POOL, prop::collection::vec(0usize..9, 9), 1usize..6, 16u32..25, any::<u64>());
    (set, clip, more, place).prop_map(|(set, clip, more, place)| {
        let (tensors, examples, doubles, scope) = set;
        let (mode, norm_type, threshold, asymmetry, eps) = clip;
        let (agc_eps, grad_scale, policy, skip) = more;
        let (device, gaps, buffers, budget, seed) = place;
        let budget = 1 << budget;
        Drawn {
            tensors,
            examples,
            doubles,
            scope,
            mode,
            norm_type,
            threshold,
            asymmetry,
            eps,
            agc_eps,
            grad_scale,
            policy,
            skip,
            device,
            gaps,
            buffers,
            budget,
            seed,
        }
    })
}

/// The smallest and the largest size of numbers, as powers of ten. Norms of float64 stay normal float64.
fn range(dtype: Dtype) -> (f64, f64) {
    match dtype {
        Dtype::F16 => (-7.5, 4.8),
        Dtype::F64 => (-290.0, 280.0),
        _ => (-45.0, 38.5),
    }
}

fn largest(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 65504.0,
        Dtype::F64 => 1e280,
        Dtype::BF16 => from_bits(dtype, 0x7f7f),
        _ => f64::from(f32::MAX),
    }
}

impl Numbers {
    fn fill(self, dtype: Dtype, len: usize, random: &mut Random) -> Vec<f64> {
        let (least, most) = range(dtype);
        let size_of = |place: f64| 10f64.powf(least + place * (most - least));
        let smallest = if dtype == Dtype::F64 { 1e-290 } else { ulp(dtype, 0.0) };
        let max = largest(dtype);
        let mut each = |f: &mut dyn FnMut(&mut Random) -> f64| (0..len).map(|_| f(random).clamp(-max, max)).collect();
        match self {
            Self::Zeros => each(&mut |random| if random.below(2) == 0 { 0.0 } else { -0.0 }),
            Self::Normal { size } => each(&mut |random| random.normal() * size_of(size)),
            Self::Constant { size } => each(&mut |_| size_of(size)),
            Self::OneAmong { size, one } => {
                let mut all: Vec<f64> = each(&mut |random| random.normal() * size_of(size));
                if len > 0 {
                    all[random.below(len)] = size_of(one).min(max);
                }
                all
            }
            Self::AnyBits => each(&mut |random| {
                let x = from_bits(dtype, random.next() >> (64 - 8 * dtype.size()));
                if x.is_finite() { x } else { 1.0 }
            }),
            Self::Denormal => each(&mut |random| (random.below(9) as f64 - 4.0) * smallest),
            Self::NearOverflow => each(&mut |random| (1.0 - random.below(3) as f64 * random.uniform()) * max),
        }
    }
}

impl Bad {
    fn bits(self, dtype: Dtype) -> u64 {
        let fraction = match dtype {
            Dtype::F16 => 10,
            Dtype::BF16 => 7,
            Dtype::F32 => 23,
            _ => 52,
        };
        let width = 8 * dtype.size();
        let infinity = (1u64 << (width - 1)) - (1 << fraction);
        let (payload, negative) = match self {
            Self::Infinity { negative } => (0, negative),
            Self::NaN { payload, negative } => (payload % ((1 << fraction) - 1) + 1, negative),
        };
        infinity | payload | u64::from(negative) << (width - 1)
    }
}

/// A set and a clip.
#[derive(Debug)]
struct Case {
    set: Vec<Data>,
    asked: Asked,
}

impl Drawn {
    fn tensor(&self, i: usize, scope: Scope) -> Data {
        let drawn = &self.tensors[i];
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64];
        let dtype_of = |i: usize| if dtypes[i] == Dtype::F64 && !self.doubles { Dtype::F32 } else { dtypes[i] };
        let mut shape = drawn.dims.clone();
        if matches!(scope, Scope::Example | Scope::ExampleTensor) {
            shape.resize(shape.len().max(1), 1);
            shape[0] = self.examples;
        }
        let first = usize::from(matches!(scope, Scope::Example | Scope::ExampleTensor));
        while shape.iter().product::<usize>() > drawn.most
            && let Some(longest) = shape[first..].iter_mut().max()
            && *longest > 1
        {
            *longest /= 2;
        }
        let len = shape.iter().product();
        let (dtype, mut random) = (dtype_of(drawn.dtype), Random(drawn.seed));
        let mut t = Data::rounded(dtype, drawn.numbers.fill(dtype, len, &mut random)).shaped(&shape);
        for (place, bad) in drawn.bad.iter().filter(|_| len > 0) {
            t.set_bits(place.index(len), bad.bits(dtype));
        }
        if i.is_multiple_of(2) {
            t = t.named(&format!("tensor {i}"));
        }
        // Bits of the seed choose axes.
        let chosen: Vec<_> = (0..shape.len() as isize).filter(|axis| drawn.seed >> axis & 1 == 1).collect();
        t = match drawn.seed >> 60 {
            0..4 => t.with_unit_axis(UnitAxis::axes(&chosen)),
            4..8 => t.with_unit_axis(UnitAxis::over(&chosen)),
            _ => t,
        };
        if self.mode != Mode::Agc {
            return t;
        }
        let dtype = dtype_of((drawn.dtype + i) % dtypes.len());
        let numbers = drawn.parameter.fill(dtype, len, &mut random);
        t.with_parameter(Data::rounded(dtype, numbers).shaped(&shape))
    }

    /// None if norms and thresholds are too close to tell which is larger.
    fn case(&self) -> Option<Case> {
        let (scope, axis, budget) = SCOPES[self.scope];
        let set: Vec<_> = (0..self.tensors.len()).map(|i| self.tensor(i, scope)).collect();
        let (eps, agc_eps, grad_scale, policy) = (self.eps, self.agc_eps, self.grad_scale, self.policy);
        let asked = Asked {
            norm_type: self.norm_type,
            scope,
            axis,
            budget,
            eps,
            agc_eps,
            grad_scale,
            policy,
            ..Asked::new(self.mode, 1.0)
        };
        let mut asked = match (self.threshold, self.mode) {
            (Threshold::Zero, _) => Asked { threshold: 0.0, ..asked },
            (Threshold::Infinite, Mode::Norm | Mode::Rms | Mode::AverageNorm | Mode::Value) => {
                Asked { threshold: f64::INFINITY, ..asked }
            }
            (_, Mode::Value) => {
                // At some element exactly, unless it is to be a part of that.
                let finite: Vec<_> = numbers_of(&set).filter(|x| x.is_finite() && *x != 0.0).collect();
                let some = if finite.is_empty() { 1.0 } else { finite[self.seed as usize % finite.len()].abs() };
                let part = if let Threshold::Part(part) = self.threshold { part } else { 1.0 };
                Asked { threshold: some / grad_scale * part, ..asked }
            }
            (Threshold::Part(part), _) => {
                let loads: Vec<_> = asked.loads(&set).filter(|load| load.is_normal()).collect();
                let some = if loads.is_empty() { 1.0 } else { loads[self.seed as usize % loads.len()] };
                Asked { threshold: some * part, ..asked }
            }
            _ => asked.at_the_middle(&set),
        };
        if !asked.threshold.is_finite() && asked.mode == Mode::Agc {
            return None;
        }
        asked.min = match asked.threshold {
            0.0 => self.asymmetry.min(0.0),
            f64::INFINITY if self.asymmetry < 0.0 => f64::NEG_INFINITY,
            f64::INFINITY => self.asymmetry,
            threshold => threshold * self.asymmetry.min(1.0),
        };
        asked.report_norm = asked.mode == Mode::Value && self.seed >> 59 & 1 == 1;
        let total_norm = asked.expected_or_tie(&set).0.total_norm;
        if self.skip.is_finite() {
            asked.skip_above = if total_norm.is_finite() { total_norm * self.skip } else { self.skip };
        }
        for _ in 0..4 {
            if asked.is_decisive(&set) {
                return Some(Case { set, asked });
            }
            (asked.threshold, asked.min) = (asked.threshold * 1.0137, asked.min * 1.0137);
        }
        None
    }
}

/// How many devices a case chooses from.
const POOL: usize = 2;

/// This number of cases share devices. A tuning of its own has kernels of its own, and compiling them takes most of a
/// case's time on a software device.
const CASES_A_POOL: u64 = 500;

/// The device of the tests, and two more with few bindings, small ones, and few workgroups in a dimension.
fn devices() -> &'static [GpuClipper; 3] {
    static DEVICES: OnceLock<[GpuClipper; 3]> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let tiny = wgpu::Limits { max_compute_workgroups_per_dimension: 64, ..small_limits() };
        let small = wgpu::Limits { max_storage_buffer_binding_size: 1 << 17, ..wgpu::Limits::default() };
        [gpu().clone(), shared(tiny), shared(small)]
    })
}

/// A device with its tuning: number 0 as the library chooses it, the others at random.
fn device(seed: u64, slot: usize) -> GpuClipper {
    static POOLS: Mutex<Option<HashMap<(u64, usize), GpuClipper>>> = Mutex::new(None);
    let pool = seed / CASES_A_POOL;
    // SwiftShader takes a second and some 70 MB for each kernel, for as long as it is there.
    let slot = if gpu().device().adapter_info().name.contains("SwiftShader") { 0 } else { slot };
    let mut pools = POOLS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let pools = pools.get_or_insert_default();
    pools.retain(|(at, _), _| *at == pool);
    let made = || {
        if slot == 0 {
            return gpu().clone();
        }
        let at = (slot + pool as usize) % 3;
        let mut random = Random(pool * POOL as u64 + slot as u64);
        let mut tuning = SOFTWARE;
        tuning.workgroup = 8 << random.below(6);
        tuning.contiguous = random.below(2) == 0;
        tuning.subgroups = random.below(2) == 0;
        tuning.windows = 1 + random.below(40) as u32;
        // Short, so that small sets have many chunks, and several levels to merge.
        tuning.chunks = [1, 7, 64][random.below(3)];
        tuning.min_chunk_words = [16, 64, 512, 4096][random.below(4)];
        if at == 1 {
            // There are fewer workgroups.
            tuning.min_chunk_words = tuning.min_chunk_words.max(64);
        }
        tuning.max_chunk_words = tuning.min_chunk_words << random.below(4);
        tuning.merged_partials = [2, 3, 8, 20][random.below(4)];
        devices()[at].with_tuning(tuning).expect("valid")
    };
    pools.entry((pool, slot)).or_insert_with(made).clone()
}

/// Where gradients are clipped.
#[derive(Clone, Copy)]
enum Place<'a> {
    Cpu,
    /// Host tensors, through a device that may take so much memory for them.
    Host(&'a GpuClipper, u64),
    /// In this number of buffers by turns, with gaps of this number of elements.
    Buffers(&'a GpuClipper, usize, &'a [usize]),
}

impl std::fmt::Debug for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => write!(f, "on the CPU"),
            Self::Host(_, budget) => write!(f, "through a device in {budget} bytes"),
            Self::Buffers(_, count, gaps) => write!(f, "in {count} buffers with gaps {gaps:?}"),
        }
    }
}

impl Place<'_> {
    fn path(self) -> Path {
        if matches!(self, Self::Cpu) { Path::Cpu } else { Path::GpuBuffers }
    }

    fn clip(self, asked: &Asked, set: &[Data]) -> Done {
        match self {
            Self::Cpu => clip_host(&Clipper::cpu(), &asked.clip(), set),
            Self::Host(gpu, budget) => {
                clip_host(&Clipper::gpu(gpu.clone().with_memory_budget(budget)), &asked.clip(), set)
            }
            Self::Buffers(gpu, 1, gaps) => {
                clip_laid_out(gpu, &asked.clip(), set, &Layout::with_gaps(set, |i| gaps[i % gaps.len()]))
            }
            Self::Buffers(gpu, buffers, gaps) => {
                let part = |b: usize| set.iter().skip(b).step_by(buffers).cloned().collect::<Vec<_>>();
                let parts: Vec<_> = (0..buffers).map(part).collect();
                let laid_out = |part: &Vec<_>| Layout::with_gaps(part, |i| gaps[(i + part.len()) % gaps.len()]);
                let layouts: Vec<_> = parts.iter().map(laid_out).collect();
                let held = |(layout, part): (&Layout, &Vec<_>)| upload(gpu, &layout.bytes(part));
                let buffer_of: Vec<_> = layouts.iter().zip(&parts).map(held).collect();
                let all = || layouts.iter().zip(&parts).zip(&buffer_of);
                let view = |((layout, part), buffer): ((&Layout, &Vec<_>), _)| layout.tensors(buffer, part).into_iter();
                let views = by_turns(all().map(view).collect(), set.len());
                let report = clip_tensors(gpu, &asked.clip(), &with_own_parameters(gpu, views, set));
                let now = |((layout, part), buffer): ((&Layout, &Vec<_>), _)| {
                    layout.taken_from(&download(gpu, buffer), part).into_iter()
                };
                Done { report, after: by_turns(all().map(now).collect(), set.len()) }
            }
        }
    }
}

/// Gives tensors their parameters, each in a buffer of its own.
fn with_own_parameters(gpu: &GpuClipper, views: Vec<GpuTensor>, set: &[Data]) -> Vec<GpuTensor> {
    let with = |(view, t): (GpuTensor, &Data)| match &t.parameter {
        Some(parameter) => {
            view.parameter(gpu_tensor(&upload(gpu, &[&parameter.bytes[..], &[0; 4]].concat()), parameter, 0))
        }
        None => view,
    };
    views.into_iter().zip(set).map(with).collect()
}

/// One of each by turns.
fn by_turns<T>(mut each: Vec<impl Iterator<Item = T>>, count: usize) -> Vec<T> {
    let turns = each.len();
    (0..count).map(|i| each[i % turns].next().expect("one for each turn")).collect()
}

/// Everything that a case must hold.
fn check(seed: u64, drawn: &Drawn) -> Option<Errors> {
    let case = drawn.case()?;
    let Case { set, asked } = &case;
    let gpu = &device(seed, drawn.device);
    let (host, one) = (Place::Host(gpu, drawn.budget), Place::Buffers(gpu, 1, &drawn.gaps));
    let several = Place::Buffers(gpu, drawn.buffers, &drawn.gaps);
    let mut errors = check_place(&case, Place::Cpu);
    check_threads(asked, set);
    let doubles = |t: &Data| t.dtype == Dtype::F64 || t.parameter.as_ref().is_some_and(|p| p.dtype == Dtype::F64);
    if set.iter().any(doubles) {
        let done = host.clip(asked, set);
        assert!(matches!(done.report, Err(Error::UnsupportedDtype { .. })), "{:?}", done.report);
        assert_same_bits(&done.after, set, "refused");
        return Some(errors);
    }
    let too_large = TOO_LARGE.load(Ordering::Relaxed);
    for place in [host, one, several] {
        errors = errors.merge(check_place(&case, place));
    }
    if TOO_LARGE.load(Ordering::Relaxed) > too_large {
        return Some(errors);
    }
    for place in [Place::Cpu, one] {
        check_placed_otherwise(&case, place, several, drawn.seed);
    }
    Some(errors)
}

/// How many clips a device refused as too large for it.
static TOO_LARGE: AtomicUsize = AtomicUsize::new(0);

/// The reference, the same again, the norm of the result, and a second clip.
fn check_place(case: &Case, place: Place<'_>) -> Errors {
    let Case { set, asked } = case;
    let what = format!("{place:?}");
    let done = place.clip(asked, set);
    if let (Err(Error::Limit(_)), Place::Host(gpu, _) | Place::Buffers(gpu, ..)) = (&done.report, place) {
        // More segments or short chunks than a device with lowered limits can address.
        let limits = gpu.device().limits();
        let is_small =
            limits.max_compute_workgroups_per_dimension < 65535 || limits.max_storage_buffer_binding_size <= 1 << 20;
        assert!(is_small, "{what}: {:?}", done.report);
        assert_same_bits(&done.after, set, &what);
        TOO_LARGE.fetch_add(1, Ordering::Relaxed);
        return Errors::default();
    }
    let expected = asked.check_done(&done, place.path(), set, &what);
    let again = place.clip(asked, set);
    assert_same_report(&again, &done, &format!("again {what}"));
    assert_same_bits(&again.after, &done.after, &format!("again {what}"));
    if matches!(asked.scope, Scope::Example | Scope::ExampleTensor) && asked.mode != Mode::Value && !set.is_empty() {
        check_sums(asked, set, place);
    }
    if asked.mode == Mode::Value {
        check_clipped_again_by_value(asked, &expected, place, set, &done.after);
    } else {
        check_norm_afterwards(asked, &expected, place, &done.after);
    }
    expected.errors(&done, set)
}

#[track_caller]
fn assert_same_report(a: &Done, b: &Done, what: &str) {
    // By what is printed, because a norm may be NaN.
    assert_eq!(format!("{:?}", a.report), format!("{:?}", b.report), "{what}");
}

fn check_sums(asked: &Asked, set: &[Data], place: Place<'_>) {
    let expected = asked.expected(set);
    let clipper = match place {
        Place::Cpu => Clipper::cpu(),
        Place::Host(gpu, budget) => Clipper::gpu(gpu.clone().with_memory_budget(budget)),
        Place::Buffers(..) => return,
    };
    let mut after = crate::common::unwritten_sums(set);
    let parameters = parameters(set);
    let mut sums: Vec<_> = after.iter_mut().map(Data::view_mut).collect();
    let report = clipper.sum_examples(&asked.clip(), &views(set, &parameters), &mut sums);
    let done = Done { report, after };
    expected.check_sums(&done, set, asked.tolerance(place.path()), &format!("sums {place:?} {asked:?}"));
}

fn check_threads(asked: &Asked, set: &[Data]) {
    static POOLS: OnceLock<Vec<rayon::ThreadPool>> = OnceLock::new();
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let mut first: Option<Done> = None;
    for pool in POOLS.get_or_init(|| (1..=3).map(pool).collect()) {
        let done = pool.install(|| Place::Cpu.clip(asked, set));
        let first = first.get_or_insert_with(|| Done {
            after: done.after.clone(),
            report: done.report.as_ref().map(Clone::clone).map_err(|_| Error::NotSubmitted),
        });
        let what = format!("{} threads", pool.current_num_threads());
        assert_same_bits(&done.after, &first.after, &what);
        if let (Ok(a), Ok(b)) = (&done.report, &first.report) {
            assert_eq!(format!("{a:?}"), format!("{b:?}"), "{what}");
        }
    }
}

/// How far a second clip moved an element at most, in units of its last place, where no eps pulls the norm below the
/// threshold: of float32, and of halves; on the CPU, and on a GPU.
static MOVED: Mutex<[[f64; 2]; 2]> = Mutex::new([[0.0; 2]; 2]);

/// The norm of what a clip leaves, and what a second clip makes of that: as the documentation of `Clip` promises.
fn check_norm_afterwards(asked: &Asked, expected: &Expected, place: Place<'_>, after: &[Data]) {
    let measures = asked.threshold == f64::INFINITY && asked.mode != Mode::Agc;
    if expected.refused() || measures || !numbers_of(after).all(f64::is_finite) {
        return;
    }
    // The loss scale is out by now.
    let plain = Asked { grad_scale: 1.0, ..*asked };
    let now = plain.expected_or_tie(after).0;
    let (tolerance, is_cpu) = (asked.tolerance(place.path()), matches!(place, Place::Cpu));
    let mut members = vec![Vec::new(); expected.segments.len()];
    for (t, own) in expected.of.iter().enumerate() {
        own.iter().enumerate().for_each(|(i, segment)| members[*segment].push((t, i)));
    }
    let again = place.clip(&plain, after);
    let what = format!("{place:?} {asked:?}");
    again.report.as_ref().unwrap_or_else(|error| panic!("{what}, a second time: {error}"));
    let factors = expected.factors();
    for (s, members) in members.iter().enumerate() {
        let (before, after_norm) = (&expected.segments[s], now.segments[s].norm);
        let limit = before.limit;
        let has_fewer_digits = factors[s] > 0.0 && factors[s] < f64::MIN_POSITIVE;
        if limit == f64::INFINITY || members.is_empty() || has_fewer_digits {
            continue;
        }
        let dtypes = || members.iter().map(|(t, _)| after[*t].dtype);
        let rounding = dtypes().map(rounding).fold(0.0, f64::max);
        let smallest = dtypes().map(|dtype| ulp(dtype, 0.0)).fold(0.0, f64::max);
        let n = members.len() as f64;
        let (p, weight) = match asked.mode {
            Mode::Norm | Mode::Agc => (asked.norm_type.power(), 1.0),
            Mode::Rms => (2.0, 1.0 / n.sqrt()),
            Mode::AverageNorm => (2.0, 1.0 / n),
            Mode::Value => (2.0, 1.0),
        };
        let factor_rounding = if rounding < 1e-15 { rounding } else { 2f64.powi(-24) };
        let relative = tolerance + rounding + factor_rounding;
        let is_bounded = rounding <= 2f64.powi(-24) && tolerance <= 1e-6 && !matches!(asked.norm_type, NormType::P(_));
        let relative = if is_bounded { relative.min(1e-6) } else { relative };
        let denormals = smallest / 2.0 * n.powf(1.0 / p) * weight;
        // What is below 1 is no norm: there the sums add up, not their roots.
        let sum = |a: f64, b: f64| if p < 1.0 { (a.powf(p) + b.powf(p)).powf(1.0 / p) } else { a + b };
        let most = sum(limit * (1.0 + relative), denormals);
        assert!(after_norm <= most, "{what}: the norm of segment {s} is {after_norm:e}, not at most {most:e}");
        let eps = if asked.mode == Mode::Norm { asked.eps } else { 0.0 };
        let least = 1.0 - ((eps * (1.0 - before.clip_coef) + most - limit) / limit + tolerance + factor_rounding);
        // The floor under a norm that is divided by makes AGC scale by less than that where the threshold is below it.
        let least = if asked.mode == Mode::Agc && limit < 1.001e-6 { least.min(limit / 1.002e-6) } else { least };
        for (t, i) in members {
            let (dtype, x, y) = (after[*t].dtype, after[*t].get(*i), again.after[*t].get(*i));
            let moved = (x - y).abs();
            let unit = ulp(dtype, x);
            assert!(
                x == y || (moved <= x.abs() * (1.0 - least) + unit * 0.5001 && y.abs() <= x.abs()),
                "{what}: {x:e} of {dtype}, clipped again, is {y:e}; the factor was to be {least} at least"
            );
            // Norms are not right to the last bit of a float64, and those of other powers not to that of a float32.
            let is_told = dtype != Dtype::F64 && !matches!(asked.norm_type, NormType::P(_)) && eps == 0.0;
            let is_plain = denormals < limit * 1e-9 && rounding == self::rounding(dtype) && least > 0.99;
            if is_told && is_plain && moved > 0.0 {
                let mut worst = MOVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let worst = &mut worst[usize::from(!is_cpu)][usize::from(dtype.size() == 2)];
                let units = moved / unit.min(ulp(dtype, y));
                *worst = worst.max(units);
                assert!(units <= 2.0 || !is_cpu, "{what}: {x:e} of {dtype}, clipped again, is {y:e}: {units} units");
            }
        }
    }
}

/// What rounding once may add to a number of a dtype, relatively.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 2f64.powi(-11) + 2f64.powi(-24),
        Dtype::BF16 => 2f64.powi(-8) + 2f64.powi(-24),
        Dtype::F32 => 2f64.powi(-24),
        _ => 2f64.powi(-53),
    }
}

/// What a value clip leaves lies within the bounds, and a second one changes no bit of it.
fn check_clipped_again_by_value(asked: &Asked, expected: &Expected, place: Place<'_>, set: &[Data], after: &[Data]) {
    let zeroes = expected.bad.is_some() && matches!(asked.policy, NonFinite::Zero | NonFinite::Drop);
    if expected.refused() || (zeroes && (asked.min > 0.0 || asked.threshold < 0.0)) {
        return;
    }
    for (t, data) in after.iter().enumerate() {
        let (min, max) = asked.bounds(data.dtype);
        for (i, x) in data.numbers().enumerate() {
            assert!(x.is_nan() || (min <= x && x <= max), "{place:?} {asked:?}: {:e} became {x:e}", set[t].get(i));
        }
    }
    if asked.policy != NonFinite::Propagate && !numbers_of(after).all(f64::is_finite) {
        // Divided by a tiny loss scale, and a half holds no such bound.
        return;
    }
    let again = place.clip(&Asked { grad_scale: 1.0, ..*asked }, after);
    assert_same_bits(&again.after, after, &format!("{place:?} {asked:?}, a second time"));
}

/// Cuts tensors in pieces, puts empty ones between and all in another order: the same elements have one norm, and the
/// same becomes of each.
fn check_placed_otherwise(case: &Case, place: Place<'_>, other: Place<'_>, seed: u64) {
    let Case { set, asked } = case;
    if (asked.scope != Scope::Global && asked.mode != Mode::Value) || asked.mode == Mode::Agc {
        return;
    }
    let other = if matches!(place, Place::Cpu) { place } else { other };
    let mut random = Random(seed);
    let mut pieces = Vec::new();
    for (t, data) in set.iter().enumerate() {
        let mut cuts: Vec<_> = (0..random.below(4)).map(|_| random.below(data.len() + 1)).collect();
        cuts.extend([0, data.len()]);
        cuts.sort_unstable();
        pieces.extend(cuts.windows(2).map(|cut| (t, cut[0]..cut[1])));
    }
    for i in (1..pieces.len()).rev() {
        pieces.swap(i, random.below(i + 1));
    }
    let bytes = |t: usize, range: &std::ops::Range<usize>| {
        let size = set[t].dtype.size();
        range.start * size..range.end * size
    };
    let piece = |(t, range): &(usize, std::ops::Range<usize>)| {
        Data::from_bytes(set[*t].dtype, set[*t].bytes[bytes(*t, range)].to_vec())
    };
    let cut: Vec<_> = pieces.iter().map(piece).collect();
    let together = |cut: &[Data]| {
        let mut whole = set.clone();
        for ((t, range), piece) in pieces.iter().zip(cut) {
            let place = bytes(*t, range);
            whole[*t].bytes[place].copy_from_slice(&piece.bytes);
        }
        whole
    };
    let what = format!("{place:?}, and in pieces {other:?}");
    asked.check_done(&other.clip(asked, &cut), other.path(), &cut, &what);
    // By a coefficient that does not depend on the last bits of a norm.
    let by = Asked { grad_scale: 4.0, policy: NonFinite::Drop, skip_above: f64::INFINITY, ..*asked };
    let by = if by.mode == Mode::Value { by } else { Asked { threshold: f64::MAX, ..by } };
    let (whole, cut) = (place.clip(&by, set).ok(), other.clip(&by, &cut).ok());
    assert_same_bits(&together(&cut.1), &whole.1, &what);
    let (a, b) = (whole.0.total_norm, cut.0.total_norm);
    let tolerance = if asked.mode == Mode::Value { 1e-6 } else { asked.tolerance(place.path()) };
    assert!(a == b || a.is_nan() && b.is_nan() || (a / b - 1.0).abs() <= tolerance, "{what}: norms {a:e} and {b:e}");
}

/// The cases of a run that does not say how many.
const CASES: u32 = 200;

/// Runs all cases, or one of each `one_for`, and prints how far off the results were. None may fail.
fn run(what: &str, one_for: u32, check: impl Fn(u64, &Drawn) -> Option<Errors>) {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !QUIET.get() {
            loud(panic);
        }
    }));
    let asked = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { asked.cases } else { CASES }.div_ceil(one_for);
    let first = if let RngSeed::Fixed(seed) = asked.rng_seed { seed } else { 0 };
    let (errors, mut failed) = (Cell::new(Errors::default()), 0);
    for seed in (first..).take(cases as usize) {
        if seed > first && (seed - first).is_multiple_of(1000) {
            println!("{what}: {} cases", seed - first);
        }
        // A few are made smaller; the others are only counted.
        let max_shrink_iters = if failed < 3 { 500 } else { 0 };
        let config = ProptestConfig {
            cases: 1,
            rng_seed: RngSeed::Fixed(seed),
            failure_persistence: None,
            max_shrink_iters,
            max_shrink_time: 20_000,
            ..ProptestConfig::default()
        };
        QUIET.set(true);
        let result = TestRunner::new(config).run(&cases_drawn(), |drawn| {
            let found = check(seed, &drawn).ok_or_else(|| TestCaseError::reject("a tie tells nothing"))?;
            errors.set(errors.get().merge(found));
            Ok(())
        });
        QUIET.set(false);
        if let Err(error) = result {
            failed += 1;
            let again = format!("PROPTEST_CASES=1 PROPTEST_RNG_SEED={seed} cargo test --test suite properties::{what}");
            match error {
                TestError::Fail(reason, drawn) if failed <= 3 => {
                    let set = drawn.case().map(|case| case.set);
                    println!("{reason}\n{drawn:#?}\n{set:?}\nagain: {again}");
                }
                _ => println!("again: {again}"),
            }
        }
    }
    let info = gpu().device().adapter_info();
    let Errors { norm, ulps } = errors.get();
    println!(
        "properties: {what} on {} ({:?}): {cases} cases from seed {first}, {failed} failed, worst norm error {norm:.1e}, \
         worst element {ulps:.1} ulp, moved by a second clip by {:?} ulp at most, {} clips refused as too large",
        info.name,
        info.backend,
        MOVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_flattened(),
        TOO_LARGE.load(Ordering::Relaxed)
    );
    assert_eq!(failed, 0, "cases failed; see above");
}

#[test]
fn random_clips_of_random_sets() {
    run("random_clips_of_random_sets", 1, check);
}

/// So large that the CPU shares them out to threads, which may change no bit.
#[test]
fn random_clips_of_large_sets() {
    run("random_clips_of_large_sets", 50, |_, drawn| {
        let mut drawn = drawn.clone();
        let mut large = drawn.tensors.pop()?;
        large.dims = match drawn.seed % 3 {
            0 => vec![1_100_000],
            1 => vec![1100, 1000],
            _ => vec![8, 50, 2800],
        };
        large.most = 1 << 21;
        drawn.tensors.push(large);
        let case = drawn.case()?;
        check_threads(&case.asked, &case.set);
        Some(check_place(&case, Place::Cpu))
    });
}

//! Checks, without a stopwatch, that kernels are vectors: it steps through them and counts the instructions per
//! element. A kernel that the compiler no longer vectorises takes several times as many.
//!
//! The test runs itself as a traced child. The child signals where a kernel begins and ends.

use std::process::Command;

use half::{bf16, f16};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::super::element::Widen;
use super::super::isa::{self, Set};
use super::super::tuning::BLOCK;
use super::super::{clamp, columns, count, norm, scale, sum};
use crate::decision::Outcome;
use crate::dtype::with_element;
use crate::magnitude::Magnitude;
use crate::partial::{Location, Partial};
use crate::segment::{By, SegmentLayout};
use crate::{Clip, Clipper, Dtype, NonFinite, NormType, Optimizer, OptimizerState, Tensor, TensorMut};

const CHILD: &str = "GRADCLIP_COUNTED";
const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];

/// Work on a multiple of [`COLUMNS`] elements.
type Work = fn(Dtype, &mut [u8]);

const COLUMNS: usize = 128;
const AT: Location = Location { tensor: 0, index: 0 };

fn measure(dtype: Dtype, data: &[u8], norm_type: NormType) {
    let mut slot = [Partial::EMPTY];
    with_element!(dtype, T => norm::norms::<T>(norm_type, AT, data, data.len() / size_of::<T>(), &mut slot));
    assert!(slot[0].sum.is_finite() && slot[0].max.is_finite());
}

fn columns(dtype: Dtype, data: &[u8], norm_type: NormType) {
    let mut slots = [Partial::EMPTY; COLUMNS];
    with_element!(dtype, T => columns::norms::<T>(norm_type, AT, data, COLUMNS, &mut slots));
}

fn power(p: f64) -> NormType {
    NormType::p(p)
}

fn outcome() -> Outcome {
    let clip = Clip::norm(0.5);
    clip.outcome(clip.known(&Partial { sum: 1.0, ..Partial::EMPTY }), Magnitude::plain(0.5), 1.0, false)
}

fn scaled(dtype: Dtype, data: &mut [u8], by: By, outcomes: usize, drop: bool) {
    let outcomes = vec![outcome(); outcomes];
    let layout = SegmentLayout { by, columns: COLUMNS as u64, segment: 0, first: 0 };
    with_element!(dtype, T => scale::scale::<T>(&outcomes, layout, 0, drop, data));
}

fn clamped(dtype: Dtype, data: &mut [u8], bound: f64) {
    let clip = Clip::value(bound);
    with_element!(dtype, T => clamp::clamp::<T>(&clip, AT, data));
}

/// Clamps a block with an infinity, which is dropped.
fn dropped(dtype: Dtype, data: &mut [u8]) {
    let clip = Clip::value(0.25).non_finite(NonFinite::Drop);
    with_element!(dtype, T => {
        data[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&<T as Widen>::of_bits(<T as Widen>::INFINITY)));
        clamp::clamp::<T>(&clip, AT, data)
    });
}

fn unscaled(dtype: Dtype, data: &mut [u8]) {
    let clip = Clip::value(0.25).grad_scale(0.5);
    with_element!(dtype, T => clamp::clamp::<T>(&clip, AT, data));
}

fn exact(dtype: Dtype, data: &mut [u8]) {
    let outcomes = [Outcome { factor: 1e-42, ..outcome() }];
    let layout = SegmentLayout { by: By::Whole, columns: 1, segment: 0, first: 0 };
    with_element!(dtype, T => scale::scale::<T>(&outcomes, layout, 0, false, data));
}

/// A whole step, with gradients and parameters of one type.
fn stepped(optimizer: Optimizer, dtype: Dtype, parameter: &mut [u8]) {
    const BYTES: usize = 2 * BLOCK * size_of::<f64>();
    let (gradient, mut state) = ([0x3c; BYTES], [[0; BYTES]; 2]);
    let gradient = Tensor::from_bytes(dtype, &gradient[..parameter.len()]).expect("whole elements");
    let mut parameter = TensorMut::from_bytes(dtype, parameter).expect("whole elements");
    let wide = parameter.len() * if dtype == Dtype::F64 { 8 } else { 4 };
    let mut steps = OptimizerState::elsewhere(&[(optimizer, &[gradient])]).expect("valid settings");
    // What reads all gradients is counted elsewhere.
    let clip = Clipper::cpu().decide_scale(&Clip::norm(0.5), &[1.0], &[gradient]).expect("a norm");
    let step = steps.decided(vec![clip]).expect("they fit");
    let kept = optimizer.state_tensors(dtype).len();
    let state = state.iter_mut().take(kept).map(|array| &mut array[..wide]);
    step.apply(0, 0, &mut parameter, &gradient, state).expect("it fits");
}

fn summed(dtype: Dtype, data: &[u8]) {
    let outcomes = vec![outcome(); data.len() / COLUMNS / dtype.size()];
    let mut sums = [0; COLUMNS * 8];
    let size = if dtype == Dtype::F64 { 8 } else { 4 };
    with_element!(dtype, T => sum::sum::<T>(&outcomes, false, data, COLUMNS, 0, &mut sums[..COLUMNS * size]));
}

/// The compiler of the counts in [`KERNELS`]. Another one counts a little differently.
const RUST: &str = "rustc 1.95.0";

/// Instructions per element of float32, float64, float16 and bfloat16: portable, AVX2, AVX-512.
type Counts = [[f64; 4]; 3];

#[rustfmt::skip]
const KERNELS: [(&str, Work, Counts); 20] = [
    ("L2", |dtype, data| measure(dtype, data, NormType::L2),
        [[1.61, 1.61, 10.9, 3.16], [0.80, 0.80, 0.55, 0.67], [0.42, 0.42, 0.36, 0.36]]),
    ("L1", |dtype, data| measure(dtype, data, NormType::L1),
        [[2.19, 1.62, 9.28, 3.61], [0.80, 0.55, 0.92, 1.05], [0.42, 0.30, 0.61, 0.61]]),
    ("inf", |dtype, data| measure(dtype, data, NormType::Inf),
        [[2.38, 9.75, 0.56, 0.56], [0.34, 0.94, 0.17, 0.17], [0.17, 0.34, 0.09, 0.09]]),
    ("p = 3", |dtype, data| measure(dtype, data, power(3.0)),
        [[3.38, 3.38, 12.6, 5.66], [1.30, 1.30, 1.55, 1.69], [0.67, 0.67, 0.86, 0.86]]),
    ("p = 1.5", |dtype, data| measure(dtype, data, power(1.5)),
        [[74.7, 73.1, 83.4, 76.2], [31.5, 30.5, 31.8, 31.9], [13.1, 12.5, 13.3, 13.3]]),
    ("columns", |dtype, data| columns(dtype, data, NormType::L2),
        [[2.66, 2.66, 11.2, 3.66], [1.72, 1.74, 1.29, 1.41], [1.32, 1.32, 1.16, 1.17]]),
    ("columns, inf", |dtype, data| columns(dtype, data, NormType::Inf),
        [[3.09, 10.7, 1.29, 1.30], [1.00, 1.47, 0.76, 0.77], [0.76, 0.99, 0.64, 0.64]]),
    ("scale", |dtype, data| scaled(dtype, data, By::Whole, 1, false),
        [[0.94, 1.69, 19.0, 10.3], [0.34, 0.59, 0.47, 1.75], [0.17, 0.34, 0.30, 0.88]]),
    ("scale, drop", |dtype, data| scaled(dtype, data, By::Whole, 1, true),
        [[2.69, 4.19, 20.1, 12.3], [0.84, 1.94, 0.94, 2.12], [0.47, 0.94, 0.53, 1.06]]),
    ("scale columns", |dtype, data| scaled(dtype, data, By::Columns, COLUMNS, false),
        [[1.66, 3.46, 20.4, 6.66], [0.81, 1.35, 1.43, 2.62], [0.72, 0.95, 0.85, 1.45]]),
    ("look", |dtype, data| clamped(dtype, data, 3.0),
        [[2.38, 5.59, 0.56, 0.56], [0.34, 1.33, 0.17, 0.17], [0.17, 0.73, 0.09, 0.09]]),
    ("look, clamp", |dtype, data| clamped(dtype, data, 0.25),
        [[4.25, 9.43, 3.69, 3.69], [0.81, 2.36, 0.97, 0.97], [0.41, 1.29, 0.45, 0.45]]),
    // Looked at twice.
    ("look, clamp, drop", |dtype, data| dropped(dtype, data),
        [[10.6, 22.2, 5.25, 5.25], [2.72, 5.00, 1.67, 1.67], [1.44, 2.47, 0.85, 0.85]]),
    ("look, clamp, unscale", |dtype, data| unscaled(dtype, data),
        [[7.56, 14.8, 23.9, 10.7], [2.75, 4.94, 2.22, 3.56], [1.97, 2.71, 1.59, 2.16]]),
    ("scale rows", |dtype, data| scaled(dtype, data, By::Rows, 16, false),
        [[1.95, 2.55, 20.0, 11.8], [1.50, 1.59, 1.62, 2.91], [1.37, 1.27, 1.49, 2.05]]),
    ("exact products", |dtype, data| exact(dtype, data),
        [[3.31, 1.69, 19.7, 6.50], [1.94, 0.59, 1.44, 2.81], [1.56, 0.34, 1.19, 1.75]]),
    ("sum of examples", |dtype, data| summed(dtype, data),
        [[4.46, 3.96, 13.1, 6.37], [2.45, 2.20, 2.70, 2.82], [1.93, 1.81, 2.12, 2.12]]),
    ("count", |dtype, data| with_element!(dtype, T => assert_eq!(count::count::<T>(data).non_finite, 0)),
        [[2.88, 10.5, 1.44, 1.44], [1.06, 2.12, 0.53, 0.53], [0.67, 1.34, 0.34, 0.34]]),
    ("step, SGD", |dtype, data| stepped(Optimizer::sgd(0.1).momentum(0.9), dtype, data),
        [[5.50, 10.4, 35.2, 14.4], [3.12, 5.38, 6.18, 7.49], [2.44, 3.50, 5.29, 5.85]]),
    ("step, AdamW", |dtype, data| stepped(Optimizer::adamw(0.1), dtype, data),
        [[13.9, 35.9, 43.8, 22.9], [6.06, 11.5, 9.18, 10.5], [3.75, 5.94, 6.64, 7.20]]),
];

/// The largest ratio of a count to its row, either way. Compilers differ by less, and kernels that are no vectors by
/// more. A count that falls further would leave room for such a loss, so the table must follow it.
const TOLERANCE: f64 = 1.3;

/// Elements between -1 and 1.
fn elements(dtype: Dtype, len: usize) -> Vec<u8> {
    let number = |i: usize| (i.wrapping_mul(2_654_435_761) >> 8 & 0xff) as f32 / 128.0 - 1.0;
    let numbers = (0..len).map(number);
    match dtype {
        Dtype::F32 => numbers.flat_map(f32::to_ne_bytes).collect(),
        Dtype::F64 => numbers.flat_map(|x| f64::from(x).to_ne_bytes()).collect(),
        Dtype::F16 => numbers.flat_map(|x| f16::from_f32(x).to_ne_bytes()).collect(),
        Dtype::BF16 => numbers.flat_map(|x| bf16::from_f32(x).to_ne_bytes()).collect(),
    }
}

/// Two numbers of elements. The counts are subtracted, so the cost of a call drops out. Rows are taken several at once.
fn lengths(kernel: usize) -> [usize; 2] {
    let of_rows = ["columns", "rows", "examples"].iter().any(|word| KERNELS[kernel].0.contains(word));
    match KERNELS[kernel].0 {
        _ if of_rows => [4 * COLUMNS, 8 * COLUMNS],
        // Whole blocks: a step copies block by block, into memory as large as one block for both lengths.
        name if name.starts_with("step") => [BLOCK, 2 * BLOCK],
        _ => [COLUMNS, 2 * COLUMNS],
    }
}

/// Every case, in an order that child and parent share: instruction set, kernel, dtype.
fn cases() -> impl Iterator<Item = (usize, usize, usize)> {
    let of_set =
        |set| (0..KERNELS.len()).flat_map(move |kernel| (0..DTYPES.len()).map(move |dtype| (set, kernel, dtype)));
    (0..Set::all().count()).flat_map(of_set)
}

/// The child: runs every case, once to warm up and then between signals.
fn run_counted() {
    ptrace::traceme().expect("the parent traces");
    let sets: Vec<_> = Set::all().collect();
    for (set, kernel, dtype) in cases() {
        let ((_, set), (_, work, _), dtype) = (sets[set], KERNELS[kernel], DTYPES[dtype]);
        for len in lengths(kernel) {
            let mut data = elements(dtype, len);
            isa::on(set, || work(dtype, &mut data));
            let mut data = elements(dtype, len);
            raise(Signal::SIGUSR1).expect("raised");
            isa::on(set, || work(dtype, &mut data));
            raise(Signal::SIGUSR1).expect("raised");
        }
    }
}

/// Waits for the traced thread to stop for a signal.
fn stopped() -> (Pid, Signal) {
    match waitpid(None, Some(WaitPidFlag::__WALL)).expect("the child is there") {
        WaitStatus::Stopped(thread, signal) => (thread, signal),
        other => panic!("the child ended with {other:?}"),
    }
}

/// Steps to the child's next own signal, and counts the steps.
fn count(thread: Pid) -> u64 {
    for count in 0.. {
        ptrace::step(thread, None).expect("it is stopped");
        if stopped().1 == Signal::SIGUSR1 {
            return count;
        }
    }
    unreachable!("it signals")
}

#[test]
fn kernels_are_vectors() {
    if std::env::var_os(CHILD).is_some() {
        return run_counted();
    }
    // Both on one core, where switching between them costs a hundredth.
    let this = Pid::from_raw(0);
    let cores = sched_getaffinity(this).expect("known");
    let mut one = CpuSet::new();
    one.set((0..CpuSet::count()).find(|core| cores.is_set(*core) == Ok(true)).expect("one at least")).expect("valid");
    sched_setaffinity(this, &one).expect("allowed");
    let mut child = Command::new(std::env::current_exe().expect("it runs"))
        .args(["--exact", "cpu::tests::instructions::kernels_are_vectors", "--test-threads", "1"])
        .env(CHILD, "1")
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("this very program starts");
    let mut wrong = Vec::new();
    let mut counted = KERNELS.map(|(_, _, counts)| counts);
    let sets: Vec<_> = Set::all().map(|(name, _)| name).collect();
    for (set, kernel, dtype) in cases() {
        let lengths = lengths(kernel);
        let counts = lengths.map(|_| {
            let (thread, signal) = stopped();
            assert_eq!(signal, Signal::SIGUSR1);
            let count = count(thread);
            ptrace::cont(thread, None).expect("it is stopped");
            count as f64
        });
        let found = (counts[1] - counts[0]) / (lengths[1] - lengths[0]) as f64;
        let (name, _, expected) = KERNELS[kernel];
        let expected = expected[set][dtype];
        counted[kernel][set][dtype] = found;
        println!("{:8} {name:13} {:8} {found:6.2} instructions an element", sets[set], DTYPES[dtype]);
        if found > expected * TOLERANCE || found < expected / TOLERANCE {
            wrong.push(format!("{} {name} {}: {found:.2}, not {expected:.2}", sets[set], DTYPES[dtype]));
        }
    }
    child.kill().expect("it is there");
    // The tracer must wait for the traced thread.
    while waitpid(None, Some(WaitPidFlag::__WALL)).is_ok() {}
    let this = Command::new("rustc").arg("--version").output();
    let this =
        this.map_or("an unknown compiler".into(), |told| String::from_utf8_lossy(&told.stdout).trim().to_owned());
    assert!(
        wrong.is_empty(),
        "instructions an element, with {this}, are not those of {RUST}: {wrong:#?}\n\
         A kernel that takes several times as many is no longer made of vectors: fix it. If all are still vectors, after a \
         change of a kernel or an update of Rust, write these counts into KERNELS and the compiler into RUST:\n{}",
        rows(&counted)
    );
}

/// The rows of [`KERNELS`]. An instruction set that this machine lacks keeps its counts.
fn rows(counted: &[Counts]) -> String {
    let number = |x: f64| if x < 10.0 { format!("{x:.2}") } else { format!("{x:.1}") };
    let list = |items: Vec<String>| format!("[{}]", items.join(", "));
    let row = |counts: Counts| list(counts.map(|of_set| list(of_set.map(number).to_vec())).to_vec());
    KERNELS
        .iter()
        .zip(counted)
        .map(|((name, ..), counts)| format!("    (\"{name}\", ...\n        {}),\n", row(*counts)))
        .collect()
}

//! Guards against failures with pools of threads that are small, busy, broken or missing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use crate::common::numbers::{Random, exact_norm};
use crate::common::{Data, Path, assert_norm, assert_same_bits};
use gradclip::{Clip, Clipper, NormType, Tensor, TensorMut};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Enough elements for every thread to get some.
fn gradients() -> Data {
    Data::of(&Random(31).normals(4 << 20, 1.0).into_iter().map(|x| x as f32).collect::<Vec<_>>())
}

fn clip() -> Clip {
    Clip::norm(1.0)
}

fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().expect("threads")
}

/// Clips in the pool, and checks that it does what is done outside.
fn check(pool: &ThreadPool, what: &str) {
    let set = [gradients()];
    let (want, after) = Path::Cpu.clip(&clip(), &set).ok();
    let (report, after_in_pool) = pool.install(|| Path::Cpu.clip(&clip(), &set)).ok();
    assert_eq!(report.total_norm.to_bits(), want.total_norm.to_bits(), "{what}");
    assert_same_bits(&after_in_pool, &after, what);
}

/// For rayon, a pool of no threads is one of as many as there are cores.
#[test]
fn a_pool_of_no_or_of_one_thread() {
    check(&pool(0), "no threads");
    check(&pool(1), "one thread");
}

/// Replicas alone, of which nothing is measured.
#[test]
fn nothing_that_counts_is_no_work() {
    let mut data = gradients();
    let before = [data.clone()];
    let report = pool(2).install(|| {
        let view = TensorMut::from_bytes(data.dtype, &mut data.bytes).expect("whole").replica(true);
        Clipper::cpu().apply(&clip(), &mut [view]).expect("finite")
    });
    assert_eq!((report.total_norm, report.elements, report.clipped), (0.0, 0, false));
    assert_same_bits(&[data], &before, "nothing is clipped by a norm of 0");
}

#[test]
fn a_pool_whose_threads_have_panicked() {
    let pool = pool(2);
    for _ in 0..4 {
        catch_unwind(AssertUnwindSafe(|| pool.broadcast(|_| panic!("on purpose")))).expect_err("it panics");
    }
    check(&pool, "after a panic");
}

/// A progress callback of the caller's that panics: the panic reaches the caller, and the next clip works.
#[test]
fn a_callback_that_panics() {
    let mut data = gradients();
    let tensor = || Tensor::from_bytes(data.dtype, &data.bytes).expect("whole");
    let clipper = Clipper::cpu().on_progress(|_| panic!("on purpose"));
    catch_unwind(AssertUnwindSafe(|| clipper.measure(&clip(), &[tensor()]))).expect_err("it panics");
    let norm = exact_norm(NormType::L2, data.numbers());
    let view = TensorMut::from_bytes(data.dtype, &mut data.bytes).expect("whole");
    assert_norm(Clipper::cpu().apply(&clip(), &mut [view]).expect("finite").total_norm, norm, 1e-7, "after a panic");
}

/// Every thread of a pool clips at the same time, and each of these clips wants the pool for itself.
#[test]
fn clips_within_a_busy_pool() {
    let set = [gradients()];
    let (want, _) = Path::Cpu.clip(&clip(), &set).ok();
    let norms = pool(3).broadcast(|_| Path::Cpu.clip(&clip(), &set).ok().0.total_norm);
    assert!(norms.iter().all(|norm| norm.to_bits() == want.total_norm.to_bits()), "{norms:?}");
}

/// Where no thread can be started, the caller's own does all the work. The test runs itself with stacks so large that the
/// system has room for none.
#[test]
fn no_threads_to_be_had() {
    const CHILD: &str = "GRADCLIP_WITHOUT_THREADS";
    if std::env::var_os(CHILD).is_some() {
        assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "threads can be started");
        let set = gradients();
        let view = Tensor::from_bytes(set.dtype, &set.bytes).expect("whole");
        let report = Clipper::cpu().measure(&clip(), &[view]).expect("finite");
        assert_norm(report.total_norm, exact_norm(NormType::L2, set.numbers()), 1e-7, "on one thread");
        return;
    }
    let output = Command::new(std::env::current_exe().expect("it runs"))
        .args(["--exact", "pools::no_threads_to_be_had", "--test-threads", "1"])
        .env(CHILD, "1")
        .env("RUST_MIN_STACK", (1u64 << 46).to_string())
        .output()
        .expect("this very program starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

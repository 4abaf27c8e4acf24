//! Tests of `src/cpu/pool.rs`.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

fn pool(threads: usize) -> rayon::ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().expect("threads")
}

#[test]
fn borrowed_work_is_done_once() {
    pool(3).install(|| {
        for _ in 0..20 {
            let (work, next, done) = (vec![1usize; 64], AtomicUsize::new(0), AtomicUsize::new(0));
            with_helpers(2, &|| {
                while let Some(one) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    done.fetch_add(*one, Ordering::Relaxed);
                }
            });
            assert_eq!(done.into_inner(), 64);
        }
    });
}

#[test]
fn a_panic_of_a_helper_reaches_the_caller() {
    let helper_came = AtomicBool::new(false);
    let caller = std::thread::current().id();
    let work = || {
        if std::thread::current().id() != caller {
            helper_came.store(true, Ordering::Relaxed);
            panic!("on purpose");
        }
        while !helper_came.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    };
    catch_unwind(AssertUnwindSafe(|| with_helpers(1, &work))).expect_err("the helper has panicked");
}

#[test]
fn a_panic_of_the_caller_waits_for_helpers() {
    let (helper_came, helper_left) = (AtomicBool::new(false), AtomicBool::new(false));
    let caller = std::thread::current().id();
    let work = || {
        if std::thread::current().id() == caller {
            while !helper_came.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            panic!("on purpose");
        }
        helper_came.store(true, Ordering::Relaxed);
        std::thread::yield_now();
        helper_left.store(true, Ordering::Relaxed);
    };
    catch_unwind(AssertUnwindSafe(|| with_helpers(1, &work))).expect_err("the caller has panicked");
    assert!(helper_left.into_inner());
}

/// The only thread of the pool comes to help after the work is gone.
#[test]
fn a_late_helper_finds_the_latch_closed() {
    let pool = pool(1);
    pool.install(|| {
        let times = AtomicUsize::new(0);
        with_helpers(3, &|| {
            times.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(times.into_inner(), 1);
    });
    pool.install(|| ());
}

/// A pool of thousands of threads takes seconds to wake.
#[test]
fn no_more_threads_work_than_some_for_each_core() {
    let most = THREADS_PER_CORE * available_parallelism().map_or(1, NonZeroUsize::get);
    assert_eq!([1, most, most + 1].map(|size| pool(size).install(threads)), [1, most, most]);
}

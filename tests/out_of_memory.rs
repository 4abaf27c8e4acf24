//! Guards against a machine that runs out of memory in the middle: an error or a slower way, the right result or none. The
//! process's own address space is limited while it runs, so this is a program of its own (Linux).
#![cfg(all(feature = "gpu", target_os = "linux"))]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use common::gpu::{download, gpu_tensor, open, step, upload};
use common::numbers::{Random, exact_norm};
use common::{Data, assert_norm, assert_same_bits, clip_host};
use gradclip::gpu::GpuClipper;
use gradclip::{Clip, Clipper, Dtype, Error, NormType, Scope, wgpu};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

const MIB: u64 = 1 << 20;

/// One test, because the limit is the process's. Host tensors come first: what plans have freed, the allocator would give
/// them without asking the system.
#[test]
fn where_memory_runs_out() {
    host_tensors();
    plans();
}

/// What this program allocates while memory is short, from room that was set aside: Rust ends a process that has no memory
/// for it, and here it is the device that shall have none.
struct Reserve {
    room: AtomicPtr<u8>,
    used: AtomicUsize,
    short: AtomicBool,
}

const ROOM: usize = 1 << 30;

#[global_allocator]
static RESERVE: Reserve =
    Reserve { room: AtomicPtr::new(null_mut()), used: AtomicUsize::new(0), short: AtomicBool::new(false) };

impl Reserve {
    fn holds(&self, at: *mut u8) -> bool {
        (at as usize).wrapping_sub(self.room.load(Ordering::Relaxed) as usize) < ROOM
    }
}

// SAFETY: memory is the system's, or a part of the room that is handed out once, aligned, and never again.
unsafe impl GlobalAlloc for Reserve {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let room = self.room.load(Ordering::Relaxed);
        if self.short.load(Ordering::Relaxed) && !room.is_null() {
            let size = layout.size() + layout.align();
            let at = self.used.fetch_add(size, Ordering::Relaxed);
            if at + size <= ROOM {
                // SAFETY: within the room.
                let at = unsafe { room.add(at) };
                // SAFETY: less than the alignment, which is part of the size.
                return unsafe { at.add(at.align_offset(layout.align())) };
            }
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if self.room.load(Ordering::Relaxed).is_null() || !self.holds(at) {
            // SAFETY: it came from there.
            unsafe { System.dealloc(at, layout) }
        }
    }
}

/// Runs `f` while the process may take so many bytes of address space more than it has.
fn with_spare<T>(bytes: u64, f: impl FnOnce() -> T) -> T {
    if RESERVE.room.load(Ordering::Relaxed).is_null() {
        let layout = Layout::from_size_align(ROOM, 4096).expect("valid");
        // SAFETY: of a size above 0. It stays until the program ends.
        RESERVE.room.store(unsafe { System.alloc(layout) }, Ordering::Relaxed);
    }
    let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux tells");
    let pages: u64 = pages.split(' ').next().and_then(|pages| pages.parse().ok()).expect("a number");
    let (soft, hard) = getrlimit(Resource::RLIMIT_AS).expect("it is known");
    setrlimit(Resource::RLIMIT_AS, (pages * 4096 + bytes) as rlim_t, hard).expect("it may be lowered");
    RESERVE.short.store(true, Ordering::Relaxed);
    let result = f();
    RESERVE.short.store(false, Ordering::Relaxed);
    setrlimit(Resource::RLIMIT_AS, soft, hard).expect("it may be raised again");
    result
}

/// Takes what the allocator has kept of freed memory, for good, so that the device needs more from the system.
fn take_what_was_kept() {
    with_spare(0, || {
        for size in [16, 4, 1].map(|mib| mib << 20) {
            let layout = Layout::from_size_align(size, 4096).expect("valid");
            // SAFETY: of a size above 0.
            while !unsafe { System.alloc(layout) }.is_null() {}
        }
    });
}

/// Plans whose tables, partials and results the device has no room for are refused, whichever of them it is.
fn plans() {
    let rows = 400_000;
    let data = Data::rounded(Dtype::F32, Random(1).normals(rows, 1.0)).shaped(&[rows, 1]);
    let by_unit = Clip::norm(0.5).scope(Scope::Unit);
    let (mut refused, mut lost, mut made) = (0, 0, 0);
    let mut ready: Option<(GpuClipper, wgpu::Buffer)> = None;
    for spare in (0..20).chain([24, 32, 64, 96, 128]) {
        // What is compiled on demand is compiled before: running out inside the driver's compiler is the driver's own affair.
        let (gpu, buffer) = ready.get_or_insert_with(|| {
            let gpu = open();
            let buffer = upload(&gpu, &data.bytes);
            gpu.plan(&by_unit, &[gpu_tensor(&buffer, &data, 0)]).expect("there is memory");
            take_what_was_kept();
            (gpu, buffer)
        });
        let plan = with_spare(spare * MIB, || gpu.plan(&by_unit, &[gpu_tensor(buffer, &data, 0)]));
        match plan {
            Ok(plan) => {
                made += 1;
                step(gpu, &plan);
                let norm = exact_norm(NormType::L2, data.numbers());
                assert_norm(plan.report().wait().expect("finite").total_norm, norm, 1e-6, "with memory again");
                ready = None;
            }
            Err(Error::OutOfMemory(_)) => {
                refused += 1;
                let after = Data::from_bytes(Dtype::F32, download(gpu, buffer)).shaped(&[rows, 1]);
                assert_same_bits(&[after], std::slice::from_ref(&data), "refused");
            }
            // What wgpu itself needs for an upload and does not get costs it the device.
            Err(Error::DeviceLost(reason)) if reason.contains("memory") => {
                lost += 1;
                ready = None;
            }
            Err(error) => panic!("{spare} MiB to spare: {error}"),
        }
    }
    println!("out of memory: plans refused {refused} times, with the device {lost} times, made {made} times");
    assert!(refused > 1 && made > 0, "plans: {refused} refused, {made} made");
}

/// Loads of host tensors for which the process has no room: fewer at a time, or an error and everything as it was.
fn host_tensors() {
    let gpu = open();
    let host = [Data::rounded(Dtype::F32, Random(2).normals(16 << 20, 1.0))];
    let norm = Clip::norm(1.0);
    // What is compiled on demand is compiled before: running out inside the driver's compiler is the driver's own affair.
    let (want, clipped) = clip_host(&Clipper::gpu(gpu.clone()), &norm, &host).ok();
    assert_norm(want.total_norm, exact_norm(NormType::L2, host[0].numbers()), 1e-6, "with memory");

    take_what_was_kept();
    // The copy that is clipped is there before the limit is.
    let mut after = host.to_vec();
    let (mut refused, mut done) = (0, 0);
    for spare in [4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 512] {
        after.clone_from_slice(&host);
        let clipper = Clipper::gpu(gpu.clone().with_memory_budget(u64::MAX));
        let report = with_spare(spare * MIB, || clipper.apply(&norm, &mut [after[0].view_mut()]));
        match report {
            Ok(report) => {
                done += 1;
                assert_norm(report.total_norm, want.total_norm, 1e-7, "with little memory");
                assert_same_bits(&after, &clipped, &format!("{spare} MiB to spare"));
            }
            Err(Error::OutOfMemory(_)) => {
                refused += 1;
                assert_same_bits(&after, &host, &format!("{spare} MiB to spare"));
            }
            Err(error) => panic!("{spare} MiB to spare: {error}"),
        }
    }
    assert!(refused > 0 && done > 0, "host tensors: {refused} refused, {done} clipped");
    println!("out of memory: host tensors refused {refused} times, clipped {done} times");
    let (_, again) = clip_host(&Clipper::gpu(gpu), &norm, &host).ok();
    assert_same_bits(&again, &clipped, "with memory again");
}

//! How fast this machine reads, copies and multiplies in place: what no clip can beat.
//!
//! A limit is only one if its own loop is not what holds it up, and that cannot be told from its source: of two sums
//! that differ in the number of their accumulators alone (AVX-512, 32 and 64), one read at 5 GB/s and the other at 56.
//! So each pass has several forms, and the caller takes the one that is fastest here. Four runs read side by side were
//! about a sixth faster than one on two cores of an EPYC (family 25); prefetching 0.5 to 8 KiB ahead in one was slower.

use std::ffi::{CStr, c_char};
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::{Failure, code};

/// Bytes that a thread reads or multiplies at a time; an equal share for each thread was never faster.
const CHUNK: usize = 1 << 20;

/// Bytes in a cache line.
const LINE: usize = 64;

/// One way to write a pass.
struct Form<F> {
    name: &'static CStr,
    /// Whether this machine has its instructions.
    here: fn() -> bool,
    /// Safe to call if `here` says so.
    run: F,
}

type Read = unsafe fn(&[u64]) -> u64;
type Multiply = unsafe fn(&mut [f32], f32);
type Copy = unsafe fn(&mut [u64], &[u64]);

const READS: &[Form<Read>] = &[
    Form { name: c"8 sums", here: || true, run: sum::<8> },
    Form { name: c"16 sums", here: || true, run: sum::<16> },
    #[cfg(target_arch = "x86_64")]
    Form { name: c"AVX2, 32 sums", here: || is_x86_feature_detected!("avx2"), run: x86::sum_avx2 },
    #[cfg(target_arch = "x86_64")]
    Form { name: c"AVX2, 4 runs at once", here: || is_x86_feature_detected!("avx2"), run: x86::sum_runs },
    #[cfg(target_arch = "x86_64")]
    Form { name: c"AVX-512, 64 sums", here: || is_x86_feature_detected!("avx512f"), run: x86::sum_avx512 },
];

const MULTIPLIES: &[Form<Multiply>] = &[
    Form { name: c"plain", here: || true, run: multiply },
    #[cfg(target_arch = "x86_64")]
    Form { name: c"AVX-512", here: || is_x86_feature_detected!("avx512f"), run: x86::multiply_avx512 },
];

const COPIES: &[Form<Copy>] = &[
    Form { name: c"memcpy", here: || true, run: <[u64]>::copy_from_slice },
    #[cfg(target_arch = "x86_64")]
    Form { name: c"AVX2, past the caches", here: || is_x86_feature_detected!("avx2"), run: x86::copy_streaming },
];

/// The forms that this machine can run are numbered from 0.
fn form<F>(forms: &'static [Form<F>], number: u32) -> Result<&'static Form<F>, Failure> {
    forms.iter().filter(|form| (form.here)()).nth(number as usize).ok_or(Failure::Unknown)
}

#[inline(always)]
fn sum<const SUMS: usize>(words: &[u64]) -> u64 {
    let (rows, rest) = words.as_chunks::<SUMS>();
    let mut sums = [0u64; SUMS];
    for row in rows {
        for (sum, word) in sums.iter_mut().zip(row) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

#[inline(always)]
fn multiply(data: &mut [f32], factor: f32) {
    for x in data {
        *x *= factor;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, _mm_sfence, _mm256_add_epi64, _mm256_loadu_si256, _mm256_setzero_si256, _mm256_storeu_si256,
        _mm256_stream_si256,
    };

    #[target_feature(enable = "avx2")]
    pub(super) fn sum_avx2(words: &[u64]) -> u64 {
        super::sum::<32>(words)
    }

    /// Four runs side by side: a core's prefetchers stop at the end of a page, and then there are three others. Left to
    /// the compiler, this was not vectorised, and read at 10 GB/s.
    #[target_feature(enable = "avx2")]
    pub(super) fn sum_runs(words: &[u64]) -> u64 {
        let lines = words.len() / 32;
        let (runs, rest) = words.split_at(32 * lines);
        let [a, b, c, d] = [0, 1, 2, 3].map(|run| runs[8 * lines * run..][..8 * lines].as_chunks::<8>().0);
        let mut sums = [_mm256_setzero_si256(); 8];
        for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
            for (sums, line) in sums.as_chunks_mut::<2>().0.iter_mut().zip([a, b, c, d]) {
                let (low, high) = line.split_at(4);
                // SAFETY:
                // - Each half is 32 bytes that may be read, at any alignment.
                let words =
                    unsafe { [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())] };
                *sums = [_mm256_add_epi64(sums[0], words[0]), _mm256_add_epi64(sums[1], words[1])];
            }
        }
        let mut total = rest.iter().fold(0u64, |total, word| total.wrapping_add(*word));
        for sum in sums {
            let mut parts = [0u64; 4];
            // SAFETY:
            // - `parts` is 32 bytes that may be written, at any alignment.
            unsafe { _mm256_storeu_si256(parts.as_mut_ptr().cast(), sum) };
            total = parts.iter().fold(total, |total, part| total.wrapping_add(*part));
        }
        total
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn sum_avx512(words: &[u64]) -> u64 {
        super::sum::<64>(words)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn multiply_avx512(data: &mut [f32], factor: f32) {
        super::multiply(data, factor);
    }

    /// Stores that do not read the lines they overwrite.
    #[target_feature(enable = "avx2")]
    pub(super) fn copy_streaming(to: &mut [u64], from: &[u64]) {
        let (to, to_rest) = to.as_chunks_mut::<4>();
        let (from, from_rest) = from.as_chunks::<4>();
        assert!(to.as_ptr().cast::<__m256i>().is_aligned() && to.len() == from.len(), "runs of whole lines");
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY:
            // - `from` is 32 bytes that may be read, at any alignment.
            // - `to` is 32 bytes that may be written; the first is aligned to 32, as asserted above, so all are.
            unsafe { _mm256_stream_si256(to.as_mut_ptr().cast(), _mm256_loadu_si256(from.as_ptr().cast())) };
        }
        to_rest.copy_from_slice(from_rest);
        // Whoever is told that the copy is done must see it: streamed stores are ordered by nothing else.
        _mm_sfence();
    }
}

/// That a run is of whole cache lines.
fn lines(data: *const u8, bytes: usize) -> Result<(), Failure> {
    if data.align_offset(LINE) == 0 && bytes.is_multiple_of(LINE) && bytes > 0 {
        Ok(())
    } else {
        Err(Failure::Unaligned)
    }
}

/// The name of a form of a pass: 0 read, 1 multiply, 2 copy. Null past the last one that this machine can run.
#[unsafe(no_mangle)]
extern "C" fn peers_form(pass: u32, number: u32) -> *const c_char {
    let name = match pass {
        0 => form(READS, number).map(|form| form.name),
        1 => form(MULTIPLIES, number).map(|form| form.name),
        2 => form(COPIES, number).map(|form| form.name),
        _ => Err(Failure::Unknown),
    };
    name.map_or(std::ptr::null(), CStr::as_ptr)
}

/// Reads `bytes` bytes and adds them up as 64-bit words, so that no read can be left out.
///
/// # Safety
/// `data` points to `bytes` initialised bytes that nothing writes before this returns; `total` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn peers_read(number: u32, data: *const u64, bytes: usize, total: *mut u64) -> i32 {
    let run = || {
        let form = form(READS, number)?;
        lines(data.cast(), bytes)?;
        // SAFETY:
        // - `data` points to `bytes` initialised bytes in one allocation, which nothing writes meanwhile, by this
        //   function's contract.
        // - It is aligned and `bytes` a multiple of 8, both checked above.
        let words = unsafe { slice::from_raw_parts(data, bytes / 8) };
        let sum = AtomicU64::new(0);
        words.par_chunks(CHUNK / 8).for_each(|words| {
            // SAFETY:
            // - `form` gives only forms whose instructions this machine has.
            let part = unsafe { (form.run)(words) };
            sum.fetch_add(part, Ordering::Relaxed);
        });
        // SAFETY:
        // - `total` may be written, by this function's contract.
        unsafe { total.write_unaligned(sum.into_inner()) };
        Ok(())
    };
    code(run())
}

/// Multiplies `bytes` bytes of float32 in place.
///
/// # Safety
/// `data` points to `bytes` initialised bytes that nothing else reads or writes before this returns.
#[unsafe(no_mangle)]
unsafe extern "C" fn peers_multiply(number: u32, data: *mut f32, bytes: usize, factor: f32) -> i32 {
    let run = || {
        let form = form(MULTIPLIES, number)?;
        lines(data.cast(), bytes)?;
        // SAFETY:
        // - `data` points to `bytes` initialised bytes in one allocation, which nothing else uses meanwhile, by this
        //   function's contract, and any 4 bytes are a float32.
        // - It is aligned and `bytes` a multiple of 4, both checked above.
        let data = unsafe { slice::from_raw_parts_mut(data, bytes / 4) };
        data.par_chunks_mut(CHUNK / 4).for_each(|data| {
            // SAFETY:
            // - `form` gives only forms whose instructions this machine has.
            unsafe { (form.run)(data, factor) };
        });
        Ok(())
    };
    code(run())
}

/// Copies `bytes` bytes, an equal share on each thread: the C library's copy goes past the caches only for long runs.
///
/// # Safety
/// `from` points to `bytes` initialised bytes that nothing writes before this returns, `to` to as many initialised ones
/// that nothing else reads or writes, and the two do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn peers_copy(number: u32, to: *mut u64, from: *const u64, bytes: usize) -> i32 {
    let run = || {
        let form = form(COPIES, number)?;
        lines(to.cast(), bytes)?;
        lines(from.cast(), bytes)?;
        // SAFETY:
        // - Both point to `bytes` initialised bytes in one allocation, apart from each other, and nothing else uses
        //   them meanwhile, by this function's contract.
        // - Both are aligned and `bytes` a multiple of 8, all checked above.
        let (to, from) = unsafe { (slice::from_raw_parts_mut(to, bytes / 8), slice::from_raw_parts(from, bytes / 8)) };
        let share = bytes.div_ceil(rayon::current_num_threads()).next_multiple_of(LINE) / 8;
        to.par_chunks_mut(share).zip(from.par_chunks(share)).for_each(|(to, from)| {
            // SAFETY:
            // - `form` gives only forms whose instructions this machine has.
            unsafe { (form.run)(to, from) };
        });
        Ok(())
    };
    code(run())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of lines of memory.
    #[repr(align(64))]
    #[derive(Clone)]
    struct Line([u64; 8]);

    const WORDS: u64 = 8 * 40_000;

    fn counting() -> Vec<Line> {
        (0..WORDS / 8).map(|line| Line(std::array::from_fn(|i| line * 8 + i as u64))).collect()
    }

    /// Two float32 of one value.
    fn pair(x: f32) -> u64 {
        u64::from(x.to_bits()) * 0x1_0000_0001
    }

    #[test]
    fn every_form_of_a_pass_does_the_same() {
        let data = counting();
        let bytes = size_of_val(&data[..]);
        for number in 0.. {
            if peers_form(0, number).is_null() {
                assert!(number > 0);
                break;
            }
            let mut total = 0;
            // SAFETY:
            // - `data` is `bytes` long, initialised, and only read here.
            // - `total` may be written.
            let code = unsafe { peers_read(number, data.as_ptr().cast(), bytes, &raw mut total) };
            assert_eq!((code, total), (0, WORDS * (WORDS - 1) / 2));
        }
        for number in 0.. {
            if peers_form(1, number).is_null() {
                assert!(number > 0);
                break;
            }
            let mut ones = vec![Line([pair(1.0); 8]); data.len()];
            // SAFETY:
            // - `ones` is `bytes` long, initialised, and used by nothing else.
            let code = unsafe { peers_multiply(number, ones.as_mut_ptr().cast(), bytes, 2.0) };
            assert!(code == 0 && ones.iter().all(|line| line.0 == [pair(2.0); 8]));
        }
        for number in 0.. {
            if peers_form(2, number).is_null() {
                assert!(number > 0);
                break;
            }
            let mut copy = vec![Line([0; 8]); data.len()];
            // SAFETY:
            // - Both are `bytes` long, initialised, apart from each other, and used by nothing else.
            let code = unsafe { peers_copy(number, copy.as_mut_ptr().cast(), data.as_ptr().cast(), bytes) };
            assert!(code == 0 && copy.iter().zip(&data).all(|(copy, data)| copy.0 == data.0));
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let data = counting();
        let mut total = 0;
        // SAFETY:
        // - Each run lies in `data`, which is initialised and only read here.
        // - `total` may be written.
        let mut read =
            |number, at: usize, bytes| unsafe { peers_read(number, data[0].0[at..].as_ptr(), bytes, &raw mut total) };
        assert_eq!(read(99, 0, 64), Failure::Unknown as i32);
        assert_eq!(read(0, 1, 64), Failure::Unaligned as i32);
        assert_eq!(read(0, 0, 32), Failure::Unaligned as i32);
    }
}

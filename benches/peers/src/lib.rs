//! What `benches/peers/cpu.py` calls through ctypes: gradclip's CPU path on memory that another library owns, so that
//! contenders alternate on the very same arrays, and the machine's limits on the same threads (`limits`).
//!
//! Every function returns 0, or a code of [`Failure`]; all of them work on rayon's global pool.

mod limits;

use std::ffi::c_void;
use std::slice;

use gradclip::{Clip, Clipper, Dtype, Error, Tensor, TensorMut};

/// Why a call did nothing.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A number that stands for no dtype, mode or form, or for a form whose instructions this machine has not.
    Unknown = 1,
    /// A threshold that [`Clip`] refuses.
    Threshold = 2,
    /// A gradient is not finite.
    NonFinite = 3,
    /// The pool was started before.
    Pool = 4,
    /// Memory that does not start and end at a cache line.
    Unaligned = 5,
    /// Any other error of the library.
    Other = 6,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Setting { .. } => Self::Threshold,
            Error::NonFinite { .. } => Self::NonFinite,
            _ => Self::Other,
        }
    }
}

/// A gradient in memory that the caller owns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// The first element.
    pub data: *mut c_void,
    /// How many elements there are.
    pub len: usize,
    /// 0 float32, 1 float16, 2 bfloat16, 3 float64.
    pub dtype: u32,
}

/// What a clip reports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Answer {
    /// The norm before clipping.
    pub total_norm: f64,
    /// 1 if anything was clipped.
    pub clipped: u32,
}

const MEASURE: u32 = 0;
const CLIP_NORM: u32 = 1;
const CLIP_VALUE: u32 = 2;

fn code(result: Result<(), Failure>) -> i32 {
    result.map_or_else(|failure| failure as i32, |()| 0)
}

/// Starts the pool with this number of threads.
#[unsafe(no_mangle)]
pub extern "C" fn peers_start(threads: usize) -> i32 {
    code(rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|_| Failure::Pool))
}

/// Measures (mode 0), clips by norm (1) or clips by value (2). The threshold is `max_norm` or `clip_value`; measuring
/// ignores it.
///
/// # Safety
/// `views` points to `count` views, each of `len` initialised elements that nothing else reads or writes before this
/// returns, and no two of them overlap. `answer` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peers_clip(
    views: *const View,
    count: usize,
    mode: u32,
    threshold: f64,
    answer: *mut Answer,
) -> i32 {
    let run = || {
        let views = if count == 0 {
            &[]
        } else {
            // SAFETY:
            // - `views` points to `count` initialised views in one allocation, by this function's contract.
            // - The caller does not write them before this returns.
            unsafe { slice::from_raw_parts(views, count) }
        };
        // SAFETY:
        // - Each view is one of the caller's, whose elements are initialised, are used by nothing else before this
        //   function returns, and overlap no other view's, by this function's contract. No tensor outlives it.
        let mut tensors = views.iter().map(|view| unsafe { tensor(view) }).collect::<Result<Vec<_>, _>>()?;
        let report = match mode {
            MEASURE => {
                let tensors: Vec<Tensor<'_>> = tensors.iter().map(TensorMut::as_tensor).collect();
                Clipper::cpu().measure(&Clip::norm(f64::INFINITY), &tensors)?
            }
            CLIP_NORM => Clipper::cpu().apply(&Clip::norm(threshold), &mut tensors)?,
            CLIP_VALUE => Clipper::cpu().apply(&Clip::value(threshold), &mut tensors)?,
            _ => return Err(Failure::Unknown),
        };
        let told = Answer { total_norm: report.total_norm, clipped: report.clipped.into() };
        // SAFETY:
        // - `answer` is valid for a write, by this function's contract.
        unsafe { answer.write_unaligned(told) };
        Ok(())
    };
    code(run())
}

/// The elements of a view.
///
/// # Safety
/// `view.data` points to `view.len` initialised elements that nothing else reads or writes while the tensor is in use.
unsafe fn tensor(view: &View) -> Result<TensorMut<'_>, Failure> {
    let dtype = match view.dtype {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::BF16,
        3 => Dtype::F64,
        _ => return Err(Failure::Unknown),
    };
    let bytes = if view.len == 0 {
        &mut []
    } else {
        // SAFETY:
        // - `data` points to `len` initialised elements in one allocation, by this function's contract, so their bytes
        //   number at most `isize::MAX`, are initialised, and need no alignment.
        // - Nothing else reads or writes them while the tensor is in use, by the same contract.
        unsafe { slice::from_raw_parts_mut(view.data.cast::<u8>(), view.len * dtype.size()) }
    };
    Ok(TensorMut::from_bytes(dtype, bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clip(views: &[View], mode: u32, threshold: f64) -> (i32, Answer) {
        let mut answer = Answer::default();
        // SAFETY:
        // - Every test makes its views of one live array each, which it does not use meanwhile.
        // - `answer` may be written.
        let code = unsafe { peers_clip(views.as_ptr(), views.len(), mode, threshold, &raw mut answer) };
        (code, answer)
    }

    fn view(data: &mut [f32]) -> View {
        View { data: data.as_mut_ptr().cast(), len: data.len(), dtype: 0 }
    }

    #[test]
    fn measures_and_clips_what_the_caller_owns() {
        let (mut a, mut b) = ([3.0f32], [4.0f32]);
        let views = [view(&mut a), view(&mut b), View { data: std::ptr::null_mut(), len: 0, dtype: 1 }];
        let (code, answer) = clip(&views, MEASURE, 0.0);
        assert_eq!((code, answer.total_norm, answer.clipped), (0, 5.0, 0));
        let (code, answer) = clip(&views, CLIP_NORM, 2.5);
        assert_eq!((code, answer.total_norm, answer.clipped), (0, 5.0, 1));
        assert!((a[0] - 1.5).abs() < 1e-5 && (b[0] - 2.0).abs() < 1e-5);
        assert_eq!(clip(&[view(&mut a)], CLIP_VALUE, 0.5).0, 0);
        assert_eq!(a, [0.5]);
    }

    #[test]
    fn says_why_it_did_nothing() {
        let mut data = [f32::NAN];
        assert_eq!(clip(&[view(&mut data)], CLIP_NORM, 1.0).0, Failure::NonFinite as i32);
        assert_eq!(clip(&[view(&mut data)], CLIP_NORM, -1.0).0, Failure::Threshold as i32);
        assert_eq!(clip(&[view(&mut data)], 9, 1.0).0, Failure::Unknown as i32);
        assert_eq!(clip(&[View { dtype: 9, ..view(&mut data) }], MEASURE, 1.0).0, Failure::Unknown as i32);
    }
}

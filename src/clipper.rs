//! [`Clipper`]: host tensors, clipped by whichever backend was chosen; and the one-line functions.

use crate::progress::Progress;
use crate::{Clip, ClipReport, Element, Error, Tensor, TensorMut, cpu};

#[cfg(feature = "gpu")]
use crate::gpu::{GpuClipper, Wait};

/// Clips gradients that lie in host memory, on the CPU or through a GPU.
///
/// Gradients that lie in GPU memory already are clipped there by [`GpuClipper`](crate::gpu::GpuClipper).
#[derive(Clone, Debug)]
pub struct Clipper {
    backend: Backend,
    progress: Progress,
}

#[derive(Clone, Debug)]
enum Backend {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu(Box<GpuClipper>),
}

impl Clipper {
    /// The fastest backend for host memory, by measurement: so far the CPU on every machine measured, because the
    /// gradients would have to cross the bus twice (see [`crate::gpu::tuning`]).
    #[must_use]
    pub fn auto() -> Self {
        Self::cpu()
    }

    /// The CPU, on rayon's current pool: install one of your own to choose the number of threads.
    #[must_use]
    pub fn cpu() -> Self {
        Self { backend: Backend::Cpu, progress: Progress::default() }
    }

    /// A GPU: tensors are uploaded, clipped there, and read back if anything was changed.
    #[cfg(feature = "gpu")]
    #[must_use]
    pub fn gpu(gpu: GpuClipper) -> Self {
        Self { backend: Backend::Gpu(Box::new(gpu)), progress: Progress::default() }
    }

    /// Calls `f` while tensors are measured, with the number of bytes done since its last call, from any thread that
    /// works on them; on a GPU, while they are uploaded. Scaling comes after all bytes were measured and is not told.
    #[must_use]
    pub fn on_progress(mut self, f: impl Fn(u64) + Send + Sync + 'static) -> Self {
        self.progress = Progress::new(f);
        self
    }

    /// Clips in place.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, TensorMut};
    /// let (mut w, mut b) = (vec![3.0f32; 1], vec![half::f16::from_f32(4.0); 1]);
    /// let mut grads = [TensorMut::new(&mut w).named("w"), TensorMut::new(&mut b).named("b")];
    /// let report = Clipper::auto().apply(&Clip::norm(1.0)?.eps(0.0)?, &mut grads)?;
    /// assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.2));
    /// assert_eq!(w, [0.6]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy; on a GPU also [`Error::UnsupportedDtype`] for float64 and the device's
    /// own errors. The gradients are then as they were.
    pub fn apply(&self, clip: &Clip, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        match &self.backend {
            Backend::Cpu => cpu::apply(clip, tensors, &self.progress),
            #[cfg(feature = "gpu")]
            Backend::Gpu(gpu) => pollster::block_on(gpu.apply_by(Wait::Sleeping, clip, tensors, &self.progress)),
        }
    }

    /// Measures what [`Clipper::apply`] would report, and writes nothing.
    ///
    /// # Errors
    /// The same.
    pub fn measure(&self, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<ClipReport, Error> {
        match &self.backend {
            Backend::Cpu => cpu::measure(clip, tensors, &self.progress),
            #[cfg(feature = "gpu")]
            Backend::Gpu(gpu) => pollster::block_on(gpu.measure_by(Wait::Sleeping, clip, tensors, &self.progress)),
        }
    }
}

/// Clips slices by their global L2 norm, in place: `clip_grad_norm_` of PyTorch, with a norm summed in float64.
///
/// ```
/// let (mut w, mut b) = ([3.0f32, 0.0], [4.0f32]);
/// let report = gradclip::clip_grad_norm(&mut [&mut w[..], &mut b[..]], 1.0)?;
/// assert_eq!(report.total_norm, 5.0);
/// assert!(report.clipped && (w[0] - 0.6).abs() < 1e-6);
/// # Ok::<(), gradclip::Error>(())
/// ```
///
/// # Errors
/// [`Error::BadParameter`] for a negative or NaN `max_norm`; [`Error::NonFinite`] if a gradient is NaN or infinite.
/// Nothing is written then.
pub fn clip_grad_norm<T: Element>(grads: &mut [&mut [T]], max_norm: f64) -> Result<ClipReport, Error> {
    apply_to_slices(&Clip::norm(max_norm)?, grads)
}

/// Clips every element of the slices to `-clip_value ..= clip_value`, in place: `clip_grad_value_` of PyTorch.
///
/// # Errors
/// [`Error::BadParameter`] for a negative or NaN `clip_value`. NaN gradients stay NaN and are counted in the report.
pub fn clip_grad_value<T: Element>(grads: &mut [&mut [T]], clip_value: f64) -> Result<ClipReport, Error> {
    apply_to_slices(&Clip::value(clip_value)?, grads)
}

fn apply_to_slices<T: Element>(clip: &Clip, grads: &mut [&mut [T]]) -> Result<ClipReport, Error> {
    let mut tensors: Vec<_> = grads.iter_mut().map(|g| TensorMut::new(g)).collect();
    Clipper::auto().apply(clip, &mut tensors)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn progress_adds_up_to_what_was_measured() {
        let mut data = vec![1.0f32; 300_001];
        let mut tiny = [1.0f64; 3];
        let told = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&told);
        let clipper = Clipper::cpu().on_progress(move |bytes| {
            counter.fetch_add(bytes, Ordering::Relaxed);
        });
        for clip in [Clip::norm(1.0), Clip::value(0.5)] {
            told.store(0, Ordering::Relaxed);
            let tensors = &mut [TensorMut::new(&mut data), TensorMut::new(&mut tiny)];
            clipper.apply(&clip.expect("valid"), tensors).expect("finite");
            assert_eq!(told.load(Ordering::Relaxed), 4 * 300_001 + 8 * 3);
        }
    }
}

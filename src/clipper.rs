//! [`Clipper`] clips host tensors on a chosen backend. Beside it stand the one-line functions.

use std::sync::Arc;

use crate::context::{Context, Progress};
use crate::cpu::decide::{self as cpu, Given};
use crate::processes::{GroupCall, ProcessGroup, single_process};
use crate::tensor::Spec;
use crate::{Clip, ClipReport, DecidedClip, Element, Error, NormAccumulator, Tensor, TensorMut, Threshold};

#[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
use crate::gpu::GpuClipper;
#[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
use crate::wait::block_on;

/// Clips gradients that lie in host memory, on the CPU or through a GPU.
///
#[cfg_attr(
    feature = "gpu",
    doc = "[`GpuClipper`](crate::gpu::GpuClipper) clips gradients that already lie in GPU memory."
)]
#[derive(Clone, Debug)]
pub struct Clipper {
    backend: Backend,
    progress: Progress,
    processes: Arc<dyn ProcessGroup>,
}

#[derive(Clone, Debug)]
enum Backend {
    Cpu,
    #[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
    Gpu(Box<GpuClipper>),
}

impl Clipper {
    /// The fastest backend for gradients in host memory: the CPU. A GPU would receive each byte, and return what it
    /// clips, over a bus that is slower than the memory (`Clipper::gpu`).
    #[must_use]
    pub fn auto() -> Self {
        Self::cpu()
    }

    /// The CPU, on rayon's current pool: install one of your own to choose the number of threads. No more than 4 threads
    /// for each core work on a clip, however many a pool has, and the global pool, if the clip is the first to use it, has
    /// no more (`RAYON_NUM_THREADS` may ask for them). The calling thread works with them. It works alone on small sets
    /// and where no thread can be started.
    #[must_use]
    pub fn cpu() -> Self {
        Self::on(Backend::Cpu)
    }

    /// A GPU: tensors are uploaded, clipped there, and read back if anything was changed. Together they may exceed its
    /// memory ([`GpuClipper::with_memory_budget`]).
    #[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
    #[must_use]
    pub fn gpu(gpu: GpuClipper) -> Self {
        Self::on(Backend::Gpu(Box::new(gpu)))
    }

    fn on(backend: Backend) -> Self {
        Self { backend, progress: Progress::default(), processes: Arc::clone(single_process()) }
    }

    /// Calls `f` while tensors are measured (on a GPU, while they are uploaded), from any thread that works on them,
    /// with the number of bytes done since its last call. Scaling comes later and is not reported.
    #[must_use]
    pub fn on_progress(mut self, f: impl Fn(u64) + Send + Sync + 'static) -> Self {
        self.progress = Progress::new(f);
        self
    }

    pub(crate) fn context(&self) -> Context<'_> {
        Context { progress: &self.progress, processes: &*self.processes }
    }

    /// Clips together with the other processes of a group. Each process holds a part of the gradients, and every norm
    /// is that of all parts. [`processes`](crate::processes) says what must be called together. [`Clipper::scale`],
    /// [`Clipper::decide_scale`], [`Clipper::accumulate`] and [`Clipper::finish`] measure no shared norm and exchange no messages.
    #[cfg(not(target_arch = "wasm32"))]
    #[must_use]
    pub fn processes(mut self, processes: Arc<dyn ProcessGroup>) -> Self {
        self.processes = processes;
        self
    }

    /// Clips in place.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, TensorMut};
    /// let (mut w, mut b) = (vec![3.0f32; 1], vec![half::f16::from_f32(4.0); 1]);
    /// let mut grads = [TensorMut::new(&mut w).named("w"), TensorMut::new(&mut b).named("b")];
    /// let report = Clipper::auto().apply(&Clip::norm(1.0).eps(0.0), &mut grads)?;
    /// assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.2));
    /// assert_eq!(w, [0.6]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy; on a GPU also [`Error::UnsupportedDtype`] for float64 and the device's
    /// own errors. The gradients are then unchanged.
    pub fn apply(&self, clip: &Clip, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        let mut reports = self.apply_groups(&mut [(*clip, tensors)])?;
        // One group has one report.
        Ok(reports.swap_remove(0))
    }

    /// Clips tensors into others of the same or of a wider dtype, and leaves them as they are. Halves are widened to
    /// float32 exactly before they are clipped, so nothing is lost where their dtype holds no element as small or as
    /// large as the result. Names, shapes and parameters are those of `tensors`.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, Tensor, TensorMut};
    /// let half = [half::f16::from_f32(6.5e-5)];
    /// let mut clipped = [0f32];
    /// let clip = Clip::norm(1.0).grad_scale(65536.0);
    /// Clipper::auto().apply_into(&clip, &[Tensor::new(&half)], &mut [TensorMut::new(&mut clipped)])?;
    /// assert!(clipped[0] > 9e-10); // float16 has nothing between 0 and 6e-8
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] unless each tensor has one destination, and [`Error::Tensor`] if one has another length or a
    /// narrower dtype; the destinations are then unchanged. Those of [`Clipper::apply`], after which they hold the
    /// tensors, widened and not clipped.
    pub fn apply_into(
        &self,
        clip: &Clip,
        tensors: &[Tensor<'_>],
        into: &mut [TensorMut<'_>],
    ) -> Result<ClipReport, Error> {
        let checked = if tensors.len() == into.len() {
            (0..).zip(tensors).zip(&*into).try_for_each(|((i, tensor), into)| tensor.check_into(i, into))
        } else {
            Err(Error::usage(format!("{} tensors have {} destinations", tensors.len(), into.len())))
        };
        if let Err(error) = checked {
            // So the other processes learn that this one has failed.
            drop(GroupCall::begin(&*self.processes));
            return Err(error);
        }
        let mut views = Vec::new();
        for (tensor, into) in tensors.iter().zip(into) {
            tensor.widen_into(into)?;
            let spec = Spec { dtype: into.dtype(), ..tensor.spec };
            views.push(TensorMut { spec, data: &mut *into.data, parameter: tensor.parameter });
        }
        self.apply(clip, &mut views)
    }

    /// Clips groups of tensors in place, each by a clip of its own. It returns one report for each group, in order. A
    /// tensor's place in a report or an error is its place in its group.
    ///
    /// The clips must have the same `grad_scale` and the same policy for non-finite gradients. The policy holds for all
    /// groups together: under [`NonFinite::Error`](crate::NonFinite::Error) one bad element leaves all unchanged.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, TensorMut};
    /// let (mut embedding, mut rest) = ([3.0f32, 4.0], [0.1f32; 8]);
    /// let reports = Clipper::auto().apply_groups(&mut [
    ///     (Clip::norm(0.5), &mut [TensorMut::new(&mut embedding).named("embedding")]),
    ///     (Clip::norm(1.0), &mut [TensorMut::new(&mut rest).named("rest")]),
    /// ])?;
    /// assert!(reports[0].clipped && !reports[1].clipped);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] if the clips disagree, and those of [`Clipper::apply`].
    pub fn apply_groups(&self, groups: &mut [(Clip, &mut [TensorMut<'_>])]) -> Result<Vec<ClipReport>, Error> {
        match &self.backend {
            Backend::Cpu => cpu::apply(groups, None, self.context()),
            #[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
            Backend::Gpu(gpu) => block_on(gpu.applied(groups, self.context())),
        }
    }

    /// Clips in place by a threshold that follows the norms: see [`Threshold`]. The clip's own threshold stays an upper
    /// bound; infinity sets none.
    ///
    /// # Errors
    /// [`Error::ThresholdState`] if the threshold's state belongs to other tensors, [`Error::Usage`] if the clip has no
    /// norm to follow, and those of [`Clipper::apply`]. If a GPU fails after it has returned the norms, the threshold
    /// has taken them in although nothing was clipped. Keep a clone of the threshold where that matters.
    pub fn apply_adaptive(
        &self,
        clip: &Clip,
        threshold: &mut dyn Threshold,
        tensors: &mut [TensorMut<'_>],
    ) -> Result<ClipReport, Error> {
        match &self.backend {
            Backend::Cpu => Ok(cpu::apply(&mut [(*clip, tensors)], Some(threshold), self.context())?.swap_remove(0)),
            #[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
            Backend::Gpu(gpu) => block_on(gpu.adapted(clip, threshold, tensors, self.context())),
        }
    }

    /// Measures what [`Clipper::apply`] would report, and writes nothing.
    ///
    /// # Errors
    /// The same.
    pub fn measure(&self, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<ClipReport, Error> {
        match &self.backend {
            Backend::Cpu => cpu::measure(clip, tensors, self.context()),
            #[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
            Backend::Gpu(gpu) => block_on(gpu.measured(clip, tensors, self.context())),
        }
    }

    /// Measures and decides what [`Clipper::apply`] would do, on the CPU. The caller then clips the tensors piece by
    /// piece, for example if they exceed memory or are to be written elsewhere. [`DecidedClip`] has an example.
    ///
    /// A value clip under [`NonFinite::Propagate`](crate::NonFinite::Propagate) or
    /// [`NonFinite::Drop`](crate::NonFinite::Drop) decides without reading the tensors.
    ///
    /// # Errors
    /// Those of [`Clipper::apply`].
    pub fn decide(&self, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<DecidedClip, Error> {
        Ok(self.decide_groups(&[(*clip, tensors)])?.swap_remove(0))
    }

    /// Measures and decides what [`Clipper::apply_groups`] would do, on the CPU, as [`Clipper::decide`] does. It returns
    /// one decision for each group, in order.
    ///
    /// # Errors
    /// Those of [`Clipper::apply_groups`].
    pub fn decide_groups(&self, groups: &[(Clip, &[Tensor<'_>])]) -> Result<Vec<DecidedClip>, Error> {
        let decided = cpu::decide(groups, None, self.context())?.into_iter().zip(groups);
        Ok(decided.map(|(decided, (_, tensors))| DecidedClip::new(decided, tensors)).collect())
    }

    /// Measures and decides what [`Clipper::apply_adaptive`] would do, on the CPU, as [`Clipper::decide`] does. The
    /// threshold takes the step into its state at this point.
    ///
    /// # Errors
    /// Those of [`Clipper::apply_adaptive`].
    pub fn decide_adaptive(
        &self,
        clip: &Clip,
        threshold: &mut dyn Threshold,
        tensors: &[Tensor<'_>],
    ) -> Result<DecidedClip, Error> {
        let decided = cpu::decide(&[(*clip, tensors)], Some(threshold), self.context())?.swap_remove(0);
        Ok(DecidedClip::new(decided, tensors))
    }

    /// Clips in place by norms that were measured elsewhere: one N for each segment, divided by `grad_scale`, in the
    /// order of [`ClipReport::segments`]. [`Scope::Global`](crate::Scope::Global) has one.
    ///
    /// Elements are not read before they are written. So the report counts no non-finite elements, and its `total_norm`
    /// is NaN under any other scope. The policy decides what an infinite norm leads to; under `Error` and `Drop` it is
    /// an error. A NaN norm is always an error.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, TensorMut};
    /// let mut mine = [3.0f32];
    /// // Another process holds the other half of the gradient, and both know that the norm of all is 5.
    /// Clipper::auto().scale(&Clip::norm(1.0), &[5.0], &mut [TensorMut::new(&mut mine)])?;
    /// assert!((mine[0] - 0.6).abs() < 1e-6);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] if there is not one norm for each segment, for a clip by value and for AGC; [`Error::Setting`]
    /// if a norm is NaN or negative, or infinite under these policies. The gradients are then unchanged.
    pub fn scale(&self, clip: &Clip, norms: &[f64], tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        // The host reads and writes each element once, which is cheaper than sending it over a bus.
        cpu::scale(clip, Given::Norms(norms), tensors)
    }

    /// Decides what [`Clipper::scale`] would do, without reading the tensors. They are then clipped piece by piece, as
    /// after [`Clipper::decide`].
    ///
    /// # Errors
    /// Those of [`Clipper::scale`].
    pub fn decide_scale(&self, clip: &Clip, norms: &[f64], tensors: &[Tensor<'_>]) -> Result<DecidedClip, Error> {
        Ok(DecidedClip::new(cpu::decide_scale(clip, Given::Norms(norms), tensors)?, tensors))
    }

    /// Adds tensors to a running partial, on the CPU. They count as measured, and as the next tensors in the list.
    ///
    /// # Errors
    /// [`Error::Usage`] after [`NormAccumulator::merge_across`].
    pub fn accumulate(&self, running: &mut NormAccumulator, tensors: &[Tensor<'_>]) -> Result<(), Error> {
        running.check_open()?;
        let partial = cpu::partial(running.clip(), tensors, &self.progress)?;
        running.add(partial, tensors);
        Ok(())
    }

    /// Clips tensors in place by the norm of everything that a running partial has accumulated. Call it for each
    /// accumulated set, once all sets are in.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy, whichever set holds the element.
    pub fn finish(&self, running: &NormAccumulator, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        // Comes first, because it names the bad element whichever set holds it.
        let report = running.report()?;
        let lost = cpu::scale(running.clip(), running.given(), tensors)?.lost;
        Ok(ClipReport { lost, ..report })
    }

    /// Clips each example by itself and sums the clipped examples: `sums[i]` becomes the sum over dimension 0 of the
    /// clipped `tensors[i]`. The tensors themselves stay unchanged. This is the gradient of DP-SGD before the noise;
    /// Optax's `differentially_private_aggregate` computes it.
    ///
    /// The scope must be [`Scope::Example`](crate::Scope::Example) or
    /// [`Scope::ExampleTensor`](crate::Scope::ExampleTensor). Sums are float64 for float64 gradients, else float32.
    ///
    /// On the CPU products and sums are float64, and each sum is rounded once: with n examples it is off by n + 1 units
    /// of 2^-53 of the sum of the products' magnitudes at most, before that rounding. On a GPU all is float32, and at
    /// most 32,768 examples, or as many as one binding holds, are summed at once, as a tree. The error is at most 98 units
    /// of 2^-24 of the sum of the products' magnitudes, and one more for each time.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, Scope, Tensor, TensorMut};
    /// // Two examples of a gradient of two elements.
    /// let grads = [3.0f32, 4.0, 0.1, 0.2];
    /// let mut sum = [0f32; 2];
    /// let clip = Clip::norm(1.0).eps(0.0).scope(Scope::Example);
    /// let grads = [Tensor::new(&grads).shape(&[2, 2])?];
    /// let report = Clipper::auto().sum_examples(&clip, &grads, &mut [TensorMut::new(&mut sum)])?;
    /// assert_eq!(report.num_clipped(), 1);
    /// assert!((sum[0] - 0.7).abs() < 1e-6 && (sum[1] - 1.0).abs() < 1e-6);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] under another scope, or unless each tensor has one sum; [`Error::Tensor`] if a sum has another
    /// length than an example; those of [`Clipper::apply`]. The sums are then unchanged. They also stay unchanged under
    /// [`NonFinite::Skip`](crate::NonFinite::Skip) if an element is not finite.
    pub fn sum_examples(
        &self,
        clip: &Clip,
        tensors: &[Tensor<'_>],
        sums: &mut [TensorMut<'_>],
    ) -> Result<ClipReport, Error> {
        match &self.backend {
            Backend::Cpu => cpu::sum_examples(clip, tensors, sums, self.context()),
            #[cfg(all(feature = "gpu", not(target_arch = "wasm32")))]
            Backend::Gpu(gpu) => block_on(gpu.summed(clip, tensors, sums, self.context())),
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
/// [`Error::Setting`] for a negative or NaN `max_norm`; [`Error::NonFinite`] if a gradient is NaN or infinite.
/// Nothing is written then.
pub fn clip_grad_norm<T: Element>(grads: &mut [&mut [T]], max_norm: f64) -> Result<ClipReport, Error> {
    apply_to_slices(&Clip::norm(max_norm), grads)
}

/// Clips every element of the slices to `-clip_value ..= clip_value`, in place: `clip_grad_value_` of PyTorch.
///
/// # Errors
/// [`Error::Setting`] for a negative or NaN `clip_value`. NaN gradients stay NaN and are counted in the report.
pub fn clip_grad_value<T: Element>(grads: &mut [&mut [T]], clip_value: f64) -> Result<ClipReport, Error> {
    apply_to_slices(&Clip::value(clip_value), grads)
}

fn apply_to_slices<T: Element>(clip: &Clip, grads: &mut [&mut [T]]) -> Result<ClipReport, Error> {
    let mut tensors: Vec<_> = grads.iter_mut().map(|g| TensorMut::new(g)).collect();
    Clipper::auto().apply(clip, &mut tensors)
}

#[cfg(test)]
#[path = "tests/clipper.rs"]
mod tests;

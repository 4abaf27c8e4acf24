//! Host tensors through the GPU: upload, clip, and read back if anything was changed.

use std::sync::Arc;

use super::GpuClipper;
use super::device::Wait;
use super::plan::{GpuPlan, Parts};
use super::table::{Piece, dtype_code};
use super::tuning::STAGING_BYTES;
use crate::error::tensor_label;
use crate::progress::Progress;
use crate::{Clip, ClipReport, Error, Tensor, TensorMut};

/// Where a run of bytes of a host tensor lies on the device.
struct Run {
    tensor: usize,
    /// In the tensor, in bytes.
    at: usize,
    len: usize,
    buffer: usize,
    /// In the buffer, in bytes.
    offset: u64,
}

impl GpuClipper {
    /// Clips host tensors in place through the GPU. All of them must fit into device memory together.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for float64, [`Error::NonFinite`] under that policy, and the device's own errors.
    /// The gradients are then as they were, unless the device is lost while they are read back.
    pub async fn apply(&self, clip: &Clip, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        self.apply_by(Wait::Polling, clip, tensors, &Progress::default()).await
    }

    pub(crate) async fn apply_by(
        &self,
        wait: Wait,
        clip: &Clip,
        tensors: &mut [TensorMut<'_>],
        progress: &Progress,
    ) -> Result<ClipReport, Error> {
        let views: Vec<_> = tensors.iter().map(TensorMut::as_tensor).collect();
        let (plan, buffers, runs) = self.upload(clip, &views, true, progress)?;
        let report = self.run(&plan, wait).await?;
        if report.clipped || report.non_finite.is_some() || clip.grad_scale != 1.0 {
            // All of it, before the first write: a device that is lost halfway must not leave half of it clipped.
            let mut clipped = Vec::new();
            for buffer in &buffers {
                clipped.push(self.read_all(buffer, wait).await?);
            }
            for run in &runs {
                let at = run.offset as usize;
                tensors[run.tensor].data[run.at..run.at + run.len]
                    .copy_from_slice(&clipped[run.buffer][at..at + run.len]);
            }
        }
        Ok(report)
    }

    /// Measures what [`GpuClipper::apply`] would report, and writes nothing.
    ///
    /// # Errors
    /// The same.
    pub async fn measure(&self, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<ClipReport, Error> {
        self.measure_by(Wait::Polling, clip, tensors, &Progress::default()).await
    }

    pub(crate) async fn measure_by(
        &self,
        wait: Wait,
        clip: &Clip,
        tensors: &[Tensor<'_>],
        progress: &Progress,
    ) -> Result<ClipReport, Error> {
        let (plan, ..) = self.upload(clip, tensors, false, progress)?;
        self.run(&plan, wait).await
    }

    /// [`GpuClipper::apply`], waiting for the answer.
    ///
    /// # Errors
    /// The same.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn apply_blocking(&self, clip: &Clip, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        pollster::block_on(self.apply_by(Wait::Sleeping, clip, tensors, &Progress::default()))
    }

    /// [`GpuClipper::measure`], waiting for the answer.
    ///
    /// # Errors
    /// The same.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn measure_blocking(&self, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<ClipReport, Error> {
        pollster::block_on(self.measure_by(Wait::Sleeping, clip, tensors, &Progress::default()))
    }

    async fn read_all(&self, buffer: &wgpu::Buffer, wait: Wait) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < buffer.size() {
            let at = bytes.len() as u64;
            bytes.extend(self.device.read(buffer, at, STAGING_BYTES.min(buffer.size() - at), wait).await?);
        }
        Ok(bytes)
    }

    async fn run(&self, plan: &GpuPlan, wait: Wait) -> Result<ClipReport, Error> {
        self.device.scoped(|| {
            let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            plan.encode(&mut encoder)?;
            self.device.queue.submit([encoder.finish()]);
            Ok(())
        })??;
        plan.report_by(wait).await
    }

    /// Packs the tensors into as few buffers as the device's limits allow, and plans their clip.
    fn upload(
        &self,
        clip: &Clip,
        tensors: &[Tensor<'_>],
        writes: bool,
        progress: &Progress,
    ) -> Result<(GpuPlan, Vec<wgpu::Buffer>, Vec<Run>), Error> {
        for (i, t) in tensors.iter().enumerate() {
            if dtype_code(t.dtype).is_none() {
                return Err(Error::UnsupportedDtype { tensor: tensor_label(t.name, i), dtype: t.dtype });
            }
        }
        let largest = self.device.device.limits().max_buffer_size & !255;
        let (runs, sizes) = pack(tensors, largest);
        let pieces = runs
            .iter()
            .map(|run| {
                let (dtype, size) = (tensors[run.tensor].dtype, tensors[run.tensor].dtype.size());
                Piece {
                    buffer: run.buffer,
                    dtype,
                    start: run.offset / size as u64,
                    len: (run.len / size) as u64,
                    tensor: run.tensor,
                    first_element: (run.at / size) as u64,
                    segment: 0,
                }
            })
            .collect();
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffers = self.device.scoped(|| {
            let buffer = |size: &u64| {
                let label = Some("gradclip host tensors");
                self.device.device.create_buffer(&wgpu::BufferDescriptor {
                    label,
                    size: *size,
                    usage,
                    mapped_at_creation: false,
                })
            };
            sizes.iter().map(buffer).collect::<Vec<_>>()
        })?;
        let names = tensors.iter().map(|t| t.name.map(Arc::from)).collect();
        let plan = GpuPlan::new(self, clip, Parts { buffers: buffers.clone(), pieces, names }, writes)?;
        self.device.scoped(|| {
            let mut staged = 0;
            for run in &runs {
                let bytes = &tensors[run.tensor].data[run.at..run.at + run.len];
                let whole = bytes.len() & !3;
                let buffer = &buffers[run.buffer];
                self.device.queue.write_buffer(buffer, run.offset, &bytes[..whole]);
                if whole < bytes.len() {
                    let mut word = [0; 4];
                    word[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
                    self.device.queue.write_buffer(buffer, run.offset + whole as u64, &word);
                }
                progress.measured(run.len);
                staged += run.len as u64;
                if staged >= STAGING_BYTES {
                    // Without this the queue would hold a copy of everything.
                    self.device.queue.submit([]);
                    self.device.poll()?;
                    staged = 0;
                }
            }
            Ok(())
        })??;
        Ok((plan, buffers, runs))
    }
}

/// Cuts tensors into runs of at most [`STAGING_BYTES`], and lays them in buffers of at most `largest` bytes. Each run
/// starts at a multiple of 4 bytes.
fn pack(tensors: &[Tensor<'_>], largest: u64) -> (Vec<Run>, Vec<u64>) {
    let mut sizes: Vec<u64> = Vec::new();
    let mut runs = Vec::new();
    let longest = STAGING_BYTES.min(largest);
    for (tensor, t) in tensors.iter().enumerate() {
        let mut at = 0;
        while at < t.data.len() {
            let len = (t.data.len() - at).min(usize::try_from(longest).unwrap_or(usize::MAX));
            let bytes = len.next_multiple_of(4) as u64;
            if sizes.last().is_none_or(|size| size + bytes > largest) {
                sizes.push(0);
            }
            let buffer = sizes.len() - 1;
            runs.push(Run { tensor, at, len, buffer, offset: sizes[buffer] });
            sizes[buffer] += bytes;
            at += len;
        }
    }
    (runs, sizes)
}

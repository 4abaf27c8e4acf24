//! Host tensors through the GPU: upload, clip, and read back if anything was changed.

use std::sync::Arc;

use super::GpuClipper;
use super::build::{Follows, GroupParts, Job, Parts, Phase};
use super::device::Wait;
use super::plan::GpuPlan;
use super::table::{Piece, dtype_code};
use super::tuning::STAGING_BYTES;
use crate::cpu::{self, views};
use crate::error::tensor_label;
use crate::progress::Progress;
use crate::segment::check_groups;
use crate::threshold::Threshold;
use crate::{Clip, ClipReport, Dtype, Error, Tensor, TensorMut};

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

/// Host tensors on the device.
struct Uploaded {
    plan: GpuPlan,
    buffers: Vec<wgpu::Buffer>,
    runs: Vec<Run>,
}

impl GpuClipper {
    /// Clips host tensors in place through the GPU. All of them must fit into device memory together.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for float64, [`Error::NonFinite`] under that policy, and the device's own errors.
    /// The gradients are then as they were, unless the device is lost while they are read back.
    pub async fn apply(&self, clip: &Clip, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        let groups = &mut [(*clip, tensors)];
        Ok(self.apply_by(Wait::Polling, groups, &Progress::default()).await?.swap_remove(0))
    }

    pub(crate) async fn apply_by(
        &self,
        wait: Wait,
        groups: &mut [(Clip, &mut [TensorMut<'_>])],
        progress: &Progress,
    ) -> Result<Vec<ClipReport>, Error> {
        check_groups(groups.iter().map(|(clip, _)| clip))?;
        if groups.is_empty() {
            return Ok(Vec::new());
        }
        let views: Vec<_> = groups.iter().map(|(clip, tensors)| (*clip, views(tensors))).collect();
        let on_device = self.upload(&views, |_| Job::Clip, Follows::Clip, progress)?;
        self.submit(&on_device.plan, &[Phase::Measure, Phase::Decide, Phase::Apply])?;
        let (reports, wrote) = on_device.plan.reports_by(wait).await?;
        if wrote {
            let mut tensors: Vec<_> = groups.iter_mut().flat_map(|(_, tensors)| tensors.iter_mut()).collect();
            self.read_back(&on_device, &mut tensors, wait).await?;
        }
        Ok(reports)
    }

    pub(crate) async fn apply_adaptive_by(
        &self,
        wait: Wait,
        clip: &Clip,
        threshold: &mut dyn Threshold,
        tensors: &mut [TensorMut<'_>],
        progress: &Progress,
    ) -> Result<ClipReport, Error> {
        clip.check_adaptive()?;
        let views = [(*clip, views(tensors))];
        let on_device = self.upload(&views, |_| Job::Clip, Follows::Host, progress)?;
        let plan = &on_device.plan;
        self.submit(plan, &[Phase::Measure, Phase::Decide])?;
        plan.adapt_by(wait, threshold).await?;
        self.submit(plan, &[Phase::Decide, Phase::Apply])?;
        let (mut reports, wrote) = plan.reports_by(wait).await?;
        if wrote {
            self.read_back(&on_device, &mut tensors.iter_mut().collect::<Vec<_>>(), wait).await?;
        }
        Ok(reports.swap_remove(0))
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
        let on_device = self.upload(&[(*clip, tensors.to_vec())], |_| Job::Measure, Follows::Clip, progress)?;
        self.submit(&on_device.plan, &[Phase::Measure, Phase::Decide])?;
        Ok(on_device.plan.reports_by(wait).await?.0.swap_remove(0))
    }

    pub(crate) async fn sum_examples_by(
        &self,
        wait: Wait,
        clip: &Clip,
        tensors: &[Tensor<'_>],
        sums: &mut [TensorMut<'_>],
        progress: &Progress,
    ) -> Result<ClipReport, Error> {
        let mut into = Vec::new();
        for sum in sums.iter() {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
            into.push(self.device.storage("gradclip sums", (sum.data.len() as u64).max(4), usage)?);
        }
        let job = |at: &mut At| {
            let mut pairs = Vec::new();
            for piece in &at.groups[0].pieces {
                let (buffer, len) = (at.buffers.len() + piece.tensor, sums[piece.tensor].len() as u64);
                pairs.push((*piece, Piece { buffer, dtype: Dtype::F32, start: 0, len, first_element: 0, ..*piece }));
            }
            at.buffers.extend(into.iter().cloned());
            Job::Sum(pairs)
        };
        let on_device = self.upload(&[(*clip, tensors.to_vec())], job, Follows::Clip, progress)?;
        self.submit(&on_device.plan, &[Phase::Measure, Phase::Decide, Phase::Apply])?;
        let report = on_device.plan.reports_by(wait).await?.0.swap_remove(0);
        if !(report.found_inf() && clip.refuses_non_finite()) {
            let mut read = Vec::new();
            for (buffer, sum) in into.iter().zip(sums.iter()) {
                read.push(self.read_all(buffer, sum.data.len() as u64, wait).await?);
            }
            for (sum, bytes) in sums.iter_mut().zip(read) {
                sum.data.copy_from_slice(&bytes);
            }
        }
        Ok(report)
    }

    /// [`GpuClipper::apply`], waiting for the answer.
    ///
    /// # Errors
    /// The same.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn apply_blocking(&self, clip: &Clip, tensors: &mut [TensorMut<'_>]) -> Result<ClipReport, Error> {
        let groups = &mut [(*clip, tensors)];
        Ok(pollster::block_on(self.apply_by(Wait::Sleeping, groups, &Progress::default()))?.swap_remove(0))
    }

    /// [`GpuClipper::measure`], waiting for the answer.
    ///
    /// # Errors
    /// The same.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn measure_blocking(&self, clip: &Clip, tensors: &[Tensor<'_>]) -> Result<ClipReport, Error> {
        pollster::block_on(self.measure_by(Wait::Sleeping, clip, tensors, &Progress::default()))
    }

    async fn read_all(&self, buffer: &wgpu::Buffer, size: u64, wait: Wait) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size {
            let at = bytes.len() as u64;
            bytes.extend(self.device.read(&[(buffer, at, STAGING_BYTES.min(size - at))], wait).await?);
        }
        Ok(bytes)
    }

    /// Copies what became of the tensors back to the host.
    async fn read_back(
        &self,
        on_device: &Uploaded,
        tensors: &mut [&mut TensorMut<'_>],
        wait: Wait,
    ) -> Result<(), Error> {
        // All of it, before the first write: a device that is lost halfway must not leave half of it clipped.
        let mut clipped = Vec::new();
        for buffer in &on_device.buffers {
            clipped.push(self.read_all(buffer, buffer.size(), wait).await?);
        }
        for run in &on_device.runs {
            // Behind the tensors come their parameters.
            let Some(tensor) = tensors.get_mut(run.tensor) else { break };
            let at = run.offset as usize;
            tensor.data[run.at..run.at + run.len].copy_from_slice(&clipped[run.buffer][at..at + run.len]);
        }
        Ok(())
    }

    fn submit(&self, plan: &GpuPlan, phases: &[Phase]) -> Result<(), Error> {
        self.device.scoped(|| {
            let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            plan.encode_phases(&mut encoder, phases)?;
            self.device.queue.submit([encoder.finish()]);
            Ok(())
        })?
    }

    /// Packs the tensors and their parameters into as few buffers as the device's limits allow, and plans what is to be
    /// done with them. `runs` count the tensors of all groups, then their parameters.
    fn upload(
        &self,
        groups: &[(Clip, Vec<Tensor<'_>>)],
        job: impl FnOnce(&mut At) -> Job,
        follows: Follows,
        progress: &Progress,
    ) -> Result<Uploaded, Error> {
        let mut all: Vec<_> = groups.iter().flat_map(|(_, tensors)| tensors.iter().copied()).collect();
        // By group, what becomes of its tensors and parameters.
        let mut at = At { buffers: Vec::new(), groups: Vec::new() };
        // Where each of `all` belongs: group, tensor, and whether it is a parameter.
        let mut owners = Vec::new();
        for (group, (clip, tensors)) in groups.iter().enumerate() {
            let segments = cpu::segments_of(clip, tensors)?;
            let names = tensors.iter().map(|t| t.name.map(Arc::from)).collect();
            let (pieces, parameters) = (Vec::new(), Vec::new());
            at.groups.push(GroupParts { clip: *clip, segments, names, pieces, parameters });
            owners.extend((0..tensors.len()).map(|tensor| (group, tensor, false)));
        }
        for (group, (_, tensors)) in groups.iter().enumerate().filter(|(_, (clip, _))| clip.needs_parameters()) {
            all.extend(tensors.iter().filter_map(|t| t.parameter.copied()));
            owners.extend((0..tensors.len()).map(|tensor| (group, tensor, true)));
        }
        for (t, (_, tensor, _)) in all.iter().zip(&owners) {
            if dtype_code(t.dtype).is_none() {
                return Err(Error::UnsupportedDtype { tensor: tensor_label(t.name, *tensor), dtype: t.dtype });
            }
        }
        let largest = self.device.device.limits().max_buffer_size & !255;
        let (runs, sizes) = pack(&all, largest);
        for run in &runs {
            let (group, tensor, is_parameter) = owners[run.tensor];
            let (of, dtype) = (&mut at.groups[group], all[run.tensor].dtype);
            let size = dtype.size();
            let piece = Piece {
                buffer: run.buffer,
                dtype,
                start: run.offset / size as u64,
                len: (run.len / size) as u64,
                tensor,
                first_element: (run.at / size) as u64,
                layout: of.segments.layouts[tensor],
            };
            if is_parameter { of.parameters.push(piece) } else { of.pieces.push(piece) }
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        for size in sizes {
            at.buffers.push(self.device.storage("gradclip host tensors", size, usage)?);
        }
        let buffers = at.buffers.clone();
        let job = job(&mut at);
        let At { buffers: bound, groups } = at;
        let plan = GpuPlan::new(self, Parts { buffers: bound, groups, job, follows })?;
        self.device.scoped(|| {
            let mut staged = 0;
            for run in &runs {
                let bytes = &all[run.tensor].data[run.at..run.at + run.len];
                let whole = bytes.len() & !3;
                let buffer = &buffers[run.buffer];
                self.device.queue.write_buffer(buffer, run.offset, &bytes[..whole]);
                if whole < bytes.len() {
                    let mut word = [0; 4];
                    word[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
                    self.device.queue.write_buffer(buffer, run.offset + whole as u64, &word);
                }
                if !owners[run.tensor].2 {
                    progress.measured(run.len);
                }
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
        Ok(Uploaded { plan, buffers, runs })
    }
}

/// Where the tensors of an upload will be.
struct At {
    buffers: Vec<wgpu::Buffer>,
    groups: Vec<GroupParts>,
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

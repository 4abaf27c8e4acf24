//! A norm over the processes of a group.

use std::sync::atomic::Ordering;

use super::super::gather::Group;
use super::super::params::thresholds;
use super::super::readback::{PARTIAL_BYTES, PartialRow, ResultsHead};
use super::{GpuPlan, MERGED_ALREADY, MergedGroup, locked};
use crate::partial::Partial;
use crate::processes::{GroupCall, GroupPartials, GroupTotal, ProcessGroup, merge};
use crate::{Error, Waiting};

impl GpuPlan {
    /// Merges in what the other processes of a group have measured. Call it after submitting
    /// [`GpuPlan::encode_measure`] and before [`GpuPlan::encode_scale`], which then clips by the norm of all. Every
    /// process must make the call, for a plan like this one or for a [`Clipper`](crate::Clipper) [with the
    /// group](crate::Clipper::processes), with the same clip.
    ///
    /// It reads 32 bytes back for each segment, exchanges some more with the other processes, and writes 32 bytes for
    /// each segment. Other submitted work goes on meanwhile.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use gradclip::{Clip, gpu::{GpuClipper, GpuTensor}, processes::thread_group, wgpu};
    /// # use wgpu::util::DeviceExt;
    /// # let gpu = GpuClipper::open().wait()?;
    /// # let buffer = gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
    /// #     label: None, contents: bytemuck::cast_slice(&[3.0f32, 4.0]), usage: wgpu::BufferUsages::STORAGE });
    /// # let group = thread_group(1, None).swap_remove(0); // of gradclip-mpi: MpiGroup::new(&universe.world())?
    /// let plan = gpu.plan(&Clip::norm(1.0), &[GpuTensor::f32(&buffer, ..)?])?;
    /// let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// plan.encode_measure(&mut encoder)?;
    /// gpu.queue().submit([encoder.finish()]);
    /// plan.merge_across(&*group).wait()?;
    /// let mut encoder = gpu.device().create_command_encoder(&Default::default());
    /// plan.encode_scale(&mut encoder)?;
    /// gpu.queue().submit([encoder.finish()]);
    /// assert!((plan.report().wait()?.total_norm - 5.0).abs() < 1e-5);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`] if the plan measures no norm of its own, has a threshold on the device, or has merged its last
    /// norm already; [`Error::NotSubmitted`] as [`GpuPlan::report`]; [`Error::PeerFailed`], [`Error::Disagreement`] and
    /// [`Error::ProcessGroup`] ([`processes`](crate::processes)); the device's own. Nothing is written then.
    pub fn merge_across<'a>(&'a self, processes: &'a dyn ProcessGroup) -> Waiting<'a, Result<(), Error>> {
        Waiting::new(self.merge_checked(processes))
    }

    async fn merge_checked(&self, processes: &dyn ProcessGroup) -> Result<(), Error> {
        let call = GroupCall::begin(processes);
        let measures = |g: &Group| g.clip.measured().is_some() && !g.given;
        if self.built.threshold.is_some() || !self.built.groups.iter().all(measures) {
            const WHY: &str =
                "only norms that the plan measures merge across processes, and only without a threshold on the device";
            return Err(Error::usage(WHY));
        }
        self.merged(call).await
    }

    /// Merges in the partials of the other processes, between measuring and deciding.
    pub(crate) async fn merged(&self, call: GroupCall<'_>) -> Result<(), Error> {
        let memory = &self.built.memory;
        let place = |first: u32| u64::from(first) * PARTIAL_BYTES;
        let mut reads = vec![(&memory.results, 0, size_of::<ResultsHead>() as u64)];
        for group in &self.built.groups {
            let places = [Some(group.first_partial), group.first_beside].into_iter().flatten();
            reads.extend(places.map(|first| (&memory.partials, place(first), place(group.segments.count))));
        }
        reads.retain(|(_, _, size)| *size > 0);
        let bytes = self.gpu.device.read(&reads).await?;
        let (head, bytes) = bytes.split_at(size_of::<ResultsHead>());
        drop(self.check_ran(self.encoded.load(Ordering::Relaxed), &bytemuck::pod_read_unaligned(head))?);
        let rows = bytes.chunks_exact(size_of::<PartialRow>()).map(bytemuck::pod_read_unaligned::<PartialRow>);
        let rows: Vec<_> = rows.collect();
        if rows.iter().any(|row| row.stamp().is_some()) {
            return Err(MERGED_ALREADY);
        }
        let mut rows = rows.into_iter();
        let mut parts = Vec::new();
        for group in &self.built.groups {
            let mut next = || {
                let rows = rows.by_ref().take(group.segments.count as usize);
                rows.map(|row| row.to_partial(|i| self.built.origins[i])).collect::<Vec<_>>()
            };
            let mut part = GroupPartials::new(&group.clip, group.segments.clone(), next());
            if group.clip.needs_parameters() {
                part.parameters = next();
            } else if group.first_beside.is_some() {
                part.partials = part.partials.iter().zip(next()).map(|(own, norm)| own.with_norm_of(norm)).collect();
            }
            parts.push(part);
        }
        let name_of = |group: usize, tensor: usize| self.built.groups[group].names.get(tensor)?.as_deref();
        let totals = merge(call, &mut parts, name_of).await?;

        let across = |(part, total): (&GroupPartials, &GroupTotal)| MergedGroup {
            segments: part.segments.clone(),
            total: total.clone(),
        };
        let stamp = locked(&self.across).keep(parts.iter().zip(&totals).map(across).collect());
        let mut writes = Vec::new();
        let mut write = |first: u32, partials: &[Partial]| {
            let rows: Vec<_> = partials.iter().map(|partial| PartialRow::of(partial, stamp)).collect();
            writes.push((&memory.partials, place(first), bytemuck::cast_slice(&rows).to_vec()));
        };
        for ((group, part), total) in self.built.groups.iter().zip(&parts).zip(&totals) {
            write(group.first_partial, &part.partials);
            if group.clip.needs_parameters() {
                group.first_beside.iter().for_each(|first| write(*first, &part.parameters));
            }
            write(group.total, &[total.partial]);
        }
        let groups = self.built.groups.iter();
        let own_thresholds = thresholds(groups.clone().map(|group| (&group.segments, &group.clip)), false);
        // The device overwrites thresholds that depend on parameters.
        let thresholds = thresholds(groups.zip(&parts).map(|(group, part)| (&part.segments, &group.clip)), false);
        write(self.built.everything, &[totals.iter().fold(Partial::EMPTY, |all, total| all.merge(total.partial))]);
        if thresholds != own_thresholds {
            let mut own = locked(&self.own_thresholds);
            if own.is_none() {
                let (bytes, usage) = (bytemuck::cast_slice(&own_thresholds), wgpu::BufferUsages::COPY_SRC);
                *own = Some(self.gpu.device.filled("gradclip own thresholds", bytes, usage)?);
            }
            writes.push((&memory.thresholds, 0, bytemuck::cast_slice(&thresholds).to_vec()));
        }
        let queue = &self.gpu.device.queue;
        self.gpu.device.scoped(|| writes.iter().for_each(|(buffer, at, bytes)| queue.write_buffer(buffer, *at, bytes)))
    }
}

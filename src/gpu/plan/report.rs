//! Reports on the last step.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use bytemuck::Pod;

use super::super::gather::Group;
use super::super::readback::{LossRow, OutcomeRow, PARTIAL_BYTES, PartialRow, ResultsHead};
use super::super::threshold::{DeviceThreshold, StateRow, threshold_number};
use super::{GpuPlan, MergedGroup, Reported, locked};
use crate::decision::{Action, Outcome};
use crate::magnitude::Magnitude;
use crate::processes::GroupTotal;
use crate::report::LostElements;
use crate::threshold::Threshold;
use crate::{ClipReport, Error, NonFinite, Scope, Skipped, Waiting};

/// A group's total, the outcomes of its segments and, if that is counted, what it has lost.
type StepOfGroup = (MergedGroup, Vec<OutcomeRow>, Option<LostElements>);

impl GpuPlan {
    /// Checks that a step has run since the last report. `encoded` steps were encoded.
    pub(super) fn check_ran(&self, encoded: u64, head: &ResultsHead) -> Result<MutexGuard<'_, Reported>, Error> {
        let reported = locked(&self.reported);
        // If all encoded steps have run, another thread may have reported on them with an older count of encoded steps.
        let idle = head.steps == reported.steps && encoded != reported.encoded && head.steps != encoded as u32;
        if head.steps == 0 || idle { Err(Error::NotSubmitted) } else { Ok(reported) }
    }

    /// The report on the last submitted step, for the first group if there are several. It waits until the GPU has
    /// finished that step, and reads back 32 bytes for each segment.
    ///
    /// # Errors
    /// [`Error::NonFinite`] under that policy; [`Error::NotSubmitted`] if no step has run, or if steps were encoded
    /// since the last report and none of them has; the device's own errors.
    pub fn report(&self) -> Waiting<'_, Result<ClipReport, Error>> {
        Waiting::new(async { Ok(self.reports_and_outcomes().await?.0.swap_remove(0)) })
    }

    /// The reports of all groups.
    ///
    /// # Errors
    /// As [`GpuPlan::report`].
    pub fn reports(&self) -> Waiting<'_, Result<Vec<ClipReport>, Error>> {
        Waiting::new(async { self.reports_and_outcomes().await.map(|(reports, _)| reports) })
    }

    /// The reports, and for each group the outcomes of its segments.
    pub(crate) async fn reports_and_outcomes(&self) -> Result<(Vec<ClipReport>, Vec<Vec<Outcome>>), Error> {
        let (mut reports, mut of_segments) = (Vec::new(), Vec::new());
        let (skipped, each) = self.last_step().await?;
        for (group, (all, outcomes, lost)) in self.built.groups.iter().zip(each) {
            let (report, outcomes) = group.report(&outcomes, all, skipped)?;
            reports.push(ClipReport { lost, ..report });
            of_segments.push(outcomes);
        }
        Ok((reports, of_segments))
    }

    /// Why the last step that has run was skipped; for each group its total, the outcomes of its segments, and what it has
    /// lost.
    async fn last_step(&self) -> Result<(Option<Skipped>, Vec<StepOfGroup>), Error> {
        let encoded = self.encoded.load(Ordering::Relaxed);
        let memory = &self.built.memory;
        let partial = |at: u32| (&memory.partials, u64::from(at) * PARTIAL_BYTES, PARTIAL_BYTES);
        // The norm beside a value clip, which has one segment.
        let norm_of = |group: &Group| group.first_beside.filter(|_| group.clip.report_norm);
        let mut parts = Vec::new();
        for (i, group) in (0..).zip(&self.built.groups) {
            parts.push(partial(group.total));
            parts.extend(norm_of(group).map(partial));
            parts.extend(memory.losses.iter().map(|losses| (losses, LossRow::at(i), LossRow::BYTES)));
        }
        parts.push((&memory.results, 0, memory.results.size()));
        let bytes = self.gpu.device.read(&parts).await?;
        let (mut rows, results) = bytes.split_at(bytes.len() - memory.results.size() as usize);
        let (head, outcomes) = results.split_at(size_of::<ResultsHead>());
        let head: ResultsHead = bytemuck::pod_read_unaligned(head);
        *self.check_ran(encoded, &head)? = Reported { encoded, steps: head.steps };
        let across = locked(&self.across);
        let mut of_group = |(i, group): (usize, &Group)| {
            let row: PartialRow = next_row(&mut rows);
            let norm: Option<PartialRow> = norm_of(group).map(|_| next_row(&mut rows));
            let lost = memory.losses.as_ref().map(|_| next_row::<LossRow>(&mut rows).to_lost());
            let own = || {
                let origin = |i: usize| self.built.origins[i];
                let partial = row.to_partial(origin);
                let partial = norm.map_or(partial, |norm| partial.with_norm_of(norm.to_partial(origin)));
                let name_of = |i: usize| group.names.get(i).map_or(Some("the given norms"), |name| name.as_deref());
                MergedGroup { segments: group.segments.clone(), total: GroupTotal::of(partial, name_of) }
            };
            let all = across.of(&row).and_then(|all| all.get(i).cloned()).unwrap_or_else(own);
            let [first, count] =
                [group.first_segment, group.segments.count].map(|n| n as usize * size_of::<OutcomeRow>());
            (all, bytemuck::pod_collect_to_vec(&outcomes[first..][..count]), lost)
        };
        Ok((head.skipped(), self.built.groups.iter().enumerate().map(&mut of_group).collect()))
    }

    /// The adaptive threshold, with its state after the last step. A checkpoint can keep it, and a new plan can go on
    /// from it. None for a plan without one.
    ///
    /// # Errors
    /// The device's own.
    pub fn threshold(&self) -> Waiting<'_, Result<Option<DeviceThreshold>, Error>> {
        Waiting::new(self.threshold_now())
    }

    async fn threshold_now(&self) -> Result<Option<DeviceThreshold>, Error> {
        let Some(threshold) = &self.built.threshold else { return Ok(None) };
        let states = &self.built.memory.states;
        let rows = self.built.groups[0].segments.count as usize;
        let mut bytes = self.gpu.device.read(&[(states, 0, states.size())]).await?;
        bytes.truncate(rows * size_of::<StateRow>());
        Ok(Some(threshold.clone().with(&bytemuck::pod_collect_to_vec::<u8, StateRow>(&bytes))))
    }

    /// Waits for the norms of the last submitted step, lets a threshold on the host follow them, and sets the plan's
    /// thresholds. Call it between [`GpuPlan::encode_measure`] and [`GpuPlan::encode_scale`]. The clip's own threshold
    /// stays an upper bound; infinity sets none. [`PlanOptions::threshold`](crate::gpu::PlanOptions::threshold) needs
    /// no wait.
    ///
    /// # Errors
    /// [`Error::Usage`] for a plan of several groups, of a clip by value or AGC, by given norms, or with a threshold on
    /// the device, or if the threshold skips steps and the clip sets no [`Clip::skip_above`](crate::Clip::skip_above);
    /// [`Error::Setting`] for an invalid threshold; [`Error::ThresholdState`] for one of other tensors;
    /// those of [`GpuPlan::report`]. If the device fails after the norms were read, the threshold has followed them.
    pub fn follow<'a>(&'a self, threshold: &'a mut dyn Threshold) -> Waiting<'a, Result<(), Error>> {
        Waiting::new(self.follow_norms(threshold))
    }

    pub(crate) async fn follow_norms(&self, threshold: &mut dyn Threshold) -> Result<(), Error> {
        let [group] = &self.built.groups[..] else {
            return Err(Error::usage("only a plan of one group can follow a threshold on the host"));
        };
        if group.given || self.built.threshold.is_some() {
            return Err(Error::usage(
                "a plan by given norms, or with a threshold on the device, cannot follow a threshold on the host",
            ));
        }
        let clip = &group.clip.skipping(threshold);
        clip.check_adaptive()?;
        if clip.may_skip() && !group.may_skip {
            return Err(Error::usage(
                "a threshold that skips steps needs a plan whose clip sets skip_above; f64::MAX will do",
            ));
        }
        self.bind(threshold)?;
        let (skipped, mut each) = self.last_step().await?;
        let (all, outcomes, _) = each.swap_remove(0);
        // Those of all processes, if they have merged.
        let segments = all.segments.clone();
        let (measured, _) = group.report(&outcomes, all, skipped)?;
        // The device may have decided by an earlier limit.
        let skips = Magnitude::plain(measured.total_norm).exceeds(clip.skip_above);
        let own = measured.segments.iter().map(|s| s.norm).collect();
        let norms = if clip.scope == Scope::Global { vec![measured.total_norm] } else { own };
        let followed = if skips { Vec::new() } else { threshold.max_norms(measured.total_norm, &norms) };
        let max_norms = segments.max_norms(clip, &[], &followed);
        let numbers = max_norms.into_iter().chain([segments.skip_above(clip)]).map(|m| threshold_number(m.to_f64()));
        let numbers: Vec<_> = numbers.collect();
        let (queue, buffer) = (&self.gpu.device.queue, &self.built.memory.thresholds);
        // Later steps go by these, until they are set anew.
        *locked(&self.own_thresholds) = None;
        self.gpu.device.scoped(|| queue.write_buffer(buffer, 0, bytemuck::cast_slice(&numbers)))
    }

    /// Ties a threshold to the segments of the first group.
    pub(crate) fn bind(&self, threshold: &mut dyn Threshold) -> Result<(), Error> {
        let group = &self.built.groups[0];
        threshold.bind(&group.segments.labels(|i| group.names[i].as_deref()))
    }
}

/// The first row of these bytes, which then begin behind it.
fn next_row<T: Pod>(bytes: &mut &[u8]) -> T {
    let (row, rest) = bytes.split_at(size_of::<T>());
    *bytes = rest;
    bytemuck::pod_read_unaligned(row)
}

impl Group {
    /// The report and the outcomes of the segments, given the total of all processes.
    fn report(
        &self,
        outcomes: &[OutcomeRow],
        all: MergedGroup,
        skipped: Option<Skipped>,
    ) -> Result<(ClipReport, Vec<Outcome>), Error> {
        let (clip, MergedGroup { segments, total: GroupTotal { partial: total, non_finite } }) = (&self.clip, all);
        // Given norms are N already.
        let weight = |elements| if self.given { 1.0 } else { clip.weight(elements) };
        let each = segments.families().zip(outcomes);
        let mut outcomes: Vec<_> = each.map(|(family, row)| row.to_outcome(clip, weight(family.elements))).collect();
        let elements = segments.elements();
        let total_norm = match &outcomes[..] {
            [outcome] if self.given => outcome.norm,
            _ if self.given => f64::NAN,
            _ => clip.total_norm(&total, elements),
        };
        let report = clip.report((&segments, &outcomes), (total_norm, total.outside), elements, non_finite, skipped)?;
        // A value clip looks at each element whatever is decided. Only what it found tells whether it wrote.
        let drops = clip.non_finite == NonFinite::Drop && total.non_finite > 0;
        let met_nothing = clip.grad_scale == 1.0 && !total.outside && !drops;
        if clip.measured().is_none() && self.all_counted() && met_nothing {
            let applied = |o: &&mut Outcome| o.action == Action::Apply;
            outcomes.iter_mut().filter(applied).for_each(|o| o.action = Action::Leave);
        }
        Ok((report, outcomes))
    }
}

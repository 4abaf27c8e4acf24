//! From the command line to the library's description of a clip.

use gradclip::{Clip, NonFinite, NormType, Scope};
pub(crate) use gradclip_common::description::{by_example, clamps, measuring, norm_name};

use crate::args::{BackendChoice, ClipArgs, ClipOptions, MeasureArgs, ModeArgs};
use crate::failure::Failure;

impl MeasureArgs {
    /// The description `clip` with these settings.
    pub(crate) fn clip(&self, mut clip: Clip) -> Result<Clip, Failure> {
        if let Some(p) = self.norm_type {
            clip = clip.norm_type(NormType::p(p));
        }
        clip.scope = self.scope.unwrap_or(clip.scope);
        clip.unit_axis = self.unit_axis;
        clip.grad_scale = self.grad_scale.unwrap_or(clip.grad_scale);
        refuse(&[(self.unit_axis.is_some() && clip.scope != Scope::Unit, "--unit-axis needs --scope unit")])?;
        Ok(clip)
    }
}

impl ClipOptions {
    /// The clip that the options describe; `None` without a mode.
    pub(crate) fn clip(&self) -> Result<Option<Clip>, Failure> {
        let ModeArgs { max_norm, max_rms, max_average_norm, agc, clip_value, clip_range } = self.mode;
        let modes = [
            max_norm.map(Clip::norm),
            max_rms.map(Clip::rms),
            max_average_norm.map(Clip::average_norm),
            agc.map(Clip::agc),
            clip_value.map(Clip::value),
            clip_range.map(|(min, max)| Clip::range(min, max)),
        ];
        let Some(mode) = modes.into_iter().flatten().next() else {
            refuse(&[(*self != Self::default(), MODE_NEEDED)])?;
            return Ok(None);
        };
        let mut clip = self.measure.clip(mode)?;
        let by_norm = max_norm.is_some();
        refuse(&[
            (
                self.measure.norm_type.is_some() && !by_norm && agc.is_none(),
                "--norm-type goes with --max-norm and --agc only",
            ),
            (self.eps.is_some() && !by_norm, "--eps goes with --max-norm only"),
            (
                self.measure.scope.is_some() && clamps(&clip),
                "--scope sets which gradients share a norm; a clip by value measures no norm",
            ),
            (
                self.skip_above.is_some() && clamps(&clip),
                "--skip-above compares the total norm; a clip by value measures no norm",
            ),
            (self.budget.is_some() && clip.scope != Scope::ExampleTensor, "--budget needs --scope example-tensor"),
            (
                agc.is_some() && by_example(&clip),
                "--agc needs --scope unit, tensor or global: parameters have no examples",
            ),
            (agc.is_some() && self.params.is_none(), "--agc needs the parameters of the gradients: --params FILE"),
            (agc.is_none() && self.params.is_some(), "--params goes with --agc only"),
            (agc.is_none() && self.agc_eps.is_some(), "--agc-eps goes with --agc only"),
            (
                self.report_norm && !clamps(&clip),
                "--report-norm goes with --clip-value and --clip-range: others report it",
            ),
            (
                !self.groups.is_empty() && clip_range.is_some(),
                "--group gives one threshold, and --clip-range needs two",
            ),
            (
                !self.groups.is_empty() && by_example(&clip),
                "--group needs --scope global, tensor or unit: an example has one norm over all tensors",
            ),
        ])?;
        clip.budget = self.budget.unwrap_or(clip.budget);
        clip.eps = self.eps.or(clip.eps);
        clip.agc_eps = self.agc_eps.or(clip.agc_eps);
        clip.non_finite = self.non_finite.unwrap_or(clip.non_finite);
        clip.skip_above = self.skip_above.unwrap_or(clip.skip_above);
        clip.report_norm = self.report_norm;
        clip.check()?;
        self.groups(clip)?;
        Ok(Some(clip))
    }
}

impl ClipArgs {
    /// The clip that the options describe.
    pub(crate) fn clip(&self) -> Result<Clip, Failure> {
        let clip = self.options.clip()?.ok_or_else(|| Failure::Usage(MODE_NEEDED.into()))?;
        let skips = clip.non_finite == NonFinite::Skip;
        let given = self.given_norm.is_some();
        refuse(&[
            (
                self.sum && !by_example(&clip),
                "--sum adds the clipped examples: it needs --scope example or example-tensor",
            ),
            (self.sum && skips, "--sum cannot be used with --non-finite skip: choose another policy"),
            (
                given && (clamps(&clip) || clip.needs_parameters() || clip.scope != Scope::Global),
                "--given-norm goes with --max-norm, --max-rms and --max-average-norm of all gradients",
            ),
            (given && !self.options.groups.is_empty(), "--given-norm is one norm, and each --group has its own"),
            (given && self.verify, "--verify compares norms too, and --given-norm measures none: leave out one"),
            (
                given && (self.backend.backend == BackendChoice::Gpu || self.backend.adapter.is_some()),
                "--given-norm only scales, which the CPU does while it writes: leave out --backend gpu and --adapter",
            ),
            (self.sum && self.options.skip_above.is_some(), "--sum cannot be used with --skip-above: leave one out"),
            (
                self.options.skip_above.is_some() && (given || !self.options.groups.is_empty()),
                "--skip-above compares one norm that is measured: leave out --given-norm and --group",
            ),
            (self.sum && self.verify, "--verify compares clipped gradients, not sums: leave out --verify or --sum"),
        ])?;
        Ok(clip)
    }
}

pub(crate) const MODE_NEEDED: &str = "a mode is required: --max-norm N, --max-rms R, --max-average-norm A, \
    --agc FACTOR --params FILE, --clip-value V or --clip-range MIN,MAX";

/// Returns the message of the first condition that is true as an error. An option without effect is an error, so that nobody
/// relies on it.
pub(crate) fn refuse(conditions: &[(bool, &str)]) -> Result<(), Failure> {
    let first = conditions.iter().find(|(is_true, _)| *is_true);
    first.map_or(Ok(()), |(_, message)| Err(Failure::Usage((*message).into())))
}

//! [`DecidedStep`]: a step whose clip is decided, and [`Clipper::step`], which decides and takes it at once.

use std::sync::Arc;

use super::state::Parameters;
use super::{Numbers, OptimizerState};
use crate::cpu::decide::{self, Decision};
use crate::cpu::step::{How, Piece, in_pieces, size_of_all, step_piece};
use crate::cpu::write::Written;
use crate::error::tensor_label;
use crate::partial::{Location, Partial};
use crate::processes::GroupCall;
use crate::report::LostElements;
use crate::segment::check_parameter;
use crate::{Clip, ClipReport, Clipper, DecidedClip, Error, Tensor, TensorMut, Threshold};

/// A step that is decided and not yet taken: it holds coefficients, learning rates and the step count, but no tensors.
/// It is taken whole ([`DecidedStep::apply_all`]), or piece by piece ([`DecidedStep::apply`]): in any order, from any
/// thread, with parameters, gradients and state that may lie anywhere. So tensors larger than memory need only one piece
/// of each in memory at a time. The bits are those of [`Clipper::step`](crate::Clipper::step).
///
/// [`OptimizerState::decided`] makes one of a decided clip, and counts the step.
///
/// ```
/// use gradclip::{Clip, Clipper, Optimizer, OptimizerState, Tensor, TensorMut};
/// let (mut w, gradient, mut momentum) = ([1.0f32; 6], [3.0f32, 4.0, 0.0, 0.0, 0.0, 0.0], [0u8; 24]);
/// let mut state = OptimizerState::elsewhere(&[(Optimizer::sgd(1.0).momentum(0.9), &[Tensor::new(&w)])])?;
/// let clip = Clipper::cpu().decide(&Clip::norm(2.5).eps(0.0), &[Tensor::new(&gradient)])?;
/// let step = state.decided(vec![clip])?;
/// for i in [2, 0, 1] {
///     let (parameter, gradient) = (&mut w[2 * i..][..2], &gradient[2 * i..][..2]);
///     let state = &mut momentum[8 * i..][..8];
///     step.apply(0, 2 * i as u64, &mut TensorMut::new(parameter), &Tensor::new(gradient), [state])?;
/// }
/// assert_eq!(w, [-0.5, -1.0, 1.0, 1.0, 1.0, 1.0]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Debug)]
pub struct DecidedStep {
    clips: Vec<DecidedClip>,
    parameters: Arc<Parameters>,
    /// By group; none if the step is skipped.
    numbers: Vec<Numbers>,
}

impl OptimizerState<'_> {
    /// The next step, with a clip that is decided: one for all parameters, or one for each group
    /// ([`Clipper::decide`](crate::Clipper::decide), [`Clipper::decide_groups`](crate::Clipper::decide_groups),
    /// [`Clipper::decide_scale`](crate::Clipper::decide_scale)). Counts the step, unless the clip skips it.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::OptimizerState`] if a setting is wrong; [`Error::Usage`] if the clips are not of
    /// as many tensors; [`Error::Tensor`] if one has another length than its parameter. The step then does not count.
    pub fn decided(&mut self, clips: Vec<DecidedClip>) -> Result<DecidedStep, Error> {
        self.check()?;
        let parameters = Arc::clone(&self.parameters);
        check_clips(clips.len(), &parameters)?;
        for (i, clip) in clips.iter().enumerate() {
            let own = if clips.len() == 1 { 0..parameters.all.len() } else { parameters.groups[i].clone() };
            let (first, count) = (own.start, own.len());
            if clip.tensors.len() != count {
                let decided = clip.tensors.len();
                return Err(Error::usage(format!("a clip of {decided} tensors was decided for {count} parameters")));
            }
            for (k, (parameter, gradient)) in parameters.all[own].iter().zip(&clip.tensors).enumerate() {
                if parameter.spec.len != gradient.len {
                    let reason = format!("it has {} elements, its gradient {}", parameter.spec.len, gradient.len);
                    let tensor = tensor_label(parameter.spec.name.as_deref(), first + k);
                    return Err(Error::Tensor { tensor, reason });
                }
            }
        }
        let skipped = clips.iter().any(|clip| clip.decision.report.skipped.is_some());
        let mut numbers = Vec::new();
        if !skipped {
            let t = self.count();
            numbers.extend(self.optimizers().iter().map(|optimizer| optimizer.numbers(t)));
        }
        Ok(DecidedStep { clips, parameters, numbers })
    }
}

impl DecidedStep {
    /// Whether the step is skipped: nothing changes, and it does not count. [`DecidedStep::apply`] does nothing then.
    #[must_use]
    pub fn is_skipped(&self) -> bool {
        self.numbers.is_empty() && !self.parameters.groups.is_empty()
    }

    /// Takes the step on a piece, on the calling thread. The piece holds elements of parameter number `parameter`, from
    /// element number `first` on: of the parameter itself, of its gradient in any dtype, and of each tensor of its state
    /// ([`Optimizer::state_tensors`](crate::Optimizer::state_tensors)) as native-endian bytes. All may have any
    /// alignment. Names and shapes do not matter. Each element must come once.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such parameter, if it ends before the piece does, if the dtype is another, or if
    /// the gradient has another length; [`Error::OptimizerState`] if the tensors of the state do not fit. The piece is
    /// then unchanged.
    pub fn apply<'s>(
        &self,
        parameter: usize,
        first: u64,
        piece: &mut TensorMut<'_>,
        gradient: &Tensor<'_>,
        state: impl IntoIterator<Item = &'s mut [u8]>,
    ) -> Result<(), Error> {
        let fail = |name: Option<&str>, reason| Err(Error::Tensor { tensor: tensor_label(name, parameter), reason });
        let Some(described) = self.parameters.all.get(parameter) else {
            return fail(None, format!("there are only {} parameters", self.parameters.all.len()));
        };
        let (spec, end) = (&described.spec, first.saturating_add(piece.spec.len));
        let name = spec.name.as_deref();
        if end > spec.len {
            return fail(name, format!("elements {first}..{end} were given, it has {}", spec.len));
        }
        if piece.dtype() != spec.dtype {
            return fail(name, format!("the piece is {}, the parameter {}", piece.dtype(), spec.dtype));
        }
        if gradient.spec.len != piece.spec.len {
            let (gradients, elements) = (gradient.len(), piece.len());
            return fail(name, format!("the piece has {elements} elements, its gradient {gradients}"));
        }
        let state = self.parameters.by_slot(parameter, first..end, state)?;
        if !self.is_skipped() && !piece.is_empty() {
            let dtype = piece.dtype();
            let gradient = (gradient.dtype(), gradient.data);
            self.take(parameter, first, Piece { parameter: (dtype, piece.data), gradient, state });
        }
        Ok(())
    }

    /// Takes the step on all parameters, in parallel on rayon's current pool.
    ///
    /// # Errors
    /// [`Error::OptimizerState`] if the state's tensors are elsewhere, or if it is of other parameters;
    /// [`Error::Tensor`] if a parameter or a gradient does not fit. Everything is then unchanged.
    pub fn apply_all(
        &self,
        state: &mut OptimizerState<'_>,
        parameters: &mut [TensorMut<'_>],
        gradients: &[Tensor<'_>],
    ) -> Result<(), Error> {
        check(state, parameters, gradients)?;
        if !Arc::ptr_eq(&state.parameters, &self.parameters) {
            return Err(Error::OptimizerState("the step was decided for another".into()));
        }
        if !self.is_skipped() {
            self.take_all(state, parameters, gradients);
        }
        Ok(())
    }

    /// What each clip reports, one for each group if each has its own. `lost` is None, because no clipped gradient is
    /// stored. The rest is as [`DecidedClip::report`] says.
    #[must_use]
    pub fn reports(&self) -> Vec<ClipReport> {
        self.clips.iter().map(|clip| ClipReport { lost: None, ..clip.report() }).collect()
    }

    /// All has been checked.
    fn take_all(&self, state: &mut OptimizerState<'_>, parameters: &mut [TensorMut<'_>], gradients: &[Tensor<'_>]) {
        let size = {
            let slots = state.slots_mut().into_iter().flatten();
            size_of_all(parameters.iter_mut().zip(gradients).zip(slots).map(piece_of))
        };
        let slots = state.slots_mut().into_iter().flatten();
        let pieces = parameters.iter_mut().zip(gradients).zip(slots).map(piece_of);
        in_pieces(pieces, size, |i, first, piece| self.take(i, first, piece));
    }

    fn take(&self, parameter: usize, first: u64, piece: Piece<'_>) {
        let group = self.parameters.all[parameter].group;
        // A single clip numbers the tensors of all groups.
        let (clip, before) = if self.clips.len() == 1 {
            (&self.clips[0], 0)
        } else {
            (&self.clips[group], self.parameters.groups[group].start)
        };
        let tensor = parameter - before;
        let Decision { clip: of, segments, outcomes, .. } = &clip.decision;
        let how = How { clip: of, matrices: &segments.layouts[tensor], outcomes, numbers: &self.numbers[group] };
        let found = step_piece(how, Location { tensor, index: first }, piece);
        if found != Partial::EMPTY && clip.tensors[tensor].counted {
            clip.add(Written { found, lost: LostElements::default() });
        }
    }
}

/// All of a parameter, from it, its gradient and its state.
fn piece_of<'p>(
    ((parameter, gradient), state): ((&'p mut TensorMut<'_>, &Tensor<'p>), [&'p mut [u8]; 4]),
) -> Piece<'p> {
    let (dtype, data) = (gradient.dtype(), gradient.data);
    Piece { parameter: (parameter.dtype(), &mut *parameter.data), gradient: (dtype, data), state }
}

/// Checks all that a whole step needs, apart from its clip.
fn check(state: &OptimizerState<'_>, parameters: &[TensorMut<'_>], gradients: &[Tensor<'_>]) -> Result<(), Error> {
    state.check()?;
    if !state.is_here() {
        return Err(Error::OptimizerState("its tensors are elsewhere: take the step piece by piece".into()));
    }
    state.check_parameters(parameters.iter().map(|t| t.spec))?;
    if gradients.len() != parameters.len() {
        return Err(Error::usage(format!("{} parameters have {} gradients", parameters.len(), gradients.len())));
    }
    (0..).zip(parameters).zip(gradients).try_for_each(|((i, w), g)| check_parameter(i, g.spec, Some(w.spec)))
}

/// Checks that there is one clip, or one for each group.
fn check_clips(count: usize, parameters: &Parameters) -> Result<(), Error> {
    let groups = parameters.groups.len();
    if count == 1 || count == groups {
        return Ok(());
    }
    Err(Error::usage(format!("{count} clips for {groups} groups: give one for all, or one for each")))
}

impl Clipper {
    /// Clips and takes the step of an optimizer in one, on the CPU: reads the gradients once for their norm, and then
    /// gradients, parameters and state in one pass, which writes parameters and state. Gradients are never written. Each
    /// parameter has one gradient of its shape, of any dtype, at the same place of the list. Under AGC each gradient has
    /// its parameter.
    ///
    /// A step that the clip skips ([`ClipReport::skipped`]) changes nothing, and does not count.
    ///
    /// With [`Clip::norm`] of infinity nothing is clipped, and non-finite gradients are still found first. With
    /// [`Clip::range`] from minus infinity to infinity the step is one pass: it counts what is not finite, and takes it.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::OptimizerState`], [`Error::Tensor`] or [`Error::Usage`] if something does not fit;
    /// [`Error::NonFinite`] under that policy. Nothing has changed then.
    pub fn step(
        &self,
        clip: &Clip,
        state: &mut OptimizerState<'_>,
        parameters: &mut [TensorMut<'_>],
        gradients: &[Tensor<'_>],
    ) -> Result<ClipReport, Error> {
        self.decide_and_step(&[*clip], None, state, parameters, gradients).map(|mut reports| reports.swap_remove(0))
    }

    /// The same with a clip for each group. They must have the same `grad_scale` and the same policy for non-finite
    /// gradients, as in [`Clipper::apply_groups`](crate::Clipper::apply_groups). Returns one report for each.
    ///
    /// # Errors
    /// [`Error::Usage`] unless there is one clip for each group, and those of [`Clipper::step`].
    pub fn step_groups(
        &self,
        clips: &[Clip],
        state: &mut OptimizerState<'_>,
        parameters: &mut [TensorMut<'_>],
        gradients: &[Tensor<'_>],
    ) -> Result<Vec<ClipReport>, Error> {
        self.decide_and_step(clips, None, state, parameters, gradients)
    }

    /// The same with a threshold that follows the norms of the run.
    ///
    /// # Errors
    /// [`Error::ThresholdState`] if the threshold's state belongs to other tensors, and those of [`Clipper::step`].
    pub fn step_adaptive(
        &self,
        clip: &Clip,
        threshold: &mut dyn Threshold,
        state: &mut OptimizerState<'_>,
        parameters: &mut [TensorMut<'_>],
        gradients: &[Tensor<'_>],
    ) -> Result<ClipReport, Error> {
        let reports = self.decide_and_step(&[*clip], Some(threshold), state, parameters, gradients);
        reports.map(|mut reports| reports.swap_remove(0))
    }

    fn decide_and_step(
        &self,
        clips: &[Clip],
        threshold: Option<&mut dyn Threshold>,
        state: &mut OptimizerState<'_>,
        parameters: &mut [TensorMut<'_>],
        gradients: &[Tensor<'_>],
    ) -> Result<Vec<ClipReport>, Error> {
        let checked = check(state, parameters, gradients).and_then(|()| check_clips(clips.len(), &state.parameters));
        if let Err(error) = checked {
            // So the other processes learn that this one has failed.
            drop(GroupCall::begin(self.context().processes));
            return Err(error);
        }
        let decisions = {
            let (views, with_parameters): (Vec<_>, Vec<_>);
            let all = if clips.iter().any(Clip::needs_parameters) {
                views = decide::views(parameters);
                let with_parameter = |(gradient, parameter)| Tensor { parameter: Some(parameter), ..gradient };
                with_parameters = gradients.iter().copied().zip(&views).map(with_parameter).collect();
                &with_parameters[..]
            } else {
                gradients
            };
            let of_group = |(i, clip): (usize, &Clip)| {
                (*clip, if clips.len() == 1 { all } else { &all[state.parameters.groups[i].clone()] })
            };
            let groups: Vec<_> = clips.iter().enumerate().map(of_group).collect();
            let decided = decide::decide(&groups, threshold, self.context())?.into_iter().zip(&groups);
            decided.map(|(decision, (_, tensors))| DecidedClip::new(decision, tensors)).collect::<Vec<_>>()
        };
        for clip in decisions.iter().filter(|clip| !clip.decision.read) {
            // Here, so that a panic of the caller's function does not stop the step halfway.
            self.context().progress.measured(clip.bytes());
        }
        let step = state.decided(decisions)?;
        if !step.is_skipped() {
            step.take_all(state, parameters, gradients);
        }
        Ok(step.reports())
    }
}

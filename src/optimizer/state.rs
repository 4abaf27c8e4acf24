//! [`OptimizerState`]: what an optimizer keeps from step to step.

use std::ops::Range;
use std::sync::Arc;

use super::{Halves, Optimizer};
use crate::error::tensor_label;
use crate::tensor::{Spec, TensorSpec};
use crate::{Dtype, Error, Tensor};

/// What an optimizer keeps from step to step: groups of parameters with their settings, some tensors beside each
/// parameter ([`Optimizer::state_tensors`]), and the number of steps taken. PyTorch keeps the same in a
/// `torch.optim.Optimizer`.
///
/// Parameters are numbered through all groups, in order. A step takes them in this order
/// ([`Clipper::step`](crate::Clipper::step)). The tensors of the state lie in memory of its own
/// ([`Optimizer::state`], [`OptimizerState::new`]), in the caller's ([`OptimizerState::over`]), for example in a mapped
/// file, or are given piece by piece ([`OptimizerState::elsewhere`]).
///
/// ```
/// use gradclip::{Optimizer, OptimizerState, Tensor};
/// let (weight, bias) = ([0.5f32; 64], [0.0f32; 8]);
/// let adamw = Optimizer::adamw(1e-3).weight_decay(0.1);
/// let (weights, biases) = ([Tensor::new(&weight).named("weight")], [Tensor::new(&bias).named("bias")]);
/// let mut state = OptimizerState::new(&[(adamw, &weights), (adamw.weight_decay(0.0), &biases)])?;
/// for optimizer in state.optimizers_mut() {
///     optimizer.lr *= 0.5; // from the next step on
/// }
/// assert_eq!(state.optimizers()[1].to_string(), "AdamW, lr 0.0005, weight_decay 0");
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Debug)]
pub struct OptimizerState<'a> {
    pub(super) optimizers: Vec<Optimizer>,
    pub(super) parameters: Arc<Parameters>,
    pub(super) steps: u64,
    /// By parameter; None if the caller keeps it.
    pub(super) memory: Option<Vec<[Memory<'a>; 4]>>,
}

/// The parameters of a state, without their elements.
#[derive(Debug)]
pub(super) struct Parameters {
    pub(super) all: Vec<Parameter>,
    /// The parameters of each group.
    pub(super) groups: Vec<Range<usize>>,
    /// What the optimizer of each group keeps.
    pub(super) kinds: Vec<String>,
}

/// A parameter without its elements.
#[derive(Debug)]
pub(super) struct Parameter {
    pub(super) spec: TensorSpec<String, Vec<usize>>,
    pub(super) group: usize,
    /// The bytes of an element, by slot; 0 where nothing is kept.
    pub(super) sizes: [usize; 4],
    /// The names, by slot.
    pub(super) names: [Option<&'static str>; 4],
}

/// The elements of a tensor of the state.
#[derive(Debug)]
pub(super) enum Memory<'a> {
    Own(Vec<u8>),
    Lent(&'a mut [u8]),
}

impl Memory<'_> {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(bytes) => bytes,
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(bytes) => bytes,
        }
    }
}

impl Optimizer {
    /// The state of a run that begins with these parameters, in memory of its own.
    ///
    /// # Errors
    /// Those of [`OptimizerState::new`].
    pub fn state(&self, parameters: &[Tensor<'_>]) -> Result<OptimizerState<'static>, Error> {
        OptimizerState::new(&[(*self, parameters)])
    }
}

impl OptimizerState<'static> {
    /// The state of a run that begins with these groups of parameters, in memory of its own.
    ///
    /// # Errors
    /// [`Error::Setting`] if a setting is wrong; [`Error::Tensor`] if a float16 parameter is to keep a remainder
    /// ([`Halves::Remainder`]).
    pub fn new(groups: &[(Optimizer, &[Tensor<'_>])]) -> Result<Self, Error> {
        let mut state = Self::elsewhere(groups)?.with_own_memory();
        state.begin(&parameters_of(groups));
        Ok(state)
    }

    /// The same state, with zeros in memory of its own.
    pub(crate) fn with_own_memory(mut self) -> Self {
        let own = |parameter: &Parameter| {
            parameter.sizes.map(|size| Memory::Own(vec![0; parameter.spec.len as usize * size]))
        };
        self.memory = Some(self.parameters.all.iter().map(own).collect());
        self
    }

    /// A state whose tensors the caller keeps, and gives piece by piece ([`DecidedStep::apply`](crate::DecidedStep::apply)).
    /// All begin as zeros, except that `sum` begins as
    /// [`initial_accumulator_value`](Optimizer::initial_accumulator_value), and `master` as a copy of the parameter.
    ///
    /// # Errors
    /// Those of [`OptimizerState::new`].
    pub fn elsewhere(groups: &[(Optimizer, &[Tensor<'_>])]) -> Result<Self, Error> {
        let groups = groups.iter().map(|(optimizer, parameters)| (*optimizer, parameters.iter().map(|t| t.spec)));
        Self::described(groups)
    }

    /// The same, given descriptions of parameters.
    pub(crate) fn described<'s>(
        groups: impl ExactSizeIterator<Item = (Optimizer, impl Iterator<Item = Spec<'s>>)>,
    ) -> Result<Self, Error> {
        let mut found = Parameters { all: Vec::new(), groups: Vec::new(), kinds: Vec::new() };
        let mut optimizers = Vec::with_capacity(groups.len());
        for (group, (optimizer, parameters)) in groups.enumerate() {
            optimizer.check()?;
            let first = found.all.len();
            for spec in parameters {
                check_halves(&optimizer, spec, found.all.len())?;
                let slots = optimizer.slots(spec.dtype);
                found.all.push(Parameter {
                    spec: spec.to_owned(),
                    group,
                    sizes: slots.map(|slot| slot.map_or(0, |slot| slot.element_size)),
                    names: slots.map(|slot| slot.map(|slot| slot.name)),
                });
            }
            found.groups.push(first..found.all.len());
            found.kinds.push(optimizer.kind());
            optimizers.push(optimizer);
        }
        Ok(Self { optimizers, parameters: Arc::new(found), steps: 0, memory: None })
    }
}

impl<'a> OptimizerState<'a> {
    /// A state whose tensors lie in the caller's memory: for each parameter those of [`Optimizer::state_tensors`], as
    /// native-endian bytes at any alignment. Their contents stay as they are. A new run calls
    /// [`OptimizerState::restart`], and one that goes on [`OptimizerState::set_steps`].
    ///
    /// # Errors
    /// Those of [`OptimizerState::new`]; [`Error::OptimizerState`] if a tensor is missing or has another length.
    pub fn over(groups: &[(Optimizer, &[Tensor<'_>])], memory: Vec<Vec<&'a mut [u8]>>) -> Result<Self, Error> {
        let OptimizerState { optimizers, parameters, steps, .. } = OptimizerState::elsewhere(groups)?;
        let mut state = Self { optimizers, parameters, steps, memory: None };
        let count = state.parameters.all.len();
        if memory.len() != count {
            let given = memory.len();
            return Err(Error::OptimizerState(format!(
                "there are {count} parameters, and tensors for {given} are given"
            )));
        }
        let mut all = Vec::new();
        for (i, lent) in memory.into_iter().enumerate() {
            let lent = state.parameters.by_slot(i, 0..state.parameters.all[i].spec.len, lent)?;
            all.push(lent.map(Memory::Lent));
        }
        state.memory = Some(all);
        Ok(state)
    }

    /// Begins a run with these parameters, those of all groups in order: no step is taken yet, and the tensors are as a
    /// new state has them.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::OptimizerState`] if these are not the parameters that the state is for.
    pub fn restart(&mut self, parameters: &[Tensor<'_>]) -> Result<(), Error> {
        self.check_parameters(parameters.iter().map(|t| t.spec))?;
        self.begin(parameters);
        Ok(())
    }

    /// Master copies are those of `parameters`; of a parameter that keeps none, the elements do not matter.
    pub(crate) fn begin(&mut self, parameters: &[Tensor<'_>]) {
        self.steps = 0;
        let described = Arc::clone(&self.parameters);
        for ((tensor, parameter), slots) in parameters.iter().zip(&described.all).zip(self.memory.iter_mut().flatten())
        {
            for (name, slot) in parameter.names.iter().zip(slots) {
                let bytes = slot.bytes_mut();
                match *name {
                    Some("master") => tensor.widen(Dtype::F32, bytes),
                    Some("sum") => {
                        let first = self.optimizers[parameter.group].initial_accumulator_value.unwrap_or(0.0);
                        fill(bytes, parameter.spec.dtype, first);
                    }
                    _ => bytes.fill(0),
                }
            }
        }
    }

    /// The settings of each group.
    #[must_use]
    pub fn optimizers(&self) -> &[Optimizer] {
        &self.optimizers
    }

    /// The settings of each group, to be changed from step to step. Each step checks them. What decides which tensors
    /// the state keeps must stay: the algorithm, whether there is momentum, `centered`, `amsgrad` and `halves`.
    #[must_use]
    pub fn optimizers_mut(&mut self) -> &mut [Optimizer] {
        &mut self.optimizers
    }

    /// The number of steps taken. Skipped ones do not count.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the number of steps taken, for a state that was kept elsewhere.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The elements of a tensor of the state, as native-endian bytes. None if it keeps no such tensor of the parameter,
    /// or keeps it elsewhere.
    #[must_use]
    pub fn bytes(&self, parameter: usize, name: &str) -> Option<&[u8]> {
        let slot = self.parameters.all.get(parameter)?.names.iter().position(|own| *own == Some(name))?;
        Some(self.memory.as_ref()?[parameter][slot].bytes())
    }

    /// The tensors of a parameter, in the order of [`Optimizer::state_tensors`], for a step piece by piece. Empty if
    /// they are elsewhere.
    pub fn tensors_mut(&mut self, parameter: usize) -> Vec<&mut [u8]> {
        let (Some(memory), Some(described)) = (&mut self.memory, self.parameters.all.get(parameter)) else {
            return Vec::new();
        };
        let slots = memory[parameter].iter_mut().zip(described.names);
        slots.filter_map(|(slot, name)| name.map(|_| slot.bytes_mut())).collect()
    }

    /// Checks that the optimizers keep the same tensors, group by group.
    #[cfg(feature = "gpu")]
    pub(crate) fn check_kinds(&self, other: &OptimizerState<'_>) -> Result<(), Error> {
        let kinds = self.parameters.kinds.iter().zip(&other.parameters.kinds).enumerate();
        match kinds.map(|(group, (own, other))| (group, own, other)).find(|(_, own, other)| own != other) {
            None => Ok(()),
            Some((group, own, other)) => {
                Err(Error::OptimizerState(format!("that of group {group} is of {own}, the optimizer is {other}")))
            }
        }
    }

    /// Checks that this state can take the place of another: of the same kinds, for the same parameters.
    #[cfg(feature = "gpu")]
    pub(crate) fn check_replaces(&self, other: &OptimizerState<'_>) -> Result<(), Error> {
        let fail = |reason: String| Err(Error::OptimizerState(reason));
        let (own, others) = (&self.parameters, &other.parameters);
        if own.groups.len() != others.groups.len() {
            return fail(format!("it has {} groups, and there are {}", own.groups.len(), others.groups.len()));
        }
        self.check_kinds(other)?;
        let sizes = |of: &Parameters| of.groups.iter().map(Range::len).collect::<Vec<_>>();
        let (own_sizes, other_sizes) = (sizes(own), sizes(others));
        if own_sizes != other_sizes {
            return fail(format!("its groups have {own_sizes:?} parameters, and there are {other_sizes:?}"));
        }
        self.check()?;
        if !self.is_here() {
            return fail("its tensors are elsewhere".into());
        }
        self.check_parameters(others.all.iter().map(|parameter| parameter.spec.as_ref()))
    }

    /// The tensors of a parameter, in the order of [`Optimizer::state_tensors`]. Empty if they are elsewhere.
    #[cfg(feature = "gpu")]
    pub(crate) fn tensors(&self, parameter: usize) -> Vec<&[u8]> {
        let Some(memory) = &self.memory else { return Vec::new() };
        let slots = memory[parameter].iter().zip(self.parameters.all[parameter].names);
        slots.filter_map(|(slot, name)| name.map(|_| slot.bytes())).collect()
    }

    /// The tensors of each parameter, by slot.
    pub(super) fn slots_mut(&mut self) -> Option<impl Iterator<Item = [&mut [u8]; 4]>> {
        Some(self.memory.as_mut()?.iter_mut().map(|slots| slots.each_mut().map(Memory::bytes_mut)))
    }

    /// Whether the state's tensors are here.
    pub(super) fn is_here(&self) -> bool {
        self.memory.is_some()
    }

    /// Counts a step, and returns its number.
    pub(super) fn count(&mut self) -> u64 {
        self.steps = self.steps.saturating_add(1);
        self.steps
    }

    /// Checks the settings of the next step.
    pub(super) fn check(&self) -> Result<(), Error> {
        for (group, (optimizer, kind)) in self.optimizers.iter().zip(&self.parameters.kinds).enumerate() {
            optimizer.check()?;
            if optimizer.kind() != *kind {
                let new = optimizer.kind();
                return Err(Error::OptimizerState(format!(
                    "that of group {group} is of {kind}, the optimizer is {new}"
                )));
            }
        }
        Ok(())
    }

    /// Checks that these are the parameters that the state is for.
    pub(super) fn check_parameters<'s>(
        &self,
        parameters: impl ExactSizeIterator<Item = Spec<'s>>,
    ) -> Result<(), Error> {
        let (given, count) = (parameters.len(), self.parameters.all.len());
        if given != count {
            return Err(Error::OptimizerState(format!("it is of {count} parameters, and {given} are given")));
        }
        parameters.enumerate().try_for_each(|(i, given)| self.parameters.check(i, given))
    }
}

impl Parameters {
    /// Checks that this is parameter number `i`.
    fn check(&self, i: usize, given: Spec<'_>) -> Result<(), Error> {
        let own = self.all[i].spec.as_ref();
        let reason = if own.dtype != given.dtype {
            format!("it is {}, but the state is of a {} parameter", given.dtype, own.dtype)
        } else if !own.has_shape_of(given) {
            format!("its shape is {}, but the state is of shape {}", given.shape_text(), own.shape_text())
        } else {
            match (own.name, given.name) {
                (Some(own), Some(other)) if own != other => format!("the state is of {own:?}"),
                _ => return Ok(()),
            }
        };
        Err(Error::Tensor { tensor: tensor_label(given.name, i), reason })
    }

    /// The tensors of the state for some elements of parameter number `i`, in the order of
    /// [`Optimizer::state_tensors`], by slot.
    pub(super) fn by_slot<'s>(
        &self,
        i: usize,
        elements: Range<u64>,
        given: impl IntoIterator<Item = &'s mut [u8]>,
    ) -> Result<[&'s mut [u8]; 4], Error> {
        let Parameter { spec, sizes, names, .. } = &self.all[i];
        let len = (elements.end - elements.start) as usize;
        let (mut given, mut slots) = (given.into_iter(), <[&mut [u8]; 4]>::default());
        let label = || tensor_label(spec.name.as_deref(), i);
        for ((slot, size), name) in slots.iter_mut().zip(sizes).zip(names) {
            let Some(name) = name else { continue };
            let Some(bytes) = given.next() else {
                return Err(Error::OptimizerState(format!("{name} of {} is missing", label())));
            };
            if bytes.len() != len * size {
                let (found, needed) = (bytes.len(), len * size);
                return Err(Error::OptimizerState(format!("{name} of {} has {found} bytes, not {needed}", label())));
            }
            *slot = bytes;
        }
        match given.next() {
            None => Ok(slots),
            Some(_) => Err(Error::OptimizerState(format!("{} has fewer tensors than are given", label()))),
        }
    }
}

fn parameters_of<'t>(groups: &[(Optimizer, &[Tensor<'t>])]) -> Vec<Tensor<'t>> {
    groups.iter().flat_map(|(_, parameters)| parameters.iter().copied()).collect()
}

/// Fills the state of a parameter of this dtype with a number.
fn fill(bytes: &mut [u8], parameter: Dtype, x: f64) {
    if parameter == Dtype::F64 {
        bytes.chunks_exact_mut(size_of::<f64>()).for_each(|element| element.copy_from_slice(&x.to_ne_bytes()));
    } else {
        let x = x as f32;
        bytes.chunks_exact_mut(size_of::<f32>()).for_each(|element| element.copy_from_slice(&x.to_ne_bytes()));
    }
}

/// Checks that parameter number `i` can keep what rounding takes off.
pub(crate) fn check_halves(optimizer: &Optimizer, parameter: Spec<'_>, i: usize) -> Result<(), Error> {
    if (optimizer.halves, parameter.dtype) != (Halves::Remainder, Dtype::F16) {
        return Ok(());
    }
    let reason = "float16 and 16 bits are no float32; keep a master copy (Halves::Master)".into();
    Err(Error::Tensor { tensor: tensor_label(parameter.name, i), reason })
}

//! The state of an optimizer as a safetensors file.

use std::collections::HashMap;
use std::fmt::Write;

use safetensors::tensor::TensorView;
use safetensors::{Dtype as Saved, SafeTensors};

use super::state::Parameter;
use super::{Algorithm, Halves, Optimizer, OptimizerState};
use crate::Error;

/// Raised whenever a program that knows the previous form would misread a saved state.
const VERSION: &str = "1";

/// The key of the metadata. There is one, because the crate safetensors writes several in random order.
const KEY: &str = "gradclip_optimizer";

impl OptimizerState<'_> {
    /// The state as a safetensors file: a tensor `PARAMETER.NAME` of the parameter's shape for each tensor of the state,
    /// where PARAMETER is the parameter's name, or its place if it has none. A remainder is of dtype U16. The metadata holds
    /// one text, `gradclip_optimizer`: a line with the version of the form and the number of steps taken, and a line for
    /// each group with its settings, with numbers that are read back to the same bits. The same state gives the same
    /// bytes.
    ///
    /// # Errors
    /// [`Error::OptimizerState`] if the state's tensors are elsewhere, or if two tensors would have one name.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, Error> {
        let fail = |reason: String| Err(Error::OptimizerState(reason));
        let Some(memory) = &self.memory else { return fail("its tensors are elsewhere: save them there".into()) };
        let mut text = format!("version={VERSION} step={}", self.steps);
        for (optimizer, range) in self.optimizers.iter().zip(&self.parameters.groups) {
            text = format!("{text}\n{}", written(*optimizer, range.len()));
        }
        let mut views = HashMap::new();
        for (i, (parameter, memory)) in self.parameters.all.iter().zip(memory).enumerate() {
            for (name, dtype, slot) in tensors(i, parameter) {
                let view = TensorView::new(dtype, shape(parameter), memory[slot].bytes()).map_err(damaged)?;
                if views.insert(name.clone(), view).is_some() {
                    return fail(format!("it would have two tensors called {name:?}; give the parameters other names"));
                }
            }
        }
        safetensors::serialize(views, Some(HashMap::from([(KEY.into(), text)]))).map_err(damaged)
    }

    /// Takes over what [`OptimizerState::to_safetensors`] wrote: settings, tensors and the number of steps. The state
    /// must be of the same algorithms and parameters. The steps that follow then give the same bits as in the run that
    /// was saved.
    ///
    /// ```
    /// use gradclip::{Clip, Clipper, Optimizer, Tensor, TensorMut};
    /// let (mut w, gradient) = ([0.5f32; 8], [0.25f32; 8]);
    /// let adamw = Optimizer::adamw(1e-3);
    /// let mut state = adamw.state(&[Tensor::new(&w).named("w")])?;
    /// Clipper::cpu().step(&Clip::norm(1.0), &mut state, &mut [TensorMut::new(&mut w)], &[Tensor::new(&gradient)])?;
    /// let saved = state.to_safetensors()?;
    ///
    /// let mut restored = adamw.state(&[Tensor::new(&w).named("w")])?;
    /// restored.restore_safetensors(&saved)?;
    /// assert_eq!((restored.steps(), restored.bytes(0, "exp_avg")), (1, state.bytes(0, "exp_avg")));
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OptimizerState`] if the bytes are damaged or of another version, or if they are the state of another
    /// optimizer or of other parameters. The state is then as it was.
    pub fn restore_safetensors(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let fail = |reason: String| Err(Error::OptimizerState(reason));
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let Some(text) = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY)) else {
            return fail("the file is no optimizer's state that gradclip wrote".into());
        };
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        let (version, steps) = first.split_once(" step=").unwrap_or((first, ""));
        let version = version.strip_prefix("version=").unwrap_or(version);
        if version != VERSION {
            return fail(format!("it is of version {version:?} and this gradclip reads version {VERSION}"));
        }
        let Ok(steps) = steps.parse() else { return fail("the file has no step count".into()) };
        let (own, groups) = (self.optimizers.len(), lines.collect::<Vec<_>>());
        if own != groups.len() {
            return fail(format!("the file has {} groups, this state {own}", groups.len()));
        }
        let mut optimizers = Vec::new();
        let own = self.parameters.kinds.iter().zip(&self.parameters.groups);
        for (group, ((kind, range), text)) in own.zip(groups).enumerate() {
            let Some((optimizer, count)) = read(text) else {
                return fail(format!("the settings of group {group} cannot be read: {text:?}"));
            };
            if optimizer.kind() != *kind {
                return fail(format!("group {group} of the file is of {}, here it is of {kind}", optimizer.kind()));
            }
            if count != range.len() {
                return fail(format!("group {group} of the file has {count} parameters, here it has {}", range.len()));
            }
            optimizer.check()?;
            optimizers.push(optimizer);
        }
        let Some(memory) = &mut self.memory else {
            return fail("its tensors are elsewhere: restore them there".into());
        };
        let (mut read, mut names) = (Vec::new(), 0);
        for (i, parameter) in self.parameters.all.iter().enumerate() {
            for (name, dtype, slot) in tensors(i, parameter) {
                let Ok(view) = file.tensor(&name) else { return fail(format!("the file has no tensor {name:?}")) };
                let (found, expected) = ((view.dtype(), view.shape()), (dtype, &shape(parameter)[..]));
                if found != expected {
                    let text = |(dtype, shape): (Saved, &[usize])| format!("{dtype:?} {shape:?}");
                    let (found, expected) = (text(found), text(expected));
                    return fail(format!("{name:?} is {found} in the file, here it is {expected}"));
                }
                read.push((i, slot, view));
                names += 1;
            }
        }
        if file.len() != names {
            return fail(format!("the file has {} tensors, this state {names}", file.len()));
        }
        for (parameter, slot, view) in read {
            memory[parameter][slot].bytes_mut().copy_from_slice(view.data());
        }
        (self.optimizers, self.steps) = (optimizers, steps);
        Ok(())
    }
}

fn damaged(error: impl std::fmt::Display) -> Error {
    Error::OptimizerState(format!("the file is damaged: {error}"))
}

/// The names, dtypes and slots of the tensors that are kept of parameter number `i`.
fn tensors(i: usize, parameter: &Parameter) -> impl Iterator<Item = (String, Saved, usize)> {
    let slots = parameter.names.iter().zip(parameter.sizes).enumerate();
    slots.filter_map(move |(slot, (name, size))| {
        let dtype = match size {
            2 => Saved::U16,
            4 => Saved::F32,
            _ => Saved::F64,
        };
        let name = (*name)?;
        let of = parameter.spec.name.clone().unwrap_or_else(|| i.to_string());
        Some((format!("{of}.{name}"), dtype, slot))
    })
}

fn shape(parameter: &Parameter) -> Vec<usize> {
    parameter.spec.as_ref().sizes().into_iter().map(|size| size as usize).collect()
}

/// The settings of a group as text: `AdamW lr=0.001 beta1=0.9 ... halves=rounded parameters=2`.
fn written(mut optimizer: Optimizer, parameters: usize) -> String {
    let mut text = optimizer.algorithm.to_string();
    for name in Optimizer::NUMBERS {
        if let Some(x) = optimizer.number_mut(name) {
            // The shortest digits that are read back to the same bits. Writing to a string cannot fail.
            let _ = write!(text, " {name}={x:?}");
        }
    }
    for name in Optimizer::SWITCHES {
        if let Some(on) = optimizer.switch_mut(name) {
            let _ = write!(text, " {name}={on}");
        }
    }
    let _ = write!(text, " halves={} parameters={parameters}", optimizer.halves);
    text
}

/// The settings and the number of parameters that [`written`] wrote.
fn read(text: &str) -> Option<(Optimizer, usize)> {
    let mut words = text.split(' ');
    let algorithm = words.next()?;
    let algorithms = [Algorithm::Sgd, Algorithm::Adagrad, Algorithm::RmsProp, Algorithm::Adam, Algorithm::AdamW];
    let mut optimizer = Optimizer::new(algorithms.into_iter().find(|known| known.to_string() == algorithm)?);
    let mut parameters = None;
    for word in words {
        let (name, value) = word.split_once('=')?;
        if name == "parameters" {
            parameters = Some(value.parse().ok()?);
        } else if name == "halves" {
            let all = [Halves::Rounded, Halves::Remainder, Halves::Master];
            optimizer.halves = all.into_iter().find(|known| known.to_string() == value)?;
        } else if let Some(number) = optimizer.number_mut(name) {
            *number = value.parse().ok()?;
        } else {
            *optimizer.switch_mut(name)? = value.parse().ok()?;
        }
    }
    Some((optimizer, parameters?))
}

//! The forms in which states are saved. In a text format floats are text: JSON has no infinity, and its readers may
//! lose the last bit.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::is_norm;
use crate::Error;

/// Raised whenever a program that knows the previous form would misread a saved state.
const VERSION: u32 = 1;

/// Reading another version fails.
fn known_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        VERSION => Ok(VERSION),
        other => Err(D::Error::custom(format_args!(
            "the threshold's state is of version {other} and this gradclip reads version {VERSION}; load it with the \
             gradclip that saved it, or begin with a new threshold"
        ))),
    }
}

/// Saved as it is.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Plain<T>(T);

/// Floats that are saved exactly.
struct Exact<T>(T);

impl Serialize for Exact<f64> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(&format_args!("{:?}", self.0))
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Exact<f64> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return f64::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(|_| D::Error::custom(format_args!("{text:?} is not a number")))
    }
}

impl Serialize for Exact<Vec<f64>> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().copied().map(Exact))
    }
}

impl<'de> Deserialize<'de> for Exact<Vec<f64>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = Vec::<Exact<f64>>::deserialize(deserializer)?;
        Ok(Self(all.into_iter().map(|x| x.0).collect()))
    }
}

/// What states had before the setting was there.
fn infinite() -> Exact<f64> {
    Exact(f64::INFINITY)
}

/// The form of a threshold: the version, and these fields in this order.
macro_rules! form {
    ($threshold:ident { $($(#[$attribute:meta])* $field:ident: $how:ident<$type:ty>,)* }) => {
        #[derive(Serialize, Deserialize)]
        pub(super) struct $threshold {
            #[serde(deserialize_with = "known_version")]
            version: u32,
            $($(#[$attribute])* $field: $how<$type>,)*
        }

        impl From<super::$threshold> for $threshold {
            fn from(from: super::$threshold) -> Self {
                Self { version: VERSION, $($field: $how(from.$field),)* }
            }
        }

        impl TryFrom<$threshold> for super::$threshold {
            type Error = Error;

            fn try_from(from: $threshold) -> Result<Self, Error> {
                let mut threshold = Self::new();
                $(threshold.$field = from.$field.0;)*
                threshold.check_state()?;
                threshold.check()?;
                Ok(threshold)
            }
        }
    };
}

form!(ZClip {
    alpha: Exact<f64>,
    z_threshold: Exact<f64>,
    warm_up: Plain<u32>,
    #[serde(default = "infinite")]
    skip_above_z: Exact<f64>,
    mean: Exact<f64>,
    variance: Exact<f64>,
    steps: Plain<u64>,
});

form!(AutoClip {
    percentile: Exact<f64>,
    history: Plain<usize>,
    warm_up: Plain<u32>,
    steps: Plain<u64>,
    norms: Exact<Vec<f64>>,
});

form!(AdaGc {
    lambda_rel: Exact<f64>,
    lambda_abs: Exact<f64>,
    beta: Exact<f64>,
    warm_up: Plain<u32>,
    steps: Plain<u64>,
    labels: Plain<Vec<String>>,
    gammas: Exact<Vec<f64>>,
});

fn intact(valid: bool, reason: impl FnOnce() -> String) -> Result<(), Error> {
    if valid { Ok(()) } else { Err(Error::ThresholdState(reason() + "; it was damaged, load another")) }
}

impl super::ZClip {
    fn check_state(&self) -> Result<(), Error> {
        let Self { mean, variance, steps, .. } = *self;
        intact(is_norm(mean) && is_norm(variance) && (steps > 0 || mean + variance == 0.0), || {
            format!("its mean is {mean} and its variance {variance} after {steps} steps")
        })
    }
}

impl super::AutoClip {
    /// Also sorts the norms. There may be more norms than `history`, if it was reduced after the last step.
    fn check_state(&mut self) -> Result<(), Error> {
        let (length, steps) = (self.norms.len(), self.steps);
        intact(length as u64 <= steps && (length > 0 || steps == 0), || {
            format!("it holds {length} norms after {steps} steps")
        })?;
        self.sorted.clone_from(&self.norms);
        self.sorted.sort_unstable_by(f64::total_cmp);
        self.sorted.iter().try_for_each(|&norm| intact(is_norm(norm), || format!("it holds a norm of {norm}")))
    }
}

impl super::AdaGc {
    fn check_state(&self) -> Result<(), Error> {
        let Self { labels, gammas, steps, .. } = self;
        intact(gammas.len() == labels.len(), || {
            format!("it holds {} gammas of {} tensors", gammas.len(), labels.len())
        })?;
        labels.iter().zip(gammas).try_for_each(|(label, &gamma)| {
            let valid = gamma > 0.0 && (*steps > 0 || gamma.is_infinite());
            intact(valid, || format!("the gamma of {label} is {gamma} after {steps} steps"))
        })
    }
}

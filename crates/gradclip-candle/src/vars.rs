//! [`Vars`]: lists of vars, as users of candle have them.

use std::collections::{BTreeMap, HashMap};

use candle_core::Var;

/// A list of vars, with or without names.
///
/// | what | names | order |
/// |---|---|---|
/// | `[Var]`, `Vec<Var>`, arrays, such as `VarMap::all_vars` gives | none | the list's |
/// | the same of `(name, Var)` | yes | the list's |
/// | `HashMap<name, Var>`, such as `VarMap::data` gives, and `BTreeMap` | yes | of the names |
///
/// Implement it for your own model to pass the model itself.
pub trait Vars {
    /// The vars, each with its name if it has one. Norms are summed, and reports numbered, in this order.
    fn vars(&self) -> Vec<(Option<&str>, &Var)>;
}

impl Vars for [Var] {
    fn vars(&self) -> Vec<(Option<&str>, &Var)> {
        self.iter().map(|var| (None, var)).collect()
    }
}

impl<S: AsRef<str>> Vars for [(S, Var)] {
    fn vars(&self) -> Vec<(Option<&str>, &Var)> {
        self.iter().map(|(name, var)| (Some(name.as_ref()), var)).collect()
    }
}

impl<T> Vars for Vec<T>
where
    [T]: Vars,
{
    fn vars(&self) -> Vec<(Option<&str>, &Var)> {
        self[..].vars()
    }
}

impl<T, const N: usize> Vars for [T; N]
where
    [T]: Vars,
{
    fn vars(&self) -> Vec<(Option<&str>, &Var)> {
        self[..].vars()
    }
}

impl<S: AsRef<str>> Vars for BTreeMap<S, Var> {
    fn vars(&self) -> Vec<(Option<&str>, &Var)> {
        self.iter().map(|(name, var)| (Some(name.as_ref()), var)).collect()
    }
}

impl<S: AsRef<str>, H> Vars for HashMap<S, Var, H> {
    fn vars(&self) -> Vec<(Option<&str>, &Var)> {
        let mut vars: Vec<_> = self.iter().map(|(name, var)| (Some(name.as_ref()), var)).collect();
        vars.sort_unstable_by_key(|(name, _)| *name);
        vars
    }
}

//! Tests of internals. Fuzzing runs the checks of tables too.

#[cfg(test)]
mod every_language;
#[cfg(test)]
mod schedule;
#[cfg(test)]
mod tables;
pub(crate) mod tables_hold;

//! Tests of `src/fuzzing.rs`.

use super::replay::replay;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn builder_holds_on_its_corpus() {
    replay(ROOT, "builder", super::builder);
}

#[test]
#[cfg(feature = "gpu")]
fn tables_hold_on_their_corpus() {
    replay(ROOT, "tables", super::tables);
}

#[test]
#[cfg(feature = "safetensors")]
fn states_hold_on_their_corpus() {
    replay(ROOT, "state", super::state);
}

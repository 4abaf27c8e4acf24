//! Progress of long work: on stderr, and only if that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

/// A bar for `length` bytes; hidden under `--quiet` and `--json`.
pub(crate) fn bytes(length: u64, doing: &'static str, hidden: bool) -> ProgressBar {
    styled(Some(length), "{msg} {wide_bar} {bytes}/{total_bytes} {eta}", doing, hidden)
}

/// A bar for a count.
pub(crate) fn count(length: u64, doing: &'static str, hidden: bool) -> ProgressBar {
    styled(Some(length), "{msg} {wide_bar} {pos}/{len} {eta}", doing, hidden)
}

/// For work whose progress is unknown.
pub(crate) fn spinner(doing: &'static str, hidden: bool) -> ProgressBar {
    let spinner = styled(None, "{spinner} {msg} {elapsed}", doing, hidden);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

fn styled(length: Option<u64>, template: &str, doing: &'static str, hidden: bool) -> ProgressBar {
    // It draws nothing if stderr is no terminal.
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(length, target).with_style(style).with_message(doing);
    bar.with_finish(ProgressFinish::AndClear)
}

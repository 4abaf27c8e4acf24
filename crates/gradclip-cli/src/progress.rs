//! Progress of long work: on stderr, and only if that is a terminal. If `GRADCLIP_PROGRESS` is `lines`, it is for a program
//! that runs this one: a line `progress`, what is being done, how much of it, and of how much, divided by bars.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle, TermLike};

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
    let lines = length.is_some() && std::env::var_os("GRADCLIP_PROGRESS").is_some_and(|how| how == "lines");
    let (target, template) = match (lines, hidden) {
        (true, _) => (ProgressDrawTarget::term_like(Box::new(Lines)), "progress|{msg}|{pos}|{len}"),
        (false, true) => (ProgressDrawTarget::hidden(), template),
        // It draws nothing if stderr is no terminal.
        (false, false) => (ProgressDrawTarget::stderr(), template),
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(length, target).with_style(style).with_message(doing);
    bar.with_finish(ProgressFinish::AndClear)
}

/// Standard error as lines, where nothing is drawn over.
#[derive(Debug)]
struct Lines;

impl TermLike for Lines {
    fn width(&self) -> u16 {
        // A bar is padded to it.
        80
    }

    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        self.write_str(line)
    }

    fn write_str(&self, line: &str) -> io::Result<()> {
        let line = line.trim();
        if line.is_empty() { Ok(()) } else { writeln!(io::stderr(), "{line}") }
    }

    fn clear_line(&self) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

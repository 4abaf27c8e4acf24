//! Printing to standard output and standard error.

use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;

use serde::Serialize;

use crate::failure::Failure;

/// Prints to stdout.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    print_by(|stdout| stdout.write_all(text.as_bytes()))
}

/// Prints an object as one line of JSON, without holding the line in memory.
pub(crate) fn print_json(object: &impl Serialize) -> Result<(), Failure> {
    print_by(|mut stdout| {
        serde_json::to_writer(&mut stdout, object)?;
        stdout.write_all(b"\n")
    })
}

/// Prints to stdout by a writer, for long output.
pub(crate) fn print_by(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    let mut stdout = BufWriter::new(io::stdout().lock());
    printed(write(&mut stdout).and_then(|()| stdout.flush()))
}

/// The result of printing to stdout. A closed pipe (`| head`) is no failure.
pub(crate) fn printed(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io(Path::new("standard output"), "write")(error))
        }
        _ => Ok(()),
    }
}

/// Prints a remark to stderr.
pub(crate) fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

//! The only way to stdout and stderr. Results go to stdout and nothing else does.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

/// Whoever read stdout has gone away; no failure, and nothing more to do.
#[derive(Debug, thiserror::Error)]
#[error("stdout was closed")]
pub struct Closed;

/// Prints one line, or several that hold newlines, to stdout and flushes it.
///
/// # Errors
/// [`Closed`] when nobody reads stdout any more; other I/O errors as they are.
pub fn line(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Closed.into(),
        _ => anyhow::Error::new(error).context("write to stdout"),
    })
}

/// Prints a value as JSON, indented, to stdout.
///
/// # Errors
/// As [`line()`].
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Prints a remark for the person at the terminal to stderr.
pub fn note(text: &str) {
    to_stderr("note", text);
}

/// Prints what went wrong to stderr.
pub fn error(text: &str) {
    to_stderr("error", text);
}

/// Whether a person watches stderr, where progress is drawn.
pub fn is_watched() -> bool {
    io::stderr().is_terminal()
}

fn to_stderr(prefix: &str, text: &str) {
    // A closed stderr leaves nowhere to complain to.
    writeln!(io::stderr().lock(), "attnd: {prefix}: {text}").ok();
}

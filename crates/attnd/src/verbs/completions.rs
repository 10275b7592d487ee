//! `attnd completions`: shell completions, generated from the command line's definition.

use clap::CommandFactory;

use crate::args::{Cli, CompletionsArgs};
use crate::output;

/// Prints the script for one shell.
///
/// # Errors
/// If stdout can't be written.
pub fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "attnd", &mut script);
    output::line(String::from_utf8(script)?.trim_end())
}

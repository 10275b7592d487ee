//! Sets up log lines on stderr.

use tracing_subscriber::EnvFilter;

use crate::args::{LogArgs, LogFormat, Verb};
use crate::exit::BadInput;

/// Installs the subscriber. Servers log from `info` up, verbs that end by themselves from `warn` up.
///
/// # Errors
/// If the filter does not parse.
pub fn init(args: &LogArgs, verb: &Verb) -> anyhow::Result<()> {
    let default = match verb {
        Verb::Coordinator(_) | Verb::Worker(_) => "info",
        _ => "warn",
    };
    let directives = args.log.as_deref().unwrap_or(default);
    let filter = EnvFilter::try_new(directives)
        .map_err(|error| BadInput::new(format!("log filter '{directives}': {error}")))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Human => builder.with_ansi(crate::output::is_watched()).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

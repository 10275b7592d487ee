//! `attnd session`: keys and values that stay on a cluster. Each invocation that changes a session becomes its writer.

mod append;
mod attend;
mod change;
mod describe;
mod open;

use anyhow::Context as _;
use attnd_client::session::Sessions;

use crate::args::{ClusterArgs, ENDPOINT_ENV, SessionArgs, SessionVerb, endpoint_or_env};
use crate::exit::{BadInput, connect};

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] and the errors of reading files end the process with code 2, others with 1.
pub async fn run(args: &SessionArgs) -> anyhow::Result<()> {
    match &args.verb {
        SessionVerb::Open(args) => open::run(args).await,
        SessionVerb::Append(args) => append::run(args).await,
        SessionVerb::Attend(args) => attend::attend(args).await,
        SessionVerb::Step(args) => attend::step(args).await,
        SessionVerb::Fork(args) => change::fork(args).await,
        SessionVerb::Truncate(args) => change::truncate(args).await,
        SessionVerb::Seal(args) => change::seal(args).await,
        SessionVerb::Describe(args) => describe::describe(args).await,
        SessionVerb::List(args) => describe::list(args).await,
        SessionVerb::Close(args) => describe::close(args).await,
    }
}

/// Has `ask` make its requests of the cluster that is named.
async fn ask<T>(
    cluster: &ClusterArgs,
    ask: impl AsyncFnOnce(Sessions) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let endpoint = endpoint_or_env(cluster.endpoint.as_deref(), |key| std::env::var(key).ok());
    let endpoint = endpoint.ok_or_else(|| {
        BadInput::new(format!("which cluster? --endpoint URL or {ENDPOINT_ENV} names its coordinator"))
    })?;
    let sessions = connect(&endpoint)?.sessions().with_timeout(cluster.timeout);
    ask(sessions).await.with_context(|| endpoint)
}

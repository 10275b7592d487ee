//! `attnd coordinator`: runs the coordinator of a cluster until it is asked to stop.

use anyhow::Context as _;
use attnd_node::coordinator::{self, CoordinatorConfig};
use tokio::net::TcpListener;

use crate::args::CoordinatorArgs;
use crate::embedded::{self, StopSignal};

/// Listens, says where on one line of stdout, and serves.
///
/// # Errors
/// If the address can't be listened on, the coordinator ends other than by being asked to, or it is asked twice.
pub async fn run(args: &CoordinatorArgs) -> anyhow::Result<()> {
    let stop = StopSignal::install(args.exit_with_parent)?;
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("listen on {}", args.listen))?;
    embedded::announce(listener.local_addr()?)?;
    let config = CoordinatorConfig { state: args.state.clone(), ..CoordinatorConfig::default() };
    stop.serve(|asked| coordinator::run(listener, config, asked)).await
}

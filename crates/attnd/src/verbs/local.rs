//! `attnd local`: a coordinator and N worker processes on this machine, until Ctrl-C.

use crate::args::LocalArgs;
use crate::embedded::{LocalCluster, LocalOptions, StopSignal};
use crate::exit::Insisted;
use crate::output;

/// Starts the processes, prints the endpoint once all workers have joined, waits, and stops them all.
///
/// # Errors
/// If a process doesn't start, the coordinator or the last worker ends by itself, or it is asked twice
/// to stop.
pub async fn run(args: &LocalArgs) -> anyhow::Result<()> {
    let mut stop = StopSignal::install(args.exit_with_parent)?;
    let options = LocalOptions {
        workers: args.workers.into(),
        threads_per_worker: args.threads_per_worker.map(Into::into),
    };
    let mut cluster = tokio::select! {
        started = LocalCluster::start_at(options, args.listen) => started?,
        // What has been started is killed when the future is dropped.
        () = stop.requested() => return Ok(()),
    };
    let ended = match output::line(cluster.endpoint()) {
        Ok(()) => tokio::select! {
            () = stop.requested() => Ok(()),
            error = cluster.ended() => Err(error),
        },
        Err(error) => Err(error),
    };
    tokio::select! {
        () = cluster.stop() => ended,
        // The processes are killed when the future is dropped.
        () = stop.insisted() => Err(Insisted.into()),
    }
}

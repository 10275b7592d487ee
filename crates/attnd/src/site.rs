//! Where a call is computed: by a cluster that runs, or by processes started for it.

use anyhow::Context as _;
use attnd_client::WorkerChoice;

use crate::args::{ENDPOINT_ENV, SiteArgs, endpoint_or_env};
use crate::embedded::{LocalCluster, LocalOptions};
use crate::exit::BadInput;

/// Where a call is computed.
#[derive(Debug)]
pub enum Site {
    /// By a cluster that runs already.
    Remote(String),
    /// By processes started for this call.
    Local(LocalOptions),
}

impl Site {
    /// `--workers` typed wins over an endpoint in the environment.
    ///
    /// # Errors
    /// [`BadInput`] if no place is named, or fewer workers are started than are to be used.
    pub fn of(args: &SiteArgs, env: impl Fn(&str) -> Option<String>) -> Result<Self, BadInput> {
        if let Some(workers) = args.workers {
            if let Some(used) = args.use_workers.filter(|used| *used > workers) {
                let text = format!("--use-workers {used} needs more workers than --workers {workers} starts");
                return Err(BadInput::new(text));
            }
            let threads_per_worker = args.threads_per_worker.map(Into::into);
            return Ok(Self::Local(LocalOptions { workers: workers.into(), threads_per_worker }));
        }
        endpoint_or_env(args.endpoint.as_deref(), env).map(Self::Remote).ok_or_else(|| {
            BadInput::new(format!(
                "where to compute? --workers N starts N processes here, --endpoint URL or {ENDPOINT_ENV} names a cluster"
            ))
        })
    }

    /// Has `ask` make its calls at the endpoint, and stops what was started for them, whatever came of it.
    ///
    /// # Errors
    /// Those of `ask`, or that no processes can be started.
    pub async fn ask<T>(self, ask: impl AsyncFnOnce(&str) -> anyhow::Result<T>) -> anyhow::Result<T> {
        match self {
            Self::Remote(endpoint) => ask(&endpoint).await.with_context(|| endpoint),
            Self::Local(local) => {
                let cluster = LocalCluster::start(local).await?;
                let outcome = ask(cluster.endpoint()).await;
                cluster.stop().await;
                outcome
            }
        }
    }
}

/// How many workers may take part.
pub fn worker_choice(args: &SiteArgs) -> WorkerChoice {
    args.use_workers.map_or(WorkerChoice::Auto, |n| WorkerChoice::Exactly(n.into()))
}

//! The flags that say who computes a call, and how long it may take.

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::Args;

use super::values::{parse_count, parse_seconds, parse_workers};

/// A cluster that runs already, or one for this call only.
#[derive(Debug, Clone, Args)]
pub struct SiteArgs {
    /// Coordinator of a running cluster, such as http://127.0.0.1:7400 [env: ATTND_ENDPOINT]
    #[arg(long, value_name = "URL", conflicts_with_all = ["workers", "threads_per_worker"])]
    pub endpoint: Option<String>,
    /// Start this many worker processes on this machine for this call only
    #[arg(long, value_name = "N", value_parser = parse_workers)]
    pub workers: Option<NonZeroUsize>,
    /// Compute threads of each of those workers [default: the cores, divided evenly]
    #[arg(long, value_name = "N", requires = "workers", value_parser = parse_count)]
    pub threads_per_worker: Option<NonZeroUsize>,
    /// Use exactly N of the cluster's workers [default: as many as pay off]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub use_workers: Option<NonZeroUsize>,
    /// Give up after this many seconds, at most 3600. They cover the call: sending, computing, receiving, and sending
    /// again after a loss; not reading files, starting --workers, or writing the result
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = parse_seconds)]
    pub timeout: Duration,
}

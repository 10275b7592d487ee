//! `attnd session fork`, `truncate` and `seal`.

use serde::Serialize;

use super::ask;
use crate::args::{ClusterArgs, ForkArgs, SealArgs, TruncateArgs};
use crate::output;

/// Makes another session with the same tokens.
pub(super) async fn fork(args: &ForkArgs) -> anyhow::Result<()> {
    let child = ask(&args.cluster, async |sessions| {
        let mut session = sessions.attach(&args.name).await?;
        Ok(session.fork(args.child.as_deref()).await?)
    })
    .await?;
    let (name, child) = (child.name().to_string(), child.generation());
    let report = ChangeReport { session: args.name.clone(), generation: child, child: Some(name.clone()) };
    conclude(&args.cluster, &report, &format!("session {name}, of {}", args.name))
}

/// Cuts all layers.
pub(super) async fn truncate(args: &TruncateArgs) -> anyhow::Result<()> {
    let generation = ask(&args.cluster, async |sessions| {
        let mut session = sessions.attach(&args.name).await?;
        session.truncate(args.len).await?;
        Ok(session.generation())
    })
    .await?;
    let report = ChangeReport { session: args.name.clone(), generation, child: None };
    let line = format!("{}: at most {} tokens, generation {generation}", args.name, args.len);
    conclude(&args.cluster, &report, &line)
}

/// Ends all appends and cuts.
pub(super) async fn seal(args: &SealArgs) -> anyhow::Result<()> {
    let generation = ask(&args.cluster, async |sessions| {
        let mut session = sessions.attach(&args.name).await?;
        session.seal().await?;
        Ok(session.generation())
    })
    .await?;
    let report = ChangeReport { session: args.name.clone(), generation, child: None };
    conclude(&args.cluster, &report, &format!("{}: sealed", args.name))
}

/// The `--json` form.
#[derive(Debug, Serialize)]
struct ChangeReport {
    session: String,
    generation: u64,
    /// Of a fork.
    child: Option<String>,
}

fn conclude(cluster: &ClusterArgs, report: &ChangeReport, line: &str) -> anyhow::Result<()> {
    if cluster.json { output::json(report) } else { output::line(line) }
}

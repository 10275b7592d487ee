//! `attnd plan`: which worker of a cluster would hold which part of a session.

use anyhow::Context as _;
use attnd_client::{ClusterStatus, SESSIONS, WorkerStatus};
use attnd_plan::Piece;
use attnd_plan::session::spec::DEFAULT_TTL;
use attnd_plan::session::{Holder, Keeper, Placement, PlacementError, SessionSpec, place};
use serde::Serialize;

use crate::args::{ENDPOINT_ENV, PlanArgs, endpoint_or_env};
use crate::exit::{BadInput, connect};
use crate::{output, table};

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] without an endpoint or for a session that makes no sense; otherwise if the coordinator does not answer, or its workers
/// can't hold that many replicas.
pub async fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let spec = spec(args);
    spec.check().map_err(|error| BadInput::new(error.to_string()))?;
    let endpoint =
        endpoint_or_env(args.endpoint.as_deref(), |key| std::env::var(key).ok()).ok_or_else(|| {
            BadInput::new(format!("which cluster? --endpoint URL or {ENDPOINT_ENV} names its coordinator"))
        })?;
    let status = connect(&endpoint)?.status().await.with_context(|| endpoint)?;
    let keepers = keepers(&status);
    let left_out = status.workers.len() - keepers.len();
    if left_out > 0 {
        output::note(&format!("{left_out} workers are not active, or too old for sessions, and left out"));
    }
    let placement = place(&spec, &keepers).map_err(advised)?;
    let report = PlanReport::new(&spec, &placement, &keepers);
    if args.json { output::json(&report) } else { print(&report) }
}

fn spec(args: &PlanArgs) -> SessionSpec {
    let replicas = args.replicas.get();
    SessionSpec {
        layers: args.layers.get(),
        heads: args.heads.get(),
        kv_heads: args.kv_heads.unwrap_or(args.heads).get(),
        head_dim: args.head_dim.get(),
        value_dim: args.value_dim.unwrap_or(args.head_dim).get(),
        dtype: args.dtype,
        storage: args.storage.unwrap_or(args.dtype.into()),
        value_is_key_prefix: false,
        replicas,
        acks: replicas,
        ttl: DEFAULT_TTL,
        max_tokens: args.tokens.get(),
        allow_same_host: args.allow_same_host,
    }
}

/// The workers that may get new work and hold shards.
fn keepers(status: &ClusterStatus) -> Vec<Keeper> {
    let usable = |worker: &&WorkerStatus| worker.state == "ACTIVE" && worker.wire_version >= SESSIONS;
    let keepers = status.workers.iter().filter(usable).map(|worker| Keeper {
        // Which life of it doesn't matter to where things would go.
        holder: Holder { worker: worker.worker.clone(), incarnation: 0 },
        host: worker.host.clone(),
        gflops: worker.gflops,
        free_bytes: worker.session_memory_bytes.saturating_sub(worker.session_used_bytes),
    });
    keepers.collect()
}

/// Why there is no placement, with what helps.
fn advised(error: PlacementError) -> anyhow::Error {
    match error {
        PlacementError::Domains { .. } => anyhow::anyhow!(
            "{error}: replicas are on different hosts; start workers on more, say --host for those whose host names are wrong, or \
             allow the same with --allow-same-host"
        ),
        other => other.into(),
    }
}

/// The `--json` form.
#[derive(Debug, Serialize)]
struct PlanReport {
    reason: String,
    tokens: usize,
    tokens_that_fit: usize,
    shards: Vec<ShardReport>,
    workers: Vec<WorkerReport>,
}

#[derive(Debug, Serialize)]
struct ShardReport {
    pieces: Vec<PieceReport>,
    /// The first one computes.
    workers: Vec<String>,
    bytes: u64,
}

/// Ends are not in the ranges.
#[derive(Debug, Serialize)]
struct PieceReport {
    heads: [usize; 2],
    kv_heads: [usize; 2],
    slots: [usize; 2],
}

#[derive(Debug, Serialize)]
struct WorkerReport {
    id: String,
    host: String,
    gflops: f64,
    free_bytes: u64,
    bytes: u64,
    shards: Vec<usize>,
}

impl PlanReport {
    fn new(spec: &SessionSpec, placement: &Placement, keepers: &[Keeper]) -> Self {
        let group = spec.group_size();
        let piece = |Piece { groups, slots }: &Piece| PieceReport {
            heads: [groups.start * group, groups.end * group],
            kv_heads: [groups.start, groups.end],
            slots: [slots.start, slots.end],
        };
        let shards = placement.shards.iter().map(|shard| ShardReport {
            pieces: shard.pieces.iter().map(piece).collect(),
            workers: shard.members.iter().map(|member| member.worker.to_string()).collect(),
            bytes: shard.bytes,
        });
        let workers = keepers.iter().map(|keeper| {
            let held = placement.shards.iter().enumerate();
            let held = held.filter(|(_, shard)| shard.members.contains(&keeper.holder));
            WorkerReport {
                id: keeper.holder.worker.to_string(),
                host: keeper.host.clone(),
                gflops: keeper.gflops,
                free_bytes: keeper.free_bytes,
                bytes: held.clone().map(|(_, shard)| shard.bytes).sum(),
                shards: held.map(|(i, _)| i).collect(),
            }
        });
        Self {
            reason: placement.reason.clone(),
            tokens: spec.max_tokens,
            tokens_that_fit: placement.tokens,
            shards: shards.collect(),
            workers: workers.collect(),
        }
    }
}

fn print(report: &PlanReport) -> anyhow::Result<()> {
    output::line(&report.reason)?;
    let mut shards =
        table::with_header(["shard", "heads", "slots", "bytes of each", "computes", "holds it too"]);
    for (i, shard) in report.shards.iter().enumerate() {
        let lines = |of: fn(&PieceReport) -> [usize; 2]| {
            let range = |piece: &PieceReport| {
                let [start, end] = of(piece);
                format!("{start}-{}", end.saturating_sub(1))
            };
            shard.pieces.iter().map(range).collect::<Vec<_>>().join("\n")
        };
        let (first, others) = shard
            .workers
            .split_first()
            .map_or(("", String::new()), |(first, others)| (first.as_str(), others.join(", ")));
        shards.add_row([
            i.to_string(),
            lines(|piece| piece.heads),
            lines(|piece| piece.slots),
            table::bytes(shard.bytes),
            first.to_owned(),
            others,
        ]);
    }
    table::align_right(&mut shards, &[0, 1, 2, 3]);
    output::line(&shards.to_string())?;
    let mut workers = table::with_header(["worker", "host", "GFLOP/s", "shards", "would take", "of free"]);
    for worker in &report.workers {
        let held: Vec<String> = worker.shards.iter().map(ToString::to_string).collect();
        workers.add_row([
            worker.id.clone(),
            worker.host.clone(),
            format!("{:.0}", worker.gflops),
            held.join(", "),
            table::bytes(worker.bytes),
            table::bytes(worker.free_bytes),
        ]);
    }
    table::align_right(&mut workers, &[2, 4, 5]);
    output::line(&workers.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn worker(name: &str, state: &str, wire_version: u32) -> WorkerStatus {
        WorkerStatus {
            worker: name.parse().unwrap(),
            address: "http://127.0.0.1:1".into(),
            state: state.into(),
            isa: "avx2".into(),
            kernel_id: "c1".into(),
            threads: 1,
            gflops: 100.0,
            memory_budget_bytes: 0,
            memory_used_bytes: 0,
            calls_in_flight: 0,
            load: 0.0,
            since_heartbeat: Duration::ZERO,
            version: "test".into(),
            wire_version,
            host: format!("h-{name}"),
            session_memory_bytes: 1000,
            session_used_bytes: 400,
        }
    }

    #[test]
    fn only_active_workers_that_know_sessions_count_with_what_is_free() {
        let workers =
            vec![worker("a", "ACTIVE", SESSIONS), worker("b", "SUSPECT", SESSIONS), worker("c", "ACTIVE", 6)];
        let keepers = keepers(&ClusterStatus { workers, ..ClusterStatus::default() });
        assert_eq!(keepers.len(), 1);
        assert_eq!((keepers[0].host.as_str(), keepers[0].free_bytes), ("h-a", 600));
    }

    #[test]
    fn too_few_hosts_come_with_what_helps() {
        let error = advised(PlacementError::Domains { domains: 2, replicas: 3 }).to_string();
        assert!(error.starts_with("2 domains for R=3: ") && error.contains("--allow-same-host"), "{error}");
        assert_eq!(advised(PlacementError::NoWorkers).to_string(), "no worker is alive");
    }
}

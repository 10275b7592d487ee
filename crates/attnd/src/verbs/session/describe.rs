//! `attnd session describe`, `list` and `close`.

use attnd_client::SessionDescription;
use attnd_client::session::ShardDescription;
use attnd_plan::Piece;
use serde::Serialize;

use super::ask;
use crate::args::{CloseArgs, DescribeArgs, ListArgs};
use crate::{output, table};

/// Shows what a session is, what it has, and who holds it.
pub(super) async fn describe(args: &DescribeArgs) -> anyhow::Result<()> {
    let description = ask(&args.cluster, async |sessions| Ok(sessions.describe(&args.name).await?)).await?;
    let report = Report::from(&description);
    if args.cluster.json { output::json(&report) } else { print(&report) }
}

/// Lists the names of all sessions.
pub(super) async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let names = ask(&args.cluster, async |sessions| Ok(sessions.list().await?)).await?;
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    if args.cluster.json {
        return output::json(&names);
    }
    names.iter().try_for_each(|name| output::line(name))
}

/// Ends a session.
pub(super) async fn close(args: &CloseArgs) -> anyhow::Result<()> {
    let already = ask(&args.cluster, async |sessions| Ok(sessions.close(&args.name).await?)).await?;
    if args.cluster.json {
        return output::json(&CloseReport { session: args.name.clone(), already_closed: already });
    }
    output::line(&format!("{}: {}", args.name, if already { "had been closed" } else { "closed" }))
}

/// The `--json` form of the end of one.
#[derive(Debug, Serialize)]
struct CloseReport {
    session: String,
    already_closed: bool,
}

/// The `--json` form.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    name: String,
    created: bool,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    value_is_key_prefix: bool,
    dtype: String,
    storage: String,
    replicas: usize,
    acks: usize,
    ttl_seconds: u64,
    ttl_left_seconds: u64,
    max_tokens: usize,
    allow_same_host: bool,
    generation: u64,
    sealed: bool,
    writer_epoch: u64,
    next_op_seq: u64,
    /// Of each layer.
    tokens: Vec<u64>,
    shards: Vec<ShardReport>,
}

#[derive(Debug, Serialize)]
struct ShardReport {
    pieces: Vec<PieceReport>,
    epoch: u64,
    state: &'static str,
    workers: Vec<String>,
    bytes: u64,
}

/// What it covers, each as `[begin, end]`.
#[derive(Debug, Serialize)]
struct PieceReport {
    kv_heads: [usize; 2],
    slots: [usize; 2],
}

impl From<&SessionDescription> for Report {
    fn from(description: &SessionDescription) -> Self {
        let spec = &description.spec;
        let piece = |piece: &Piece| PieceReport {
            kv_heads: [piece.groups.start, piece.groups.end],
            slots: [piece.slots.start, piece.slots.end],
        };
        let shard = |shard: &ShardDescription| ShardReport {
            pieces: shard.pieces.iter().map(piece).collect(),
            epoch: shard.epoch,
            state: shard.health.name(),
            workers: shard.workers.iter().map(ToString::to_string).collect(),
            bytes: shard.bytes,
        };
        Self {
            name: description.name.to_string(),
            created: description.created,
            layers: spec.layers,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            value_dim: spec.value_dim,
            value_is_key_prefix: spec.value_is_key_prefix,
            dtype: spec.dtype.to_string(),
            storage: spec.storage.to_string(),
            replicas: spec.replicas,
            acks: spec.acks,
            ttl_seconds: spec.ttl.as_secs(),
            ttl_left_seconds: description.ttl_left.as_secs(),
            max_tokens: spec.max_tokens,
            allow_same_host: spec.allow_same_host,
            generation: description.generation,
            sealed: description.sealed,
            writer_epoch: description.writer_epoch,
            next_op_seq: description.next_op_seq,
            tokens: description.tokens.clone(),
            shards: description.shards.iter().map(shard).collect(),
        }
    }
}

fn print(report: &Report) -> anyhow::Result<()> {
    let Report { layers, heads, kv_heads, head_dim, value_dim, dtype, storage, .. } = report;
    output::line(&format!(
        "{}: {layers} layers, {heads} heads over {kv_heads}, dim {head_dim} and {value_dim}, {dtype} kept as {storage}",
        report.name
    ))?;
    output::line(&format!(
        "{} of at most {} tokens, generation {}{}; closed after {} s without a request, in {} s",
        tokens(&report.tokens),
        report.max_tokens,
        report.generation,
        if report.sealed { ", sealed" } else { "" },
        report.ttl_seconds,
        report.ttl_left_seconds
    ))?;
    let mut table = table::with_header(["shard", "kv heads", "slots", "state", "epoch", "bytes", "workers"]);
    for (at, shard) in report.shards.iter().enumerate() {
        let all = |of: fn(&PieceReport) -> [usize; 2]| {
            let ranges = shard.pieces.iter().map(of).map(|[begin, end]| format!("{begin}..{end}"));
            ranges.collect::<Vec<_>>().join(" ")
        };
        table.add_row([
            at.to_string(),
            all(|piece| piece.kv_heads),
            all(|piece| piece.slots),
            shard.state.to_owned(),
            shard.epoch.to_string(),
            table::bytes(shard.bytes),
            shard.workers.join(" "),
        ]);
    }
    table::align_right(&mut table, &[0, 4, 5]);
    output::line(&table.to_string())
}

/// Tokens of all layers, in one number where they are equal.
fn tokens(of_layers: &[u64]) -> String {
    match (of_layers.iter().min(), of_layers.iter().max()) {
        (Some(least), Some(most)) if least != most => format!("{least} to {most}"),
        (Some(all), _) => all.to_string(),
        (None, _) => "0".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_one_number_where_layers_agree() {
        assert_eq!([&[7, 7][..], &[3, 9, 4], &[0]].map(tokens), ["7", "3 to 9", "0"]);
    }
}

//! One finished call in words, tables and JSON: what was planned, how long each part took.

use attnd_client::{PlanSummary, Timings};
use comfy_table::Table;
use serde::Serialize;

use crate::table;

/// Seconds per part of a call, as the coordinator saw them.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct TimingsReport {
    /// Choosing workers.
    pub plan: f64,
    /// First chunk received to last chunk forwarded.
    pub scatter: f64,
    /// The longest time a worker spent in its kernels.
    pub compute: f64,
    /// Commit to last partial received.
    pub gather: f64,
    /// Merging and finishing partials.
    pub merge: f64,
    /// All of it; the parts overlap.
    pub total: f64,
}

impl From<&Timings> for TimingsReport {
    fn from(t: &Timings) -> Self {
        Self {
            plan: t.plan,
            scatter: t.scatter,
            compute: t.compute,
            gather: t.gather,
            merge: t.merge,
            total: t.total,
        }
    }
}

/// A plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlanReport {
    /// One sentence: how many workers, cut by what, and why.
    pub reason: String,
    /// Predicted duration of the whole call.
    pub predicted_seconds: f64,
    /// One for each worker that takes part.
    pub shares: Vec<ShareReport>,
}

/// What one worker computes.
#[derive(Debug, Clone, Serialize)]
pub struct ShareReport {
    /// The worker.
    pub worker: String,
    /// Half-open ranges of kv groups (over the batch) and slots (of 64).
    pub pieces: Vec<PieceReport>,
    /// Bytes of K and V that it receives.
    pub kv_bytes: u64,
}

/// A rectangle of kv groups and slots; ends are exclusive.
#[derive(Debug, Clone, Serialize)]
pub struct PieceReport {
    /// Kv groups, over the batch.
    pub groups: [usize; 2],
    /// Slots of the key axis, 0 to 64.
    pub slots: [usize; 2],
}

impl From<&PlanSummary> for PlanReport {
    fn from(plan: &PlanSummary) -> Self {
        let shares = plan.shares.iter().map(|share| ShareReport {
            worker: share.worker.to_string(),
            pieces: share
                .pieces
                .iter()
                .map(|piece| PieceReport {
                    groups: [piece.groups.start, piece.groups.end],
                    slots: [piece.slots.start, piece.slots.end],
                })
                .collect(),
            kv_bytes: share.kv_bytes,
        });
        Self {
            reason: plan.reason.clone(),
            predicted_seconds: plan.predicted_seconds,
            shares: shares.collect(),
        }
    }
}

/// A row for each worker that takes part.
pub fn plan_table(plan: &PlanReport) -> Table {
    let mut table = table::with_header(["worker", "kv heads", "key slots of 64", "K and V"]);
    for share in &plan.shares {
        let column = |range: fn(&PieceReport) -> [usize; 2]| {
            let ranges = share.pieces.iter().map(range).map(|[begin, end]| format!("{begin}..{end}"));
            ranges.collect::<Vec<_>>().join("\n")
        };
        let (groups, slots) = (column(|piece| piece.groups), column(|piece| piece.slots));
        table.add_row([share.worker.clone(), groups, slots, table::bytes(share.kv_bytes)]);
    }
    table::align_right(&mut table, &[3]);
    table
}

/// One row: how long each part took.
pub fn timing_table(t: &TimingsReport, client_seconds: f64) -> Table {
    let mut table =
        table::with_header(["plan", "scatter", "compute", "gather", "merge", "total", "with client"]);
    table.add_row(
        [t.plan, t.scatter, t.compute, t.gather, t.merge, t.total, client_seconds].map(table::seconds),
    );
    table::align_right(&mut table, &[0, 1, 2, 3, 4, 5, 6]);
    table
}

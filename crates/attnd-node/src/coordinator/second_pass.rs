//! The second pass of a call that wants more than the context, as the coordinator sees it: rows that have merged go back to the
//! workers as sums, and what these report on them goes to the client.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use attnd_kernel::{AttnShape, NodeReport, Operator, Outputs, RowSums};
use attnd_plan::{Plan, ReportId, filled_nodes};
use attnd_wire::{AttendReply, Error, MergedSums, Reason, ReportChunk, ShareReport, proto};

use super::backlog::RowKey;
use super::heat_rows::HeatRows;

/// Rows that have merged and on which not every share has reported.
#[derive(Debug)]
pub(crate) struct SecondPass {
    outputs: Arc<Outputs>,
    /// Of each group: the shares that have keys of it.
    owners: Vec<Vec<usize>>,
    /// Sums that each share is still to be sent.
    due: Vec<usize>,
    open: BTreeMap<RowKey, OpenRow>,
    heat: Arc<Mutex<HeatRows>>,
}

#[derive(Debug)]
struct OpenRow {
    sums: MergedSums,
    reports: Vec<NodeReport>,
}

/// What shares have reported on some rows, to be put together on the compute pool.
#[derive(Debug)]
pub(crate) struct Reported {
    outputs: Arc<Outputs>,
    sums: MergedSums,
    reports: Vec<NodeReport>,
    heat: Arc<Mutex<HeatRows>>,
}

impl SecondPass {
    pub(crate) fn new(outputs: Arc<Outputs>, plan: &Plan, shape: &AttnShape) -> Self {
        let mut owners = vec![Vec::new(); shape.n_groups()];
        for (share, of_worker) in plan.shares.iter().enumerate() {
            for piece in &of_worker.pieces {
                if !filled_nodes(piece.slots.clone(), shape.n_keys()).is_empty() {
                    let groups = owners.iter_mut().skip(piece.groups.start).take(piece.groups.len());
                    groups.for_each(|owners| owners.push(share));
                }
            }
        }
        let mut due = vec![0; plan.shares.len()];
        let ranges = shape.n_queries().div_ceil(plan.tokens_per_cell.max(1));
        for share in owners.iter().flatten() {
            if let Some(due) = due.get_mut(*share) {
                *due += ranges;
            }
        }
        Self { outputs, owners, due, open: BTreeMap::new(), heat: Arc::default() }
    }

    /// Takes the sums of rows that have merged; who is to be told.
    pub(crate) fn merged(&mut self, sums: MergedSums) -> Vec<usize> {
        let key = (sums.group, sums.tokens.start);
        let owners = self.owners.get(sums.group).cloned().unwrap_or_default();
        self.open.insert(key, OpenRow { sums, reports: Vec::with_capacity(owners.len()) });
        owners
    }

    /// Counts sums as sent to a share.
    pub(crate) fn sent(&mut self, share: usize) {
        if let Some(due) = self.due.get_mut(share) {
            *due = due.saturating_sub(1);
        }
    }

    /// Whether a share is to be sent more sums.
    pub(crate) fn is_due(&self, share: usize) -> bool {
        self.due.get(share).is_some_and(|due| *due > 0)
    }

    /// Keeps a report, unless its rows are still on their way through the pool: nobody was told of them yet.
    pub(crate) fn reported(&mut self, share: ShareReport) -> bool {
        let row = self.open.get_mut(&(share.group, share.tokens.start));
        row.map(|row| row.reports.push(share.report)).is_some()
    }

    /// Everything about rows on which the last share has reported.
    pub(crate) fn whole(&mut self, id: ReportId) -> Option<Reported> {
        let OpenRow { sums, reports } = self.open.remove(&(id.group, id.first_token))?;
        Some(Reported { outputs: Arc::clone(&self.outputs), sums, reports, heat: Arc::clone(&self.heat) })
    }
}

/// Joins reports and makes numbers of them, as messages.
///
/// # Errors
/// [`Reason::Internal`] where there are none.
pub(crate) fn numbers(
    reported: Reported,
    shape: &AttnShape,
    operator: &Operator,
) -> Result<Vec<proto::AttendReply>, Error> {
    let Reported { outputs, sums, reports, heat } = reported;
    if !outputs.has_report() {
        return Ok(Vec::new());
    }
    let joined = reports.into_iter().reduce(|mut left, right| {
        left.merge(&right);
        left
    });
    let joined = joined.ok_or_else(|| Error::new(Reason::Internal, "rows without reports"))?;
    if joined.heads.is_empty() {
        return Ok(Vec::new());
    }
    Ok(told(&joined, sums, &outputs, &heat, shape, operator).into_iter().map(Into::into).collect())
}

/// What a client is told of rows on which all is reported.
pub(crate) fn told(
    joined: &NodeReport,
    sums: MergedSums,
    outputs: &Outputs,
    heat: &Mutex<HeatRows>,
    shape: &AttnShape,
    operator: &Operator,
) -> Vec<AttendReply> {
    let MergedSums { group, tokens, m, l } = sums;
    let numbers = joined.finish(RowSums { m: &m, l: &l }, outputs, operator);
    let first_head = group * shape.group_size();
    let heads = first_head + joined.heads.start..first_head + joined.heads.end;
    let rows = {
        let mut heat = heat.lock().unwrap_or_else(PoisonError::into_inner);
        heat.add(&joined.heat, group, &tokens, shape, outputs)
    };
    let has_numbers = numbers != attnd_kernel::FinishedReport::default();
    let numbers = has_numbers.then(|| AttendReply::Report(ReportChunk { heads, tokens, numbers }));
    numbers.into_iter().chain(rows.into_iter().map(AttendReply::Heat)).collect()
}

/// What a report takes.
pub(crate) fn bytes_of(report: &NodeReport) -> usize {
    let NodeReport { top, mass, entropy, distance, max_score, heat, .. } = report;
    let wide = top.len() + mass.len() + entropy.len() + distance.len() + heat.cells.len();
    size_of::<u64>() * wide + size_of::<f32>() * max_score.len()
}

//! The second pass of a call that wants more than the context: rows that have merged come back as the sums that their weights
//! are divided by, and their scores are computed again.
//!
//! Groups stay in memory until the last of their rows was reported on. All of a share's nodes of some rows join in one
//! report, which is sent after the elements that they have.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use attnd_kernel::slot::{Node, keys_in_slots};
use attnd_kernel::{AttnShape, ElementTile, NodeReport, Outputs, RowSums, inspect_node};
use attnd_plan::{ELEMENT_BYTES, Piece, filled_nodes};
use attnd_wire::{
    ComputeBegin, ComputeReply, Elements, Error, MergedSums, Reason, ShareReport, floats, proto,
};
use tokio::sync::mpsc;

use super::cells::{Call, ReadyGroup, Replies, on_pool};

/// Multiply-adds on one thread between two looks whether anybody still wants them: some ten milliseconds.
const SLICE: u64 = 1 << 30;

/// The sums that a share waits for: each once.
#[derive(Debug, Default)]
pub(crate) struct SumsDue {
    left: usize,
    came: BTreeSet<(usize, usize)>,
}

impl SumsDue {
    /// Those of the groups of which the share has keys.
    pub(crate) fn new(shape: &AttnShape, pieces: &[Piece], tokens_per_cell: usize) -> Self {
        let has_keys = |piece: &&Piece| keys_in_slots(piece.slots.clone(), shape.n_keys()) > 0;
        let groups: usize = pieces.iter().filter(has_keys).map(|piece| piece.groups.len()).sum();
        Self { left: groups * ranges(shape, tokens_per_cell), came: BTreeSet::new() }
    }

    /// How many are still due.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Counts sums in, which are of a cell of the share.
    ///
    /// # Errors
    /// [`Reason::StreamOrder`] where they came before.
    pub(crate) fn take(&mut self, sums: &MergedSums) -> Result<(), Error> {
        let (group, first_token) = (sums.group, sums.tokens.start);
        if self.left == 0 || !self.came.insert((group, first_token)) {
            let detail = format!("sums of group {group} tokens from {first_token} came twice");
            return Err(Error::new(Reason::StreamOrder, detail));
        }
        self.left -= 1;
        Ok(())
    }
}

fn ranges(shape: &AttnShape, tokens_per_cell: usize) -> usize {
    shape.n_queries().div_ceil(tokens_per_cell.max(1))
}

/// Groups that the first pass has begun with and the second has not ended with.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<BTreeMap<usize, KeptGroup>>);

#[derive(Debug)]
struct KeptGroup {
    ready: Arc<ReadyGroup>,
    /// Rows that were not reported on, by ranges of tokens.
    left: usize,
}

impl Kept {
    /// Keeps a group with keys until it was reported on.
    pub(crate) fn keep(&self, call: &Call, ready: &Arc<ReadyGroup>) {
        let left = ranges(&call.begin.shape, call.begin.tokens_per_cell);
        let group = KeptGroup { ready: Arc::clone(ready), left };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(ready.group, group);
    }

    /// The group, once for each of its ranges of tokens.
    fn take(&self, group: usize) -> Option<Arc<ReadyGroup>> {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = groups.get_mut(&group)?;
        kept.left -= 1;
        if kept.left > 0 {
            Some(Arc::clone(&kept.ready))
        } else {
            groups.remove(&group).map(|kept| kept.ready)
        }
    }
}

/// Reports on rows as their sums come, until there are no more.
///
/// # Errors
/// The first thing that went wrong.
pub(crate) async fn report(
    call: Arc<Call>,
    kept: Arc<Kept>,
    mut sums: mpsc::Receiver<MergedSums>,
    replies: Replies,
) -> Result<(), Error> {
    while let Some(sums) = sums.recv().await {
        let group = sums.group;
        let ready = kept.take(group).ok_or_else(|| {
            Error::new(Reason::StreamOrder, format!("sums of group {group} came before its operands"))
        })?;
        report_on(&call, ready, Arc::new(sums), &replies).await?;
    }
    Ok(())
}

async fn report_on(
    call: &Arc<Call>,
    ready: Arc<ReadyGroup>,
    sums: Arc<MergedSums>,
    replies: &Replies,
) -> Result<(), Error> {
    let gone = || Error::new(Reason::Cancelled, "nobody waits for the reports");
    let outputs = call.begin.outputs.clone();
    let outputs = outputs.ok_or_else(|| Error::new(Reason::Internal, "a second pass without outputs"))?;
    let mut report = NodeReport::empty(&outputs, sums.group, sums.tokens.clone());
    let slots = ready.operands.kv.slots();
    for node in parts(&call.begin, call.pool.threads(), &outputs, (sums.group, slots), &sums.tokens) {
        let (call_on_pool, outputs, ready, sums) =
            (Arc::clone(call), Arc::clone(&outputs), Arc::clone(&ready), Arc::clone(&sums));
        let part = on_pool(&call.pool, sums.group, move || {
            if call_on_pool.cancelled.load(Ordering::Relaxed) {
                return None;
            }
            let (part, elements) = inspect(&call_on_pool, &outputs, &ready, &sums, node);
            report.merge(&part);
            Some((report, elements))
        });
        let (joined, elements) = part.await?.ok_or_else(gone)?;
        report = joined;
        for elements in elements {
            replies.send(Ok(elements)).await.map_err(|_closed| gone())?;
        }
    }
    let share = ShareReport { group: sums.group, tokens: sums.tokens.clone(), report };
    let place = replies.reserve().await.map_err(|_closed| gone())?;
    let encode = move || proto::ComputeReply::from(ComputeReply::Report(share));
    place.send(Ok(on_pool(&call.pool, sums.group, encode).await?));
    Ok(())
}

/// The nodes that are computed one after the other: small enough to be given up in between, and to hold their elements.
pub(crate) fn parts(
    begin: &ComputeBegin,
    threads: usize,
    outputs: &Outputs,
    (group, slots): (usize, Range<usize>),
    tokens: &Range<usize>,
) -> Vec<Node> {
    let shape = &begin.shape;
    let mask = begin.operator.mask_of_group(group, shape);
    let most = SLICE * threads as u64;
    let per_key = (shape.group_size() * begin.operator.score_cost(shape)) as u64;
    let mut parts = Vec::new();
    let mut stack: Vec<Node> =
        filled_nodes(slots, shape.n_keys()).into_iter().map(|(node, _)| node).collect();
    while let Some(node) = stack.pop() {
        let keys = keys_in_slots(node.slots(), shape.n_keys());
        if keys == 0 {
            continue;
        }
        let seen: u64 = tokens.clone().map(|token| mask.visible(token).len().min(keys) as u64).sum();
        let element_bytes = 4 * outputs.elements_of(group, node, tokens);
        let is_small = seen.saturating_mul(per_key) <= most && element_bytes <= ELEMENT_BYTES;
        match node.children().filter(|_| !is_small) {
            Some((left, right)) => stack.extend([right, left]),
            None => parts.push(node),
        }
    }
    parts
}

/// Runs on the compute pool, checksums of elements and all.
fn inspect(
    call: &Call,
    outputs: &Outputs,
    ready: &ReadyGroup,
    sums: &MergedSums,
    node: Node,
) -> (NodeReport, Vec<proto::ComputeReply>) {
    let _busy = call.busy.enter();
    let shape = call.begin.shape;
    let first_head = sums.group * shape.group_size();
    let mut elements = Vec::new();
    let mut emit = |tile: ElementTile<'_>| {
        elements.push(ComputeReply::Elements(elements_of(tile, first_head)).into());
    };
    let of_rows = RowSums { m: &sums.m, l: &sums.l };
    let report = ready.with_call(&call.begin, |group| {
        inspect_node(call.kernels, &group, of_rows, outputs, node, sums.tokens.clone(), &mut emit)
    });
    (report, elements)
}

/// What kernels lend, as it travels. `first_head`: the first query head of the group, flattened over the batch.
pub(crate) fn elements_of(tile: ElementTile<'_>, first_head: usize) -> Elements {
    let ElementTile { rectangle, head_in_group, tokens, keys, values } = tile;
    let data = floats::into_bytes(values.to_vec());
    Elements { rectangle, head: first_head + head_in_group, tokens, keys, data }
}

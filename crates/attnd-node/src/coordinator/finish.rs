//! From the partials of some rows to the messages that carry them to the client. Pure; runs on the compute pool.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_kernel::{AttnShape, FinishedRows, Kernels, Operator, PartialRows};
use attnd_plan::Ready;
use attnd_wire::{AttendReply, ContextChunk, Error, MergedSums, limits, proto, refusal};

/// Finished rows on their way to the client.
#[derive(Debug)]
pub(crate) struct Finish {
    pub(crate) replies: Vec<proto::AttendReply>,
    /// What the rows' weights are divided by, where there is a second pass.
    pub(crate) sums: Option<MergedSums>,
    /// Time on the compute thread.
    pub(crate) spent: Duration,
    /// Rows that see no key, and the first of them: head, flattened over the batch, and token.
    pub(crate) unseen: u64,
    pub(crate) first_unseen: Option<(usize, usize)>,
}

/// What else is asked of finished rows.
#[derive(Clone, Debug)]
pub(crate) struct Checks {
    /// The mean of the group's values, where it is what rows are that see nothing.
    pub(crate) mean: Option<Arc<[f32]>>,
    /// Rows may have NaN and infinities.
    pub(crate) allow_non_finite: bool,
    /// Their sums are needed again.
    pub(crate) keep_sums: bool,
}

/// Rows that have merged and are divided, ordered `[head, token]`.
#[derive(Debug)]
pub(crate) struct Merged {
    pub(crate) rows: FinishedRows,
    pub(crate) sums: Option<MergedSums>,
    pub(crate) unseen: u64,
    pub(crate) first_unseen: Option<(usize, usize)>,
}

/// Merges and divides as [`merge`], and makes messages of the rows.
///
/// # Errors
/// As [`merge`].
pub(crate) fn finish(
    ready: Ready<PartialRows>,
    shape: &AttnShape,
    operator: &Operator,
    checks: Checks,
    kernels: &Kernels,
) -> Result<Finish, Error> {
    let begun = Instant::now();
    let (group, tokens) = (ready.group, ready.tokens.clone());
    let Merged { rows, sums, unseen, first_unseen } = merge(ready, shape, operator, checks, kernels)?;
    let first_head = group * shape.group_size();
    let heads = first_head..first_head + shape.group_size();
    let replies = chunks(rows, heads, tokens, shape.value_dim());
    Ok(Finish { replies, sums, spent: begun.elapsed(), unseen, first_unseen })
}

/// Merges the partials along the canonical tree, adds sinks, divides, once, and fills rows that saw nothing.
///
/// # Errors
/// [`attnd_wire::Reason::OutputOverflow`] for the first row that isn't finite, unless that is allowed.
pub(crate) fn merge(
    ready: Ready<PartialRows>,
    shape: &AttnShape,
    operator: &Operator,
    Checks { mean, allow_non_finite, keep_sums }: Checks,
    kernels: &Kernels,
) -> Result<Merged, Error> {
    let Ready { group, tokens, parts } = ready;
    let rows = shape.group_size() * tokens.len();
    let merged = attnd_plan::fold(parts, |left, right| left.merge(&right, kernels))
        .unwrap_or_else(|| PartialRows::empty(rows, shape.value_dim()));
    let first_head = group * shape.group_size();
    let sees_nothing = |(m, l): (&f32, &f32)| *m == f32::NEG_INFINITY && *l == 0.0;
    let unseen = merged.m.iter().zip(&merged.l).filter(|row| sees_nothing(*row)).count() as u64;
    let first_unseen = merged.m.iter().zip(&merged.l).position(sees_nothing);
    let first_unseen =
        first_unseen.map(|row| (first_head + row / tokens.len(), tokens.start + row % tokens.len()));
    let merged = operator.join_sinks(merged, group, shape, kernels);
    let sums = keep_sums.then(|| MergedSums {
        group,
        tokens: tokens.clone(),
        m: merged.m.clone(),
        l: merged.l.clone(),
    });
    let rows = operator.divide(merged, mean.as_deref(), kernels);
    if let Some(row) = rows.non_finite_row.filter(|_| !allow_non_finite) {
        let (head, token) = (row / tokens.len(), row % tokens.len());
        return Err(refusal::output_overflow(first_head + head, tokens.start + token));
    }
    Ok(Merged { rows, sums, unseen, first_unseen })
}

/// Cuts rows ordered `[head, token]` by heads, so that a message has at most [`limits::CHUNK_BYTES`] of context where
/// that is possible. One head always fits: cells were made small enough.
fn chunks(
    rows: FinishedRows,
    heads: Range<usize>,
    tokens: Range<usize>,
    value_dim: usize,
) -> Vec<proto::AttendReply> {
    let FinishedRows { mut context, mut lse, .. } = rows;
    let head_bytes = tokens.len() * value_dim * size_of::<f32>();
    let step = (limits::CHUNK_BYTES / head_bytes.max(1)).max(1);
    let mut replies = Vec::with_capacity(heads.len().div_ceil(step));
    for first in heads.clone().step_by(step) {
        let of_chunk = first..heads.end.min(first + step);
        let n_rows = of_chunk.len() * tokens.len();
        let (rest_of_context, rest_of_lse) = if of_chunk.end == heads.end {
            (Vec::new(), Vec::new())
        } else {
            (context.split_off(n_rows * value_dim), lse.split_off(n_rows))
        };
        let chunk = ContextChunk {
            heads: of_chunk,
            tokens: tokens.clone(),
            lse: std::mem::replace(&mut lse, rest_of_lse),
            context: std::mem::replace(&mut context, rest_of_context),
        };
        replies.push(AttendReply::Context(chunk).into());
    }
    replies
}

#[cfg(test)]
mod tests {
    use attnd_kernel::slot::Node;
    use attnd_kernel::{Causal, Dims, Isa};

    use super::*;

    fn shape(heads: u64, queries: u64, value_dim: u64) -> AttnShape {
        AttnShape::new(Dims { batch: 2, heads, kv_heads: 1, queries, keys: 9, head_dim: 4, value_dim })
            .unwrap()
    }

    /// A partial in which every row has seen one key of weight 1 with its row number as value.
    fn numbered(rows: usize, value_dim: usize) -> PartialRows {
        PartialRows {
            value_dim,
            m: vec![0.0; rows],
            l: vec![1.0; rows],
            o: (0..rows).flat_map(|row| vec![row as f32; value_dim]).collect(),
        }
    }

    fn finished(
        shape: &AttnShape,
        tokens: Range<usize>,
        part: PartialRows,
        allow: bool,
    ) -> Result<Finish, Error> {
        let ready = Ready { group: 1, tokens, parts: vec![(Node::ROOT, part)] };
        let operator = Operator::plain(1.0, Causal::None);
        let checks = Checks { mean: None, allow_non_finite: allow, keep_sums: false };
        finish(ready, shape, &operator, checks, Kernels::for_isa(Isa::Portable).unwrap())
    }

    #[test]
    fn large_cells_are_cut_by_heads() {
        // One head of 1000 tokens has 256,000 bytes: four fit into a message.
        let shape = shape(10, 2000, 64);
        let done = finished(&shape, 1000..2000, numbered(10_000, 64), false).unwrap();
        let mut next_head = 10;
        for reply in done.replies {
            let AttendReply::Context(chunk) = AttendReply::decode(reply, &shape, None).unwrap() else {
                panic!("no context")
            };
            assert_eq!((chunk.heads.start, chunk.tokens), (next_head, 1000..2000));
            assert!(chunk.context.len() * 4 <= limits::CHUNK_BYTES);
            let rows = (chunk.heads.start - 10) * 1000..(chunk.heads.end - 10) * 1000;
            let expected: Vec<f32> = rows.flat_map(|row| vec![row as f32; 64]).collect();
            assert_eq!(chunk.context, expected);
            next_head = chunk.heads.end;
        }
        assert_eq!(next_head, 20);
    }

    #[test]
    fn an_overflow_is_named_by_head_and_token_of_the_call() {
        let shape = shape(3, 8, 2);
        let with_overflow = || {
            let mut part = numbered(3 * 4, 2);
            part.o[(2 * 4 + 1) * 2] = f32::INFINITY;
            part
        };
        let error = finished(&shape, 4..8, with_overflow(), false).unwrap_err();
        assert_eq!(error.message(), "OUTPUT_OVERFLOW: head 5 row 5");
        assert!(finished(&shape, 4..8, with_overflow(), true).is_ok());
    }
}

//! From a step to its shards' parts of it: which bytes each gets (`cuts.rs` cuts them), and what that costs. Pure.

use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::Compute;
use attnd_kernel::slot::{self, N_SLOTS};
use attnd_plan::session::{Change, Op, Read, SessionSpec};
use attnd_plan::{CellId, Piece, cells, tokens_per_cell};
use attnd_wire::hold::{ShardAt, ShardQueries, ShardRows, ShardWork};
use attnd_wire::session::{StepQueries, StepRows};
use attnd_wire::{CallShape, Error, limits, proto};

use super::cuts::QueryCut;
use super::session::ShardOf;

/// Queries of a step, and what is the same for all shards.
#[derive(Debug)]
pub(super) struct Queries {
    queries: Arc<StepQueries>,
    generation: u64,
    at_len: usize,
    tokens_per_cell: usize,
    kernel_id: &'static str,
    cut: QueryCut,
}

impl Queries {
    /// Queries of a session with these shards.
    ///
    /// # Errors
    /// [`Reason::Checksum`](attnd_wire::Reason::Checksum) if they aren't any more what the client sent.
    pub(super) fn new(
        queries: Arc<StepQueries>,
        call: &CallShape,
        read: &Read,
        shards: &[ShardOf],
        spec: &SessionSpec,
    ) -> Result<Self, Error> {
        let heads = |shard: &ShardOf| ShardQueries::heads(spec, &shard.pieces).len();
        let is_cut = shards.iter().any(|shard| heads(shard) != spec.heads);
        let cut = if is_cut { QueryCut::new(&queries.q, queries.crc32c, spec)? } else { QueryCut::default() };
        Ok(Self {
            cut,
            queries,
            generation: read.generation,
            at_len: read.at_len,
            tokens_per_cell: tokens_per_cell(&call.shape, None),
            kernel_id: call.operator.kernel_id(Compute::F32),
        })
    }

    /// Names the order of arithmetic.
    pub(super) fn kernel_id(&self) -> &'static str {
        self.kernel_id
    }

    /// The part of a shard: the heads of its kv heads.
    pub(super) fn of_shard(&self, shard: &ShardOf, spec: &SessionSpec) -> ShardQueries {
        let Self { queries, generation, at_len, tokens_per_cell, kernel_id, cut } = self;
        let heads = ShardQueries::heads(spec, &shard.pieces);
        let head_bytes = queries.tokens * spec.head_dim * queries.dtype.size();
        let q = queries.q.slice(heads.start * head_bytes..heads.end * head_bytes);
        let is_whole = heads.len() == spec.heads;
        let crc32c = if is_whole { queries.crc32c } else { cut.sum(&heads, spec, head_bytes) };
        ShardQueries {
            generation: *generation,
            at_len: *at_len,
            tokens: queries.tokens,
            dtype: queries.dtype,
            crc32c,
            q,
            operator: queries.operator.clone(),
            allow_non_finite: queries.allow_non_finite,
            tokens_per_cell: *tokens_per_cell,
            kernel_id: (*kernel_id).to_owned(),
            timeout: None,
        }
    }

    /// What a shard has to do: its keys times the rows that look at them.
    pub(super) fn work(&self, shard: &ShardOf, spec: &SessionSpec) -> u64 {
        let group_size = spec.heads / spec.kv_heads.max(1);
        // Keys are spread evenly over slots.
        let slots: usize = shard.pieces.iter().map(|piece| piece.groups.len() * piece.slots.len()).sum();
        let keys = (slots as u64).saturating_mul(self.at_len as u64) / N_SLOTS as u64;
        keys.saturating_mul((group_size * self.queries.tokens) as u64).max(1)
    }

    /// The cells that a shard owes.
    pub(super) fn cells_of(&self, shard: &ShardOf, call: &CallShape) -> Vec<CellId> {
        cells(&shard.pieces, &call.shape, self.tokens_per_cell)
    }
}

/// Memory that a step takes as long as it runs: what it says, the partials that come of it, and the answer that is made of these.
pub(super) fn step_bytes(
    rows: Option<&StepRows>,
    queries: Option<&StepQueries>,
    spec: &SessionSpec,
    shards: &[Arc<[Piece]>],
) -> u64 {
    let said = rows.map_or(0, |rows| rows.k.len() + rows.v.len());
    let asked = queries.map_or(0, |queries| {
        let row = (spec.value_dim + 2) * size_of::<f32>();
        let group = spec.heads / spec.kv_heads.max(1) * queries.tokens * row;
        let of_piece = |piece: &Piece| piece.groups.len() * slot::cover(piece.slots.clone()).len() * group;
        let partials: usize = shards.iter().flat_map(|pieces| pieces.iter()).map(of_piece).sum();
        queries.q.len() + partials + spec.kv_heads * group
    });
    (said + asked) as u64
}

/// Tokens of the layer that an op appends to, after it; 0 where it appends nothing.
pub(super) fn len_after(op: &Op) -> u64 {
    match op.change {
        Change::Append { base_len, tokens, .. } => base_len.saturating_add(tokens) as u64,
        Change::Truncate { .. } | Change::Fork { .. } | Change::Seal => 0,
    }
}

/// A shard's part of a step, as it goes into a message.
pub(super) fn work(
    at: ShardAt,
    layer: usize,
    rows: Option<ShardRows>,
    queries: Option<ShardQueries>,
) -> proto::ShardWork {
    ShardWork { at, layer, rows, queries }.into()
}

/// Cuts `[heads, tokens]` rows of `dim` elements into blocks for messages: all tokens of as many heads as are small enough, or
/// some tokens of one head.
pub(super) fn blocks(
    heads: usize,
    tokens: usize,
    dim: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let row_bytes = (dim + 1) * size_of::<f32>();
    let of_message = (limits::CHUNK_BYTES / row_bytes).max(1);
    let (step_heads, step_tokens) =
        if tokens <= of_message { (of_message / tokens.max(1), tokens.max(1)) } else { (1, of_message) };
    (0..heads).step_by(step_heads).flat_map(move |head| {
        (0..tokens)
            .step_by(step_tokens)
            .map(move |token| (head..heads.min(head + step_heads), token..tokens.min(token + step_tokens)))
    })
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Dtype, Storage};
    use attnd_wire::session::{Mutation, QueryOperator};

    use super::*;
    use crate::worker::store::tests::{piece, spec};

    #[test]
    fn blocks_tile_the_rows_and_are_small() {
        for (heads, tokens, dim) in
            [(32, 1, 128), (8, 5000, 64), (3, 1 << 16, 512), (1, 1, 1), (1024, 1, 1024)]
        {
            let mut seen = vec![0_u8; heads * tokens];
            for (of_heads, of_tokens) in blocks(heads, tokens, dim) {
                let bytes = of_heads.len() * of_tokens.len() * dim * 4;
                assert!(bytes <= limits::CHUNK_BYTES || of_heads.len() * of_tokens.len() == 1);
                for head in of_heads {
                    for token in of_tokens.clone() {
                        seen[head * tokens + token] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|seen| *seen == 1), "{heads} x {tokens} x {dim}");
        }
        assert_eq!(blocks(32, 1, 128).count(), 1, "a decode step is one message");
    }

    #[test]
    fn a_step_takes_what_it_says_its_partials_and_its_answer() {
        let spec = SessionSpec {
            heads: 8,
            kv_heads: 2,
            head_dim: 4,
            value_dim: 6,
            ..spec(Dtype::F32, Storage::F32)
        };
        let rows = StepRows::new(
            Mutation { writer_epoch: 1, op_seq: 1 },
            3,
            vec![0; 96].into(),
            vec![0; 144].into(),
        );
        let queries = StepQueries::new(5, Dtype::F32, vec![0; 640].into(), QueryOperator::default());
        let whole: [Arc<[Piece]>; 1] = [Arc::from([piece(0..2, 0..64)])];
        let bytes = |rows, queries, shards: &[Arc<[Piece]>]| step_bytes(rows, queries, &spec, shards);
        assert_eq!(bytes(Some(&rows), None, &whole), 240);
        let row_bytes = 8 * 5 * (6 + 2) * 4;
        assert_eq!(bytes(None, Some(&queries), &whole), 640 + 2 * row_bytes);
        assert_eq!(bytes(Some(&rows), Some(&queries), &whole), 240 + 640 + 2 * row_bytes);
        // Two nodes of each head, one in either shard; then three, as no two slots that aren't a pair are one node.
        let halves: [Arc<[Piece]>; 2] = [Arc::from([piece(0..2, 0..32)]), Arc::from([piece(0..2, 32..64)])];
        assert_eq!(bytes(None, Some(&queries), &halves), 640 + 3 * row_bytes);
        let uneven: [Arc<[Piece]>; 2] = [Arc::from([piece(0..2, 0..48)]), Arc::from([piece(0..2, 48..64)])];
        assert_eq!(bytes(None, Some(&queries), &uneven), 640 + 4 * row_bytes);
    }
}

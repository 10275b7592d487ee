//! One shard's part of a step: rows that it appends, queries over what it holds.

use std::ops::Range;
use std::time::Duration;

use attnd_kernel::{Compute, Dtype};
use attnd_plan::session::{Change, Op, SessionSpec};
use attnd_plan::{Piece, Tensor};
use bytes::Bytes;

use crate::checksum::{checksum, has_checksum};
use crate::compute::{CallShape, cell_tokens};
use crate::convert::{self, size, small};
use crate::deadline::MAX_TIMEOUT;
use crate::error::{Error, Reason};
use crate::hold::request::{ShardAt, ShardOp, rows_of, tokens};
use crate::session::{QueryOperator, check_layer, payload};
use crate::{proto, refusal};

/// What one shard does of a step: at least one of the two.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardWork {
    /// Which shard.
    pub at: ShardAt,
    /// Of which layer.
    pub layer: usize,
    /// What is appended first.
    pub rows: Option<ShardRows>,
    /// What then attends.
    pub queries: Option<ShardQueries>,
}

/// A shard's part of the rows of an append, which may be none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRows {
    /// Which op.
    pub op: ShardOp,
    /// Tokens that the layer has before, over all of the session.
    pub base_len: usize,
    /// Tokens of the append, over all of the session; at least one.
    pub tokens: usize,
    /// Of k, continued over v, which have it.
    pub crc32c: u32,
    /// Of each piece, of each of its kv heads, the keys of those tokens that are in its slots, ascending.
    pub k: Bytes,
    /// The values, likewise.
    pub v: Bytes,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
}

/// Queries of a step, of the heads of a shard.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardQueries {
    /// Which generation of the session.
    pub generation: u64,
    /// How many tokens of the layer are looked at, over all of the session.
    pub at_len: usize,
    /// Query tokens, at least one.
    pub tokens: usize,
    /// Element type of q.
    pub dtype: Dtype,
    /// Of q, which has it.
    pub crc32c: u32,
    /// `[heads, tokens, head_dim]`, of the heads of the shard's kv heads.
    pub q: Bytes,
    /// What is computed.
    pub operator: QueryOperator,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// Query tokens in one partial.
    pub tokens_per_cell: usize,
    /// That of the operator.
    pub kernel_id: String,
    /// From their arrival; after that nobody waits for the partials.
    pub timeout: Option<Duration>,
}

impl ShardRows {
    /// A shard's rows as they are sent, which get their checksum.
    pub fn new(op: ShardOp, base_len: usize, tokens: usize, k: Bytes, v: Bytes) -> Self {
        let crc32c = checksum(&[&k, &v]);
        Self { op, base_len, tokens, crc32c, k, v, allow_non_finite: false }
    }

    /// The op that they are.
    pub fn op(&self, layer: usize) -> Op {
        let (base_len, tokens) = (self.base_len, self.tokens);
        self.op.op(Change::Append { layer, base_len, tokens })
    }

    /// Checks the rows against the shard that they go to.
    ///
    /// # Errors
    /// [`Reason::ShapeLimit`] for a layer that the session doesn't have, [`Reason::SessionFull`], [`Reason::PayloadLength`].
    pub fn check(&self, layer: usize, spec: &SessionSpec, pieces: &[Piece]) -> Result<(), Error> {
        let rows = rows_of(layer, self.base_len, self.tokens, spec, pieces)?;
        let (key, value) = spec.row_bytes();
        payload(Tensor::K, [rows, 1, key], &self.k)?;
        payload(Tensor::V, [rows, 1, value], &self.v)
    }
}

impl ShardQueries {
    /// The heads that queries of a shard of these pieces have: all of its kv heads, which are neighbours.
    pub fn heads(spec: &SessionSpec, pieces: &[Piece]) -> Range<usize> {
        let groups = pieces.iter().map(|piece| &piece.groups);
        let first = groups.clone().map(|groups| groups.start).min().unwrap_or(0);
        let end = groups.map(|groups| groups.end).max().unwrap_or(0);
        first * spec.group_size()..end * spec.group_size()
    }

    /// Checks the queries against the shard, and gives the call that they are of: that of the whole session.
    ///
    /// # Errors
    /// [`Reason::ShapeLimit`] for a layer that the session doesn't have, [`Reason::PayloadLength`], [`Reason::Pieces`] for a cell of no
    /// tokens or too many for a message, [`Reason::KernelMix`], and whatever is wrong with the operator.
    pub fn call(&self, layer: usize, spec: &SessionSpec, pieces: &[Piece]) -> Result<CallShape, Error> {
        check_layer(layer, spec)?;
        let shape = spec.shape(self.tokens, self.at_len)?;
        let heads = Self::heads(spec, pieces).len();
        payload(Tensor::Q, [heads, self.tokens, spec.head_dim * self.dtype.size()], &self.q)?;
        let operator = self.operator.decode(&shape)?;
        // What a newer coordinator says beyond that is lost here, but not in the name.
        let kernel_id = operator.kernel_id(Compute::F32);
        if self.kernel_id != kernel_id {
            return Err(refusal::kernel_mix(&self.kernel_id, kernel_id));
        }
        cell_tokens(self.tokens_per_cell, &shape, None)?;
        Ok(CallShape { shape, operator, outputs: None, allow_non_finite: self.allow_non_finite })
    }
}

impl TryFrom<proto::ShardWork> for ShardWork {
    type Error = Error;

    fn try_from(message: proto::ShardWork) -> Result<Self, Error> {
        let proto::ShardWork { at, layer, rows, queries } = message;
        if rows.is_none() && queries.is_none() {
            return Err(Error::new(Reason::Combination, "work without rows and queries"));
        }
        Ok(Self {
            at: at.try_into()?,
            layer: size(layer),
            rows: rows.map(|rows| (*rows).try_into()).transpose()?,
            queries: queries.map(|queries| (*queries).try_into()).transpose()?,
        })
    }
}

impl From<ShardWork> for proto::ShardWork {
    fn from(work: ShardWork) -> Self {
        Self {
            at: Some(work.at.into()),
            layer: small(work.layer),
            rows: work.rows.map(|rows| Box::new(rows.into())),
            queries: work.queries.map(|queries| Box::new(queries.into())),
        }
    }
}

impl TryFrom<proto::ShardRows> for ShardRows {
    type Error = Error;

    fn try_from(message: proto::ShardRows) -> Result<Self, Error> {
        let proto::ShardRows { op, base_len, tokens: n, crc32c, k, v, allow_non_finite } = message;
        let op = ShardOp::decode(op)?;
        if n == 0 {
            return Err(refusal::no_tokens());
        }
        if !has_checksum(&[&k, &v], crc32c) {
            return Err(refusal::rows_checksum("k and v"));
        }
        Ok(Self { op, base_len: tokens(base_len), tokens: size(n), crc32c, k, v, allow_non_finite })
    }
}

impl From<ShardRows> for proto::ShardRows {
    fn from(rows: ShardRows) -> Self {
        Self {
            op: Some(rows.op.into()),
            base_len: rows.base_len as u64,
            tokens: small(rows.tokens),
            crc32c: rows.crc32c,
            k: rows.k,
            v: rows.v,
            allow_non_finite: rows.allow_non_finite,
        }
    }
}

/// Time as queries say it: whole milliseconds, at least one, as none would mean as long as it takes.
pub fn timeout_ms(timeout: Duration) -> u32 {
    u32::try_from(timeout.min(MAX_TIMEOUT).as_millis()).unwrap_or(u32::MAX).max(1)
}

impl TryFrom<proto::ShardQueries> for ShardQueries {
    type Error = Error;

    fn try_from(message: proto::ShardQueries) -> Result<Self, Error> {
        let proto::ShardQueries {
            generation,
            at_len,
            tokens: n,
            dtype,
            crc32c,
            q,
            scale,
            causal,
            operator,
            allow_non_finite,
            tokens_per_cell,
            kernel_id,
            timeout_ms,
        } = message;
        let dtype = convert::dtype(dtype)?;
        let timeout = (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms.into()));
        if timeout.is_some_and(|timeout| timeout > MAX_TIMEOUT) {
            let text = format!("queries with {timeout_ms} ms, at most {}", MAX_TIMEOUT.as_millis());
            return Err(Error::new(Reason::DeadlineFormat, text));
        }
        if !has_checksum(&[&q], crc32c) {
            return Err(refusal::rows_checksum("q"));
        }
        Ok(Self {
            generation,
            at_len: tokens(at_len),
            tokens: size(n),
            dtype,
            crc32c,
            q,
            operator: QueryOperator { scale, causal, operator },
            allow_non_finite,
            tokens_per_cell: size(tokens_per_cell),
            kernel_id,
            timeout,
        })
    }
}

impl From<ShardQueries> for proto::ShardQueries {
    fn from(queries: ShardQueries) -> Self {
        let QueryOperator { scale, causal, operator } = queries.operator;
        Self {
            generation: queries.generation,
            at_len: queries.at_len as u64,
            tokens: small(queries.tokens),
            dtype: proto::Dtype::from(queries.dtype).into(),
            crc32c: queries.crc32c,
            q: queries.q,
            scale,
            causal,
            operator,
            allow_non_finite: queries.allow_non_finite,
            tokens_per_cell: small(queries.tokens_per_cell),
            kernel_id: queries.kernel_id,
            timeout_ms: queries.timeout.map_or(0, timeout_ms),
        }
    }
}

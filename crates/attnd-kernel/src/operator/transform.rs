//! What the operator's score function makes of the rows of a call.

use std::borrow::Cow;
use std::ops::Range;

use super::Operator;
use crate::dispatch::Kernels;
use crate::general::reduce::{Filters, Reducer};
use crate::score::{KeyRows, QueryRows};
use crate::shape::AttnShape;
use crate::storage::Storage;

/// The transformed rows of some query tokens of a kv group.
#[derive(Debug)]
pub(crate) struct Queries<'a> {
    /// `[head in group, token, dim]`.
    rows: Cow<'a, [f32]>,
    dim: usize,
    tokens: Range<usize>,
}

impl Queries<'_> {
    /// The row of a token that is one of them.
    pub(crate) fn row(&self, head_in_group: usize, token: usize) -> &[f32] {
        let row = head_in_group * self.tokens.len() + token - self.tokens.start;
        &self.rows[row * self.dim..][..self.dim]
    }
}

impl Operator {
    /// Elements of a key as it is resident: what a [`crate::KvHead`] for these calls is made with for its `head_dim`.
    pub fn key_dim(&self, shape: &AttnShape) -> usize {
        self.score.as_ref().map_or(shape.head_dim(), |score| score.key_dim())
    }

    /// Elements of a query as the kernels take it.
    pub fn packed_dim(&self, shape: &AttnShape) -> usize {
        self.score.as_ref().map_or(shape.query_dim(), |score| score.dim())
    }

    /// What a score costs, in multiply-adds of a dot product.
    pub fn score_cost(&self, shape: &AttnShape) -> usize {
        let filters = self.score.as_ref().and_then(|score| score.filters(0));
        let of_filters = filters.map_or(0, |filters| filters.taps.len() + filters.units.len());
        self.packed_dim(shape) * self.reducer().cost() + of_filters
    }

    /// What it costs to make a resident key of one that was sent, in multiply-adds; nothing where it is the same.
    pub fn key_cost(&self) -> usize {
        self.score.as_ref().map_or(0, |score| score.key_cost())
    }

    /// Bytes that parameters and projections of the score function take, however many calls there are.
    pub fn score_bytes(&self) -> u64 {
        self.score.as_ref().map_or(0, |score| score.bytes())
    }

    /// Whether kernels take queries as they are sent, so that nothing is made of them.
    pub fn keeps_queries(&self) -> bool {
        self.score.as_ref().is_none_or(|score| score.keeps_queries())
    }

    /// How keys and values may be resident that are sent as elements of `sent`: as these, unless the score function makes something
    /// of keys that these can't hold.
    pub fn storage(&self, sent: Storage) -> Storage {
        self.score.as_ref().map_or(sent, |score| score.storage(sent))
    }

    /// Whether resident keys are keys as they are sent, so that there is nothing to transform.
    pub fn keeps_keys(&self) -> bool {
        self.score.as_ref().is_none_or(|score| score.keeps_keys())
    }

    /// Makes rows of keys as they are resident: rows `k`, `[keys, head_dim]`, of keys `keys` of kv group `group` become `out`,
    /// `[keys, key_dim]`, on the current rayon pool. They are to be stored once, before any call, by `KvHead::write_k` as f32;
    /// whether what was sent is finite is to be seen before, as what is made of it may be all the same or not.
    ///
    /// # Panics
    /// If a slice has another length, or keys or the group are beyond the shape.
    pub fn key_rows(
        &self,
        kernels: &Kernels,
        shape: &AttnShape,
        group: usize,
        keys: Range<usize>,
        k: &[f32],
        out: &mut [f32],
    ) {
        assert!(group < shape.n_groups() && keys.end <= shape.n_keys(), "group {group}, keys {keys:?}");
        assert_eq!(k.len(), keys.len() * shape.head_dim(), "length of k");
        assert_eq!(out.len(), keys.len() * self.key_dim(shape), "length of what becomes of k");
        match &self.score {
            None => out.copy_from_slice(k),
            Some(score) => {
                let rows = KeyRows { kv_head: group % shape.n_kv_heads(), keys };
                score.key_rows(kernels, rows, k, out);
            }
        }
    }

    /// Transforms the queries of some tokens of a group, `q` of `[head in group, token, query_dim]`.
    pub(crate) fn queries<'a>(
        &self,
        kernels: &Kernels,
        shape: &AttnShape,
        group: usize,
        tokens: Range<usize>,
        q: &'a [f32],
    ) -> Queries<'a> {
        let (dim, n_queries) = (self.packed_dim(shape), shape.n_queries());
        let score = match &self.score {
            Some(score) if !score.keeps_queries() => score,
            _ => return Queries { rows: q.into(), dim, tokens: 0..n_queries },
        };
        let (batch, kv_head) = (group / shape.n_kv_heads(), group % shape.n_kv_heads());
        let mut rows = vec![0.0; shape.group_size() * tokens.len() * dim];
        for (i, out) in rows.chunks_exact_mut((tokens.len() * dim).max(1)).enumerate() {
            let first = (i * n_queries + tokens.start) * shape.query_dim();
            let q = &q[first..][..tokens.len() * shape.query_dim()];
            let head = kv_head * shape.group_size() + i;
            score.query_rows(kernels, QueryRows { batch, head, tokens: tokens.clone() }, q, out);
        }
        Queries { rows: rows.into(), dim, tokens }
    }

    /// What makes a score of two transformed rows.
    pub(crate) fn reducer(&self) -> Reducer {
        self.score.as_ref().map_or(Reducer::Dot, |score| score.reducer())
    }

    /// Whether scores ask for the weights that rows had before, `Side::previous`.
    pub fn reads_previous(&self) -> bool {
        self.reducer() == Reducer::Located
    }

    /// What becomes of these for a head of a group.
    pub(crate) fn filters(
        &self,
        shape: &AttnShape,
        group: usize,
        head_in_group: usize,
    ) -> Option<Filters<'_>> {
        let head = group % shape.n_kv_heads() * shape.group_size() + head_in_group;
        self.score.as_ref().and_then(|score| score.filters(head))
    }

    /// The weights of that sum for a head of a group.
    pub(crate) fn weights(&self, shape: &AttnShape, group: usize, head_in_group: usize) -> &[f32] {
        let head = group % shape.n_kv_heads() * shape.group_size() + head_in_group;
        self.score.as_ref().map_or(&[], |score| score.weights(head))
    }
}

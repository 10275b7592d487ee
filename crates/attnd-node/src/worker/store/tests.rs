//! Shards in a store, against the same rows written at once.

use std::collections::BTreeSet;

use attnd_kernel::slot::{PAGE_KEYS, keys_in_page, n_pages, slot_of_page};
use attnd_kernel::{
    AttnShape, Causal, Compute, Dtype, Effective, GroupCall, KvHead, Operator, Side, Storage, attend_node,
};
use attnd_plan::session::spec::DEFAULT_TTL;
use attnd_plan::{AnyTensor, Tensor, cells};
use attnd_wire::hold::{
    ShardAppend, ShardChange, ShardChangeKind, ShardOp, ShardQueries, ShardRows, ShardWork,
};
use attnd_wire::session::QueryOperator;
use attnd_wire::{Commit, SliceChunk};
use bytes::Bytes;
use half::{bf16, f16};

use super::attention::Run;
use super::works::{Work, WorkDone};
use super::*;

mod bits;
mod bulk;
mod copies;
mod memory;
mod ops;
mod scrub;

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn store(session_memory: u64) -> Store {
    let pool = ComputePool::new(2, 2).unwrap();
    Store::new(Kernels::from_env().unwrap(), pool, Budget::new(64 * MIB), session_memory)
}

pub(crate) fn piece(groups: std::ops::Range<usize>, slots: std::ops::Range<usize>) -> Piece {
    Piece { groups, slots }
}

/// Two layers of two kv heads with two query heads each.
pub(crate) fn spec(dtype: Dtype, storage: Storage) -> SessionSpec {
    SessionSpec {
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        value_dim: 5,
        dtype,
        storage,
        value_is_key_prefix: false,
        replicas: 1,
        acks: 1,
        ttl: DEFAULT_TTL,
        max_tokens: 1 << 20,
        allow_same_host: false,
    }
}

/// A number in -2 to 2 that depends on all of these.
pub(crate) fn number(of: [u64; 4]) -> f32 {
    let mixed = of.iter().fold(0x9e37_79b9_7f4a_7c15_u64, |hash, part| {
        (hash ^ part).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29)
    });
    (mixed >> 40) as f32 / (1 << 22) as f32 - 2.0
}

pub(crate) fn encode(values: impl Iterator<Item = f32>, dtype: Dtype) -> Vec<u8> {
    let element = |value: f32| match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
    };
    values.flat_map(element).collect()
}

/// A shard, and what must be in it: of each layer the names of its tokens, by which their rows are known.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) at: ShardAt,
    pub(crate) spec: SessionSpec,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) layers: Vec<Vec<u64>>,
    pub(crate) seq: u64,
    pub(crate) generation: u64,
}

impl Session {
    /// Opens one in a store.
    pub(crate) fn open(store: &Store, number: u64, spec: SessionSpec, pieces: Vec<Piece>) -> Self {
        let at = ShardAt { session: number, shard: 0, epoch: 1 };
        let resident = Resident::new(store, &at, spec.clone(), pieces.clone()).unwrap();
        assert!(store.insert(resident).unwrap().1);
        let layers = vec![Vec::new(); spec.layers];
        Self { at, spec, pieces, layers, seq: 0, generation: 0 }
    }

    pub(crate) fn next_op(&mut self) -> ShardOp {
        self.seq += 1;
        ShardOp { op_seq: self.seq, digest: self.seq as u32 * 77, generation: self.generation }
    }

    /// The bytes of the row of a token that has this name.
    pub(crate) fn row(&self, tensor: Tensor, layer: usize, head: usize, name: u64) -> Vec<u8> {
        let is_value = u64::from(tensor == Tensor::V);
        let dim = match tensor {
            Tensor::V if self.spec.value_is_key_prefix => 0,
            Tensor::V => self.spec.value_dim,
            _ => self.spec.head_dim,
        };
        let of = |x: usize| number([name, (layer * 100 + head) as u64, is_value, x as u64]);
        encode((0..dim).map(of), self.spec.dtype)
    }

    /// Rows of a step.
    pub(crate) fn rows(&mut self, layer: usize, names: &[u64]) -> ShardRows {
        let base_len = self.layers[layer].len();
        let of = |tensor: Tensor| {
            let mut bytes = Vec::new();
            for piece in &self.pieces {
                for head in piece.groups.clone() {
                    for (i, name) in names.iter().enumerate() {
                        if piece.slots.contains(&slot_of_page((base_len + i) / PAGE_KEYS)) {
                            bytes.extend(self.row(tensor, layer, head, *name));
                        }
                    }
                }
            }
            Bytes::from(bytes)
        };
        let (k, v) = (of(Tensor::K), of(Tensor::V));
        ShardRows::new(self.next_op(), base_len, names.len(), k, v)
    }

    /// Appends tokens of these names; what it answers must be a success.
    pub(crate) fn append(&mut self, store: &Store, layer: usize, names: &[u64]) -> ShardState {
        let rows = self.rows(layer, names);
        let applied = self.work(store, layer, Some(rows), None).applied.unwrap();
        self.layers[layer].extend(names);
        assert_eq!(applied.tokens[layer], self.layers[layer].len() as u64);
        applied
    }

    pub(crate) fn shard_work(
        &self,
        layer: usize,
        rows: Option<ShardRows>,
        queries: Option<ShardQueries>,
    ) -> ShardWork {
        ShardWork { at: self.at, layer, rows, queries }
    }

    pub(crate) fn work(
        &self,
        store: &Store,
        layer: usize,
        rows: Option<ShardRows>,
        queries: Option<ShardQueries>,
    ) -> WorkDone {
        let work = Work::new(store, self.shard_work(layer, rows, queries));
        works::run_all(store, vec![work], || true).remove(0).unwrap()
    }

    /// The message of the refusal of a work.
    pub(crate) fn refused(&self, store: &Store, layer: usize, rows: ShardRows) -> String {
        let work = Work::new(store, self.shard_work(layer, Some(rows), None));
        let done = works::run_all(store, vec![work], || true).remove(0);
        match done {
            Ok(WorkDone { applied: None, partials }) => partials.unwrap_err().message(),
            Ok(done) => panic!("{done:?}"),
            Err(error) => error.message(),
        }
    }

    /// Queries over the first tokens of a layer.
    pub(crate) fn queries(&self, tokens: usize, at_len: usize, causal: Causal) -> ShardQueries {
        let operator = Operator::plain(0.25, causal);
        let heads = ShardQueries::heads(&self.spec, &self.pieces);
        let of = |at: usize| number([at as u64, tokens as u64, 3, 4]);
        let q = encode((0..heads.len() * tokens * self.spec.head_dim).map(of), Dtype::F32);
        let crc32c = crc32c::crc32c(&q);
        ShardQueries {
            generation: self.generation,
            at_len,
            tokens,
            dtype: Dtype::F32,
            crc32c,
            q: q.into(),
            operator: QueryOperator::from(&operator),
            allow_non_finite: false,
            tokens_per_cell: 2.min(tokens),
            kernel_id: operator.kernel_id(Compute::F32).to_owned(),
            timeout: None,
        }
    }

    /// What a call computes whose keys and values are those of the layer.
    pub(crate) fn expected(&self, layer: usize, queries: &ShardQueries) -> Vec<f32> {
        let (shape, operator) = {
            let call = queries.call(layer, &self.spec, &self.pieces).unwrap();
            (call.shape, call.operator)
        };
        let mut q = vec![0.0; queries.q.len() / queries.dtype.size()];
        attnd_kernel::widen(&queries.q, queries.dtype, &mut q);
        let first = self.pieces.iter().map(|piece| piece.groups.start).min().unwrap();
        let mut expected = Vec::new();
        for piece in &self.pieces {
            let heads: Vec<KvHead> =
                piece.groups.clone().map(|head| self.written_at_once(layer, head, piece, &shape)).collect();
            for cell in cells(std::slice::from_ref(piece), &shape, queries.tokens_per_cell) {
                let per_group = shape.group_size() * shape.n_queries() * shape.head_dim();
                let call = GroupCall {
                    shape,
                    operator: &operator,
                    group: cell.group,
                    q: &q[(cell.group - first) * per_group..][..per_group],
                    kv: &heads[cell.group - piece.groups.start],
                    side: Side::default(),
                    compute: Effective::F32,
                };
                let tokens = cell.first_token..cell.first_token + cell.tokens;
                let (rows, finite) = attend_node(Kernels::from_env().unwrap(), &call, cell.node, tokens);
                finite.unwrap();
                expected.extend([rows.m, rows.l, rows.o].concat());
            }
        }
        expected
    }

    fn written_at_once(&self, layer: usize, head: usize, piece: &Piece, shape: &AttnShape) -> KvHead {
        let SessionSpec { head_dim, value_dim, storage, dtype, .. } = self.spec;
        let n_keys = shape.n_keys();
        let mut kv = KvHead::with_storage(n_keys, head_dim, value_dim, piece.slots.clone(), storage).unwrap();
        for page in (0..n_pages(n_keys)).filter(|page| piece.slots.contains(&slot_of_page(*page))) {
            let names = &self.layers[layer][page * PAGE_KEYS..][..keys_in_page(page, n_keys)];
            let k: Vec<Vec<u8>> = names.iter().map(|name| self.row(Tensor::K, layer, head, *name)).collect();
            let v = names.iter().zip(&k).map(|(name, key)| match self.spec.value_is_key_prefix {
                true => key[..value_dim * dtype.size()].to_vec(),
                false => self.row(Tensor::V, layer, head, *name),
            });
            let v: Vec<Vec<u8>> = v.collect();
            kv.write_k(page, &k.concat(), dtype, true).unwrap();
            kv.write_v(page, &v.concat(), dtype, true).unwrap();
        }
        kv
    }

    /// Asks over the first tokens of a layer, and compares with what a call computes, bit for bit.
    pub(crate) fn check(&self, store: &Store, layer: usize, at_len: usize) {
        for (tokens, causal) in [(1, Causal::None), (5, Causal::BottomRight)] {
            let queries = self.queries(tokens, at_len, causal);
            let expected = self.expected(layer, &queries);
            let runs = self.work(store, layer, None, Some(queries)).partials.unwrap();
            same_bits(&runs, &expected);
        }
    }

    pub(crate) fn change(&mut self, store: &Store, kind: ShardChangeKind) -> Result<ShardState, Error> {
        let change = ShardChange { at: self.at, op: self.next_op(), kind };
        let resident = store.resident(key_of(&self.at))?;
        match kind {
            ShardChangeKind::Fork { child } => shard::fork(store, &resident, &change, child),
            _ => resident.change().apply(store, &change),
        }
    }
}

pub(crate) fn same_bits(runs: &[Run], expected: &[f32]) {
    let got: Vec<u32> = runs.iter().flat_map(|run| run.data.iter().map(|x| x.to_bits())).collect();
    assert!(got == expected.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), "{} elements", got.len());
    let mut next = 0;
    for run in runs {
        assert_eq!(run.first_cell, next);
        next += run.cells;
    }
}

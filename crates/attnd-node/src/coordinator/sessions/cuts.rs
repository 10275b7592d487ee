//! Rows and queries of a step, cut for its shards. Pure.
//!
//! A shard's part has a checksum of its own, which its worker compares. It is no better than the bytes that it is made of here, so those of
//! all parts together have to be the client's: what has changed in this process's memory since it came is refused, and not sent on with
//! a checksum that fits.

use std::ops::Range;
use std::sync::Arc;

use attnd_plan::session::rows::bytes_for;
use attnd_plan::session::{Op, SessionSpec};
use attnd_plan::{Piece, Tensor};
use attnd_wire::checksum::{agrees, joined};
use attnd_wire::hold::{ShardOp, ShardRows};
use attnd_wire::session::StepRows;
use attnd_wire::session::digest::RowsChecksum;
use attnd_wire::{Error, refusal};
use bytes::{Bytes, BytesMut};

use super::works::len_after;

/// The rows of an append, of each shard those that go there.
///
/// # Errors
/// [`Reason::Checksum`](attnd_wire::Reason::Checksum) if they aren't any more what the client sent.
pub(super) fn rows_of_shards<'a>(
    shards: impl Iterator<Item = &'a Arc<[Piece]>>,
    op: &Op,
    generation: u64,
    rows: &StepRows,
    spec: &SessionSpec,
) -> Result<Vec<ShardRows>, Error> {
    let base_len = usize::try_from(len_after(op)).unwrap_or(usize::MAX).saturating_sub(rows.tokens);
    let new = base_len..base_len + rows.tokens;
    let (key, value) = spec.row_bytes();
    let op = ShardOp { op_seq: op.seq, digest: op.digest, generation };
    let (tokens, allow_non_finite) = (rows.tokens, rows.allow_non_finite);
    let (mut cut, mut sum, mut is_cut) = (Vec::new(), RowsChecksum::default(), false);
    for pieces in shards {
        let [of_k, of_v] = [key, value].map(|row| bytes_for(pieces, &new, row));
        let (k, v) = (gathered(&rows.k, &of_k), gathered(&rows.v, &of_v));
        // All of them have the client's checksum, which the worker compares.
        let crc32c = if k.len() == rows.k.len() && v.len() == rows.v.len() {
            rows.crc32c
        } else {
            is_cut = true;
            let keys = sum_of(&mut sum, Tensor::K, &k, &of_k);
            joined(keys, sum_of(&mut sum, Tensor::V, &v, &of_v), v.len() as u64)
        };
        cut.push(ShardRows { op, base_len, tokens, crc32c, k, v, allow_non_finite });
    }
    // Where one shard has all rows, the others have none.
    let is_whole = cut.iter().any(|of_shard| of_shard.k.len() == rows.k.len());
    if is_cut && !is_whole && !agrees(sum.finish(), rows.crc32c) {
        return Err(refusal::rows_checksum("k and v"));
    }
    Ok(cut)
}

/// Takes the sums of runs of a tensor, which are one behind the other in `bytes`; returns that of all of these.
fn sum_of(sum: &mut RowsChecksum, tensor: Tensor, bytes: &[u8], runs: &[Range<usize>]) -> u32 {
    let (mut all, mut at) = (0, 0);
    for run in runs {
        let len = run.len() as u64;
        let crc32c = crc32c::crc32c(bytes.get(at..at + run.len()).unwrap_or_default());
        sum.add(tensor, run.start as u64, len, crc32c);
        (all, at) = (joined(all, crc32c, len), at + run.len());
    }
    all
}

/// The checksums of queries by kv head; none where every shard gets all of them.
#[derive(Debug, Default)]
pub(super) struct QueryCut(Vec<u32>);

impl QueryCut {
    /// Of `q`, which the client says has this checksum.
    ///
    /// # Errors
    /// [`Reason::Checksum`](attnd_wire::Reason::Checksum) if it hasn't any more.
    pub(super) fn new(q: &[u8], crc32c: u32, spec: &SessionSpec) -> Result<Self, Error> {
        let bytes = q.len() / spec.kv_heads.max(1);
        let sums: Vec<u32> = q.chunks(bytes.max(1)).map(crc32c::crc32c).collect();
        let sum = sums.iter().fold(0, |sum, group| joined(sum, *group, bytes as u64));
        if !agrees(sum, crc32c) {
            return Err(refusal::rows_checksum("q"));
        }
        Ok(Self(sums))
    }

    /// That of some heads, all those of some kv heads.
    pub(super) fn sum(&self, heads: &Range<usize>, spec: &SessionSpec, head_bytes: usize) -> u32 {
        let group = spec.group_size();
        let sums = self.0.get(heads.start / group..heads.end / group).unwrap_or_default();
        sums.iter().fold(0, |sum, of_group| joined(sum, *of_group, (group * head_bytes) as u64))
    }
}

/// Runs of bytes one behind the other: a slice where there is one, a copy where there are more.
fn gathered(bytes: &Bytes, runs: &[Range<usize>]) -> Bytes {
    match runs {
        [] => Bytes::new(),
        [run] => bytes.slice(run.clone()),
        runs => {
            let mut gathered = BytesMut::with_capacity(runs.iter().map(Range::len).sum());
            for run in runs {
                gathered.extend_from_slice(bytes.get(run.clone()).unwrap_or_default());
            }
            gathered.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Dtype, Storage};
    use attnd_plan::session::Change;
    use attnd_wire::session::Mutation;

    use super::*;
    use crate::worker::store::tests::{piece, spec};

    #[test]
    fn runs_are_put_one_behind_the_other() {
        let bytes = Bytes::from_static(b"0123456789");
        assert_eq!(gathered(&bytes, &[]), "");
        assert_eq!(gathered(&bytes, std::slice::from_ref(&(2..4))), "23");
        assert_eq!(gathered(&bytes, &[2..4, 7..8]), "237");
    }

    #[test]
    fn rows_are_cut_with_the_checksums_that_they_have_and_only_as_the_client_sent_them() {
        let spec = SessionSpec { kv_heads: 2, ..spec(Dtype::F32, Storage::F32) };
        let (key, value) = spec.row_bytes();
        let tokens = 300;
        let of = |row: usize| Bytes::from((0..2 * tokens * row).map(|at| (at * 7) as u8).collect::<Vec<_>>());
        let rows = StepRows::new(Mutation { writer_epoch: 1, op_seq: 1 }, tokens, of(key), of(value));
        let op = Op { seq: 1, digest: 2, change: Change::Append { layer: 0, base_len: 100, tokens } };
        let cut =
            |rows: &StepRows, shards: &[Arc<[Piece]>]| rows_of_shards(shards.iter(), &op, 3, rows, &spec);
        let changed = StepRows { crc32c: rows.crc32c ^ 1, ..rows.clone() };
        for pieces in [
            vec![vec![piece(0..1, 0..64)], vec![piece(1..2, 0..64)]],
            vec![vec![piece(0..2, 0..20)], vec![piece(0..2, 20..64)]],
            vec![vec![piece(0..1, 0..64), piece(1..2, 0..3)], vec![piece(1..2, 3..64)]],
        ] {
            let shards: Vec<Arc<[Piece]>> = pieces.into_iter().map(Arc::from).collect();
            let of_shards = cut(&rows, &shards).unwrap();
            let bytes: usize = of_shards.iter().map(|of_shard| of_shard.k.len() + of_shard.v.len()).sum();
            assert_eq!(bytes, rows.k.len() + rows.v.len());
            for of_shard in of_shards {
                let (op, k, v) = (of_shard.op, of_shard.k.clone(), of_shard.v.clone());
                assert_eq!(of_shard, ShardRows::new(op, 100, tokens, k, v));
            }
            let refused = cut(&changed, &shards).unwrap_err();
            assert_eq!(refused.message(), "CHECKSUM: k and v, nothing applied");
        }
        // Passed on as they are, for the worker to see.
        let whole: [Arc<[Piece]>; 1] = [Arc::from([piece(0..2, 0..64)])];
        assert_eq!(cut(&changed, &whole).unwrap()[0].crc32c, changed.crc32c);
    }

    #[test]
    fn queries_are_cut_by_kv_heads() {
        let spec = SessionSpec { heads: 6, kv_heads: 3, ..spec(Dtype::F32, Storage::F32) };
        let (q, head_bytes) = ((0..240).map(|at| (at * 7) as u8).collect::<Vec<_>>(), 40);
        let cut = QueryCut::new(&q, crc32c::crc32c(&q), &spec).unwrap();
        for heads in [0..2, 2..6, 0..6, 4..6] {
            let bytes = &q[heads.start * head_bytes..heads.end * head_bytes];
            assert_eq!(cut.sum(&heads, &spec, head_bytes), crc32c::crc32c(bytes), "{heads:?}");
        }
        let refused = QueryCut::new(&q, 1, &spec).unwrap_err();
        assert_eq!(refused.message(), "CHECKSUM: q, nothing applied");
    }
}

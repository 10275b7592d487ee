//! Rows that are appended: K and V of some tokens, checked before they are sent, and cut into chunks where they are many.

use std::ops::Range;
use std::sync::Arc;

use attnd_plan::Tensor;
use attnd_plan::session::SessionSpec;
use attnd_wire::session::AppendChunk;
use attnd_wire::session::digest::RowsChecksum;
use attnd_wire::{Error, Reason, refusal};
use bytes::Bytes;

/// Tensor bytes in one chunk; a multiple of every element size.
const CHUNK_BYTES: usize = 512 << 10;

/// K and V of some tokens of one layer. Cloning copies no tensor.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    /// `[kv_heads, tokens, head_dim]`.
    pub(crate) k: Bytes,
    /// `[kv_heads, tokens, value_dim]`.
    pub(crate) v: Bytes,
    /// How many, at least one.
    pub(crate) tokens: usize,
    kv_heads: usize,
}

impl Rows {
    /// Rows of a session, as many tokens as K has bytes for.
    ///
    /// # Errors
    /// [`Reason::PayloadLength`] where the bytes are no whole tokens, or K and V have different ones; [`Reason::ShapeZero`] for none.
    pub(crate) fn new(k: Bytes, v: Bytes, spec: &SessionSpec) -> Result<Self, Error> {
        let (key, value) = spec.row_bytes();
        let (of_key, of_value) = (key * spec.kv_heads, value * spec.kv_heads);
        if k.is_empty() {
            return Err(refusal::no_tokens());
        }
        if !k.len().is_multiple_of(of_key) {
            let detail = format!("k: {} bytes, a token has {of_key}", k.len());
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        let tokens = k.len() / of_key;
        if v.len() != tokens * of_value {
            let need = tokens as u128 * of_value as u128;
            return Err(refusal::payload_length(Tensor::V, need, v.len()));
        }
        Ok(Self { k, v, tokens, kv_heads: spec.kv_heads })
    }

    /// Bytes of both.
    pub(crate) fn bytes(&self) -> usize {
        self.k.len() + self.v.len()
    }

    /// The chunks, K and V of a head, front to back, and then the next one, and the checksum of all of K, continued over all of V. Small
    /// heads share a chunk.
    pub(crate) fn chunks(&self) -> (Arc<[AppendChunk]>, u32) {
        let mut sum = RowsChecksum::default();
        let chunks = (0..).zip(self.cuts()).map(|(index, (tensor, offset, data))| {
            let chunk = AppendChunk::new(index, tensor, offset, data);
            sum.add(tensor, offset, chunk.data.len() as u64, chunk.data.crc32c());
            chunk
        });
        (chunks.collect(), sum.finish())
    }

    /// Tensor, place and bytes of each chunk.
    fn cuts(&self) -> impl Iterator<Item = (Tensor, u64, Bytes)> {
        let [of_k, of_v] = [&self.k, &self.v].map(|tensor| tensor.len() / self.kv_heads);
        let heads_at_once = (CHUNK_BYTES / of_k.max(of_v).max(1)).clamp(1, self.kv_heads);
        (0..self.kv_heads).step_by(heads_at_once).flat_map(move |first| {
            let heads = first..self.kv_heads.min(first + heads_at_once);
            let of = move |tensor, per_head: usize| {
                cut(heads.start * per_head..heads.end * per_head).map(move |range| (tensor, range))
            };
            let (keys, values) = (of(Tensor::K, of_k), of(Tensor::V, of_v));
            keys.chain(values).map(|(tensor, range)| {
                let bytes = if tensor == Tensor::V { &self.v } else { &self.k };
                (tensor, range.start as u64, bytes.slice(range))
            })
        })
    }
}

fn cut(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(CHUNK_BYTES).map(move |start| start..end.min(start + CHUNK_BYTES))
}

#[cfg(test)]
mod tests {
    use attnd_wire::session::digest;

    use super::*;
    use crate::session::tests::spec;

    fn rows(tokens: usize) -> Rows {
        let (key, value) = spec().row_bytes();
        let bytes = |row: usize, from: usize| -> Bytes {
            (0..2 * tokens * row).map(|i| ((i + from) % 251) as u8).collect::<Vec<_>>().into()
        };
        Rows::new(bytes(key, 0), bytes(value, 7), &spec()).unwrap()
    }

    #[test]
    fn each_byte_is_in_one_chunk_and_heads_come_one_after_the_other() {
        for tokens in [1, 100, 20_000, 40_001] {
            let rows = rows(tokens);
            let mut back = [vec![None; rows.k.len()], vec![None; rows.v.len()]];
            let mut heads = Vec::new();
            let (chunks, sum) = rows.chunks();
            assert_eq!(sum, digest::of_rows(&rows.k, &rows.v));
            for (i, AppendChunk { index, tensor, offset, data }) in chunks.iter().enumerate() {
                let (tensor, offset) = (*tensor, offset.unwrap());
                assert_eq!(*index, i as u32);
                assert!(!data.is_empty() && data.len() <= CHUNK_BYTES && data.len().is_multiple_of(4));
                let back = &mut back[usize::from(tensor == Tensor::V)];
                heads.push(2 * offset as usize / back.len());
                for (at, byte) in data.iter().enumerate() {
                    assert_eq!(back[offset as usize + at].replace(*byte), None);
                }
            }
            assert!(heads.is_sorted(), "{heads:?}");
            for (back, sent) in back.iter().zip([&rows.k, &rows.v]) {
                assert!(back.iter().zip(sent).all(|(back, sent)| *back == Some(*sent)));
            }
        }
    }

    #[test]
    fn rows_are_whole_tokens_of_the_session() {
        let refused = |k: usize, v: usize| {
            Rows::new(vec![0; k].into(), vec![0; v].into(), &spec()).unwrap_err().message()
        };
        assert_eq!(refused(0, 0), "SHAPE_ZERO: tokens");
        assert_eq!(refused(33, 0), "PAYLOAD_LENGTH: k: 33 bytes, a token has 32");
        assert_eq!(refused(64, 16), "PAYLOAD_LENGTH: shape needs 32, payload 16 (v)");
        let latent = SessionSpec { value_is_key_prefix: true, ..spec() };
        assert_eq!(Rows::new(vec![0; 64].into(), Bytes::new(), &latent).unwrap().tokens, 2);
    }
}

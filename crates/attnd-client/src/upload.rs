//! The request stream of a call: Begin, the chunks, Commit.
//!
//! What travels beside the operands comes first, each tensor front to back, as every worker needs its part of it to
//! start. Chunks of the operands come kv group by kv group (Q of the group's heads, its keys, its values), so that a
//! worker can start with its first group while the others are still under way. Where groups are small, several share a
//! chunk. A worker owns a range of groups that this side doesn't know yet; so the groups come in bit-reversed order (of
//! 8: 0, 4, 2, 6, 1, 5, 3, 7), in which each range, however the groups are cut, gets its fair part of every stretch of
//! the stream. Chunks are slices of the caller's bytes; their checksums are computed when the connection asks for them.

use std::ops::Range;

use attnd_plan::{AnyTensor, SideTensor, Tensor};
use attnd_wire::{AttendRequest, Begin, Commit, TensorChunk};

use bytes::Bytes;

use crate::operands::Operands;

/// Tensor bytes in one message; a multiple of every element size.
const CHUNK_BYTES: usize = 512 << 10;

/// The frames of one call, in order.
#[derive(Debug)]
pub(crate) struct Upload {
    operands: Operands,
    /// What is left of the tensors beside them, and where that begins; the last one is sent first.
    beside: Vec<(SideTensor, u64, Bytes)>,
    begin: Option<Begin>,
    /// Kv groups that a round of Q, K and V covers.
    groups_per_round: usize,
    /// Rounds begun, those included that the bit reversal skips.
    round: usize,
    /// Place in [`Tensor::ALL`] of the current round.
    tensor: usize,
    /// Bytes of the current tensor and round that are sent.
    sent_of_part: usize,
    commit: Commit,
    committed: bool,
}

impl Upload {
    /// A call that begins with `begin`; `beside` has the bytes of each of its sides.
    pub(crate) fn new(operands: Operands, beside: &[Bytes], begin: Begin) -> Self {
        let beside = begin.sides.iter().zip(beside).rev();
        let beside = beside.map(|(layout, bytes)| (layout.tensor(), 0, bytes.clone())).collect();
        let n_groups = operands.shape.n_groups();
        let most = Tensor::ALL.iter().map(|tensor| operands.tensor(*tensor).len() / n_groups).max();
        let groups_per_round = (CHUNK_BYTES / most.unwrap_or(CHUNK_BYTES).max(1)).clamp(1, n_groups);
        Self {
            operands,
            beside,
            begin: Some(begin),
            groups_per_round,
            round: 0,
            tensor: 0,
            sent_of_part: 0,
            commit: Commit { chunks: 0, bytes: 0 },
            committed: false,
        }
    }

    /// Tensor bytes handed out so far.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.commit.bytes
    }

    /// The next bytes of what travels beside the operands, and where they begin.
    fn next_beside(&mut self) -> Option<(SideTensor, u64, Bytes)> {
        let (tensor, offset, left) = self.beside.last_mut()?;
        let data = left.split_to(left.len().min(CHUNK_BYTES));
        let chunk = (*tensor, *offset, data);
        *offset += chunk.2.len() as u64;
        if left.is_empty() {
            self.beside.pop();
        }
        Some(chunk)
    }

    /// The next tensor and range of its bytes.
    fn next_slice(&mut self) -> Option<(Tensor, Range<usize>)> {
        let n_groups = self.operands.shape.n_groups();
        let places = n_groups.div_ceil(self.groups_per_round).next_power_of_two();
        while self.round < places {
            let group = reversed(self.round, places) * self.groups_per_round;
            let tensor = Tensor::ALL.get(self.tensor).copied();
            let (Some(tensor), true) = (tensor, group < n_groups) else {
                (self.round, self.tensor) = (self.round + 1, 0);
                continue;
            };
            let per_group = self.operands.tensor(tensor).len() / n_groups;
            let groups = self.groups_per_round.min(n_groups - group);
            let left = groups * per_group - self.sent_of_part;
            if left == 0 {
                (self.tensor, self.sent_of_part) = (self.tensor + 1, 0);
                continue;
            }
            let start = group * per_group + self.sent_of_part;
            let len = left.min(CHUNK_BYTES);
            self.sent_of_part += len;
            return Some((tensor, start..start + len));
        }
        None
    }
}

/// `place` with its bits reversed, as one of `places`, which is a power of two.
fn reversed(place: usize, places: usize) -> usize {
    match places.trailing_zeros() {
        0 => place,
        bits => place.reverse_bits() >> (usize::BITS - bits),
    }
}

impl Iterator for Upload {
    type Item = AttendRequest;

    fn next(&mut self) -> Option<AttendRequest> {
        if let Some(begin) = self.begin.take() {
            return Some(AttendRequest::Begin(begin));
        }
        let chunk: Option<(AnyTensor, u64, Bytes)> = match self.next_beside() {
            Some((tensor, offset, data)) => Some((tensor.into(), offset, data)),
            None => self.next_slice().map(|(tensor, bytes)| {
                (tensor.into(), bytes.start as u64, self.operands.tensor(tensor).slice(bytes))
            }),
        };
        if let Some((tensor, offset, data)) = chunk {
            let index = self.commit.chunks;
            self.commit.chunks += 1;
            self.commit.bytes += data.len() as u64;
            return Some(AttendRequest::Chunk(TensorChunk { index, tensor, offset: Some(offset), data }));
        }
        let first = !std::mem::replace(&mut self.committed, true);
        first.then_some(AttendRequest::Commit(self.commit))
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Dims, Dtype};
    use attnd_plan::Element;

    use super::*;
    use crate::operands::AttendOptions;
    use crate::operands::tests::operands;
    use crate::side::{DenseTensor, beside};

    fn upload(dims: Dims, dtype: Dtype) -> (Operands, Vec<AttendRequest>) {
        let operands = operands(dims, dtype);
        let begin = operands.begin(&AttendOptions::default()).unwrap();
        let frames = Upload::new(operands.clone(), &[], begin).collect();
        (operands, frames)
    }

    /// Checks order and contents; returns tensor and length of each chunk.
    fn check(operands: &Operands, frames: &[AttendRequest]) -> Vec<(Tensor, usize)> {
        let [AttendRequest::Begin(_), chunks @ .., AttendRequest::Commit(commit)] = frames else {
            panic!("{} frames", frames.len());
        };
        let mut sent = Tensor::ALL.map(|tensor| (tensor, Vec::new()));
        let mut lengths = Vec::new();
        for (at, chunk) in chunks.iter().enumerate() {
            let AttendRequest::Chunk(chunk) = chunk else { panic!("{chunk:?}") };
            assert_eq!(chunk.index as usize, at);
            assert!(!chunk.data.is_empty() && chunk.data.len() <= CHUNK_BYTES);
            assert_eq!(chunk.data.len() % operands.dtype.size(), 0);
            let AnyTensor::Operand(tensor) = chunk.tensor else { panic!("{chunk:?}") };
            lengths.push((tensor, chunk.data.len()));
            let (_, runs) = sent.iter_mut().find(|(of, _)| *of == tensor).unwrap();
            runs.push((chunk.offset.unwrap(), &chunk.data[..]));
        }
        for (tensor, mut runs) in sent {
            let head_bytes = operands.tensor(tensor).len() / tensor.layout(&operands.shape).0;
            let in_order = |pair: &[(u64, &[u8])]| {
                pair[1].0.is_multiple_of(head_bytes as u64) || pair[1].0 == pair[0].0 + pair[0].1.len() as u64
            };
            assert!(runs.windows(2).all(in_order), "{tensor}: a head comes front to back");
            runs.sort_unstable();
            let bytes: Vec<u8> = runs.into_iter().flat_map(|(_, data)| data.iter().copied()).collect();
            assert!(operands.tensor(tensor)[..] == bytes, "{tensor}: each byte once");
        }
        assert_eq!(*commit, Commit { chunks: chunks.len() as u32, bytes: operands.total_bytes() });
        lengths
    }

    #[test]
    fn large_groups_come_one_after_the_other() {
        let dims =
            Dims { batch: 2, heads: 2, kv_heads: 1, queries: 3, keys: 5000, head_dim: 33, value_dim: 7 };
        let (operands, frames) = upload(dims, Dtype::F32);
        let (q, v, k) = (2 * 3 * 33 * 4, 5000 * 7 * 4, 5000 * 33 * 4);
        let group = [(Tensor::Q, q), (Tensor::K, CHUNK_BYTES), (Tensor::K, k - CHUNK_BYTES), (Tensor::V, v)];
        assert_eq!(check(&operands, &frames), [group, group].concat());
    }

    #[test]
    fn small_groups_share_chunks() {
        let dims =
            Dims { batch: 1, heads: 64, kv_heads: 64, queries: 1, keys: 100, head_dim: 16, value_dim: 16 };
        let (operands, frames) = upload(dims, Dtype::Bf16);
        assert_eq!(check(&operands, &frames).len(), 3, "K and V have 200 KiB each");
        let dims = Dims { keys: 1000, ..dims };
        let (operands, frames) = upload(dims, Dtype::Bf16);
        assert_eq!(check(&operands, &frames).len(), 3 * 4, "16 groups of 32,000 bytes fit into a chunk");
    }

    #[test]
    fn every_range_of_groups_gets_its_part_of_every_stretch_of_the_stream() {
        let dims =
            Dims { batch: 1, heads: 11, kv_heads: 11, queries: 1, keys: 2100, head_dim: 64, value_dim: 1 };
        let (operands, frames) = upload(dims, Dtype::F32);
        check(&operands, &frames);
        let group_bytes = 2100 * 64 * 4;
        let of_k = frames.iter().filter_map(|frame| match frame {
            AttendRequest::Chunk(TensorChunk { tensor: AnyTensor::Operand(Tensor::K), offset, .. }) => {
                *offset
            }
            _ => None,
        });
        let mut groups: Vec<u64> = of_k.map(|offset| offset / group_bytes).collect();
        groups.dedup();
        assert_eq!(groups, [0, 8, 4, 2, 10, 6, 1, 9, 5, 3, 7]);
    }

    #[test]
    fn masks_and_biases_come_first_each_front_to_back() {
        let dims =
            Dims { batch: 1, heads: 2, kv_heads: 2, queries: 900, keys: 800, head_dim: 2, value_dim: 1 };
        let operands = operands(dims, Dtype::F32);
        let tensor = |element: Element, shape: [usize; 4]| {
            let len = shape.iter().product::<usize>() * element.size();
            let bytes = (0..len).map(|i| (i % 253) as u8).collect::<Vec<_>>().into();
            Some(DenseTensor { element, shape, bytes })
        };
        let options = AttendOptions {
            dense_mask: tensor(Element::Bool, [1, 1, 900, 800]),
            dense_bias: tensor(Element::Float(Dtype::F16), [1, 2, 1, 799]),
            ..AttendOptions::default()
        };
        let begin = operands.begin(&options).unwrap();
        let (_, bytes) = beside(&options, &operands.shape).unwrap();
        let upload = Upload::new(operands.clone(), &bytes, begin.clone());
        let mut frames: Vec<AttendRequest> = upload.collect();
        let mask = [0, CHUNK_BYTES].map(|offset| (SideTensor::Mask, offset, &bytes[0]));
        for (at, (tensor, offset, bytes)) in
            mask.into_iter().chain([(SideTensor::Bias, 0, &bytes[1])]).enumerate()
        {
            let AttendRequest::Chunk(chunk) = &frames[1 + at] else { panic!("{:?}", frames[1 + at]) };
            assert_eq!((chunk.tensor, chunk.offset), (tensor.into(), Some(offset as u64)));
            assert!(chunk.data == bytes[offset..bytes.len().min(offset + CHUNK_BYTES)]);
        }
        let Some(AttendRequest::Commit(commit)) = frames.last_mut() else { panic!("no Commit") };
        assert_eq!(commit.bytes, operands.total_bytes() + begin.sides.bytes());
        assert_eq!(commit.chunks as usize, frames.len() - 2);
        assert!(matches!(&frames[4], AttendRequest::Chunk(chunk) if chunk.tensor == Tensor::Q.into()));
    }

    #[test]
    fn the_bytes_are_the_callers_own() {
        let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries: 1, keys: 9, head_dim: 3, value_dim: 1 };
        let (operands, frames) = upload(dims, Dtype::F32);
        let AttendRequest::Chunk(first) = &frames[1] else { panic!("{:?}", frames[1]) };
        assert_eq!(first.data.as_ptr(), operands.q.as_ptr());
    }
}

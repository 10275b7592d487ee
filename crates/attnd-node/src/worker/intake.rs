//! What one Compute stream may say and when: Begin, chunks in order, Commit. Decides without I/O: frames go in, groups
//! that are complete come out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use attnd_plan::{AnyTensor, Piece, SideTensor, Sides, Tensor};
use attnd_wire::{Commit, ComputeRequest, Error, MergedSums, Reason, SliceChunk, refusal};

use super::assembly::{AssemblyError, GroupAssembly, Layout, Operands};
use super::cells::ReadyGroup;
use super::second_pass::SumsDue;
use super::side::{self, SideAssembly, SidePlanes};
use crate::budget::Reservation;

/// The state of one stream after its Begin.
#[derive(Debug)]
pub(crate) struct Intake {
    layout: Layout,
    /// Groups that are not complete yet.
    waiting: BTreeMap<usize, Waiting>,
    beside: Beside,
    bytes_expected: u64,
    chunks: u32,
    bytes: u64,
    committed: bool,
    /// Where there is a second pass.
    sums: SumsDue,
}

#[derive(Debug)]
struct Waiting {
    assembly: GroupAssembly,
    memory: Reservation,
}

/// What travels beside the operands, all of which comes before them.
#[derive(Debug)]
enum Beside {
    Arriving(SideAssembly),
    /// For groups that are not complete yet.
    Here(Arc<SidePlanes>),
    /// Every group has it, or nothing more is wanted.
    HandedOn,
}

/// What a frame led to.
#[derive(Debug)]
pub(crate) enum Progress {
    /// More frames are needed.
    More,
    /// A group can be computed.
    Ready(Box<ReadyGroup>),
    /// Everything is here and verified, but for sums.
    Committed,
    /// Rows can be reported on.
    Sums(MergedSums),
}

/// Memory that the groups of `pieces` need together, with the operator's own tensors and what travels beside.
///
/// # Errors
/// [`Reason::Pieces`] where two pieces hold the same group.
pub(crate) fn bytes_needed(layout: &Layout, sides: &Sides, pieces: &[Piece]) -> Result<u64, Error> {
    let mut seen = BTreeSet::new();
    let mut total: u64 = 0;
    for piece in pieces {
        let per_group = GroupAssembly::bytes_needed(layout, &piece.slots);
        total = total.saturating_add(per_group.saturating_mul(piece.groups.len() as u64));
        for group in piece.groups.clone() {
            if !seen.insert(group) {
                return Err(Error::new(Reason::Pieces, format!("group {group} is in two pieces")));
            }
        }
    }
    let of_share =
        layout.residency.of_share().saturating_add(side::bytes_needed(sides, pieces, &layout.shape));
    Ok(total.saturating_add(of_share))
}

impl Intake {
    /// Expects the operands of `pieces`, what travels beside them, and these sums; `memory` holds what [`bytes_needed`] said and is
    /// handed to the groups.
    pub(crate) fn new(
        layout: Layout,
        sides: &Sides,
        pieces: &[Piece],
        sums: SumsDue,
        memory: &mut Reservation,
    ) -> Self {
        let of_sides = memory.split(side::bytes_needed(sides, pieces, &layout.shape));
        let beside = SideAssembly::new(sides, pieces, layout.shape, layout.check_finite, of_sides);
        let mut waiting = BTreeMap::new();
        let mut bytes_expected = beside.bytes_expected();
        for piece in pieces {
            for group in piece.groups.clone() {
                let slots = piece.slots.clone();
                let memory = memory.split(GroupAssembly::bytes_needed(&layout, &slots));
                bytes_expected += GroupAssembly::bytes_expected(&layout, &slots);
                waiting.insert(group, Waiting { assembly: GroupAssembly::new(layout, group, slots), memory });
            }
        }
        let beside = Beside::Arriving(beside);
        Self { layout, waiting, beside, bytes_expected, chunks: 0, bytes: 0, committed: false, sums }
    }

    /// Takes the next frame.
    ///
    /// # Errors
    /// What is wrong with it, by its reason; nothing more can come of the stream.
    pub(crate) fn frame(&mut self, frame: ComputeRequest) -> Result<Progress, Error> {
        if let ComputeRequest::Sums(sums) = frame {
            self.sums.take(&sums)?;
            return Ok(Progress::Sums(sums));
        }
        if self.committed {
            return Err(refusal::frame_after_commit());
        }
        match frame {
            ComputeRequest::Sums(_) => Ok(Progress::More),
            ComputeRequest::Begin(_) => Err(refusal::duplicate_begin()),
            ComputeRequest::Chunk(chunk) => self.chunk(&chunk),
            ComputeRequest::Commit(commit) => self.commit(commit),
        }
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// If it ended before Commit or before the last sums.
    pub(crate) fn end(&self) -> Result<(), Error> {
        if self.committed && self.sums.left() > 0 {
            let detail = format!("sums of {} cells are missing", self.sums.left());
            return Err(Error::new(Reason::StreamTruncated, detail));
        }
        if self.committed {
            return Ok(());
        }
        Err(refusal::stream_truncated(self.chunks.into(), self.bytes, self.bytes_expected))
    }

    /// Whether no sums are due any more.
    pub(crate) fn has_all_sums(&self) -> bool {
        self.sums.left() == 0
    }

    /// Gives back what has come so far.
    pub(crate) fn abandon(&mut self) {
        self.waiting.clear();
        self.beside = Beside::HandedOn;
    }

    fn chunk(&mut self, chunk: &SliceChunk) -> Result<Progress, Error> {
        if chunk.index != self.chunks {
            let detail = format!("expected {}, got {}", self.chunks, chunk.index);
            return Err(Error::new(Reason::ChunkOrder, detail));
        }
        self.chunks += 1;
        self.bytes = self.bytes.saturating_add(chunk.data.len() as u64);
        match chunk.tensor {
            AnyTensor::Operand(tensor) => self.operand(tensor, chunk),
            AnyTensor::Side(tensor) => self.side(tensor, chunk),
        }
    }

    fn side(&mut self, tensor: SideTensor, chunk: &SliceChunk) -> Result<Progress, Error> {
        let Beside::Arriving(assembly) = &mut self.beside else {
            let detail = format!("{tensor} part {} after what it comes before", chunk.head);
            return Err(Error::new(Reason::ChunkOrder, detail));
        };
        assembly.accept(tensor, chunk.head, chunk.offset, &chunk.data)?;
        Ok(Progress::More)
    }

    /// What is beside the operands, of which one has come.
    fn planes(&mut self, chunk: &SliceChunk) -> Result<Arc<SidePlanes>, Error> {
        if let Beside::Arriving(assembly) = &self.beside
            && let Some(first) = assembly.missing()
        {
            let detail = format!("{} head {}: all of {first} comes first", chunk.tensor, chunk.head);
            return Err(Error::new(Reason::ChunkOrder, detail));
        }
        let planes = match std::mem::replace(&mut self.beside, Beside::HandedOn) {
            Beside::Arriving(assembly) => Arc::new(assembly.finish()?),
            Beside::Here(planes) => planes,
            Beside::HandedOn => {
                let detail = format!("{} head {} is not expected here", chunk.tensor, chunk.head);
                return Err(Error::new(Reason::Pieces, detail));
            }
        };
        self.beside = Beside::Here(Arc::clone(&planes));
        Ok(planes)
    }

    fn operand(&mut self, tensor: Tensor, chunk: &SliceChunk) -> Result<Progress, Error> {
        let planes = self.planes(chunk)?;
        let group = match tensor {
            Tensor::Q => chunk.head / self.layout.shape.group_size(),
            Tensor::K | Tensor::V => chunk.head,
        };
        let Some(waiting) = self.waiting.get_mut(&group) else {
            let detail = format!("{} head {} is not expected here", chunk.tensor, chunk.head);
            return Err(Error::new(Reason::Pieces, detail));
        };
        waiting.assembly.accept(tensor, chunk.head, chunk.offset, &chunk.data)?;
        if !waiting.assembly.is_complete() {
            return Ok(Progress::More);
        }
        let complete = self.waiting.remove(&group);
        if self.waiting.is_empty() {
            self.beside = Beside::HandedOn;
        }
        let finished = complete.and_then(|Waiting { assembly, memory }| Some((assembly.finish()?, memory)));
        let Some((operands, memory)) = finished else {
            return Err(Error::new(Reason::Internal, "a complete group has no operands"));
        };
        let operands: Operands = operands?;
        Ok(Progress::Ready(Box::new(ReadyGroup { group, operands, planes, _memory: memory })))
    }

    fn commit(&mut self, commit: Commit) -> Result<Progress, Error> {
        let (bytes, expected) = (self.bytes, self.bytes_expected);
        if commit.chunks != self.chunks {
            let detail = format!("commit declares {} chunks, got {}", commit.chunks, self.chunks);
            return Err(Error::new(Reason::ChunkOrder, detail));
        }
        if commit.bytes != bytes {
            let detail = format!("declared {}, got {bytes}", commit.bytes);
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        if !self.waiting.is_empty() {
            let detail = format!("shape needs {expected}, payload {bytes}");
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        self.committed = true;
        Ok(Progress::Committed)
    }
}

impl From<AssemblyError> for Error {
    fn from(error: AssemblyError) -> Self {
        match error {
            AssemblyError::Head { .. } => Self::new(Reason::Pieces, error.to_string()),
            AssemblyError::Offset { .. } => Self::new(Reason::ChunkOrder, error.to_string()),
            AssemblyError::NonFinite { tensor, head, found } => refusal::non_finite(tensor, head, &found),
            AssemblyError::OutOfMemory(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{AttnShape, Causal, Dims, Dtype, Operator};
    use attnd_plan::{Element, Residency, SideLayout};
    use bytes::Bytes;

    use super::*;
    use crate::budget::Budget;

    fn layout() -> Layout {
        let dims = Dims { batch: 1, heads: 2, kv_heads: 2, queries: 1, keys: 4, head_dim: 1, value_dim: 1 };
        let (shape, dtype) = (AttnShape::new(dims).unwrap(), Dtype::F32);
        let residency = Residency::new(shape, dtype, &Operator::plain(1.0, Causal::None));
        Layout { shape, dtype, check_finite: true, residency }
    }

    fn pieces() -> [Piece; 1] {
        [Piece { groups: 0..2, slots: 0..64 }]
    }

    fn chunk(index: u32, tensor: Tensor, head: usize, tokens: usize) -> ComputeRequest {
        let data = Bytes::from(vec![0; tokens * 4]);
        ComputeRequest::Chunk(SliceChunk { index, tensor: tensor.into(), head, offset: 0, data: data.into() })
    }

    fn commit(chunks: u32, bytes: u64) -> ComputeRequest {
        ComputeRequest::Commit(Commit { chunks, bytes })
    }

    fn all_chunks() -> Vec<ComputeRequest> {
        let order = [(Tensor::Q, 0, 1), (Tensor::K, 0, 4), (Tensor::K, 1, 4)];
        let order = order.into_iter().chain([(Tensor::V, 0, 4), (Tensor::Q, 1, 1), (Tensor::V, 1, 4)]);
        (0..).zip(order).map(|(index, (tensor, head, tokens))| chunk(index, tensor, head, tokens)).collect()
    }

    fn reasons(frames: Vec<ComputeRequest>) -> (Vec<&'static str>, u64) {
        let budget = Budget::new(1 << 30);
        let layout = layout();
        let mut memory =
            budget.reserve(bytes_needed(&layout, &Sides::default(), &pieces()).unwrap()).unwrap();
        let mut intake = Intake::new(layout, &Sides::default(), &pieces(), SumsDue::default(), &mut memory);
        drop(memory);
        assert_ne!(budget.reserved(), 0, "all of it is with the groups");
        let mut said = Vec::new();
        let mut computing = Vec::new();
        for frame in frames {
            said.push(match intake.frame(frame) {
                Ok(Progress::More) => "more",
                Ok(Progress::Ready(ready)) => {
                    computing.push(ready);
                    "ready"
                }
                Ok(Progress::Committed) => "committed",
                Ok(Progress::Sums(_)) => "sums",
                Err(error) => error.reason.name(),
            });
        }
        said.push(intake.end().map_or_else(|error| error.reason.name(), |()| "end"));
        drop((intake, computing));
        (said, budget.reserved())
    }

    #[test]
    fn a_group_is_ready_with_its_last_byte_and_before_commit() {
        let frames = all_chunks().into_iter().chain([commit(6, 18 * 4)]).collect();
        assert_eq!(reasons(frames).0, ["more", "more", "more", "ready", "more", "ready", "committed", "end"]);
    }

    #[test]
    fn streams_out_of_order_are_refused_and_their_memory_returns() {
        let with = |frames: Vec<ComputeRequest>| {
            let (said, reserved) = reasons(frames);
            assert_eq!(reserved, 0);
            said
        };
        assert_eq!(with(vec![]), ["STREAM_TRUNCATED"]);
        assert_eq!(with(vec![chunk(1, Tensor::Q, 0, 1)])[0], "CHUNK_ORDER");
        assert_eq!(with(vec![chunk(0, Tensor::Q, 0, 1), chunk(0, Tensor::K, 0, 4)])[1], "CHUNK_ORDER");
        assert_eq!(with(vec![chunk(0, Tensor::Q, 2, 1)])[0], "PIECES");
        assert_eq!(with(vec![chunk(0, Tensor::K, 0, 5)])[0], "CHUNK_ORDER");
        assert_eq!(with(vec![commit(0, 0)])[0], "PAYLOAD_LENGTH");
        assert_eq!(with(vec![chunk(0, Tensor::Q, 0, 1), commit(2, 4)])[1], "CHUNK_ORDER");
        assert_eq!(with(vec![chunk(0, Tensor::Q, 0, 1), commit(1, 8)])[1], "PAYLOAD_LENGTH");
        let frames = all_chunks().into_iter().chain([commit(6, 72), commit(6, 72)]).collect();
        assert_eq!(with(frames)[7], "STREAM_ORDER");
    }

    #[test]
    fn a_truncated_stream_says_how_far_it_came() {
        let budget = Budget::new(1 << 30);
        let mut memory = budget.reserve(1 << 20).unwrap();
        let mut intake = Intake::new(layout(), &Sides::default(), &pieces(), SumsDue::default(), &mut memory);
        intake.frame(chunk(0, Tensor::V, 1, 4)).unwrap();
        let error = intake.end().unwrap_err();
        assert_eq!(error, refusal::stream_truncated(1, 16, 72));
    }

    #[test]
    fn pieces_must_be_disjoint() {
        let twice = [Piece { groups: 0..2, slots: 0..32 }, Piece { groups: 1..2, slots: 32..64 }];
        assert_eq!(bytes_needed(&layout(), &Sides::default(), &twice[..1]).unwrap(), 2 * (256 * 17 * 4 + 4));
        assert!(bytes_needed(&layout(), &Sides::default(), &twice).is_err());
    }

    #[test]
    fn a_piece_without_keys_needs_queries_only_and_has_no_cells() {
        let budget = Budget::new(1 << 20);
        let mut memory = budget.reserve(4).unwrap();
        let keyless = [Piece { groups: 0..1, slots: 32..64 }];
        assert_eq!(bytes_needed(&layout(), &Sides::default(), &keyless).unwrap(), 4);
        let mut intake = Intake::new(layout(), &Sides::default(), &keyless, SumsDue::default(), &mut memory);
        assert!(matches!(intake.frame(chunk(0, Tensor::Q, 0, 1)), Ok(Progress::Ready(_))));
        assert!(matches!(intake.frame(commit(1, 4)), Ok(Progress::Committed)));
    }

    #[test]
    fn what_is_beside_the_operands_comes_first_and_its_memory_returns_with_the_last_group() {
        let budget = Budget::new(1 << 30);
        let layout = layout();
        let mask = SideLayout::dense(SideTensor::Mask, Element::Bool, [1, 2, 1, 3], &layout.shape).unwrap();
        let sides = Sides::new(vec![mask]).unwrap();
        let side = |index, part, offset, data: &'static [u8]| {
            let tensor = SideTensor::Mask.into();
            ComputeRequest::Chunk(SliceChunk {
                index,
                tensor,
                head: part,
                offset,
                data: data.to_vec().into(),
            })
        };
        let begin = || {
            let need = bytes_needed(&layout, &sides, &pieces()).unwrap();
            assert_eq!(need, bytes_needed(&layout, &Sides::default(), &pieces()).unwrap() + 2 * 32);
            Intake::new(layout, &sides, &pieces(), SumsDue::default(), &mut budget.reserve(need).unwrap())
        };
        let text = |said: Result<Progress, Error>| said.unwrap_err().message();
        let mut intake = begin();
        assert_eq!(intake.end().unwrap_err(), refusal::stream_truncated(0, 0, 72 + 6));
        intake.frame(side(0, 0, 0, &[1, 0, 1])).unwrap();
        intake.frame(side(1, 1, 0, &[1])).unwrap();
        assert_eq!(
            text(intake.frame(chunk(2, Tensor::Q, 0, 1))),
            "CHUNK_ORDER: q head 0: all of mask comes first"
        );
        drop(intake);
        assert_eq!(budget.reserved(), 0);

        let mut intake = begin();
        intake.frame(side(0, 0, 0, &[1, 0, 1])).unwrap();
        intake.frame(side(1, 1, 0, &[1, 1, 1])).unwrap();
        let mut ready = Vec::new();
        for (index, request) in (2..).zip(all_chunks()) {
            let ComputeRequest::Chunk(of) = request else { panic!("{request:?}") };
            match intake.frame(ComputeRequest::Chunk(SliceChunk { index, ..of })).unwrap() {
                Progress::Ready(group) => ready.push(group),
                progress => assert!(matches!(progress, Progress::More)),
            }
        }
        assert_eq!(
            text(intake.frame(side(8, 1, 3, &[1]))),
            "CHUNK_ORDER: mask part 1 after what it comes before"
        );
        for group in &ready {
            let planes = group.planes.of_group(SideTensor::Mask, group.group, &(0..64), &layout.shape);
            assert_eq!(planes.len(), 1);
        }
        let before = budget.reserved();
        ready.remove(0);
        assert_eq!(before - budget.reserved(), (256 * 17 * 4 + 4) as u64, "a group's own");
        drop(ready);
        assert_eq!(budget.reserved(), 0, "and with the last one the masks'");
    }
}

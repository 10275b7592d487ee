//! Side tensors as they arrive: before Q, K and V, one after the other, each front to back. A worker so has all of them
//! when the operands of a kv group are complete.

use super::{AnyTensor, SideTensor, Sides};
use crate::arrival::Misplaced;

/// Why a chunk is in the wrong place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SideMisplaced {
    /// This tensor comes first.
    Before(SideTensor),
    /// It is that tensor's turn, and these are other bytes.
    Place(Misplaced),
}

/// What is here of one side tensor.
#[derive(Clone, Debug)]
pub(crate) struct SideArrival {
    pub(crate) tensor: SideTensor,
    /// Bytes that its dimensions need.
    pub(crate) need: u64,
    /// Bytes that are here.
    pub(crate) got: u64,
}

/// What is here of all of them.
#[derive(Clone, Debug)]
pub(crate) struct SideArrivals(Vec<SideArrival>);

impl SideArrivals {
    /// Nothing yet.
    pub(crate) fn new(sides: &Sides) -> Self {
        let arrival = |layout: &super::SideLayout| SideArrival {
            tensor: layout.tensor(),
            need: layout.bytes(),
            got: 0,
        };
        Self(sides.iter().map(arrival).collect())
    }

    /// Each of them, in the order in which they come.
    pub(crate) fn tensors(&self) -> &[SideArrival] {
        &self.0
    }

    /// Refuses a chunk of an operand as long as something beside them is missing.
    pub(crate) fn check_operand(&self) -> Result<(), SideMisplaced> {
        match self.0.iter().find(|arrival| arrival.got < arrival.need) {
            Some(missing) => Err(SideMisplaced::Before(missing.tensor)),
            None => Ok(()),
        }
    }

    /// Counts `len` bytes in that begin at `offset`, or where the tensor's last chunk ended; returns where that is.
    pub(crate) fn take(
        &mut self,
        tensor: SideTensor,
        offset: Option<u64>,
        len: u64,
    ) -> Result<u64, SideMisplaced> {
        let turn = self.0.iter().find(|arrival| arrival.got < arrival.need).map(|arrival| arrival.tensor);
        let Some(arrival) = self.0.iter_mut().find(|arrival| arrival.tensor == tensor) else {
            let bytes = offset.unwrap_or(0)..offset.unwrap_or(0).saturating_add(len);
            return Err(SideMisplaced::Place(Misplaced::PastTheEnd { bytes, need: 0 }));
        };
        let start = offset.unwrap_or(arrival.got);
        let end = start.saturating_add(len);
        if end > arrival.need {
            return Err(SideMisplaced::Place(Misplaced::PastTheEnd {
                bytes: start..end,
                need: arrival.need,
            }));
        }
        if let Some(turn) = turn.filter(|turn| *turn < tensor) {
            return Err(SideMisplaced::Before(turn));
        }
        if start != arrival.got {
            return Err(SideMisplaced::Place(Misplaced::Jump { start, expected: arrival.got }));
        }
        arrival.got = end;
        Ok(start)
    }
}

impl SideMisplaced {
    /// The same as an error of a call: chunk `index` of `tensor` is out of place.
    pub(crate) fn of_chunk<E>(self, index: u64, tensor: AnyTensor) -> crate::CallError<E> {
        match self {
            Self::Before(first) => crate::CallError::SideFirst { index, tensor, first },
            Self::Place(why) => crate::CallError::ChunkPlace { index, tensor, why },
        }
    }
}

//! The three tensors as they arrive: kv group by kv group, in one order for all three.
//!
//! The client chooses the order of the groups. Every worker then gets its groups in that order, and so finishes them in
//! that order, which is what keeps the partials that wait for each other few. Inside of a tensor a group comes front to
//! back and ends before the next one begins, so that at a worker one group at a time has bytes that are staged.

use std::ops::Range;

use attnd_kernel::AttnShape;

use crate::Tensor;

/// Why a chunk is in the wrong place. Bytes are counted from the tensor's first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misplaced {
    /// It ends behind the tensor.
    #[error("brings bytes {} to {} of {need}", .bytes.start, .bytes.end)]
    PastTheEnd {
        /// Where it is.
        bytes: Range<u64>,
        /// The bytes of the tensor.
        need: u64,
    },
    /// It begins elsewhere than at this byte.
    #[error("begins at byte {start}, expected {expected}, the next one of a kv group that has begun")]
    Gap {
        /// Where it begins.
        start: u64,
        /// The next byte of the group that has begun.
        expected: u64,
    },
    /// It begins elsewhere than at this byte, in a tensor that comes front to back.
    #[error("begins at byte {start}, expected {expected}")]
    Jump {
        /// Where it begins.
        start: u64,
        /// The next byte.
        expected: u64,
    },
    /// It begins in the middle of a group of which nothing is here.
    #[error("begins at byte {start}, inside of a kv group ({group_bytes} bytes each) that has not begun")]
    InsideOfGroup {
        /// Where it begins.
        start: u64,
        /// The bytes of a group.
        group_bytes: u64,
    },
    /// It begins a group that isn't the next one.
    #[error("begins kv group {group}, expected {expected}: the groups come in one order in all tensors")]
    Order {
        /// The group.
        group: u64,
        /// The next one, as another tensor had it.
        expected: u64,
    },
    /// It begins a group that is here.
    #[error("begins kv group {group}, which came before")]
    Again {
        /// The group.
        group: u64,
    },
}

/// What is here of a tensor.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) tensor: Tensor,
    /// Bytes that the shape needs.
    pub(crate) need: u64,
    /// Bytes that are here.
    pub(crate) got: u64,
    group_bytes: u64,
    /// Groups that have begun.
    begun: usize,
    /// Where the last chunk ended.
    cursor: u64,
}

impl Arrival {
    fn new(tensor: Tensor, shape: &AttnShape, dtype_bytes: usize) -> Self {
        let need = tensor.bytes(shape, dtype_bytes);
        let group_bytes = (need / shape.n_groups().max(1) as u64).max(1);
        Self { tensor, need, got: 0, group_bytes, begun: 0, cursor: 0 }
    }
}

/// What is here of a call.
#[derive(Clone, Debug)]
pub(crate) struct Arrivals {
    tensors: [Arrival; 3],
    /// The groups, in the order in which the first tensor of each began.
    order: Vec<u64>,
}

impl Arrivals {
    /// Nothing yet of a call of `shape`, whose elements have `dtype_bytes` on the wire.
    pub(crate) fn new(shape: &AttnShape, dtype_bytes: usize) -> Self {
        let tensors = Tensor::ALL.map(|tensor| Arrival::new(tensor, shape, dtype_bytes));
        Self { tensors, order: Vec::new() }
    }

    /// The tensors, in the order of the wire.
    pub(crate) fn tensors(&self) -> &[Arrival; 3] {
        &self.tensors
    }

    /// Counts `len` bytes of a tensor in that begin at `offset`, or where its last chunk ended; returns where that is. A
    /// call that gets an error is over.
    pub(crate) fn take(&mut self, tensor: Tensor, offset: Option<u64>, len: u64) -> Result<u64, Misplaced> {
        let [q, k, v] = &mut self.tensors;
        let arrival = match tensor {
            Tensor::Q => q,
            Tensor::K => k,
            Tensor::V => v,
        };
        let (cursor, size) = (arrival.cursor, arrival.group_bytes);
        let start = offset.unwrap_or(cursor);
        let end = start.saturating_add(len);
        if end > arrival.need {
            return Err(Misplaced::PastTheEnd { bytes: start..end, need: arrival.need });
        }
        if start != cursor && !cursor.is_multiple_of(size) {
            return Err(Misplaced::Gap { start, expected: cursor });
        }
        if start != cursor && !start.is_multiple_of(size) {
            return Err(Misplaced::InsideOfGroup { start, group_bytes: size });
        }
        for group in start.div_ceil(size)..end.div_ceil(size) {
            match self.order.get(arrival.begun) {
                Some(expected) if *expected == group => {}
                Some(expected) => return Err(Misplaced::Order { group, expected: *expected }),
                None if self.order.contains(&group) => return Err(Misplaced::Again { group }),
                None => self.order.push(group),
            }
            arrival.begun += 1;
        }
        arrival.cursor = end;
        arrival.got += len;
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::Dims;
    use proptest::prelude::*;

    use super::*;

    /// Six groups of 40 bytes of Q, 8 of K and 8 of V.
    fn arrivals() -> Arrivals {
        let dims = Dims { batch: 1, heads: 12, kv_heads: 6, queries: 5, keys: 2, head_dim: 1, value_dim: 1 };
        let arrivals = Arrivals::new(&AttnShape::new(dims).unwrap(), 4);
        assert_eq!(arrivals.tensors.clone().map(|tensor| tensor.group_bytes), [40, 8, 8]);
        arrivals
    }

    #[test]
    fn without_offsets_a_tensor_comes_front_to_back() {
        let mut a = arrivals();
        assert_eq!([0, 100, 100, 40].map(|len| a.take(Tensor::Q, None, len)), [0, 0, 100, 200].map(Ok));
        assert_eq!((a.tensors[0].got, a.tensors[0].need), (240, 240));
        assert_eq!(a.take(Tensor::Q, None, 1), Err(Misplaced::PastTheEnd { bytes: 240..241, need: 240 }));
        assert_eq!(a.order, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn whichever_tensor_is_ahead_fixes_the_order_for_the_others() {
        let mut a = arrivals();
        assert_eq!(a.take(Tensor::K, Some(24), 8), Ok(24));
        assert_eq!(a.take(Tensor::V, Some(0), 8), Err(Misplaced::Order { group: 0, expected: 3 }));
        let mut a = arrivals();
        assert_eq!(a.take(Tensor::K, Some(24), 16), Ok(24), "groups 3 and 4");
        assert_eq!(a.take(Tensor::Q, Some(120), 80), Ok(120));
        assert_eq!(a.take(Tensor::Q, Some(0), 1), Ok(0));
        assert_eq!(a.take(Tensor::V, Some(24), 8), Ok(24));
        assert_eq!(a.take(Tensor::V, None, 8), Ok(32), "the next group unless an offset says otherwise");
        assert_eq!(a.take(Tensor::V, Some(0), 8), Ok(0));
        assert_eq!(a.order, [3, 4, 0]);
    }

    #[test]
    fn bytes_in_the_wrong_place_are_refused() {
        let begun = || {
            let mut a = arrivals();
            assert_eq!(a.take(Tensor::Q, Some(80), 30), Ok(80));
            a
        };
        let refused = |offset, len| begun().take(Tensor::Q, Some(offset), len).unwrap_err();
        assert_eq!(refused(108, 4), Misplaced::Gap { start: 108, expected: 110 });
        assert_eq!(refused(112, 4), Misplaced::Gap { start: 112, expected: 110 });
        assert_eq!(refused(0, 4), Misplaced::Gap { start: 0, expected: 110 }, "one group at a time");
        assert_eq!(refused(u64::MAX, 2), Misplaced::PastTheEnd { bytes: u64::MAX..u64::MAX, need: 240 });
        let mut a = begun();
        assert_eq!(a.take(Tensor::Q, Some(110), 10), Ok(110));
        let refused = |offset, len| a.clone().take(Tensor::Q, Some(offset), len).unwrap_err();
        assert_eq!(refused(4, 4), Misplaced::InsideOfGroup { start: 4, group_bytes: 40 });
        assert_eq!(refused(80, 4), Misplaced::Again { group: 2 }, "again");
        assert_eq!(refused(40, 41), Misplaced::Again { group: 2 }, "runs into it");
    }

    proptest! {
        /// Against a byte at a time: nothing counts twice, and what is complete has no hole.
        #[test]
        fn every_byte_counts_once(chunks in proptest::collection::vec((0usize..3, any::<bool>(), 0u64..6, 1u64..60), 1..60)) {
            let mut a = arrivals();
            let mut here = [vec![false; 240], vec![false; 48], vec![false; 48]];
            for (tensor, placed, group, len) in chunks {
                let offset = placed.then(|| group * a.tensors[tensor].group_bytes);
                let Ok(start) = a.take(Tensor::ALL[tensor], offset, len) else { break };
                for byte in &mut here[tensor][start as usize..(start + len) as usize] {
                    prop_assert!(!std::mem::replace(byte, true));
                }
                let arrival = &a.tensors[tensor];
                prop_assert_eq!(arrival.got, here[tensor].iter().filter(|byte| **byte).count() as u64);
                let cut = here[tensor].chunks(arrival.group_bytes as usize).filter(|group| group.contains(&true) && group.contains(&false));
                prop_assert!(cut.count() <= 1, "one group at a time");
            }
        }
    }
}

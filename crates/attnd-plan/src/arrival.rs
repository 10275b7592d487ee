//! One tensor as it arrives: which of its bytes are here.

use std::collections::BTreeMap;

use attnd_kernel::AttnShape;

use crate::Tensor;

/// Why a chunk is in the wrong place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misplaced {
    /// It ends behind the tensor.
    PastTheEnd {
        /// Where it ends.
        end: u64,
    },
    /// It begins neither with a head nor where earlier bytes end.
    Gap {
        /// Where it begins.
        start: u64,
        /// The bytes of a head.
        head_bytes: u64,
    },
    /// This byte came before.
    Again {
        /// Counted from the tensor's first.
        at: u64,
    },
}

/// The bytes of a tensor that are here, as runs. A head arrives front to back, because workers take it that way; heads
/// arrive in any order. So a run begins with a head, and there are no more runs than heads.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) tensor: Tensor,
    /// Bytes that the shape needs.
    pub(crate) need: u64,
    /// Bytes that are here.
    pub(crate) got: u64,
    head_bytes: u64,
    /// Begin and end of each run; none touches the next.
    runs: BTreeMap<u64, u64>,
    /// Where the last chunk ended.
    cursor: u64,
}

impl Arrival {
    /// Nothing yet of a tensor of `shape`, whose elements have `dtype_bytes` on the wire.
    pub(crate) fn new(tensor: Tensor, shape: &AttnShape, dtype_bytes: usize) -> Self {
        let need = tensor.bytes(shape, dtype_bytes);
        let (heads, ..) = tensor.layout(shape);
        let head_bytes = (need / heads.max(1) as u64).max(1);
        Self { tensor, need, got: 0, head_bytes, runs: BTreeMap::new(), cursor: 0 }
    }

    /// Counts `len` bytes in that begin at `offset`, or where the last chunk ended; returns where that is.
    pub(crate) fn take(&mut self, offset: Option<u64>, len: u64) -> Result<u64, Misplaced> {
        let start = offset.unwrap_or(self.cursor);
        let end = start.saturating_add(len);
        if end > self.need {
            return Err(Misplaced::PastTheEnd { end });
        }
        let before = self.runs.range(..=start).next_back().map(|(begin, end)| (*begin, *end));
        if let Some((_, behind)) = before
            && behind > start
        {
            return Err(Misplaced::Again { at: start });
        }
        let after = self.runs.range(start + 1..).next().map(|(begin, end)| (*begin, *end));
        if let Some((at, _)) = after
            && at < end
        {
            return Err(Misplaced::Again { at });
        }
        let extended = before.filter(|(_, behind)| *behind == start).map(|(begin, _)| begin);
        if extended.is_none() && !start.is_multiple_of(self.head_bytes) {
            return Err(Misplaced::Gap { start, head_bytes: self.head_bytes });
        }
        let joined = after.filter(|(begin, _)| *begin == end);
        if let Some((begin, _)) = joined {
            self.runs.remove(&begin);
        }
        self.runs.insert(extended.unwrap_or(start), joined.map_or(end, |(_, behind)| behind));
        self.cursor = end;
        self.got += len;
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::Dims;
    use proptest::prelude::*;

    use super::*;

    const DIMS: Dims =
        Dims { batch: 1, heads: 6, kv_heads: 6, queries: 5, keys: 1, head_dim: 1, value_dim: 1 };

    /// Q of 6 heads with 20 bytes each.
    fn queries() -> Arrival {
        Arrival::new(Tensor::Q, &AttnShape::new(DIMS).unwrap(), 4)
    }

    #[test]
    fn without_offsets_a_tensor_comes_front_to_back() {
        let mut q = queries();
        assert_eq!((0..6).map(|_| q.take(None, 20)).collect::<Vec<_>>(), [0, 20, 40, 60, 80, 100].map(Ok));
        assert_eq!((q.got, q.need, q.runs.len()), (120, 120, 1));
        assert_eq!(q.take(None, 1), Err(Misplaced::PastTheEnd { end: 121 }));
    }

    #[test]
    fn bytes_in_the_wrong_place_are_refused_and_change_nothing() {
        let mut q = queries();
        assert_eq!(q.take(Some(40), 30), Ok(40));
        assert_eq!(
            q.take(Some(10), 4),
            Err(Misplaced::Gap { start: 10, head_bytes: 20 }),
            "in the middle of a head"
        );
        assert_eq!(
            q.take(Some(72), 4),
            Err(Misplaced::Gap { start: 72, head_bytes: 20 }),
            "bytes 70 and 71 are missing"
        );
        assert_eq!(q.take(Some(69), 4), Err(Misplaced::Again { at: 69 }));
        assert_eq!(q.take(Some(40), 1), Err(Misplaced::Again { at: 40 }));
        assert_eq!(q.take(Some(20), 21), Err(Misplaced::Again { at: 40 }), "runs into what is here");
        assert_eq!(q.take(Some(u64::MAX), 2), Err(Misplaced::PastTheEnd { end: u64::MAX }));
        assert_eq!((q.got, q.runs.len()), (30, 1));
        assert_eq!(q.take(Some(20), 20), Ok(20), "joins the run");
        assert_eq!(q.take(Some(70), 50), Ok(70));
        assert_eq!(q.take(Some(0), 20), Ok(0));
        assert_eq!((q.got, q.runs), (120, BTreeMap::from([(0, 120)])));
    }

    proptest! {
        /// Against a byte at a time.
        #[test]
        fn every_byte_counts_once(chunks in proptest::collection::vec((any::<bool>(), 0u64..125, 1u64..45), 1..60)) {
            let mut q = queries();
            let (mut here, mut cursor) = ([false; 120], 0);
            for (placed, offset, len) in chunks {
                // Half of the offsets are likely ones.
                let offset = if placed { Some(offset) } else { Some(offset / 20 * 20).filter(|o| *o != 40) };
                let start = offset.unwrap_or(cursor);
                let taken = q.take(offset, len);
                let range = start as usize..(start + len) as usize;
                let fits = range.end <= 120;
                let fresh = fits && here[range.clone()].iter().all(|byte| !byte);
                let connected = start % 20 == 0 || (fits && here[range.start - 1]);
                prop_assert_eq!(taken.is_ok(), fresh && connected);
                if taken.is_ok() {
                    here[range].fill(true);
                    cursor = start + len;
                }
                prop_assert_eq!(q.got, here.iter().filter(|byte| **byte).count() as u64);
                prop_assert!(q.runs.len() <= 6);
            }
        }
    }
}

//! Checksums of what mutations bring, by which one is told from another with its number (see [`attnd_plan::session::Ask::digest`]).
//!
//! They are over bytes in the order of the tensors, so that how these were cut into messages can't show.

use std::collections::BTreeMap;

use attnd_plan::Tensor;
use attnd_plan::session::SessionName;

use crate::checksum::{self, checksum};

/// Of all of K, continued over all of V.
pub fn of_rows(k: &[u8], v: &[u8]) -> u32 {
    checksum(&[k, v])
}

/// Of the name of a fork's child; of one that the coordinator shall name it is that of the empty name.
pub fn of_child(child: Option<&SessionName>) -> u32 {
    checksum(&[child.map_or("", SessionName::as_str).as_bytes()])
}

/// The checksum of rows that come in chunks of any size and order: the same as of all of K, continued over all of V.
#[derive(Clone, Debug, Default)]
pub struct RowsChecksum {
    /// Of K and of V, by where they begin: length and checksum of runs that don't touch.
    runs: [BTreeMap<u64, (u64, u32)>; 2],
}

impl RowsChecksum {
    /// Takes the checksum of `len` bytes of K or V from `offset` on. That no byte comes twice is for the caller to see to.
    pub fn add(&mut self, tensor: Tensor, offset: u64, len: u64, crc32c: u32) {
        let [keys, values] = &mut self.runs;
        let runs = if tensor == Tensor::V { values } else { keys };
        // Chunks of a head come front to back, so what is before grows, and there are as many runs as heads that have begun.
        let before = runs.range_mut(..offset).next_back();
        let grown = match before {
            Some((start, run)) if *start + run.0 == offset => {
                *run = joined(*run, (len, crc32c));
                (*start, *run)
            }
            _apart => {
                runs.insert(offset, (len, crc32c));
                (offset, (len, crc32c))
            }
        };
        let (start, run) = grown;
        if let Some(behind) = runs.remove(&(start + run.0)) {
            runs.insert(start, joined(run, behind));
        }
    }

    /// The checksum of what has come.
    pub fn finish(&self) -> u32 {
        let all = self.runs.iter().flat_map(BTreeMap::values).copied();
        all.fold((0, 0), joined).1
    }
}

/// Length and checksum of two runs, one behind the other.
fn joined(left: (u64, u32), right: (u64, u32)) -> (u64, u32) {
    (left.0 + right.0, checksum::joined(left.1, right.1, right.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn children_are_told_apart_by_name() {
        let name = |text: &str| SessionName::new(text).unwrap();
        assert_ne!(of_child(Some(&name("a"))), of_child(Some(&name("b"))));
        assert_eq!(of_child(None), 0);
    }

    proptest! {
        #[test]
        fn chunks_of_any_size_in_any_order_have_the_checksum_of_the_whole(
            k in proptest::collection::vec(any::<u8>(), 1..200),
            v in proptest::collection::vec(any::<u8>(), 0..200),
            cuts in proptest::collection::vec(1..40_usize, 20),
            order in any::<u64>(),
        ) {
            let mut chunks = Vec::new();
            for (tensor, bytes) in [(Tensor::K, &k), (Tensor::V, &v)] {
                let (mut at, mut cuts) = (0, cuts.iter().cycle());
                while at < bytes.len() {
                    let end = bytes.len().min(at + cuts.next().unwrap());
                    chunks.push((tensor, at, &bytes[at..end]));
                    at = end;
                }
            }
            chunks.sort_by_key(|(_, at, _)| order.rotate_left(*at as u32).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut sum = RowsChecksum::default();
            for (tensor, at, bytes) in chunks {
                sum.add(tensor, at as u64, bytes.len() as u64, checksum(&[bytes]));
            }
            prop_assert_eq!(sum.finish(), of_rows(&k, &v));
        }
    }
}

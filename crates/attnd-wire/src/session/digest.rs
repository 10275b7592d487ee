//! What tells one mutation of a session from another with its number: CRC32C over what it says, and over the bytes that come with it.
//!
//! A digest is over what a client said, not over what became of it, so that a mutation which comes again has the same one whatever
//! happened in between; and over bytes in the order of the tensors, so that how they were cut into messages can't show.

use std::collections::BTreeMap;

use attnd_plan::Tensor;
use attnd_plan::session::SessionName;

use crate::floats::checksum;

/// What of the digests begins with, so that none of one kind is one of another.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Append = 1,
    Truncate = 2,
    Fork = 3,
    Seal = 4,
}

/// Of `tokens` rows of a layer behind `base_len` tokens, if the client said so; `rows` is the checksum of K, continued over V.
pub fn append(layer: usize, base_len: Option<u64>, tokens: u64, rows: u32) -> u32 {
    let base_len = base_len.unwrap_or(u64::MAX).to_le_bytes();
    checksum(&[
        &[Kind::Append as u8],
        &(layer as u64).to_le_bytes(),
        &base_len,
        &tokens.to_le_bytes(),
        &rows.to_le_bytes(),
    ])
}

/// Of a cut to `len` tokens.
pub fn truncate(len: u64) -> u32 {
    checksum(&[&[Kind::Truncate as u8], &len.to_le_bytes()])
}

/// Of a fork; of one whose child the coordinator shall name it is that of the empty name.
pub fn fork(child: Option<&SessionName>) -> u32 {
    checksum(&[&[Kind::Fork as u8], child.map_or("", SessionName::as_str).as_bytes()])
}

/// Of the end of all appends.
pub fn seal() -> u32 {
    checksum(&[&[Kind::Seal as u8]])
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
    let len = usize::try_from(right.0).unwrap_or(usize::MAX);
    (left.0 + right.0, crc32c::crc32c_combine(left.1, right.1, len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_field_shows_and_no_two_kinds_are_equal() {
        let child = SessionName::new("a").unwrap();
        let digests = [
            append(0, Some(0), 1, 2),
            append(1, Some(0), 1, 2),
            append(0, None, 1, 2),
            append(0, Some(0), 2, 2),
            append(0, Some(0), 1, 3),
            truncate(0),
            truncate(1),
            fork(None),
            fork(Some(&child)),
            seal(),
        ];
        let different: std::collections::BTreeSet<_> = digests.iter().collect();
        assert_eq!(different.len(), digests.len());
        assert_eq!(append(0, Some(0), 1, 2), digests[0]);
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
            prop_assert_eq!(sum.finish(), checksum(&[&k, &v]));
        }
    }
}

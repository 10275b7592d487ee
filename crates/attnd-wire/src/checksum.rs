//! CRC32C of what travels, and bytes that carry theirs along.
//!
//! Rows pass through three programs. Whoever receives them looks at every byte; that a chunk is passed on whole, or is a part of
//! something that has a checksum of its own, is no reason to look again: sums of parts are [`joined`].

use std::ops::{Deref, Range};

use attnd_plan::omission::{Omission, omits};
use bytes::Bytes;

use crate::error::Error;
use crate::refusal;

/// CRC32C over several slices, one after the other.
pub(crate) fn checksum(parts: &[&[u8]]) -> u32 {
    parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part))
}

/// Whether it is this one.
pub(crate) fn has_checksum(parts: &[&[u8]], crc32c: u32) -> bool {
    agrees(checksum(parts), crc32c)
}

/// Whether the checksum of what is here is the one that was sent.
pub fn agrees(found: u32, sent: u32) -> bool {
    found == sent || omits(Omission::Checksum)
}

/// The checksum of two runs of bytes, one behind the other, from those of each and the length of the second.
///
/// Of one's own because that of the crc32c crate, which squares matrices, takes three times as long as reading 512 KiB does. In the ring of
/// polynomials over GF(2) modulo that of CRC32C, bits that come behind `left` multiply it by a power of x: as in Mark Adler's
/// `crc32_combine` since zlib 1.2.12.
pub fn joined(left: u32, right: u32, right_bytes: u64) -> u32 {
    let mut shifted = left;
    let (mut bytes, mut power) = (right_bytes, 0);
    while bytes != 0 {
        if bytes & 1 == 1 {
            shifted = product(POWERS[power], shifted);
        }
        bytes >>= 1;
        power = (power + 1) % POWERS.len();
    }
    shifted ^ right
}

/// The polynomial without its highest power, which is bit -1: the lowest powers are the highest bits.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// x to the power of 8 * 2^n. Squaring it 31 times more gives the same again, as the polynomial has a factor of degree 31 and the
/// factor x + 1.
const POWERS: [u32; 31] = {
    let mut powers = [1 << (31 - 8); 31];
    let mut n = 1;
    while n < powers.len() {
        powers[n] = product(powers[n - 1], powers[n - 1]);
        n += 1;
    }
    powers
};

/// The product of two polynomials.
const fn product(a: u32, mut b: u32) -> u32 {
    let mut sum = 0;
    let mut bit = 1 << 31;
    while bit != 0 {
        if a & bit != 0 {
            sum ^= b;
        }
        b = if b & 1 == 1 { b >> 1 ^ POLYNOMIAL } else { b >> 1 };
        bit >>= 1;
    }
    sum
}

/// Bytes with their CRC32C. It is made or compared where they come from, and passed on with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksummed {
    data: Bytes,
    crc32c: u32,
}

impl Checksummed {
    /// Bytes that were made here.
    pub fn new(data: Bytes) -> Self {
        Self { crc32c: checksum(&[&data]), data }
    }

    /// Bytes that came as the chunk with this number, with the checksum that was sent for them.
    ///
    /// # Errors
    /// [`crate::Reason::Checksum`].
    pub(crate) fn received(index: u32, data: Bytes, sent: u32) -> Result<Self, Error> {
        let received = Self::new(data);
        if received.crc32c == sent { Ok(received) } else { Err(refusal::checksum(index)) }
    }

    /// A part of them, which shares their memory.
    ///
    /// # Panics
    /// If the range isn't inside.
    pub fn slice(&self, range: Range<usize>) -> Self {
        if range == (0..self.data.len()) { self.clone() } else { Self::new(self.data.slice(range)) }
    }

    /// The checksum.
    pub fn crc32c(&self) -> u32 {
        self.crc32c
    }

    /// The bytes alone.
    pub fn into_data(self) -> Bytes {
        self.data
    }
}

impl From<Bytes> for Checksummed {
    fn from(data: Bytes) -> Self {
        Self::new(data)
    }
}

impl From<Vec<u8>> for Checksummed {
    fn from(data: Vec<u8>) -> Self {
        Self::new(data.into())
    }
}

impl Deref for Checksummed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.data
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_checksum_continues_over_parts() {
        // The check value of CRC32C, from RFC 3720's polynomial.
        assert_eq!(checksum(&[b"123456789"]), 0xe306_9283);
        assert_eq!(checksum(&[b"1234", b"", b"56789"]), 0xe306_9283);
    }

    #[test]
    fn a_part_shares_memory_and_all_of_it_keeps_its_checksum() {
        let all = Checksummed::from(b"123456789".to_vec());
        assert_eq!(all.slice(0..9), all);
        let part = all.slice(4..9);
        assert_eq!((part.as_ptr(), part.crc32c()), (all[4..].as_ptr(), checksum(&[b"56789"])));
        let refused = Checksummed::received(3, part.clone().into_data(), all.crc32c()).unwrap_err();
        assert_eq!(refused, refusal::checksum(3));
        assert_eq!(Checksummed::received(3, part.clone().into_data(), part.crc32c()), Ok(part));
    }

    #[test]
    fn long_runs_are_joined_as_the_library_does_it() {
        assert_eq!(joined(7, 0, 0), 7);
        // The last ones have bits beyond those that powers are listed for.
        for len in [1, 255, 512 << 10, (5 << 30) + 77, (1 << 35) + 1, usize::MAX] {
            for (left, right) in [(0, 0), (1, 0), (0xe306_9283, 0x1234_5678), (u32::MAX, u32::MAX)] {
                assert_eq!(
                    joined(left, right, len as u64),
                    crc32c::crc32c_combine(left, right, len),
                    "{len}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn sums_of_parts_join_to_that_of_the_whole(
            data in proptest::collection::vec(any::<u8>(), 0..3000), at in any::<prop::sample::Index>(),
        ) {
            let (left, right) = data.split_at(at.index(data.len() + 1));
            prop_assert_eq!(joined(checksum(&[left]), checksum(&[right]), right.len() as u64), checksum(&[&data]));
        }
    }
}

//! An append on its way in chunks: rows that are written where nobody sees them until all of them are here.
//!
//! The chunks of a head come front to back, in any order among heads, and end anywhere between two elements. What is there of a row
//! that a chunk cuts waits here; all else goes straight into pages.

use attnd_kernel::slot::{PAGE_KEYS, slot_of_page};
use attnd_plan::omission::{Omission, omits};
use attnd_plan::{AnyTensor, Tensor};
use attnd_wire::checksum::joined;
use attnd_wire::hold::ShardAppend;
use attnd_wire::{Commit, Error, Reason, SliceChunk};

use super::memory::Claim;
use super::pages::{Pages, PagesError};

/// Names an append in chunks: which stream it comes on, and under which number.
pub(crate) type BulkId = (u64, u64);

/// The claim on memory shrinks after so many chunks.
const SHRINK_EVERY: u32 = 16;

/// What is there of an append.
#[derive(Debug)]
pub(crate) struct Staged {
    id: BulkId,
    append: ShardAppend,
    claim: Claim,
    /// What was claimed at first.
    needed: u64,
    chunks: u32,
    bytes: u64,
    bytes_expected: u64,
    /// Of each kv head of each piece.
    heads: Vec<[Arriving; 2]>,
}

/// Rows of K, or of V, of one head.
#[derive(Clone, Debug, Default)]
struct Arriving {
    crc32c: u32,
    bytes: usize,
    /// The beginning of a row.
    cut: Vec<u8>,
}

impl Staged {
    /// Nothing yet of an append that fits the shard.
    pub(crate) fn new(id: BulkId, append: ShardAppend, pages: &Pages, claim: Claim) -> Self {
        let (k, v) = pages.sent_bytes(&(append.base_len..append.base_len + append.tokens));
        let heads = pages.heads().iter().map(|_place| Default::default()).collect();
        let needed = claim.bytes();
        Self { id, append, claim, needed, chunks: 0, bytes: 0, bytes_expected: k + v, heads }
    }

    pub(crate) fn id(&self) -> BulkId {
        self.id
    }

    pub(crate) fn append(&self) -> &ShardAppend {
        &self.append
    }

    /// Memory that the whole append takes, in bytes.
    pub(crate) fn needed(&self) -> u64 {
        self.needed
    }

    /// Writes the next chunk, which lies inside of the matrix of its head.
    ///
    /// # Errors
    /// What pages refuse, or what is wrong with its place; nothing more can come of the append.
    pub(crate) fn take(
        &mut self,
        pages: &mut Pages,
        chunk: &SliceChunk,
    ) -> Result<(), Result<PagesError, Error>> {
        if chunk.index != self.chunks {
            let detail = format!("expected {}, got {}", self.chunks, chunk.index);
            return Err(Err(Error::new(Reason::ChunkOrder, detail)));
        }
        let tensor = match chunk.tensor {
            AnyTensor::Operand(tensor) => tensor,
            AnyTensor::Side(side) => {
                return Err(Err(Error::new(Reason::Tensor, format!("{side} of a session"))));
            }
        };
        let row_bytes = pages.row_bytes(tensor);
        if row_bytes == 0 {
            return Err(Err(Error::new(Reason::Tensor, format!("{tensor} of a session without"))));
        }
        let ShardAppend { layer, base_len, .. } = self.append;
        let mut data = &chunk.data[..];
        let mut expected = self.expected(pages, tensor, chunk.head, row_bytes);
        if expected.map(|(_, offset)| offset) != Some(chunk.offset) {
            let expected = expected.map_or("none".to_owned(), |(_, offset)| offset.to_string());
            let detail =
                format!("{tensor} head {}: expected offset {expected}, got {}", chunk.head, chunk.offset);
            return Err(Err(Error::new(Reason::ChunkOrder, detail)));
        }
        let mut places = pages
            .heads()
            .iter()
            .enumerate()
            .filter(|(_, place)| place.kv_head == chunk.head)
            .map(|(at, _)| at);
        // All of the chunk goes there, so the checksum that it came with does for what arrives. Where a head has more places, what each
        // gets is summed anew.
        let only = places.next().filter(|_| places.next().is_none());
        while !data.is_empty() {
            let done = chunk.offset + (chunk.data.len() - data.len()) as u64;
            let Some((head, _)) = expected.filter(|(_, offset)| *offset == done) else {
                let token = base_len as u64 + done / row_bytes as u64;
                let detail = format!("{tensor} head {} token {token} is not in this shard", chunk.head);
                return Err(Err(Error::new(Reason::Pieces, detail)));
            };
            let token = base_len + (done / row_bytes as u64) as usize;
            let arriving = &mut self.heads[head][usize::from(tensor == Tensor::V)];
            let check_finite = !self.append.allow_non_finite;
            let mut write = |rows: &[u8]| pages.write(layer, head, tensor, rows, check_finite).map_err(Ok);
            let now;
            if arriving.cut.is_empty() && data.len() >= row_bytes {
                let of_page = (PAGE_KEYS - token % PAGE_KEYS) * row_bytes;
                (now, data) = data.split_at(data.len().min(of_page) / row_bytes * row_bytes);
                write(now)?;
            } else {
                (now, data) = data.split_at(data.len().min(row_bytes - arriving.cut.len()));
                arriving.cut.extend_from_slice(now);
                if arriving.cut.len() == row_bytes {
                    write(&arriving.cut)?;
                    arriving.cut.clear();
                }
            }
            if only.is_none() {
                arriving.crc32c = crc32c::crc32c_append(arriving.crc32c, now);
            }
            arriving.bytes += now.len();
            expected = self.expected(pages, tensor, chunk.head, row_bytes);
        }
        if let Some(only) = only {
            let arriving = &mut self.heads[only][usize::from(tensor == Tensor::V)];
            arriving.crc32c = joined(arriving.crc32c, chunk.data.crc32c(), chunk.data.len() as u64);
        }
        self.chunks += 1;
        self.bytes += chunk.data.len() as u64;
        if self.chunks.is_multiple_of(SHRINK_EVERY) {
            self.claim.shrink(pages.growth_bytes(layer, self.append.tokens));
        }
        Ok(())
    }

    /// Of a kv head, which of its places has the next byte, and where that is in the head's matrix.
    fn expected(
        &self,
        pages: &Pages,
        tensor: Tensor,
        kv_head: usize,
        row_bytes: usize,
    ) -> Option<(usize, u64)> {
        let ShardAppend { layer, base_len, tokens, .. } = self.append;
        let places = pages.heads().iter().enumerate().filter(|(_, place)| place.kv_head == kv_head);
        let next = places.filter_map(|(at, place)| {
            let row = pages.next_row(layer, at, tensor).filter(|row| *row < base_len + tokens)?;
            debug_assert!(place.slots.contains(&slot_of_page(row / PAGE_KEYS)));
            Some((row, at))
        });
        let (row, at) = next.min()?;
        let cut = self.heads[at][usize::from(tensor == Tensor::V)].cut.len();
        Some((at, ((row - base_len) * row_bytes + cut) as u64))
    }

    /// The checksum of all that came, k of all heads and then v, if that is all that is announced.
    ///
    /// # Errors
    /// [`Reason::ChunkOrder`] and [`Reason::PayloadLength`].
    pub(crate) fn content(&self, commit: Commit) -> Result<u32, Error> {
        if omits(Omission::Commit) {
            return Ok(0);
        }
        if commit.chunks != self.chunks {
            let detail = format!("commit declares {} chunks, got {}", commit.chunks, self.chunks);
            return Err(Error::new(Reason::ChunkOrder, detail));
        }
        if commit.bytes != self.bytes {
            return Err(Error::new(
                Reason::PayloadLength,
                format!("declared {}, got {}", commit.bytes, self.bytes),
            ));
        }
        if self.bytes != self.bytes_expected {
            let detail = format!("shape needs {}, payload {}", self.bytes_expected, self.bytes);
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        let of = |which: usize| self.heads.iter().map(move |head| &head[which]);
        let all = of(0).chain(of(1));
        Ok(all.fold(0, |crc, part| joined(crc, part.crc32c, part.bytes as u64)))
    }
}

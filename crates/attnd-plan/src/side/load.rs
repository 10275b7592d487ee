//! What side tensors cost an interval of the planner's line: bytes on the way to the worker, and bytes in its memory.
//!
//! The planner asks for very many intervals, and there may be a thousand planes, so nothing here walks over planes or
//! groups: an interval has at most three pieces, whole groups and the ends of two others.

use std::ops::Range;

use attnd_kernel::AttnShape;
use attnd_kernel::slot::N_SLOTS;

use super::{SideLayout, SideTensor};
use crate::planner::Piece;

/// One side tensor, as the planner sees it.
#[derive(Debug)]
pub(crate) struct SideLoad {
    layout: SideLayout,
    n_kv_heads: usize,
    /// Planes that the heads of a kv group look at.
    planes_per_group: u64,
    /// Bytes of a plane before each slot, as they travel, where it is cut by slots; the last entry is the whole plane.
    sent_before: [u64; N_SLOTS + 1],
    /// The same in the memory of a worker.
    resident_before: [u64; N_SLOTS + 1],
}

impl SideLoad {
    pub(crate) fn new(layout: &SideLayout, shape: &AttnShape) -> Self {
        let (mut sent_before, mut resident_before) = ([0; N_SLOTS + 1], [0; N_SLOTS + 1]);
        if layout.tensor.is_along_keys() {
            for slot in 0..N_SLOTS {
                let slots = slot..slot + 1;
                sent_before[slot + 1] = sent_before[slot] + layout.sent_bytes(&slots);
                resident_before[slot + 1] = resident_before[slot] + layout.resident_in_slots(&slots, shape);
            }
        } else {
            // Nothing else is asked of what goes whole.
            sent_before[N_SLOTS] = layout.sent_bytes(&(0..N_SLOTS));
            resident_before[N_SLOTS] = layout.resident_in_slots(&(0..N_SLOTS), shape);
        }
        Self {
            layout: *layout,
            n_kv_heads: shape.n_kv_heads(),
            planes_per_group: layout.planes_per_group(shape) as u64,
            sent_before,
            resident_before,
        }
    }

    /// Whether keys or values are made of it.
    pub(crate) fn is_of_projection(&self) -> bool {
        !SideTensor::OF_SCORES.contains(&self.layout.tensor)
    }

    /// Bytes that travel to the worker of these pieces of an interval.
    pub(crate) fn sent(&self, pieces: &[Piece]) -> u64 {
        self.sum(pieces, &self.sent_before)
    }

    /// Bytes that they take in its memory.
    pub(crate) fn resident(&self, pieces: &[Piece]) -> u64 {
        self.sum(pieces, &self.resident_before)
    }

    fn sum(&self, pieces: &[Piece], before: &[u64; N_SLOTS + 1]) -> u64 {
        let of_slots = |slots: &Range<usize>| {
            if self.layout.tensor.is_along_keys() {
                before[slots.end] - before[slots.start]
            } else {
                before[N_SLOTS]
            }
        };
        let is_whole = |piece: &&Piece| piece.slots == (0..N_SLOTS);
        let whole = pieces.iter().find(is_whole).map_or(0..0, |piece| piece.groups.clone());
        let mut bytes = self.stacks(&whole) * before[N_SLOTS];
        // The ends of groups, each of one group; two may look at the same planes.
        let mut end: Option<&Piece> = None;
        for piece in pieces.iter().filter(|piece| !is_whole(piece)) {
            if self.has_stack(&whole, piece.groups.start) {
                continue;
            }
            bytes += of_slots(&piece.slots);
            if let Some(other) = end.replace(piece)
                && self.is_same_stack(other.groups.start, piece.groups.start)
            {
                let (a, b) = (&other.slots, &piece.slots);
                let both = a.start.max(b.start)..a.end.min(b.end);
                let is_twice = !both.is_empty() || !self.layout.tensor.is_along_keys();
                bytes -= if is_twice { of_slots(&both) } else { 0 };
            }
        }
        bytes * self.planes_per_group
    }

    /// How many different stacks of planes these groups look at.
    fn stacks(&self, groups: &Range<usize>) -> u64 {
        let n = self.n_kv_heads;
        let stacks = match (self.layout.batch, self.layout.heads) {
            _ if groups.is_empty() => 0,
            (1, 1) => 1,
            (1, _) => groups.len().min(n),
            (_, 1) => (groups.end - 1) / n - groups.start / n + 1,
            (_, _) => groups.len(),
        };
        stacks as u64
    }

    fn is_same_stack(&self, a: usize, b: usize) -> bool {
        let n = self.n_kv_heads;
        (self.layout.batch == 1 || a / n == b / n) && (self.layout.heads == 1 || a % n == b % n)
    }

    /// Whether one of these groups looks at the same planes as `group`.
    fn has_stack(&self, groups: &Range<usize>, group: usize) -> bool {
        let n = self.n_kv_heads;
        let alike = match (self.layout.batch, self.layout.heads) {
            (1, 1) => groups.start,
            // The first from there on with the same head, or of the same batch element.
            (1, _) => groups.start + (group % n + n - groups.start % n) % n,
            (_, 1) => groups.start.max(group / n * n),
            (_, _) => group,
        };
        groups.contains(&alike) && self.is_same_stack(alike, group)
    }
}

//! Which bytes of Q, K and V go to which share.
//!
//! K and V have one owner per byte: the share that holds the page's slot of that kv group. Q goes to every share that
//! holds any slot of its group. The answer depends on the byte's place in its tensor only, so any chunking of a
//! stream routes the same bytes to the same places.

use std::ops::Range;

use attnd_kernel::AttnShape;
use attnd_kernel::slot::{self, PAGE_KEYS};

use crate::Tensor;
use crate::planner::{Piece, Plan};

/// A run of consecutive bytes of one head that goes to one share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index into [`Plan::shares`].
    pub share: usize,
    /// Query head for Q, kv head for K and V, flattened over the batch.
    pub head: usize,
    /// Where the run begins in that head's `[tokens, dim]` matrix, in bytes.
    pub head_offset: u64,
    /// The run, inside of the chunk that was routed.
    pub bytes: Range<usize>,
}

/// Routes the bytes of one call.
#[derive(Clone, Debug)]
pub struct Router {
    shape: AttnShape,
    dtype_bytes: usize,
    /// Position of the first key that comes.
    first_key: usize,
    /// Of each kv group: slot ranges and the shares they belong to, ascending by slot.
    owners: Vec<Vec<(Range<usize>, usize)>>,
}

impl Router {
    /// A router for the shares of `plan`; elements have `dtype_bytes` on the wire.
    pub fn new(plan: &Plan, shape: &AttnShape, dtype_bytes: usize) -> Self {
        Self::of_append(plan.shares.iter().map(|share| &share.pieces[..]), shape, dtype_bytes, 0)
    }

    /// A router for keys and values that are appended to `first_key` others: `shape` has those that come. Shares have these pieces.
    pub fn of_append<'a>(
        shares: impl Iterator<Item = &'a [Piece]>,
        shape: &AttnShape,
        dtype_bytes: usize,
        first_key: usize,
    ) -> Self {
        let mut owners = vec![Vec::new(); shape.n_groups()];
        for (share, pieces) in shares.enumerate() {
            for piece in pieces {
                for owner in owners.iter_mut().skip(piece.groups.start).take(piece.groups.len()) {
                    owner.push((piece.slots.clone(), share));
                }
            }
        }
        for owner in &mut owners {
            owner.sort_by_key(|(slots, _)| slots.start);
        }
        Self { shape: *shape, dtype_bytes: dtype_bytes.max(1), first_key, owners }
    }

    /// Where the `len` bytes from `offset` of the whole tensor go, ascending; a byte of Q appears once per share
    /// that needs it. Bytes past the end of the tensor go nowhere.
    pub fn route(&self, tensor: Tensor, offset: u64, len: usize) -> Vec<Run> {
        let (heads, tokens, dim) = tensor.layout(&self.shape);
        let row_bytes = (dim * self.dtype_bytes) as u64;
        let head_bytes = tokens as u64 * row_bytes;
        let mut runs = Vec::new();
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let head = match usize::try_from(at / head_bytes) {
                Ok(head) if head < heads => head,
                _ => break,
            };
            let head_offset = at % head_bytes;
            let in_head =
                usize::try_from(head_bytes - head_offset).map_or(len - done, |left| left.min(len - done));
            let bytes = done..done + in_head;
            match tensor {
                Tensor::Q => self.query_runs(head, head_offset, bytes, &mut runs),
                Tensor::K | Tensor::V => self.key_runs(head, head_offset, bytes, row_bytes, &mut runs),
            }
            done += in_head;
        }
        runs
    }

    fn owners_of(&self, group: usize) -> &[(Range<usize>, usize)] {
        self.owners.get(group).map_or(&[], Vec::as_slice)
    }

    fn query_runs(&self, head: usize, head_offset: u64, bytes: Range<usize>, runs: &mut Vec<Run>) {
        let mut shares: Vec<usize> =
            self.owners_of(head / self.shape.group_size()).iter().map(|(_, share)| *share).collect();
        shares.sort_unstable();
        shares.dedup();
        runs.extend(shares.into_iter().map(|share| Run { share, head, head_offset, bytes: bytes.clone() }));
    }

    fn key_runs(
        &self,
        head: usize,
        head_offset: u64,
        bytes: Range<usize>,
        row_bytes: u64,
        runs: &mut Vec<Run>,
    ) {
        let owners = self.owners_of(head);
        if let [(_, share)] = owners {
            runs.push(Run { share: *share, head, head_offset, bytes });
            return;
        }
        let page_bytes = PAGE_KEYS as u64 * row_bytes;
        let first_of_head = runs.len();
        let mut done = 0;
        while done < bytes.len() {
            let at = head_offset + done as u64;
            let in_sequence = self.first_key as u64 * row_bytes + at;
            let left_of_page = (page_bytes - in_sequence % page_bytes) as usize;
            let end = (done + left_of_page).min(bytes.len());
            let run = bytes.start + done..bytes.start + end;
            done = end;
            let slot = slot::slot_of_page((in_sequence / page_bytes) as usize);
            let Some((_, share)) = owners.iter().find(|(slots, _)| slots.contains(&slot)) else { continue };
            match runs.get_mut(first_of_head..).and_then(<[Run]>::last_mut) {
                Some(last) if last.share == *share && last.bytes.end == run.start => last.bytes.end = run.end,
                _ => runs.push(Run { share: *share, head, head_offset: at, bytes: run }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::planner::tests::{any_call, planned};

    proptest! {
        #[test]
        fn every_byte_goes_where_it_is_computed(
            call in any_call(),
            dtype_bytes in prop_oneof![Just(2usize), Just(4)],
            first_key in prop_oneof![Just(0usize), 0usize..20_000],
        ) {
            let Some((shape, plan)) = planned(&call, 1 << 14) else { return Ok(()) };
            let pieces = plan.shares.iter().map(|share| &share.pieces[..]);
            let router = Router::of_append(pieces, &shape, dtype_bytes, first_key);
            for tensor in Tensor::ALL {
                let (heads, tokens, dim) = tensor.layout(&shape);
                let row_bytes = dim * dtype_bytes;
                let total = tensor.bytes(&shape, dtype_bytes) as usize;
                let whole = router.route(tensor, 0, total);
                // Bytes of each token, by the share they went to.
                let mut got = std::collections::BTreeMap::<(usize, usize, usize), usize>::new();
                for run in &whole {
                    prop_assert_eq!(run.bytes.start, run.head * tokens * row_bytes + run.head_offset as usize);
                    let mut at = run.head_offset as usize;
                    let end = at + run.bytes.len();
                    while at < end {
                        let next = end.min(at - at % row_bytes + row_bytes);
                        *got.entry((run.head, at / row_bytes, run.share)).or_default() += next - at;
                        at = next;
                    }
                }
                for head in 0..heads {
                    for token in 0..tokens {
                        let wanted: Vec<usize> = (0..plan.shares.len())
                            .filter(|share| plan.shares[*share].pieces.iter().any(|piece| match tensor {
                                Tensor::Q => piece.groups.contains(&(head / shape.group_size())),
                                Tensor::K | Tensor::V => piece.groups.contains(&head)
                                    && piece.slots.contains(&slot::slot_of_page((first_key + token) / PAGE_KEYS)),
                            }))
                            .collect();
                        prop_assert!(tensor == Tensor::Q || wanted.len() == 1);
                        for share in wanted {
                            prop_assert_eq!(got.remove(&(head, token, share)), Some(row_bytes));
                        }
                    }
                }
                prop_assert!(got.is_empty(), "{:?} went to shares that don't need them", got);
            }
        }

        #[test]
        fn chunking_changes_nothing(call in any_call(), sizes in proptest::collection::vec(1usize..5000, 1..20)) {
            let Some((shape, plan)) = planned(&call, 1 << 14) else { return Ok(()) };
            let router = Router::new(&plan, &shape, 4);
            for tensor in Tensor::ALL {
                let total = tensor.bytes(&shape, 4) as usize;
                let place = |run: &Run, chunk: usize| {
                    (run.share, run.head, run.head_offset, chunk + run.bytes.start..chunk + run.bytes.end)
                };
                let mut whole: Vec<_> = router.route(tensor, 0, total).iter().map(|run| place(run, 0)).collect();
                whole.sort_by_key(|run| (run.0, run.1, run.2));
                let mut pieces = Vec::new();
                let mut at = 0;
                for size in sizes.iter().cycle() {
                    let len = (*size).min(total - at);
                    pieces.extend(router.route(tensor, at as u64, len).iter().map(|run| place(run, at)));
                    at += len;
                    if at == total { break }
                }
                pieces.sort_by_key(|run| (run.0, run.1, run.2));
                // Join what a chunk boundary cut in two.
                let mut joined: Vec<(usize, usize, u64, Range<usize>)> = Vec::new();
                for run in pieces {
                    match joined.last_mut() {
                        Some(last) if (last.0, last.1) == (run.0, run.1)
                            && last.2 + last.3.len() as u64 == run.2 && last.3.end == run.3.start => last.3.end = run.3.end,
                        _ => joined.push(run),
                    }
                }
                prop_assert_eq!(joined, whole);
                prop_assert!(router.route(tensor, total as u64, 10).is_empty());
            }
        }
    }
}

//! What changes a session.

use crate::WorkerId;

/// One change of a session. Ops are told apart by number and digest, so that one which comes again is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Op {
    /// From 1, without a gap, over all ops of a session, whoever writes.
    pub seq: u64,
    /// Of what it says and of the bytes that come with it; equal ops have equal ones.
    pub digest: u32,
    /// What it does.
    pub change: Change,
}

/// What an op does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// Rows of one layer, behind those that it has.
    Append {
        /// Which layer.
        layer: usize,
        /// Tokens that it has before.
        base_len: usize,
        /// Tokens to come, at least one.
        tokens: usize,
    },
    /// Cuts every layer that has more tokens to this many, and begins a new generation.
    Truncate {
        /// Tokens that stay.
        len: usize,
    },
    /// Another session with the same tokens.
    Fork {
        /// Its number, which is not 0.
        child: u64,
    },
    /// No more appends or cuts.
    Seal,
}

impl Change {
    /// Whether it can be taken back, and so whether a replica may refuse it for what it has in memory or for what the rows are.
    pub fn is_undoable(&self) -> bool {
        matches!(self, Self::Append { .. })
    }

    /// Does it to the tokens of each layer; returns what is said of it. A layer that isn't there stays so.
    pub(super) fn apply(&self, tokens: &mut [usize], generation: &mut u64, sealed: &mut bool) -> Answer {
        let mut child = None;
        let len = match *self {
            Self::Append { layer, base_len, tokens: more } => {
                let len = base_len.saturating_add(more);
                if let Some(have) = tokens.get_mut(layer) {
                    *have = len;
                }
                len
            }
            Self::Truncate { len } => {
                for have in tokens.iter_mut() {
                    *have = len.min(*have);
                }
                *generation += 1;
                longest(tokens)
            }
            Self::Fork { child: number } => {
                child = Some(number);
                longest(tokens)
            }
            Self::Seal => {
                *sealed = true;
                longest(tokens)
            }
        };
        Answer { len, generation: *generation, child }
    }
}

/// Tokens of the longest layer.
pub(super) fn longest(tokens: &[usize]) -> usize {
    tokens.iter().copied().max().unwrap_or(0)
}

/// What is said of an op that was applied, now and whenever it comes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    /// Tokens of the layer that was appended to; of the longest layer for other changes.
    pub len: usize,
    /// After the op.
    pub generation: u64,
    /// The number of the session that a fork made.
    pub child: Option<u64>,
}

/// An op that was applied, as it is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// Its number.
    pub seq: u64,
    /// Its digest.
    pub digest: u32,
    /// What was said of it.
    pub answer: Answer,
}

/// A life of a worker: what a shard's replica is on, and ends with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Holder {
    /// Which worker.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: u64,
}

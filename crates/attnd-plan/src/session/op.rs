//! What changes a session.

use crate::WorkerId;

/// One change of a session. Ops are told apart by number and digest, so that one which comes again is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        /// Its number.
        child: u64,
    },
    /// No more appends or cuts.
    Seal,
}

/// A life of a worker: what a shard's replica is on, and ends with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Holder {
    /// Which worker.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: u64,
}

//! One replica of a shard, as the worker that holds it sees it: which op comes next, what becomes of one that comes again, and which
//! coordinator may ask for it.
//!
//! Whoever holds the rows asks [`Replica::begin`], writes, and says so with [`Replica::apply`]; a write that fails is one that never
//! began. Requests of another epoch than the replica's are refused, so that nobody who was left out of the shard can change it or be
//! counted in it.

use std::collections::VecDeque;

pub use self::refusal::ReplicaRefusal;
use super::op::{Change, Op, Record, longest};
use super::window::{KEPT, Known, Window};
use crate::omission::{Omission, omits};

mod refusal;

/// Whether an op shall be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next one: write, then [`Replica::apply`].
    Apply,
    /// It was applied before: the state is its answer.
    Replayed,
}

/// What undoing an op did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undone {
    /// It was the last op. Layer `layer` has `len` tokens again.
    TakenBack {
        /// Which layer.
        layer: usize,
        /// Tokens that it has now.
        len: usize,
    },
    /// It never was applied here: nothing to take back.
    NeverArrived,
}

/// What a replica has: the answer to everything that changes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ReplicaState {
    /// Of the shard, as the replica knows it.
    pub epoch: u64,
    /// Of the session: cuts so far.
    pub generation: u64,
    /// Of the last op.
    pub op_seq: u64,
    /// Of all ops from the first on, and of the bytes that came with them; equal replicas have equal ones.
    pub chain: u32,
    /// What the chain was before the last op.
    pub chain_before: u32,
    /// The last op; none before the first, and none behind one that was undone.
    pub last: Option<Op>,
    /// Tokens of each layer.
    pub tokens: Vec<usize>,
    /// Nothing can be appended or cut any more.
    pub sealed: bool,
}

/// All that a replica is but its rows, for another worker that gets these too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaSnapshot {
    /// What it has.
    pub state: ReplicaState,
    /// Its last ops, oldest first.
    pub records: Vec<Record>,
    /// What the chain was behind each of them.
    pub chains: Vec<u32>,
}

/// The worker's side of one shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    epoch: u64,
    generation: u64,
    tokens: Vec<usize>,
    sealed: bool,
    window: Window,
    chain: u32,
    chain_before: u32,
    last: Option<Op>,
    /// What the chain was behind each op that the window keeps.
    chains: VecDeque<u32>,
}

impl Replica {
    /// An empty replica of a shard with so many layers.
    pub fn new(layers: usize, epoch: u64) -> Self {
        Self {
            epoch,
            generation: 0,
            tokens: vec![0; layers],
            sealed: false,
            window: Window::default(),
            chain: 0,
            chain_before: 0,
            last: None,
            chains: VecDeque::new(),
        }
    }

    /// The child's replica: the same tokens, its own ops from 1. Taken once the fork has been applied here, so that the chains of
    /// children are equal where those of their parents are.
    pub fn fork(&self) -> Self {
        let (tokens, chain) = (self.tokens.clone(), self.chain);
        Self { tokens, chain, chain_before: chain, ..Self::new(0, 1) }
    }

    /// What it has.
    pub fn state(&self) -> ReplicaState {
        ReplicaState {
            epoch: self.epoch,
            generation: self.generation,
            op_seq: self.window.last(),
            chain: self.chain,
            chain_before: self.chain_before,
            last: self.last,
            tokens: self.tokens.clone(),
            sealed: self.sealed,
        }
    }

    /// Whether nothing was ever applied to it.
    pub fn is_untouched(&self) -> bool {
        self.window.last() == 0 && self.chain == 0 && self.tokens.iter().all(|tokens| *tokens == 0)
    }

    /// Tokens of each layer.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// Of the shard, as the replica knows it.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Its last ops, at most 1,024, oldest first.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        self.window.records()
    }

    /// What another worker needs beside the rows.
    pub fn snapshot(&self) -> ReplicaSnapshot {
        ReplicaSnapshot {
            state: self.state(),
            records: self.window.kept().collect(),
            chains: self.chains.iter().copied().collect(),
        }
    }

    /// A replica with the history of another one, whose rows this worker has now too.
    ///
    /// # Errors
    /// [`ReplicaRefusal::Snapshot`] if its records don't reach its last op.
    pub fn restore(snapshot: &ReplicaSnapshot) -> Result<Self, ReplicaRefusal> {
        let ReplicaSnapshot { state, records, chains } = snapshot;
        let window = Window::of(state.op_seq, records);
        let kept = window.kept().count();
        if kept != records.len() || chains.len() != records.len() || !window.is_whole() {
            return Err(ReplicaRefusal::Snapshot { records: records.len(), op_seq: state.op_seq });
        }
        if chains.last().is_some_and(|chain| *chain != state.chain) {
            return Err(ReplicaRefusal::Snapshot { records: records.len(), op_seq: state.op_seq });
        }
        Ok(Self {
            epoch: state.epoch,
            generation: state.generation,
            tokens: state.tokens.clone(),
            sealed: state.sealed,
            window,
            chain: state.chain,
            chain_before: state.chain_before,
            last: state.last,
            chains: chains.iter().copied().collect(),
        })
    }

    /// Whether this replica's history goes through that of one whose last op and chain these are. Then that one lacks nothing but
    /// what came later, and within the same generation only rows.
    pub fn continues(&self, op_seq: u64, chain: u32) -> bool {
        let behind = self.window.last().checked_sub(op_seq).and_then(|behind| usize::try_from(behind).ok());
        let index = behind.and_then(|behind| self.chains.len().checked_sub(behind + 1));
        index.and_then(|index| self.chains.get(index)) == Some(&chain)
    }

    /// Looks at an op of the coordinator's generation, which is that before the op.
    ///
    /// # Errors
    /// If it isn't the next one, nor one of the last 1,024, or can't be applied; nothing has changed then.
    pub fn begin(&self, epoch: u64, generation: u64, op: &Op) -> Result<Verdict, ReplicaRefusal> {
        self.check_epoch(epoch)?;
        match self.window.look(op.seq) {
            Known::Applied(record) if record.digest == op.digest => return Ok(Verdict::Replayed),
            Known::Applied(_) => return Err(ReplicaRefusal::SeqReused { seq: op.seq }),
            Known::Forgotten { oldest } => return Err(ReplicaRefusal::SeqOld { seq: op.seq, oldest }),
            Known::New => {}
        }
        let expected = self.window.last() + 1;
        if op.seq != expected {
            return Err(ReplicaRefusal::SeqGap { expected, got: op.seq });
        }
        self.check_generation(generation)?;
        match op.change {
            Change::Append { .. } | Change::Truncate { .. } if self.sealed => Err(ReplicaRefusal::Sealed),
            Change::Append { layer, base_len, tokens } => {
                let committed = self.tokens_of(layer)?;
                if base_len != committed {
                    return Err(ReplicaRefusal::Length { committed, base_len });
                }
                if tokens == 0 {
                    return Err(ReplicaRefusal::NoTokens);
                }
                let len = committed.checked_add(tokens);
                len.map(|_len| Verdict::Apply).ok_or(ReplicaRefusal::Full { committed, tokens })
            }
            Change::Truncate { len } if len > longest(&self.tokens) => {
                Err(ReplicaRefusal::AtLen { at_len: len, len: longest(&self.tokens) })
            }
            Change::Truncate { .. } | Change::Fork { .. } | Change::Seal => Ok(Verdict::Apply),
        }
    }

    /// The op that [`Replica::begin`] said to apply has been written; `content_crc` is that of the bytes that came to this shard, 0 for
    /// none.
    pub fn apply(&mut self, op: &Op, content_crc: u32) {
        let answer = op.change.apply(&mut self.tokens, &mut self.generation, &mut self.sealed);
        self.window.push(op.digest, answer);
        self.chain_before = self.chain;
        self.chain = link(self.chain, op, content_crc);
        self.last = Some(*op);
        self.chains.push_back(self.chain);
        if self.chains.len() > KEPT {
            self.chains.pop_front();
        }
    }

    /// Takes back an append that another replica refused, so that nobody was told of it.
    ///
    /// # Errors
    /// If ops came after it, or it is no append; nothing has changed then.
    pub fn undo(&mut self, epoch: u64, seq: u64, digest: u32) -> Result<Undone, ReplicaRefusal> {
        self.check_epoch(epoch)?;
        match self.window.look(seq) {
            Known::New => return Ok(Undone::NeverArrived),
            Known::Forgotten { oldest } => return Err(ReplicaRefusal::SeqOld { seq, oldest }),
            Known::Applied(record) if record.digest != digest => return Ok(Undone::NeverArrived),
            Known::Applied(_) => {}
        }
        match self.last {
            Some(Op { seq: last, change: Change::Append { layer, base_len, .. }, .. }) if last == seq => {
                if let Some(have) = self.tokens.get_mut(layer) {
                    *have = base_len;
                }
                self.window.pop();
                self.chains.pop_back();
                self.chain = self.chain_before;
                self.last = None;
                Ok(Undone::TakenBack { layer, len: base_len })
            }
            _ => Err(ReplicaRefusal::Undo { seq, last: self.window.last() }),
        }
    }

    /// From now on the replica is of this epoch, and refuses others. The same one again changes nothing.
    ///
    /// # Errors
    /// [`ReplicaRefusal::Epoch`] if it is of a higher one.
    pub fn fence(&mut self, epoch: u64) -> Result<(), ReplicaRefusal> {
        if epoch < self.epoch {
            return Err(ReplicaRefusal::Epoch { shard: self.epoch, request: epoch });
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Whether a replica may be given up for this request: a late one may be of an epoch that it is behind, while it is needed again.
    ///
    /// # Errors
    /// [`ReplicaRefusal::Epoch`] if it is of a higher one.
    pub fn check_release(&self, epoch: u64) -> Result<(), ReplicaRefusal> {
        let shard = self.epoch;
        if epoch < shard { Err(ReplicaRefusal::Epoch { shard, request: epoch }) } else { Ok(()) }
    }

    /// Whether the first `at_len` tokens of a layer may be looked at, in this generation.
    ///
    /// # Errors
    /// If they aren't all here, or aren't those that are meant.
    pub fn check_read(
        &self,
        epoch: u64,
        generation: u64,
        layer: usize,
        at_len: usize,
    ) -> Result<(), ReplicaRefusal> {
        self.check_epoch(epoch)?;
        self.check_generation(generation)?;
        let len = self.tokens_of(layer)?;
        if at_len > len { Err(ReplicaRefusal::AtLen { at_len, len }) } else { Ok(()) }
    }

    fn check_epoch(&self, epoch: u64) -> Result<(), ReplicaRefusal> {
        let shard = self.epoch;
        if epoch == shard || omits(Omission::EpochCheck) {
            return Ok(());
        }
        Err(ReplicaRefusal::Epoch { shard, request: epoch })
    }

    fn check_generation(&self, request: u64) -> Result<(), ReplicaRefusal> {
        let session = self.generation;
        if request == session { Ok(()) } else { Err(ReplicaRefusal::Generation { session, request }) }
    }

    fn tokens_of(&self, layer: usize) -> Result<usize, ReplicaRefusal> {
        let layers = self.tokens.len();
        self.tokens.get(layer).copied().ok_or(ReplicaRefusal::Layer { layer, layers })
    }
}

/// The chain behind an op: CRC32C over the chain before, its number, its digest, and that of the bytes that came to the shard.
fn link(chain: u32, op: &Op, content_crc: u32) -> u32 {
    let mut crc = crc32c::crc32c(&chain.to_le_bytes());
    crc = crc32c::crc32c_append(crc, &op.seq.to_le_bytes());
    crc = crc32c::crc32c_append(crc, &op.digest.to_le_bytes());
    crc32c::crc32c_append(crc, &content_crc.to_le_bytes())
}

/// The highest term that a worker has seen. Coordinators count theirs up, so one that was replaced is known by its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    highest: u64,
}

impl Terms {
    /// Takes note of the term of a request.
    ///
    /// # Errors
    /// [`ReplicaRefusal::Fenced`] if a higher one was seen.
    pub fn check(&mut self, term: u64) -> Result<(), ReplicaRefusal> {
        if term < self.highest {
            return Err(ReplicaRefusal::Fenced { term, highest: self.highest });
        }
        self.highest = term;
        Ok(())
    }

    /// The highest one so far; 0 before any.
    pub fn highest(&self) -> u64 {
        self.highest
    }
}

#[cfg(test)]
mod tests;

//! Copies of replicas: what is asked of the worker that has one, and of the one that gets it.

use attnd_plan::Piece;
use attnd_plan::session::{Answer, CopyPages, KEPT, Record, ReplicaSnapshot, SessionSpec};
use bytes::Bytes;

use super::reply::ShardState;
use super::request::{ShardAt, tokens};
use crate::checksum::joined;
use crate::convert;
use crate::error::{Error, Reason};
use crate::limits::CHUNK_BYTES;
use crate::proto;
use crate::session::decode_spec;

/// Tokens that a replica has: a history that another one may continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyBase {
    /// Of the last op.
    pub op_seq: u64,
    /// Behind that op.
    pub chain: u32,
    /// Of the session, as the replica knows it.
    pub generation: u64,
    /// Of each layer.
    pub tokens: Vec<usize>,
}

/// Begin to give a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardExport {
    /// Which. Its epoch isn't looked at.
    pub at: ShardAt,
    /// What the receiver has, if anything.
    pub base: Option<CopyBase>,
}

/// A chunk of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportRead {
    /// The number of the request that began it.
    pub export: u64,
    /// Which chunk, from 0.
    pub index: u32,
}

/// A replica but for its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardSnapshot {
    /// What it has.
    pub state: ShardState,
    /// Its last ops, oldest first; the last one is that of the state.
    pub records: Vec<Record>,
    /// What the chain was behind each of them.
    pub chains: Vec<u32>,
    /// That of the export, if the replica continues it: pages are left out that have none but these tokens.
    pub base: Option<CopyBase>,
}

/// Begin to take a replica.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardImport {
    /// Which, and the epoch that it is of then.
    pub at: ShardAt,
    /// Of the session.
    pub spec: SessionSpec,
    /// As in [`super::HoldShard`].
    pub pieces: Vec<Piece>,
    /// What it is but for its rows.
    pub snapshot: ShardSnapshot,
}

/// Whole pages, as they are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyChunk {
    /// Which, from 0.
    pub index: u32,
    /// Of the data.
    pub crc32c: u32,
    /// At least one byte; the checksum was right.
    pub data: Bytes,
}

/// What was given of a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopySum {
    /// How many.
    pub chunks: u32,
    /// In all of them.
    pub bytes: u64,
    /// Of all data in order.
    pub crc32c: u32,
}

/// Pages that travel in one chunk; the last one may have less.
pub fn pages_of_chunk(stored_bytes: usize) -> usize {
    (CHUNK_BYTES / stored_bytes.max(1)).max(1)
}

impl CopySum {
    /// Counts the next chunk.
    pub fn add(&mut self, chunk: &CopyChunk) {
        self.chunks += 1;
        self.bytes += chunk.data.len() as u64;
        self.crc32c = joined(self.crc32c, chunk.crc32c, chunk.data.len() as u64);
    }
}

impl CopyChunk {
    /// The chunk with this number.
    pub fn new(index: u32, data: Bytes) -> Self {
        Self { index, crc32c: crc32c::crc32c(&data), data }
    }
}

impl CopyBase {
    /// What a replica of this state has.
    pub fn of(state: &ShardState) -> Self {
        let ShardState { op_seq, chain, generation, .. } = *state;
        Self { op_seq, chain, generation, tokens: state.tokens.iter().copied().map(tokens).collect() }
    }
}

impl ShardSnapshot {
    /// The pages that travel, of a shard of these pieces.
    pub fn pages(&self, pieces: &[Piece]) -> CopyPages {
        let from = self.base.as_ref().map_or(&[][..], |base| &base.tokens);
        let tokens: Vec<usize> = self.state.tokens.iter().copied().map(tokens).collect();
        CopyPages::new(pieces, from, &tokens)
    }

    /// Chunks that these are in.
    pub fn chunks(&self, spec: &SessionSpec, pieces: &[Piece]) -> u32 {
        let pages = self.pages(pieces).len();
        convert::small(pages.div_ceil(pages_of_chunk(spec.page_layout().stored_bytes())))
    }

    /// Checks the numbers of tokens against the session.
    ///
    /// # Errors
    /// [`Reason::Snapshot`] for another number of layers than it has, or less tokens than the base, and [`Reason::SessionFull`].
    pub fn check(&self, spec: &SessionSpec) -> Result<(), Error> {
        let wrong = |what: String| Err(Error::new(Reason::Snapshot, what));
        let have = &self.state.tokens;
        if have.len() != spec.layers {
            return wrong(format!("tokens of {} layers, the session has {}", have.len(), spec.layers));
        }
        if let Some(most) = have.iter().copied().map(tokens).max().filter(|most| *most > spec.max_tokens) {
            let detail = format!("{most} tokens, the session has at most {}", spec.max_tokens);
            return Err(Error::new(Reason::SessionFull, detail));
        }
        let Some(base) = &self.base else { return Ok(()) };
        if base.tokens.len() != have.len() {
            return wrong(format!("a base of {} layers for {}", base.tokens.len(), have.len()));
        }
        let mut both = base.tokens.iter().zip(have).enumerate();
        match both.find(|(_, (base, have))| **base > tokens(**have)) {
            Some((layer, (base, have))) => wrong(format!("layer {layer} has {have} tokens, its base {base}")),
            None => Ok(()),
        }
    }
}

impl From<ReplicaSnapshot> for ShardSnapshot {
    fn from(snapshot: ReplicaSnapshot) -> Self {
        let ReplicaSnapshot { state, records, chains } = snapshot;
        Self { state: state.into(), records, chains, base: None }
    }
}

impl From<ShardSnapshot> for ReplicaSnapshot {
    fn from(snapshot: ShardSnapshot) -> Self {
        let ShardSnapshot { state, records, chains, base: _ } = snapshot;
        Self { state: state.into(), records, chains }
    }
}

impl TryFrom<proto::CopyBase> for CopyBase {
    type Error = Error;

    fn try_from(message: proto::CopyBase) -> Result<Self, Error> {
        let proto::CopyBase { op_seq, chain, generation, tokens: n } = message;
        convert::count("tokens", n.len())?;
        Ok(Self { op_seq, chain, generation, tokens: n.into_iter().map(tokens).collect() })
    }
}

impl From<CopyBase> for proto::CopyBase {
    fn from(base: CopyBase) -> Self {
        let CopyBase { op_seq, chain, generation, tokens } = base;
        Self { op_seq, chain, generation, tokens: tokens.into_iter().map(|n| n as u64).collect() }
    }
}

impl TryFrom<proto::ShardExport> for ShardExport {
    type Error = Error;

    fn try_from(message: proto::ShardExport) -> Result<Self, Error> {
        let proto::ShardExport { at, base } = message;
        Ok(Self { at: at.try_into()?, base: base.map(TryInto::try_into).transpose()? })
    }
}

impl From<ShardExport> for proto::ShardExport {
    fn from(export: ShardExport) -> Self {
        Self { at: Some(export.at.into()), base: export.base.map(Into::into) }
    }
}

impl TryFrom<proto::ShardSnapshot> for ShardSnapshot {
    type Error = Error;

    /// Errors are [`Reason::Count`] and [`Reason::Snapshot`].
    fn try_from(message: proto::ShardSnapshot) -> Result<Self, Error> {
        let proto::ShardSnapshot { state, ops, base } = message;
        let state = state.ok_or_else(|| Error::new(Reason::Snapshot, "without a state"))?;
        let state = ShardState::try_from(state)?;
        let n = ops.len();
        let before = state.op_seq.checked_sub(n as u64).filter(|_| n <= KEPT);
        let Some(before) = before else {
            let detail = format!("{n} records don't end in op {}", state.op_seq);
            return Err(Error::new(Reason::Snapshot, detail));
        };
        let mut chains = Vec::with_capacity(n);
        let mut records = Vec::with_capacity(n);
        for (seq, op) in (before + 1..).zip(ops) {
            let proto::CopiedOp { digest, chain, len, generation, child } = op;
            let answer = Answer { len: tokens(len), generation, child: (child != 0).then_some(child) };
            records.push(Record { seq, digest, answer });
            chains.push(chain);
        }
        Ok(Self { state, records, chains, base: base.map(TryInto::try_into).transpose()? })
    }
}

impl From<ShardSnapshot> for proto::ShardSnapshot {
    fn from(snapshot: ShardSnapshot) -> Self {
        let ShardSnapshot { state, records, chains, base } = snapshot;
        let op = |(record, chain): (Record, u32)| {
            let Record { digest, answer: Answer { len, generation, child }, .. } = record;
            proto::CopiedOp { digest, chain, len: len as u64, generation, child: child.unwrap_or(0) }
        };
        let ops = records.into_iter().zip(chains).map(op).collect();
        Self { state: Some(state.into()), ops, base: base.map(Into::into) }
    }
}

impl TryFrom<proto::ShardImport> for ShardImport {
    type Error = Error;

    fn try_from(message: proto::ShardImport) -> Result<Self, Error> {
        let spec = decode_spec(message.spec.unwrap_or_default())?;
        let pieces = convert::pieces(message.pieces, spec.kv_heads)?;
        let snapshot = ShardSnapshot::try_from(message.snapshot.unwrap_or_default())?;
        snapshot.check(&spec)?;
        Ok(Self { at: message.at.try_into()?, spec, pieces, snapshot })
    }
}

impl From<ShardImport> for proto::ShardImport {
    fn from(import: ShardImport) -> Self {
        Self {
            at: Some(import.at.into()),
            spec: Some((&import.spec).into()),
            pieces: import.pieces.iter().map(Into::into).collect(),
            snapshot: Some(import.snapshot.into()),
        }
    }
}

impl TryFrom<proto::CopyChunk> for CopyChunk {
    type Error = Error;

    /// Errors are [`Reason::PayloadLength`] and [`Reason::Checksum`].
    fn try_from(message: proto::CopyChunk) -> Result<Self, Error> {
        let proto::CopyChunk { index, crc32c, data } = message;
        convert::chunk_data(index, &data, &[], Some(crc32c), size_of::<u32>())?;
        Ok(Self { index, crc32c, data })
    }
}

impl From<CopyChunk> for proto::CopyChunk {
    fn from(chunk: CopyChunk) -> Self {
        let CopyChunk { index, crc32c, data } = chunk;
        Self { index, crc32c, data }
    }
}

impl From<proto::CopySum> for CopySum {
    fn from(message: proto::CopySum) -> Self {
        let proto::CopySum { chunks, bytes, crc32c } = message;
        Self { chunks, bytes, crc32c }
    }
}

impl From<CopySum> for proto::CopySum {
    fn from(sum: CopySum) -> Self {
        let CopySum { chunks, bytes, crc32c } = sum;
        Self { chunks, bytes, crc32c }
    }
}

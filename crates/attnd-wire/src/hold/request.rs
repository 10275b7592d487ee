//! What a worker is asked for.

use attnd_kernel::slot::keys_in_slots;
use attnd_plan::session::{Change, Op, SessionSpec};
use attnd_plan::{AnyTensor, Piece, Tensor};

use crate::attend::Commit;
use crate::checksum::Checksummed;
use crate::compute::SliceChunk;
use crate::convert::{self, size, small};
use crate::error::{Error, Reason};
use crate::hold::copy::{CopyChunk, CopySum, ExportRead, ShardExport, ShardImport};
use crate::hold::work::ShardWork;
use crate::session::{check_layer, decode_spec};
use crate::{proto, refusal};

/// One frame to a worker.
#[derive(Clone, Debug, PartialEq)]
pub struct HoldRequest {
    /// Ascending on a stream, from 1. Chunks, a Commit and what gives an append up have the number of their append.
    pub request: u64,
    /// Of the coordinator.
    pub term: u64,
    /// What for.
    pub ask: HoldAsk,
}

/// A frame as it came: what is wrong with it is for its number to hear.
#[derive(Clone, Debug, PartialEq)]
pub struct HoldAsked {
    /// As in [`HoldRequest`].
    pub request: u64,
    /// As in [`HoldRequest`].
    pub term: u64,
    /// What for; of several works each may be wrong by itself.
    pub ask: Result<HoldAsk<Result<ShardWork, Error>>, Error>,
}

/// What a worker may be asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum HoldAsk<W = ShardWork> {
    /// An empty shard to hold.
    Hold(HoldShard),
    /// Rows and queries of any shards, at least one.
    Works(Vec<W>),
    /// The beginning of an append.
    Append(ShardAppend),
    /// Rows of an append, of one kv head.
    Chunk(SliceChunk),
    /// The end of an append.
    Commit(Commit),
    /// No more of an append comes, and no Commit.
    GiveUp,
    /// Another op.
    Change(ShardChange),
    /// A new epoch, which is `epoch` of this.
    Fence(ShardAt),
    /// The end of a shard.
    Release(ShardAt),
    /// What a replica has; its epoch isn't looked at.
    Look(ShardAt),
    /// The beginning of a copy, where it comes from.
    Export(ShardExport),
    /// A chunk of it.
    Read(ExportRead),
    /// The end of the export that this request began.
    End(u64),
    /// The beginning of a copy, where it goes to.
    Import(Box<ShardImport>),
    /// A chunk of it.
    Copied(CopyChunk),
    /// The end of an import.
    Sum(CopySum),
    /// The ops that a replica remembers, whatever its epoch is.
    Recall(ShardAt),
    /// All shards that are there.
    List,
}

/// Which shard of which session, and in which epoch the sender thinks it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardAt {
    /// A number that no other session ever has.
    pub session: u64,
    /// Which of its shards.
    pub shard: u32,
    /// Of the shard.
    pub epoch: u64,
}

/// An empty shard to hold.
#[derive(Clone, Debug, PartialEq)]
pub struct HoldShard {
    /// Which.
    pub at: ShardAt,
    /// Of the session.
    pub spec: SessionSpec,
    /// Kv heads times slots: at least one, all inside of the session, disjoint.
    pub pieces: Vec<Piece>,
}

/// Which op of the session it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardOp {
    /// At least 1.
    pub op_seq: u64,
    /// Of what it says and of its bytes, see [`crate::session::digest`].
    pub digest: u32,
    /// Before the op.
    pub generation: u64,
}

/// The beginning of an append in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardAppend {
    /// To which shard.
    pub at: ShardAt,
    /// To which layer.
    pub layer: usize,
    /// Which op.
    pub op: ShardOp,
    /// Tokens that the layer has before, over all of the session.
    pub base_len: usize,
    /// Tokens to come, over all of the session; at least one.
    pub tokens: usize,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
}

/// An op other than an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardChange {
    /// Of which shard.
    pub at: ShardAt,
    /// Which op.
    pub op: ShardOp,
    /// What it does.
    pub kind: ShardChangeKind,
}

/// What an op other than an append does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardChangeKind {
    /// Cuts every layer that has more tokens to this many.
    Truncate {
        /// Tokens that stay, over all of the session.
        len: usize,
    },
    /// Another session with the same tokens, whose shard begins with epoch 1.
    Fork {
        /// Its number.
        child: u64,
    },
    /// No more appends and cuts.
    Seal,
    /// The op was an append, the last one, and shall never have been.
    Undo,
}

impl ShardOp {
    /// # Errors
    /// [`Reason::Seq`].
    pub(super) fn decode(message: Option<proto::ShardOp>) -> Result<Self, Error> {
        let proto::ShardOp { op_seq, digest, generation } = message.unwrap_or_default();
        if op_seq == 0 {
            return Err(refusal::seq_zero());
        }
        Ok(Self { op_seq, digest, generation })
    }

    /// The op that makes this change.
    pub fn op(&self, change: Change) -> Op {
        Op { seq: self.op_seq, digest: self.digest, change }
    }
}

impl From<ShardOp> for proto::ShardOp {
    fn from(op: ShardOp) -> Self {
        Self { op_seq: op.op_seq, digest: op.digest, generation: op.generation }
    }
}

impl ShardChangeKind {
    /// What the ledger and replicas call it; `None` where it undoes one.
    pub fn change(self) -> Option<Change> {
        match self {
            Self::Truncate { len } => Some(Change::Truncate { len }),
            Self::Fork { child } => Some(Change::Fork { child }),
            Self::Seal => Some(Change::Seal),
            Self::Undo => None,
        }
    }
}

impl HoldRequest {
    /// Decodes a frame as far as it can be without knowing its shard.
    pub fn decode(message: proto::HoldRequest) -> HoldAsked {
        let ask = message.ask.ok_or_else(refusal::empty_frame).and_then(decode_ask);
        HoldAsked { request: message.request, term: message.term, ask }
    }
}

fn decode_ask(ask: proto::hold_request::Ask) -> Result<HoldAsk<Result<ShardWork, Error>>, Error> {
    use proto::hold_request::Ask as Message;
    Ok(match ask {
        Message::Hold(hold) => HoldAsk::Hold(hold.try_into()?),
        Message::Works(proto::ShardWorks { works }) => {
            convert::count("works", works.len())?;
            if works.is_empty() {
                return Err(Error::new(Reason::Count, "works 0"));
            }
            HoldAsk::Works(works.into_iter().map(TryInto::try_into).collect())
        }
        Message::Append(append) => HoldAsk::Append(append.try_into()?),
        Message::Chunk(chunk) => HoldAsk::Chunk(decode_chunk(chunk)?),
        Message::Commit(commit) => HoldAsk::Commit(commit.into()),
        Message::GiveUp(proto::ShardGiveUp {}) => HoldAsk::GiveUp,
        Message::Change(change) => HoldAsk::Change(change.try_into()?),
        Message::Fence(proto::ShardFence { at }) => HoldAsk::Fence(at.try_into()?),
        Message::Release(proto::ShardRelease { at }) => HoldAsk::Release(at.try_into()?),
        Message::Look(proto::ShardLook { at }) => HoldAsk::Look(at.try_into()?),
        Message::Export(export) => HoldAsk::Export(export.try_into()?),
        Message::Read(proto::ExportRead { export, index }) => HoldAsk::Read(ExportRead { export, index }),
        Message::End(proto::ExportEnd { export }) => HoldAsk::End(export),
        Message::Import(import) => HoldAsk::Import(Box::new(import.try_into()?)),
        Message::Copied(chunk) => HoldAsk::Copied(chunk.try_into()?),
        Message::Sum(sum) => HoldAsk::Sum(sum.into()),
        Message::Recall(proto::ShardRecall { at }) => HoldAsk::Recall(at.try_into()?),
        Message::List(proto::ShardListing {}) => HoldAsk::List,
    })
}

impl From<HoldRequest> for proto::HoldRequest {
    fn from(request: HoldRequest) -> Self {
        use proto::hold_request::Ask as Message;
        let HoldRequest { request, term, ask } = request;
        let ask = match ask {
            HoldAsk::Hold(hold) => Message::Hold(hold.into()),
            HoldAsk::Works(works) => {
                Message::Works(proto::ShardWorks { works: works.into_iter().map(Into::into).collect() })
            }
            HoldAsk::Append(append) => Message::Append(append.into()),
            HoldAsk::Chunk(chunk) => Message::Chunk(chunk.into()),
            HoldAsk::Commit(commit) => Message::Commit(commit.into()),
            HoldAsk::GiveUp => Message::GiveUp(proto::ShardGiveUp {}),
            HoldAsk::Change(change) => Message::Change(change.into()),
            HoldAsk::Fence(at) => Message::Fence(proto::ShardFence { at: Some(at.into()) }),
            HoldAsk::Release(at) => Message::Release(proto::ShardRelease { at: Some(at.into()) }),
            HoldAsk::Look(at) => Message::Look(proto::ShardLook { at: Some(at.into()) }),
            HoldAsk::Export(export) => Message::Export(export.into()),
            HoldAsk::Read(ExportRead { export, index }) => Message::Read(proto::ExportRead { export, index }),
            HoldAsk::End(export) => Message::End(proto::ExportEnd { export }),
            HoldAsk::Import(import) => Message::Import((*import).into()),
            HoldAsk::Copied(chunk) => Message::Copied(chunk.into()),
            HoldAsk::Sum(sum) => Message::Sum(sum.into()),
            HoldAsk::Recall(at) => Message::Recall(proto::ShardRecall { at: Some(at.into()) }),
            HoldAsk::List => Message::List(proto::ShardListing {}),
        };
        Self { request, term, ask: Some(ask) }
    }
}

impl TryFrom<Option<proto::ShardAt>> for ShardAt {
    type Error = Error;

    fn try_from(message: Option<proto::ShardAt>) -> Result<Self, Error> {
        let proto::ShardAt { session, shard, epoch } =
            message.ok_or_else(|| Error::new(Reason::Shard, "none said"))?;
        Ok(Self { session, shard, epoch })
    }
}

impl From<ShardAt> for proto::ShardAt {
    fn from(at: ShardAt) -> Self {
        Self { session: at.session, shard: at.shard, epoch: at.epoch }
    }
}

impl TryFrom<proto::HoldShard> for HoldShard {
    type Error = Error;

    fn try_from(message: proto::HoldShard) -> Result<Self, Error> {
        let spec = decode_spec(message.spec.unwrap_or_default())?;
        let pieces = convert::pieces(message.pieces, spec.kv_heads)?;
        Ok(Self { at: message.at.try_into()?, spec, pieces })
    }
}

impl From<HoldShard> for proto::HoldShard {
    fn from(hold: HoldShard) -> Self {
        Self {
            at: Some(hold.at.into()),
            spec: Some((&hold.spec).into()),
            pieces: hold.pieces.iter().map(Into::into).collect(),
        }
    }
}

/// A number of tokens of a session; one that is over all limits is refused by whoever knows the session.
pub(super) fn tokens(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl TryFrom<proto::ShardAppend> for ShardAppend {
    type Error = Error;

    fn try_from(message: proto::ShardAppend) -> Result<Self, Error> {
        if message.tokens == 0 {
            return Err(refusal::no_tokens());
        }
        Ok(Self {
            at: message.at.try_into()?,
            layer: size(message.layer),
            op: ShardOp::decode(message.op)?,
            base_len: tokens(message.base_len),
            tokens: tokens(message.tokens),
            allow_non_finite: message.allow_non_finite,
        })
    }
}

impl From<ShardAppend> for proto::ShardAppend {
    fn from(append: ShardAppend) -> Self {
        Self {
            at: Some(append.at.into()),
            layer: small(append.layer),
            op: Some(append.op.into()),
            base_len: append.base_len as u64,
            tokens: append.tokens as u64,
            allow_non_finite: append.allow_non_finite,
        }
    }
}

impl ShardAppend {
    /// The op that it is.
    pub fn op(&self) -> Op {
        let (layer, base_len, tokens) = (self.layer, self.base_len, self.tokens);
        self.op.op(Change::Append { layer, base_len, tokens })
    }

    /// Bytes of K and of V that follow for a shard of these pieces.
    ///
    /// # Errors
    /// [`Reason::ShapeLimit`] for a layer that the session doesn't have, and [`Reason::SessionFull`].
    pub fn bytes(&self, spec: &SessionSpec, pieces: &[Piece]) -> Result<(u64, u64), Error> {
        let rows = rows_of(self.layer, self.base_len, self.tokens, spec, pieces)? as u64;
        let (key, value) = spec.row_bytes();
        Ok((rows * key as u64, rows * value as u64))
    }
}

/// Rows of one tensor that a shard of these pieces gets of an append.
pub(super) fn rows_of(
    layer: usize,
    base_len: usize,
    tokens: usize,
    spec: &SessionSpec,
    pieces: &[Piece],
) -> Result<usize, Error> {
    check_layer(layer, spec)?;
    let end = base_len.checked_add(tokens).filter(|end| *end <= spec.max_tokens);
    let end = end.ok_or_else(|| refusal::session_full(base_len as u64, tokens as u64))?;
    let of_piece = |piece: &Piece| {
        let held = |len: usize| keys_in_slots(piece.slots.clone(), len);
        piece.groups.len() * (held(end) - held(base_len))
    };
    Ok(pieces.iter().map(of_piece).sum())
}

/// Decodes rows of one kv head, as far as they say what they are.
fn decode_chunk(message: proto::SliceChunk) -> Result<SliceChunk, Error> {
    let tensor = convert::tensor(message.tensor)?;
    if !matches!(tensor, AnyTensor::Operand(Tensor::K | Tensor::V)) {
        return Err(Error::new(Reason::Tensor, format!("{tensor} of a session")));
    }
    let proto::SliceChunk { index, head, offset, crc32c, data, .. } = message;
    convert::chunk_data(index, &data, &[], None, 1)?;
    let data = Checksummed::received(index, data, crc32c)?;
    Ok(SliceChunk { index, tensor, head: size(head), offset, data })
}

/// Checks a chunk of an append against the shard: whole elements, inside of the matrix `[tokens, dim]` of a head of the shard.
///
/// # Errors
/// [`Reason::PayloadLength`] and [`Reason::Pieces`].
pub fn check_chunk(
    chunk: &SliceChunk,
    append: &ShardAppend,
    spec: &SessionSpec,
    pieces: &[Piece],
) -> Result<(), Error> {
    let SliceChunk { tensor, head, offset, data, .. } = chunk;
    if !pieces.iter().any(|piece| piece.groups.contains(head)) {
        return Err(Error::new(Reason::Pieces, format!("{tensor} head {head} is not in this shard")));
    }
    let element = spec.dtype.size();
    let (key, value) = spec.row_bytes();
    let row = if *tensor == AnyTensor::Operand(Tensor::V) { value } else { key };
    let matrix = (append.tokens as u64).saturating_mul(row as u64);
    let end = offset.checked_add(data.len() as u64);
    let is_whole = offset.is_multiple_of(element as u64) && data.len().is_multiple_of(element);
    if !is_whole || end.is_none_or(|end| end > matrix) {
        let run = format!("{tensor} head {head}: {} bytes at {offset} of {matrix}", data.len());
        return Err(Error::new(Reason::PayloadLength, run));
    }
    Ok(())
}

impl TryFrom<proto::ShardChange> for ShardChange {
    type Error = Error;

    fn try_from(message: proto::ShardChange) -> Result<Self, Error> {
        use proto::shard_change::Change as Message;
        let kind = match message.change.ok_or_else(refusal::empty_frame)? {
            Message::Truncate(proto::SessionTruncate { len }) => {
                ShardChangeKind::Truncate { len: tokens(len) }
            }
            Message::Fork(child) => ShardChangeKind::Fork { child },
            Message::Seal(proto::SessionSeal {}) => ShardChangeKind::Seal,
            Message::Undo(proto::ShardUndo {}) => ShardChangeKind::Undo,
        };
        Ok(Self { at: message.at.try_into()?, op: ShardOp::decode(message.op)?, kind })
    }
}

impl From<ShardChange> for proto::ShardChange {
    fn from(change: ShardChange) -> Self {
        use proto::shard_change::Change as Message;
        let kind = match change.kind {
            ShardChangeKind::Truncate { len } => {
                Message::Truncate(proto::SessionTruncate { len: len as u64 })
            }
            ShardChangeKind::Fork { child } => Message::Fork(child),
            ShardChangeKind::Seal => Message::Seal(proto::SessionSeal {}),
            ShardChangeKind::Undo => Message::Undo(proto::ShardUndo {}),
        };
        Self { at: Some(change.at.into()), op: Some(change.op.into()), change: Some(kind) }
    }
}

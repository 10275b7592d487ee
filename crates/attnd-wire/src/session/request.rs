//! What a client asks for.

use std::time::Duration;

use attnd_plan::omission::{Omission, omits};
use attnd_plan::session::{SessionName, SessionSpec};
use attnd_plan::{AnyTensor, Tensor};

use crate::attend::Commit;
use crate::checksum::Checksummed;
use crate::convert::{self, size, small};
use crate::error::{Error, Reason};
use crate::session::spec::{self, check_layer, name};
use crate::session::step::{RowShape, Step, of_a_session};
use crate::{proto, refusal};

/// Time of a request that doesn't say how much it has.
pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// One frame from a client.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRequest {
    /// Ascending on a stream, from 1. Chunks and a Commit have the number of their append, what gives a request up has that one's.
    pub request: u64,
    /// Time that it has from its arrival.
    pub timeout: Duration,
    /// What for.
    pub ask: Ask,
}

/// A frame as it came: what is wrong with it is for its number to hear, and for no other.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// As in [`SessionRequest`].
    pub request: u64,
    /// As in [`SessionRequest`].
    pub timeout: Duration,
    /// What for; of several steps each may be wrong by itself.
    pub ask: Result<Ask<Result<Step, Error>>, Error>,
}

/// What a client may ask for.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask<S = Step> {
    /// A session to begin, or to go on with.
    Open(Open),
    /// Steps, at least one.
    Steps(Vec<S>),
    /// The beginning of an append.
    Append(Append),
    /// Bytes of an append.
    Chunk(AppendChunk),
    /// The end of an append.
    Commit(Commit),
    /// Another mutation.
    Change(Change),
    /// What a session is and has.
    Describe(SessionName),
    /// All names.
    List,
    /// The end of a session.
    Close(SessionName),
    /// Nobody waits any more for the answer to the request with this number.
    GiveUp,
}

/// Which session to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Its name; `None`: the coordinator makes one.
    pub name: Option<SessionName>,
    /// What it is; `None`: it must exist.
    pub spec: Option<SessionSpec>,
    /// Become its writer.
    pub write: bool,
}

/// Which mutation of a session it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// Of the writer, as it was told when it became that.
    pub writer_epoch: u64,
    /// At least 1.
    pub op_seq: u64,
}

/// The beginning of an append in chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Append {
    /// To which session.
    pub session: SessionName,
    /// Which mutation.
    pub mutation: Mutation,
    /// To which layer.
    pub layer: usize,
    /// How many, at least one.
    pub tokens: u64,
    /// Tokens that the layer must have before.
    pub base_len: Option<u64>,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// What the client takes the rows for.
    pub shape: RowShape,
    /// Of all of K, continued over all of V.
    pub crc32c: u32,
}

/// Bytes of K or V of an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendChunk {
    /// Place among the chunks of the append, from 0.
    pub index: u32,
    /// K or V.
    pub tensor: Tensor,
    /// Where they begin in `[kv_heads, tokens, dim]`, in bytes; `None`: where its last chunk ended.
    pub offset: Option<u64>,
    /// At least one byte.
    pub data: Checksummed,
}

/// A mutation other than an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Of which session.
    pub session: SessionName,
    /// Which mutation.
    pub mutation: Mutation,
    /// What it does.
    pub kind: ChangeKind,
}

/// What a mutation other than an append does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// Cuts every layer that has more tokens to this many.
    Truncate {
        /// Tokens that stay.
        len: u64,
    },
    /// Makes another session with the same tokens.
    Fork {
        /// Its name; `None`: the coordinator makes one.
        child: Option<SessionName>,
    },
    /// Ends all appends and cuts.
    Seal,
}

impl SessionRequest {
    /// Decodes a frame as far as it can be without knowing its session.
    pub fn decode(message: proto::SessionRequest) -> Asked {
        let timeout = match message.timeout_ms {
            0 => DEFAULT_REQUEST_TIMEOUT,
            millis => Duration::from_millis(millis.into()),
        };
        let ask = message.ask.ok_or_else(refusal::empty_frame).and_then(decode_ask);
        Asked { request: message.request, timeout, ask }
    }
}

fn decode_ask(ask: proto::session_request::Ask) -> Result<Ask<Result<Step, Error>>, Error> {
    use proto::session_request::Ask as Message;
    Ok(match ask {
        Message::Open(open) => Ask::Open(open.try_into()?),
        Message::Steps(proto::SessionSteps { steps }) => {
            convert::count("steps", steps.len())?;
            if steps.is_empty() {
                return Err(Error::new(Reason::Count, "steps 0"));
            }
            Ask::Steps(steps.into_iter().map(TryInto::try_into).collect())
        }
        Message::Append(append) => Ask::Append(append.try_into()?),
        Message::Chunk(chunk) => Ask::Chunk(chunk.try_into()?),
        Message::Commit(commit) => Ask::Commit(commit.into()),
        Message::Change(change) => Ask::Change(change.try_into()?),
        Message::Describe(describe) => Ask::Describe(name(describe.session)?),
        Message::List(proto::SessionListing {}) => Ask::List,
        Message::Close(close) => Ask::Close(name(close.session)?),
        Message::GiveUp(proto::SessionGiveUp {}) => Ask::GiveUp,
    })
}

impl From<SessionRequest> for proto::SessionRequest {
    fn from(request: SessionRequest) -> Self {
        use proto::session_request::Ask as Message;
        let ask = match request.ask {
            Ask::Open(open) => Message::Open(open.into()),
            Ask::Steps(steps) => {
                Message::Steps(proto::SessionSteps { steps: steps.into_iter().map(Into::into).collect() })
            }
            Ask::Append(append) => Message::Append(append.into()),
            Ask::Chunk(chunk) => Message::Chunk(chunk.into()),
            Ask::Commit(commit) => Message::Commit(commit.into()),
            Ask::Change(change) => Message::Change(change.into()),
            Ask::Describe(name) => Message::Describe(proto::SessionDescribe { session: name.to_string() }),
            Ask::List => Message::List(proto::SessionListing {}),
            Ask::Close(name) => Message::Close(proto::SessionClose { session: name.to_string() }),
            Ask::GiveUp => Message::GiveUp(proto::SessionGiveUp {}),
        };
        // No time would mean the default.
        let timeout_ms = u32::try_from(request.timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        Self { request: request.request, timeout_ms, ask: Some(ask) }
    }
}

impl TryFrom<proto::SessionOpen> for Open {
    type Error = Error;

    fn try_from(message: proto::SessionOpen) -> Result<Self, Error> {
        let proto::SessionOpen { name, spec, write } = message;
        Ok(Self { name: of_name(name)?, spec: spec.map(spec::decode).transpose()?, write })
    }
}

impl From<Open> for proto::SessionOpen {
    fn from(open: Open) -> Self {
        let name = open.name.map_or_else(String::new, |name| name.to_string());
        Self { name, spec: open.spec.as_ref().map(Into::into), write: open.write }
    }
}

/// A name that may be left for the coordinator to make.
fn of_name(text: String) -> Result<Option<SessionName>, Error> {
    if text.is_empty() { Ok(None) } else { name(text).map(Some) }
}

impl Mutation {
    /// Decodes which mutation it is.
    ///
    /// # Errors
    /// [`Reason::Seq`].
    pub(crate) fn decode(message: Option<proto::Mutation>) -> Result<Self, Error> {
        let proto::Mutation { writer_epoch, op_seq } = message.unwrap_or_default();
        if op_seq == 0 {
            return Err(refusal::seq_zero());
        }
        Ok(Self { writer_epoch, op_seq })
    }
}

impl From<Mutation> for proto::Mutation {
    fn from(mutation: Mutation) -> Self {
        Self { writer_epoch: mutation.writer_epoch, op_seq: mutation.op_seq }
    }
}

impl Append {
    /// Bytes of K and of V that follow.
    ///
    /// # Errors
    /// [`Reason::DtypeMismatch`] and [`Reason::ShapeMismatch`] where the client takes the session for another one, [`Reason::ShapeLimit`].
    pub fn bytes(&self, spec: &SessionSpec) -> Result<(u64, u64), Error> {
        check_layer(self.layer, spec)?;
        self.shape.check_rows(spec)?;
        let (key, value) = spec.row_bytes();
        let rows = self.tokens.checked_mul(spec.kv_heads as u64);
        let bytes = |row: usize| rows.and_then(|rows| rows.checked_mul(row as u64));
        bytes(key).zip(bytes(value)).ok_or_else(|| Error::new(Reason::ShapeOverflow, ""))
    }
}

impl TryFrom<proto::SessionAppend> for Append {
    type Error = Error;

    fn try_from(message: proto::SessionAppend) -> Result<Self, Error> {
        let proto::SessionAppend {
            session,
            mutation,
            layer,
            tokens,
            base_len,
            allow_non_finite,
            shape,
            crc32c,
        } = message;
        if tokens == 0 {
            return Err(refusal::no_tokens());
        }
        Ok(Self {
            session: name(session)?,
            mutation: Mutation::decode(mutation)?,
            layer: size(layer),
            tokens,
            base_len,
            allow_non_finite,
            shape: RowShape::decode(shape)?,
            crc32c,
        })
    }
}

impl From<Append> for proto::SessionAppend {
    fn from(append: Append) -> Self {
        Self {
            session: append.session.to_string(),
            mutation: Some(append.mutation.into()),
            layer: small(append.layer),
            tokens: append.tokens,
            base_len: append.base_len,
            allow_non_finite: append.allow_non_finite,
            shape: append.shape.encode(),
            crc32c: append.crc32c,
        }
    }
}

impl TryFrom<proto::TensorChunk> for AppendChunk {
    type Error = Error;

    /// Elements may be of any type: whether they are whole is seen by where they begin and end.
    fn try_from(message: proto::TensorChunk) -> Result<Self, Error> {
        let proto::TensorChunk { index, tensor, crc32c: sent, data, offset } = message;
        let tensor = match convert::tensor(tensor)? {
            AnyTensor::Operand(tensor @ (Tensor::K | Tensor::V)) => tensor,
            other => return Err(of_a_session(&other.to_string())),
        };
        convert::chunk_data(index, &data, &[], None, 1)?;
        let data = Checksummed::new(data);
        if sent.is_some_and(|sent| sent != with_place(&data, offset) && !omits(Omission::Checksum)) {
            return Err(refusal::checksum(index));
        }
        Ok(Self { index, tensor, offset, data })
    }
}

impl From<AppendChunk> for proto::TensorChunk {
    fn from(chunk: AppendChunk) -> Self {
        let AppendChunk { index, tensor, offset, data } = chunk;
        let tensor = proto::Tensor::from(AnyTensor::Operand(tensor)).into();
        Self { index, tensor, crc32c: Some(with_place(&data, offset)), data: data.into_data(), offset }
    }
}

impl AppendChunk {
    /// Some bytes of K or V, from `offset` on.
    pub fn new(index: u32, tensor: Tensor, offset: u64, data: impl Into<Checksummed>) -> Self {
        Self { index, tensor, offset: Some(offset), data: data.into() }
    }
}

/// The checksum of data, continued over where they begin, if that is said.
fn with_place(data: &Checksummed, offset: Option<u64>) -> u32 {
    offset.map_or(data.crc32c(), |offset| crc32c::crc32c_append(data.crc32c(), &offset.to_le_bytes()))
}

impl TryFrom<proto::SessionChange> for Change {
    type Error = Error;

    fn try_from(message: proto::SessionChange) -> Result<Self, Error> {
        use proto::session_change::Change as Message;
        let session = name(message.session)?;
        let kind = match message.change.ok_or_else(refusal::empty_frame)? {
            Message::Truncate(proto::SessionTruncate { len }) => ChangeKind::Truncate { len },
            Message::Fork(proto::SessionFork { child }) => {
                let child = of_name(child)?;
                if child.as_ref() == Some(&session) {
                    return Err(refusal::fork_of_itself());
                }
                ChangeKind::Fork { child }
            }
            Message::Seal(proto::SessionSeal {}) => ChangeKind::Seal,
        };
        Ok(Self { session, mutation: Mutation::decode(message.mutation)?, kind })
    }
}

impl From<Change> for proto::SessionChange {
    fn from(change: Change) -> Self {
        use proto::session_change::Change as Message;
        let kind = match change.kind {
            ChangeKind::Truncate { len } => Message::Truncate(proto::SessionTruncate { len }),
            ChangeKind::Fork { child } => {
                let child = child.map_or_else(String::new, |name| name.to_string());
                Message::Fork(proto::SessionFork { child })
            }
            ChangeKind::Seal => Message::Seal(proto::SessionSeal {}),
        };
        Self {
            session: change.session.to_string(),
            mutation: Some(change.mutation.into()),
            change: Some(kind),
        }
    }
}

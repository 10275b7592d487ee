//! What a client sends: Begin, chunks of tensors, Commit.

use std::sync::Arc;

use attnd_kernel::{AttnShape, Dtype, Operator, Outputs};
use attnd_plan::{AnyTensor, Sides, WorkerChoice};
use bytes::Bytes;

use crate::checksum::checksum;
use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::operator::{self, Encoded};
use crate::{outputs, projection, proto, refusal};

/// One frame from the client.
#[derive(Clone, Debug, PartialEq)]
pub enum AttendRequest {
    /// The first one.
    Begin(Begin),
    /// Tensor bytes.
    Chunk(TensorChunk),
    /// The last one.
    Commit(Commit),
}

/// What to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Begin {
    /// Dimensions.
    pub shape: AttnShape,
    /// Element type of Q, K and V on the wire.
    pub dtype: Dtype,
    /// What is computed, made for that shape. A request without a scale gets what its score function says.
    pub operator: Arc<Operator>,
    /// What is wanted beside the context; `None` if nothing is.
    pub outputs: Option<Arc<Outputs>>,
    /// What comes beside Q, K and V, made for that shape: the tensors that the operator reads, and what workers make keys and values
    /// of, which is there if and only if the shape says so.
    pub sides: Sides,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// A row that sees no key is an error.
    pub forbid_empty_rows: bool,
    /// How many workers may take part.
    pub workers: WorkerChoice,
}

/// Bytes of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorChunk {
    /// Place in the stream, from 0. Whether it is the next one is for the call's state machine to say.
    pub index: u32,
    /// Which one: an operand, or one of [`Begin::sides`].
    pub tensor: AnyTensor,
    /// Where they begin in it, in bytes; `None` where its last chunk ended. Whether they may begin there is for
    /// the call's state machine to say.
    pub offset: Option<u64>,
    /// Whole elements, at least one; the checksum was right.
    pub data: Bytes,
}

/// What was sent, by the sender's count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Chunks.
    pub chunks: u32,
    /// Bytes of all their data.
    pub bytes: u64,
}

impl AttendRequest {
    /// Decodes a frame of a call that began with `begun`, or didn't begin yet.
    ///
    /// # Errors
    /// [`Reason::StreamOrder`] for a first frame that isn't Begin, a second Begin, or an empty frame; and whatever
    /// is wrong with the frame itself.
    pub fn decode(message: proto::AttendRequest, begun: Option<&Begin>) -> Result<Self, Error> {
        use proto::attend_request::Part;
        match (message.part, begun) {
            (Some(Part::Begin(_)), Some(_)) => Err(refusal::duplicate_begin()),
            (Some(Part::Begin(begin)), None) => begin.try_into().map(Self::Begin),
            (Some(Part::Chunk(chunk)), Some(begun)) => {
                TensorChunk::decode(chunk, begun.dtype, &begun.sides).map(Self::Chunk)
            }
            (Some(Part::Commit(commit)), Some(_)) => Ok(Self::Commit(commit.into())),
            (Some(Part::Chunk(_) | Part::Commit(_)), None) => Err(refusal::expected_begin()),
            (None, _) => Err(refusal::empty_frame()),
        }
    }
}

impl From<AttendRequest> for proto::AttendRequest {
    fn from(request: AttendRequest) -> Self {
        use proto::attend_request::Part;
        let part = match request {
            AttendRequest::Begin(begin) => Part::Begin(begin.into()),
            AttendRequest::Chunk(chunk) => Part::Chunk(chunk.into()),
            AttendRequest::Commit(commit) => Part::Commit(commit.into()),
        };
        Self { part: Some(part) }
    }
}

impl TryFrom<proto::AttendBegin> for Begin {
    type Error = Error;

    fn try_from(message: proto::AttendBegin) -> Result<Self, Error> {
        let shape = convert::shape(message.shape)?;
        let workers = match (message.max_workers, message.force_workers) {
            (0, false) => WorkerChoice::Auto,
            (0, true) => return Err(Error::new(Reason::Workers, "0 workers asked for")),
            (most, false) => WorkerChoice::AtMost(convert::size(most)),
            (asked, true) => WorkerChoice::Exactly(convert::size(asked)),
        };
        let dtype = convert::dtype(message.dtype)?;
        let scale =
            message.scale.unwrap_or_else(|| operator::default_scale(message.operator.as_ref(), &shape));
        let encoded = Encoded { scale, causal: message.causal, operator: message.operator };
        let (shape, sides) = projection::decode(message.projection, shape, encoded.sides(&shape)?)?;
        let operator = encoded.decode(&shape, &sides)?;
        operator::check_empty_rows(&operator, message.forbid_empty_rows)?;
        projection::check(&shape, dtype, &operator)?;
        let outputs = outputs::decode(message.outputs, &shape, &operator)?;
        Ok(Self {
            shape,
            dtype,
            operator,
            outputs,
            sides,
            allow_non_finite: message.allow_non_finite,
            forbid_empty_rows: message.forbid_empty_rows,
            workers,
        })
    }
}

impl From<Begin> for proto::AttendBegin {
    fn from(begin: Begin) -> Self {
        let (max_workers, force_workers) = match begin.workers {
            WorkerChoice::Auto => (0, false),
            // 0 alone would mean Auto; with force it is refused by whoever decodes it.
            WorkerChoice::AtMost(most) => (small(most), most == 0),
            WorkerChoice::Exactly(asked) => (small(asked), true),
        };
        let Encoded { scale, causal, operator } = Encoded::new(&begin.operator, &begin.sides);
        Self {
            shape: Some((&begin.shape).into()),
            dtype: proto::Dtype::from(begin.dtype).into(),
            scale: Some(scale),
            causal,
            allow_non_finite: begin.allow_non_finite,
            forbid_empty_rows: begin.forbid_empty_rows,
            max_workers,
            force_workers,
            operator,
            outputs: begin.outputs.as_deref().map(outputs::encode),
            projection: projection::encode(&begin.sides),
        }
    }
}

impl TensorChunk {
    /// Decodes a chunk of a call whose operands have elements of `dtype`.
    ///
    /// # Errors
    /// [`Reason::Tensor`], also for one that the call doesn't have, [`Reason::PayloadLength`], [`Reason::Checksum`].
    pub fn decode(message: proto::TensorChunk, dtype: Dtype, sides: &Sides) -> Result<Self, Error> {
        let tensor = convert::tensor(message.tensor)?;
        let element = operator::element_bytes(tensor, dtype, sides)?;
        let place = message.offset.map(u64::to_le_bytes);
        let place = place.as_ref().map_or(&[][..], |bytes| bytes);
        convert::chunk_data(message.index, &message.data, place, message.crc32c, element)?;
        Ok(Self { index: message.index, tensor, offset: message.offset, data: message.data })
    }
}

impl From<TensorChunk> for proto::TensorChunk {
    fn from(chunk: TensorChunk) -> Self {
        Self {
            index: chunk.index,
            tensor: proto::Tensor::from(chunk.tensor).into(),
            crc32c: Some(match chunk.offset {
                Some(offset) => checksum(&[&chunk.data, &offset.to_le_bytes()]),
                None => checksum(&[&chunk.data]),
            }),
            data: chunk.data,
            offset: chunk.offset,
        }
    }
}

impl From<proto::Commit> for Commit {
    fn from(message: proto::Commit) -> Self {
        Self { chunks: message.chunks, bytes: message.bytes }
    }
}

impl From<Commit> for proto::Commit {
    fn from(commit: Commit) -> Self {
        Self { chunks: commit.chunks, bytes: commit.bytes }
    }
}

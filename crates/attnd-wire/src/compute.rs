//! The values between coordinator and worker: one share of one call.

use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::slot::{Node, keys_in_slots};
use attnd_kernel::{AttnShape, Compute, Dtype, Operator, Outputs, PartialRows};
use attnd_plan::{AnyTensor, CellId, Piece, Sides, Tensor, most_report_bytes};

use crate::attend::{Begin, Commit};
use crate::checksum::{Checksummed, checksum};
use crate::compute::rows::{RowBytes, keys_seen};
use crate::convert::{self, quantity, small};
use crate::error::{Error, Reason};
use crate::floats;
use crate::limits::MESSAGE_BYTES;
use crate::operator::{self, Encoded};
use crate::outputs::elements::Elements;
use crate::outputs::share::{MergedSums, ShareReport};
use crate::{outputs, projection, proto, refusal};

pub(crate) mod rows;

/// One frame to a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ComputeRequest {
    /// The first one.
    Begin(ComputeBegin),
    /// Bytes of one head.
    Chunk(SliceChunk),
    /// All bytes were sent.
    Commit(Commit),
    /// How rows ended, for the second pass.
    Sums(MergedSums),
}

/// What one worker shall compute. Decoded only where the order of arithmetic that this binary has for such an operator is
/// the one asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct ComputeBegin {
    /// Names the call in logs.
    pub call_id: u64,
    /// Dimensions of the whole call.
    pub shape: AttnShape,
    /// Element type of Q, K and V on the wire.
    pub dtype: Dtype,
    /// What is computed, made for that shape.
    pub operator: Arc<Operator>,
    /// What the second pass gives; `None` if there is none.
    pub outputs: Option<Arc<Outputs>>,
    /// What comes beside Q, K and V, made for that shape: the tensors that the operator reads, and what keys and values are to be made
    /// of, which is there if and only if the shape says so.
    pub sides: Sides,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// Kv groups times slots: at least one, all inside the call, disjoint.
    pub pieces: Vec<Piece>,
    /// Query tokens in one partial message; at least 1, and such a message is within the limit.
    pub tokens_per_cell: usize,
}

/// A run of bytes of one head of one operand, or of one part of what comes beside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceChunk {
    /// Place in the stream, from 0.
    pub index: u32,
    /// Which tensor: an operand, or one of [`ComputeBegin::sides`].
    pub tensor: AnyTensor,
    /// Query head for Q, kv head for K and V, flattened over the batch; its group is in the share. Of a side tensor,
    /// index into what [`attnd_plan::SideLayout::parts`] gives for the share, which is for whoever takes the bytes to
    /// check.
    pub head: usize,
    /// Where the run begins in that head's `[tokens, dim]` matrix, or in the part's, in bytes; a whole number of
    /// elements.
    pub offset: u64,
    /// Whole elements, at least one, inside of the matrix of a head; the checksum was right.
    pub data: Checksummed,
}

/// One frame from a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ComputeReply {
    /// The partial of one cell.
    Partial(Partial),
    /// Elements of the score matrix, of rows of one cell.
    Elements(Elements),
    /// What is known of the rows of one cell.
    Report(ShareReport),
    /// The last one.
    Finished(Finished),
}

/// `(m, l, o)` of one cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    /// What it covers.
    pub cell: CellId,
    /// Its rows, ordered `[head in group, token]`.
    pub rows: PartialRows,
}

/// The end of a share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Finished {
    /// Wall time with a kernel of this call running.
    pub compute_seconds: f64,
    /// Partials that were sent.
    pub partials: u32,
}

/// What a partial must fit.
#[derive(Clone, Debug, PartialEq)]
pub struct CallShape {
    /// Dimensions of the call.
    pub shape: AttnShape,
    /// Which keys a query sees is in there.
    pub operator: Arc<Operator>,
    /// What the second pass gives.
    pub outputs: Option<Arc<Outputs>>,
    /// NaN and infinities were allowed in, so they may come out.
    pub allow_non_finite: bool,
}

impl From<&Begin> for CallShape {
    fn from(begin: &Begin) -> Self {
        let (operator, outputs) = (Arc::clone(&begin.operator), begin.outputs.clone());
        Self { shape: begin.shape, operator, outputs, allow_non_finite: begin.allow_non_finite }
    }
}

impl From<&ComputeBegin> for CallShape {
    fn from(begin: &ComputeBegin) -> Self {
        let (operator, outputs) = (Arc::clone(&begin.operator), begin.outputs.clone());
        Self { shape: begin.shape, operator, outputs, allow_non_finite: begin.allow_non_finite }
    }
}

// === requests ===

impl ComputeRequest {
    /// Decodes a frame of a call that began with `begun`, or didn't begin yet.
    ///
    /// # Errors
    /// [`Reason::StreamOrder`] for a first frame that isn't Begin, a second Begin, or an empty frame; and whatever
    /// is wrong with the frame itself.
    pub fn decode(message: proto::ComputeRequest, begun: Option<&ComputeBegin>) -> Result<Self, Error> {
        use proto::compute_request::Part;
        match (message.part, begun) {
            (Some(Part::Begin(_)), Some(_)) => Err(refusal::duplicate_begin()),
            (Some(Part::Begin(begin)), None) => begin.try_into().map(Self::Begin),
            (Some(Part::Chunk(chunk)), Some(begun)) => SliceChunk::decode(chunk, begun).map(Self::Chunk),
            (Some(Part::Commit(commit)), Some(_)) => Ok(Self::Commit(commit.into())),
            (Some(Part::Sums(sums)), Some(begun)) => MergedSums::decode(sums, begun).map(Self::Sums),
            (Some(Part::Chunk(_) | Part::Commit(_) | Part::Sums(_)), None) => Err(refusal::expected_begin()),
            (None, _) => Err(refusal::empty_frame()),
        }
    }
}

impl From<ComputeRequest> for proto::ComputeRequest {
    fn from(request: ComputeRequest) -> Self {
        use proto::compute_request::Part;
        let part = match request {
            ComputeRequest::Begin(begin) => Part::Begin(begin.into()),
            ComputeRequest::Chunk(chunk) => Part::Chunk(chunk.into()),
            ComputeRequest::Commit(commit) => Part::Commit(commit.into()),
            ComputeRequest::Sums(sums) => Part::Sums(sums.into()),
        };
        Self { part: Some(part) }
    }
}

impl TryFrom<proto::ComputeBegin> for ComputeBegin {
    type Error = Error;

    fn try_from(message: proto::ComputeBegin) -> Result<Self, Error> {
        let shape = convert::shape(message.shape)?;
        let dtype = convert::dtype(message.dtype)?;
        let encoded = Encoded { scale: message.scale, causal: message.causal, operator: message.operator };
        let (shape, sides) = projection::decode(message.projection, shape, encoded.sides(&shape)?)?;
        let operator = encoded.decode(&shape, &sides)?;
        projection::check(&shape, dtype, &operator)?;
        // What a newer coordinator says beyond that is lost here, but not in the name.
        let kernel_id = operator.kernel_id(Compute::F32);
        if message.kernel_id != kernel_id {
            return Err(refusal::kernel_mix(&message.kernel_id, kernel_id));
        }
        let outputs = outputs::decode(message.outputs, &shape, &operator)?;
        let tokens_per_cell =
            cell_tokens(convert::size(message.tokens_per_cell), &shape, outputs.as_deref())?;
        Ok(Self {
            call_id: message.call_id,
            shape,
            dtype,
            operator,
            outputs,
            sides,
            allow_non_finite: message.allow_non_finite,
            pieces: convert::pieces(message.pieces, shape.n_groups())?,
            tokens_per_cell,
        })
    }
}

/// Checks the size of the messages about a cell.
pub(crate) fn cell_tokens(
    tokens: usize,
    shape: &AttnShape,
    outputs: Option<&Outputs>,
) -> Result<usize, Error> {
    // Headers are under 64 bytes.
    let largest = MESSAGE_BYTES - 64;
    let row_bytes = shape.group_size() * (shape.value_dim() + 2) * size_of::<f32>();
    let most = (largest / row_bytes).min(shape.n_queries());
    if !(1..=most).contains(&tokens) {
        return Err(Error::new(Reason::Pieces, format!("tokens_per_cell {tokens} not in 1..{most}")));
    }
    let report = outputs.map_or(0, |outputs| most_report_bytes(outputs, tokens));
    if report > largest as u64 {
        let detail = format!("tokens_per_cell {tokens}: reports of {report} bytes > {largest}");
        return Err(Error::new(Reason::Pieces, detail));
    }
    Ok(tokens)
}

impl From<ComputeBegin> for proto::ComputeBegin {
    fn from(begin: ComputeBegin) -> Self {
        let Encoded { scale, causal, operator } = Encoded::new(&begin.operator, &begin.sides);
        Self {
            call_id: begin.call_id,
            shape: Some((&begin.shape).into()),
            dtype: proto::Dtype::from(begin.dtype).into(),
            scale,
            causal,
            allow_non_finite: begin.allow_non_finite,
            pieces: begin.pieces.iter().map(Into::into).collect(),
            tokens_per_cell: small(begin.tokens_per_cell),
            kernel_id: begin.operator.kernel_id(Compute::F32).to_owned(),
            operator,
            outputs: begin.outputs.as_deref().map(outputs::encode),
            projection: projection::encode(&begin.sides),
        }
    }
}

impl SliceChunk {
    /// Decodes a run of a head of the call that `begun` describes.
    ///
    /// # Errors
    /// [`Reason::Tensor`], also for one that the call doesn't have, [`Reason::PayloadLength`], [`Reason::Checksum`],
    /// and [`Reason::Pieces`] for a head of a group that isn't in the share.
    pub fn decode(message: proto::SliceChunk, begun: &ComputeBegin) -> Result<Self, Error> {
        let tensor = convert::tensor(message.tensor)?;
        let element = operator::element_bytes(tensor, begun.dtype, &begun.sides)?;
        convert::chunk_data(message.index, &message.data, &[], None, element)?;
        let data = Checksummed::received(message.index, message.data, message.crc32c)?;
        let head = convert::size(message.head);
        let (index, offset) = (message.index, message.offset);
        let (group, layout) = match tensor {
            AnyTensor::Operand(operand @ Tensor::Q) => {
                (head / begun.shape.group_size(), operand.layout(&begun.shape))
            }
            AnyTensor::Operand(operand) => (head, operand.layout(&begun.shape)),
            AnyTensor::Side(_) if !offset.is_multiple_of(element as u64) => {
                let text = format!("{tensor} part {head}: {} bytes at {offset}", data.len());
                return Err(Error::new(Reason::PayloadLength, text));
            }
            AnyTensor::Side(_) => return Ok(Self { index, tensor, head, offset, data }),
        };
        if !begun.pieces.iter().any(|piece| piece.groups.contains(&group)) {
            return Err(Error::new(Reason::Pieces, format!("{tensor} head {head} is not in this share")));
        }
        let (_, tokens, dim) = layout;
        let matrix = (tokens * dim * element) as u64;
        let end = offset.checked_add(data.len() as u64);
        if !offset.is_multiple_of(element as u64) || end.is_none_or(|end| end > matrix) {
            let run = format!("{tensor} head {head}: {} bytes at {offset} of {matrix}", data.len());
            return Err(Error::new(Reason::PayloadLength, run));
        }
        Ok(Self { index, tensor, head, offset, data })
    }
}

impl From<SliceChunk> for proto::SliceChunk {
    fn from(chunk: SliceChunk) -> Self {
        Self {
            index: chunk.index,
            tensor: proto::Tensor::from(chunk.tensor).into(),
            head: small(chunk.head),
            offset: chunk.offset,
            crc32c: chunk.data.crc32c(),
            data: chunk.data.into_data(),
        }
    }
}

// === replies ===

impl ComputeReply {
    /// Decodes a frame of the answer to a share of `call`.
    ///
    /// # Errors
    /// [`Reason::PartialInvalid`], [`Reason::Checksum`], [`Reason::ReplyInvalid`].
    pub fn decode(message: proto::ComputeReply, call: &CallShape) -> Result<Self, Error> {
        use proto::compute_reply::Part;
        match message.part {
            Some(Part::Partial(partial)) => Partial::decode(partial, call).map(Self::Partial),
            Some(Part::Report(report)) => ShareReport::decode(report, call).map(Self::Report),
            Some(Part::Elements(elements)) => match call.outputs.as_deref() {
                Some(outputs) => Elements::decode(elements, &call.shape, outputs).map(Self::Elements),
                None => Err(Error::new(Reason::ReplyInvalid, "no outputs are wanted")),
            },
            Some(Part::Finished(finished)) => finished.try_into().map(Self::Finished),
            None => Err(Error::new(Reason::ReplyInvalid, "empty frame")),
        }
    }
}

impl From<ComputeReply> for proto::ComputeReply {
    fn from(reply: ComputeReply) -> Self {
        use proto::compute_reply::Part;
        let part = match reply {
            ComputeReply::Partial(partial) => Part::Partial(partial.into()),
            ComputeReply::Elements(elements) => Part::Elements(elements.into()),
            ComputeReply::Report(report) => Part::Report(report.into()),
            ComputeReply::Finished(finished) => Part::Finished(finished.into()),
        };
        Self { part: Some(part) }
    }
}

impl Partial {
    /// Decodes the partial of a cell of `call`: a cell that the call has, exactly the bytes it needs, the right
    /// checksum, and rows that a kernel can have made. Whether it was asked for is for the gather to say.
    ///
    /// # Errors
    /// [`Reason::PartialInvalid`] and [`Reason::Checksum`].
    pub fn decode(message: proto::Partial, call: &CallShape) -> Result<Self, Error> {
        let place = format!(
            "group {} node {}/{} tokens {}+{}",
            message.group, message.node_level, message.node_index, message.first_token, message.tokens
        );
        let invalid = |what: String| Error::new(Reason::PartialInvalid, format!("{place}: {what}"));
        let cell = cell_of(&message, &call.shape).map_err(invalid)?;
        let rows = call.shape.group_size() * cell.tokens;
        let value_dim = call.shape.value_dim();
        for (field, bytes, need) in [
            ("m", &message.m, rows * 4),
            ("l", &message.l, rows * 4),
            ("o", &message.o, rows * value_dim * 4),
        ] {
            if bytes.len() != need {
                return Err(invalid(format!("{field} needs {need} bytes, got {}", bytes.len())));
            }
        }
        if checksum(&[&message.m, &message.l, &message.o]) != message.crc32c {
            return Err(Error::new(Reason::Checksum, place));
        }
        let bytes = RowBytes { m: &message.m, l: &message.l, o: &message.o };
        let rows = bytes.decode(&keys_seen(&cell, call), call).map_err(invalid)?;
        Ok(Self { cell, rows })
    }
}

/// The cell that a partial says it is, if the call has it.
fn cell_of(message: &proto::Partial, shape: &AttnShape) -> Result<CellId, String> {
    let group = convert::size(message.group);
    if group >= shape.n_groups() {
        return Err(format!("there are {} groups", shape.n_groups()));
    }
    let node = Node::new(message.node_level, message.node_index).ok_or("there is no such node")?;
    let tokens: Range<usize> = convert::range(message.first_token, message.tokens, shape.n_queries())
        .ok_or_else(|| format!("there are {} tokens", shape.n_queries()))?;
    let keys = keys_in_slots(node.slots(), shape.n_keys());
    if keys == 0 || convert::size(message.keys) != keys {
        return Err(format!("the node holds {keys} keys, got {}", message.keys));
    }
    Ok(CellId { group, node, first_token: tokens.start, tokens: tokens.len(), keys })
}

impl From<Partial> for proto::Partial {
    fn from(partial: Partial) -> Self {
        let Partial { cell, rows } = partial;
        let (m, l, o) = (floats::into_bytes(rows.m), floats::into_bytes(rows.l), floats::into_bytes(rows.o));
        Self {
            group: small(cell.group),
            node_level: cell.node.level().into(),
            node_index: cell.node.index().into(),
            first_token: small(cell.first_token),
            tokens: small(cell.tokens),
            keys: small(cell.keys),
            crc32c: checksum(&[&m, &l, &o]),
            m,
            l,
            o,
        }
    }
}

impl TryFrom<proto::Finished> for Finished {
    type Error = Error;

    fn try_from(message: proto::Finished) -> Result<Self, Error> {
        let compute_seconds = quantity(Reason::ReplyInvalid, "compute_seconds", message.compute_seconds)?;
        Ok(Self { compute_seconds, partials: message.partials })
    }
}

impl From<Finished> for proto::Finished {
    fn from(finished: Finished) -> Self {
        Self { compute_seconds: finished.compute_seconds, partials: finished.partials }
    }
}

#[cfg(test)]
mod tests;

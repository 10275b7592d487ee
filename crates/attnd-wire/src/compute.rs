//! The values between coordinator and worker: one share of one call.

use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::slot::{Node, PAGE_KEYS, keys_in_slots, n_pages, slot_of_page};
use attnd_kernel::{AttnShape, Compute, Dtype, Normaliser, Operator, PartialRows};
use attnd_plan::{CellId, Piece, Tensor};
use bytes::Bytes;

use crate::attend::{Begin, Commit};
use crate::convert::{self, quantity, small};
use crate::error::{Error, Reason};
use crate::floats::{self, checksum};
use crate::limits::MESSAGE_BYTES;
use crate::operator::Encoded;
use crate::{proto, refusal};

/// One frame to a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ComputeRequest {
    /// The first one.
    Begin(ComputeBegin),
    /// Bytes of one head.
    Chunk(SliceChunk),
    /// The last one.
    Commit(Commit),
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
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// Kv groups times slots: at least one, all inside the call, disjoint.
    pub pieces: Vec<Piece>,
    /// Query tokens in one partial message; at least 1, and such a message is within the limit.
    pub tokens_per_cell: usize,
}

/// A run of bytes of one head of one operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceChunk {
    /// Place in the stream, from 0.
    pub index: u32,
    /// Which operand.
    pub tensor: Tensor,
    /// Query head for Q, kv head for K and V, flattened over the batch; its group is in the share.
    pub head: usize,
    /// Where the run begins in that head's `[tokens, dim]` matrix, in bytes; a whole number of elements.
    pub offset: u64,
    /// Whole elements, at least one, inside of the matrix; the checksum was right.
    pub data: Bytes,
}

/// One frame from a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ComputeReply {
    /// The partial of one cell.
    Partial(Partial),
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
    /// NaN and infinities were allowed in, so they may come out.
    pub allow_non_finite: bool,
}

impl From<&Begin> for CallShape {
    fn from(begin: &Begin) -> Self {
        let operator = Arc::clone(&begin.operator);
        Self { shape: begin.shape, operator, allow_non_finite: begin.allow_non_finite }
    }
}

impl From<&ComputeBegin> for CallShape {
    fn from(begin: &ComputeBegin) -> Self {
        let operator = Arc::clone(&begin.operator);
        Self { shape: begin.shape, operator, allow_non_finite: begin.allow_non_finite }
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
            (Some(Part::Chunk(_) | Part::Commit(_)), None) => Err(refusal::expected_begin()),
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
        let operator = encoded.decode(&shape)?;
        // What a newer coordinator says beyond that is lost here, but not in the name.
        let kernel_id = operator.kernel_id(Compute::F32);
        if message.kernel_id != kernel_id {
            return Err(refusal::kernel_mix(&message.kernel_id, kernel_id));
        }
        Ok(Self {
            call_id: message.call_id,
            shape,
            dtype,
            operator,
            allow_non_finite: message.allow_non_finite,
            pieces: convert::pieces(message.pieces, shape.n_groups())?,
            tokens_per_cell: cell_tokens(message.tokens_per_cell, &shape)?,
        })
    }
}

/// Checks the size of a partial message.
fn cell_tokens(tokens: u32, shape: &AttnShape) -> Result<usize, Error> {
    // Headers of a partial are under 64 bytes.
    let row_bytes = shape.group_size() * (shape.value_dim() + 2) * size_of::<f32>();
    let most = ((MESSAGE_BYTES - 64) / row_bytes).min(shape.n_queries());
    match convert::size(tokens) {
        tokens if (1..=most).contains(&tokens) => Ok(tokens),
        tokens => Err(Error::new(Reason::Pieces, format!("tokens_per_cell {tokens} not in 1..{most}"))),
    }
}

impl From<ComputeBegin> for proto::ComputeBegin {
    fn from(begin: ComputeBegin) -> Self {
        let Encoded { scale, causal, operator } = Encoded::from(&*begin.operator);
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
        }
    }
}

impl SliceChunk {
    /// Decodes a run of a head of the call that `begun` describes.
    ///
    /// # Errors
    /// [`Reason::Tensor`], [`Reason::PayloadLength`], [`Reason::Checksum`], and [`Reason::Pieces`] for a head of a
    /// group that isn't in the share.
    pub fn decode(message: proto::SliceChunk, begun: &ComputeBegin) -> Result<Self, Error> {
        let tensor = convert::tensor(message.tensor)?;
        convert::chunk_data(message.index, &message.data, &[], Some(message.crc32c), begun.dtype)?;
        let head = convert::size(message.head);
        let group = if tensor == Tensor::Q { head / begun.shape.group_size() } else { head };
        if !begun.pieces.iter().any(|piece| piece.groups.contains(&group)) {
            return Err(Error::new(Reason::Pieces, format!("{tensor} head {head} is not in this share")));
        }
        let element = begun.dtype.size();
        let (_, tokens, dim) = tensor.layout(&begun.shape);
        let matrix = (tokens * dim * element) as u64;
        let end = message.offset.checked_add(message.data.len() as u64);
        if !message.offset.is_multiple_of(element as u64) || end.is_none_or(|end| end > matrix) {
            let run = format!(
                "{tensor} head {head}: {} bytes at {} of {matrix}",
                message.data.len(),
                message.offset
            );
            return Err(Error::new(Reason::PayloadLength, run));
        }
        Ok(Self { index: message.index, tensor, head, offset: message.offset, data: message.data })
    }
}

impl From<SliceChunk> for proto::SliceChunk {
    fn from(chunk: SliceChunk) -> Self {
        Self {
            index: chunk.index,
            tensor: proto::Tensor::from(chunk.tensor).into(),
            head: small(chunk.head),
            offset: chunk.offset,
            crc32c: checksum(&[&chunk.data]),
            data: chunk.data,
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
        let (m, l) = (floats::from_bytes(&message.m), floats::from_bytes(&message.l));
        let o = floats::from_bytes(&message.o);
        let seen = keys_seen(&cell, call);
        // Rows are ordered [head in group, token]: the same counts for each head.
        let rows = m.iter().zip(&l).zip(seen.iter().cycle());
        let impossible = rows.enumerate().find(|(_, ((m, l), seen))| !is_possible(**m, **l, **seen, call));
        if let Some((row, ((m, l), seen))) = impossible {
            return Err(invalid(format!("row {row} has m {m}, l {l} over {seen} keys")));
        }
        // Infinities are sums that overflowed: the client's doing. A worker says so itself where they became NaN.
        if !call.allow_non_finite
            && let Some(at) = o.iter().position(|o| o.is_nan())
        {
            return Err(invalid(format!("row {} has o NaN", at / value_dim)));
        }
        Ok(Self { cell, rows: PartialRows { value_dim, m, l, o } })
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

/// How many keys of the node each token of a cell sees. One pass over pages and one over tokens.
fn keys_seen(cell: &CellId, call: &CallShape) -> Vec<usize> {
    let slots = cell.node.slots();
    let n_pages = n_pages(call.shape.n_keys());
    let is_of_node = |page: usize| slots.contains(&slot_of_page(page));
    // Keys of the node before each page, all pages being whole: no mask reaches behind the last key.
    let mut before = Vec::with_capacity(n_pages + 1);
    let mut keys = 0;
    for page in 0..=n_pages {
        before.push(keys);
        keys += if is_of_node(page) { PAGE_KEYS } else { 0 };
    }
    let before_key = |key: usize| {
        let page = key / PAGE_KEYS;
        before[page] + if is_of_node(page) { key % PAGE_KEYS } else { 0 }
    };
    let mask = call.operator.mask_of_group(cell.group, &call.shape);
    let tokens = cell.first_token..cell.first_token + cell.tokens;
    let seen = tokens.map(|token| {
        let visible = mask.visible(token);
        before_key(visible.end) - before_key(visible.start)
    });
    seen.collect()
}

/// Whether a kernel can have made a row with this maximum and this sum over `seen` visible keys.
///
/// The maximum is an integer, so the weight of the largest score is at least `2^-0.5`, and none is over `2^0.5`; where weights are
/// sigmoids the maximum is 0, and none is over 1. Finite operands have finite scores, so a row is empty if and only if it sees no key.
fn is_possible(m: f32, l: f32, seen: usize, call: &CallShape) -> bool {
    let empty = m == f32::NEG_INFINITY && l == 0.0;
    let keys = seen as f32;
    let regular = match call.operator.normaliser() {
        Normaliser::Softmax => m.is_finite() && m.fract() == 0.0 && (0.7..=1.42 * keys).contains(&l),
        Normaliser::Sigmoid { .. } => m == 0.0 && (0.0..=1.01 * keys).contains(&l),
    };
    if !call.allow_non_finite {
        return if seen == 0 { empty } else { regular };
    }
    let poisoned = m.is_nan() || m == f32::INFINITY || !l.is_finite();
    empty || regular || poisoned
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

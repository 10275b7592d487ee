//! The small pieces that several messages share: shapes, enums, pieces of work, texts.
//!
//! Encoding a value can't fail; decoding says what doesn't hold.

use std::ops::Range;

use attnd_kernel::slot::N_SLOTS;
use attnd_kernel::{AttnShape, Dims, Dtype};
use attnd_plan::{AnyTensor, Piece, SideTensor, Tensor};
use bytes::Bytes;

use crate::checksum::checksum;
use crate::error::{Error, Reason};
use crate::limits::{MAX_ENTRIES, MAX_TEXT};
use crate::{proto, refusal};

/// Encodes a number that every valid value keeps far below 2^32.
pub(crate) fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Decodes a number; 2^32 fits wherever attnd runs.
pub(crate) fn size(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// The range of `len` from `first`, if it isn't empty and ends by `end`.
pub(crate) fn range(first: u32, len: u32, end: usize) -> Option<Range<usize>> {
    let range = size(first)..size(first).checked_add(size(len))?;
    (!range.is_empty() && range.end <= end).then_some(range)
}

impl From<&AttnShape> for proto::Shape {
    fn from(shape: &AttnShape) -> Self {
        Self {
            batch: small(shape.batch()),
            heads: small(shape.n_heads()),
            kv_heads: small(shape.n_kv_heads()),
            queries: small(shape.n_queries()),
            keys: small(shape.n_keys()),
            head_dim: small(shape.head_dim()),
            value_dim: small(shape.value_dim()),
            query_dim: if shape.query_dim() == shape.head_dim() { 0 } else { small(shape.query_dim()) },
            value_is_key_prefix: shape.value_is_key_prefix(),
        }
    }
}

/// Decodes a shape; a missing one has all dimensions zero.
///
/// # Errors
/// [`Reason::ShapeOverflow`], [`Reason::ShapeZero`], [`Reason::ShapeLimit`], [`Reason::GqaRatio`].
pub fn shape(message: Option<proto::Shape>) -> Result<AttnShape, Error> {
    let message = message.unwrap_or_default();
    let dims = Dims {
        batch: message.batch.into(),
        heads: message.heads.into(),
        kv_heads: message.kv_heads.into(),
        queries: message.queries.into(),
        keys: message.keys.into(),
        head_dim: message.head_dim.into(),
        value_dim: message.value_dim.into(),
    };
    let mut shape = refusal::shape(dims)?;
    if message.query_dim != 0 {
        shape = shape.with_query_dim(message.query_dim.into())?;
    }
    if message.value_is_key_prefix { Ok(shape.with_values_from_keys()?) } else { Ok(shape) }
}

impl From<Dtype> for proto::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

/// Decodes the element type of an operand.
///
/// # Errors
/// [`Reason::Dtype`] with the number.
pub fn dtype(number: i32) -> Result<Dtype, Error> {
    match proto::Dtype::try_from(number) {
        Ok(proto::Dtype::F32) => Ok(Dtype::F32),
        Ok(proto::Dtype::F16) => Ok(Dtype::F16),
        Ok(proto::Dtype::Bf16) => Ok(Dtype::Bf16),
        Ok(proto::Dtype::Unspecified | proto::Dtype::Bool) | Err(_) => {
            Err(Error::new(Reason::Dtype, number.to_string()))
        }
    }
}

impl From<AnyTensor> for proto::Tensor {
    fn from(tensor: AnyTensor) -> Self {
        match tensor {
            AnyTensor::Operand(Tensor::Q) => Self::Q,
            AnyTensor::Operand(Tensor::K) => Self::K,
            AnyTensor::Operand(Tensor::V) => Self::V,
            AnyTensor::Side(SideTensor::Mask) => Self::Mask,
            AnyTensor::Side(SideTensor::Bias) => Self::Bias,
            AnyTensor::Side(SideTensor::Previous) => Self::Previous,
            AnyTensor::Side(SideTensor::KeyMatrix) => Self::KeyMatrix,
            AnyTensor::Side(SideTensor::ValueMatrix) => Self::ValueMatrix,
            AnyTensor::Side(SideTensor::Source) => Self::Source,
            AnyTensor::Side(SideTensor::ValueSource) => Self::ValueSource,
        }
    }
}

/// Decodes the name of a tensor.
///
/// # Errors
/// [`Reason::Tensor`] with the number.
pub fn tensor(number: i32) -> Result<AnyTensor, Error> {
    match proto::Tensor::try_from(number) {
        Ok(proto::Tensor::Q) => Ok(Tensor::Q.into()),
        Ok(proto::Tensor::K) => Ok(Tensor::K.into()),
        Ok(proto::Tensor::V) => Ok(Tensor::V.into()),
        Ok(proto::Tensor::Mask) => Ok(SideTensor::Mask.into()),
        Ok(proto::Tensor::Bias) => Ok(SideTensor::Bias.into()),
        Ok(proto::Tensor::Previous) => Ok(SideTensor::Previous.into()),
        Ok(proto::Tensor::KeyMatrix) => Ok(SideTensor::KeyMatrix.into()),
        Ok(proto::Tensor::ValueMatrix) => Ok(SideTensor::ValueMatrix.into()),
        Ok(proto::Tensor::Source) => Ok(SideTensor::Source.into()),
        Ok(proto::Tensor::ValueSource) => Ok(SideTensor::ValueSource.into()),
        Ok(proto::Tensor::Unspecified) | Err(_) => Err(Error::new(Reason::Tensor, number.to_string())),
    }
}

impl From<&Piece> for proto::Piece {
    fn from(piece: &Piece) -> Self {
        Self {
            group_begin: small(piece.groups.start),
            group_end: small(piece.groups.end),
            slot_begin: small(piece.slots.start),
            slot_end: small(piece.slots.end),
        }
    }
}

/// Decodes the pieces of one share: each within `n_groups` kv groups and the slots, none empty, none twice.
///
/// # Errors
/// [`Reason::Count`] and [`Reason::Pieces`].
pub fn pieces(messages: Vec<proto::Piece>, n_groups: usize) -> Result<Vec<Piece>, Error> {
    count("pieces", messages.len())?;
    if messages.is_empty() {
        return Err(Error::new(Reason::Pieces, "none"));
    }
    let mut slots_taken = vec![0_u64; n_groups];
    let mut pieces = Vec::with_capacity(messages.len());
    for (at, message) in messages.into_iter().enumerate() {
        let groups = size(message.group_begin)..size(message.group_end);
        let slots = size(message.slot_begin)..size(message.slot_end);
        let taken = slots_taken.get_mut(groups.clone()).filter(|taken| !taken.is_empty());
        let (Some(taken), false) = (taken, slots.is_empty() || slots.end > N_SLOTS) else {
            let text = format!("{at}: groups {groups:?} of {n_groups}, slots {slots:?} of {N_SLOTS}");
            return Err(Error::new(Reason::Pieces, text));
        };
        let mask = slots.clone().fold(0, |mask, slot| mask | 1_u64 << slot);
        if taken.iter().any(|taken| taken & mask != 0) {
            return Err(Error::new(Reason::Pieces, format!("{at} overlaps an earlier one")));
        }
        taken.iter_mut().for_each(|taken| *taken |= mask);
        pieces.push(Piece { groups, slots });
    }
    Ok(pieces)
}

/// Refuses a repeated field with more than [`MAX_ENTRIES`] entries.
pub(crate) fn count(field: &str, entries: usize) -> Result<(), Error> {
    if entries <= MAX_ENTRIES {
        return Ok(());
    }
    Err(Error::new(Reason::Count, format!("{field} {entries} > {MAX_ENTRIES}")))
}

/// Checks a text that will be shown: short, without control characters.
pub(crate) fn text(reason: Reason, field: &str, text: String) -> Result<String, Error> {
    if text.len() > MAX_TEXT {
        return Err(Error::new(reason, format!("{field} has {} bytes, at most {MAX_TEXT}", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::new(reason, format!("{field} has control characters: {text}")));
    }
    Ok(text)
}

/// Checks a measured quantity: finite, not negative.
pub(crate) fn quantity(reason: Reason, field: &str, value: f64) -> Result<f64, Error> {
    if value.is_finite() && value >= 0.0 {
        Ok(value)
    } else {
        Err(Error::new(reason, format!("{field} {value}")))
    }
}

/// Checks the bytes of chunk `index`: not empty, whole elements of `element` bytes, and with the checksum that came
/// along, which covers the bytes of `place` behind them.
pub(crate) fn chunk_data(
    index: u32,
    data: &Bytes,
    place: &[u8],
    crc32c: Option<u32>,
    element: usize,
) -> Result<(), Error> {
    if data.is_empty() {
        return Err(Error::new(Reason::PayloadLength, format!("chunk {index} has 0 bytes")));
    }
    if !data.len().is_multiple_of(element) {
        return Err(Error::new(Reason::PayloadLength, format!("{} not a multiple of {element}", data.len())));
    }
    match crc32c {
        Some(sent) if sent != checksum(&[data, place]) => Err(refusal::checksum(index)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(groups: Range<usize>, slots: Range<usize>) -> proto::Piece {
        (&Piece { groups, slots }).into()
    }

    #[test]
    fn unknown_enum_values_are_named() {
        assert_eq!(dtype(0).unwrap_err().message(), "DTYPE: 0");
        assert_eq!(dtype(99).unwrap_err().message(), "DTYPE: 99");
        assert_eq!(tensor(0).unwrap_err().message(), "TENSOR: 0");
        assert_eq!(tensor(-1).unwrap_err().message(), "TENSOR: -1");
    }

    #[test]
    fn enums_return() {
        for value in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            assert_eq!(dtype(proto::Dtype::from(value).into()), Ok(value));
        }
        let sides = SideTensor::ALL.map(AnyTensor::from);
        for value in Tensor::ALL.map(AnyTensor::from).into_iter().chain(sides) {
            assert_eq!(tensor(proto::Tensor::from(value).into()), Ok(value));
        }
    }

    #[test]
    fn pieces_lie_inside_and_apart() {
        let message = |list: Vec<proto::Piece>| pieces(list, 4).unwrap_err().message();
        assert_eq!(message(vec![]), "PIECES: none");
        assert_eq!(message(vec![piece(0..5, 0..64)]), "PIECES: 0: groups 0..5 of 4, slots 0..64 of 64");
        assert_eq!(message(vec![piece(0..4, 0..65)]), "PIECES: 0: groups 0..4 of 4, slots 0..65 of 64");
        assert_eq!(message(vec![piece(3..3, 0..64)]), "PIECES: 0: groups 3..3 of 4, slots 0..64 of 64");
        assert_eq!(
            message(vec![piece(Range { start: 3, end: 2 }, 0..64)]),
            "PIECES: 0: groups 3..2 of 4, slots 0..64 of 64"
        );
        assert_eq!(message(vec![piece(0..4, 9..9)]), "PIECES: 0: groups 0..4 of 4, slots 9..9 of 64");
        assert_eq!(
            message(vec![piece(0..2, 0..32), piece(1..3, 31..33)]),
            "PIECES: 1 overlaps an earlier one"
        );
        assert_eq!(message(vec![piece(0..1, 0..1); 32_768]), "COUNT: pieces 32768 > 1024");
        assert_eq!(pieces(vec![piece(0..2, 0..32), piece(1..3, 32..64)], 4).unwrap().len(), 2);
    }

    #[test]
    fn chunks_are_whole_and_unharmed() {
        let data = Bytes::from(vec![7; 4097]);
        assert_eq!(
            chunk_data(0, &data, &[], None, Dtype::F32.size()).unwrap_err().message(),
            "PAYLOAD_LENGTH: 4097 not a multiple of 4"
        );
        let data = data.slice(..4096);
        assert_eq!(
            chunk_data(2, &data, &[], Some(1), Dtype::F32.size()).unwrap_err().message(),
            "CHECKSUM: chunk 2, nothing applied"
        );
        assert_eq!(chunk_data(2, &data, &[], Some(crc32c::crc32c(&data)), Dtype::F32.size()), Ok(()));
        assert_eq!(chunk_data(2, &data, &[], None, Dtype::Bf16.size()), Ok(()));
        assert_eq!(
            chunk_data(5, &Bytes::new(), &[], None, Dtype::F32.size()).unwrap_err().message(),
            "PAYLOAD_LENGTH: chunk 5 has 0 bytes"
        );
    }

    proptest! {
        #[test]
        fn no_shape_and_no_piece_panics(
            dims in any::<[u32; 8]>(), value_is_key_prefix in any::<bool>(), tiny in any::<bool>(), ends in any::<[u32; 4]>(), n_groups in 1..1024_usize,
        ) {
            let [batch, heads, kv_heads, queries, keys, head_dim, value_dim, query_dim] =
                dims.map(|d| if tiny { d % 4 } else { d });
            let message = proto::Shape {
                batch, heads, kv_heads, queries, keys, head_dim, value_dim, query_dim, value_is_key_prefix,
            };
            if let Ok(shape) = shape(Some(message)) {
                // The dimension of keys is what absence means.
                let query_dim = if query_dim == head_dim { 0 } else { query_dim };
                prop_assert_eq!(proto::Shape::from(&shape), proto::Shape { query_dim, ..message });
            }
            let [group_begin, group_end, slot_begin, slot_end] = ends.map(|e| if tiny { e % 65 } else { e });
            let message = proto::Piece { group_begin, group_end, slot_begin, slot_end };
            if let Ok(pieces) = pieces(vec![message], n_groups) {
                prop_assert_eq!(proto::Piece::from(&pieces[0]), message);
            }
        }
    }
}

//! What a call computes beside its operands, in messages: a scale and a causal rule as calls always had them, and an
//! `Operator` message for all else, which is absent where there is nothing else.

use std::num::NonZeroUsize;
use std::sync::Arc;

use attnd_kernel::{
    AttnShape, Causal, Csr, EmptyRow, Mask, MaskError, Operator, OperatorError, OperatorParts, OutOfMemory,
    PerBatch, Positions, ScoreError, Selection, Window,
};
use attnd_plan::Sides;
use prost::Message;

use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::limits::OPERATOR_BYTES;
use crate::{proto, refusal};

mod blocks;
pub(crate) mod dense;
mod documents;
mod function;
mod scores;

pub(crate) use dense::element_bytes;
pub use dense::{check_previous, hides_single_keys};
pub(crate) use function::default_scale;

/// The fields of a Begin that an operator is in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Encoded {
    pub(crate) scale: f32,
    pub(crate) causal: i32,
    pub(crate) operator: Option<proto::Operator>,
}

impl From<&Operator> for Encoded {
    /// All of it but the dense tensors, which are with what travels beside.
    fn from(operator: &Operator) -> Self {
        let mask = operator.mask();
        let positions = match &mask.positions {
            None => proto::Positions::Unspecified,
            Some(Positions::TopLeft) => proto::Positions::TopLeft,
            Some(Positions::BottomRight) => proto::Positions::BottomRight,
            Some(Positions::Offset(_)) => proto::Positions::Offset,
        };
        let causal = match (mask.causal, positions) {
            (false, _) => proto::Causal::None,
            (true, proto::Positions::Unspecified) => proto::Causal::Aligned,
            (true, proto::Positions::TopLeft) => proto::Causal::TopLeft,
            (true, proto::Positions::BottomRight) => proto::Causal::BottomRight,
            (true, proto::Positions::Offset) => proto::Causal::Offset,
        };
        let empty_row = match operator.empty_row() {
            EmptyRow::Zero => proto::EmptyRow::Zero,
            EmptyRow::Nan => proto::EmptyRow::Nan,
            EmptyRow::Uniform => proto::EmptyRow::Uniform,
        };
        let is_causal = mask.as_causal().is_some() && operator.csr().is_none();
        let more = proto::Operator {
            score: function::encode(operator.score()),
            softcap: operator.softcap(),
            biases: scores::encode_biases(operator.biases()),
            normaliser: scores::encode_normaliser(operator.normaliser()),
            mask: (!is_causal).then(|| encode_mask(mask, positions, operator.csr())),
            sinks: operator.sinks().unwrap_or_default().to_vec(),
            empty_row: empty_row.into(),
        };
        let is_there = more != proto::Operator::default();
        Self { scale: operator.scale(), causal: causal.into(), operator: is_there.then_some(more) }
    }
}

impl Encoded {
    /// An operator, and what travels beside it.
    ///
    /// # Panics
    /// If the operator reads other tensors than these.
    pub(crate) fn new(operator: &Operator, sides: &Sides) -> Self {
        let mut encoded = Self::from(operator);
        dense::encode(operator, sides, &mut encoded.operator);
        encoded
    }

    /// Decodes what travels beside the operator.
    ///
    /// # Errors
    /// [`Reason::Count`], [`Reason::Dtype`], [`Reason::Combination`], [`Reason::Operator`].
    pub(crate) fn sides(&self, shape: &AttnShape) -> Result<Sides, Error> {
        dense::decode(self.operator.as_ref(), shape)
    }

    /// Decodes the operator of a call of `shape`, which has these tensors beside it.
    ///
    /// # Errors
    /// [`Reason::Causal`], [`Reason::Scale`], [`Reason::Combination`], and [`Reason::Operator`] for everything else.
    pub(crate) fn decode(self, shape: &AttnShape, sides: &Sides) -> Result<Arc<Operator>, Error> {
        self.check_bytes()?;
        let (causal, aligned) = causal(self.causal)?;
        let proto::Operator { score, softcap, mask, biases, normaliser, sinks, empty_row } =
            self.operator.unwrap_or_default();
        let score = function::decode(score)?;
        let mut mask = mask.unwrap_or_default();
        let csr = mask.csr.take().map(blocks::decode).transpose()?;
        let selection = mask.dense.is_some().then_some(Selection::Dense);
        let mask = decode_mask(mask, causal, aligned, shape)?;
        let empty_row = match proto::EmptyRow::try_from(empty_row) {
            Ok(proto::EmptyRow::Zero) => EmptyRow::Zero,
            Ok(proto::EmptyRow::Nan) => EmptyRow::Nan,
            Ok(proto::EmptyRow::Uniform) => EmptyRow::Uniform,
            Err(_) => return Err(Error::new(Reason::Operator, format!("empty_row {empty_row}"))),
        };
        let biases = scores::decode_biases(biases)?;
        let normaliser = scores::decode_normaliser(normaliser)?;
        let sinks = (!sinks.is_empty()).then(|| sinks.into());
        let plain = OperatorParts::plain(self.scale, Causal::None);
        let parts = OperatorParts {
            score,
            softcap,
            biases,
            mask,
            selection,
            csr,
            normaliser,
            sinks,
            empty_row,
            ..plain
        };
        let operator = Operator::new(parts, shape)?;
        check_previous(&operator, sides)?;
        Ok(Arc::new(operator))
    }

    /// # Errors
    /// [`Reason::Operator`] if the message is too large.
    fn check_bytes(&self) -> Result<(), Error> {
        let bytes = self.operator.as_ref().map_or(0, Message::encoded_len);
        if bytes <= OPERATOR_BYTES {
            return Ok(());
        }
        let text = format!("its parameters, tables and lists have {bytes} bytes, at most {OPERATOR_BYTES}");
        Err(Error::new(Reason::Operator, text))
    }
}

/// Refuses an operator whose parameters, tables and lists are too large to be sent.
///
/// # Errors
/// [`Reason::Operator`] with both numbers.
pub fn check_bytes(operator: &Operator) -> Result<(), Error> {
    Encoded::from(operator).check_bytes()
}

/// Whether there is a causal rule, and where it says that queries stand.
fn causal(number: i32) -> Result<(proto::Causal, proto::Positions), Error> {
    let rule = proto::Causal::try_from(number);
    let rule = rule.map_err(|_unknown| Error::new(Reason::Causal, number.to_string()))?;
    let positions = match rule {
        proto::Causal::None | proto::Causal::Aligned => proto::Positions::Unspecified,
        proto::Causal::TopLeft => proto::Positions::TopLeft,
        proto::Causal::BottomRight => proto::Positions::BottomRight,
        proto::Causal::Offset => proto::Positions::Offset,
    };
    Ok((rule, positions))
}

/// Refuses two options of a call that contradict each other.
fn together(one: &str, other: &str) -> Error {
    Error::new(Reason::Combination, format!("{one} and {other}"))
}

/// The option as people write it.
fn causal_option(rule: proto::Causal) -> &'static str {
    match rule {
        proto::Causal::None => "causal=none",
        proto::Causal::BottomRight => "causal=bottom_right",
        proto::Causal::TopLeft => "causal=top_left",
        proto::Causal::Offset => "causal=offset",
        proto::Causal::Aligned => "causal=aligned",
    }
}

/// The option as people write it.
fn positions_option(positions: proto::Positions) -> &'static str {
    match positions {
        proto::Positions::Unspecified => "no mask.positions",
        proto::Positions::TopLeft => "mask.positions=top_left",
        proto::Positions::BottomRight => "mask.positions=bottom_right",
        proto::Positions::Offset => "mask.positions=offset",
    }
}

/// Refuses rows that should be filled by a caller who forbids that there are any.
///
/// # Errors
/// [`Reason::Combination`].
pub fn check_empty_rows(operator: &Operator, forbidden: bool) -> Result<(), Error> {
    match operator.empty_row() {
        EmptyRow::Nan if forbidden => Err(together("forbid_empty_rows", "empty_row=nan")),
        EmptyRow::Uniform if forbidden => Err(together("forbid_empty_rows", "empty_row=uniform")),
        EmptyRow::Zero | EmptyRow::Nan | EmptyRow::Uniform => Ok(()),
    }
}

/// A mask with a causal rule beside it, which says where queries stand unless the mask does.
///
/// # Errors
/// [`Reason::Combination`] if both do and disagree.
pub fn with_causal(causal: attnd_kernel::Causal, mask: Mask) -> Result<Mask, Error> {
    let rule = Mask::from(causal);
    if !rule.causal {
        return Ok(mask);
    }
    match &mask.positions {
        None => Ok(Mask { causal: true, positions: rule.positions, ..mask }),
        same if *same == rule.positions => Ok(Mask { causal: true, ..mask }),
        Some(other) => {
            let rule = match causal {
                attnd_kernel::Causal::BottomRight => proto::Causal::BottomRight,
                _ => proto::Causal::TopLeft,
            };
            let other = match other {
                Positions::TopLeft => proto::Positions::TopLeft,
                Positions::BottomRight => proto::Positions::BottomRight,
                Positions::Offset(_) => proto::Positions::Offset,
            };
            Err(together(causal_option(rule), positions_option(other)))
        }
    }
}

// === masks ===

fn encode_mask(mask: &Mask, positions: proto::Positions, csr: Option<&Csr>) -> proto::Mask {
    let offsets = match &mask.positions {
        Some(Positions::Offset(PerBatch::Same(offset))) => vec![*offset],
        Some(Positions::Offset(PerBatch::Each(offsets))) => offsets.to_vec(),
        _ => Vec::new(),
    };
    let side = |keys: Option<usize>| keys.map_or(-1, |keys| i32::try_from(keys).unwrap_or(i32::MAX));
    let Window { left, right } = mask.window;
    let window = proto::Window { left: side(left), right: side(right) };
    proto::Mask {
        // The causal rule says where queries stand; only where there is none the mask does.
        positions: if mask.causal { 0 } else { positions.into() },
        offsets,
        window: (mask.window != Window::default()).then_some(window),
        chunk: mask.chunk.map_or(0, |keys| small(keys.get())),
        prefix: encode_lengths(mask.prefix.as_ref()),
        key_begin: encode_lengths(mask.key_begin.as_ref()),
        key_end: encode_lengths(mask.key_end.as_ref()),
        query_end: encode_lengths(mask.query_end.as_ref()),
        documents: mask.documents.as_deref().map(documents::encode),
        // With what travels beside.
        dense: None,
        csr: csr.map(blocks::encode),
    }
}

fn decode_mask(
    message: proto::Mask,
    causal: proto::Causal,
    aligned: proto::Positions,
    shape: &AttnShape,
) -> Result<Mask, Error> {
    let proto::Mask {
        positions,
        offsets,
        window,
        chunk,
        prefix,
        key_begin,
        key_end,
        query_end,
        documents,
        dense: _,
        csr: _,
    } = message;
    let typed = proto::Positions::try_from(positions)
        .map_err(|_unknown| Error::new(Reason::Operator, format!("mask.positions {positions}")))?;
    let unspecified = proto::Positions::Unspecified;
    let positions = match (aligned, typed) {
        (aligned, typed) if aligned == unspecified => typed,
        (aligned, typed) if typed == unspecified || typed == aligned => aligned,
        _ => return Err(together(causal_option(causal), positions_option(typed))),
    };
    let option = if aligned == unspecified { positions_option(positions) } else { causal_option(causal) };
    let positions = match positions {
        proto::Positions::Offset if offsets.is_empty() => {
            return Err(together(option, "no mask.offsets"));
        }
        proto::Positions::Offset => Some(Positions::Offset(per_batch(&offsets, |offset| offset))),
        _ if !offsets.is_empty() => return Err(together("mask.offsets", option)),
        proto::Positions::TopLeft => Some(Positions::TopLeft),
        proto::Positions::BottomRight => Some(Positions::BottomRight),
        proto::Positions::Unspecified => None,
    };
    let window = match window {
        Some(proto::Window { left, right }) => {
            Window { left: side("mask.window.left", left)?, right: side("mask.window.right", right)? }
        }
        None => Window::default(),
    };
    let documents = documents.map(|documents| documents::decode(documents, shape)).transpose()?;
    Ok(Mask {
        causal: causal != proto::Causal::None,
        positions,
        window,
        chunk: NonZeroUsize::new(convert::size(chunk)),
        prefix: decode_lengths(&prefix),
        key_begin: decode_lengths(&key_begin),
        key_end: decode_lengths(&key_end),
        query_end: decode_lengths(&query_end),
        documents: documents.map(Arc::new),
    })
}

/// Keys on one side of a window; -1 is any number.
fn side(option: &str, keys: i32) -> Result<Option<usize>, Error> {
    match usize::try_from(keys) {
        Ok(keys) => Ok(Some(keys)),
        Err(_) if keys == -1 => Ok(None),
        Err(_) => Err(Error::new(Reason::Operator, format!("{option} is {keys}"))),
    }
}

/// One number is for all of the batch. Whether there are as many as elements is for the operator to say.
fn per_batch<W: Copy, T>(numbers: &[W], decode: impl Fn(W) -> T) -> PerBatch<T> {
    match numbers {
        [same] => PerBatch::Same(decode(*same)),
        each => PerBatch::Each(each.iter().map(|number| decode(*number)).collect()),
    }
}

fn encode_lengths(lengths: Option<&PerBatch<usize>>) -> Vec<u32> {
    match lengths {
        None => Vec::new(),
        Some(PerBatch::Same(length)) => vec![small(*length)],
        Some(PerBatch::Each(lengths)) => lengths.iter().map(|length| small(*length)).collect(),
    }
}

fn decode_lengths(lengths: &[u32]) -> Option<PerBatch<usize>> {
    (!lengths.is_empty()).then(|| per_batch(lengths, convert::size))
}

impl From<OperatorError> for Error {
    fn from(error: OperatorError) -> Self {
        let reason = match &error {
            OperatorError::Scale { .. } => return refusal::scale(),
            OperatorError::Mask(
                MaskError::Together { .. } | MaskError::Unaligned { .. } | MaskError::Crossed { .. },
            ) => Reason::Combination,
            OperatorError::Together { .. } | OperatorError::Twice { .. } => Reason::Combination,
            OperatorError::Score(ScoreError::Missing { .. } | ScoreError::Surplus { .. }) => {
                Reason::Combination
            }
            OperatorError::Score(ScoreError::OutOfMemory { bytes }) => {
                return OutOfMemory { bytes: *bytes }.into();
            }
            _ => Reason::Operator,
        };
        Self::new(reason, error.to_string())
    }
}

#[cfg(test)]
pub(crate) mod tests;

//! Dense masks and biases in messages: their dimensions. Their elements come as chunks, see [`SideTensor`].

use attnd_kernel::{AttnShape, Bias, Dtype, Operator, Selection};
use attnd_plan::{AnyTensor, Element, SideError, SideLayout, SideTensor, Sides};

use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::proto::{self, bias};

/// Whether rows may see fewer keys than their intervals have: by tensors that no message with an operator holds, or by lists of runs
/// or blocks.
pub fn hides_single_keys(operator: &Operator) -> bool {
    let mut documents = operator.mask().documents.iter();
    operator.selection().is_some()
        || operator.biases().contains(&Bias::Dense)
        || operator.csr().is_some()
        || documents.any(|documents| documents.is_scattered())
}

/// Bytes of an element of a tensor of a call whose operands have elements of `dtype`.
///
/// # Errors
/// [`Reason::Tensor`] for one that the call doesn't have.
pub(crate) fn element_bytes(tensor: AnyTensor, dtype: Dtype, sides: &Sides) -> Result<usize, Error> {
    match tensor {
        AnyTensor::Operand(_) => Ok(dtype.size()),
        AnyTensor::Side(side) => match sides.of(side) {
            Some(layout) => Ok(layout.element().size()),
            None => Err(Error::new(Reason::Tensor, format!("{side}, and Begin has no {}", side.option()))),
        },
    }
}

/// Whether an operator looks at a tensor.
fn reads(operator: &Operator, tensor: SideTensor) -> bool {
    match tensor {
        SideTensor::Mask => operator.selection() == Some(Selection::Dense),
        SideTensor::Bias => operator.biases().contains(&Bias::Dense),
        SideTensor::Previous => operator.reads_previous(),
        SideTensor::KeyMatrix | SideTensor::ValueMatrix | SideTensor::Source | SideTensor::ValueSource => {
            false
        }
    }
}

/// Refuses weights that rows had before where nothing asks for them, and their lack where something does. Masks and biases are asked
/// for by being there.
///
/// # Errors
/// [`Reason::Combination`].
pub fn check_previous(operator: &Operator, sides: &Sides) -> Result<(), Error> {
    let option = SideTensor::Previous.option();
    let function = operator.score().function().name;
    match (operator.reads_previous(), sides.of(SideTensor::Previous)) {
        (true, None) => Err(super::together(&format!("score={function}"), &format!("no {option}"))),
        (false, Some(_)) => Err(super::together(&format!("score={function}"), option)),
        (true, Some(_)) | (false, None) => Ok(()),
    }
}

/// Puts the dimensions of what travels beside an operator into its message.
///
/// # Panics
/// If the operator reads other tensors than these, because that would be another operator at the other end.
pub(super) fn encode(operator: &Operator, sides: &Sides, message: &mut Option<proto::Operator>) {
    let reads = SideTensor::OF_SCORES.map(|tensor| reads(operator, tensor));
    let is_there = SideTensor::OF_SCORES.map(|tensor| sides.of(tensor).is_some());
    assert_eq!(reads, is_there, "dense tensors that the operator reads, and those beside it");
    for layout in SideTensor::OF_SCORES.iter().filter_map(|tensor| sides.of(*tensor)) {
        let message = message.get_or_insert_default();
        let [batch, heads, queries, keys] = layout.dims().map(small);
        let dense = proto::Dense { dtype: element_number(layout.element()), batch, heads, queries, keys };
        match layout.tensor() {
            SideTensor::Mask => message.mask.get_or_insert_default().dense = Some(dense),
            SideTensor::Bias => {
                message.biases.push(proto::Bias { kind: Some(bias::Kind::Dense(dense)) });
            }
            SideTensor::Previous => message.score.get_or_insert_default().previous = Some(dense),
            // Not of the scores.
            SideTensor::KeyMatrix
            | SideTensor::ValueMatrix
            | SideTensor::Source
            | SideTensor::ValueSource => {}
        }
    }
}

/// The tensors that travel beside the operator of a message.
///
/// # Errors
/// [`Reason::Count`], [`Reason::Dtype`], [`Reason::Combination`] for two of a kind, [`Reason::Operator`] where they
/// don't fit the shape.
pub(super) fn decode(message: Option<&proto::Operator>, shape: &AttnShape) -> Result<Sides, Error> {
    let Some(message) = message else { return Ok(Sides::default()) };
    convert::count("biases", message.biases.len())?;
    let mask = message.mask.as_ref().and_then(|mask| mask.dense).map(|dense| (SideTensor::Mask, dense));
    let biases = message.biases.iter().filter_map(|bias| match &bias.kind {
        Some(bias::Kind::Dense(dense)) => Some((SideTensor::Bias, *dense)),
        _other => None,
    });
    let previous = message.score.as_ref().and_then(|score| score.previous);
    let previous = previous.map(|dense| (SideTensor::Previous, dense));
    let layouts =
        mask.into_iter().chain(biases).chain(previous).map(|(tensor, dense)| layout(tensor, dense, shape));
    Ok(Sides::new(layouts.collect::<Result<_, Error>>()?)?)
}

fn layout(tensor: SideTensor, dense: proto::Dense, shape: &AttnShape) -> Result<SideLayout, Error> {
    let proto::Dense { dtype, batch, heads, queries, keys } = dense;
    let element = element(dtype)?;
    let dims = [batch, heads, queries, keys].map(convert::size);
    Ok(SideLayout::dense(tensor, element, dims, shape)?)
}

fn element_number(element: Element) -> i32 {
    match element {
        Element::Bool => proto::Dtype::Bool.into(),
        Element::Float(dtype) => proto::Dtype::from(dtype).into(),
    }
}

fn element(number: i32) -> Result<Element, Error> {
    match proto::Dtype::try_from(number) {
        Ok(proto::Dtype::Bool) => Ok(Element::Bool),
        _ => convert::dtype(number).map(Element::Float),
    }
}

impl From<SideError> for Error {
    fn from(error: SideError) -> Self {
        let reason = match error {
            SideError::Twice { .. } => Reason::Combination,
            SideError::Shape { .. } | SideError::Element { .. } => Reason::Operator,
            SideError::Width { .. } => Reason::ShapeLimit,
            SideError::Rows => Reason::ShapeMismatch,
        };
        Self::new(reason, error.to_string())
    }
}

#[cfg(test)]
pub(crate) mod tests;

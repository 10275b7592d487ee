//! Score functions with their parameters, in messages. Which functions there are, and what they are given, the kernels know alone.

use attnd_kernel::{AttnShape, Function, OperatorError, Score, Tensor};
use bytes::Bytes;

use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::{floats, proto};

/// The score, unless it is the one that a call has where it says nothing.
pub(super) fn encode(score: &Score) -> Option<proto::Score> {
    let parameter = |tensor: &Tensor| proto::Parameter {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|size| small(*size)).collect(),
        values: floats::into_bytes(tensor.values.to_vec()),
    };
    (!score.is_scaled_dot()).then(|| proto::Score {
        function: score.function().name.to_owned(),
        parameters: score.parameters().iter().map(parameter).collect(),
        // With what travels beside.
        previous: None,
    })
}

/// Decodes a score; whether its parameters make sense together and for a shape is for the operator to check.
///
/// # Errors
/// [`Reason::Count`], and [`Reason::Operator`] for a name that isn't known and for bytes that aren't whole numbers.
pub(super) fn decode(message: Option<proto::Score>) -> Result<Score, Error> {
    let Some(proto::Score { function, parameters, previous: _ }) = message else {
        return Ok(Score::default());
    };
    convert::count("score.parameters", parameters.len())?;
    let function = convert::text(Reason::Operator, "score.function", function)?;
    let parameters = parameters.into_iter().map(parameter).collect::<Result<_, _>>()?;
    Ok(Score::new(&function, parameters).map_err(OperatorError::from)?)
}

fn parameter(message: proto::Parameter) -> Result<Tensor, Error> {
    let proto::Parameter { name, shape, values } = message;
    let name = convert::text(Reason::Operator, "score.parameters.name", name)?;
    convert::count("score.parameters.shape", shape.len())?;
    let values = numbers(&format!("score.{name}"), &values)?;
    Ok(Tensor { name, shape: shape.into_iter().map(convert::size).collect(), values: values.into() })
}

/// The numbers of a table or a parameter.
///
/// # Errors
/// [`Reason::Operator`] for bytes that aren't whole ones.
pub(super) fn numbers(option: &str, bytes: &Bytes) -> Result<Vec<f32>, Error> {
    if bytes.len().is_multiple_of(size_of::<f32>()) {
        return Ok(floats::from_bytes(bytes));
    }
    Err(Error::new(Reason::Operator, format!("{option} has {} bytes, not a multiple of 4", bytes.len())))
}

/// What scores are multiplied by where a call doesn't say. Of a function that isn't known it doesn't matter: it is refused.
pub(crate) fn default_scale(operator: Option<&proto::Operator>, shape: &AttnShape) -> f32 {
    let named = operator.and_then(|operator| operator.score.as_ref());
    let function = named.and_then(|score| Function::named(&score.function).ok());
    function.unwrap_or_else(|| Score::default().function()).default_scale(shape)
}

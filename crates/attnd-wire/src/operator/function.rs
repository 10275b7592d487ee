//! Score functions with their parameters, in messages. Which functions there are, and what they are given, the kernels know alone.

use attnd_kernel::{AttnShape, Function, OperatorError, Score, Tensor};
use bytes::Bytes;

use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::{floats, proto};

/// The score, unless it is the one that a call has where it says nothing.
pub(super) fn encode(score: &Score) -> Option<proto::Score> {
    if score.is_scaled_dot() {
        return None;
    }
    let tensors = score.parameters();
    let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    Some(proto::Score {
        function: score.function().name.to_owned(),
        parameters: names.join(","),
        ranks: tensors.iter().map(|tensor| small(tensor.shape.len())).collect(),
        sizes: tensors.iter().flat_map(|tensor| &tensor.shape).map(|size| small(*size)).collect(),
        values: floats::into_bytes(tensors.iter().flat_map(|tensor| &tensor.values[..]).copied().collect()),
        // With what travels beside.
        previous: None,
    })
}

/// Decodes a score; whether its parameters make sense together and for a shape is for the operator to check.
///
/// # Errors
/// [`Reason::Count`], and [`Reason::Operator`] for a name that isn't known, and for lists that contradict each other.
pub(super) fn decode(message: Option<proto::Score>) -> Result<Score, Error> {
    let Some(proto::Score { function, parameters, ranks, sizes, values, previous: _ }) = message else {
        return Ok(Score::default());
    };
    let function = convert::text(Reason::Operator, "score.function", function)?;
    let parameters = convert::text(Reason::Operator, "score.parameters", parameters)?;
    let names: Vec<&str> = parameters.split(',').filter(|name| !name.is_empty()).collect();
    let refused = |text: String| Error::new(Reason::Operator, text);
    if ranks.len() != names.len() {
        return Err(refused(format!("score has {} parameters, {} ranks", names.len(), ranks.len())));
    }
    let dimensions: u64 = ranks.iter().copied().map(u64::from).sum();
    if dimensions != sizes.len() as u64 {
        return Err(refused(format!("score has {} sizes, its ranks count {dimensions}", sizes.len())));
    }
    let values = numbers("score.values", &values)?;
    let (mut sizes, mut left) = (sizes.into_iter().map(convert::size), &values[..]);
    let mut tensors = Vec::with_capacity(names.len());
    for (name, rank) in names.into_iter().zip(ranks) {
        let shape: Vec<usize> = sizes.by_ref().take(convert::size(rank)).collect();
        let elements = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        let of_tensor = elements.and_then(|elements| left.split_at_checked(elements));
        let Some((of_tensor, rest)) = of_tensor else {
            return Err(refused(format!(
                "score.{name} is {shape:?}, and {} values are left for it",
                left.len()
            )));
        };
        left = rest;
        tensors.push(Tensor { name: name.to_owned(), shape, values: of_tensor.into() });
    }
    if !left.is_empty() {
        return Err(refused(format!("score.values has {} more than its parameters", left.len())));
    }
    Ok(Score::new(&function, tensors).map_err(OperatorError::from)?)
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

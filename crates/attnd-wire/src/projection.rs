//! Keys and values that workers make of rows, in messages: the widths and types of these. Rows and matrices come as chunks, see
//! [`attnd_plan::Projection`].

use attnd_kernel::{AttnShape, Dtype, EmptyRow, Operator};
use attnd_plan::{Projected, Projection, Sides};

use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::proto;

/// Refuses what workers can't do with keys and values that they make: anything else than f32 beside them, values that are parts of
/// keys, and rows that are the mean of values, which nobody sees as they pass.
///
/// # Errors
/// [`Reason::Combination`].
pub fn check(shape: &AttnShape, dtype: Dtype, operator: &Operator) -> Result<(), Error> {
    if !shape.kv_is_projected() {
        return Ok(());
    }
    let together = |other: &str| Err(Error::new(Reason::Combination, format!("projection and {other}")));
    match dtype {
        Dtype::F32 => {}
        Dtype::F16 | Dtype::Bf16 => return together(&format!("dtype={dtype}")),
    }
    if shape.value_is_key_prefix() {
        return together("value_is_key_prefix");
    }
    match operator.empty_row() {
        EmptyRow::Uniform => together("empty_row=uniform"),
        EmptyRow::Zero | EmptyRow::Nan => Ok(()),
    }
}

/// The message of a call with these tensors, if workers make its keys and values.
pub(crate) fn encode(sides: &Sides) -> Option<proto::Projection> {
    let Projection { key, value, same_rows } = Projection::of(sides)?;
    let projected = |of: Projected| proto::Projected {
        dtype: proto::Dtype::from(of.dtype).into(),
        width: small(of.width),
        has_bias: of.has_bias,
    };
    Some(proto::Projection { key: Some(projected(key)), value: Some(projected(value)), same_rows })
}

/// The shape of a call that may have its keys and values made, and all that travels beside its operands, of which `sides` is what
/// scores ask for.
///
/// # Errors
/// [`Reason::Dtype`], [`Reason::ShapeLimit`] for a width, and [`Reason::ShapeMismatch`] where the same rows have two.
pub(crate) fn decode(
    message: Option<proto::Projection>,
    shape: AttnShape,
    sides: Sides,
) -> Result<(AttnShape, Sides), Error> {
    let Some(proto::Projection { key, value, same_rows }) = message else { return Ok((shape, sides)) };
    let projected = |of: Option<proto::Projected>| -> Result<Projected, Error> {
        let proto::Projected { dtype, width, has_bias } = of.unwrap_or_default();
        Ok(Projected { dtype: convert::dtype(dtype)?, width: convert::size(width), has_bias })
    };
    let projection = Projection { key: projected(key)?, value: projected(value)?, same_rows };
    let layouts = projection.layouts(&shape)?;
    let sides = Sides::new(sides.iter().copied().chain(layouts).collect())?;
    Ok((shape.with_projected_kv(), sides))
}

#[cfg(test)]
mod tests;

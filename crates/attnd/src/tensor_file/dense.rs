//! Dense masks and biases in files: bools as well as floats, and as few dimensions as there are.

use attnd_client::{DenseTensor, Element};

use super::decode::{self, Stored};
use super::{Fault, ReadError, Source, read_as};

/// Reads a mask or a bias, `[batch, heads, queries, keys]`; leading dimensions that are missing are 1.
///
/// # Errors
/// As [`super::read`], for elements that are neither bools nor floats, and for a tensor without or with more than 4
/// dimensions.
pub fn read_dense(source: &Source) -> Result<DenseTensor, ReadError> {
    read_as(source, into_dense)
}

fn into_dense(stored: Stored) -> Result<DenseTensor, Fault> {
    let mut shape = [1; 4];
    let missing =
        shape.len().checked_sub(stored.shape.len()).ok_or(Fault::DenseRank(stored.shape.clone()))?;
    shape[missing..].copy_from_slice(&stored.shape);
    let is_bool = stored.element == decode::Element::Bool;
    if is_bool {
        let bytes = stored.into_bytes_in_c_order()?;
        return Ok(DenseTensor { element: Element::Bool, shape, bytes: bytes.into() });
    }
    let (dtype, bytes) = stored.into_c_order()?;
    Ok(DenseTensor { element: Element::Float(dtype), shape, bytes: bytes.into() })
}

//! Arrays of any shape: floats of parameters and tables, and integers of lists.

use super::decode::Stored;
use super::{ReadError, Source, read_as};

/// An array in memory, in C order.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers<T> {
    /// None is zero; none at all is one number.
    pub shape: Vec<usize>,
    /// As many as the product of the dimensions.
    pub values: Vec<T>,
}

/// Reads floats as f32.
///
/// # Errors
/// As [`super::read`], but for no number of dimensions.
pub fn read_floats(source: &Source) -> Result<Numbers<f32>, ReadError> {
    read_as(source, |stored| {
        let (shape, values) = stored.into_floats()?;
        Ok(Numbers { shape, values })
    })
}

/// Reads integers of 32 or 64 bits.
///
/// # Errors
/// As [`super::read`], for elements that are none, and for no number of dimensions.
pub fn read_integers(source: &Source) -> Result<Numbers<i64>, ReadError> {
    read_as(source, |stored| {
        let shape = stored.shape.clone();
        Ok(Numbers { shape, values: Stored::into_integers(stored)? })
    })
}

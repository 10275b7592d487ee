//! Rows of numbers that go into a layer.

use std::sync::Arc;

use super::LayerError;

/// Rows of f32, `[batch, tokens, width]` in C order. Cloning copies no row.
#[derive(Clone, Debug)]
pub struct Rows {
    shape: [usize; 3],
    values: Arc<Vec<f32>>,
}

impl Rows {
    /// Rows of that shape.
    ///
    /// # Errors
    /// [`LayerError::Elements`] if a dimension is zero, or there are other than that many elements.
    pub fn new(values: Vec<f32>, shape: [usize; 3]) -> Result<Self, LayerError> {
        let elements = shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim));
        if elements != Some(values.len()) || values.is_empty() {
            return Err(LayerError::Elements { shape, got: values.len() });
        }
        Ok(Self { shape, values: Arc::new(values) })
    }

    /// Independent problems.
    pub fn batch(&self) -> usize {
        self.shape[0]
    }

    /// Rows of each.
    pub fn tokens(&self) -> usize {
        self.shape[1]
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.shape[2]
    }

    /// All elements.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Whether these are the rows of `other` themselves, not only equal ones.
    pub(super) fn are(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.values, &other.values)
    }
}

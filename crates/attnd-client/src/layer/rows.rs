//! Rows of numbers that go into a layer.

use std::sync::Arc;

use attnd_kernel::{Dtype, widen};
use attnd_wire::floats;
use bytes::Bytes;

use super::LayerError;

/// Rows of f32, `[batch, tokens, width]` in C order. Cloning copies no row.
#[derive(Clone, Debug)]
pub struct Rows {
    shape: [usize; 3],
    values: Arc<Vec<f32>>,
    /// What the values were widened from.
    narrow: Option<(Dtype, Bytes)>,
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
        Ok(Self { shape, values: Arc::new(values), narrow: None })
    }

    /// Rows of little-endian elements, which are computed with in f32, and travel as they are where they travel.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_bytes(bytes: Bytes, dtype: Dtype, shape: [usize; 3]) -> Result<Self, LayerError> {
        let got = bytes.len() / dtype.size();
        if !bytes.len().is_multiple_of(dtype.size()) {
            return Err(LayerError::Elements { shape, got });
        }
        let mut values = vec![0.0; got];
        widen(&bytes, dtype, &mut values);
        Ok(Self { narrow: (dtype != Dtype::F32).then_some((dtype, bytes)), ..Self::new(values, shape)? })
    }

    /// The elements as they travel.
    pub(super) fn sent(&self) -> (Dtype, Bytes) {
        let whole = || (Dtype::F32, floats::shared_bytes(&self.values));
        self.narrow.clone().unwrap_or_else(whole)
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

//! What keys and values are made of where workers make them, as it travels: rows, and a matrix for each kv head.
//!
//! Rows are a side tensor of a plane for each batch element, in which a column is a whole row of the source: so a share gets the rows
//! of its slots, once for all of its kv heads. A matrix is one of a plane for each kv head, which goes whole to the workers of that
//! head, once for all batch elements: the elements of `W`, `[dim, width]`, and then those of `b`, `[dim]`, where there is a bias.

use attnd_kernel::{AttnShape, Dtype, Linear};

use super::{Element, SideError, SideLayout, SideTensor, Sides};

/// Largest number of elements of a row that keys or values are made of.
pub const MAX_WIDTH: usize = 65_536;

/// What workers make keys and values of: `k = W x + b`, and a value the same of another matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// What keys are made of.
    pub key: Projected,
    /// What values are made of.
    pub value: Projected,
    /// Whether values are made of the rows that keys are made of, which then travel once; both say the same of these.
    pub same_rows: bool,
}

/// What keys, or values, are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projected {
    /// Type of an element of a row; matrices and biases are f32.
    pub dtype: Dtype,
    /// Elements of a row, 1 to [`MAX_WIDTH`].
    pub width: usize,
    /// Whether something is added to the products.
    pub has_bias: bool,
}

impl Projection {
    /// What travels.
    ///
    /// # Errors
    /// [`SideError::Width`], and [`SideError::Rows`] where the same rows have two widths or types.
    pub fn layouts(&self, shape: &AttnShape) -> Result<Vec<SideLayout>, SideError> {
        let Self { key, value, same_rows } = self;
        if *same_rows && (key.dtype, key.width) != (value.dtype, value.width) {
            return Err(SideError::Rows);
        }
        let mut layouts = vec![
            SideLayout::matrix(SideTensor::KeyMatrix, key, shape.head_dim(), shape)?,
            SideLayout::matrix(SideTensor::ValueMatrix, value, shape.value_dim(), shape)?,
            SideLayout::source(SideTensor::Source, key, shape)?,
        ];
        if !same_rows {
            layouts.push(SideLayout::source(SideTensor::ValueSource, value, shape)?);
        }
        Ok(layouts)
    }

    /// That of a call with these tensors, if workers make its keys and values.
    pub fn of(sides: &Sides) -> Option<Self> {
        let source = sides.of(SideTensor::Source)?;
        let value_source = sides.of(SideTensor::ValueSource);
        let projected = |source: &SideLayout, matrix: &SideLayout| {
            let Element::Float(dtype) = source.element else { return None };
            Some(Projected { dtype, width: source.width, has_bias: matrix.columns > source.width })
        };
        Some(Self {
            key: projected(source, sides.of(SideTensor::KeyMatrix)?)?,
            value: projected(value_source.unwrap_or(source), sides.of(SideTensor::ValueMatrix)?)?,
            same_rows: value_source.is_none(),
        })
    }

    /// Multiply-adds that a key and its value take.
    pub fn cost(&self, shape: &AttnShape) -> usize {
        self.key.width * shape.head_dim() + self.value.width * shape.value_dim()
    }
}

impl SideLayout {
    /// Rows that keys or values are made of, `[batch, keys, width]`.
    fn source(tensor: SideTensor, of: &Projected, shape: &AttnShape) -> Result<Self, SideError> {
        let element = Element::Float(of.dtype);
        let width = checked(tensor, of.width)?;
        Ok(Self { tensor, element, batch: shape.batch(), heads: 1, rows: 1, columns: shape.n_keys(), width })
    }

    /// A matrix and perhaps a bias, for each kv head; `dim` elements come out.
    fn matrix(tensor: SideTensor, of: &Projected, dim: usize, shape: &AttnShape) -> Result<Self, SideError> {
        let (element, heads) = (Element::Float(Dtype::F32), shape.n_kv_heads());
        let columns = checked(tensor, of.width)? + usize::from(of.has_bias);
        Ok(Self { tensor, element, batch: 1, heads, rows: dim, columns, width: 1 })
    }

    /// Elements of a row of the source.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes that a matrix takes on its worker: as it came, and as a linear layer.
    pub(super) fn matrix_bytes(&self) -> u64 {
        let came = (self.rows * self.columns * size_of::<f32>()) as u64;
        came + Linear::bytes_needed([self.rows, self.columns], false)
    }
}

fn checked(tensor: SideTensor, width: usize) -> Result<usize, SideError> {
    if (1..=MAX_WIDTH).contains(&width) { Ok(width) } else { Err(SideError::Width { tensor, width }) }
}

//! From the bytes of a file to a tensor: byte order, index order, element type, rank.

use attnd_kernel::Dtype;
use ndarray::{ArrayView, IxDyn, ShapeBuilder};

use super::{Fault, Tensor};

/// Element types that files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    /// A byte, 0 or 1; of masks alone.
    Bool,
    F16,
    Bf16,
    F32,
    F64,
    /// Of lists alone, as the others are.
    I32,
    I64,
    U32,
}

impl Element {
    pub(super) fn size(self) -> usize {
        match self {
            Self::Bool => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }
}

/// A tensor as a file stores it.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) shape: Vec<usize>,
    pub(super) element: Element,
    /// The type as the file spells it, and what to do about it where it isn't wanted.
    pub(super) spelled: (String, &'static str),
    pub(super) big_endian: bool,
    /// First index fastest.
    pub(super) fortran: bool,
    /// Exactly `shape` elements.
    pub(super) bytes: Vec<u8>,
}

/// Bytes that `shape` elements take. Can't overflow: a header holds at most a few thousand digits, but saturates all
/// the same.
pub(super) fn declared_bytes(shape: &[usize], element: Element) -> u128 {
    shape.iter().fold(element.size() as u128, |bytes, dim| bytes.saturating_mul(*dim as u128))
}

/// Refuses shapes without elements. How many dimensions there are is for whoever takes the tensor to say.
pub(super) fn check_shape(shape: &[usize]) -> Result<(), Fault> {
    if shape.contains(&0) {
        return Err(Fault::Empty(shape.to_vec()));
    }
    Ok(())
}

impl Stored {
    /// The elements in C order, little-endian.
    pub(super) fn into_bytes_in_c_order(mut self) -> Result<Vec<u8>, Fault> {
        check_shape(&self.shape)?;
        let size = self.element.size();
        if self.big_endian {
            self.bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        if self.fortran {
            self.bytes = match size {
                1 => c_order::<1>(&self.bytes, &self.shape)?,
                2 => c_order::<2>(&self.bytes, &self.shape)?,
                4 => c_order::<4>(&self.bytes, &self.shape)?,
                _ => c_order::<8>(&self.bytes, &self.shape)?,
            };
        }
        Ok(self.bytes)
    }

    /// The same of a type that travels.
    pub(super) fn into_c_order(self) -> Result<(Dtype, Vec<u8>), Fault> {
        let (element, shape) = (self.element, self.shape.clone());
        if matches!(element, Element::I32 | Element::I64 | Element::U32) {
            let (got, hint) = self.spelled;
            return Err(Fault::Dtype { got, hint });
        }
        let bytes = self.into_bytes_in_c_order()?;
        Ok(match element {
            Element::Bool | Element::I32 | Element::I64 | Element::U32 => {
                return Err(Fault::Dtype { got: "bool".into(), hint: "" });
            }
            Element::F16 => (Dtype::F16, bytes),
            Element::Bf16 => (Dtype::Bf16, bytes),
            Element::F32 => (Dtype::F32, bytes),
            Element::F64 => (Dtype::F32, round_to_f32(&bytes, &shape)?),
        })
    }

    /// An operand of attention.
    pub(super) fn into_tensor(self) -> Result<Tensor, Fault> {
        let (batch, rest) = match *self.shape {
            [batch, heads, tokens, dim] => (batch, [heads, tokens, dim]),
            [heads, tokens, dim] => (1, [heads, tokens, dim]),
            _ => return Err(Fault::Rank(self.shape)),
        };
        let (batched, rounded_from_f64) = (self.shape.len() == 4, self.element == Element::F64);
        let (dtype, bytes) = self.into_c_order()?;
        Ok(Tensor {
            shape: [batch, rest[0], rest[1], rest[2]],
            batched,
            dtype,
            rounded_from_f64,
            bytes: bytes.into(),
        })
    }

    /// One number a head.
    pub(super) fn into_vector(self) -> Result<Vec<f32>, Fault> {
        let [heads] = *self.shape else { return Err(Fault::NoVector(self.shape)) };
        let (dtype, bytes) = self.into_c_order()?;
        let mut numbers = vec![0.0; heads];
        attnd_kernel::widen(&bytes, dtype, &mut numbers);
        Ok(numbers)
    }

    /// Integers of any shape.
    pub(super) fn into_integers(self) -> Result<Vec<i64>, Fault> {
        let element = self.element;
        if !matches!(element, Element::I32 | Element::I64 | Element::U32) {
            return Err(Fault::NoIntegers { got: self.spelled.0 });
        }
        let bytes = self.into_bytes_in_c_order()?;
        Ok(match element {
            Element::I32 => bytes.as_chunks().0.iter().map(|raw| i32::from_le_bytes(*raw).into()).collect(),
            Element::U32 => bytes.as_chunks().0.iter().map(|raw| u32::from_le_bytes(*raw).into()).collect(),
            _ => bytes.as_chunks().0.iter().map(|raw| i64::from_le_bytes(*raw)).collect(),
        })
    }

    /// Elements of any shape.
    pub(super) fn into_floats(self) -> Result<(Vec<usize>, Vec<f32>), Fault> {
        let shape = self.shape.clone();
        let (dtype, bytes) = self.into_c_order()?;
        let mut values = vec![0.0; bytes.len() / dtype.size()];
        attnd_kernel::widen(&bytes, dtype, &mut values);
        Ok((shape, values))
    }
}

/// f32 values as little-endian bytes.
pub(super) fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Rounds to nearest, ties to even. A number that would become infinite is refused; infinities and NaN stay what they
/// are. `shape` is in C order.
fn round_to_f32(bytes: &[u8], shape: &[usize]) -> Result<Vec<u8>, Fault> {
    let mut rounded = Vec::with_capacity(bytes.len() / 2);
    for (at, raw) in bytes.as_chunks().0.iter().enumerate() {
        let value = f64::from_le_bytes(*raw);
        let nearest = value as f32;
        if nearest.is_infinite() && value.is_finite() {
            return Err(Fault::OverF32 { index: index_of(at, shape), value });
        }
        rounded.extend(nearest.to_le_bytes());
    }
    Ok(rounded)
}

/// The index of element `at` in C order; no dimension is zero.
fn index_of(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (place, dim) in index.iter_mut().zip(shape).rev() {
        (*place, at) = (at % dim, at / dim);
    }
    index
}

/// Reorders elements of `N` bytes from first-index-fastest to last-index-fastest.
fn c_order<const N: usize>(bytes: &[u8], shape: &[usize]) -> Result<Vec<u8>, Fault> {
    let elements: &[[u8; N]] = bytes.as_chunks().0;
    let view = ArrayView::from_shape(IxDyn(shape).f(), elements).map_err(|error| Fault::WrongFormat {
        format: "npy",
        detail: format!("shape {shape:?} does not fit its data: {error}"),
    })?;
    Ok(view.iter().copied().collect::<Vec<_>>().into_flattened())
}

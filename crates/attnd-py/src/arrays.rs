//! numpy arrays as the bytes of operands, where they lie, and vectors as numpy arrays, where they are.

use attnd_kernel::Dtype;
use attnd_plan::Element;
use half::f16;
use numpy::{IntoPyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::errors::value_error;

/// An array of floats. Python hands bf16 over as the integers that hold its bits: numpy has no such type of its own.
#[derive(Debug, FromPyObject)]
pub(crate) enum Floats<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F16(PyReadonlyArrayDyn<'py, f16>),
    Bf16(PyReadonlyArrayDyn<'py, u16>),
}

impl Floats<'_> {
    pub(crate) fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }

    pub(crate) fn shape(&self) -> &[usize] {
        match self {
            Self::F32(array) => array.shape(),
            Self::F16(array) => array.shape(),
            Self::Bf16(array) => array.shape(),
        }
    }

    /// The elements in C order, where they lie.
    ///
    /// # Errors
    /// If they don't lie in that order.
    pub(crate) fn bytes(&self, name: &str) -> PyResult<&[u8]> {
        let bytes = match self {
            Self::F32(array) => array.as_slice().map(bytemuck::cast_slice),
            Self::F16(array) => array.as_slice().map(bytemuck::cast_slice),
            Self::Bf16(array) => array.as_slice().map(bytemuck::cast_slice),
        };
        bytes.map_err(|_strided| {
            value_error(format!("{name} is not contiguous: numpy.ascontiguousarray({name})"))
        })
    }
}

/// A dense mask or bias: bools, or floats.
#[derive(Debug, FromPyObject)]
pub(crate) enum Dense<'py> {
    Bool(PyReadonlyArrayDyn<'py, bool>),
    Floats(Floats<'py>),
}

impl Dense<'_> {
    pub(crate) fn element(&self) -> Element {
        match self {
            Self::Bool(_) => Element::Bool,
            Self::Floats(floats) => Element::Float(floats.dtype()),
        }
    }

    pub(crate) fn shape(&self) -> &[usize] {
        match self {
            Self::Bool(array) => array.shape(),
            Self::Floats(floats) => floats.shape(),
        }
    }

    /// As [`Floats::bytes`].
    pub(crate) fn bytes(&self, name: &str) -> PyResult<&[u8]> {
        match self {
            Self::Bool(array) => array
                .as_slice()
                .map(bytemuck::cast_slice)
                .map_err(|_strided| value_error(format!("{name} is not contiguous"))),
            Self::Floats(floats) => floats.bytes(name),
        }
    }
}

/// A vector as an array of this shape, which has as many elements; no element moves.
///
/// # Errors
/// If it hasn't.
pub(crate) fn array<'py, T: numpy::Element>(
    py: Python<'py>,
    elements: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    elements.into_pyarray(py).reshape(shape.to_vec())
}

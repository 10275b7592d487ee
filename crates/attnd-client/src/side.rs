//! Dense masks and biases of a call, and what keys and values are made of: what a caller hands over beside Q, K and V.

use attnd_kernel::AttnShape;
use attnd_plan::{Element, Projection, SideLayout, SideTensor, Sides};
use attnd_wire::{Error, Reason, refusal};
use bytes::Bytes;

use crate::operands::AttendOptions;

/// A tensor of the scores, `[batch, heads, queries, keys]`, little-endian elements in C order. Each of the first three
/// dimensions is the call's or 1, which is for all of them. There may be fewer keys than the call has: those that are
/// missing are not seen. Cloning copies no element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenseTensor {
    /// Type of the elements.
    pub element: Element,
    /// `[batch, heads, queries, keys]`.
    pub shape: [usize; 4],
    /// The elements.
    pub bytes: Bytes,
}

/// What workers make keys and values of, by [`attnd_kernel::Linear`]: for each kv head `k = W x + b`, and values the same of another
/// matrix. Cloning copies no element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSource {
    /// Widths and types, and whether values are made of the rows of keys.
    pub projection: Projection,
    /// For each kv head of a batch element `W` of `[head_dim, width]`, and behind it `b` of `[head_dim]` if there is a bias; f32.
    pub key_matrices: Bytes,
    /// The same for values, of `value_dim`.
    pub value_matrices: Bytes,
    /// The rows that keys are made of, `[batch, keys, width]`.
    pub rows: Bytes,
    /// The rows that values are made of; empty if they are the same.
    pub value_rows: Bytes,
}

/// The tensors that travel beside the operands, each with its bytes, in the order in which they travel.
///
/// # Errors
/// [`Reason::Operator`], [`Reason::Combination`], and [`Reason::PayloadLength`] where one doesn't have the bytes that
/// its shape needs.
pub(crate) fn beside(options: &AttendOptions, shape: &AttnShape) -> Result<(Sides, Vec<Bytes>), Error> {
    let mut tensors = Vec::new();
    match (&options.dense_mask, &options.dense_bias) {
        // A mask of numbers is added, as every library does.
        (Some(mask), None) if mask.element != Element::Bool => tensors.push((SideTensor::Bias, mask)),
        (Some(mask), Some(bias)) if mask.element != Element::Bool && bias.element != Element::Bool => {
            let text =
                format!("mask.dense of {} and bias.dense: both are added, so add them up", mask.element);
            return Err(Error::new(Reason::Combination, text));
        }
        (mask, bias) => {
            tensors.extend(mask.iter().map(|mask| (SideTensor::Mask, mask)));
            tensors.extend(bias.iter().map(|bias| (SideTensor::Bias, bias)));
        }
    }
    tensors.extend(options.previous.iter().map(|previous| (SideTensor::Previous, previous)));
    let mut layouts = Vec::new();
    for (tensor, DenseTensor { element, shape: dims, bytes }) in tensors {
        layouts.push((SideLayout::dense(tensor, *element, *dims, shape)?, bytes));
    }
    if let Some(source) = &options.source {
        let of_projection = source.projection.layouts(shape)?;
        layouts.extend(of_projection.into_iter().map(|layout| (layout, source.bytes_of(layout.tensor()))));
    }
    for (layout, bytes) in &layouts {
        if bytes.len() as u64 != layout.bytes() {
            return Err(refusal::tensor_length(layout.tensor(), layout.bytes(), bytes.len()));
        }
    }
    let (layouts, bytes): (Vec<SideLayout>, Vec<Bytes>) =
        layouts.into_iter().map(|(layout, bytes)| (layout, bytes.clone())).unzip();
    Ok((Sides::new(layouts)?, bytes))
}

impl KvSource {
    fn bytes_of(&self, tensor: SideTensor) -> &Bytes {
        match tensor {
            SideTensor::KeyMatrix => &self.key_matrices,
            SideTensor::ValueMatrix => &self.value_matrices,
            SideTensor::ValueSource => &self.value_rows,
            SideTensor::Mask | SideTensor::Bias | SideTensor::Previous | SideTensor::Source => &self.rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Bias, Dims, Dtype, Selection};

    use super::*;
    use crate::operands::tests::operands;

    fn tensor(element: Element, shape: [usize; 4], len: usize) -> Option<DenseTensor> {
        Some(DenseTensor { element, shape, bytes: vec![1; len].into() })
    }

    #[test]
    fn masks_of_numbers_are_biases_and_what_does_not_fit_is_refused_before_anything_is_sent() {
        let dims = Dims { batch: 1, heads: 2, kv_heads: 1, queries: 3, keys: 4, head_dim: 1, value_dim: 1 };
        let operands = operands(dims, Dtype::F32);
        let (f32, f16) = (Element::Float(Dtype::F32), Element::Float(Dtype::F16));
        let begin = |dense_mask, dense_bias| {
            operands.begin(&AttendOptions { dense_mask, dense_bias, ..AttendOptions::default() })
        };
        let whole = [1, 2, 3, 4];
        let numbers = begin(tensor(f32, whole, 96), None).unwrap();
        assert_eq!((numbers.operator.biases(), numbers.operator.selection()), (&[Bias::Dense][..], None));
        let both = begin(tensor(Element::Bool, [1, 1, 1, 2], 2), tensor(f16, whole, 48)).unwrap();
        assert_eq!(both.operator.biases(), [Bias::Dense]);
        assert_eq!(both.operator.selection(), Some(Selection::Dense));
        let tensors: Vec<SideTensor> = both.sides.iter().map(SideLayout::tensor).collect();
        assert_eq!(tensors, SideTensor::ALL[..2]);

        let refused = |mask, bias| begin(mask, bias).unwrap_err().message();
        assert_eq!(
            refused(tensor(f16, whole, 48), tensor(f32, whole, 96)),
            "COMBINATION: mask.dense of f16 and bias.dense: both are added, so add them up"
        );
        assert_eq!(
            refused(tensor(Element::Bool, whole, 23), None),
            "PAYLOAD_LENGTH: mask: shape needs 24, payload 23"
        );
        assert_eq!(
            refused(None, tensor(Element::Bool, whole, 24)),
            "OPERATOR: bias.dense is bool: a mask is bool, and a mask of numbers is a bias"
        );
        assert_eq!(
            refused(None, tensor(f32, [1, 2, 2, 4], 64)),
            "OPERATOR: bias.dense is [1, 2, 2, 4], the call needs [1, 1 or 2, 1 or 3, 1 to 4]"
        );
    }
}

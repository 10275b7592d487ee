//! What a learnt key does to the options of a call.
//!
//! Every row sees it, whatever rules hide others, and what a row sees has to be one interval. So it isn't behind all others, where
//! torch has it, but before them: the order of keys changes no sum but for its rounding. Positions, lengths and prefixes count one
//! more, and the causal rule gets a prefix that holds the learnt key. Rules whose intervals may begin behind it are refused.

use attnd_kernel::{Mask, PerBatch, Positions, Window};
use attnd_plan::Element;

use super::LayerError;
use crate::side::DenseTensor;

/// `mask` for keys with the learnt one before them.
///
/// # Errors
/// [`LayerError::Together`] for rules that can hide the first key.
pub(super) fn behind_learnt_key(mask: Mask) -> Result<Mask, LayerError> {
    let refused = [
        ("mask.window", mask.window != Window::default()),
        ("mask.chunk", mask.chunk.is_some()),
        ("mask.key_begin", mask.key_begin.is_some()),
        ("mask.documents", mask.documents.is_some()),
    ];
    if let Some((other, _)) = refused.iter().find(|(_, is_there)| *is_there) {
        let why = Some("what rows see then isn't one interval of keys");
        return Err(LayerError::Together { one: "a learnt key", other, why });
    }
    let prefix = if mask.causal { Some(mask.prefix.unwrap_or(PerBatch::Same(0))) } else { mask.prefix };
    let positions = mask.positions.map(|positions| match positions {
        Positions::TopLeft => Positions::Offset(PerBatch::Same(1)),
        Positions::BottomRight => Positions::BottomRight,
        Positions::Offset(offsets) => Positions::Offset(map(offsets, |offset| offset.saturating_add(1))),
    });
    let one_more = |lengths: PerBatch<usize>| map(lengths, |length| length.saturating_add(1));
    Ok(Mask { positions, prefix: prefix.map(one_more), key_end: mask.key_end.map(one_more), ..mask })
}

/// A dense mask or bias with a column for the learnt key before the others, which every row sees, and to whose score nothing is added.
/// One whose bytes aren't those of its shape gets none: it is refused later, with its own numbers.
///
/// # Errors
/// [`LayerError::RowMemory`].
pub(super) fn with_learnt_column(dense: &DenseTensor) -> Result<DenseTensor, LayerError> {
    let DenseTensor { element, shape: [batch, heads, queries, keys], ref bytes } = *dense;
    let row = keys.saturating_mul(element.size());
    let rows = batch.saturating_mul(heads).saturating_mul(queries);
    if row == 0 || bytes.len() != rows.saturating_mul(row) {
        return Ok(dense.clone());
    }
    let learnt = match element {
        Element::Bool => vec![1],
        Element::Float(dtype) => vec![0; dtype.size()],
    };
    let len = bytes.len() + rows * learnt.len();
    let mut out = Vec::new();
    let refused = |_full| LayerError::RowMemory { what: "a mask or a bias", elements: len / element.size() };
    out.try_reserve_exact(len).map_err(refused)?;
    for row in bytes.chunks_exact(row) {
        out.extend_from_slice(&learnt);
        out.extend_from_slice(row);
    }
    Ok(DenseTensor { element, shape: [batch, heads, queries, keys + 1], bytes: out.into() })
}

fn map<T: Copy>(numbers: PerBatch<T>, f: impl Fn(T) -> T) -> PerBatch<T> {
    match numbers {
        PerBatch::Same(number) => PerBatch::Same(f(number)),
        PerBatch::Each(numbers) => PerBatch::Each(numbers.iter().map(|number| f(*number)).collect()),
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{AttnShape, Causal, Dims, Dtype, Operator, OperatorParts};

    use super::*;

    fn visible(mask: &Mask, keys: u64) -> Vec<Vec<std::ops::Range<usize>>> {
        let dims = Dims { batch: 2, heads: 1, kv_heads: 1, queries: 5, keys, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let parts = OperatorParts { mask: mask.clone(), ..OperatorParts::plain(1.0, Causal::None) };
        let operator = Operator::new(parts, &shape).unwrap_or_else(|error| panic!("{mask:?}: {error}"));
        let of_batch = |batch| {
            let mask = operator.mask_of_group(batch, &shape);
            (0..5).map(|token| mask.visible(token)).collect()
        };
        (0..2).map(of_batch).collect()
    }

    #[test]
    fn every_row_sees_the_learnt_key_and_what_it_saw_before() {
        let lengths = Some(PerBatch::Each([4, 0].into()));
        let masks = [
            Mask::default(),
            Mask::from(Causal::TopLeft),
            Mask::from(Causal::BottomRight),
            Mask { key_end: lengths.clone(), ..Mask::default() },
            Mask { key_end: lengths.clone(), ..Mask::from(Causal::TopLeft) },
            Mask { key_end: Some(PerBatch::Same(3)), ..Mask::from(Causal::BottomRight) },
            Mask { prefix: lengths, ..Mask::from(Causal::TopLeft) },
            Mask {
                causal: true,
                positions: Some(Positions::Offset(PerBatch::Each([-3, 2].into()))),
                ..Mask::default()
            },
        ];
        for mask in masks {
            let shifted = behind_learnt_key(mask.clone()).unwrap();
            for (before, after) in
                visible(&mask, 7).iter().flatten().zip(visible(&shifted, 8).iter().flatten())
            {
                let end = if before.is_empty() { 0 } else { before.end };
                assert!(before.is_empty() || before.start == 0, "{mask:?}");
                assert_eq!(*after, 0..end + 1, "{mask:?} shows {before:?}");
            }
        }
    }

    #[test]
    fn dense_tensors_have_a_column_more_that_hides_and_adds_nothing() {
        let dense =
            |element, shape, bytes: &[u8]| DenseTensor { element, shape, bytes: bytes.to_vec().into() };
        let with_column = |tensor: &DenseTensor| {
            let DenseTensor { shape, bytes, .. } = with_learnt_column(tensor).unwrap();
            (shape, bytes.to_vec())
        };
        let mask = dense(Element::Bool, [1, 1, 2, 3], &[0, 1, 0, 1, 0, 0]);
        assert_eq!(with_column(&mask), ([1, 1, 2, 4], vec![1, 0, 1, 0, 1, 1, 0, 0]));
        let bias = dense(Element::Float(Dtype::F16), [1, 2, 1, 1], &[7, 8, 9, 10]);
        assert_eq!(with_column(&bias), ([1, 2, 1, 2], vec![0, 0, 7, 8, 0, 0, 9, 10]));
        for wrong in [dense(Element::Bool, [1, 1, 2, 3], &[1; 5]), dense(Element::Bool, [1, 1, 2, 0], &[])] {
            assert_eq!(with_learnt_column(&wrong).unwrap(), wrong);
        }
    }

    #[test]
    fn rules_that_could_hide_it_are_refused() {
        let window = Mask { window: Window { left: Some(2), right: None }, ..Mask::from(Causal::TopLeft) };
        let text = behind_learnt_key(window).unwrap_err().to_string();
        assert_eq!(text, "a learnt key and mask.window: what rows see then isn't one interval of keys");
        for mask in [
            Mask { key_begin: Some(PerBatch::Same(1)), ..Mask::default() },
            Mask { chunk: std::num::NonZeroUsize::new(3), ..Mask::from(Causal::TopLeft) },
        ] {
            assert!(behind_learnt_key(mask).is_err());
        }
    }
}

//! What a learnt key does to the options of a call.
//!
//! Every row sees it, whatever rules hide others, and what a row sees has to be one interval. So it isn't behind all others, where
//! torch has it, but before them: the order of keys changes no sum but for its rounding. Positions, lengths and prefixes count one
//! more, and the causal rule gets a prefix that holds the learnt key. Rules whose intervals may begin behind it are refused.

use attnd_kernel::{Mask, PerBatch, Positions, Window};

use super::LayerError;

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

fn map<T: Copy>(numbers: PerBatch<T>, f: impl Fn(T) -> T) -> PerBatch<T> {
    match numbers {
        PerBatch::Same(number) => PerBatch::Same(f(number)),
        PerBatch::Each(numbers) => PerBatch::Each(numbers.iter().map(|number| f(*number)).collect()),
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{AttnShape, Causal, Dims, Operator, OperatorParts};

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

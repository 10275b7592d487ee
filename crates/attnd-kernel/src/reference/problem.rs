//! What parts and operands mean, element by element: the [`Formula`] of an operator as somebody typed it.
//!
//! Parts are read as data. Where a query stands and what it sees is worked out here, from the definitions and one token at a time; none of
//! the functions that kernels ask is called.

use super::operator::{At, Bias as Added, EmptyRow, Formula, Normaliser, OperatorRow, Predicate, Score};
use super::{biases, masks};
use crate::bias::Bias;
use crate::mask::{Documents, Mask, PerBatch, Positions, Run};
use crate::normaliser::Normaliser as Kind;
use crate::operator::{EmptyRow as Empty, OperatorParts};
use crate::shape::AttnShape;

/// A dense tensor of `[batch, heads, tokens, keys]`, of which the first three may be 1, for all, and the last may be short.
#[derive(Clone, Debug)]
pub struct Dense<T> {
    /// Its four sizes.
    pub shape: [usize; 4],
    /// All elements.
    pub elements: Vec<T>,
}

/// An operator and what it is applied to.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Of the call.
    pub shape: AttnShape,
    /// What is computed.
    pub parts: &'a OperatorParts,
    /// `[batch, heads, queries, head_dim]`.
    pub q: &'a [f32],
    /// `[batch, kv_heads, keys, head_dim]`.
    pub k: &'a [f32],
    /// `[batch, kv_heads, keys, value_dim]`.
    pub v: &'a [f32],
    /// Of [`crate::Selection::Dense`].
    pub mask: Option<&'a Dense<bool>>,
    /// Of [`Bias::Dense`].
    pub bias: Option<&'a Dense<f32>>,
}

impl<'a> Problem<'a> {
    /// One row: query token `token` of query head `head` of batch element `batch`.
    ///
    /// # Panics
    /// If parts and operands don't fit the shape.
    pub fn row(&self, batch: usize, head: usize, token: usize) -> OperatorRow {
        self.formula(batch, token).row(batch, head, token)
    }

    /// The formula of the rows of one query token of one batch element. Of biases it has one for each of the parts, in their order, and behind
    /// them one for the regions of shifted windows.
    ///
    /// # Panics
    /// If parts and operands don't fit the shape.
    pub fn formula(&self, batch: usize, token: usize) -> Formula<'a> {
        let Self { shape, parts, q, k, v, mask, bias } = *self;
        let (d, dv, keys) = (shape.head_dim(), shape.value_dim(), shape.n_keys());
        let kv_head = move |at: At| {
            let of_batch = at.head / (shape.n_heads() / shape.n_kv_heads());
            at.batch * shape.n_kv_heads() + of_batch
        };
        let query = move |at: At| {
            let row = (at.batch * shape.n_heads() + at.head) * shape.n_queries() + at.token;
            &q[row * d..][..d]
        };
        let scale = f64::from(parts.scale);
        let offset = position(&parts.mask, &shape, batch, token) - token as i64;

        let mut visible = visible(&parts.mask, &shape, batch, offset);
        if let Some(Dense { shape, elements }) = mask {
            visible.push(Box::new(masks::dense(*shape, elements)));
        }
        if let Some(csr) = &parts.csr {
            let blocks = (csr.query_block(), csr.key_block());
            let lists = (csr.row_ptr(), csr.columns());
            visible.push(Box::new(masks::csr(blocks, csr.layouts(), lists, shape.n_heads())));
        }
        let (mut added, mut regions): (Vec<Added<'a>>, Option<Added<'a>>) = (Vec::new(), None);
        for part in &parts.biases {
            added.push(match part {
                Bias::Dense => {
                    let Some(Dense { shape, elements }) = bias else {
                        panic!("a dense bias without elements")
                    };
                    Box::new(biases::dense(*shape, elements, f32::MIN))
                }
                Bias::Alibi { slopes, by_key } => {
                    let heads = shape.n_heads();
                    let slopes = if slopes.len() > heads { &slopes[batch * heads..] } else { slopes };
                    match by_key {
                        true => Box::new(biases::alibi_by_key(first_key(&parts.mask, batch, token), slopes)),
                        false => Box::new(biases::alibi(offset, slopes)),
                    }
                }
                Bias::Relative(bias) => {
                    let kind = (bias.buckets(), bias.max_distance() as usize, bias.bidirectional());
                    Box::new(biases::relative(offset, kind, bias.table()))
                }
                Bias::Swin(bias) => {
                    if let Some(shift) = &bias.shift {
                        let tokens = bias.height * bias.width;
                        let between = biases::swin_regions(tokens, &shift.regions, shift.between);
                        regions = Some(Box::new(between));
                    }
                    Box::new(biases::swin((bias.height, bias.width), &bias.table))
                }
            });
        }
        added.extend(regions);
        Formula {
            keys,
            value_dim: dv,
            value: Box::new(move |at| &v[(kv_head(at) * keys + at.key) * dv..][..dv]),
            score: Box::new(move |at| {
                Score::dot(scale, query(at), &k[(kv_head(at) * keys + at.key) * d..][..d])
            }),
            softcap: parts.softcap.map(f64::from),
            biases: added,
            visible,
            normaliser: match parts.normaliser {
                Kind::Softmax => Normaliser::Softmax,
                Kind::Sigmoid { bias } => Normaliser::Sigmoid { bias: f64::from(bias) },
            },
            sink: parts.sinks.as_ref().map(|sinks| {
                let of_head = |head: usize| f64::from(sinks[head]);
                Box::new(of_head) as Box<dyn Fn(usize) -> f64 + 'a>
            }),
            empty_row: match parts.empty_row {
                Empty::Zero => EmptyRow::Zero,
                Empty::Nan => EmptyRow::Nan,
                Empty::Uniform => EmptyRow::Uniform,
            },
        }
    }
}

/// The number of a batch element.
fn of_batch<T: Copy>(numbers: &Option<PerBatch<T>>, batch: usize) -> Option<T> {
    numbers.as_ref().map(|numbers| match numbers {
        PerBatch::Same(number) => *number,
        PerBatch::Each(numbers) => numbers[batch],
    })
}

/// The document of each token.
fn ids(batches: &[Vec<Run>], batch: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    for run in &batches[batch % batches.len()] {
        ids.resize(run.end, run.id);
    }
    ids
}

/// Where a query stands on the axis of the keys.
fn position(mask: &Mask, shape: &AttnShape, batch: usize, token: usize) -> i64 {
    let is_last_at_last = mask.positions == Some(Positions::BottomRight);
    if let Some(documents) = &mask.documents {
        return position_in_document(documents, batch, token, is_last_at_last);
    }
    let queries = of_batch(&mask.query_end, batch).unwrap_or(shape.n_queries());
    let keys = of_batch(&mask.key_end, batch).unwrap_or(shape.n_keys());
    token as i64
        + match &mask.positions {
            None | Some(Positions::TopLeft) => 0,
            Some(Positions::BottomRight) => keys as i64 - queries as i64,
            Some(Positions::Offset(PerBatch::Same(offset))) => *offset,
            Some(Positions::Offset(PerBatch::Each(offsets))) => offsets[batch],
        }
}

/// The first key that is no padding; in the document of a query, if there are documents.
fn first_key(mask: &Mask, batch: usize, token: usize) -> usize {
    let of_document = mask.documents.as_ref().and_then(|documents| {
        let id = ids(documents.queries(), batch)[token];
        ids(documents.keys(), batch).iter().position(|other| *other == id)
    });
    of_batch(&mask.key_begin, batch).unwrap_or(0).max(of_document.unwrap_or(0))
}

/// The nth query of a document stands at its nth key, counted from the first or from the last one, and where there is none beyond them.
fn position_in_document(documents: &Documents, batch: usize, token: usize, from_the_last: bool) -> i64 {
    let (of_queries, of_keys) = (ids(documents.queries(), batch), ids(documents.keys(), batch));
    let id = of_queries[token];
    let own: Vec<i64> = (0..of_keys.len()).filter(|key| of_keys[*key] == id).map(|key| key as i64).collect();
    let count = |tokens: &[u32]| tokens.iter().filter(|other| **other == id).count() as i64;
    let mut nth = count(&of_queries[..token]);
    if from_the_last {
        nth += own.len() as i64 - count(&of_queries);
    }
    let beyond = nth - own.len() as i64;
    match usize::try_from(nth) {
        Ok(nth) if nth < own.len() => own[nth],
        Ok(_) => own.last().map_or(0, |last| last + 1) + beyond,
        Err(_) => own.first().map_or(0, |first| *first) + nth,
    }
}

/// What all rules but dense ones and blocks let a query see.
fn visible<'a>(mask: &Mask, shape: &AttnShape, batch: usize, offset: i64) -> Vec<Predicate<'a>> {
    let begin = of_batch(&mask.key_begin, batch).unwrap_or(0);
    let end = of_batch(&mask.key_end, batch).unwrap_or(shape.n_keys());
    let queries = of_batch(&mask.query_end, batch).unwrap_or(shape.n_queries());
    let size = |keys: Option<usize>| keys.map(|keys| keys as u64);
    let window = masks::window(offset, size(mask.window.left), size(mask.window.right));
    let mut visible: Vec<Predicate<'a>> =
        vec![Box::new(masks::keys(begin, end)), Box::new(masks::queries(queries)), Box::new(window)];
    match of_batch(&mask.prefix, batch) {
        Some(prefix) if mask.causal => visible.push(Box::new(masks::prefix(offset, prefix))),
        _ if mask.causal => visible.push(Box::new(masks::causal(offset))),
        _ => {}
    }
    if let Some(chunk) = mask.chunk {
        visible.push(Box::new(masks::chunk(offset, chunk.get() as u64, begin as i64)));
    }
    if let Some(documents) = &mask.documents {
        let (of_queries, of_keys) = (ids(documents.queries(), batch), ids(documents.keys(), batch));
        visible.push(Box::new(move |at| masks::documents(&of_queries, &of_keys)(at)));
    }
    visible
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::mask::Causal;
    use crate::shape::Dims;

    fn shape(queries: u64, keys: u64) -> AttnShape {
        let dims = Dims { batch: 2, heads: 2, kv_heads: 1, queries, keys, head_dim: 1, value_dim: 1 };
        AttnShape::new(dims).unwrap()
    }

    fn positions(mask: &Mask, shape: &AttnShape, batch: usize) -> Vec<i64> {
        (0..shape.n_queries()).map(|token| position(mask, shape, batch, token)).collect()
    }

    #[test]
    fn queries_stand_where_the_definitions_say() {
        let shape = shape(4, 9);
        let with = |positions| Mask { positions: Some(positions), ..Mask::default() };
        assert_eq!(positions(&with(Positions::TopLeft), &shape, 0), [0, 1, 2, 3]);
        assert_eq!(positions(&with(Positions::BottomRight), &shape, 1), [5, 6, 7, 8]);
        let ends = |ends: [usize; 2]| Some(PerBatch::Each(ends.into()));
        let padded = Mask { key_end: ends([9, 2]), query_end: ends([4, 3]), ..with(Positions::BottomRight) };
        assert_eq!(positions(&padded, &shape, 1), [-1, 0, 1, 2]);
        let offsets = with(Positions::Offset(PerBatch::Each([7, -2].into())));
        assert_eq!(positions(&offsets, &shape, 1), [-2, -1, 0, 1]);

        // Document 1 has keys 0, 1, 5 and 8, document 2 has 2 to 4, document 3 has none.
        let run = |end, id| Run { end, id };
        let keys = vec![run(2, 1), run(5, 2), run(6, 1), run(8, 9), run(9, 1)];
        let queries = vec![run(1, 3), run(2, 1), run(3, 2), run(4, 1)];
        let documents = Some(Arc::new(Documents::new(&[queries], &[keys]).unwrap()));
        let of = |at| positions(&Mask { documents: documents.clone(), ..with(at) }, &shape, 1);
        assert_eq!(of(Positions::TopLeft), [0, 0, 2, 1]);
        assert_eq!(of(Positions::BottomRight), [-1, 5, 4, 8]);
    }

    #[test]
    fn a_formula_sees_what_its_parts_say() {
        let shape = shape(3, 5);
        let parts = OperatorParts::plain(1.0, Causal::BottomRight);
        let (q, k, v) = ([0.5; 12], [1.0; 10], [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        let problem = Problem { shape, parts: &parts, q: &q, k: &k, v: &v, mask: None, bias: None };
        // Means of the first keys.
        assert!((problem.row(0, 1, 0).context[0] - 2.0).abs() < 1e-12);
        assert!((problem.row(1, 0, 2).context[0] - 30.0).abs() < 1e-12);
        let dense = Dense { shape: [1, 2, 1, 4], elements: [[true; 4], [false, true, false, true]].concat() };
        let problem = Problem { mask: Some(&dense), ..problem };
        assert!((problem.row(1, 0, 2).context[0] - 25.0).abs() < 1e-12);
        assert!((problem.row(1, 1, 2).context[0] - 30.0).abs() < 1e-12);
        assert!((problem.row(1, 1, 0).context[0] - 20.0).abs() < 1e-12);
    }
}

//! One element of a batch and some of its queries, as a call of their own; with those around them that rules can't be told without.
//!
//! Outputs of rows come for all queries of a call. Of a few queries out of 65,536 they are asked in a call that has no others:
//! it costs their rows of scores, where the whole call would compute and send those of all. Nothing is lost by that: a
//! row's bits don't depend on which other rows there are, and what a mask says of a query it says by its position, which goes
//! along.

use std::ops::Range;
use std::sync::Arc;

use attnd_client::{Alibi, AttnShape, Causal, DenseTensor, Dims, Mask, Operands, PerBatch, Positions};
use attnd_kernel::{Operator, OperatorParts};

use super::one_element::documents_of;
use crate::exit::BadInput;
use crate::flags::with_flags;

/// Positions further out than this are taken for no place among tokens.
const FAR: u64 = 1 << 30;

/// Who sees what in one element of the batch of a call.
#[derive(Debug)]
pub struct Rules {
    mask: Mask,
    shape: AttnShape,
    batch: usize,
    /// Where queries stand, if anybody said so, or there is only one way.
    positions: Option<Stand>,
}

/// Where the queries of one element of the batch stand on the axis of the keys.
#[derive(Debug)]
enum Stand {
    /// One after the other; the first one here.
    From(i64),
    /// Each by its number in its document.
    InDocuments,
}

impl Rules {
    /// The rules of element `batch`, which there is, under a causal rule and a mask beside it.
    ///
    /// # Errors
    /// If they make no sense together or for the shape.
    pub fn new(causal: Causal, mask: Mask, shape: AttnShape, batch: usize) -> Result<Self, BadInput> {
        let rule = Mask::from(causal);
        if rule.causal && mask.positions.is_some() {
            let text = "both --causal and --offset say where queries stand; write --causal=offset";
            return Err(BadInput::new(text));
        }
        let mask = Mask {
            causal: rule.causal || mask.causal,
            positions: mask.positions.clone().or(rule.positions.filter(|_| rule.causal)),
            ..mask
        };
        let operator = |mask: &Mask| {
            let parts = OperatorParts { mask: mask.clone(), ..OperatorParts::plain(1.0, Causal::None) };
            Operator::new(parts, &without_query_dim(&shape)?)
                .map_err(|error| BadInput::new(with_flags(&error.to_string())))
        };
        operator(&mask)?;
        if mask.documents.is_some() {
            // A causal rule needs to know where queries stand.
            let is_known = operator(&Mask { causal: true, ..mask.clone() }).is_ok();
            let positions = is_known.then_some(Stand::InDocuments);
            return Ok(Self { positions, mask, shape, batch });
        }
        let of = |ends: &Option<PerBatch<usize>>, all| ends.as_ref().map_or(all, |ends| ends.of(batch));
        let (queries, keys) = (of(&mask.query_end, shape.n_queries()), of(&mask.key_end, shape.n_keys()));
        let first = mask.of_batch(batch, &shape).position(0);
        let is_known = mask.positions.is_some() || queries == keys;
        Ok(Self { positions: is_known.then_some(Stand::From(first)), mask, shape, batch })
    }

    /// The shape of the whole call.
    pub fn shape(&self) -> &AttnShape {
        &self.shape
    }

    /// Which element of the batch it is.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Where a query stands on the axis of the keys.
    pub fn position(&self, query: usize) -> Option<i64> {
        match self.positions.as_ref()? {
            Stand::From(first) => Some(first.saturating_add(i64::try_from(query).ok()?)),
            Stand::InDocuments => Some(self.mask.of_batch(self.batch, &self.shape).position(query)),
        }
    }

    /// Whether distances between queries and keys mean anything.
    pub fn has_distances(&self) -> bool {
        match self.positions {
            None => false,
            Some(Stand::From(first)) => first.unsigned_abs() < FAR,
            Some(Stand::InDocuments) => true,
        }
    }

    /// The first key that is no padding, or the last one if all are.
    pub fn first_key(&self) -> usize {
        let begin = self.mask.key_begin.as_ref().map_or(0, |begins| begins.of(self.batch));
        begin.min(self.shape.n_keys().saturating_sub(1))
    }

    /// The mask of a call that has only this element of the batch, and of it only these queries, which are those of whole documents
    /// where there are documents.
    pub fn mask_of(&self, queries: &Range<usize>) -> Mask {
        let same = |lengths: &Option<PerBatch<usize>>| {
            lengths.as_ref().map(|all| PerBatch::Same(all.of(self.batch)))
        };
        let Mask { causal, window, chunk, ref documents, .. } = self.mask;
        let query_end =
            self.mask.query_end.as_ref().map(|ends| {
                PerBatch::Same(ends.of(self.batch).saturating_sub(queries.start).min(queries.len()))
            });
        Mask {
            causal,
            // In documents queries stand where these say.
            positions: match documents {
                None => self.position(queries.start).map(|first| Positions::Offset(PerBatch::Same(first))),
                Some(_) => self.mask.positions.clone(),
            },
            window,
            chunk,
            prefix: same(&self.mask.prefix),
            key_begin: same(&self.mask.key_begin),
            key_end: same(&self.mask.key_end),
            query_end,
            documents: documents.as_ref().map(|whole| Arc::new(documents_of(whole, self.batch, queries))),
        }
    }

    /// What such a call has of a tensor of the scores; one that isn't of the call's shape is left for the client to refuse.
    pub fn dense_of(&self, whole: &DenseTensor, queries: &Range<usize>) -> DenseTensor {
        let [batch, heads, rows, keys] = whole.shape;
        let row = keys * whole.element.size();
        let fits = [1, self.shape.batch()].contains(&batch) && [1, self.shape.n_queries()].contains(&rows);
        if !fits || row == 0 || whole.bytes.len() != batch * heads * rows * row {
            return whole.clone();
        }
        let element = if batch == 1 { 0 } else { self.batch };
        let of_batch = whole.bytes.slice(element * heads * rows * row..(element + 1) * heads * rows * row);
        let wanted = if rows == 1 { 0..1 } else { queries.clone() };
        let bytes = if wanted.len() == rows {
            of_batch
        } else {
            let of_heads = of_batch.chunks(rows * row);
            let rows = of_heads.filter_map(|head| head.get(wanted.start * row..wanted.end * row));
            rows.collect::<Vec<_>>().concat().into()
        };
        DenseTensor { element: whole.element, shape: [1, heads, wanted.len(), keys], bytes }
    }

    /// The slopes of such a call, of which the whole one may have some for each element of the batch.
    pub fn alibi_of(&self, whole: Alibi) -> Alibi {
        let heads = self.shape.n_heads();
        let slopes =
            whole.slopes.map(|slopes| match slopes.get(self.batch * heads..(self.batch + 1) * heads) {
                Some(own) if slopes.len() == self.shape.batch() * heads => own.into(),
                _ => slopes,
            });
        Alibi { slopes, ..whole }
    }

    /// The operands of such a call. `whole` are those of all.
    ///
    /// # Errors
    /// Never for queries that there are.
    pub fn operands_of(&self, whole: &Operands, queries: &Range<usize>) -> Result<Operands, BadInput> {
        let shape = &self.shape;
        let part = Dims {
            batch: 1,
            heads: shape.n_heads() as u64,
            kv_heads: shape.n_kv_heads() as u64,
            queries: queries.len() as u64,
            keys: shape.n_keys() as u64,
            head_dim: shape.head_dim() as u64,
            value_dim: shape.value_dim() as u64,
        };
        let part = AttnShape::new(part).and_then(|part| part.with_query_dim(shape.query_dim() as u64));
        let part = part.map_err(|error| BadInput::new(format!("--query: {error}")))?;
        let element = |bytes: &bytes::Bytes| {
            let size = bytes.len() / shape.batch();
            bytes.slice(self.batch * size..(self.batch + 1) * size)
        };
        let (q, k, v) = (element(&whole.q), element(&whole.k), element(&whole.v));
        let q = if queries.len() == shape.n_queries() {
            q
        } else {
            let row = shape.query_dim() * whole.dtype.size();
            let heads = q.chunks(shape.n_queries() * row);
            let rows = heads.filter_map(|head| head.get(queries.start * row..queries.end * row));
            rows.collect::<Vec<_>>().concat().into()
        };
        Ok(Operands { shape: part, dtype: whole.dtype, q, k, v })
    }
}

/// The same shape for the plain score function, which takes queries of the dimension of keys alone.
fn without_query_dim(shape: &AttnShape) -> Result<AttnShape, BadInput> {
    let plain = shape.with_query_dim(shape.head_dim() as u64);
    plain.map_err(|error| BadInput::new(error.to_string()))
}

#[cfg(test)]
mod tests {
    use attnd_client::{AttendOptions, Documents, Dtype, Run, Window};

    use super::super::one_element::asked_around;
    use super::*;

    fn shape(batch: u64, queries: u64, keys: u64) -> AttnShape {
        let dims = Dims { batch, heads: 4, kv_heads: 2, queries, keys, head_dim: 3, value_dim: 1 };
        AttnShape::new(dims).unwrap()
    }

    /// What every query sees, as the kernels read a mask.
    fn visible(mask: &Mask, shape: &AttnShape, batch: usize) -> Vec<Range<usize>> {
        let mask = mask.of_batch(batch, shape);
        (0..shape.n_queries()).map(|query| mask.visible(query)).collect()
    }

    #[test]
    fn queries_see_in_a_call_of_their_own_what_they_saw() {
        let each = |numbers: [usize; 2]| Some(PerBatch::Each(numbers.into()));
        let offset = Some(Positions::Offset(PerBatch::Each([-2, 4].into())));
        let window = Window { left: Some(2), right: Some(1) };
        let masks = [
            (Causal::None, Mask::default()),
            (Causal::BottomRight, Mask::default()),
            (Causal::TopLeft, Mask { window, ..Mask::default() }),
            (Causal::BottomRight, Mask { key_end: each([9, 5]), query_end: each([6, 3]), ..Mask::default() }),
            (Causal::None, Mask { causal: true, positions: offset.clone(), ..Mask::default() }),
            (Causal::None, Mask { positions: offset, window, ..Mask::default() }),
            (Causal::BottomRight, Mask { chunk: std::num::NonZeroUsize::new(4), ..Mask::default() }),
            (Causal::TopLeft, Mask { prefix: each([3, 0]), key_begin: each([1, 2]), ..Mask::default() }),
        ];
        for (queries, keys) in [(7, 9), (9, 9)] {
            let shape = shape(2, queries, keys);
            for (causal, mask) in &masks {
                for batch in 0..2 {
                    let rules = Rules::new(*causal, mask.clone(), shape, batch).unwrap();
                    let all = visible(&rules.mask, &shape, batch);
                    for rows in [0..shape.n_queries(), 2..5, shape.n_queries() - 1..shape.n_queries()] {
                        let part = AttnShape::new(Dims {
                            batch: 1,
                            heads: 4,
                            kv_heads: 2,
                            queries: rows.len() as u64,
                            keys,
                            head_dim: 3,
                            value_dim: 1,
                        });
                        let seen = visible(&rules.mask_of(&rows), &part.unwrap(), 0);
                        assert_eq!(seen, all[rows.clone()], "{causal:?} {mask:?} batch {batch} {rows:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn queries_of_documents_see_what_they_saw_and_stand_where_they_stood() {
        let runs = |ids: &[(usize, u32)]| ids.iter().map(|(end, id)| Run { end: *end, id: *id }).collect();
        let queries: [Vec<Run>; 2] = [runs(&[(3, 1), (5, 2), (6, 1), (7, 3)]), runs(&[(2, 4), (7, 5)])];
        let keys: [Vec<Run>; 2] = [runs(&[(2, 2), (7, 1), (9, 3)]), runs(&[(5, 5), (9, 4)])];
        let documents = Some(Arc::new(Documents::new(&queries, &keys).unwrap()));
        let (shape, mut fewer) = (shape(2, 7, 9), 0);
        let window = Window { left: Some(1), right: Some(0) };
        for (causal, window) in [
            (Causal::None, Window::default()),
            (Causal::TopLeft, Window::default()),
            (Causal::BottomRight, Window::default()),
            (Causal::BottomRight, window),
        ] {
            let mask = Mask { documents: documents.clone(), window, ..Mask::default() };
            let options = AttendOptions { mask: mask.clone(), ..AttendOptions::default() };
            for (batch, query) in (0..2).flat_map(|batch| (0..7).map(move |query| (batch, query))) {
                let rules = Rules::new(causal, mask.clone(), shape, batch).unwrap();
                let asked = asked_around(&options, batch, &shape, &(query..query + 1));
                assert!(asked.contains(&query));
                fewer += usize::from(asked.len() < 7);
                let dims = Dims {
                    batch: 1,
                    heads: 4,
                    kv_heads: 2,
                    queries: asked.len() as u64,
                    keys: 9,
                    head_dim: 3,
                    value_dim: 1,
                };
                let (part, of_part) = (AttnShape::new(dims).unwrap(), rules.mask_of(&asked));
                let (whole, of_part) = (rules.mask.of_batch(batch, &shape), of_part.of_batch(0, &part));
                for (at, query) in asked.clone().enumerate() {
                    assert_eq!(of_part.visible(at), whole.visible(query), "{causal:?} {batch} {query}");
                    assert_eq!(of_part.position(at), whole.position(query), "{causal:?} {batch} {query}");
                }
            }
        }
        assert!(fewer > 20, "{fewer} calls had fewer queries than all");
    }

    #[test]
    fn positions_are_known_where_they_are_said_or_there_is_only_one_way() {
        let rules = |causal, mask, queries| Rules::new(causal, mask, shape(1, queries, 9), 0);
        let position = |causal, queries| rules(causal, Mask::default(), queries).unwrap().position(1);
        assert_eq!(position(Causal::None, 7), None);
        assert_eq!(position(Causal::None, 9), Some(1));
        assert_eq!(position(Causal::TopLeft, 7), Some(1));
        assert_eq!(position(Causal::BottomRight, 7), Some(3));
        let offset = Mask { positions: Some(Positions::Offset(PerBatch::Same(5))), ..Mask::default() };
        assert_eq!(rules(Causal::None, offset.clone(), 7).unwrap().position(1), Some(6));
        let refusal = rules(Causal::TopLeft, offset, 7).unwrap_err().to_string();
        assert!(refusal.contains("--causal=offset"), "{refusal}");
        let wrong = Mask { key_end: Some(PerBatch::Each([1, 2].into())), ..Mask::default() };
        assert!(rules(Causal::None, wrong, 7).unwrap_err().to_string().contains("batch is 1"));
    }

    #[test]
    fn operands_are_those_of_the_rows() {
        let shape = shape(2, 5, 6);
        let bytes = |n: u64| (0..2 * n).map(|i| (i % 251) as u8).collect::<Vec<u8>>();
        let (q, k, v) = (bytes(shape.q_elements()), bytes(shape.k_elements()), bytes(shape.v_elements()));
        let (q_bytes, dtype) = (q.clone(), Dtype::Bf16);
        let whole = Operands { shape, dtype, q: q.into(), k: k.clone().into(), v: v.into() };
        let rules = Rules::new(Causal::None, Mask::default(), shape, 1).unwrap();
        let part = rules.operands_of(&whole, &(2..4)).unwrap();
        assert_eq!((part.shape.batch(), part.shape.n_queries(), part.dtype), (1, 2, Dtype::Bf16));
        assert_eq!(part.k[..], k[k.len() / 2..]);
        let mut expected = Vec::new();
        for head in 4..8 {
            expected.extend_from_slice(&q_bytes[(head * 5 + 2) * 6..(head * 5 + 4) * 6]);
        }
        assert_eq!(part.q[..], expected);
        let all = rules.operands_of(&whole, &(0..5)).unwrap();
        assert_eq!(all.q[..], q_bytes[q_bytes.len() / 2..]);
    }
}

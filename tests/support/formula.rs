//! A case as the f64 oracle of the whole operator has it: each rule as the predicate of one element, in words of its own.

use attnd_kernel::reference::operator::{At, EmptyRow, Formula, Normaliser, OperatorRow, Score};
use attnd_kernel::reference::{biases, masks};
use attnd_kernel::{Mask, PerBatch, Positions, Run};

use super::cases::{Answer, Case, Row};

/// Sums of weights under this logarithm are below what f32 holds.
const UNDERFLOWN: f64 = -80.0;

/// The tokens of one element of the batch among its keys.
struct Places {
    /// Of each query token: how much further it stands on the axis of the keys than its own number.
    offsets: Vec<i64>,
    /// Of each query token: the first key that is none of the padding on the left or of other documents.
    first_keys: Vec<usize>,
    /// The document of each query token, and of each key; the same for all where there are none.
    documents: [Vec<u32>; 2],
    key_begin: usize,
    key_end: usize,
    query_end: usize,
}

impl Places {
    fn new(mask: &Mask, batch: usize, queries: usize, keys: usize) -> Self {
        let of = |lengths: &Option<PerBatch<usize>>, all| lengths.as_ref().map_or(all, |n| n.of(batch));
        let (key_begin, key_end) = (of(&mask.key_begin, 0), of(&mask.key_end, keys));
        let query_end = of(&mask.query_end, queries);
        let ids = |runs: &[Vec<Run>]| -> Vec<u32> {
            let runs = if runs.len() == 1 { &runs[0] } else { &runs[batch] };
            let begins = std::iter::once(0).chain(runs.iter().map(|run| run.end));
            runs.iter().zip(begins).flat_map(|(run, begin)| vec![run.id; run.end - begin]).collect()
        };
        let documents = match &mask.documents {
            Some(documents) => [ids(documents.queries()), ids(documents.keys())],
            None => [vec![0; queries], vec![0; keys]],
        };
        let mut places =
            Self { offsets: Vec::new(), first_keys: Vec::new(), documents, key_begin, key_end, query_end };
        for token in 0..queries {
            let [of_tokens, of_keys] = &places.documents;
            let is_same = |id: &u32| *id == of_tokens[token];
            let first_key = of_keys.iter().position(is_same).unwrap_or(0);
            let offset = match &mask.positions {
                Some(Positions::Offset(offsets)) => offsets.of(batch),
                Some(Positions::BottomRight) if mask.documents.is_none() => key_end as i64 - query_end as i64,
                Some(Positions::BottomRight) => {
                    // As far from the last key of the document as from its last token.
                    let behind = of_tokens[token..].iter().filter(|id| is_same(id)).count() as i64;
                    let last_key = of_keys.iter().rposition(is_same).map_or(0, |key| key as i64 + 1);
                    last_key - behind - token as i64
                }
                Some(Positions::TopLeft) | None => {
                    let before = of_tokens[..token].iter().filter(|id| is_same(id)).count() as i64;
                    first_key as i64 + before - token as i64
                }
            };
            places.offsets.push(offset);
            places.first_keys.push(first_key.max(key_begin));
        }
        places
    }
}

impl Case {
    /// Some rows by the f64 oracle of the whole operator.
    pub(crate) fn operator_reference(&self, rows: &[Row]) -> Vec<(Row, OperatorRow)> {
        let (shape, floats) = (self.shape(), self.floats());
        let of_batch = |batch| Places::new(&self.whole_mask(), batch, shape.n_queries(), shape.n_keys());
        let places: Vec<Places> = (0..shape.batch()).map(of_batch).collect();
        let formula = self.formula(&floats, &places);
        let row = |(head, token)| formula.row(head / shape.n_heads(), head % shape.n_heads(), token);
        rows.iter().map(|at| (*at, row(*at))).collect()
    }

    /// The mask, with the causal rule in it.
    fn whole_mask(&self) -> Mask {
        attnd_wire::operator::with_causal(self.causal, self.mask.clone()).expect("one position")
    }

    fn formula<'a>(&'a self, [q, k, v]: &'a [Vec<f32>; 3], places: &'a [Places]) -> Formula<'a> {
        let shape = *self.shape();
        let (d, dv, keys) = (shape.head_dim(), shape.value_dim(), shape.n_keys());
        let kv_row =
            move |at: At| (at.batch * shape.n_kv_heads() + at.head / shape.group_size()) * keys + at.key;
        let q_row = move |at: At| (at.batch * shape.n_heads() + at.head) * shape.n_queries() + at.token;
        let scale = f64::from(self.scale);
        let mask = self.whole_mask();
        let mut formula = Formula {
            keys,
            value_dim: dv,
            value: Box::new(move |at| &v[kv_row(at) * dv..][..dv]),
            score: Box::new(move |at| Score::dot(scale, &q[q_row(at) * d..][..d], &k[kv_row(at) * d..][..d])),
            softcap: self.softcap.map(f64::from),
            biases: Vec::new(),
            visible: Vec::new(),
            normaliser: match self.normaliser {
                attnd_kernel::Normaliser::Softmax => Normaliser::Softmax,
                attnd_kernel::Normaliser::Sigmoid { bias } => Normaliser::Sigmoid { bias: bias.into() },
            },
            sink: None,
            empty_row: match self.empty_row {
                attnd_kernel::EmptyRow::Zero => EmptyRow::Zero,
                attnd_kernel::EmptyRow::Nan => EmptyRow::Nan,
            },
        };
        if let Some(sinks) = &self.sinks {
            formula.sink = Some(Box::new(move |head| sinks[head].into()));
        }
        if let Some((slopes, by_key)) = self.slopes() {
            formula.biases.push(Box::new(move |at| {
                let (place, n) = (&places[at.batch], shape.n_heads());
                let slopes = if slopes.len() == n { &slopes[..] } else { &slopes[at.batch * n..][..n] };
                match by_key {
                    true => biases::alibi_by_key(place.first_keys[at.token], slopes)(at),
                    false => biases::alibi(place.offsets[at.token], slopes)(at),
                }
            }));
        }
        formula.visible.push(Box::new(move |at| {
            let place = &places[at.batch];
            let (offset, [of_tokens, of_keys]) = (place.offsets[at.token], &place.documents);
            let length = |side: Option<usize>| side.map(|keys| keys as u64);
            let in_chunk = |keys: std::num::NonZeroUsize| {
                masks::chunk(offset, keys.get() as u64, place.key_begin as i64)(at)
            };
            let before_prefix = mask.prefix.as_ref().map_or(0, |prefix| prefix.of(at.batch));
            (!mask.causal || masks::prefix(offset, before_prefix)(at))
                && masks::window(offset, length(mask.window.left), length(mask.window.right))(at)
                && mask.chunk.is_none_or(in_chunk)
                && masks::keys(place.key_begin, place.key_end)(at)
                && masks::queries(place.query_end)(at)
                && masks::documents(of_tokens, of_keys)(at)
        }));
        formula
    }
}

impl Answer {
    /// # Panics
    /// If a row of `wanted` is further from the oracle than its bound.
    pub(crate) fn assert_within_operator(&self, case: &Case, wanted: &[(Row, OperatorRow)], what: &str) {
        for (at, wanted) in wanted {
            let row = self.row(case.shape(), *at);
            let is_sum = case.normaliser != attnd_kernel::Normaliser::Softmax;
            let lse = if is_sum && wanted.lse < UNDERFLOWN { wanted.lse as f32 } else { row.lse[0] };
            let ratio = wanted.worst_ratio(&row.context, lse);
            assert!(ratio <= 1.0, "{what}: row {at:?} is {ratio} times the bound from the f64 oracle");
        }
    }
}

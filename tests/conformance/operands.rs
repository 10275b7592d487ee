//! What a case of onnx computes over: heads split, and the past in front of the present.

use super::onnx_data::{Case, Elements, Tensor};

/// A tensor `[batch, heads, tokens, dim]`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Matrices {
    pub(super) shape: [usize; 4],
    pub(super) elements: Vec<f32>,
}

/// The operands of a case.
pub(super) struct Operands {
    pub(super) q: Matrices,
    /// With the past.
    pub(super) k: Matrices,
    /// With the past.
    pub(super) v: Matrices,
    /// Of each problem: where its first query token stands among the keys.
    pub(super) offsets: Vec<i64>,
    /// Of each problem: keys that are no padding, where some are.
    pub(super) lengths: Option<Vec<usize>>,
}

impl Operands {
    pub(super) fn of(case: &Case) -> Self {
        let (heads, kv_heads) = case.attributes.num_heads.unzip();
        let q = Matrices::of(case.required("Q"), heads);
        let with_past = |name: &str, past: &str| {
            let present = Matrices::of(case.required(name), kv_heads);
            case.tensor(past).map(|past| Matrices::of(past, None).then(&present)).unwrap_or(present)
        };
        let (k, v) = (with_past("K", "past_key"), with_past("V", "past_value"));
        let past = case.tensor("past_key").map_or(0, |past| past.shape[2] as i64);
        let lengths = case.tensor("nonpad_kv_seqlen").map(|lengths| match &lengths.elements {
            Elements::Integers(lengths) => lengths.clone(),
            other => panic!("lengths: {other:?}"),
        });
        let [batch, _, tokens, _] = q.shape;
        let offsets = match &lengths {
            Some(lengths) => lengths.iter().map(|length| length - tokens as i64).collect(),
            None => vec![past; batch],
        };
        let lengths =
            lengths.map(|lengths| lengths.into_iter().map(|n| usize::try_from(n).unwrap()).collect());
        Self { q, k, v, offsets, lengths }
    }

    /// Query heads for each head of keys: they are neighbours.
    pub(super) fn group_size(&self) -> usize {
        self.q.shape[1] / self.k.shape[1]
    }
}

impl Matrices {
    /// A tensor of `[batch, heads, tokens, dim]`, or of `[batch, tokens, heads * dim]` with so many heads.
    pub(super) fn of(tensor: &Tensor, heads: Option<usize>) -> Self {
        match (tensor.shape.as_slice(), heads) {
            (&[batch, heads, tokens, dim], _) => {
                Self { shape: [batch, heads, tokens, dim], elements: tensor.floats().to_vec() }
            }
            (&[batch, tokens, width], Some(heads)) => {
                let dim = width / heads;
                assert_eq!(heads * dim, width, "heads divide {width}");
                let mut elements = Vec::with_capacity(batch * tokens * width);
                for b in 0..batch {
                    for head in 0..heads {
                        for token in 0..tokens {
                            let row = &tensor.floats()[(b * tokens + token) * width + head * dim..][..dim];
                            elements.extend_from_slice(row);
                        }
                    }
                }
                Self { shape: [batch, heads, tokens, dim], elements }
            }
            (_, _) => panic!("no operand: {:?}", tensor.shape),
        }
    }

    /// These tokens, and the ones of `later` behind them.
    fn then(&self, later: &Self) -> Self {
        let [batch, heads, tokens, dim] = self.shape;
        let [_, _, more, _] = later.shape;
        assert_eq!(later.shape, [batch, heads, more, dim], "behind {:?}", self.shape);
        let mut elements = Vec::with_capacity(self.elements.len() + later.elements.len());
        for head in 0..batch * heads {
            elements.extend_from_slice(&self.elements[head * tokens * dim..][..tokens * dim]);
            elements.extend_from_slice(&later.elements[head * more * dim..][..more * dim]);
        }
        Self { shape: [batch, heads, tokens + more, dim], elements }
    }

    /// The row of one token.
    pub(super) fn row(&self, batch: usize, head: usize, token: usize) -> &[f32] {
        let [_, heads, tokens, dim] = self.shape;
        &self.elements[((batch * heads + head) * tokens + token) * dim..][..dim]
    }
}

/// A mask's shape as `[batch, heads, tokens, keys]`: dimensions that it lacks are in front.
pub(super) fn mask_shape(tensor: &Tensor) -> [usize; 4] {
    let missing = 4 - tensor.shape.len();
    let mut shape = [1; 4];
    shape[missing..].copy_from_slice(&tensor.shape);
    shape
}

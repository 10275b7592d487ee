//! Multi-head latent attention (DeepSeek-V2, 2024, section 2.1) in its absorbed form (appendix C).
//!
//! ```text
//! [c_j', r_j] = x_j W^DKV      c_j = norm(c_j')             a latent and what turns, both for all heads
//! [q_i^h, t_i^h] = norm(x_i W^DQ) W^UQ                      or x_i W^Q
//! k_j^h = [W_h^UK c_j, rope(r_j)]      v_j^h = W_h^UV c_j   as it is defined
//! s_ij^h = scale * ((W_h^UK^T q_i^h) . c_j + rope(t_i^h) . rope(r_j))
//! o_i^h = W_h^UV sum_j p_ij^h c_j                           as it is computed
//! ```
//!
//! So the cluster has one kv head with keys `[c_j, rope(r_j)]`, whose values are their first elements and don't travel
//! ([`AttnShape::with_values_from_keys`]); queries are `[W_h^UK^T q_i^h, rope(t_i^h)]`. The scale is that of the definition,
//! `1 / sqrt(nope + rope)`, not that of the keys that there are. Both sums are the same but for rounding; the biases, masks and
//! normalisers of a call mean the same, score functions other than products don't.

mod weights;

use std::sync::Arc;

use attnd_kernel::{AttnShape, Kernels, Linear, Score};

use self::weights::LatentDims;
pub use self::weights::{LatentWeights, Norm};
use super::{HeadMatrices, Inner, Layer, LayerDims, LayerError, Rope, linear};
use crate::context::zeros;

/// A layer of multi-head latent attention as somebody put it together; [`Layer::latent`] decides whether it makes sense.
#[derive(Clone, Debug)]
pub struct LatentParts {
    /// The matrices.
    pub weights: LatentWeights,
    /// Heads.
    pub heads: usize,
    /// What scores are multiplied by; `None`: one over the square root of `nope + rope`. Where positions are scaled by YaRN, models
    /// have another.
    pub scale: Option<f32>,
    /// Rotary positions, over the `rope` elements of a head's query and of a key; DeepSeek's pairs are interleaved.
    pub rope: Option<Rope>,
    /// Whether rows see a zero key with a zero value beside all others, whatever is masked.
    pub add_zero_attn: bool,
}

/// What latent attention computes beside the first matrices of queries and keys and the last of the result.
#[derive(Debug)]
pub(super) struct Latent {
    dims: LatentDims,
    /// What scores are multiplied by where nobody says anything else.
    scale: f32,
    /// What queries go through that were compressed.
    query_up: Option<(Norm, Linear)>,
    norm: Norm,
    /// `W^UK` of each head, transposed: `nope` to `rank`.
    absorbed: Vec<Linear>,
    /// `W^UV` of each head, `rank` to `value`.
    values: Vec<Linear>,
}

impl Layer {
    /// A layer of multi-head latent attention of these parts. Its keys and values are made of the same rows: [`Self::project`] wants
    /// equal ones. What it keeps of each is a latent and the rotary part, for all heads together.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn latent(parts: LatentParts) -> Result<Self, LayerError> {
        let LatentParts { weights, heads, scale, rope, add_zero_attn } = parts;
        let dims = weights.dims(heads)?;
        let LatentDims { nope, rope: rotary, rank, .. } = dims;
        let rope = rope.map(|rope| rope.behind(rank, rotary)).transpose()?;
        let LatentWeights { query_down, query, latent, norm, up, output } = weights;
        let query = linear(&query)?;
        let (query, query_up) = match query_down {
            Some((down, norm)) => (linear(&down)?, Some((norm, query))),
            None => (query, None),
        };
        let key = linear(&latent)?;
        let (mut absorbed, mut values) = (Vec::new(), Vec::new());
        for of_head in up.weight.chunks_exact((nope + dims.value) * rank) {
            let (keys, of_values) = of_head.split_at(nope * rank);
            let transposed: Vec<f32> =
                (0..rank).flat_map(|c| keys.iter().skip(c).step_by(rank).copied()).collect();
            absorbed.push(Linear::new(&transposed, [rank, nope], None).map_err(LayerError::Memory)?);
            values.push(Linear::new(of_values, [dims.value, rank], None).map_err(LayerError::Memory)?);
        }
        let inner = Inner {
            kernels: Kernels::from_env()?,
            dims: LayerDims { heads, kv_heads: 1, head_dim: rank + rotary, value_dim: rank },
            query,
            // Values are parts of keys.
            value: key.clone(),
            key,
            output: Some(linear(&output)?),
            gate: None,
            learnt: None,
            latent: Some(Latent {
                dims,
                // In f64, as kernels have theirs.
                scale: (1.0 / ((nope + rotary) as f64).sqrt()) as f32,
                query_up,
                norm,
                absorbed,
                values,
            }),
            scale,
            rope,
            add_zero_attn,
            // Workers make none of it.
            key_matrices: HeadMatrices::default(),
            value_matrices: HeadMatrices::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

/// Whether rows of values are those of keys, NaN and signs of zeros included.
pub(super) fn same_bits(values: &[f32], keys: &[f32]) -> bool {
    values.len() == keys.len() && values.iter().zip(keys).all(|(value, key)| value.to_bits() == key.to_bits())
}

impl Latent {
    /// The scale of a score function that is scaled by the dimension of keys, which would take that of the keys that are sent.
    pub(super) fn default_scale(&self, score: &Score) -> Option<f32> {
        (score.function().name == "scaled_dot").then_some(self.scale)
    }

    /// Normalises the latents of rows of keys, `[rows, rank + rope]`.
    pub(super) fn normalise(&self, keys: &mut [f32]) {
        let LatentDims { rank, rope, .. } = self.dims;
        for row in keys.chunks_exact_mut(rank + rope) {
            self.norm.apply(&mut row[..rank]);
        }
    }

    /// Rows of queries as the cluster takes them, `[rows, heads * (rank + rope)]`, of what their first matrix made of them.
    pub(super) fn absorb(&self, kernels: &Kernels, mut first: Vec<f32>) -> Result<Vec<f32>, LayerError> {
        let LatentDims { heads, nope, rope, rank, .. } = self.dims;
        let queries = match &self.query_up {
            None => first,
            Some((norm, up)) => {
                first.chunks_exact_mut(up.inputs()).for_each(|row| norm.apply(row));
                let mut queries = room("queries", first.len() / up.inputs(), up.outputs())?;
                up.apply(kernels, &first, &mut queries);
                queries
            }
        };
        let (from, to) = (nope + rope, rank + rope);
        let rows = queries.len() / (heads * from);
        let mut out = room("absorbed queries", rows, heads * to)?;
        let mut of_head = room("queries of a head", rows, nope)?;
        let mut absorbed = room("absorbed queries of a head", rows, rank)?;
        for (head, matrix) in self.absorbed.iter().enumerate() {
            let parts = queries.chunks_exact(from).skip(head).step_by(heads);
            of_head
                .chunks_exact_mut(nope)
                .zip(parts.clone())
                .for_each(|(to, q)| to.copy_from_slice(&q[..nope]));
            matrix.apply(kernels, &of_head, &mut absorbed);
            let places = out.chunks_exact_mut(to).skip(head).step_by(heads);
            for ((place, absorbed), q) in places.zip(absorbed.chunks_exact(rank)).zip(parts) {
                let (latent, turning) = place.split_at_mut(rank);
                latent.copy_from_slice(absorbed);
                turning.copy_from_slice(&q[nope..]);
            }
        }
        Ok(out)
    }

    /// Rows of the heads' contexts, `[batch * queries, heads * value]`, of sums of latents, `[batch, heads, queries, rank]`.
    pub(super) fn expand(
        &self,
        kernels: &Kernels,
        context: &[f32],
        shape: &AttnShape,
    ) -> Result<Vec<f32>, LayerError> {
        let LatentDims { heads, rank, value, .. } = self.dims;
        let queries = shape.n_queries();
        let mut rows = room("contexts", shape.batch() * queries, heads * value)?;
        let mut expanded = room("contexts of a head", queries, value)?;
        for (at, of_head) in context.chunks_exact(queries * rank).enumerate() {
            let (batch, head) = (at / heads, at % heads);
            let Some(matrix) = self.values.get(head) else { continue };
            matrix.apply(kernels, of_head, &mut expanded);
            let places = rows.chunks_exact_mut(value).skip(batch * queries * heads + head).step_by(heads);
            places.zip(expanded.chunks_exact(value)).for_each(|(to, from)| to.copy_from_slice(from));
        }
        Ok(rows)
    }
}

fn room(what: &'static str, rows: usize, width: usize) -> Result<Vec<f32>, LayerError> {
    let elements = rows.saturating_mul(width);
    zeros(elements).ok_or(LayerError::RowMemory { what, elements })
}

#[cfg(test)]
mod tests {
    use super::super::{LayerCall, Matrix, RopeStyle, Rows};
    use super::*;
    use crate::operands::AttendOptions;

    fn matrix(name: &str, [outputs, inputs]: [usize; 2]) -> Matrix {
        let weight = (0..outputs * inputs).map(|i| i as f32 / 64.0).collect();
        Matrix { name: name.into(), outputs, inputs, weight, bias: None }
    }

    fn norm(elements: usize) -> Norm {
        Norm { name: "norm".into(), weight: vec![1.0; elements], eps: 1e-6 }
    }

    /// 2 heads of 3 + 2 for queries and 4 for values, latents of 5, rows of 7, queries by way of 6.
    fn parts() -> LatentParts {
        let weights = LatentWeights {
            query_down: Some((matrix("query down", [6, 7]), norm(6))),
            query: matrix("query", [10, 6]),
            latent: matrix("latent", [7, 7]),
            norm: norm(5),
            up: matrix("up", [14, 5]),
            output: matrix("output", [7, 8]),
        };
        LatentParts { weights, heads: 2, scale: None, rope: None, add_zero_attn: false }
    }

    fn rows(tokens: usize) -> Rows {
        Rows::new((0..tokens * 7).map(|i| (i % 5) as f32).collect(), [1, tokens, 7]).unwrap()
    }

    #[test]
    fn one_latent_is_kept_of_a_row_and_values_do_not_travel() {
        let layer = Layer::latent(parts()).unwrap();
        let (x, kept) = (rows(3), rows(9));
        let kv = layer.inner.keys_and_values(&kept, &kept, 0).unwrap();
        assert_eq!((kv.tokens(), kv.bytes(), kv.v.len()), (9, 9 * 7 * 4, 0));
        let (operands, gate) = layer.inner.operands(&x, &kv, 0).unwrap();
        let shape = &operands.shape;
        assert_eq!((shape.n_heads(), shape.n_kv_heads(), shape.head_dim(), shape.value_dim()), (2, 1, 7, 5));
        assert!(shape.value_is_key_prefix() && gate.is_none());
        let begin = operands.begin(&layer.inner.options(&LayerCall::default()).unwrap()).unwrap();
        // Of a head's query as it is defined, not of the keys that are sent.
        assert_eq!(begin.operator.scale(), (1.0 / 5.0_f64.sqrt()) as f32);

        // One matrix makes both.
        assert_eq!(layer.inner.kv_flops(&kept, &kept), 2 * 9 * 7 * 7);
        let obstacle = layer.inner.obstacle(&AttendOptions::default()).unwrap().to_string();
        assert_eq!(obstacle, "latent attention: latents are normalised after they are projected");
    }

    #[test]
    fn what_the_absorbed_form_can_not_say_is_refused() {
        let layer = Layer::latent(parts()).unwrap();
        let (kept, others) = (rows(9), rows(8));
        let text = layer.inner.keys_and_values(&kept, &others, 0).unwrap_err().to_string();
        assert_eq!(text, "latent attention and rows of values: its values are parts of its keys");
        assert!(layer.inner.keys_and_values(&kept, &rows(9), 0).is_ok(), "equal ones");
        let of_score = |name: &str| {
            let score = Score::new(name, Vec::new()).unwrap();
            let options = AttendOptions { score, ..AttendOptions::default() };
            layer.inner.options(&LayerCall { options, ..LayerCall::default() })
        };
        let text = of_score("cosine").unwrap_err().to_string();
        assert_eq!(text, "latent attention and score: only products of queries and keys can be absorbed");
        let (x, kv) = (rows(3), layer.inner.keys_and_values(&kept, &kept, 0).unwrap());
        let scale = |layer: &Layer, score: &str| {
            let score = Score::new(score, Vec::new()).unwrap();
            let options = AttendOptions { score, ..AttendOptions::default() };
            let options = layer.inner.options(&LayerCall { options, ..LayerCall::default() }).unwrap();
            layer.inner.operands(&x, &kv, 0).unwrap().0.begin(&options).unwrap().operator.scale()
        };
        assert_eq!([scale(&layer, "dot"), scale(&layer, "scaled_dot")], [1.0, (1.0 / 5.0_f64.sqrt()) as f32]);
        // Of 6 elements, where two roundings would give another number.
        let weights =
            LatentWeights { query: matrix("query", [12, 6]), up: matrix("up", [16, 5]), ..parts().weights };
        let six = Layer::latent(LatentParts { weights, ..parts() }).unwrap();
        assert_eq!(scale(&six, "scaled_dot"), (1.0 / 6.0_f64.sqrt()) as f32);
        assert_ne!(scale(&six, "scaled_dot"), 6.0_f32.sqrt().recip());
        let own = Layer::latent(LatentParts { scale: Some(0.25), ..parts() }).unwrap();
        assert_eq!([scale(&own, "dot"), scale(&own, "scaled_dot")], [0.25, 0.25]);

        let nan = || Rows::new([f32::NAN, 1.0].repeat(7), [1, 2, 7]).unwrap();
        assert!(layer.inner.keys_and_values(&nan(), &nan(), 0).is_ok(), "NaN in both");
        let zeros = |sign: f32| Rows::new(vec![0.0_f32.copysign(sign); 7], [1, 1, 7]).unwrap();
        assert!(layer.inner.keys_and_values(&zeros(1.0), &zeros(-1.0), 0).is_err(), "other zeros");

        let rope = Rope::new(RopeStyle::Interleaved, 1e4);
        let with = |rope: Rope| Layer::latent(LatentParts { rope: Some(rope), ..parts() });
        let turned = with(rope.clone()).unwrap();
        let rope = turned.inner.rope.clone().unwrap();
        assert_eq!((rope.first, rope.dims), (5, Some(2)), "behind the latent");
        let text = with(Rope { dims: Some(4), first: 0, ..rope }).unwrap_err().to_string();
        assert_eq!(text, "rope: 4 elements from 0 on, the rotary part of a head has 2");
    }
}

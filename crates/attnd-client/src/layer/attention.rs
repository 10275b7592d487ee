//! A call of a layer: rows become heads, heads go to the cluster, contexts become rows again.

use std::sync::Arc;

use attnd_kernel::{AttnShape, Causal, Dims, Dtype, Linear, OutputsParts, Score, Stage, Symbol};
use attnd_plan::{Projected, Projection};
use attnd_wire::{Error, floats, operator};
use bytes::Bytes;

use super::heads::{into_heads, into_rows};
use super::latent::same_bits;
use super::learnt::{behind_learnt_key, with_learnt_column};
use super::plan::Place;
use super::rope::Turns;
use super::weights::HeadMatrices;
use super::{Inner, Layer, LayerDims, LayerError, Rows};
use crate::client::{Attended, Client, Progress};
use crate::context::zeros;
use crate::error::ClientError;
use crate::operands::{AttendOptions, Operands};
use crate::side::KvSource;

/// Keys and values, projected: any number of calls of their layer can attend to them. Cloning copies nothing.
#[derive(Clone, Debug)]
pub struct ProjectedKv {
    dims: LayerDims,
    batch: usize,
    /// The learnt one included.
    pub(super) keys: usize,
    has_learnt: bool,
    pub(super) k: Bytes,
    /// Nothing where values are parts of keys.
    pub(super) v: Bytes,
}

impl ProjectedKv {
    /// Keys of each problem, without a learnt one.
    pub fn tokens(&self) -> usize {
        self.keys - usize::from(self.has_learnt)
    }

    /// Bytes that every call sends again.
    pub fn bytes(&self) -> u64 {
        (self.k.len() + self.v.len()) as u64
    }
}

/// Which weights a call tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerWeights {
    /// Means over the heads, `[batch, queries, keys]`: summed in f64, head by head, and rounded once.
    Averaged,
    /// `[batch, heads, queries, keys]`.
    PerHead,
}

/// How to call a layer. The default: no mask, no weights.
#[derive(Clone, Debug, Default)]
pub struct LayerCall {
    /// As for attention without a layer; a scale here wins over the layer's. Keys of masks are those of the input.
    pub options: AttendOptions,
    /// Rotary position of the first query.
    pub position: usize,
    /// Which weights are wanted. They cost a second pass over the scores.
    pub weights: Option<LayerWeights>,
}

/// What a layer answers.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerAnswer {
    /// `[batch, queries, output width]`.
    pub output: Vec<f32>,
    /// As [`LayerWeights`] says; the last dimension has the keys of the input, then the learnt key, then the zero key, of those that
    /// the layer has. Empty if none were wanted.
    pub weights: Vec<f32>,
    /// The call to the cluster: heads before the gate and the last projection. Its keys begin with the learnt one, if there is one,
    /// and its sinks are the zero key.
    pub attended: Attended,
}

impl Layer {
    /// Projects what keys and values are made of. `position` is the rotary one of the first key.
    ///
    /// # Errors
    /// [`LayerError::Rows`] for rows of another width than the layer's or of another number than each other's,
    /// [`LayerError::Together`] for other rows of values than of keys where these are one ([`Layer::latent`]),
    /// [`LayerError::Rope`] past the end of tables, [`LayerError::RowMemory`].
    pub async fn project(
        &self,
        key: &Rows,
        value: &Rows,
        position: usize,
    ) -> Result<ProjectedKv, LayerError> {
        let (layer, key, value) = (Arc::clone(&self.inner), key.clone(), value.clone());
        off_the_runtime(move || layer.keys_and_values(&key, &value, position)).await
    }

    /// Attends with the queries of some rows to projected keys and values.
    ///
    /// # Errors
    /// As [`Self::project`] for the rows of queries, [`LayerError::Together`] for options that exclude each other or parts of the
    /// layer, and [`LayerError::Call`]: see [`Client::attend`].
    pub async fn attend(
        &self,
        client: &Client,
        query: &Rows,
        kv: &ProjectedKv,
        call: &LayerCall,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<LayerAnswer, LayerError> {
        let options = self.inner.options(call)?;
        let (layer, rows, to, position) = (Arc::clone(&self.inner), query.clone(), kv.clone(), call.position);
        let (operands, gate) = off_the_runtime(move || layer.operands(&rows, &to, position)).await?;
        self.answer(client, (operands, gate), &options, call.weights, progress).await
    }

    /// Attends with the queries of some rows to keys and values of others, which are projected at `place` for this call alone; keys are
    /// counted from position 0. The result has the same bits at either place.
    ///
    /// # Errors
    /// As [`Self::project`] and [`Self::attend`]; [`LayerError::Together`] where workers can't project.
    pub async fn call(
        &self,
        client: &Client,
        [query, key, value]: [&Rows; 3],
        call: &LayerCall,
        place: Place,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<LayerAnswer, LayerError> {
        if place == Place::Client {
            let kv = self.project(key, value, 0).await?;
            return self.attend(client, query, &kv, call, progress).await;
        }
        let layer = Arc::clone(&self.inner);
        layer.check_kv(key, value)?;
        let options = layer.options(call)?;
        if let Some(obstacle) = layer.obstacle(&options) {
            return Err(obstacle.refused());
        }
        let options = AttendOptions { source: Some(layer.source(key, value)), ..options };
        let shape = layer.shape(query, key.batch(), key.tokens())?;
        let rows = query.clone();
        let (q, gate) = off_the_runtime(move || layer.queries(&rows, None)).await?;
        let operands = Operands { shape, dtype: Dtype::F32, q, k: Bytes::new(), v: Bytes::new() };
        self.answer(client, (operands, gate), &options, call.weights, progress).await
    }

    /// Has the cluster attend, and makes rows of its contexts again.
    async fn answer(
        &self,
        client: &Client,
        (operands, gate): (Operands, Option<Vec<f32>>),
        options: &AttendOptions,
        wanted: Option<LayerWeights>,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<LayerAnswer, LayerError> {
        let attended = client.attend(&operands, options, progress).await?;
        let layer = Arc::clone(&self.inner);
        let weights_at = options.outputs.stages.iter().position(|stage| *stage == Stage::Weights);
        off_the_runtime(move || {
            let output = layer.output(&operands.shape, &attended.context, gate)?;
            let elements = weights_at.and_then(|at| attended.inspected.elements.get(at));
            let weights = match (wanted, elements) {
                (Some(wanted), Some(elements)) => {
                    layer.weights(&operands.shape, elements, &attended.lse, wanted)?
                }
                _ => Vec::new(),
            };
            Ok(LayerAnswer { output, weights, attended })
        })
        .await
    }
}

impl Inner {
    /// Rows through a matrix, on all cores.
    fn apply(&self, linear: &Linear, rows: &[f32], what: &'static str) -> Result<Vec<f32>, LayerError> {
        let elements = (rows.len() / linear.inputs()).saturating_mul(linear.outputs());
        let mut out = zeros(elements).ok_or(LayerError::RowMemory { what, elements })?;
        linear.apply(self.kernels, rows, &mut out);
        Ok(out)
    }

    /// The options of the call to the cluster.
    pub(super) fn options(&self, call: &LayerCall) -> Result<AttendOptions, LayerError> {
        let mut options = call.options.clone();
        if options.source.is_some() {
            let why = Some("it makes rows of keys and values its own way");
            return Err(LayerError::Together { one: "a layer", other: "source", why });
        }
        let defined = self.latent.as_ref().and_then(|latent| latent.default_scale(&options.score));
        options.scale = options.scale.or(self.scale).or(defined);
        if self.latent.is_some() && !["scaled_dot", "dot"].contains(&options.score.function().name) {
            let why = Some("only products of queries and keys can be absorbed");
            return Err(LayerError::Together { one: "latent attention", other: "score", why });
        }
        if self.add_zero_attn {
            // Its score is 0 in every row, and its value adds nothing: it joins the sum of exponentials and no more.
            if options.sinks.is_some() {
                let why = Some("the zero key is one");
                return Err(LayerError::Together { one: "add_zero_attn", other: "sinks", why });
            }
            if !is_zero_of_zeros(&options.score) {
                let why = Some("its score with a key of zeros isn't 0");
                return Err(LayerError::Together { one: "add_zero_attn", other: "score", why });
            }
            options.sinks = Some(vec![0.0; self.dims.heads].into());
        }
        if self.learnt.is_some() {
            if options.outputs != OutputsParts::default() {
                let why = Some("weights are told in the order of the input, other outputs aren't");
                return Err(LayerError::Together { one: "a learnt key", other: "outputs", why });
            }
            // These say something of each key by its place, and the learnt one has none among them.
            let by_place = [
                ("bias.alibi", options.alibi.is_some()),
                ("bias.relative", options.relative.is_some()),
                ("bias.swin", options.swin.is_some()),
                ("mask.csr", options.csr.is_some()),
                ("score.previous", options.previous.is_some()),
                ("score", knows_places(&options.score)),
            ];
            if let Some((other, _)) = by_place.into_iter().find(|(_, is_there)| *is_there) {
                let why = Some("it says nothing of the learnt key, which has no place");
                return Err(LayerError::Together { one: "a learnt key", other, why });
            }
            for dense in [&mut options.dense_mask, &mut options.dense_bias].into_iter().flatten() {
                *dense = with_learnt_column(dense)?;
            }
            let mask = std::mem::take(&mut options.mask);
            let mask = operator::with_causal(options.causal, mask).map_err(ClientError::from)?;
            options.mask = behind_learnt_key(mask)?;
            options.causal = Causal::None;
        }
        if call.weights.is_some() {
            if options.outputs.heads.is_some() {
                let why = Some("weights are those of all heads");
                return Err(LayerError::Together { one: "weights", other: "outputs.heads", why });
            }
            if !options.outputs.stages.contains(&Stage::Weights) {
                options.outputs.stages.push(Stage::Weights);
            }
        }
        Ok(options)
    }

    pub(super) fn check_kv(&self, key: &Rows, value: &Rows) -> Result<(), LayerError> {
        if self.latent.is_some() && !value.are(key) && !same_bits(value.values(), key.values()) {
            let why = Some("its values are parts of its keys");
            return Err(LayerError::Together { one: "latent attention", other: "rows of values", why });
        }
        expect("width of keys", key.width(), self.key.inputs())?;
        expect("width of values", value.width(), self.value.inputs())?;
        expect("batch of values", value.batch(), key.batch())?;
        expect("number of values", value.tokens(), key.tokens())
    }

    /// What workers make keys and values of. Rows that are clones of each other travel once.
    pub(super) fn source(&self, key: &Rows, value: &Rows) -> KvSource {
        let (key_matrices, value_matrices) = (&self.key_matrices, &self.value_matrices);
        let ((key_dtype, rows), (value_dtype, value_rows)) = (key.sent(), value.sent());
        let projected = |dtype, rows: &Rows, matrices: &HeadMatrices| Projected {
            dtype,
            width: rows.width(),
            has_bias: matrices.has_bias,
        };
        let same_rows = key.are(value);
        KvSource {
            projection: Projection {
                key: projected(key_dtype, key, key_matrices),
                value: projected(value_dtype, value, value_matrices),
                same_rows,
            },
            key_matrices: key_matrices.bytes.clone(),
            value_matrices: value_matrices.bytes.clone(),
            rows,
            value_rows: if same_rows { Bytes::new() } else { value_rows },
        }
    }

    pub(super) fn keys_and_values(
        &self,
        key: &Rows,
        value: &Rows,
        position: usize,
    ) -> Result<ProjectedKv, LayerError> {
        self.check_kv(key, value)?;
        let LayerDims { kv_heads, head_dim, value_dim, .. } = self.dims;
        let (batch, tokens) = (key.batch(), key.tokens());
        let learnt = self.learnt.as_ref();
        let turns = self.rope.as_ref().map(|rope| rope.turns(head_dim, position, tokens)).transpose()?;
        let mut k = self.apply(&self.key, key.values(), "keys")?;
        if let Some(latent) = &self.latent {
            latent.normalise(&mut k);
        }
        let k =
            into_heads(&k, [batch, tokens, kv_heads, head_dim], learnt.map(|l| &l.key[..]), turns.as_ref())?;
        let v = if self.latent.is_some() {
            Vec::new()
        } else {
            let v = self.apply(&self.value, value.values(), "values")?;
            into_heads(&v, [batch, tokens, kv_heads, value_dim], learnt.map(|l| &l.value[..]), None)?
        };
        Ok(ProjectedKv {
            dims: self.dims,
            batch,
            keys: tokens + usize::from(learnt.is_some()),
            has_learnt: learnt.is_some(),
            k: floats::into_bytes(k),
            v: floats::into_bytes(v),
        })
    }

    /// The operands of the call to the cluster, and what the gate makes of the rows.
    pub(super) fn operands(
        &self,
        query: &Rows,
        kv: &ProjectedKv,
        position: usize,
    ) -> Result<(Operands, Option<Vec<f32>>), LayerError> {
        let LayerDims { kv_heads, head_dim, value_dim, .. } = self.dims;
        let shape = self.shape(query, kv.batch, kv.keys)?;
        expect("kv heads of projected keys", kv.dims.kv_heads, kv_heads)?;
        expect("dimension of projected keys", kv.dims.head_dim, head_dim)?;
        expect("dimension of projected values", kv.dims.value_dim, value_dim)?;
        expect("learnt keys among the projected ones", kv.has_learnt.into(), self.learnt.is_some().into())?;
        let turns =
            self.rope.as_ref().map(|rope| rope.turns(head_dim, position, query.tokens())).transpose()?;
        let (q, gate) = self.queries(query, turns.as_ref())?;
        let (k, v) = (kv.k.clone(), kv.v.clone());
        Ok((Operands { shape, dtype: Dtype::F32, q, k, v }, gate))
    }

    /// The shape of a call with these rows of queries to so many keys of each batch element.
    pub(super) fn shape(&self, query: &Rows, batch: usize, keys: usize) -> Result<AttnShape, LayerError> {
        expect("width of queries", query.width(), self.query.inputs())?;
        expect("batch of keys", batch, query.batch())?;
        let LayerDims { heads, kv_heads, head_dim, value_dim } = self.dims;
        let dims = [batch, heads, kv_heads, query.tokens(), keys, head_dim, value_dim].map(|n| n as u64);
        let [batch, heads, kv_heads, queries, keys, head_dim, value_dim] = dims;
        let shape = AttnShape::new(Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim });
        let shape = shape
            .and_then(|shape| if self.latent.is_some() { shape.with_values_from_keys() } else { Ok(shape) });
        Ok(shape.map_err(|error| ClientError::from(Error::from(error)))?)
    }

    /// Projected queries as heads, and what the gate makes of the rows.
    fn queries(&self, query: &Rows, turns: Option<&Turns>) -> Result<(Bytes, Option<Vec<f32>>), LayerError> {
        let LayerDims { heads, head_dim, .. } = self.dims;
        let q = self.apply(&self.query, query.values(), "queries")?;
        let q = match &self.latent {
            Some(latent) => latent.absorb(self.kernels, q)?,
            None => q,
        };
        let q = into_heads(&q, [query.batch(), query.tokens(), heads, head_dim], None, turns)?;
        let gate = self.gate.as_ref().map(|gate| self.apply(gate, query.values(), "gates")).transpose()?;
        Ok((floats::into_bytes(q), gate))
    }

    /// The layer's result of the heads' contexts.
    pub(super) fn output(
        &self,
        shape: &AttnShape,
        context: &[f32],
        gate: Option<Vec<f32>>,
    ) -> Result<Vec<f32>, LayerError> {
        let mut rows = match &self.latent {
            Some(latent) => latent.expand(self.kernels, context, shape)?,
            None => into_rows(context, shape)?,
        };
        for (element, gate) in rows.iter_mut().zip(gate.iter().flatten()) {
            *element *= (1.0 / (1.0 + (-f64::from(*gate)).exp())) as f32;
        }
        match &self.output {
            Some(output) => self.apply(output, &rows, "results"),
            None => Ok(rows),
        }
    }

    /// Weights in the order of the input's keys, of the elements `[batch, heads, queries, keys]` of a call.
    pub(super) fn weights(
        &self,
        shape: &AttnShape,
        elements: &[f32],
        lse: &[f32],
        wanted: LayerWeights,
    ) -> Result<Vec<f32>, LayerError> {
        let learnt = usize::from(self.learnt.is_some());
        let keys = shape.n_keys() + usize::from(self.add_zero_attn);
        let rows = elements.chunks_exact(shape.n_keys()).zip(lse);
        let of_row = |(row, lse): (&[f32], &f32), out: &mut [f32]| {
            let (first, rest) = row.split_at(learnt);
            // A score of 0 over the sum of all exponentials.
            let zero = self.add_zero_attn.then(|| (-f64::from(*lse)).exp() as f32);
            let ordered = rest.iter().chain(first).copied().chain(zero);
            out.iter_mut().zip(ordered).for_each(|(to, weight)| *to = weight);
        };
        let room = |rows: usize| {
            let elements = rows.saturating_mul(keys);
            zeros(elements).ok_or(LayerError::RowMemory { what: "weights", elements })
        };
        let (heads, queries) = (shape.n_heads(), shape.n_queries());
        match wanted {
            LayerWeights::PerHead => {
                let mut weights = room(shape.batch() * heads * queries)?;
                rows.zip(weights.chunks_exact_mut(keys)).for_each(|(row, out)| of_row(row, out));
                Ok(weights)
            }
            LayerWeights::Averaged => {
                let mut weights = room(shape.batch() * queries)?;
                let elements = queries.saturating_mul(keys);
                let sums = zeros(elements).ok_or(LayerError::RowMemory { what: "sums of weights", elements });
                let (mut row, mut sums): (Vec<f32>, Vec<f64>) = (room(1)?, sums?);
                for (at, from) in rows.enumerate() {
                    of_row(from, &mut row);
                    let (batch, head, token) = (at / queries / heads, at / queries % heads, at % queries);
                    let sums = &mut sums[token * keys..][..keys];
                    sums.iter_mut()
                        .zip(&row)
                        .for_each(|(sum, weight): (&mut f64, _)| *sum += f64::from(*weight));
                    if head + 1 == heads {
                        let out = &mut weights[(batch * queries + token) * keys..][..keys];
                        let means = sums.iter_mut().map(|sum| std::mem::take(sum) / heads as f64);
                        out.iter_mut().zip(means).for_each(|(to, mean)| *to = mean as f32);
                    }
                }
                Ok(weights)
            }
        }
    }
}

/// Whether a score depends on where a key stands.
fn knows_places(score: &Score) -> bool {
    let is_of_places = |symbol: &Symbol| matches!(symbol, Symbol::Positions | Symbol::Taps);
    let parameters = score.function().parameters.iter();
    parameters.flat_map(|parameter| parameter.shapes.iter().copied().flatten()).any(is_of_places)
}

/// Whether a score of any query and a key of zeros is 0.
fn is_zero_of_zeros(score: &Score) -> bool {
    ["scaled_dot", "dot", "general", "cosine"].contains(&score.function().name)
}

fn expect(what: &'static str, got: usize, expected: usize) -> Result<(), LayerError> {
    if got == expected { Ok(()) } else { Err(LayerError::Rows { what, got, expected }) }
}

/// Runs what takes a while and all cores where it holds up nothing else.
pub(super) async fn off_the_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LayerError> + Send + 'static,
) -> Result<T, LayerError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_cancelled) => Err(LayerError::Stopped),
        },
    }
}

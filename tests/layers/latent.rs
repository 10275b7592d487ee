//! Multi-head latent attention: the absorbed form that a cluster computes against the definition, which makes keys and values of each head.

use attnd_client::layer::{
    LatentParts, LatentWeights, Layer, LayerAnswer, LayerCall, LayerWeights, Matrix, Norm, Rope, RopeStyle,
    Rows,
};
use attnd_client::{AttendOptions, Mask, PerBatch, Positions};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::fixtures::Fixture;
use super::formula::{Affine, Number, Row, head_of, of_problem, turned};
use super::{Comparison, U, answer, assert_bits};
use crate::support::cluster::Cluster;

/// Heads, elements of a latent, and of a head's query and key without and with positions, and of its value.
#[derive(Clone, Copy, Debug)]
struct Dims {
    heads: usize,
    rank: usize,
    nope: usize,
    rope: usize,
    value: usize,
}

/// The layer as it is defined.
struct Definition<'a> {
    weights: &'a LatentWeights,
    dims: Dims,
    rope: Option<Rope>,
    /// Of the first query.
    position: usize,
    is_causal: bool,
}

impl Definition<'_> {
    /// All rows of queries, problem by problem; `kept` are the rows that keys and values are made of.
    fn rows(&self, query: &Rows, kept: &Rows) -> Vec<Row> {
        let Dims { heads, nope, rope, value, .. } = self.dims;
        let LatentWeights { query_down, query: to_query, .. } = self.weights;
        let scale = 1.0 / ((nope + rope) as f64).sqrt();
        let mut rows = Vec::new();
        for batch in 0..query.batch() {
            let kept: Vec<Vec<(Vec<Number>, Vec<Number>)>> =
                of_problem(kept, batch).enumerate().map(|(j, x)| self.heads_of_key(&x, j)).collect();
            for (token, x) in of_problem(query, batch).enumerate() {
                let compressed = match query_down {
                    Some((down, norm)) => normalised(norm, &affine(down).of(&x)),
                    None => x,
                };
                let q = affine(to_query).of(&compressed);
                let (mut weights, mut contexts, mut score) = (Vec::new(), Vec::new(), 0.0);
                for head in 0..heads {
                    let (own, turning) = q[head * (nope + rope)..][..nope + rope].split_at(nope);
                    let q = [own, &self.turned(turning, self.position + token)].concat();
                    let candidates: Vec<_> = kept
                        .iter()
                        .enumerate()
                        .map(|(j, of_heads)| {
                            let (key, value) = &of_heads[head];
                            let is_seen = !self.is_causal || j <= self.position + token;
                            (is_seen.then(|| key.clone()), value.clone())
                        })
                        .collect();
                    let (of_head, context) = head_of(&q, &candidates, scale, &mut score);
                    weights.push(of_head);
                    contexts.extend(context);
                }
                assert_eq!(contexts.len(), heads * value);
                let output = affine(&self.weights.output).of(&contexts);
                rows.push(Row { queries: query.tokens(), output, weights, score });
            }
        }
        rows
    }

    /// A key and a value for each head.
    fn heads_of_key(&self, x: &[Number], position: usize) -> Vec<(Vec<Number>, Vec<Number>)> {
        let Dims { rank, nope, value, .. } = self.dims;
        let LatentWeights { latent, norm, up, .. } = self.weights;
        let down = affine(latent).of(x);
        let turning = self.turned(&down[rank..], position);
        let up = affine(up).of(&normalised(norm, &down[..rank]));
        let heads = up.chunks(nope + value);
        heads.map(|head| ([&head[..nope], &turning[..]].concat(), head[nope..].to_vec())).collect()
    }

    fn turned(&self, row: &[Number], position: usize) -> Vec<Number> {
        self.rope.as_ref().map_or_else(|| row.to_vec(), |rope| turned(rope, row, position))
    }
}

fn affine(matrix: &Matrix) -> Affine {
    Affine::new(matrix.weight.clone(), matrix.inputs, matrix.bias.clone())
}

/// The norm of a row. What its elements are off by changes the mean square too.
fn normalised(norm: &Norm, row: &[Number]) -> Vec<Number> {
    let n = row.len() as f64;
    let squares = row.iter().map(|x| x.value * x.value).sum::<f64>() + n * norm.eps;
    let factor = 1.0 / (squares / n).sqrt();
    let of_factor = row.iter().map(|x| x.value.abs() * x.magnitude).sum::<f64>() / squares;
    let element = |(x, weight): (&Number, &f32)| {
        let weight = f64::from(*weight) * factor;
        let magnitude = (x.magnitude + x.value.abs() * of_factor) * weight.abs();
        Number { value: x.value * weight, magnitude }
    };
    row.iter().zip(&norm.weight).map(element).collect()
}

/// Matrices whose results vary as much as what they are applied to, and norms around 1.
fn weights(rng: &mut SmallRng, dims: Dims, width: usize, query_rank: Option<usize>) -> LatentWeights {
    let Dims { heads, rank, nope, rope, value } = dims;
    let mut random = |n: usize, most: f32| -> Vec<f32> {
        (0..n).map(|_| rng.random_range(-1.0_f32..1.0) * most).collect()
    };
    let mut matrix = |outputs: usize, inputs: usize, has_bias: bool| {
        let weight = random(outputs * inputs, (3.0 / inputs as f32).sqrt());
        let bias = has_bias.then(|| random(outputs, 0.5));
        Matrix { name: format!("{outputs} of {inputs}"), outputs, inputs, weight, bias }
    };
    let down = query_rank.map(|query_rank| matrix(query_rank, width, true));
    let query = matrix(heads * (nope + rope), query_rank.unwrap_or(width), false);
    let latent = matrix(rank + rope, width, true);
    let up = matrix(heads * (nope + value), rank, false);
    let output = matrix(width, heads * value, true);
    let mut norm = |elements: usize| {
        let weight = random(elements, 0.5).iter().map(|x| 1.0 + x).collect();
        Norm { name: format!("norm of {elements}"), weight, eps: 1e-6 }
    };
    let query_down = down.map(|down| (down, norm(query_rank.unwrap_or_default())));
    LatentWeights { query_down, query, latent, norm: norm(rank), up, output }
}

fn rows(rng: &mut SmallRng, shape: [usize; 3]) -> Rows {
    let values = (0..shape.iter().product()).map(|_| rng.random_range(-1.7..1.7)).collect();
    Rows::new(values, shape).unwrap_or_else(|error| panic!("{error}"))
}

/// A call whose first query stands at `position`.
fn call(position: usize, is_causal: bool) -> LayerCall {
    let offset = i64::try_from(position).map(|offset| Positions::Offset(PerBatch::Same(offset))).ok();
    let mask = Mask { causal: is_causal, positions: offset.filter(|_| is_causal), ..Mask::default() };
    let options = AttendOptions { mask, ..AttendOptions::default() };
    LayerCall { options, position, weights: Some(LayerWeights::PerHead) }
}

/// The largest difference of an output from the definition, in roundings of the largest element of its row.
fn roundings(rows: &[Row], output: &[f32]) -> f64 {
    let mut worst = 0.0_f64;
    for (row, got) in rows.iter().zip(output.chunks(rows[0].output.len())) {
        let largest = row.output.iter().map(|want| want.value.abs()).fold(0.0, f64::max);
        for (got, want) in got.iter().zip(&row.output) {
            let error = (f64::from(*got) - want.value).abs() / (U * largest);
            worst = if error <= worst { worst } else { error };
        }
    }
    worst
}

const SMALL: Dims = Dims { heads: 3, rank: 10, nope: 6, rope: 4, value: 5 };
/// Those of DeepSeek-V2 and V3, but for the number of heads.
const FULL: Dims = Dims { heads: 3, rank: 512, nope: 128, rope: 64, value: 128 };

/// What outputs of matrices that keep the size of what they are applied to may be off by, in roundings of the largest of their row. Sums of
/// magnitudes, which the bound of all layers has, grow by a factor of some 10 with each of the matrices in a row, and so do no errors
/// unless they conspire.
const ROUNDINGS: f64 = 64.0;

/// Both sizes, queries compressed and not, with both styles of positions and none, causal and not: within the bound of
/// all layers, within a few roundings, and with the same bits on one, two and three workers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_absorbed_form_is_the_definition() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let (mut comparison, mut worst, mut shared) = (Comparison::default(), 0.0_f64, 0);
    let (half, pairs) = (Some(RopeStyle::HalfSplit), Some(RopeStyle::Interleaved));
    let cases = [
        (SMALL, 11, None, None, false, [2, 3, 40]),
        (SMALL, 11, None, pairs, true, [2, 5, 9]),
        (SMALL, 11, Some(7), half, true, [1, 4, 700]),
        (SMALL, 11, Some(7), pairs, false, [2, 1, 300]),
        (Dims { rope: 0, heads: 1, ..SMALL }, 8, Some(5), None, true, [2, 4, 30]),
        (FULL, 48, Some(40), pairs, true, [1, 4, 600]),
        (FULL, 48, None, None, false, [1, 2, 270]),
    ];
    for (seed, (dims, width, query_rank, style, is_causal, [batch, queries, keys])) in
        cases.into_iter().enumerate()
    {
        let mut rng = SmallRng::seed_from_u64(seed as u64);
        let weights = weights(&mut rng, dims, width, query_rank);
        let rope = style.map(|style| Rope::new(style, 10_000.0));
        let parts = LatentParts {
            weights: weights.clone(),
            heads: dims.heads,
            scale: None,
            rope: rope.clone(),
            add_zero_attn: false,
        };
        let layer = Layer::latent(parts).unwrap_or_else(|error| panic!("{error}"));
        let (x, kept) = (rows(&mut rng, [batch, queries, width]), rows(&mut rng, [batch, keys, width]));
        let what = format!("case {seed}, {dims:?}");
        // The last query is the last key but one.
        let position = keys - queries - 1;
        let call = call(position, is_causal);
        let inputs = [x.clone(), kept.clone(), kept.clone()];
        let one = answer(&client, &layer, &inputs, &call, 1).await;
        for workers in [2, 3] {
            let more = answer(&client, &layer, &inputs, &call, workers).await;
            assert_bits(&one, &more, &format!("{what}, {workers} workers"));
            shared += usize::from(more.attended.plan.shares.len() == workers);
        }
        let definition = Definition { weights: &weights, dims, rope, position, is_causal };
        let wanted = definition.rows(&x, &kept);
        comparison.answer(&wanted, &one.output, &one.weights, true, &what);
        let apart = roundings(&wanted, &one.output);
        println!("{what}: {apart:.1} roundings");
        worst = worst.max(apart);

        // One latent for all heads is all that is kept.
        let kv = layer.project(&kept, &kept, 0).await.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(kv.bytes(), (batch * keys * (dims.rank + dims.rope) * 4) as u64, "{what}");
        assert_kept_again(&client, &layer, &x, &kept, &one, position, is_causal).await;
    }
    comparison.assert_within();
    println!(
        "{} numbers within {:.4} of the bound, outputs within {worst:.1} roundings of the largest of a row",
        comparison.numbers.len(),
        comparison.worst
    );
    assert!(worst <= ROUNDINGS && worst > 0.0, "{worst} roundings");
    assert!(shared >= 8, "{shared} calls had shares for all their workers");
}

/// The last query alone, over what was kept of the keys, has the bits that it had among others.
async fn assert_kept_again(
    client: &attnd_client::Client,
    layer: &Layer,
    x: &Rows,
    kept: &Rows,
    whole: &LayerAnswer,
    position: usize,
    is_causal: bool,
) {
    let kv = layer.project(kept, kept, 0).await.unwrap_or_else(|error| panic!("{error}"));
    let (batch, queries, width) = (x.batch(), x.tokens(), x.width());
    let of_problem = x.values().chunks(queries * width);
    let last: Vec<f32> = of_problem.flat_map(|rows| rows[(queries - 1) * width..].to_vec()).collect();
    let last = Rows::new(last, [batch, 1, width]).unwrap_or_else(|error| panic!("{error}"));
    let call = LayerCall { weights: None, ..call(position + queries - 1, is_causal) };
    let answer = layer.attend(client, &last, &kv, &call, &mut |_| {}).await;
    let answer = answer.unwrap_or_else(|error| panic!("{error}"));
    let width = layer.output_width();
    let before = whole.output.chunks(queries * width).flat_map(|rows| &rows[(queries - 1) * width..]);
    assert!(answer.output.iter().zip(before).all(|(a, b)| a.to_bits() == b.to_bits()), "at {position}");
}

/// What would be another layer is out of what the real one is held to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_scale_norm_or_position_is_out_of_the_bounds() {
    let cluster = Cluster::start(1).await;
    let client = cluster.client();
    for (dims, width) in [(SMALL, 11), (FULL, 48)] {
        let mut rng = SmallRng::seed_from_u64(77);
        let weights = weights(&mut rng, dims, width, Some(9));
        let rope = Rope::new(RopeStyle::Interleaved, 10_000.0);
        let (x, kept) = (rows(&mut rng, [1, 2, width]), rows(&mut rng, [1, 30, width]));
        let definition =
            Definition { weights: &weights, dims, rope: Some(rope.clone()), position: 20, is_causal: true };
        let wanted = definition.rows(&x, &kept);
        let parts = LatentParts {
            weights: weights.clone(),
            heads: dims.heads,
            scale: None,
            rope: Some(rope.clone()),
            add_zero_attn: false,
        };
        let inputs = [x.clone(), kept.clone(), kept.clone()];
        let off = async |change: &dyn Fn(&mut LatentParts), position: usize| {
            let mut parts = parts.clone();
            change(&mut parts);
            let layer = Layer::latent(parts).unwrap_or_else(|error| panic!("{error}"));
            let call = LayerCall { position, ..call(20, true) };
            roundings(&wanted, &answer(&client, &layer, &inputs, &call, 1).await.output)
        };
        assert!(off(&|_| (), 20).await <= ROUNDINGS, "{dims:?}");
        let of_keys = 1.0 / ((dims.rank + dims.rope) as f32).sqrt();
        let wrong: [&dyn Fn(&mut LatentParts); 5] = [
            &|parts| parts.scale = Some(of_keys),
            &|parts| parts.rope = None,
            &|parts| parts.rope = Some(Rope::new(RopeStyle::HalfSplit, 10_000.0)),
            &|parts| parts.weights.norm.eps = 1e-2,
            &|parts| parts.weights.up.weight.rotate_left(dims.rank),
        ];
        for (at, change) in wrong.into_iter().enumerate() {
            let off = off(change, 20).await;
            assert!(off > 2.0 * ROUNDINGS, "{dims:?}, wrong in {at}: {off} roundings");
        }
        let off = off(&|_| (), 21).await;
        assert!(off > 2.0 * ROUNDINGS, "{dims:?}, a position further: {off} roundings");
    }
}

/// DeepSeek-V2's and V3's layers as transformers computed them, with a cache and without, from their state dicts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transformers_layers_are_reproduced_from_their_state_dicts() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    let (mut ours, mut theirs, mut shared) = (Comparison::default(), Comparison::default(), 0);
    let fixtures = Fixture::all("latent_layers");
    let n_cases = fixtures.len();
    for fixture in fixtures {
        let what = format!("latent case {}", fixture.name);
        let names = fixture.state.iter().map(|(name, _)| name.as_str());
        assert!(LatentWeights::are_named(names), "{what}");
        let weights = LatentWeights::from_state(fixture.state.clone(), fixture.heads, 1e-6);
        let weights = weights.unwrap_or_else(|error| panic!("{what}: {error}"));
        let parts = LatentParts {
            weights: weights.clone(),
            heads: fixture.heads,
            scale: None,
            rope: fixture.rope.clone(),
            add_zero_attn: false,
        };
        let layer = Layer::latent(parts).unwrap_or_else(|error| panic!("{what}: {error}"));
        let call = call(fixture.position, fixture.causal);
        let one = answer(&client, &layer, &fixture.rows, &call, 1).await;
        let three = answer(&client, &layer, &fixture.rows, &call, 3).await;
        assert_bits(&one, &three, &what);
        shared += usize::from(three.attended.plan.shares.len() == 3);

        // As the state dict says; the script chose no two of them alike.
        let size = |name: &str| fixture.tensor(name).unwrap_or_else(|| panic!("{what}: {name}")).shape[0];
        let (heads, rank) = (fixture.heads, size("kv_a_layernorm.weight"));
        let rope = size("kv_a_proj_with_mqa.weight") - rank;
        let queries = if weights.query_down.is_some() { "q_b_proj.weight" } else { "q_proj.weight" };
        let nope = size(queries) / heads - rope;
        let value = size("kv_b_proj.weight") / heads - nope;
        let dims = Dims { heads, rank, nope, rope, value };
        let definition = Definition {
            weights: &weights,
            dims,
            rope: fixture.rope.clone(),
            position: fixture.position,
            is_causal: fixture.causal,
        };
        let rows = definition.rows(&fixture.rows[0], &fixture.rows[1]);
        ours.answer(&rows, &one.output, &one.weights, true, &what);
        theirs.answer(&rows, &fixture.output, &fixture.weights, true, &format!("{what}, theirs"));
    }
    ours.assert_within();
    theirs.assert_within();
    println!(
        "{n_cases} cases, {} numbers: ours within {:.4} of the bound, theirs within {:.4}, {:.1e} of the magnitude apart",
        ours.numbers.len(),
        ours.worst,
        theirs.worst,
        ours.apart(&theirs)
    );
    assert!(
        ours.numbers.len() > 5000 && shared >= 1,
        "{} numbers, {shared} on three workers",
        ours.numbers.len()
    );
}

//! Parts of a layer against their formulas in f64.

use attnd_kernel::{Causal, Csr, Dims, Dtype, Mask, PerBatch, Relative, Score};
use attnd_plan::Element;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::operands::{Alibi, AttendOptions};
use crate::side::DenseTensor;

const U: f64 = 1.0 / (1_u64 << 24) as f64;

fn random(rng: &mut SmallRng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.5..1.5)).collect()
}

fn matrix(rng: &mut SmallRng, [outputs, inputs]: [usize; 2], has_bias: bool) -> Matrix {
    let name = format!("{outputs}x{inputs}");
    let bias = has_bias.then(|| random(rng, outputs));
    Matrix { name, outputs, inputs, weight: random(rng, outputs * inputs), bias }
}

/// A layer of 4 heads over 2, 6 wide for keys and 5 for values.
fn parts(rng: &mut SmallRng) -> LayerParts {
    let weights = Weights {
        query: matrix(rng, [24, 7], true),
        key: matrix(rng, [12, 8], false),
        value: matrix(rng, [10, 9], true),
        output: Some(matrix(rng, [11, 20], true)),
        gate: Some(matrix(rng, [20, 7], true)),
        learnt: None,
    };
    LayerParts { weights, heads: 4, kv_heads: 2, scale: None, rope: None, add_zero_attn: false }
}

/// An output of a matrix, and the sum of the magnitudes that made it.
fn project(matrix: &Matrix, row: &[f32], output: usize) -> (f64, f64) {
    let bias = matrix.bias.as_ref().map_or(0.0, |bias| f64::from(bias[output]));
    let weights = &matrix.weight[output * matrix.inputs..][..matrix.inputs];
    let products = || row.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w));
    (products().sum::<f64>() + bias, products().map(f64::abs).sum::<f64>() + bias.abs())
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    attnd_wire::floats::from_bytes(bytes).into_iter().map(f64::from).collect()
}

#[test]
fn heads_are_parts_of_projected_rows_and_turn_with_their_positions() {
    for (style, first, dims) in [
        (RopeStyle::HalfSplit, 0, None),
        (RopeStyle::Interleaved, 0, None),
        (RopeStyle::HalfSplit, 0, Some(4)),
        (RopeStyle::Interleaved, 2, Some(4)),
    ] {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut parts = parts(&mut rng);
        parts.rope = Some(Rope { first, dims, ..Rope::new(style, 100.0) });
        let layer = Layer::new(parts.clone()).unwrap();
        let (batch, tokens, queries, position) = (2, 5, 3, 1000);
        let key = Rows::new(random(&mut rng, batch * tokens * 8), [batch, tokens, 8]).unwrap();
        let value = Rows::new(random(&mut rng, batch * tokens * 9), [batch, tokens, 9]).unwrap();
        let query = Rows::new(random(&mut rng, batch * queries * 7), [batch, queries, 7]).unwrap();
        let kv = layer.inner.keys_and_values(&key, &value, position).unwrap();
        let (operands, gate) = layer.inner.operands(&query, &kv, position + 2).unwrap();
        assert_eq!(operands.shape.n_kv_heads(), 2);
        assert_eq!(gate.unwrap().len(), batch * queries * 20);

        // The element, and the one that it turns with.
        let rotary = dims.unwrap_or(6);
        let turned = |matrix: &Matrix, row: &[f32], head: usize, element: usize, position: usize| {
            let of = |element: usize| project(matrix, row, head * 6 + element);
            let (own, size) = of(element);
            let Some(at) = element.checked_sub(first).filter(|at| *at < rotary) else { return (own, size) };
            let (pair, other, sign) = match style {
                RopeStyle::HalfSplit if at < rotary / 2 => (at, at + rotary / 2, -1.0),
                RopeStyle::HalfSplit => (at - rotary / 2, at - rotary / 2, 1.0),
                RopeStyle::Interleaved if at % 2 == 0 => (at / 2, at + 1, -1.0),
                RopeStyle::Interleaved => (at / 2, at - 1, 1.0),
            };
            let angle = position as f64 / 100.0_f64.powf(2.0 * pair as f64 / rotary as f64);
            let (other, other_size) = of(first + other);
            (own * angle.cos() + sign * other * angle.sin(), size + other_size)
        };
        let (q, k, v) = (floats(&operands.q), floats(&operands.k), floats(&operands.v));
        let mut largest: f64 = 0.0;
        let mut near = |got: f64, (want, size): (f64, f64)| {
            largest = largest.max((got - want).abs() / (U * size));
            // At most 9 fused steps, a bias, and 4 roundings of a turn, counting those of the tables.
            assert!((got - want).abs() <= 14.0 * U * size, "{style:?} {first} {dims:?}: {got}, {want}");
        };
        for b in 0..batch {
            for token in 0..tokens {
                let row = |rows: &Rows| {
                    let width = rows.width();
                    rows.values()[(b * rows.tokens() + token) * width..][..width].to_vec()
                };
                for head in 0..2 {
                    let at = (b * 2 + head) * tokens + token;
                    for x in 0..6 {
                        let want = turned(&parts.weights.key, &row(&key), head, x, position + token);
                        near(k[at * 6 + x], want);
                    }
                    for x in 0..5 {
                        near(v[at * 5 + x], project(&parts.weights.value, &row(&value), head * 5 + x));
                    }
                }
                for head in (0..4).filter(|_| token < queries) {
                    for x in 0..6 {
                        let want = turned(&parts.weights.query, &row(&query), head, x, position + 2 + token);
                        near(q[((b * 4 + head) * queries + token) * 6 + x], want);
                    }
                }
            }
        }
        assert!(largest > 0.1, "{largest} roundings: nothing was compared");
    }
}

#[test]
fn tables_of_ones_and_zeros_turn_nothing_and_end_somewhere() {
    let mut rng = SmallRng::seed_from_u64(8);
    let plain = parts(&mut rng);
    let rope = Rope {
        angles: Angles::Table { cos: vec![1.0; 3 * 9].into(), sin: vec![0.0; 3 * 9].into() },
        ..Rope::new(RopeStyle::HalfSplit, 2.0)
    };
    let key = Rows::new(random(&mut rng, 5 * 8), [1, 5, 8]).unwrap();
    let value = Rows::new(random(&mut rng, 5 * 9), [1, 5, 9]).unwrap();
    let turning = Layer::new(LayerParts { rope: Some(rope), ..plain.clone() }).unwrap();
    let still = Layer::new(plain).unwrap();
    let [turned, still] =
        [&turning, &still].map(|layer| layer.inner.keys_and_values(&key, &value, 4).unwrap());
    assert_eq!(floats(&turned.k), floats(&still.k));
    let past = turning.inner.keys_and_values(&key, &value, 5).unwrap_err().to_string();
    assert_eq!(past, "rope: positions to 10, the tables have 9");
}

#[test]
fn contexts_are_gated_element_by_element_and_projected_row_by_row() {
    let mut rng = SmallRng::seed_from_u64(9);
    let parts = parts(&mut rng);
    let layer = Layer::new(parts.clone()).unwrap();
    let (batch, queries) = (2, 3);
    let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 3, keys: 1, head_dim: 6, value_dim: 5 };
    let shape = attnd_kernel::AttnShape::new(dims).unwrap();
    let context = random(&mut rng, batch * 4 * queries * 5);
    let gate = random(&mut rng, batch * queries * 20);
    let got = layer.inner.output(&shape, &context, Some(gate.clone())).unwrap();
    assert_eq!(got.len(), batch * queries * 11);
    let matrix = parts.weights.output.unwrap();
    for (at, got) in got.iter().enumerate() {
        let (row, output) = (at / 11, at % 11);
        let (b, token) = (row / queries, row % queries);
        let mut gated = (0.0, 0.0);
        for element in 0..20 {
            let context = f64::from(context[((b * 4 + element / 5) * queries + token) * 5 + element % 5]);
            let open = 1.0 / (1.0 + (-f64::from(gate[row * 20 + element])).exp());
            let product = context * open * f64::from(matrix.weight[output * 20 + element]);
            gated = (gated.0 + product, gated.1 + product.abs());
        }
        let bias = f64::from(matrix.bias.as_ref().unwrap()[output]);
        let error = (f64::from(*got) - gated.0 - bias).abs();
        assert!(error <= 24.0 * U * (gated.1 + bias.abs()), "{at}: {got}, {}", gated.0 + bias);
    }
}

#[test]
fn weights_come_in_the_order_of_the_input_then_the_learnt_and_the_zero_key() {
    let mut rng = SmallRng::seed_from_u64(10);
    let mut parts = parts(&mut rng);
    parts.weights.learnt = Some(Learnt { key: random(&mut rng, 12), value: random(&mut rng, 10) });
    parts.add_zero_attn = true;
    let layer = Layer::new(parts).unwrap();
    let dims = Dims { batch: 1, heads: 4, kv_heads: 2, queries: 2, keys: 3, head_dim: 6, value_dim: 5 };
    let shape = attnd_kernel::AttnShape::new(dims).unwrap();
    let elements: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let lse = vec![2.0_f32.ln(); 8];
    let each = layer.inner.weights(&shape, &elements, &lse, LayerWeights::PerHead).unwrap();
    assert_eq!(each[..8], [1.0, 2.0, 0.0, 0.5, 4.0, 5.0, 3.0, 0.5]);
    // Head h, token t, key k is 6h + 3t + k; the mean of 6h over four heads is 9.
    let mean = layer.inner.weights(&shape, &elements, &lse, LayerWeights::Averaged).unwrap();
    assert_eq!(mean, [10.0, 11.0, 9.0, 0.5, 13.0, 14.0, 12.0, 0.5]);
}

#[test]
fn a_learnt_key_stands_before_the_others_and_belongs_to_its_head() {
    let mut rng = SmallRng::seed_from_u64(11);
    let mut parts = parts(&mut rng);
    parts.weights.learnt = Some(Learnt { key: random(&mut rng, 12), value: random(&mut rng, 10) });
    let learnt = parts.weights.learnt.clone().unwrap();
    parts.rope = Some(Rope::new(RopeStyle::HalfSplit, 10.0));
    let layer = Layer::new(parts).unwrap();
    let key = Rows::new(random(&mut rng, 2 * 4 * 8), [2, 4, 8]).unwrap();
    let value = Rows::new(random(&mut rng, 2 * 4 * 9), [2, 4, 9]).unwrap();
    let kv = layer.inner.keys_and_values(&key, &value, 9).unwrap();
    assert_eq!((kv.tokens(), kv.keys), (4, 5));
    let (k, v) = (attnd_wire::floats::from_bytes(&kv.k), attnd_wire::floats::from_bytes(&kv.v));
    for (head, (k, v)) in k.chunks(5 * 6).zip(v.chunks(5 * 5)).enumerate() {
        assert_eq!(k[..6], learnt.key[head % 2 * 6..][..6]);
        assert_eq!(v[..5], learnt.value[head % 2 * 5..][..5]);
    }
}

#[test]
fn options_go_to_the_cluster_as_the_layer_needs_them() {
    let mut rng = SmallRng::seed_from_u64(12);
    let plain = parts(&mut rng);
    let layer = |change: &dyn Fn(&mut LayerParts)| {
        let mut parts = plain.clone();
        change(&mut parts);
        Layer::new(parts).unwrap()
    };
    let zero = layer(&|parts| parts.add_zero_attn = true);
    let options = zero.inner.options(&LayerCall::default()).unwrap();
    assert_eq!(options.sinks.as_deref(), Some(&[0.0; 4][..]));
    let own = AttendOptions { sinks: Some(vec![1.0; 4].into()), ..AttendOptions::default() };
    let text =
        zero.inner.options(&LayerCall { options: own, ..LayerCall::default() }).unwrap_err().to_string();
    assert_eq!(text, "add_zero_attn and sinks: the zero key is one");

    let score = |name: &str| Score::new(name, Vec::new()).unwrap();
    let own = AttendOptions { score: score("additive"), ..AttendOptions::default() };
    let text =
        zero.inner.options(&LayerCall { options: own, ..LayerCall::default() }).unwrap_err().to_string();
    assert_eq!(text, "add_zero_attn and score: its score with a key of zeros isn't 0");

    let scaled = layer(&|parts| parts.scale = Some(0.5));
    assert_eq!(scaled.inner.options(&LayerCall::default()).unwrap().scale, Some(0.5));

    let learnt = Learnt { key: vec![0.0; 12], value: vec![0.0; 10] };
    let learnt = layer(&|parts| parts.weights.learnt = Some(learnt.clone()));
    let dense = || DenseTensor { element: Element::Bool, shape: [1, 1, 1, 1], bytes: vec![1].into() };
    let relative = || Relative::new([0.5; 32].into(), 8, 20, false).ok();
    let csr = || Csr::new((1, 1), 1, [0, 1].into(), [0].into()).ok();
    for (options, other) in [
        (AttendOptions { alibi: Some(Alibi::default()), ..AttendOptions::default() }, "bias.alibi"),
        (AttendOptions { relative: relative(), ..AttendOptions::default() }, "bias.relative"),
        (AttendOptions { csr: csr(), ..AttendOptions::default() }, "mask.csr"),
        (AttendOptions { score: score("location"), ..AttendOptions::default() }, "score"),
        (AttendOptions { score: score("location_aware"), ..AttendOptions::default() }, "score"),
    ] {
        let error = learnt.inner.options(&LayerCall { options, ..LayerCall::default() }).unwrap_err();
        assert!(error.to_string().starts_with(&format!("a learnt key and {other}: ")), "{error}");
    }
    let cosine = AttendOptions { score: score("cosine"), ..AttendOptions::default() };
    assert!(learnt.inner.options(&LayerCall { options: cosine, ..LayerCall::default() }).is_ok());
    let mask = Mask { key_end: Some(PerBatch::Each([2, 4].into())), ..Mask::default() };
    let dense_mask = Some(dense());
    let options = AttendOptions { causal: Causal::TopLeft, mask, dense_mask, ..AttendOptions::default() };
    let call = LayerCall { options, weights: Some(LayerWeights::PerHead), ..LayerCall::default() };
    let options = learnt.inner.options(&call).unwrap();
    assert_eq!((options.causal, options.mask.causal), (Causal::None, true));
    assert_eq!(options.dense_mask.unwrap().shape, [1, 1, 1, 2], "a column for the learnt key");
    assert_eq!(options.mask.key_end, Some(PerBatch::Each([3, 5].into())));
    assert_eq!(options.outputs.stages, [attnd_kernel::Stage::Weights]);
}

#[test]
fn rows_and_matrices_that_do_not_fit_are_refused_with_numbers() {
    let mut rng = SmallRng::seed_from_u64(13);
    let plain = parts(&mut rng);
    let layer = Layer::new(plain.clone()).unwrap();
    let rows = |shape: [usize; 3]| Rows::new(vec![0.5; shape.iter().product()], shape).unwrap();
    let refused = |key: [usize; 3], value: [usize; 3]| {
        layer.inner.keys_and_values(&rows(key), &rows(value), 0).unwrap_err().to_string()
    };
    assert_eq!(refused([1, 3, 7], [1, 3, 9]), "width of keys 7, expected 8");
    assert_eq!(refused([2, 3, 8], [1, 3, 9]), "batch of values 1, expected 2");
    assert_eq!(refused([1, 3, 8], [1, 4, 9]), "number of values 4, expected 3");
    assert_eq!(
        Rows::new(vec![0.0; 5], [1, 2, 3]).unwrap_err().to_string(),
        "rows of shape [1, 2, 3] with 5 elements"
    );
    assert!(Rows::new(vec![], [1, 0, 3]).is_err());

    let error = |change: &dyn Fn(&mut LayerParts)| {
        let mut parts = plain.clone();
        change(&mut parts);
        Layer::new(parts).unwrap_err().to_string()
    };
    assert_eq!(error(&|parts| parts.kv_heads = 3), "4 heads over 3 kv heads");
    assert_eq!(
        error(&|parts| parts.heads = 8),
        "tensor 12x8 is [12, 8], expected 6 outputs: 2 kv heads of 3"
    );
    let rope = |rope: Rope| error(&move |parts| parts.rope = Some(rope.clone()));
    let half = Rope::new(RopeStyle::HalfSplit, 1e4);
    assert_eq!(rope(Rope { dims: Some(5), ..half.clone() }), "rope: 5 elements are no pairs");
    assert_eq!(
        rope(Rope { dims: Some(4), first: 4, ..half.clone() }),
        "rope: 4 elements from 4 on, rows of a head have 6"
    );
    assert!(rope(Rope::new(RopeStyle::HalfSplit, f64::NAN)).contains("base NaN"));
}

#[test]
fn what_travels_to_workers_is_cut_by_heads_and_each_thing_once() {
    let mut rng = SmallRng::seed_from_u64(14);
    let parts = parts(&mut rng);
    let layer = Layer::new(parts.clone()).unwrap();
    let key = Rows::new(random(&mut rng, 2 * 3 * 8), [2, 3, 8]).unwrap();
    let value = Rows::new(random(&mut rng, 2 * 3 * 9), [2, 3, 9]).unwrap();
    let source = layer.inner.source(&key, &value);
    assert_eq!((source.projection.key.has_bias, source.projection.value.has_bias), (false, true));
    assert_eq!((source.projection.key.width, source.projection.value.width), (8, 9));
    assert!(
        !source.projection.same_rows
            && source.rows.len() == 6 * 8 * 4
            && source.value_rows.len() == 6 * 9 * 4
    );
    assert_eq!(attnd_wire::floats::from_bytes(&source.key_matrices), parts.weights.key.weight);
    let (weight, bias) = (&parts.weights.value.weight, parts.weights.value.bias.as_ref().unwrap());
    let of_heads = [&weight[..45], &bias[..5], &weight[45..], &bias[5..]].concat();
    assert_eq!(attnd_wire::floats::from_bytes(&source.value_matrices), of_heads);

    // Rows of sixteen bits travel as they are, and clones of them once.
    let narrow: Vec<u8> = (0..6 * 8_u16).flat_map(|i| (0x3f80 + i).to_le_bytes()).collect();
    let narrow = Rows::of_bytes(narrow.clone().into(), Dtype::Bf16, [2, 3, 8]).unwrap();
    assert_eq!(narrow.values()[..2], [1.0, 1.0078125]);
    let (dtype, sent) = narrow.sent();
    assert_eq!((dtype, sent.len()), (Dtype::Bf16, 6 * 8 * 2));
    assert!(Rows::of_bytes(vec![0; 7].into(), Dtype::Bf16, [1, 1, 3]).is_err());
    let square = LayerParts {
        weights: Weights { value: matrix(&mut rng, [10, 8], true), ..parts.weights.clone() },
        ..parts
    };
    let source = Layer::new(square).unwrap().inner.source(&narrow, &narrow.clone());
    assert!(source.projection.same_rows && source.value_rows.is_empty());
    assert_eq!(source.projection.value.dtype, Dtype::Bf16);
}

#[test]
fn what_workers_can_not_make_is_named() {
    let mut rng = SmallRng::seed_from_u64(15);
    let plain = parts(&mut rng);
    let obstacle = |change: &dyn Fn(&mut LayerParts), options: &AttendOptions| {
        let mut parts = plain.clone();
        change(&mut parts);
        Layer::new(parts).unwrap().inner.obstacle(options).map(|obstacle| obstacle.what)
    };
    let none = AttendOptions::default();
    assert_eq!(obstacle(&|_| {}, &none), None);
    assert_eq!(obstacle(&|parts| parts.add_zero_attn = true, &none), None);
    assert_eq!(
        obstacle(&|parts| parts.rope = Some(Rope::new(RopeStyle::HalfSplit, 10.0)), &none),
        Some("rope")
    );
    let learnt = Learnt { key: vec![0.0; 12], value: vec![0.0; 10] };
    assert_eq!(obstacle(&|parts| parts.weights.learnt = Some(learnt.clone()), &none), Some("a learnt key"));
    let uniform = AttendOptions { empty_row: attnd_kernel::EmptyRow::Uniform, ..AttendOptions::default() };
    assert_eq!(obstacle(&|_| {}, &uniform), Some("empty_row=uniform"));
    let wide = |parts: &mut LayerParts| {
        let width = attnd_plan::MAX_WIDTH + 1;
        parts.weights.key =
            Matrix { inputs: width, weight: vec![0.0; 12 * width], ..parts.weights.key.clone() };
    };
    assert_eq!(obstacle(&wide, &none), Some("width"));
}

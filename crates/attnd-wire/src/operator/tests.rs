//! Every operator returns from its messages, and every way to be none has its text.

use attnd_kernel::Dtype;
use attnd_kernel::{
    Bias, Causal, Compute, Csr, Documents, Normaliser, Relative, Run, Score, Shift, Swin, Tensor,
};
use attnd_plan::{Element, SideLayout, SideTensor};
use proptest::prelude::*;

use super::*;
use crate::attend::tests::shapes;

/// Numbers for all of the batch or for each element; of a batch of one both are the same on the wire.
fn per_batch_of<T: Clone + std::fmt::Debug + 'static>(
    batch: usize,
    number: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = PerBatch<T>> {
    (any::<bool>(), proptest::collection::vec(number, batch)).prop_map(|(same, each)| match each.as_slice() {
        [first, ..] if same || each.len() == 1 => PerBatch::Same(first.clone()),
        _ => PerBatch::Each(each.into()),
    })
}

fn lengths(batch: usize, most: usize) -> impl Strategy<Value = Option<PerBatch<usize>>> {
    proptest::option::weighted(0.3, per_batch_of(batch, 0..=most))
}

/// Two documents in each element, cut anywhere.
fn documents(shape: &AttnShape) -> impl Strategy<Value = Documents> + use<> {
    let (queries, keys) = (shape.n_queries(), shape.n_keys());
    proptest::collection::vec((1..=queries, 1..=keys), shape.batch()).prop_map(move |cuts| {
        let runs = |cut: usize, end: usize| {
            let mut runs = vec![Run { end: cut, id: 7 }, Run { end, id: 3 }];
            runs.dedup_by_key(|run| run.end);
            runs
        };
        let of = |which: fn(&(usize, usize)) -> usize, end| -> Vec<Vec<Run>> {
            cuts.iter().map(|cut| runs(which(cut), end)).collect()
        };
        Documents::new(&of(|cut| cut.0, queries), &of(|cut| cut.1, keys)).unwrap()
    })
}

fn masks(shape: &AttnShape) -> impl Strategy<Value = Mask> + use<> {
    let (batch, queries, keys) = (shape.batch(), shape.n_queries(), shape.n_keys());
    let positions = prop_oneof![
        Just(None),
        Just(Some(Positions::TopLeft)),
        Just(Some(Positions::BottomRight)),
        per_batch_of(batch, -3000_i64..3000).prop_map(|offsets| Some(Positions::Offset(offsets))),
    ];
    let side = || proptest::option::weighted(0.3, 0..2000_usize);
    (
        (any::<bool>(), positions, side(), side(), proptest::option::weighted(0.2, 1..3000_usize)),
        (lengths(batch, keys), lengths(batch, keys), lengths(batch, keys), lengths(batch, queries)),
        proptest::option::weighted(0.2, documents(shape)),
    )
        .prop_map(
            |(
                (causal, positions, left, right, chunk),
                (prefix, key_begin, key_end, query_end),
                documents,
            )| {
                Mask {
                    causal,
                    positions,
                    window: Window { left, right },
                    chunk: chunk.and_then(NonZeroUsize::new),
                    prefix,
                    key_begin,
                    key_end,
                    query_end,
                    documents: documents.map(Arc::new),
                }
            },
        )
}

/// What scores meet, often nothing; of the rest of the parts nothing.
fn stages(shape: &AttnShape) -> impl Strategy<Value = OperatorParts> + use<> {
    let (heads, batch) = (shape.n_heads(), shape.batch());
    let slope = -1e30_f32..1e30;
    let slopes = prop_oneof![Just(heads), Just(heads * batch)]
        .prop_flat_map(move |n| proptest::collection::vec(slope.clone(), n));
    let alibi =
        (slopes, any::<bool>()).prop_map(|(slopes, by_key)| Bias::Alibi { slopes: slopes.into(), by_key });
    let softcap = proptest::option::weighted(0.3, 1e-3_f32..1e3);
    let biases = proptest::collection::vec(alibi, 0..=1);
    let sigmoid = (-100_f32..100.0).prop_map(|bias| Normaliser::Sigmoid { bias });
    let normaliser = prop_oneof![3 => Just(Normaliser::Softmax), 1 => sigmoid];
    (softcap, biases, normaliser).prop_map(|(softcap, biases, normaliser)| OperatorParts {
        softcap,
        biases,
        normaliser,
        ..OperatorParts::plain(1.0, Causal::None)
    })
}

/// A score function, mostly none of its own, with what it is given.
fn scores(shape: &AttnShape) -> impl Strategy<Value = Score> + use<> {
    let (d, kv_heads) = (shape.head_dim(), shape.n_kv_heads());
    let tensor = |name: &str, shape: &[usize]| {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        let values = proptest::collection::vec(-3.0_f32..3.0, shape.iter().product::<usize>());
        values.prop_map(move |values| Tensor {
            name: name.clone(),
            shape: shape.clone(),
            values: values.into(),
        })
    };
    let units = (tensor("v", &[3]), tensor("w_q", &[3, d]), tensor("w_k", &[kv_heads, 3, d]));
    let units = units.prop_map(|(v, w_q, w_k)| ("additive", vec![v, w_q, w_k]));
    let scalar = prop_oneof![Just(("dot", Vec::new())), Just(("cosine", Vec::new()))];
    let named = prop_oneof![2 => Just(("scaled_dot", Vec::new())), 1 => scalar, 1 => units];
    named.prop_map(|(name, parameters)| Score::new(name, parameters).unwrap())
}

/// A mask of blocks, often none.
fn blocks(shape: &AttnShape) -> impl Strategy<Value = Option<Csr>> + use<> {
    let (queries, keys) = (shape.n_queries(), shape.n_keys());
    let (least_queries, least_keys) = (queries.div_ceil(8), keys.div_ceil(8));
    let lists = (least_queries..=queries, least_keys..=keys, prop_oneof![Just(1), Just(shape.n_heads())])
        .prop_flat_map(move |(query_block, key_block, layouts)| {
            let (rows, columns) = (queries.div_ceil(query_block), keys.div_ceil(key_block));
            let listed = proptest::collection::vec(any::<bool>(), layouts * rows * columns);
            (Just((query_block, key_block)), Just(layouts), Just((rows, columns)), listed)
        });
    let csr = lists.prop_map(|(block, layouts, (rows, columns), listed)| {
        let (mut row_ptr, mut of_rows) = (Vec::new(), Vec::new());
        for layout in listed.chunks(rows * columns) {
            let begin = of_rows.len();
            row_ptr.push(0);
            for row in layout.chunks(columns) {
                of_rows.extend((0..).zip(row).filter(|(_, listed)| **listed).map(|(column, _)| column));
                row_ptr.push((of_rows.len() - begin) as u32);
            }
        }
        Csr::new(block, layouts, row_ptr.into(), of_rows.into()).unwrap()
    });
    proptest::option::weighted(0.2, csr)
}

/// A bias with a table, often none.
fn tables(shape: &AttnShape) -> impl Strategy<Value = Vec<Bias>> + use<> {
    let (heads, queries, keys, batch) = (shape.n_heads(), shape.n_queries(), shape.n_keys(), shape.batch());
    let entries = move |n: usize| proptest::collection::vec(-9.0_f32..9.0, n * heads);
    let relative =
        (4..40_usize, any::<bool>(), 40..1000_u32).prop_flat_map(move |(buckets, both, farthest)| {
            entries(buckets).prop_map(move |table| {
                vec![Bias::Relative(Relative::new(table.into(), buckets, farthest, both).unwrap())]
            })
        });
    let shift = proptest::option::of(proptest::collection::vec(0..4_u32, batch * keys));
    let swin = (entries((2 * keys - 1).min(4096)), shift).prop_map(move |(table, regions)| {
        let shift = regions.map(|regions| Shift { regions: regions.into(), between: -100.0 });
        vec![Bias::Swin(Swin { height: 1, width: keys, table: table.into(), shift })]
    });
    let fits = queries == keys && keys <= 2048;
    let some = prop_oneof![1 => relative, 1 => if fits { swin.boxed() } else { Just(Vec::new()).boxed() }];
    prop_oneof![4 => Just(Vec::new()), 1 => some]
}

/// Shapes and operators that make sense for them, every third of them as calls were before there were operators.
pub(crate) fn operators() -> impl Strategy<Value = (AttnShape, Arc<Operator>)> {
    let parts = |shape: AttnShape| {
        let causal = proptest::sample::select(&[Causal::None, Causal::BottomRight, Causal::TopLeft][..]);
        let mask = prop_oneof![1 => causal.prop_map(Mask::from), 2 => masks(&shape)];
        let logit = prop_oneof![9 => -50_f32..50.0, 1 => Just(f32::NEG_INFINITY)];
        let sinks = proptest::option::of(proptest::collection::vec(logit, shape.n_heads()));
        let empty_row = proptest::sample::select(&[EmptyRow::Zero, EmptyRow::Nan, EmptyRow::Uniform][..]);
        let scale = prop_oneof![1e-30_f32..1e30, -10_f32..10.0, Just(0.0)];
        let new = (scores(&shape), blocks(&shape), tables(&shape));
        (Just(shape), scale, mask, sinks, empty_row, stages(&shape), new, any::<bool>())
    };
    shapes().prop_flat_map(parts).prop_filter_map(
        "the parts make no sense together",
        |(shape, scale, mask, sinks, empty_row, stages, (score, csr, tables), old)| {
            let sinks = sinks.map(Arc::from);
            let parts = match mask.as_causal() {
                Some(causal) if old => OperatorParts::plain(scale, causal),
                _ => {
                    let biases = stages.biases.iter().cloned().chain(tables).collect();
                    OperatorParts { score, scale, mask, sinks, empty_row, csr, biases, ..stages }
                }
            };
            Some((shape, Arc::new(Operator::new(parts, &shape).ok()?)))
        },
    )
}

/// Two elements of two heads, 3 queries, 5 keys.
fn shape() -> AttnShape {
    let dims = attnd_kernel::Dims {
        batch: 2,
        heads: 2,
        kv_heads: 1,
        queries: 3,
        keys: 5,
        head_dim: 1,
        value_dim: 1,
    };
    AttnShape::new(dims).unwrap()
}

fn refused(causal: proto::Causal, operator: proto::Operator) -> String {
    let encoded = Encoded { scale: 1.0, causal: causal.into(), operator: Some(operator) };
    encoded.decode(&shape(), &Sides::default()).unwrap_err().message()
}

fn refused_mask(causal: proto::Causal, change: impl FnOnce(&mut proto::Mask)) -> String {
    let mut mask = proto::Mask::default();
    change(&mut mask);
    refused(causal, proto::Operator { mask: Some(mask), ..Default::default() })
}

#[test]
fn options_that_contradict_each_other_are_named() {
    use proto::{Causal, Positions};
    assert_eq!(refused_mask(Causal::Offset, |_| {}), "COMBINATION: causal=offset and no mask.offsets");
    assert_eq!(
        refused_mask(Causal::None, |m| m.set_positions(Positions::Offset)),
        "COMBINATION: mask.positions=offset and no mask.offsets"
    );
    assert_eq!(
        refused_mask(Causal::TopLeft, |m| m.offsets = vec![1]),
        "COMBINATION: mask.offsets and causal=top_left"
    );
    assert_eq!(
        refused_mask(Causal::None, |m| m.offsets = vec![1]),
        "COMBINATION: mask.offsets and no mask.positions"
    );
    assert_eq!(
        refused_mask(Causal::TopLeft, |m| m.set_positions(Positions::BottomRight)),
        "COMBINATION: causal=top_left and mask.positions=bottom_right"
    );
    assert_eq!(
        refused_mask(Causal::BottomRight, |m| (m.positions, m.offsets) = (3, vec![1])),
        "COMBINATION: causal=bottom_right and mask.positions=offset"
    );
    assert_eq!(
        refused_mask(Causal::None, |m| m.prefix = vec![2]),
        "COMBINATION: mask.prefix and causal=none"
    );
    assert_eq!(
        refused_mask(Causal::None, |m| m.window = Some(proto::Window { left: 1, right: -1 })),
        "COMBINATION: mask.window and no mask.positions: q_len 3, kv_len 5 can be aligned two ways"
    );
    assert_eq!(
        refused_mask(Causal::None, |m| m.chunk = 2),
        "COMBINATION: mask.chunk and no mask.positions: q_len 3, kv_len 5 can be aligned two ways"
    );
    assert_eq!(
        refused_mask(Causal::Aligned, |_| {}),
        "COMBINATION: causal and no mask.positions: q_len 3, kv_len 5 can be aligned two ways"
    );
    assert_eq!(
        refused_mask(Causal::None, |m| (m.key_begin, m.key_end) = (vec![4], vec![5, 3])),
        "COMBINATION: mask.key_begin[1] is 4, mask.key_end[1] is 3"
    );
    let one = || proto::Documents {
        queries: Some(proto::Runs { end: vec![3], id: vec![0], count: vec![1] }),
        keys: Some(proto::Runs { end: vec![5], id: vec![0], count: vec![1] }),
    };
    assert_eq!(
        refused_mask(Causal::TopLeft, |m| (m.chunk, m.documents) = (2, Some(one()))),
        "COMBINATION: mask.chunk and mask.documents"
    );
    assert_eq!(
        refused_mask(Causal::Offset, |m| (m.offsets, m.documents) = (vec![2], Some(one()))),
        "COMBINATION: mask.documents and mask.offsets"
    );
}

#[test]
fn what_does_not_fit_the_shape_is_named_with_numbers() {
    let none = proto::Causal::None;
    let operator = |change: fn(&mut proto::Operator)| {
        let mut operator = proto::Operator::default();
        change(&mut operator);
        refused(none, operator)
    };
    assert_eq!(operator(|o| o.empty_row = 9), "OPERATOR: empty_row 9");
    assert_eq!(operator(|o| o.empty_row = 3), "OPERATOR: empty_row 3");
    assert_eq!(operator(|o| o.sinks = vec![0.0; 3]), "OPERATOR: sinks has 3 logits, num_heads is 2");
    assert_eq!(operator(|o| o.sinks = vec![0.0, f32::NAN]), "OPERATOR: sinks[1] is NaN");
    assert_eq!(operator(|o| o.sinks = vec![f32::INFINITY, 0.0]), "OPERATOR: sinks[0] is inf");
    assert_eq!(refused_mask(none, |m| m.positions = 9), "OPERATOR: mask.positions 9");
    assert_eq!(
        refused_mask(none, |m| m.window = Some(proto::Window { left: -1, right: -2 })),
        "OPERATOR: mask.window.right is -2"
    );
    assert_eq!(
        refused_mask(none, |m| m.key_end = vec![1; 3]),
        "OPERATOR: mask.key_end has 3 entries, batch is 2"
    );
    assert_eq!(refused_mask(none, |m| m.key_end = vec![5, 6]), "OPERATOR: mask.key_end[1] is 6, kv_len is 5");
    assert_eq!(refused_mask(none, |m| m.query_end = vec![4]), "OPERATOR: mask.query_end[0] is 4, q_len is 3");
    assert_eq!(
        refused_mask(proto::Causal::Offset, |m| m.offsets = vec![1; 5]),
        "OPERATOR: mask.offsets has 5 entries, batch is 2"
    );
    let encoded = Encoded { scale: 1.0, causal: 5, operator: None };
    assert_eq!(encoded.decode(&shape(), &Sides::default()).unwrap_err().message(), "CAUSAL: 5");
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2.4e38] {
        let encoded = Encoded { scale, causal: 0, operator: None };
        let text = "SCALE: must be finite and at most 2.35e38 in size";
        assert_eq!(encoded.decode(&shape(), &Sides::default()).unwrap_err().message(), text, "{scale}");
    }
    assert!(
        Encoded { scale: -2.35e38, causal: 0, operator: None }.decode(&shape(), &Sides::default()).is_ok()
    );
}

#[test]
fn what_scores_meet_is_checked_and_named() {
    let top_left = |operator: proto::Operator| refused(proto::Causal::TopLeft, operator);
    let cap = |cap: f32| top_left(proto::Operator { softcap: Some(cap), ..Default::default() });
    assert_eq!(cap(0.0), "OPERATOR: softcap is 0, scale is 1");
    assert_eq!(cap(-2.0), "OPERATOR: softcap is -2, scale is 1");
    assert_eq!(cap(f32::NAN), "OPERATOR: softcap is NaN, scale is 1");
    assert_eq!(cap(f32::INFINITY), "OPERATOR: softcap is inf, scale is 1");
    let alibi = |slopes: &[f32], by_key| proto::Bias {
        kind: Some(proto::bias::Kind::Alibi(proto::Alibi { slopes: slopes.into(), by_key }.into())),
    };
    let with = |biases: Vec<proto::Bias>| proto::Operator { biases, ..Default::default() };
    let biases = |biases: Vec<proto::Bias>| top_left(with(biases));
    assert_eq!(
        biases(vec![alibi(&[1.0; 3], false)]),
        "OPERATOR: bias.alibi has 3 slopes, num_heads is 2, batch is 2"
    );
    assert_eq!(biases(vec![alibi(&[1.0, f32::INFINITY], false)]), "OPERATOR: bias.alibi.slopes[1] is inf");
    assert_eq!(
        biases(vec![alibi(&[1.0; 2], false), alibi(&[1.0; 4], true)]),
        "COMBINATION: bias.alibi twice"
    );
    assert_eq!(
        biases(vec![alibi(&[1.0; 2], false), proto::Bias { kind: None }]),
        "OPERATOR: biases[1] is of no kind that this node knows"
    );
    assert_eq!(
        refused(proto::Causal::None, with(vec![alibi(&[1.0; 2], false)])),
        "COMBINATION: bias.alibi and no mask.positions: q_len 3, kv_len 5 can be aligned two ways"
    );
    let normaliser = |bias: Option<f32>, sinks: Vec<f32>| {
        let kind = bias.map(proto::normaliser::Kind::SigmoidBias);
        top_left(proto::Operator {
            normaliser: Some(proto::Normaliser { kind }),
            sinks,
            ..Default::default()
        })
    };
    assert_eq!(normaliser(Some(f32::NAN), vec![]), "OPERATOR: normaliser.sigmoid_bias is NaN");
    assert_eq!(normaliser(Some(0.0), vec![0.0; 2]), "COMBINATION: normaliser=sigmoid and sinks");
    assert_eq!(normaliser(None, vec![]), "OPERATOR: normaliser is of no kind that this node knows");
}

#[test]
fn runs_are_counted_and_bounded() {
    let runs = |ends: usize, ids: usize, count: Vec<u32>| proto::Runs {
        end: (1..=ends as u32).collect(),
        id: (0..ids as u32).collect(),
        count,
    };
    let refused = |queries: proto::Runs| {
        let documents = proto::Documents { queries: Some(queries), keys: Some(runs(5, 5, vec![5])) };
        refused_mask(proto::Causal::None, |m| m.documents = Some(documents))
    };
    assert_eq!(
        refused(runs(65_537, 65_537, vec![1])),
        "OPERATOR: mask.documents.queries has 65537 runs, at most 65536"
    );
    assert_eq!(refused(runs(3, 2, vec![3])), "OPERATOR: mask.documents.queries has 3 ends, 2 ids");
    assert_eq!(refused(runs(3, 3, vec![1; 3])), "OPERATOR: mask.documents.queries has 3 entries, batch is 2");
    assert_eq!(
        refused(runs(3, 3, vec![u32::MAX, 4])),
        "OPERATOR: mask.documents.queries has 3 runs, counts for 4294967299"
    );
    assert_eq!(refused(runs(2, 2, vec![2])), "OPERATOR: mask.documents.queries[0] ends at 2, q_len is 3");
    assert_eq!(refused(runs(3, 3, vec![1, 2])), "OPERATOR: mask.documents.keys has 1 entries, batch is 2");
    let empty = proto::Runs { end: vec![3, 3], id: vec![0, 1], count: vec![2] };
    assert_eq!(refused(empty), "OPERATOR: mask.documents.queries[0]: run 1 ends at 3, the one before at 3");
}

#[test]
fn what_a_score_is_given_is_checked_and_named() {
    let refused_score = |score: proto::Score| {
        refused(proto::Causal::None, proto::Operator { score: Some(score), ..Default::default() })
    };
    let score = |function: &str, parameters: &str, ranks: &[u32], sizes: &[u32], values: &[u8]| {
        refused_score(proto::Score {
            function: function.to_owned(),
            parameters: parameters.to_owned(),
            ranks: ranks.to_vec(),
            sizes: sizes.to_vec(),
            values: values.to_vec().into(),
            previous: None,
        })
    };
    let known = "additive, biaffine, concat, cosine, distance, dot, gat, gatv2, general, keras_additive, keras_concat, \
                 location, location_aware, scaled_dot";
    assert_eq!(score("sharp", "", &[], &[], &[]), format!("OPERATOR: score=sharp: there are {known}"));
    assert_eq!(
        score("general", "", &[], &[], &[]),
        "COMBINATION: score=general and no parameter w of [query_dim 1, head_dim 1] or [num_heads 2, query_dim 1, head_dim 1]"
    );
    assert_eq!(
        score("dot", "w", &[1], &[1], &[0; 4]),
        "COMBINATION: score=dot and a parameter w: it takes one each of none"
    );
    let general = |ranks: &[u32], sizes: &[u32], values: &[u8]| score("general", "w", ranks, sizes, values);
    assert_eq!(general(&[2], &[1, 1], &[0; 5]), "OPERATOR: score.values has 5 bytes, not a multiple of 4");
    assert_eq!(general(&[2], &[1, 1], &[0; 8]), "OPERATOR: score.values has 1 more than its parameters");
    assert_eq!(general(&[2], &[1, 3], &[0; 8]), "OPERATOR: score.w is [1, 3], and 2 values are left for it");
    let max = u32::MAX;
    assert_eq!(
        general(&[3], &[max, max, max], &[0; 8]),
        "OPERATOR: score.w is [4294967295, 4294967295, 4294967295], and 2 values are left for it"
    );
    assert_eq!(general(&[2, 1], &[1, 1, 1], &[0; 8]), "OPERATOR: score has 1 parameters, 2 ranks");
    assert_eq!(general(&[max], &[1, 1], &[0; 4]), "OPERATOR: score has 2 sizes, its ranks count 4294967295");
    assert_eq!(
        general(&[2], &[1, 1], &f32::NAN.to_le_bytes()),
        "OPERATOR: score.w[0] is NaN, not a finite number"
    );
    assert_eq!(
        general(&[2], &[1024, 1280], &vec![0; OPERATOR_BYTES]),
        format!(
            "OPERATOR: its parameters, tables and lists have {} bytes, at most 5242880",
            OPERATOR_BYTES + 31
        )
    );
    assert_eq!(score("dot\n", "", &[], &[], &[]), "OPERATOR: score.function has control characters: dot\\n");
}

#[test]
fn tables_and_blocks_are_checked_and_named() {
    let bias = |kind| {
        let operator =
            proto::Operator { biases: vec![proto::Bias { kind: Some(kind) }], ..Default::default() };
        refused(proto::Causal::TopLeft, operator)
    };
    let relative = |bytes: usize, buckets, max_distance| {
        let table = vec![0; bytes].into();
        bias(proto::bias::Kind::Relative(
            proto::Relative { table, buckets, max_distance, bidirectional: true }.into(),
        ))
    };
    assert_eq!(relative(33, 4, 9), "OPERATOR: bias.relative.table has 33 bytes, not a multiple of 4");
    assert_eq!(relative(32, 70_000, 9), "OPERATOR: bias.relative has 70000 buckets, at most 65536");
    assert_eq!(relative(32, 3, 9), "OPERATOR: bias.relative has 3 buckets, at least 4 are needed");
    assert_eq!(
        relative(28, 8, 1),
        "OPERATOR: bias.relative.max_distance is 1, 8 buckets count up to 2 one by one"
    );
    assert_eq!(relative(28, 8, 9), "OPERATOR: bias.relative.table has 7 numbers, no multiple of 8");
    assert_eq!(
        relative(32, 8, 9),
        "OPERATOR: bias.relative.table has 8 numbers, 8 for each of 2 heads are needed"
    );
    let swin = proto::Swin { height: 2, width: 3, between: -100.0, ..Default::default() };
    assert_eq!(
        bias(proto::bias::Kind::Swin(swin.clone().into())),
        "COMBINATION: bias.swin.between -100 and no bias.swin.regions"
    );
    assert_eq!(
        bias(proto::bias::Kind::Swin(proto::Swin { between: 0.0, ..swin }.into())),
        "OPERATOR: bias.swin has windows of 2 * 3 tokens, q_len is 3"
    );
    let blocks = |csr| refused_mask(proto::Causal::None, |m| m.csr = Some(csr));
    let csr =
        proto::Csr { query_block: 2, key_block: 2, layouts: 1, row_ptr: vec![0, 1, 2], columns: vec![0, 3] };
    assert_eq!(blocks(csr.clone()), "OPERATOR: mask.csr.columns[1] is 3, 5 keys in blocks of 2 have 3");
    assert_eq!(blocks(proto::Csr { layouts: 0, ..csr.clone() }), "OPERATOR: mask.csr.layouts is 0");
    let many = vec![0; crate::limits::MAX_BLOCKS + 1];
    assert_eq!(
        blocks(proto::Csr { row_ptr: many, ..csr }),
        "OPERATOR: mask.csr.row_ptr has 1048577 numbers, at most 1048576"
    );
}

#[test]
fn previous_weights_are_there_if_and_only_if_a_score_looks_at_them() {
    let shape = shape();
    let previous = SideLayout::dense(SideTensor::Previous, Element::Float(Dtype::F32), [1, 1, 3, 5], &shape);
    let with = Sides::new(vec![previous.unwrap()]).unwrap();
    let plain = Operator::plain(1.0, Causal::None);
    assert_eq!(check_previous(&plain, &Sides::default()), Ok(()));
    assert_eq!(
        check_previous(&plain, &with).unwrap_err().message(),
        "COMBINATION: score=scaled_dot and score.previous"
    );
    let ones = |name: &str, shape: &[usize]| Tensor {
        name: name.into(),
        shape: shape.into(),
        values: vec![1.0; shape.iter().product()].into(),
    };
    let parameters = vec![
        ones("v", &[2]),
        ones("w_q", &[2, 1]),
        ones("w_k", &[2, 1]),
        ones("u", &[2, 1]),
        ones("filters", &[1, 3]),
    ];
    let score = Score::new("location_aware", parameters).unwrap();
    let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
    let aware = Operator::new(parts, &shape).unwrap();
    assert_eq!(check_previous(&aware, &with), Ok(()));
    assert_eq!(
        check_previous(&aware, &Sides::default()).unwrap_err().message(),
        "COMBINATION: score=location_aware and no score.previous"
    );
    let encoded = Encoded::new(&aware, &with);
    assert_eq!(encoded.sides(&shape), Ok(with.clone()));
    assert_eq!(encoded.decode(&shape, &with), Ok(Arc::new(aware)));
}

#[test]
fn rows_that_are_forbidden_are_not_filled() {
    for (empty_row, text) in [
        (EmptyRow::Nan, "COMBINATION: forbid_empty_rows and empty_row=nan"),
        (EmptyRow::Uniform, "COMBINATION: forbid_empty_rows and empty_row=uniform"),
    ] {
        let filled = OperatorParts { empty_row, ..OperatorParts::plain(1.0, Causal::None) };
        let filled = Operator::new(filled, &shape()).unwrap();
        assert_eq!(check_empty_rows(&filled, true).unwrap_err().message(), text);
        assert_eq!(check_empty_rows(&filled, false), Ok(()));
    }
    assert_eq!(check_empty_rows(&Operator::plain(1.0, Causal::None), true), Ok(()));
}

#[test]
fn a_causal_rule_beside_a_mask_gives_it_positions() {
    let window = || Mask { window: Window { left: Some(2), right: None }, ..Mask::default() };
    let joined = with_causal(Causal::BottomRight, window()).unwrap();
    assert_eq!((joined.causal, joined.positions), (true, Some(Positions::BottomRight)));
    assert_eq!(with_causal(Causal::None, window()), Ok(window()));
    let typed = Mask { positions: Some(Positions::TopLeft), ..window() };
    assert_eq!(with_causal(Causal::TopLeft, typed.clone()).map(|mask| mask.causal), Ok(true));
    assert_eq!(
        with_causal(Causal::BottomRight, typed).unwrap_err().message(),
        "COMBINATION: causal=bottom_right and mask.positions=top_left"
    );
}

proptest! {
    #[test]
    fn operators_return((shape, operator) in operators()) {
        let encoded = Encoded::from(&*operator);
        let is_old = operator.kernel_id(Compute::F32) == "c1-f32";
        if is_old {
            // A call that could always be made is made as it always was, but for positions, which change no bit of it.
            let more = encoded.operator.clone().unwrap_or_default();
            let mask = more.mask.clone().unwrap_or_default();
            let mask = proto::Mask { positions: 0, offsets: Vec::new(), ..mask };
            prop_assert_eq!((mask, proto::Operator { mask: None, ..more }), Default::default());
        }
        prop_assert_eq!(encoded.decode(&shape, &Sides::default()), Ok(operator));
    }

    #[test]
    fn no_operator_panics(
        causal in -1..6_i32, positions in -1..5_i32, offsets in proptest::collection::vec(any::<i64>(), 0..4),
        softcap in any::<Option<f32>>(), slopes in proptest::option::of(proptest::collection::vec(any::<f32>(), 0..5)), by_key in any::<bool>(),
        sides in any::<Option<[i32; 2]>>(), chunk in any::<u32>(), ends in proptest::collection::vec(0..9_u32, 0..3), scale in any::<f32>(),
    ) {
        let window = sides.map(|[left, right]| proto::Window { left: left.max(-3), right: right.max(-3) });
        let mask = proto::Mask {
            positions, offsets, window, chunk, key_end: ends.clone(), query_end: ends, ..Default::default()
        };
        let alibi = slopes.map(|slopes| proto::bias::Kind::Alibi(proto::Alibi { slopes, by_key }.into()));
        let biases = alibi.map(|kind| proto::Bias { kind: Some(kind) }).into_iter().collect();
        let operator = Some(proto::Operator { softcap, biases, mask: Some(mask), ..Default::default() });
        if let Ok(operator) = (Encoded { scale, causal, operator }).decode(&shape(), &Sides::default()) {
            for (group, token) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
                prop_assert!(operator.mask_of_group(group, &shape()).visible(token).end <= 5);
            }
        }
    }
}
